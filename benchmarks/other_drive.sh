#!/usr/bin/env bash
# Copy CamVid with other splits, to choose settings on a drive that no training photo shows:
#
#     benchmarks/other_drive.sh data/VOCdevkit/CamVid data/VOCdevkit/CamVid-0006R0
#
# CamVid's val is of a drive that train shows too. Here, val is the drive 0006R0 (101 photos of CamVid's train), and train
# is the rest of CamVid's train (266 photos). There is no test split.
usage="usage: benchmarks/other_drive.sh CAMVID FOLDER"
camvid=${1:?$usage} folder=${2:?$usage} lists=ImageSets/Segmentation
set -e
ids=$(<"$camvid/$lists/train.txt")
mkdir "$folder"
cp -r "$camvid"/{JPEGImages,SegmentationClass,classes.txt} "$folder"
mkdir -p "$folder/$lists"
grep ^0006R0 <<<"$ids" >"$folder/$lists/val.txt"
grep -v ^0006R0 <<<"$ids" >"$folder/$lists/train.txt"
