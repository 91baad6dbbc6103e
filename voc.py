"""PASCAL VOC segmentation: class names, class weights, and loaders for any folder in VOC layout.

Masks hold class indices, and 255 for void, the unlabelled pixels: void stays 255 up to the loss (``ignore_index``) and
the metrics. docs/DATA.md describes the files of such a folder.

    python voc.py --data DIR --split train              print how often each class occurs in a split
    python voc.py --data DIR --check                    open every photo and mask of the splits and list all faults
    python voc.py --data DIR --from-colours colours.txt convert masks in colours to class indices
    python voc.py --data DIR --tiles 224 --out TILES    cut large photos and their masks into tiles
"""

import functools
from pathlib import Path

import numpy as np
import torch

from seg import cli, imaging, tiles, voc_layout
from seg.data import LabelledImages, Loader, Split
from seg.voc_layout import CLASSES, class_counts

__all__ = ["CLASSES", "LabelledImages", "Loader", "Split", "check", "class_counts", "class_weights", "loaders"]


def class_weights(split):
    """Class weights against imbalance: ``1 / ln(1.02 + p)``, p being a class's share of the labelled pixels of a Split.

    The formula is that of ENet (Paszke et al., 2016). The weights, a float32 tensor [C], lie between 1.42 for a class
    that fills every mask and 50.5 for one that is in none. The scripts use their square root: benchmarks/TRIED.md.
    """
    pixels, _ = class_counts(split)
    return torch.tensor(1 / np.log(1.02 + pixels / pixels.sum()), dtype=torch.float32)


def loaders(args, size, augment=None, mean=imaging.MEAN, std=imaging.STD, splits=None):
    """Loaders of the splits train, val and test (None if there is no ``test.txt``); only train is augmented.

    ``args`` is from ``cli.arguments``; ``splits``, LabelledImages, replace those of ``args.data``; the others are as
    for Loader. Warns of suspicious data in one line each.
    """
    if splits is None:
        splits = [Split(args.data, name) for name in voc_layout.split_names(voc_layout.find_root(args.data))]
    for split in splits if args.limit else ():
        split.ids, split.limit = split.ids[: args.limit], args.limit
    options = {"batch_size": args.batch_size, "seed": args.seed, "device": args.device, "mean": mean, "std": std}
    loader = functools.partial(Loader, size=size, **options)
    train = loader(splits[0], training=True, augment=augment)
    val, *test = map(loader, splits[1:])
    voc_layout.print_warnings(splits, [one.counts.tolist() for one in (train, val, *test)], train.size)
    return train, val, test[0] if test else None


def check(root):
    """Open all photos and masks of the splits; print warnings or, with a UserError, the first fault of each image."""
    root = voc_layout.find_root(root)
    faults, splits = [], []
    for name in voc_layout.split_names(root):
        if split := voc_layout.attempt(faults, Split, root, name):
            splits.append(split)
            voc_layout.map_images(lambda index: split.resized(index, (1, 1)), range(len(split)), name, faults)
    if not faults:
        counts = [class_counts(split)[0] for split in splits]
        for split, pixels in zip(splits, counts):
            voc_layout.attempt(faults, voc_layout.check_labels, split, pixels, split.name == "train")
        voc_layout.print_warnings(splits, counts)
    voc_layout.report_faults(root, faults)
    print(f"{root}: no faults in {', '.join(f'{len(split)} {split.name} images' for split in splits)}")


def print_class_counts(split):
    pixels, images = class_counts(split)
    print(f"{split.root} {split.name}: {len(split)} masks, {pixels.sum()} labelled pixels")
    print(f"{'class':14} {'share of pixels':>15} {'pixels':>11} {'images':>7}")
    for name, num_pixels, num_images in zip(split.classes, pixels, images):
        share = num_pixels / max(pixels.sum(), 1)  # all may be void
        print(f"{name:14} {share:15.4f} {num_pixels:11d} {num_images:7d}")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", default="data/VOCdevkit/VOC2007", metavar="DIR", help="folder in VOC layout")
    parser.add_argument("--split", default="train", help="name of a list in ImageSets/Segmentation (default: train)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="list all faults of train, val and test instead")
    instead.add_argument("--from-colours", metavar="FILE", help="convert masks in colours instead")
    instead.add_argument("--tiles", type=cli.parse_size, metavar="N|WxH", help="cut into tiles of this size instead")
    parser.add_argument("--overlap", type=cli.integer(0), default=64, metavar="N", help="of tiles (default: 64 pixels)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for --tiles")
    parser.add_argument("--jpeg", action="store_true", help="write tiles of photos as JPEG instead of PNG")
    args = parser.parse_args()
    if args.tiles:
        if not args.out or args.overlap >= min(args.tiles):
            parser.error("--tiles needs --out DIR, and an --overlap (default: 64) smaller than a tile")
        tiles.cut(args.data, args.out, args.tiles, args.overlap, ".jpg" if args.jpeg else ".png")
    elif args.check:
        check(args.data)
    elif args.from_colours:
        voc_layout.from_colours(args.data, args.from_colours)
    else:
        print_class_counts(Split(args.data, args.split))


if __name__ == "__main__":
    cli.run(main)
