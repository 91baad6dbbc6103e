"""Copy CamVid with other splits, so that a setting can be chosen on a drive that no training photo shows.

    python benchmarks/other_drive.py data/VOCdevkit/CamVid data/VOCdevkit/CamVid-0006R0

CamVid's val is of a drive that most of train shows. Here, val is the drive 0006R0 (101 photos of CamVid's train), and
train is the rest of CamVid's train (266 photos).
"""

import argparse
import shutil
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    shutil.copytree(args.camvid, args.out, ignore=shutil.ignore_patterns(".cache"))
    lists = args.out / "ImageSets" / "Segmentation"
    ids = (lists / "train.txt").read_text().split()
    val = [image_id for image_id in ids if image_id.startswith("0006R0")]
    for name, chosen in {"train": [one for one in ids if one not in val], "val": val}.items():
        (lists / f"{name}.txt").write_text("".join(f"{image_id}\n" for image_id in chosen))


if __name__ == "__main__":
    main()
