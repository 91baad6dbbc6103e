"""PASCAL VOC segmentation: class names, palette, and batches from any folder in VOC layout.

A folder in VOC layout holds ``JPEGImages/<id>.jpg``, ``SegmentationClass/<id>.png`` and
``ImageSets/Segmentation/<split>.txt`` with one id a line; for data with other classes, ``classes.txt`` with one name a
line. Masks hold class indices, and 255 for void, the pixels that nobody labelled: void stays 255 all the way to the
loss (``ignore_index``) and to the metrics.

Print how often each class occurs, void left out:

    python voc.py --data data/VOCdevkit/VOC2007 --split train
"""

import contextlib
import functools
import hashlib
import os
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

from util import VOID, Parser, UserError, first_process_first, ranks, run

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Mean and standard deviation of ImageNet's photos in 0..1, as red, green, blue: torchvision's weights expect them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")
CHUNK = 256  # so many images are decoded ahead at most
DIGEST = 16  # characters of a digest in a file's name
ABANDONED = 3600  # seconds after which nobody is still writing a file that has not grown since

# A picture with more pixels is not decoded. Pillow refuses only twice as many, and up to there warns.
MOST_PIXELS = 89_478_485
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _palette():
    """VOC's colour map: the bits of an index, three at a time, fill red, green and blue from the top bit down."""
    palette = np.zeros((256, 3), np.uint8)
    index = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


PALETTE = _palette()  # uint8 [256, 3], RGB; row 255 is the colour of void


def picture(mask):
    """A mask, uint8 array [H, W] of class indices and VOID, as a PIL image in VOC's palette."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.tobytes())
    return image


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
        f"no data in {root}, which would have JPEGImages, SegmentationClass and ImageSets/Segmentation: "
        "python download.py gets VOC2007 (from archives that you have, with --tar FILE --tar FILE), and "
        "python download.py --toy renders a toy set without network, for --data data/VOCdevkit/Toy"
    )


def _lines(path, use):
    """The lines of a text file that are not blank; UserError, which ends with what to do, where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): {use}") from None
    return [line.strip() for line in lines if line.strip()]


def open_picture(path):
    """Decode the picture at ``path`` as a PIL image; whatever is wrong with the file becomes a UserError."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"{path}: its {image.width}x{image.height} pixels are too many: shrink the picture")
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
        name, limit: as given.
        ids: list of str.
        classes: tuple of class names: those of ``classes.txt`` where there is one, else VOC's 21.

    Raises:
        UserError: no such folder or split, an empty split or an id that is listed twice.
    """

    def __init__(self, root, split, limit=None):
        self.root = _find_root(root)
        self.name = split
        path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not path.exists():
            raise UserError(f"{path}: no such split: write one image id a line into it")
        self.ids = _lines(path, "write one image id a line into it")
        if not self.ids:
            raise UserError(f"{path}: the split is empty: write one image id a line into it")
        for name in self.ids:
            if not name.isprintable() or Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{path}: lists {name!r}, which names no file of the folder: correct the line")
        name, times = Counter(self.ids).most_common(1)[0]
        if times > 1:
            raise UserError(f"{path}: lists {name} {times} times: keep one")
        self.ids, self.limit = self.ids[:limit], limit
        self.classes = self._classes()

    def _classes(self):
        path = self.root / "classes.txt"
        if not path.exists():
            return CLASSES
        names = tuple(_lines(path, "write one class name a line into it"))
        if not 2 <= len(names) <= VOID or len(set(names)) < len(names):
            raise UserError(f"{path}: needs 2 to {VOID} different class names, one a line; it has {len(names)}")
        return names

    def __len__(self):
        return len(self.ids)

    def paths(self, index):
        """The paths of a photo and of its mask; where there is no photo, the one that it would have as a JPEG."""
        stem = self.root / "JPEGImages" / self.ids[index]
        candidates = [stem.with_name(stem.name + suffix) for suffix in PHOTO_SUFFIXES]
        photo = next((path for path in candidates if os.path.exists(path)), candidates[0])  # false for any bad name
        return photo, self.root / "SegmentationClass" / f"{self.ids[index]}.png"

    def photo(self, index):
        """The photo as a PIL image in RGB. Raises UserError where it is missing or unreadable."""
        return to_rgb(open_picture(self.paths(index)[0]))

    def mask(self, index):
        """The mask as a uint8 array [H, W] of class indices and VOID, at its own resolution.

        Raises:
            UserError: the file is missing or unreadable, is no palette or greyscale picture, or holds a value that is
                neither a class nor VOID.
        """
        path = self.paths(index)[1]
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
                f"{self.paths(index)[1]}: is {mask.width}x{mask.height}, but its photo is "
                f"{photo.width}x{photo.height}: a mask needs the size of its photo"
            )
        return squeeze(photo, size), squeeze(mask, size, Image.Resampling.NEAREST)

    def pixels(self, size):
        """Yield ``pair`` of each image in turn as one uint8 array [size, size, 4], decoded on all cores."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self), CHUNK):
                for photo, mask in pool.map(lambda i: self.pair(i, size), range(start, min(start + CHUNK, len(self)))):
                    yield np.dstack((photo, mask))

    def digest(self, size):
        """A short text that changes with anything that ``pixels`` depends on."""
        facts = [size, len(self.classes), PIL.__version__]
        for index in range(len(self)):
            for path in self.paths(index):
                try:
                    found = path.stat()
                    facts += [path.name, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
                except OSError:  # to be named when it is opened
                    facts += [path.name, None]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:DIGEST]


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


@functools.cache
def _scale(device, mean, std):
    """What to multiply 0..255 by and what to take off then, as tensors [3, 1, 1]; made once, not once a batch."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    return 1 / (255 * std), mean / std


