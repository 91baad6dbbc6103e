"""How long our augmentation takes, and torchvision's v2 transforms for the same: ratios from one run.

    python benchmarks/augmentation.py

Other work on the machine changes them.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torchvision import tv_tensors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from speed import v2_transforms

from transforms import Augmentation

BATCH, SIZE, ROUNDS = 16, 224, 15


def main():
    images = torch.randint(256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    masks = torch.randint(21, (BATCH, SIZE, SIZE), dtype=torch.uint8)
    ours = Augmentation(flip=0.5, degrees=15, scale=(0.5, 1.0))
    generator = torch.Generator().manual_seed(0)
    theirs = v2_transforms(ours, SIZE)

    def with_v2():
        for image, mask in zip(images, masks):  # v2 draws once a call: one call an image, or all are turned alike
            theirs(tv_tensors.Image(image), tv_tensors.Mask(mask))

    ways = {"ours": lambda: ours(images, masks, ours.draw(BATCH, generator)), "torchvision v2": with_v2}
    times = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    unit = statistics.median(times["ours"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {ROUNDS} batches of {BATCH}")
    for name, seconds in times.items():
        print(f"{name:15} {statistics.median(seconds) / unit:5.2f}")


if __name__ == "__main__":
    main()
