"""Render photos of 2000x1500 pixels with objects of 6 to 20 pixels on texture, in VOC layout: 24 train, 8 val, 8 test.

python tests/small_objects.py data/VOCdevkit/SmallObjects
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, SPLITS, OBJECTS = (1500, 2000), {"train": 24, "val": 8, "test": 8}, 150
CLASSES = {"disc": (200, 60, 60), "square": (60, 160, 60), "cross": (70, 90, 200)}


def render(random):
    """A photo, uint8 [H, W, 3], and its mask, uint8 [H, W]."""
    photo = np.full((*SIZE, 3), 120.0)
    for cell in (4, 16, 100):  # pixels
        noise = random.normal(0, 20, (SIZE[0] // cell + 1, SIZE[1] // cell + 1, 3)).clip(-127, 127) + 127
        image = Image.fromarray(noise.astype(np.uint8)).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        photo += np.asarray(image, float) - 127
    mask = np.zeros(SIZE, np.uint8)
    for label in random.integers(1, len(CLASSES) + 1, OBJECTS):
        side = random.integers(6, 21)
        top, left = (random.integers(0, length - side) for length in SIZE)
        y, x = np.abs(np.mgrid[:side, :side] - (side - 1) / 2) / (side / 2)  # distance from the middle
        inside = (x**2 + y**2 < 1, np.maximum(x, y) < 1, np.minimum(x, y) < 0.35)[label - 1]
        window = slice(top, top + side), slice(left, left + side)
        mask[window][inside] = label
        photo[window][inside] = [*CLASSES.values()][label - 1] + random.normal(0, 25, 3)
    return (photo + random.normal(0, 8, photo.shape)).clip(0, 255).astype(np.uint8), mask


folders = [Path(sys.argv[1], name) for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")]
for folder in folders:
    folder.mkdir(parents=True)
for split, count in SPLITS.items():
    ids = [f"{split}_{index:02}" for index in range(count)]
    for index, name in enumerate(ids):
        photo, mask = map(Image.fromarray, render(np.random.default_rng([len(split), index])))
        photo.save(folders[0] / f"{name}.jpg", quality=95)
        mask.save(folders[1] / f"{name}.png")
    (folders[2] / f"{split}.txt").write_text("\n".join(ids) + "\n")
Path(sys.argv[1], "classes.txt").write_text("\n".join(["background", *CLASSES]) + "\n")