def normalise(images, device, mean=MEAN, std=STD):
    """Move uint8 images [B, 3, H, W] to a device as float32, channels last: 0..1, less ``mean``, over ``std``."""
    scale, shift = _scale(device, tuple(mean), tuple(std))
    images = images.to(device, torch.float32, memory_format=torch.channels_last)
    return images.mul_(scale).sub_(shift)  # in place: as float32, nobody else has these yet


def squeezed(split, size):
    """All photos and masks of a Split, each squeezed to ``size`` x ``size``: red, green, blue and class of each pixel.

    They are decoded and checked once and kept in ``.cache`` in the data's own folder, as a file that is mapped into
    memory: the next run starts at once, and a data set may be larger than memory. The file's name holds a digest of
    the size and the times of change of every photo and mask, of the ids, the classes and Pillow's version, so that a
    file that does not fit is never used; it is written under another name and renamed when it is whole, so that any
    number of processes may start together. Where the folder cannot be written, all is kept in memory.

    Returns:
        uint8 tensor [N, size, size, 4] on the CPU. It may be written to; that changes no file.

    Raises:
        UserError: as ``Split.pair``.
    """
    name = f"{split.name}_{size}" + ("" if split.limit is None else f"_limit{split.limit}")
    path = split.root / ".cache" / f"{name}_{split.digest(size)}.npy"
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c"))
    except (OSError, ValueError):  # not there yet, or torn
        pass
    try:
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f"{name}_", suffix=".unfinished", delete=False
        ) as file:
            try:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(split), size, size, 4)}
                np.lib.format.write_array_header_1_0(file, header)
                for pixels in split.pixels(size):
                    file.write(pixels)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)
        for old in path.parent.glob(f"{name}_{'?' * DIGEST}.npy"):
            if old != path:
                old.unlink(missing_ok=True)
        for left in path.parent.glob("*.unfinished"):
            with contextlib.suppress(FileNotFoundError):  # its writer has just finished
                if left.stat().st_mtime < time.time() - ABANDONED:  # its writer was killed
                    left.unlink()
        return torch.from_numpy(np.load(path, mmap_mode="c"))
    except OSError:
        return torch.from_numpy(np.stack(list(split.pixels(size))))


