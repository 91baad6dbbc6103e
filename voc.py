"""PASCAL VOC segmentation: class names, palette, and batches from any folder in VOC layout.

A folder in VOC layout holds ``JPEGImages/<id>.jpg``, ``SegmentationClass/<id>.png`` and
``ImageSets/Segmentation/<split>.txt`` with one id per line; for other classes than VOC's, ``classes.txt`` with one name
per line. Masks hold class indices, and 255 for void, the unlabelled pixels: void stays 255 up to the loss
(``ignore_index``) and the metrics. Print how often each class occurs:

    python voc.py --data data/VOCdevkit/VOC2007 --split train
"""

import contextlib
import functools
import hashlib
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torchvision import tv_tensors

import cli
import files
import imaging
import processes
import util
from util import VOID, UserError

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

DIGEST_LENGTH = 16  # characters of the digest in the name of a cache file

def _find_root(root):
    """Return ``root`` as a Path if it is a folder in VOC layout, else raise a UserError that says where data is."""
    root = Path(root)
    if (root / "ImageSets" / "Segmentation").is_dir():
        return root
    for folder in (*sorted(root.glob("*")), *sorted(root.glob("*/*")), *root.parents):
        if (folder / "ImageSets" / "Segmentation").is_dir():
            raise UserError(f"{root} is not in VOC layout, but {folder} is: use --data {folder}")
    raise UserError(
        f"{root}: no data in VOC layout (JPEGImages, SegmentationClass, ImageSets/Segmentation): "
        "python download.py fetches VOC2007 (from archives on disk with --tar FILE --tar FILE), and "
        "python download.py --toy renders a toy set without network, for --data data/VOCdevkit/Toy"
    )


def _read_lines(path, hint):
    """The lines of a text file that are not blank; UserError, ending with ``hint``, if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): {hint}") from None
    return [line.strip() for line in lines if line.strip()]


class Split:
    """The photos and masks of one split of a folder in VOC layout, read from disk and checked at every access.

    Args:
        root: the folder in VOC layout.
        name: name of the list in ``ImageSets/Segmentation``, without ``.txt``.
        limit: keep only the first N ids; None keeps all.

    Attributes:
        root: Path of the folder. dataset: its name.
        ids: list of str. classes: tuple of class names, from ``classes.txt`` if there is one, else VOC's 21.

    Raises:
        UserError: the folder or the split does not exist, or the split is empty or lists an id twice.
    """

    def __init__(self, root, name, limit=None):
        self.root, self.name, self.limit = _find_root(root), name, limit
        self.dataset = self.root.resolve().name
        path = self.root / "ImageSets" / "Segmentation" / f"{name}.txt"
        hint = "write one image id per line into it"
        if not path.exists():
            raise UserError(f"{path}: no such split: {hint}")
        ids = _read_lines(path, hint)
        if not ids:
            raise UserError(f"{path}: the split is empty: {hint}")
        for image_id in ids:
            if not image_id.isprintable() or Path(image_id).is_absolute() or ".." in Path(image_id).parts:
                raise UserError(f"{path}: {image_id!r} is not the name of a file in this folder: correct the line")
        image_id, count = Counter(ids).most_common(1)[0]
        if count > 1:
            raise UserError(f"{path}: lists {image_id} {count} times: keep one")
        self.ids = ids[:limit]
        self.classes = self._read_classes()

    def _read_classes(self):
        path = self.root / "classes.txt"
        if not path.exists():
            return CLASSES
        names = tuple(_read_lines(path, "write one class name per line into it"))
        if not 2 <= len(names) <= VOID or len(set(names)) < len(names):
            raise UserError(f"{path}: needs 2 to {VOID} different class names, one per line; it has {len(names)}")
        return names

    def __len__(self):
        return len(self.ids)

    def paths(self, index):
        """The paths of a photo and its mask. If there is no photo, its path is the one of a JPEG."""
        stem = self.root / "JPEGImages" / self.ids[index]
        candidates = [stem.with_name(stem.name + suffix) for suffix in imaging.PHOTO_SUFFIXES]
        # os.path.exists returns False for a name that the system does not allow; Path.exists may raise
        photo = next((path for path in candidates if os.path.exists(path)), candidates[0])
        return photo, self.root / "SegmentationClass" / f"{self.ids[index]}.png"

    def photo(self, index):
        """The photo as a PIL image in RGB. Raises a UserError if it is missing or unreadable."""
        return imaging.to_rgb(imaging.open_image(self.paths(index)[0]))

    def mask(self, index):
        """The mask as a uint8 array [H, W] of class indices and VOID, at its own resolution.

        Raises a UserError if it is missing, unreadable, neither a palette nor a greyscale image, or holds other values.
        """
        path = self.paths(index)[1]
        image = imaging.open_image(path)
        if image.mode not in ("P", "L", "1"):
            advice = "save class indices as a palette or 8-bit greyscale PNG"
            raise UserError(f"{path}: is an image in mode {image.mode}, not a mask of class indices: {advice}")
        mask = np.asarray(image).astype(np.uint8)
        num_classes = len(self.classes)
        invalid = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[num_classes:VOID])
        if invalid.size:
            value, advice = invalid[0] + num_classes, f"correct the mask, or {self.root / 'classes.txt'}"
            known = f"a class (0 .. {num_classes - 1}) nor void ({VOID})"
            raise UserError(f"{path}: holds the value {value}, which is neither {known}: {advice}")
        return mask

    def resized(self, index, size):
        """Photo and mask at ``size``, (H, W), as one uint8 array [H, W, 4]: red, green, blue and class.

        The photo is resized bilinearly with antialiasing, the mask to the nearest pixel. Raises a UserError if one of
        them is invalid, or if they differ in size.
        """
        photo, mask = self.photo(index), Image.fromarray(self.mask(index))
        if photo.size != mask.size:
            sizes = f"{mask.width}x{mask.height}, but its photo is {photo.width}x{photo.height}"
            raise UserError(f"{self.paths(index)[1]}: is {sizes}: a mask needs the size of its photo")
        return np.dstack((imaging.resize(photo, size), imaging.resize(mask, size, Image.Resampling.NEAREST)))

    def digest(self, size):
        """A short hash of everything that ``resized`` depends on for any image: files, classes, Pillow's version."""
        state = [size, len(self.classes), PIL.__version__]
        for index in range(len(self)):
            for path in self.paths(index):
                stat = path.stat() if os.path.exists(path) else None  # a missing file is reported when it is opened
                state.append((path.name, stat and (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)))
        return hashlib.sha256(repr(state).encode()).hexdigest()[:DIGEST_LENGTH]


