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
from PIL import Image

import util
from seg import distributed, imaging, layout
from seg.layout import CLASSES
from util import VOID, UserError

DIGEST_LENGTH = 16  # characters of the digest in the name of a cache file
# The code on which the pixels of an image depend.
DECODING = [Path(__file__).with_name(name).read_bytes() for name in ("data.py", "layout.py", "imaging.py")]


class Split:
    """The photos and masks of one split of a folder in VOC layout, read from disk and checked at every access.

    Args:
        root: the folder in VOC layout.
        name: name of the list in ``ImageSets/Segmentation``, without ``.txt``.
        limit: keep only the first N ids; None keeps all.
        report: called with the message of each fault of the list and ``classes.txt``; by default, the first is raised.
        like: another Split of the same folder, whose list of files is used instead of walking the folder again.

    Attributes:
        root: Path of the folder. dataset: its name.
        ids: list of str, see ``layout.read_ids``. all_ids: the same without the limit.
        num_left_out: how many lines of the list are marked -1.
        classes: tuple of class names, from ``classes.txt`` if there is one, else VOC's 21.

    Raises:
        UserError: the folder or the split does not exist, or the list or ``classes.txt`` has a fault.
    """

    def __init__(self, root, name, limit=None, report=layout.refuse, like=None):
        self.root, self.name = layout.find_root(root), name
        self.dataset = self.root.resolve().name
        path = self.root / layout.LISTS / f"{name}.txt"
        if not path.exists():
            names = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt"))) or "none"
            raise UserError(f"{path}: no such split (there are: {names}): write one image id per line into it")
        if like is None:
            self._photos = layout.list_images(self.root / "JPEGImages", imaging.PHOTO_SUFFIXES)
            self._masks = layout.list_images(self.root / "SegmentationClass", layout.MASK_SUFFIXES)
        else:
            self._photos, self._masks = like._photos, like._masks
        self.all_ids, self.num_left_out = layout.read_ids(path, self._photos.keys() | self._masks.keys(), report)
        self.ids, self._colours = self.all_ids[:limit], {}  # colours of the masks' palettes, see ``layout.read_mask``
        path = self.root / "classes.txt"
        self.classes = layout.read_classes(path, report) if path.exists() else CLASSES
        self._num_values = len(self.classes) or VOID  # in the files of masks: a subclass may merge classes

    def __len__(self):
        return len(self.ids)

    def photo_path(self, index):
        """The path of a photo; that of a JPEG if there is none. Raises a UserError if two photos have the id."""
        return layout.single(self._paths(self.ids[index])[0])

    def mask_path(self, index):
        """The path of a mask, whether or not it exists. Raises a UserError if two masks have the id."""
        return layout.single(self._paths(self.ids[index])[1])

    def _paths(self, image_id):
        """The paths of the photos and of the masks with an id, two lists; if one is missing, that of a JPEG or PNG."""
        missing = self.root / "JPEGImages" / f"{image_id}.jpg", self.root / "SegmentationClass" / f"{image_id}.png"
        return [known.get(image_id, [path]) for known, path in zip((self._photos, self._masks), missing)]

    def photo(self, index):
        """The photo as a PIL image in RGB, upright. Raises a UserError if it is missing or unreadable."""
        path = self.photo_path(index)
        layout.check_exists(path, is_mask=False)
        return imaging.open_photo(path)

    def mask(self, index):
        """The mask as a uint8 array [H, W] of class indices and VOID; errors as in ``layout.read_mask``."""
        path = self.mask_path(index)
        layout.check_exists(path, is_mask=True)
        return layout.read_mask(path, max(self._num_values, len(self.classes)), self.root, self._colours)

    def resized(self, index, size):
        """Photo and mask at ``size``, (H, W), as one uint8 array [H, W, 4]: red, green, blue and class.

        The photo is resized bilinearly with antialiasing, the mask to the nearest pixel. Raises a UserError if one of
        them is invalid, or if they differ in size.
        """
        photo, mask = self.photo(index), self.mask(index)
        layout.check_pair(self.photo_path(index), self.mask_path(index), photo, mask, self.classes)
        mask = imaging.resize(Image.fromarray(mask), size, Image.Resampling.NEAREST)
        return np.dstack((imaging.resize(photo, size), mask))

    def check(self, index):
        """Check a photo and its mask as ``resized`` does.

        Returns a list of faults, and the mask's int64 counts [256] of each value, None if it is invalid.
        """
        faults = []

        def attempt(function, *args):
            try:
                return function(*args)
            except UserError as error:
                faults.append(str(error))

        photo, mask = attempt(self.photo, index), attempt(self.mask, index)
        if not faults:
            attempt(layout.check_pair, self.photo_path(index), self.mask_path(index), photo, mask, self.classes)
        return faults, None if mask is None else np.bincount(mask.ravel(), minlength=VOID + 1)

    def is_unchanged(self):
        """Whether images and order are those of the list, up to the limit, and the methods of this class read them."""
        in_order = type(self) is __class__ and self.ids == self.all_ids[: len(self)]
        return in_order and all(not self.replaces(name) for name in READERS)

    def replaces(self, name):
        """Whether a subclass or a script has replaced one of the methods in READERS."""
        return getattr(getattr(self, name), "__func__", None) is not READERS[name]

    def digest(self, size):
        """A short hash of all that ``resized`` depends on for any image of the list, whatever the limit."""
        state = [DECODING, size, self._num_values, len(self.classes), PIL.__version__]
        for image_id in self.all_ids:
            for path in sum(self._paths(image_id), []):
                found = path.stat() if os.path.exists(path) else None  # a missing file is reported when it is opened
                state.append((image_id, path.name, found and (found.st_size, found.st_mtime_ns, found.st_ctime_ns)))
        return hashlib.sha256(repr(state).encode()).hexdigest()[:DIGEST_LENGTH]


