"""What each part of an experiment gives: the same script with one thing changed, trained from the same seeds.

    python benchmarks/ablation.py network --data data/VOCdevkit/Toy --limit 96 --epochs 12 --seeds 0 1
    python benchmarks/ablation.py weights --data data/VOCdevkit/Toy --limit 96 --epochs 12 --seeds 0
    python benchmarks/ablation.py augmentation --data data/VOCdevkit/Toy --limit 96 --epochs 12 --seeds 0 1

``network`` takes parts out of train_5_a.py's network; ``weights`` puts other formulas into train_4_c.py's loss;
``augmentation`` gives train_4_b.py each image three times an epoch as it is, as many steps without the variety. Prints
the mean IoU on val and the paired difference to the script as it is, as compare.py does, in a table in Markdown; runs
that are done are not done again.
"""

import functools
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compare
import train_4_b
import train_4_c
import train_5_a
import util
import voc
from custom_fcn import CustomFCN
from transforms import Augmentation


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
            "as it is": voc.class_weights,
            "median frequency": median_frequency,
            "effective number": effective_number,
        },
    ),
    "augmentation": (
        train_4_b,
        "transforms.Augmentation",
        {
            "as it is": Augmentation,
            "copies": lambda plain, augmented, **draws: Augmentation(plain=plain + augmented, augmented=0),
        },
    ),
}


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    args, shared = parser.parse_known_args()
    script, target, variants = STUDIES[args.study]
    rows, changes, base = [], [], None
    for name, variant in variants.items():
        runs = {}
        for seed in args.seeds:
            out = args.out / args.study / name.replace(" ", "_")
            figures = out / "results" / f"{script.__name__}_seed{seed}.json"
            if not figures.exists():
                line = [f"{script.__name__}.py", *shared, "--seed", str(seed), "--out", str(out)]
                with mock.patch.object(sys, "argv", line), mock.patch(target, variant):
                    script.main()
            runs[seed] = compare.Run.read(figures)
        rows.append([name, len(runs), compare.spread([one.score("val", "miou") for one in runs.values()])])
        base = base or runs
        if runs is not base:
            changes += compare.change(name, runs, "as it is", base, "val")
    print(f"\n{script.__name__}.py {' '.join(shared)}, torch {torch.__version__}\n")
    print(compare.table([args.study, "seeds", "val mean IoU"], rows))
    print()
    print(compare.table([args.study, "compared with", *compare.change_head("val")], changes))


if __name__ == "__main__":
    cli.run(main)