def class_counts(split):
    """Count the pixels of each class over all masks of a Split, and the images that show it: two int64 arrays [C]."""
    num_classes = len(split.classes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        per_image = pool.map(lambda index: np.bincount(split.mask(index).ravel(), minlength=256), range(len(split)))
        counts = np.stack([count[:num_classes] for count in per_image])
    return counts.sum(0), (counts > 0).sum(0)


def class_weights(split):
    """Class weights against imbalance: ``1 / ln(1.02 + p)``, p being a class's share of the labelled pixels of a Split.

    The formula is that of ENet (Paszke et al., 2016). The weights, a float32 tensor [C], lie between 1.42 for a class
    that fills every mask and 50.5 for one that is in none. ``benchmarks/ablation.py weights`` compares other formulas.
    """
    pixels, _ = class_counts(split)
    return torch.tensor(1 / np.log(1.02 + pixels / pixels.sum()), dtype=torch.float32)


def load_resized(split, size):
    """``Split.resized`` of all images at ``size``, (H, W): uint8 tensor [N, H, W, 4] on the CPU.

    They are decoded and checked once, and cached as a ``.npy`` file in ``.cache`` in the data's folder, which later
    runs map into memory. Its name holds ``Split.digest``, so that a change of any file is noticed. If the folder cannot
    be written, nothing is cached.
    """
    height, width = size
    name = f"{split.name}_{height}x{width}" + ("" if split.limit is None else f"_limit{split.limit}")
    path = split.root / ".cache" / f"{name}_{split.digest(size)}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        return torch.from_numpy(np.load(path, mmap_mode="c"))

    pixels = np.empty((len(split), height, width, 4), np.uint8)

    def read(index):
        pixels[index] = split.resized(index, size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(read, range(len(split))):  # raises the error of the first image that has one
            pass
    with contextlib.suppress(OSError, UserError):
        path.parent.mkdir(exist_ok=True)
        with files.atomic_write(path) as file:
            np.save(file, pixels)
        for outdated in path.parent.glob(f"{name}_{'?' * DIGEST_LENGTH}.npy"):
            if outdated != path:
                outdated.unlink(missing_ok=True)
    return torch.from_numpy(pixels)


class PerImage:
    """Lets a Loader use an augmentation of one image and its mask, such as torchvision's v2 transforms.

    ``augment(image, mask)`` gets tv_tensors, uint8 [3, H, W] and [H, W], and returns two of the same shapes and type.
    The random numbers of Python, NumPy and PyTorch are seeded for each image.
    """

    def __init__(self, augment):
        self.augment = augment

    def draw(self, count, generator):
        return torch.randint(2**32, (count,), generator=generator)

    def __call__(self, images, masks, seeds):
        pairs = []
        for image, mask, seed in zip(images, masks, seeds.tolist()):
            util.seed_everything(seed)
            pairs.append(self.augment(tv_tensors.Image(image), tv_tensors.Mask(mask)))
        return tuple(torch.stack([pair[part].as_subclass(torch.Tensor) for pair in pairs]) for part in (0, 1))


class Loader:
    """Batches of one split: resized, augmented, normalised, on the device.

    All images are decoded and checked at the start, see ``load_resized``. Under torchrun, each process gets its part of
    every training batch, and whole batches of the other splits: together the batches of a single process.

    Args:
        split: a Split.
        size: of the network's input in pixels: (height, width), or the side of a square.
        batch_size: the largest batch, over all processes. Batches are of nearly equal size, so that none has a single
            image, on which batch norm would learn noise.
        training: shuffle in every epoch. Otherwise the images come in the order of the split.
        augment: None, an augmentation of single images as for PerImage, or an object that augments batches, such as
            ``transforms.Augmentation``: ``augment.draw(count, generator)`` returns random parameters, one row of a
            tensor per image, from a torch.Generator on the CPU, and ``augment(images, masks, params)`` maps uint8
            tensors [B, 3, H, W] and [B, H, W] on the device to others of the same shape. An epoch shows each image
            ``augment.unchanged`` times as it is and ``augment.augmented`` times augmented; these default to 0 and 1.
        seed: order and augmentation depend on ``seed`` and the epoch only, so that any epoch can be repeated.
        device: where batches go.

    Attributes:
        repeats: how many times an epoch shows each image.
        size: (height, width).
        images, masks: the whole split, uint8 [N, 3, H, W] and [N, H, W], on the GPU if it takes less than a quarter of
            its free memory, else on the CPU.
        mean, std: of ``normalise``, tuples of three floats.
    """

    mean, std = imaging.MEAN, imaging.STD

    def __init__(self, split, size, batch_size, training=False, augment=None, seed=0, device="cpu"):
        self.split, self.size, self.classes = split, imaging.height_width(size), split.classes
        self.batch_size, self.training, self.seed, self.device = batch_size, training, seed, torch.device(device)
        self.augment = augment if augment is None or hasattr(augment, "draw") else PerImage(augment)
        self.unchanged = 1 if augment is None else getattr(augment, "unchanged", 0)
        self.repeats = self.unchanged + (0 if augment is None else getattr(augment, "augmented", 1))
        with processes.main_process_first():
            self.data = load_resized(split, self.size)
        if not any((mask != VOID).any() for mask in self.data[..., 3]):  # usually stops at the first mask
            raise UserError(f"{split.root}: no mask of the split {split.name} has a labelled pixel: all is void")
        smallest = len(split) * self.repeats // len(self)
        if training and smallest < processes.world_size():
            count = processes.world_size()
            raise UserError(f"{count} processes cannot share a batch of {smallest} images: raise --batch-size")
        if self.device.type == "cuda" and self.data.nbytes < torch.cuda.mem_get_info(self.device)[0] / 4:
            self.data = self.data.to(self.device)
        self.images, self.masks = self.data[..., :3].permute(0, 3, 1, 2), self.data[..., 3]

    def __len__(self):
        """The number of batches per epoch, over all processes."""
        return math.ceil(len(self.split) * self.repeats / self.batch_size)

    @functools.cached_property
    def baseline(self):
        """Name and Scores of the all-background baseline at the loader's size, see ``util.Scores.baseline``."""
        counts = torch.bincount(self.masks.flatten().cpu(), minlength=VOID + 1)[: len(self.classes)]
        return util.Scores(math.nan, torch.diag(counts), self.classes).baseline

    def normalise(self, images):
        """``normalise`` with the loader's device, mean and standard deviation."""
        return imaging.normalise(images, self.device, self.mean, self.std)

    def augmented_samples(self, count):
        """Augment the first ``count`` images for a plot, again from the first if there are fewer; uint8 as stored."""
        images, masks = self.take(torch.arange(count) % len(self.split))
        params = self.augment.draw(count, torch.Generator().manual_seed(self.seed))
        return self.augmented(images, masks, params)

    def augmented(self, images, masks, params):
        """Augment uint8 tensors [B, 3, H, W] and [B, H, W] with params from ``augment.draw``.

        Raises a UserError if the result has another shape or type.
        """
        results = self.augment(images, masks, self._move(params))
        for name, before, after in zip(("images", "masks"), (images, masks), results, strict=True):
            if (after.shape, after.dtype) != (before.shape, torch.uint8):
                found, expected = f"{after.dtype} {list(after.shape)}", f"torch.uint8 {list(before.shape)}"
                advice = "keep size and type (the loader resizes before it and normalises after it)"
                raise UserError(f"augment returns {name} of {found}, not {expected}: {advice}")
        return results

    def batches(self, epoch=0):
        """Yield this process's batches of an epoch.

        Yields:
            images: float32 [B, 3, H, W], normalised. masks: int64 [B, H, W], class indices and VOID.
            indices: int64 [B] on the CPU, the position of each image in the split.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        num_samples = len(self.split) * self.repeats
        order = torch.randperm(num_samples, generator=generator) if self.training else torch.arange(num_samples)
        batches = order.tensor_split(len(self))
        own = slice(processes.rank(), None, processes.world_size())
        for samples in batches if self.training else batches[own]:
            # drawn for the whole batch, so that the parameters do not depend on the number of processes
            params = None if self.augment is None else self.augment.draw(len(samples), generator)
            if self.training:
                samples, params = samples[own], None if params is None else params[own]
            indices = samples % len(self.split)
            images, masks = self.take(indices)
            augmented = (samples >= self.unchanged * len(self.split)).nonzero().flatten()
            if len(augmented):
                rows = self._move(augmented)
                images[rows], masks[rows] = self.augmented(images[rows], masks[rows], params[augmented])
            yield self.normalise(images), masks.long(), indices

    def take(self, indices):
        """Copies of some images and masks of the split, on the device."""
        if self.data.is_cuda:
            pixels = self.data[self._move(indices)]
        else:
            pixels = self._move(self.data[indices])
        return pixels[..., :3].permute(0, 3, 1, 2), pixels[..., 3]

    def _move(self, tensor):
        """A tensor on the device; to a GPU it is copied from pinned memory, without waiting."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def loaders(root, batch_size, size, augment=None, limit=None, seed=0, device="cpu"):
    """Loaders of the splits train, val and test; only train is shuffled and augmented. See Split and Loader.

    The third is None if there is no ``test.txt``: the reported metrics are then on val only.
    """
    root = _find_root(root)
    shared = {"size": size, "batch_size": batch_size, "seed": seed, "device": device}
    train, val = (Split(root, name, limit) for name in ("train", "val"))
    has_test = (root / "ImageSets" / "Segmentation" / "test.txt").exists()
    test = Split(root, "test", limit) if has_test else None
    return (
        Loader(train, training=True, augment=augment, **shared),
        Loader(val, **shared),
        None if test is None else Loader(test, **shared),
    )


def main():
    parser = cli.Parser("Print how often each class occurs in a split, void excluded.")
    parser.add_argument("--data", default="data/VOCdevkit/VOC2007", metavar="DIR", help="folder in VOC layout")
    parser.add_argument("--split", default="train", help="name of a list in ImageSets/Segmentation (default: train)")
    args = parser.parse_args()
    split = Split(args.data, args.split)
    pixels, images = class_counts(split)
    print(f"{split.root} {split.name}: {len(split)} masks, {pixels.sum()} labelled pixels")
    print(f"{'class':14} {'share of pixels':>15} {'pixels':>11} {'images':>7}")
    for name, num_pixels, num_images in zip(split.classes, pixels, images):
        print(f"{name:14} {num_pixels / pixels.sum():15.4f} {num_pixels:11d} {num_images:7d}")


if __name__ == "__main__":
    cli.run(main)