@contextlib.contextmanager
def naming_check(root):
    """Add the command that lists all faults to the message of the first."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} ({layout.command(root, '--check')} lists all faults)") from None


READERS = {name: vars(Split)[name] for name in ("photo", "mask", "resized", "photo_path", "mask_path", "_paths")}


def load_resized(split, size):
    """``Split.resized`` of all images at ``size``, (H, W): uint8 tensor [N, H, W, 4] on the CPU.

    They are decoded and checked once, and cached as a ``.npy`` file in ``.cache`` in the data's folder, which later
    runs map into memory. Its name holds ``Split.digest``, so that a change of any file is noticed. Nothing is cached if
    the folder cannot be written, for a subclass of Split or a Split whose ids were changed, and with a limit; with a
    limit, the first rows of the complete split's file are used if there is one.
    """
    folder, name = split.root / ".cache", f"{split.name}_{size[0]}x{size[1]}"
    path = folder / f"{name}_{split.digest(size)}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        if split.is_unchanged():
            return torch.from_numpy(np.load(path, mmap_mode="c")[: len(split)])

    pixels = np.empty((len(split), *size, 4), np.uint8)

    def read(index):
        pixels[index] = split.resized(index, size)

    with naming_check(split.root):
        layout.map_images(read, range(len(split)), f"decoding {split.name}")
    if split.is_unchanged() and len(split) == len(split.all_ids):
        with contextlib.suppress(OSError, UserError):
            layout.write_cache(path, pixels)
            for outdated in folder.glob(f"{name}_{'?' * DIGEST_LENGTH}.npy"):
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

    def __call__(self, images, masks, seeds, fill):
        from torchvision import tv_tensors  # only here: importing torchvision takes seconds

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
        batch_size: the largest batch, over all processes. Batches are of nearly equal size, so that from 3 on none has
            a single image, on which batch norm would learn noise.
        training: shuffle in every epoch. Otherwise the images come in the order of the split.
        augment: None, an augmentation of single images as for PerImage, or an object that augments batches, such as
            ``transforms.Augmentation``: ``augment.draw(count, generator)`` returns random parameters, one row of a
            tensor per image, from a torch.Generator on the CPU, and ``augment(images, masks, params, fill)`` maps
            uint8 tensors [B, 3, H, W] and [B, H, W] on the device to others of the same shape; fill, float32 [3, 1, 1]
            in 0..255, is the mean colour, for what lies outside a photo. An epoch shows each image
            ``augment.unchanged`` times as it is and ``augment.augmented`` times augmented; these default to 0 and 1.
        seed: order and augmentation depend on ``seed`` and the epoch only, so that any epoch can be repeated.
        device: where batches go.
        mean, std: of ``normalise``, three numbers each. Their mean colour fills the borders of augmented photos.

    Attributes:
        repeats: how many times an epoch shows each image.
        size: (height, width).
        images, masks: the whole split, uint8 [N, 3, H, W] and [N, H, W], on the GPU if it takes less than a quarter of
            its free memory, else on the CPU.
        counts: the result of ``count`` at the start. ids: those of the split then.
    """

    def __init__(
        self,
        split,
        size,
        batch_size,
        training=False,
        augment=None,
        seed=0,
        device="cpu",
        mean=imaging.MEAN,
        std=imaging.STD,
    ):
        self.split, self.size, self.classes = split, imaging.height_width(size), split.classes
        self.batch_size, self.training, self.seed, self.device = batch_size, training, seed, torch.device(device)
        self.augment, self.ids = augment, tuple(split.ids)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        with distributed.main_process_first():
            self.data = load_resized(split, self.size)
        self.counts = self.count()
        if fault := layout.label_fault(split, self.counts.numpy(), training):
            raise UserError(fault)
        smallest = len(split) * self.repeats // len(self)
        if training and smallest < distributed.world_size():
            raise UserError(
                f"{smallest} images are too few for {distributed.world_size()} processes: raise --batch-size"
            )
        if self.device.type == "cuda" and self.data.nbytes < torch.cuda.mem_get_info(self.device)[0] / 4:
            self.data = self.data.to(self.device)

    @property
    def augment(self):
        return self._augment

    @augment.setter
    def augment(self, augment):
        self._augment = augment if augment is None or hasattr(augment, "draw") else PerImage(augment)
        self.unchanged = 1 if augment is None else getattr(augment, "unchanged", 0)
        self.repeats = self.unchanged + (0 if augment is None else getattr(augment, "augmented", 1))

    @property
    def images(self):
        return self.data[..., :3].permute(0, 3, 1, 2)

    @property
    def masks(self):
        return self.data[..., 3]

    def __len__(self):
        """The number of batches per epoch, over all processes."""
        return math.ceil(len(self.split) * self.repeats / self.batch_size)

    def count(self):
        """Count the pixels of each class over all masks at this size: int64 [C] on the CPU."""
        return sum(torch.bincount(mask.flatten(), minlength=VOID + 1) for mask in self.masks)[: len(self.classes)].cpu()

    @functools.cached_property
    def baseline(self):
        """Scores of the all-background baseline at the loader's size, see ``util.Scores.baseline``."""
        return util.Scores(math.nan, torch.diag(self.counts), self.classes).baseline

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
        fill = 255 * torch.tensor(self.mean, device=self.device).view(3, 1, 1)
        results = self.augment(images, masks, self._move(params), fill)
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
        own = slice(distributed.rank(), None, distributed.world_size())
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
