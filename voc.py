"""PASCAL VOC segmentation: class names, palette, and batches from any folder in VOC layout.

A folder in VOC layout holds ``JPEGImages/<id>.jpg``, ``SegmentationClass/<id>.png`` and
``ImageSets/Segmentation/<split>.txt`` with one id a line; for data with other classes, ``classes.txt`` with one name a
line. Masks hold class indices, and 255 for void, the pixels that nobody labelled: void stays 255 all the way to the
loss (``ignore_index``) and to the metrics.

Print how often each class occurs, void left out:

    python voc.py --data data/VOCdevkit/VOC2007 --split train
"""

import argparse
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from util import VOID, UserError, run

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Mean and standard deviation of ImageNet's photos in 0..1, as red, green, blue: torchvision's weights expect them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")


def _palette():
    """VOC's colour map: the bits of an index, three at a time, fill red, green and blue from the top bit down."""
    palette = np.zeros((256, 3), np.uint8)
    index = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


PALETTE = _palette()  # uint8 [256, 3], RGB; row 255 is the colour of void


def _find_root(root):
    """Return ``root`` as a Path if it is a folder in VOC layout, else raise a UserError that says where data is."""
    root = Path(root)
    if (root / "ImageSets" / "Segmentation").is_dir():
        return root
    nearby = [*sorted(root.glob("*")), *sorted(root.glob("*/*")), *root.parents]
    for folder in nearby:
        if (folder / "ImageSets" / "Segmentation").is_dir():
            raise UserError(f"{root} is not in VOC layout, but {folder} is: use --data {folder}")
    raise UserError(
        f"no data in {root} (a folder with JPEGImages, SegmentationClass and ImageSets/Segmentation). Get some:\n"
        "  python download.py                                  downloads VOC2007 into data/VOCdevkit/VOC2007\n"
        "  python download.py --tar FILE --tar FILE            unpacks the two VOC2007 archives that you already have\n"
        "  python download.py --toy                            renders a toy set, without network: then train with\n"
        "                                                      --data data/VOCdevkit/Toy"
    )


def open_picture(path):
    """Decode the picture at ``path`` as a PIL image; whatever is wrong with the file becomes a UserError."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, but a split lists it: add the file or take its id out") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}): replace the file") from None


def to_rgb(image):
    """A PIL image in RGB. 16-bit greyscale is scaled to 8 bits; Pillow's own conversion would turn most of it white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def squeeze(image, size, resampling=Image.Resampling.BILINEAR):
    """A PIL image as networks are given it, size x size, as a uint8 array; by default bilinear and antialiased."""
    return np.asarray(image.resize((size, size), resampling))


class Split:
    """The photos and masks of one split of a folder in VOC layout, read from disk and checked each time.

    Args:
        root: the folder in VOC layout.
        split: name of the list in ``ImageSets/Segmentation``, without ``.txt``.
        limit: keep only the first so many ids; None keeps all.

    Attributes:
        root: Path of the folder.
        name: the split's name.
        ids: list of str.
        classes: tuple of class names: those of ``classes.txt`` where there is one, else VOC's 21.

    Raises:
        UserError: no such folder or split, an empty split or an id that is listed twice.
    """

    def __init__(self, root, split, limit=None):
        self.root = _find_root(root)
        self.name = split
        path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise UserError(f"{path}: no such split: write one image id a line into it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as text ({error}): write one image id a line into it") from None
        self.ids = [line.strip() for line in lines if line.strip()]
        if not self.ids:
            raise UserError(f"{path}: the split is empty: write one image id a line into it")
        name, times = Counter(self.ids).most_common(1)[0]
        if times > 1:
            raise UserError(f"{path}: lists {name} {times} times: keep one")
        self.ids = self.ids[:limit]
        self.classes = self._classes()

    def _classes(self):
        path = self.root / "classes.txt"
        if not path.exists():
            return CLASSES
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
        if not 2 <= len(names) <= VOID or len(set(names)) < len(names):
            raise UserError(f"{path}: needs 2 to {VOID} different class names, one a line; it has {len(names)}")
        return names

    def __len__(self):
        return len(self.ids)

    def photo(self, index):
        """The photo as a PIL image in RGB. Raises UserError where it is missing or unreadable."""
        stem = self.root / "JPEGImages" / self.ids[index]
        candidates = [stem.with_name(stem.name + suffix) for suffix in PHOTO_SUFFIXES]
        return to_rgb(open_picture(next((path for path in candidates if path.exists()), candidates[0])))

    def mask(self, index):
        """The mask as a uint8 array [H, W] of class indices and VOID, at its own resolution.

        Raises:
            UserError: the file is missing or unreadable, is no palette or greyscale picture, or holds a value that is
                neither a class nor VOID.
        """
        path = self.root / "SegmentationClass" / f"{self.ids[index]}.png"
        image = open_picture(path)
        if image.mode not in ("P", "L", "1"):
            raise UserError(
                f"{path}: is a picture in mode {image.mode}, but a mask holds class indices: "
                "save it as a palette or 8-bit greyscale PNG whose values are the classes"
            )
        mask = np.asarray(image).astype(np.uint8)
        number = len(self.classes)
        wrong = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[number:VOID])
        if wrong.size:
            raise UserError(
                f"{path}: holds the value {wrong[0] + number}, which is neither a class (0 .. {number - 1}) "
                f"nor void ({VOID}): correct the mask, or list its classes in {self.root / 'classes.txt'}"
            )
        return mask

    def pair(self, index, size):
        """Photo and mask squeezed to ``size`` x ``size``: bilinear and antialiased, and nearest neighbour.

        Returns:
            uint8 arrays [size, size, 3] in RGB and [size, size] of class indices and VOID.

        Raises:
            UserError: as ``photo`` and ``mask``, and where the two differ in size.
        """
        photo, mask = self.photo(index), Image.fromarray(self.mask(index))
        if photo.size != mask.size:
            raise UserError(
                f"{self.root / 'SegmentationClass' / self.ids[index]}.png: is {mask.width}x{mask.height}, but its "
                f"photo is {photo.width}x{photo.height}: a mask needs the size of its photo"
            )
        return squeeze(photo, size), squeeze(mask, size, Image.Resampling.NEAREST)


