"""Measure what a part of an experiment contributes: the same script with one thing changed, from the same seeds.

    python benchmarks/ablation.py network --data data/VOCdevkit/Toy --limit 96 --epochs 12 --seeds 0 1

``network`` removes parts of train_5_a.py's network; ``weights`` tries other class weights in train_4_c.py; in
``augmentation``, train_4_b.py shows each image three times unchanged: as many steps without the variety. Prints mean
IoU and paired differences on val. Finished runs are not repeated. Other flags are those of the script.
"""

import functools
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import compare
import train_4_b
import train_4_c
import train_5_a
import voc
from custom_fcn import CustomFCN
from transforms import Augmentation


def median_frequency(split):
    """Eigen and Fergus (2015): median frequency / frequency, the share of a class in the images that show it."""
    counts = [np.bincount(split.mask(index).ravel(), minlength=256) for index in range(len(split))]
    counts = np.stack(counts)[:, : len(split.classes)]
    totals = np.where(counts > 0, counts.sum(1, keepdims=True), 0).sum(0)
    frequency = counts.sum(0) / np.maximum(totals, 1)
    median = np.median(frequency[frequency > 0])
    return torch.tensor(median / np.where(frequency > 0, frequency, median), dtype=torch.float32)


def effective_number(split, beta=0.99):
    """Cui et al. (2019): ``(1 - beta) / (1 - beta^n)``, n being the number of images that show a class, at least 1."""
    _, images = voc.class_counts(split)
    return torch.tensor((1 - beta) / (1 - beta ** np.maximum(images, 1)), dtype=torch.float32)


NETWORKS = {
    "as it is": CustomFCN,
    "without skips": functools.partial(CustomFCN, skips=False),
    "without shortcuts": functools.partial(CustomFCN, residual=False),
    "without context": functools.partial(CustomFCN, context=False),
}
WEIGHTS = {"as it is": voc.class_weights, "median frequency": median_frequency, "effective number": effective_number}
AUGMENTATIONS = {
    "as it is": Augmentation,
    "copies": lambda unchanged, augmented, **_: Augmentation(unchanged=unchanged + augmented, augmented=0),
}
STUDIES = {  # the script, the name in it that is replaced, and by what
    "network": (train_5_a, "train_5_a.CustomFCN", NETWORKS),
    "weights": (train_4_c, "voc.class_weights", WEIGHTS),
    "augmentation": (train_4_b, "transforms.Augmentation", AUGMENTATIONS),
}


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", nargs="+", type=cli.integer(0), default=[0])
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    args, flags = parser.parse_known_args()
    script, target, variants = STUDIES[args.study]
    results, differences, base = [], [], None
    for name, variant in variants.items():
        runs = {}
        for seed in args.seeds:
            out = args.out / args.study / name.replace(" ", "_")
            metrics = out / "results" / f"{script.__name__}_seed{seed}.json"
            if not metrics.exists():
                command = [f"{script.__name__}.py", *flags, "--seed", str(seed), "--out", str(out)]
                with mock.patch("sys.argv", command), mock.patch(target, variant):
                    script.main()
            runs[seed] = compare.Run.read(metrics)
        miou = compare.mean_and_std([run.score("val", "miou") for run in runs.values()])
        results.append({args.study: name, "seeds": len(runs), "val mean IoU": miou})
        base = base or runs
        if runs is not base:
            differences.append(compare.difference_row(name, runs, "as it is", base, "val"))
    print(f"\n{script.__name__}.py {' '.join(flags)}, torch {torch.__version__}\n")
    print(compare.markdown_table(results), compare.markdown_table(differences), sep="\n\n")


if __name__ == "__main__":
    cli.run(main)
