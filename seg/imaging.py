"""Photos and masks as arrays: decoding, resizing and normalising, and VOC's palette."""

import contextlib
import functools
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

from seg import distributed
from util import VOID, UserError, background_label, reason

# Mean and standard deviation of ImageNet's photos in 0..1, as red, green, blue: torchvision's weights expect them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # in lower case; files may differ in case
BITS, COMPRESSION, PLANAR = 258, 259, 284  # tags of TIFF
MAX_SIDE = 1 << 13  # of a network's input in pixels

# Larger images are not decoded. Pillow refuses only images of twice this size, and warns from here on.
MAX_PIXELS = 89_478_485
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow warns of damaged EXIF data, which many photos have and which only matters for their orientation.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


def _palette():
    """VOC's colour map: the bits of an index, three at a time, fill red, green and blue from the top bit down."""
    palette = np.zeros((256, 3), np.uint8)
    index = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


PALETTE = _palette()  # uint8 [256, 3], RGB; row 255 is the colour of void
WRONG = (213, 94, 0)  # the colour of wrong pixels, an orange for the colour-blind


def palette_image(mask, colours=PALETTE):
    """A mask, uint8 array [H, W] of class indices and VOID, as a PIL image with a palette, uint8 [256, 3]."""
    image = Image.fromarray(mask)
    image.putpalette(colours.tobytes())
    return image


def _oklab(colours):
    """Colours in 0..255 in sRGB, [N, 3], in the Oklab colour space (Björn Ottosson, 2020)."""
    linear = np.where(colours > 10.3, ((colours / 255 + 0.055) / 1.055) ** 2.4, colours / 255 / 12.92)
    to_lms = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.cbrt(linear @ np.transpose(to_lms)) @ np.transpose(to_lab)


@functools.cache
def distinct_colours():
    """A colour for each class that differs clearly from the others: uint8 [255, 3], RGB, the same in every run.

    VOC's palette gives neighbours such as classes 1 and 8 dark reds. Here each colour is, of 4,096, the one that is
    farthest from all before, void and wrong pixels in the Oklab colour space, without greys and extremes of lightness.
    """
    levels = np.linspace(0, 255, 16)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _oklab(colours)
    suitable = (lab[:, 0] > 0.35) & (lab[:, 0] < 0.95) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.06)
    colours, lab = colours[suitable], lab[suitable]
    chosen, distance = [], np.full(len(lab), np.inf)
    for other in _oklab(np.stack((PALETTE[VOID], WRONG))):
        distance = np.minimum(distance, np.linalg.norm(lab - other, axis=1))
    while len(chosen) < 255:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return colours[chosen].astype(np.uint8)


def class_colours(classes):
    """The colours of classes in a plot: uint8 [256, 3], RGB; row 255 is void.

    VOC's palette, whose first colour is black, for classes with a background, else ``distinct_colours``.
    """
    return np.vstack((distinct_colours(), PALETTE[VOID:])) if background_label(classes) is None else PALETTE


def open_image(path, max_pixels=MAX_PIXELS):
    """Decode the image file at ``path`` as a PIL image; UserError if that fails or it has over ``max_pixels``."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise UserError(f"{path}: {image.width}x{image.height} pixels are too many: make the image smaller")
            rawmode, tags = str(image.tile), getattr(image, "tag_v2", {})  # tags of a TIFF
            if tags.get(PLANAR) == 2 and tags.get(COMPRESSION) == 1 and 16 in tags.get(BITS, ()):
                problem = "is a TIFF with 16 bits and a plane per channel, which Pillow reads wrongly"
                raise UserError(f"{path}: {problem}: save it as PNG, or compressed")
            image.load()
            # per channel, of which Pillow keeps 8; BGR;16 is 16 bits for all three
            image.info["16 bits"] = ";16" in rawmode and "BGR;16" not in rawmode
            return image
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, or a link to a missing one: put it there") from None
    except Exception as error:  # a damaged file raises one of many types
        raise UserError(f"{path}: cannot be read as an image ({reason(error)}): replace the file") from None


def open_photo(path, max_pixels=MAX_PIXELS):
    """Decode the photo at ``path`` as a PIL image in RGB, turned upright as its EXIF orientation says.

    A photo without an orientation, or with one that cannot be read, stays as it is stored. Raises a UserError if the
    file cannot be decoded, or if black and white cannot be told from its type.
    """
    image = open_image(path, max_pixels)
    if image.mode in ("I", "F"):
        problem = f"is an image in mode {image.mode}, with 32 bits per pixel and an unknown range of values"
        raise UserError(f"{path}: {problem}: save it with 8 bits")
    is_grey = image.mode.startswith("I")
    if is_grey or image.info["16 bits"]:
        values = np.asarray(image) if is_grey else np.asarray(image.convert("RGB")).astype(np.uint16) << 8
        lowest, highest = int(values.min()), int(values.max())
        if 0 < highest < 1 << 12 or 0 < highest - lowest < 1 << 10:
            last = highest if is_grey else highest + 255
            problem = f"has 16 bits per pixel, but only values from {lowest} to {last}, too few for 8 bits"
            raise UserError(f"{path}: {problem}: scale them to 0 .. 65535, or save 8 bits")
    with contextlib.suppress(Exception):  # damaged EXIF data raises one of many types
        ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def to_rgb(image):
    """Convert a PIL image to RGB. 16-bit greyscale is scaled to 8 bits; Pillow's conversion would clip it to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def height_width(size):
    """The size of a network's input as a tuple (height, width): ``size`` is such a pair, or the side of a square.

    Raises a UserError if it is neither.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in sides):
        raise UserError(f"size={size!r}: pass the side of a square in pixels, or (height, width), up to {MAX_SIDE}")
    return sides


def resize(image, size, resampling=Image.Resampling.BILINEAR):
    """Resize a PIL image to ``size``, (height, width), by default bilinear with antialiasing, as a uint8 array.

    First horizontally, then vertically: of a single call, the order depends on Pillow's release, and so does rounding.
    """
    height, width = size
    return np.asarray(image.resize((width, image.height), resampling).resize((width, height), resampling))


def bounded_size(shape, side):
    """The size (height, width) of an image of ``shape``, downscaled to at most ``side`` pixels per side."""
    scale = max(1, max(shape) / side)
    return tuple(max(1, round(length / scale)) for length in shape)


def wrong_pixels(photo, truth, prediction):
    """The photo in light grey, its wrong pixels in WRONG, and those without ground truth in the colour of void.

    Photo is uint8 [H, W, 3], the masks are [H, W]; returns uint8 [H, W, 3].
    """
    picture = np.repeat(150 + 0.4 * photo.mean(2, keepdims=True), 3, axis=2).astype(np.uint8)
    picture[prediction != truth] = WRONG
    picture[truth == VOID] = PALETTE[VOID]
    return picture


@functools.cache
def scale_and_shift(device, mean, std):
    """Tensors [3, 1, 1] with which ``value * scale - shift`` normalises a value in 0..255."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    return 1 / (255 * std), mean / std


def normalise(images, device, mean=MEAN, std=STD):
    """Move uint8 images [B, 3, H, W] to a device and map 0..1 to ``(value - mean) / std``: float32."""
    scale, shift = scale_and_shift(device, tuple(map(float, mean)), tuple(map(float, std)))
    images = images.to(device, torch.float32, memory_format=distributed.memory_format(device))
    return images.mul_(scale).sub_(shift)  # in place: the conversion to float32 has made a copy
