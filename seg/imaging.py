"""Photos and masks as arrays: decoding, resizing and normalising, and VOC's palette."""

import contextlib
import functools
import glob
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from seg import distributed
from util import VOID, UserError, background_label, reason

# Mean and standard deviation of ImageNet's photos in 0..1, as red, green, blue: torchvision's weights expect them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # in lower case; files may differ in case
MAX_SIDE = 1 << 13  # of a network's input in pixels

# Pillow refuses images of over 178,956,970 pixels, and warns of half as many.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow warns of damaged EXIF data, which many photos have and which only matters for their orientation.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


def _palette():
    """VOC's colour map: the bits of an index, three at a time, fill red, green and blue from the top bit down."""
    index, channel = np.arange(256)[:, None], np.arange(3)
    return sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)).astype(np.uint8)


PALETTE = _palette()  # uint8 [256, 3], RGB; row 255 is the colour of void
WRONG = (213, 94, 0)  # the colour of wrong pixels, an orange for the colour-blind

# Colours that are easier to tell apart than VOC's: Matplotlib's tab20 without the strong orange, which is like WRONG,
# tab20b and tab20c; uint8 [255, 3], RGB, which repeat after 59.
DISTINCT_COLOURS = bytes.fromhex(
    "1f77b42ca02cd627289467bd8c564be377c27f7f7fbcbd2217becfaec7e8ffbb7898df8aff9896c5b0d5c49c94f7b6d2c7c7c7dbdb8d9edae5"
    "393b795254a36b6ecf9c9ede6379398ca252b5cf6bcedb9c8c6d31bd9e39e7ba52e7cb94843c39ad494ad6616be7969c7b4173a55194ce6dbd"
    "de9ed63182bd6baed69ecae1c6dbefe6550dfd8d3cfdae6bfdd0a231a35474c476a1d99bc7e9c0756bb19e9ac8bcbddcdadaeb636363969696"
    "bdbdbdd9d9d9"
)
DISTINCT_COLOURS = np.resize(np.frombuffer(DISTINCT_COLOURS, np.uint8), (255, 3))


def palette_image(mask, colours=PALETTE):
    """A mask, uint8 array [H, W] of class indices and VOID, as a PIL image with a palette, uint8 [256, 3]."""
    image = Image.fromarray(mask)
    image.putpalette(colours.tobytes())
    return image


def class_colours(classes):
    """VOC's palette if the first class is the background, which is black there; or DISTINCT_COLOURS and void."""
    return PALETTE if background_label(classes) == 0 else np.vstack((DISTINCT_COLOURS, PALETTE[VOID:]))


def open_image(path):
    """Decode the image file at ``path`` as a PIL image; UserError if that fails."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        path = Path(path)
        folders = (path.parent, path.parent.with_name(f"{path.parent.name}PNG"))  # labelme's SegmentationClassPNG
        similar = [file for folder in folders for file in folder.glob(f"{glob.escape(path.stem)}[!0-9A-Za-z]*")]
        found = f" (but there is {', '.join('/'.join(file.parts[-2:]) for file in similar[:3])})" if similar else ""
        formats = "PNG" if path.suffix == ".png" else "JPEG, PNG, WebP, BMP or TIFF"  # of masks, and of photos
        raise UserError(f"{path}: no such file{found}: put it there as {formats}") from None
    except PermissionError:
        raise UserError(f"{path}: permission denied: make it readable") from None
    except Exception as error:  # a damaged file raises one of many types
        raise UserError(f"{path}: cannot be read as an image ({reason(error)}): replace the file") from None


def open_photo(path):
    """Decode the photo at ``path`` as a PIL image in RGB, turned upright if its EXIF orientation can be read.

    Raises a UserError if the file cannot be decoded, or if it has 32 bits per pixel.
    """
    image = open_image(path)
    if image.mode in ("I", "F"):
        raise UserError(f"{path}: is an image in mode {image.mode}, with 32 bits per pixel: save it with 8 bits")
    with contextlib.suppress(Exception):  # damaged EXIF data raises one of many types
        ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def to_rgb(image):
    """Convert a PIL image to RGB. 16-bit greyscale is scaled to 8 bits; Pillow's conversion would clip it to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy it


def height_width(size):
    """``size``, which is (height, width) or the side of a square, as a tuple (height, width), or a UserError."""
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in sides):
        raise UserError(f"size={size!r}: pass the side of a square in pixels, or (height, width), up to {MAX_SIDE}")
    return sides


def resize(image, size, resampling=Image.Resampling.BILINEAR):
    """Resize a PIL image to ``size``, (height, width), by default bilinear with antialiasing, as a uint8 array."""
    height, width = size
    # First horizontally: the order in which a single call does it, and so rounding, depends on Pillow's release.
    return np.asarray(image.resize((width, image.height), resampling).resize((width, height), resampling))


def resize_mask(mask, size):
    """Resize a mask [H, W] with values 0 .. 255 to ``size``, (height, width), to the nearest pixel: uint8."""
    return resize(Image.fromarray(mask.astype(np.uint8, copy=False)), size, Image.Resampling.NEAREST)


def size_text(size):
    """The size (height, width) as text, width first as usual for photos."""
    height, width = size
    return f"{width}x{height}"


def bounded_size(shape, side):
    """The size (height, width) of an image of ``shape``, downscaled to at most ``side`` pixels per side."""
    scale = max(1, max(shape) / side)
    return tuple(max(1, round(length / scale)) for length in shape)


def wrong_pixels(photo, truth, prediction):
    """A photo, uint8 [H, W, 3], in light grey, with wrong pixels in WRONG, and void of ``truth`` in its colour."""
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
