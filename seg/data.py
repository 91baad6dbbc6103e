"""The photos and masks of a split, and batches from them."""

import contextlib
import functools
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import PIL
import torch

import util
from seg import distributed, files, imaging, voc_layout
from seg.imaging import MEAN, STD
from util import VOID, UserError

CACHE_FORMAT = 1  # raise it when the pixels that ``LabelledImages.resized`` returns change


class LabelledImages:
    """The images of one split: what a Loader needs of them. Derive a class from it to train on a Dataset of your own.

    The subclass adds two methods, which several threads may call at the same time: ``photo(index)`` returns a PIL image
    in RGB, and ``mask(index)`` a uint8 array [H, W] of its size with class indices and VOID.

    Args:
        root: the folder of the data. Its name, ``dataset``, is that of the data set in titles and results.
        name: of the split, such as train, for messages.
        classes: the class names in the order of their indices.
        count: the number of images. Their ``ids`` are name/0, name/1 and so on, or what a subclass sets.
    """

    def __init__(self, root, name, classes, count):
        self.root, self.name, self.classes, self.limit = Path(root), name, tuple(classes), None
        self.ids = [f"{name}/{index}" for index in range(count)]

    def __len__(self):
        return len(self.ids)

    @property
    def dataset(self):
        return self.root.resolve().name

    def photo_path(self, index):
        """What stands for a photo in messages; of a Split, its file."""
        return self.root / self.ids[index]

    mask_path = photo_path

    def pair(self, index):
        """Photo and mask; UserError if one is invalid, or if they differ in size."""
        photo, mask = self.photo(index), self.mask(index)
        voc_layout.check_sizes(self.photo_path(index), self.mask_path(index), photo.size, mask.shape[::-1])
        return photo, mask

    def resized(self, index, size):
        """``pair`` at ``size``, (H, W), as one uint8 array [H, W, 4]: red, green, blue and class.

        The mask is resized to the nearest pixel.
        """
        photo, mask = self.pair(index)
        return np.dstack((imaging.resize(photo, size), imaging.resize_mask(mask, size)))


class Split(LabelledImages):
    """The photos and masks of one split, read from disk and checked at every access.

    ``root`` is a folder in VOC layout, ``name`` that of a list in ``ImageSets/Segmentation``, and ``limit`` the number
    of ids to keep (None: all). ``ids``, a list of str, replaces the list. Raises a UserError if the folder, its list
    or its ``classes.txt`` has a fault. A subclass that merges classes in ``mask`` sets its own ``classes``.
    """

    def __init__(self, root, name, limit=None, ids=None):
        root = voc_layout.find_root(root)
        super().__init__(root, name, voc_layout.read_classes(root), 0)
        self.ids = (voc_layout.read_ids(root / voc_layout.LISTS / f"{name}.txt") if ids is None else ids)[:limit]
        self.limit, self._num_values = limit, len(self.classes)  # in the files of masks
        self._photos = voc_layout.list_images(root / "JPEGImages")
        self._masks = voc_layout.list_images(root / "SegmentationClass", (".png",))

    def photo_path(self, index):
        return self._photos.get(self.ids[index], self.root / "JPEGImages" / f"{self.ids[index]}.jpg")

    def mask_path(self, index):
        return self._masks.get(self.ids[index], self.root / "SegmentationClass" / f"{self.ids[index]}.png")

    def photo(self, index):
        """The photo as a PIL image in RGB, upright. Raises a UserError if it is missing or unreadable."""
        return imaging.open_photo(self.photo_path(index))

    def mask(self, index):
        """The mask as a uint8 array [H, W] of class indices and VOID; errors as in ``voc_layout.read_mask``."""
        return voc_layout.read_mask(self.mask_path(index), self._num_values, self.root)


def cache_path(split, size):
    """The path of the file that holds the pixels of a Split; its name changes with all that they depend on."""
    state = [CACHE_FORMAT, PIL.__version__, size, split.ids, split.classes]
    for index in range(len(split)):
        for path in (split.photo_path(index), split.mask_path(index)):
            if os.path.exists(path):  # a missing file is reported when it is opened
                stat = path.stat()
                state.append((path.name, stat.st_size, stat.st_mtime_ns))
    key = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return split.root / ".cache" / f"{split.name}_{size[0]}x{size[1]}_{key}.npy"