class Loader:
    """Batches of one split, squeezed to a square, normalised, on the device.

    Every photo and mask was decoded and checked once, see ``squeezed``: a fault in the data shows before the training,
    and an epoch decodes nothing. Normalisation is part of the loader, so that no split goes without it.

    Of several processes (torchrun), each gets its own part of every training batch, and its own batches of another
    split. Together these are what one process would get, whatever their number.

    Args:
        split: a Split.
        size: side of the square in pixels.
        batch_size: the largest batch, of all processes together. The split is cut into batches as even as possible, so
            that no epoch ends on a batch of one, which batch norm would learn noise from.
        training: draw a new order each epoch. Otherwise every image comes, in the order of the split.
        augment: None, or an object such as ``transforms.Augmentation``: ``augment.draw(number, generator)`` draws for a
            number of images, a row of a tensor each, from a torch.Generator on the CPU, and
            ``augment(images, masks, draws)`` takes and gives back uint8 tensors [B, 3, S, S] and [B, S, S] on the
            device. An epoch shows each image ``augment.plain`` times as it is and ``augment.augmented`` times
            augmented; without these attributes 0 and 1.
        seed: order and augmentation are drawn from ``seed`` and the number of the epoch alone, so that any epoch can be
            repeated without those before it.
        device: where batches go.

    Attributes:
        split, size, classes, augment: as given, and the split's class names.
        copies: how many times an epoch shows each image.
        images, masks: the whole split, uint8 [N, 3, S, S] and [N, S, S], on a GPU where it takes little of its memory,
            else on the CPU.
        mean, std: what ``normalise`` uses, a tuple of three floats each.

    Raises:
        UserError: a photo or a mask is at fault (see ``Split``), no pixel of the split is labelled, or a training batch
            would not give each process an image.
    """

    mean, std = MEAN, STD

    def __init__(self, split, size, batch_size, training=False, augment=None, seed=0, device="cpu"):
        self.split, self.size, self.classes = split, size, split.classes
        self.batch_size, self.training, self.augment = batch_size, training, augment
        self.seed, self.device = seed, torch.device(device)
        self.plain = 1 if augment is None else getattr(augment, "plain", 0)
        self.copies = self.plain + (0 if augment is None else getattr(augment, "augmented", 1))
        with first_process_first():
            self.data = squeezed(split, size)
        if not any((mask != VOID).any() for mask in self.data[..., 3]):  # the first is enough as a rule
            raise UserError(f"{split.root}: no mask of the split {split.name} labels any pixel: all of it is void")
        smallest, processes = len(split) * self.copies // len(self), ranks()[1]
        if training and smallest < processes:
            raise UserError(f"batches of {smallest} images are too few for {processes} processes: raise --batch-size")
        if self.device.type == "cuda" and self.data.nbytes < torch.cuda.mem_get_info(self.device)[0] / 4:
            self.data = self.data.to(self.device)
        self.images, self.masks = self.data[..., :3].permute(0, 3, 1, 2), self.data[..., 3]

    def __len__(self):
        """The number of batches, of all processes together."""
        return -(-len(self.split) * self.copies // self.batch_size)

    def normalise(self, images):
        """``normalise`` with the loader's device, mean and standard deviation."""
        return normalise(images, self.device, self.mean, self.std)

    def augmented(self, number):
        """The first images of the split, over again if they are fewer, each augmented once, to be looked at.

        Returns:
            uint8 [number, 3, S, S] and [number, S, S].
        """
        images, masks = self._take(torch.arange(number) % len(self.split))
        draws = self.augment.draw(number, torch.Generator().manual_seed(self.seed))
        return self.augment(images, masks, self._move(draws))

    def order(self, epoch=0):
        """Which images the batches of an epoch hold, of all processes together.

        Returns:
            a list of int64 tensors [B] of places in ``split`` (``place % len(split)``; from ``plain * len(split)`` on,
            the image is to be augmented), and the torch.Generator that goes on to draw for the augmentation.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        number = len(self.split) * self.copies
        order = torch.randperm(number, generator=generator) if self.training else torch.arange(number)
        return order.tensor_split(len(self)), generator

    def batches(self, epoch=0):
        """Yield the batches of an epoch on the device.

        Yields:
            images: float32 [B, 3, S, S], normalised, channels last.
            masks: int64 [B, S, S], class indices and VOID.
        """
        order, generator = self.order(epoch)
        rank, processes = ranks()
        for chosen in order if self.training else order[rank::processes]:
            changed = chosen >= self.plain * len(self.split)
            draws = self.augment.draw(int(changed.sum()), generator) if changed.any() else None
            row = changed.cumsum(0) - 1  # of each image to be augmented, in draws
            if self.training:
                chosen, changed, row = (values[rank::processes] for values in (chosen, changed, row))
            # Those to be augmented come first, as one slice: looking for them on a GPU would wait for it.
            first = changed.int().argsort(descending=True, stable=True)
            images, masks = self._take(chosen[first] % len(self.split))
            if number := int(changed.sum()):
                draws = self._move(draws[row[first[:number]]])
                images[:number], masks[:number] = self.augment(images[:number], masks[:number], draws)
            yield self.normalise(images), masks.long()

    def _take(self, places):
        """Copies of some images and masks of the split on the device."""
        if self.data.device == self.device:
            pixels = self.data[places]
        elif self.data.is_cuda:
            pixels = self.data[self._move(places)]
        else:
            pixels = self._move(self.data[places])
        return pixels[..., :3].permute(0, 3, 1, 2), pixels[..., 3]

    def _move(self, tensor):
        """A tensor on the device; a GPU takes it from pinned memory, without making the program wait."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


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
    parser = Parser("Print how often each class occurs in a split, void left out.")
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
