"""Measure what a part of an experiment contributes: the same script with one thing changed, from the same seeds.

    python benchmarks/ablation.py network --data data/VOCdevkit/CamVid --seeds 0 1 2

``network`` removes parts of train_5_a.py's network; ``augmentation`` changes train_4_b.py: three unchanged copies of
each image, which are as many steps without the variety, or a constant learning rate; ``recipe`` leaves out or changes
parts of train_6.py. Prints mean IoU and paired differences on val. Finished runs are not repeated, and stopped ones
continue; a study that was edited here needs another --out. Other flags are those of the script.
"""

import contextlib
import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compare
import train_4_b
import train_5_a
import train_6
import voc
from custom_fcn import CustomFCN
from resnet_unet import AveragedResNetUNet
from seg import cli, files
from seg.transforms import Augmentation
from util import UserError


def augmentation_without(*names):
    return lambda **options: Augmentation(**{name: options[name] for name in options.keys() - set(names)})


def backbone_rate(rate):
    """AdamW with another learning rate in the first of the two groups; 0 freezes that group, weight decay included."""
    adamw = torch.optim.AdamW
    return lambda groups, **options: adamw([groups[0] | {"lr": rate}, groups[1]], **options)


def loaders_with(**changes):
    loaders = voc.loaders
    return lambda *args, **options: loaders(*args, **options | changes)


def powered_weights(power):
    """Class weights to a power: 0 weighs all classes the same, 2 undoes the square root that the script takes."""
    class_weights = voc.class_weights
    return lambda split: class_weights(split) ** power


# Of each study: the script, and the variants: what is replaced in the script or the modules that it uses.
STUDIES = {
    "network": (
        train_5_a,
        {
            "as it is": {},
            "without skips": {"train_5_a.CustomFCN": functools.partial(CustomFCN, skips=False)},
            "without shortcuts": {"train_5_a.CustomFCN": functools.partial(CustomFCN, residual=False)},
            "without context": {"train_5_a.CustomFCN": functools.partial(CustomFCN, context=False)},
        },
    ),
    "augmentation": (
        train_4_b,
        {
            "as it is": {},
            "copies": {
                "transforms.Augmentation": lambda unchanged, augmented, **_: Augmentation(
                    unchanged=unchanged + augmented, augmented=0
                )
            },
            "constant learning rate": {
                "torch.optim.lr_scheduler.CosineAnnealingLR": lambda optimizer, **_: LambdaLR(optimizer, lambda _: 1.0)
            },
        },
    ),
    "recipe": (
        train_6,
        {
            "as it is": {},
            "without ImageNet": {"train_6.ResNet18_Weights": SimpleNamespace(IMAGENET1K_V1=None)},
            "without fine-tuning": {
                "torch.optim.AdamW": backbone_rate(0.0),
                "resnet_unet.resnet18": functools.partial(resnet18, norm_layer=FrozenBatchNorm2d),
            },
            "one learning rate": {"torch.optim.AdamW": backbone_rate(1e-3)},
            "constant batch norm": {"resnet_unet.resnet18": functools.partial(resnet18, norm_layer=FrozenBatchNorm2d)},
            "without average": {
                "train_6.AveragedResNetUNet": lambda *args, decay: AveragedResNetUNet(*args, decay=0.0)
            },
            "without colours": {
                "transforms.Augmentation": augmentation_without("brightness", "contrast", "saturation")
            },
            "without crops": {"transforms.Augmentation": augmentation_without("scale")},
            "without weights": {"voc.class_weights": powered_weights(0)},
            "ENet's weights": {"voc.class_weights": powered_weights(2)},
            "square input": {"voc.loaders": loaders_with(size=416)},  # 2 % more pixels
        },
    ),
}


@mock.patch("seg.files.read_code", functools.cache(files.read_code))  # the imported code runs, also if a file is edited
def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", nargs="+", type=cli.integer(0), default=[0])
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    args, flags = parser.parse_known_args()
    if "--no-pretrained" in flags:
        raise UserError("--no-pretrained: is a variant of its own")
    wanted = cli.shared_flags("").parse_args(flags)
    script, variants = STUDIES[args.study]
    results, differences, base, machines = [], [], None, set()
    for name, replacements in variants.items():
        runs = {}
        for seed in args.seeds:
            out = args.out / args.study / name.replace(" ", "_")
            metrics = out / "results" / f"{script.__name__}_seed{seed}.json"
            if not metrics.exists():
                command = [f"{script.__name__}.py", *flags, "--seed", str(seed), "--out", str(out), "--resume"]
                with contextlib.ExitStack() as stack:
                    for target, replacement in ({"sys.argv": command} | replacements).items():
                        stack.enter_context(mock.patch(target, replacement))
                    script.main()
            runs[seed] = compare.Run.read(metrics)
            if not runs[seed].matches(wanted):
                raise UserError(f"{metrics}: is from a run with other flags: choose another --out")
            if change := runs[seed].code_change(compare.ROOT):
                raise UserError(f"{metrics}: {change}: choose another --out")
            machines.add(runs[seed].machine)
        miou = compare.mean_and_std([run.score("val", "miou") for run in runs.values()])
        results.append({args.study: name, "seeds": len(runs), "val mean IoU": miou})
        base = base or runs
        if runs is not base:
            differences.append(compare.difference_row(name, runs, "as it is", base, "val"))
    command = f"{args.study} of {script.__name__}.py {' '.join(flags)}"
    print(f"\n{command}, seeds {', '.join(map(str, args.seeds))}; runs on {'; '.join(sorted(machines))}\n")
    print(compare.markdown_table(results), compare.markdown_table(differences), sep="\n\n")


if __name__ == "__main__":
    cli.run(main)