def load_resized(split, size):
    """``LabelledImages.resized`` of all images at ``size``, (H, W): uint8 tensor [N, H, W, 4] on the CPU.

    They are cached in ``.cache`` in the data's folder, in a file that later runs map into memory; but not with a limit,
    for another class than Split, or if the folder cannot be written.
    """
    path = cache_path(split, size) if type(split) is Split and split.limit is None else None
    if path:
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
            return torch.from_numpy(np.load(path, mmap_mode="c"))

    try:
        pixels = np.empty((len(split), *size, 4), np.uint8)
    except MemoryError:
        need = f"{split.name} needs {4e-9 * len(split) * math.prod(size):.1f} GB at {imaging.size_text(size)}"
        raise UserError(f"{split.root}: {need}: lower size in the script, or try --limit") from None

    def read(index):
        pixels[index] = split.resized(index, size)

    try:
        voc_layout.map_images(read, range(len(split)), f"decoding {split.name}")
    except UserError as error:
        advice = f" ({voc_layout.command(split.root, '--check')} lists all faults)" if isinstance(split, Split) else ""
        raise UserError(f"{error}{advice}") from None
    if path:
        with contextlib.suppress(OSError, UserError):
            path.parent.mkdir(exist_ok=True)
            for outdated in path.parent.glob(f"{split.name}_{size[0]}x{size[1]}_*.npy"):
                outdated.unlink()
            with files.atomic_write(path) as file:
                np.save(file, pixels)
    return torch.from_numpy(pixels)


class PerImage:
    """Lets a Loader use an augmentation of one image and its mask, such as torchvision's v2 transforms.

    ``augment(image, mask)`` maps tv_tensors, uint8 [3, H, W] and [H, W], to others alike, and is seeded for each image.
    """

    def __init__(self, augment):
        self.augment = augment

    def draw(self, count, generator):
        return torch.randint(2**32, (count,), generator=generator)

    def __call__(self, images, masks, seeds, fill):
        from torchvision import tv_tensors  # only here: importing torchvision takes seconds

        pairs = []
        for image, mask, seed in zip(images, masks, seeds.tolist()):
            util.seed_everything(seed)
            pairs.append(self.augment(tv_tensors.Image(image), tv_tensors.Mask(mask)))
        return tuple(torch.stack([pair[part].as_subclass(torch.Tensor) for pair in pairs]) for part in (0, 1))