def class_counts(split):
    """Count the pixels of each class over all masks of a Split, at their own resolution, void left out.

    Returns:
        int64 arrays [C]: the pixels of each class, and the images that show it.
    """
    pixels, images = np.zeros((2, len(split.classes)), np.int64)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mask in pool.map(split.mask, range(len(split))):
            counts = np.bincount(mask.ravel(), minlength=256)[: len(split.classes)]
            pixels += counts
            images += counts > 0
    return pixels, images


def class_weights(split):
    """Class weights for a loss on imbalanced data: ``1 / ln(1.02 + p)``, p being a class's share of the pixels.

    The formula is that of ENet (Paszke et al., 2016). It lies between 1.42 for a class that fills every mask and 50.5
    for one that is in none, so that no class can take over, and an absent one has a finite weight.

    Chosen by val mean IoU: 0.2651 with it, 0.2529 with the effective number of images (Cui et al., 2019), 0.2414 with
    median frequency (Eigen and Fergus, 2015), and 0.1336 without weights (train_4_b.py); one seed each, so that the
    order of the three is not sure, but their worth is. On a CPU with PyTorch 2.15, by
    ``python benchmarks/ablation.py weights --data data/VOCdevkit/Toy --limit 96 --epochs 12 --seeds 0``.

    Args:
        split: a Split; its masks are counted at their own resolution, void left out.

    Returns:
        float32 tensor [C].
    """
    pixels, _ = class_counts(split)
    return torch.tensor(1 / np.log(1.02 + pixels / pixels.sum()), dtype=torch.float32)


def normalise(images, device, mean=MEAN, std=STD):
    """Move uint8 images [B, 3, H, W] to a device as float32, channels last: 0..1, less ``mean``, over ``std``."""
    images = images.to(device, memory_format=torch.channels_last).float() / 255
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std


