"""Copy CamVid with other splits, to choose settings on a drive that no training photo shows.

    python benchmarks/other_drive.py data/VOCdevkit/CamVid data/VOCdevkit/CamVid-0006R0

CamVid's val is of a drive that train shows too. Here, val is the drive 0006R0 (101 photos of CamVid's train), and train
is the rest of CamVid's train (266 photos). There is no test split.
"""

import shutil
import sys
from pathlib import Path

camvid, target = map(Path, sys.argv[1:])
shutil.copytree(camvid, target, ignore=shutil.ignore_patterns(".cache", "test.txt"))
lists = target / "ImageSets" / "Segmentation"
ids = (lists / "train.txt").read_text().split()
for split, is_val in (("train", False), ("val", True)):
    chosen = [image_id for image_id in ids if image_id.startswith("0006R0") == is_val]
    (lists / f"{split}.txt").write_text("\n".join(chosen) + "\n")
