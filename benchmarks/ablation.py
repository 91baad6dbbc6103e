"""What each part of an experiment gives: the same script with one thing changed, trained from the same seeds.

    python benchmarks/ablation.py network --data data/VOCdevkit/Toy --limit 96 --epochs 12 --seeds 0 1
    python benchmarks/ablation.py weights --data data/VOCdevkit/Toy --limit 96 --epochs 12 --seeds 0

``network`` takes parts out of train_5_a.py's network; ``weights`` puts other formulas into train_4_c.py's loss. Prints
the mean IoU on val, as a table in Markdown; runs that are done are not done again.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compare
import train_4_c
import train_5_a
import util
import voc
from custom_fcn import CustomFCN


def median_frequency(split):
    """Eigen and Fergus (2015): median of all f over f, a class's share of the pixels of the images that show it."""
    pixels, total = np.zeros((2, len(split.classes)))
    for index in range(len(split)):
        mask = split.mask(index)
        counts = np.bincount(mask.ravel(), minlength=256)[: len(split.classes)]
        pixels += counts
        total += np.where(counts > 0, counts.sum(), 0)
    share = pixels / np.maximum(total, 1)
    median = np.median(share[share > 0])
    return torch.tensor(median / np.where(share > 0, share, median), dtype=torch.float32)


def effective_number(split, beta=0.99):
    """Cui et al. (2019): ``(1 - beta) / (1 - beta^n)``, n being the number of images that show a class, at least 1."""
    _, images = voc.class_counts(split)
    return torch.tensor((1 - beta) / (1 - beta ** np.maximum(images, 1)), dtype=torch.float32)


STUDIES = {
    "network": (
        train_5_a,
        "train_5_a.CustomFCN",
        {
            "as it is": CustomFCN,
            "without skips": functools.partial(CustomFCN, skips=False),
            "without shortcuts": functools.partial(CustomFCN, residual=False),
            "without context": functools.partial(CustomFCN, context=False),
        },
    ),
    "weights": (
        train_4_c,
        "voc.class_weights",
        {
            "inverse logarithm": voc.class_weights,
            "median frequency": median_frequency,
            "effective number": effective_number,
        },
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    args, shared = parser.parse_known_args()
    script, target, variants = STUDIES[args.study]
    rows = []
    for name, variant in variants.items():
        scores = []
        for seed in args.seeds:
            out = args.out / args.study / name.replace(" ", "_")
            figures = out / "results" / f"{script.__name__}_seed{seed}.json"
            if not figures.exists():
                line = [f"{script.__name__}.py", *shared, "--seed", seed, "--out", str(out)]
                with mock.patch.object(sys, "argv", line), mock.patch(target, variant):
                    script.main()
            scores.append(json.loads(figures.read_text())["val"]["miou"])
        rows.append([name, compare.spread(scores)])
    seeds = ", ".join(args.seeds)
    print(f"\n{script.__name__}.py {' '.join(shared)}, seeds {seeds}, torch {torch.__version__}")
    print(compare.table([args.study, "val mean IoU"], rows))


if __name__ == "__main__":
    util.run(main)
