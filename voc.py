"""PASCAL VOC segmentation: class names, class weights, and loaders for any folder in VOC layout.

A folder in VOC layout holds ``JPEGImages/<id>.jpg``, ``SegmentationClass/<id>.png`` and
``ImageSets/Segmentation/<split>.txt`` with one id per line; for other classes than VOC's, ``classes.txt`` with one name
per line. Masks hold class indices, and 255 for void, the unlabelled pixels: void stays 255 up to the loss
(``ignore_index``) and the metrics. layout.py reads the files, and docs/DATA.md describes them.

    python voc.py --data DIR --split train              print how often each class occurs in a split
    python voc.py --data DIR --check                    open every photo and mask of the splits and list all faults
    python voc.py --data DIR --from-colours colours.txt convert masks in colours to class indices
"""

import numpy as np
import torch

from seg import cli, distributed, imaging, layout
from seg.data import Loader, Split, naming_check
from util import VOID, UserError


def class_counts(split):
    """Count the pixels of each class over all masks of a Split, and the images that show it: two int64 arrays [C]."""

    def count(index):
        return np.bincount(split.mask(index).ravel(), minlength=VOID + 1)[: len(split.classes)]

    counts = np.stack(layout.map_images(count, range(len(split)), f"counting {split.name}"))
    return counts.sum(0), (counts > 0).sum(0)


def class_weights(split):
    """Class weights against imbalance: ``1 / ln(1.02 + p)``, p being a class's share of the labelled pixels of a Split.

    The formula is that of ENet (Paszke et al., 2016). The weights, a float32 tensor [C], lie between 1.42 for a class
    that fills every mask and 50.5 for one that is in none. The scripts use their square root: report/TRIED.md.
    """
    pixels, _ = class_counts(split)
    return torch.tensor(1 / np.log(1.02 + pixels / pixels.sum()), dtype=torch.float32)


def loaders(args, size, augment=None, mean=imaging.MEAN, std=imaging.STD):
    """Loaders of the splits train, val and test; only train is shuffled and augmented. See Split and Loader.

    The third is None if there is no ``test.txt``: the reported metrics are then on val only. The main process prints
    a line for each suspicious property of the data, such as classes without a pixel in train.

    Args:
        args: from ``cli.arguments``: data, batch_size, limit, seed and device.
        size: of the network's input in pixels: (height, width), or the side of a square.
        augment: see Loader. mean, std: of the normalisation, three numbers each.
    """
    root = layout.find_root(args.data)
    shared = {"size": size, "batch_size": args.batch_size, "seed": args.seed, "device": args.device}
    shared |= {"mean": mean, "std": std}
    with naming_check(root):
        names = layout.split_names(root)
        splits = [Split(root, names[0], args.limit)]
        splits += [Split(root, name, args.limit, like=splits[0]) for name in names[1:]]
    train = Loader(splits[0], training=True, augment=augment, **shared)
    others = [Loader(split, **shared) for split in splits[1:]]
    if distributed.is_main():
        for text in layout.warnings(splits, [loader.counts.tolist() for loader in (train, *others)]):
            print(f"warning: {text}", flush=True)
    return train, others[0], others[1] if len(others) > 1 else None


def check(root):
    """Open all photos and masks of the splits train, val and test; print warnings and all faults of the data.

    Raises a UserError if there are faults. Of a kind, the first 20 are printed.
    """
    root = layout.find_root(root)
    faults, splits, counts, colours = [], [], [], {}
    names = layout.split_names(root)
    for name in names:
        try:
            split = Split(root, name, report=faults.append)
        except UserError as error:
            faults.append(str(error))
            continue
        split._colours = colours  # to compare the palettes of all splits
        results = layout.map_images(split.check, range(len(split)), name)
        faults += [message for messages, _ in results for message in messages]
        values = [values for _, values in results]
        if split.classes and values and not any(value is None for value in values):
            splits.append(split)
            counts.append(sum(values)[: len(split.classes)])
            if fault := layout.label_fault(split, counts[-1], training=name == "train"):
                faults.append(fault)
    if len(splits) == len(names):
        for text in layout.warnings(splits, counts):
            print(f"warning: {text}")
    layout.report_faults(root, faults)
    print(f"{root}: no faults in {', '.join(f'{len(split)} {split.name} images' for split in splits)}")


def print_class_counts(split):
    """Print how often each class occurs in a Split, void excluded."""
    pixels, images = class_counts(split)
    num_labelled = max(pixels.sum(), 1)  # all may be void
    print(f"{split.root} {split.name}: {len(split)} masks, {pixels.sum()} labelled pixels")
    print(f"{'class':14} {'share of pixels':>15} {'pixels':>11} {'images':>7}")
    for name, num_pixels, num_images in zip(split.classes, pixels, images):
        print(f"{name:14} {num_pixels / num_labelled:15.4f} {num_pixels:11d} {num_images:7d}")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", default="data/VOCdevkit/VOC2007", metavar="DIR", help="folder in VOC layout")
    parser.add_argument("--split", default="train", help="name of a list in ImageSets/Segmentation (default: train)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="list all faults of train, val and test instead")
    instead.add_argument("--from-colours", metavar="FILE", help="convert masks in colours instead")
    args = parser.parse_args()
    if args.check:
        check(args.data)
    elif args.from_colours:
        layout.from_colours(args.data, args.from_colours)
    else:
        print_class_counts(Split(args.data, args.split))


if __name__ == "__main__":
    cli.run(main)