class Loader:
    """Batches of one split, squeezed to a square, normalised, on the device.

    Every photo and mask is decoded and checked once, here, and kept as uint8: a fault in the data shows before the
    training, and an epoch decodes nothing. Normalisation is part of the loader, so that no split goes without it.

    Args:
        split: a Split.
        size: side of the square in pixels.
        batch_size: the largest batch. The split is cut into batches as even as possible, so that no epoch ends on a
            batch of one, which batch norm would learn noise from.
        training: draw a new order each epoch, and leave out a batch that is void all over, since a mean over no pixel
            is NaN. Otherwise every image comes, in the order of the split.
        augment: None, or a callable ``augment(images, masks, generator)`` that takes and gives back uint8 tensors
            [B, 3, S, S] and [B, S, S], and draws from the torch.Generator. An epoch shows each image ``augment.plain``
            times as it is and ``augment.augmented`` times through the callable; without these attributes 0 and 1.
        seed: order and augmentation are drawn from ``seed`` and the number of the epoch alone, so that any epoch can be
            repeated without those before it.
        device: where batches go.

    Attributes:
        split, size, classes, augment: as given, and the split's class names.
        copies: how many times an epoch shows each image.
        images, masks: the whole split, uint8 [N, 3, S, S] and [N, S, S] on the CPU.
        mean, std: what ``normalise`` uses, a tuple of three floats each.

    Raises:
        UserError: a photo or a mask is at fault (see ``Split``), or no pixel of the split is labelled.
    """

    mean, std = MEAN, STD

    def __init__(self, split, size, batch_size, training=False, augment=None, seed=0, device="cpu"):
        self.split, self.size, self.classes = split, size, split.classes
        self.batch_size, self.training, self.augment = batch_size, training, augment
        self.seed, self.device = seed, torch.device(device)
        self.plain = 1 if augment is None else getattr(augment, "plain", 0)
        self.copies = self.plain + (0 if augment is None else getattr(augment, "augmented", 1))
        self.images = torch.empty(len(split), 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
        self.masks = torch.empty(len(split), size, size, dtype=torch.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for index, (photo, mask) in enumerate(pool.map(lambda i: split.pair(i, size), range(len(split)))):
                self.images[index] = torch.tensor(photo).permute(2, 0, 1)
                self.masks[index] = torch.tensor(mask)
        if (self.masks == VOID).all():
            raise UserError(f"{split.root}: no mask of the split {split.name} labels any pixel: all of it is void")

    def __len__(self):
        """The number of batches."""
        return -(-len(self.split) * self.copies // self.batch_size)

    def normalise(self, images):
        """``normalise`` with the loader's device, mean and standard deviation."""
        return normalise(images, self.device, self.mean, self.std)

    def augmented(self, number):
        """The first images of the split, over again if they are fewer, each augmented once, to be looked at.

        Returns:
            uint8 [number, 3, S, S] and [number, S, S].
        """
        chosen = torch.arange(number) % len(self.split)
        return self.augment(self.images[chosen], self.masks[chosen], torch.Generator().manual_seed(self.seed))

    def batches(self, epoch=0):
        """Yield the batches of an epoch on the device.

        Yields:
            images: float32 [B, 3, S, S], normalised, channels last.
            masks: int64 [B, S, S], class indices and VOID.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        number = len(self.split) * self.copies
        order = torch.randperm(number, generator=generator) if self.training else torch.arange(number)
        for chosen in order.tensor_split(len(self)):
            images, masks = (whole[chosen % len(self.split)] for whole in (self.images, self.masks))
            changed = chosen >= self.plain * len(self.split)
            if changed.any():
                images[changed], masks[changed] = self.augment(images[changed], masks[changed], generator)
            if self.training and (masks == VOID).all():
                continue
            yield self.normalise(images), masks.to(self.device).long()


def loaders(root, batch_size, size, augment=None, limit=None, seed=0, device="cpu"):
    """Loaders of the splits train, val and test of a folder in VOC layout; only train is shuffled and augmented.

    Where there is no ``test.txt``, the third is None: the figures then rest on val alone. ``limit`` keeps the first
    images of each split. The other arguments, and the errors, are those of Loader.
    """
    root = _find_root(root)
    splits = ["train", "val"] + (["test"] if (root / "ImageSets/Segmentation/test.txt").exists() else [])
    train, val, test = [Split(root, name, limit) for name in splits] + [None] * (3 - len(splits))
    shared = {"size": size, "batch_size": batch_size, "seed": seed, "device": device}
    return (
        Loader(train, training=True, augment=augment, **shared),
        Loader(val, **shared),
        None if test is None else Loader(test, **shared),
    )


def main():
    parser = argparse.ArgumentParser(description="Print how often each class occurs in a split, void left out.")
    parser.add_argument("--data", default="data/VOCdevkit/VOC2007", metavar="DIR", help="folder in VOC layout")
    parser.add_argument("--split", default="train", help="name of a list in ImageSets/Segmentation (default: train)")
    args = parser.parse_args()
    split = Split(args.data, args.split)
    pixels, images = class_counts(split)
    print(f"{split.root} {split.name}: {len(split)} masks, {pixels.sum()} labelled pixels")
    print(f"{'class':14} {'share of pixels':>15} {'pixels':>11} {'images':>7}")
    for name, count, shown in zip(split.classes, pixels, images):
        print(f"{name:14} {count / pixels.sum():15.4f} {count:11d} {shown:7d}")


if __name__ == "__main__":
    run(main)
