#!/usr/bin/env bash
# Copy CamVid with other splits, to choose settings on a drive that no training photo shows:
#
#     benchmarks/other_drive.sh data/VOCdevkit/CamVid data/VOCdevkit/CamVid-0006R0
#
# CamVid's val is of a drive that train shows too. Here, val is the drive 0006R0 (101 photos of CamVid's train), and train
# is the rest of CamVid's train (266 photos). There is no test split.
usage="usage: benchmarks/other_drive.sh CAMVID FOLDER"
camvid=${1:?$usage} lists=${2:?$usage}/ImageSets/Segmentation
set -e
mkdir -p "$lists"
cp -r "$camvid"/{JPEGImages,SegmentationClass,classes.txt} "$2"
grep ^0006R0 "$camvid/ImageSets/Segmentation/train.txt" >"$lists/val.txt"
grep -v ^0006R0 "$camvid/ImageSets/Segmentation/train.txt" >"$lists/train.txt"