class Loader:
    """Batches of one split: resized, augmented, normalised, on the device.

    All images are decoded and checked at the start. Under torchrun, each process gets its part of every training batch,
    and whole batches of the other splits: together the batches of a single process.

    Args:
        split: LabelledImages, such as a Split.
        size: of the network's input in pixels: (height, width), or the side of a square.
        batch_size: the largest, over all processes. Batches have nearly equal sizes: from 3 on, none is a single image.
        training: shuffle in every epoch.
        augment: None; an augmentation of single images as for PerImage; or one of batches, with two methods.
            ``augment.draw(count, generator)`` returns random parameters, a CPU tensor with a row for each image.
            ``augment(images, masks, params, fill)`` maps uint8 tensors [B, 3, H, W] and [B, H, W] to others of the same
            shape; fill, float32 [3, 1, 1] in 0..255, is the mean colour, for what lies outside a photo. An epoch shows
            an image ``augment.unchanged`` (default: 0) times as it is, and ``augment.augmented`` (1) times augmented.
        seed: order and augmentation depend on ``seed`` and the epoch only, so that any epoch can be repeated.
        device: where batches go. mean, std: of the normalisation, three numbers each.

    Attributes:
        repeats: how many times an epoch shows each image, ``unchanged`` of them as it is.
        images, masks: the whole split, uint8 [N, 3, H, W] and [N, H, W], on the GPU if it has four times the memory.
        counts: the pixels of each class over all masks at this size, int64 [C] on the CPU.
    """

    def __init__(self, split, size, batch_size, training=False, augment=None, seed=0, device="cpu", mean=MEAN, std=STD):
        if augment is not None and not training:
            raise ValueError(f"augment needs training=True: {split.name} would be scored on augmented images")
        self.split, self.size, self.classes = split, imaging.height_width(size), split.classes
        self.batch_size, self.training, self.seed, self.device = batch_size, training, seed, torch.device(device)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        are_shares = all(0 <= value <= 1 for value in (*self.mean, *self.std)) and all(self.std)
        if not (len(self.mean) == len(self.std) == 3 and are_shares):
            raise UserError(f"mean={mean}, std={std}: pass three numbers each, of values in 0 .. 1")
        self.augment = augment if augment is None or hasattr(augment, "draw") else PerImage(augment)
        self.unchanged = 1 if augment is None else getattr(augment, "unchanged", 0)
        self.repeats = self.unchanged + (0 if augment is None else getattr(augment, "augmented", 1))
        with distributed.main_process_first():
            self.data = load_resized(split, self.size)
        counts = sum(torch.bincount(mask.flatten(), minlength=VOID + 1) for mask in self.data[..., 3])
        if len(invalid := counts[len(self.classes) : VOID].nonzero()):
            value = invalid[0].item() + len(self.classes)
            raise UserError(f"{type(split).__name__}.mask returns {value}, which is neither a class nor void ({VOID})")
        self.counts = counts[: len(self.classes)]
        voc_layout.check_labels(split, self.counts.numpy(), training, self.size)
        smallest, world_size = len(split) * self.repeats // len(self), distributed.world_size()
        if training and smallest < world_size:
            raise UserError(f"{smallest} images are too few for {world_size} processes: raise --batch-size")
        if self.device.type == "cuda" and self.data.nbytes < torch.cuda.mem_get_info(self.device)[0] / 4:
            self.data = self.data.to(self.device)
        self.images, self.masks = _unpack(self.data)

    def __len__(self):
        """The number of batches per epoch, over all processes."""
        return math.ceil(len(self.split) * self.repeats / self.batch_size)

    @functools.cached_property
    def baseline(self):
        """Scores of the all-background baseline at the loader's size, see ``util.Scores.baseline``."""
        return util.Scores(math.nan, torch.diag(self.counts), self.classes).baseline

    def normalise(self, images):
        """``imaging.normalise`` with the loader's device, mean and standard deviation."""
        return imaging.normalise(images, self.device, self.mean, self.std)

    def augmented_samples(self, count):
        """Augment the first ``count`` images for a plot, again from the first if there are fewer; uint8 as stored."""
        images, masks = self.take(torch.arange(count) % len(self.split))
        return self.augmented(images, masks, self.augment.draw(count, torch.Generator().manual_seed(self.seed)))

    def augmented(self, images, masks, params):
        """Augment uint8 tensors [B, 3, H, W] and [B, H, W]; UserError if the result has another shape or type."""
        fill = 255 * torch.tensor(self.mean, device=self.device).view(3, 1, 1)
        results = self.augment(images, masks, self._move(params), fill)
        for name, before, after in zip(("images", "masks"), (images, masks), results, strict=True):
            if (after.shape, after.dtype) != (before.shape, torch.uint8):
                problem = f"{name} of {after.dtype} {list(after.shape)}, not torch.uint8 {list(before.shape)}"
                raise UserError(f"augment returns {problem}: keep size and type (the loader normalises after it)")
        return results

    def batches(self, epoch=0):
        """Yield this process's batches of an epoch: images, masks and their positions in the split.

        float32 [B, 3, H, W], normalised; int64 [B, H, W], class indices and VOID; int64 [B] on the CPU.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        num_samples = len(self.split) * self.repeats
        order = torch.randperm(num_samples, generator=generator) if self.training else torch.arange(num_samples)
        batches = order.tensor_split(len(self))
        own = slice(distributed.rank(), None, distributed.world_size())
        for samples in batches if self.training else batches[own]:
            if self.augment is not None:  # drawn for the whole batch, however many processes share it
                params = self.augment.draw(len(samples), generator)[own]
            if self.training:
                samples = samples[own]
            indices = samples % len(self.split)
            images, masks = self.take(indices)
            augmented = (samples >= self.unchanged * len(self.split)).nonzero().flatten()
            if len(augmented):
                rows = self._move(augmented)
                images[rows], masks[rows] = self.augmented(images[rows], masks[rows], params[augmented])
            yield self.normalise(images), masks.long(), indices

    def take(self, indices):
        """Copies of some images and masks of the split, on the device."""
        return _unpack(self.data[self._move(indices)] if self.data.is_cuda else self._move(self.data[indices]))

    def _move(self, tensor):
        """A tensor on the device; to a GPU it is copied from pinned memory, without waiting."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def _unpack(pixels):
    """Views of images [N, 3, H, W] and masks [N, H, W] in pixels [N, H, W, 4]."""
    return pixels[..., :3].permute(0, 3, 1, 2), pixels[..., 3]
