"""Render the toy set: VOC's layout, classes, split sizes and imbalance, drawn from a seed, for machines without VOC.

Each class has its own silhouette, texture and hue; the rest is random. Masks are the same on every machine: geometry
uses only ``random.random()``, whose sequence Python guarantees, and operations that IEEE 754 defines exactly.
"""

import colorsys
import random
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from seg.files import atomic_folder, writing
from seg.imaging import palette_image
from seg.voc_layout import CLASSES, map_images
from util import VOID

SPLITS = {"train": 209, "val": 213, "test": 210}
# Width and height of the photos, with their relative frequency.
SIZES = {(500, 375): 6, (375, 500): 3, (500, 333): 4, (333, 500): 2, (480, 360): 1, (500, 400): 1, (500, 281): 1}
GOLDEN_RATIO = 0.618034  # its multiples spread any number of hues evenly
BORDER = 2  # pixels of void on either side of an outline

# Relative frequency and size of each class, similar to the real VOC2007 masks.
FREQUENCY_AND_SIZE = {
    "aeroplane": (12, 1.0), "bicycle": (11, 1.0), "bird": (13, 0.9), "boat": (11, 0.9), "bottle": (17, 0.8),
    "bus": (14, 1.3), "car": (15, 0.9), "cat": (15, 1.2), "chair": (26, 0.9), "cow": (11, 1.0),
    "diningtable": (14, 1.2), "dog": (17, 1.1), "horse": (15, 1.0), "motorbike": (12, 1.0), "person": (110, 1.1),
    "pottedplant": (17, 0.8), "sheep": (10, 0.9), "sofa": (17, 1.1), "train": (10, 1.3), "tvmonitor": (20, 0.9),
}  # fmt: skip


def _box(left, top, right, bottom):
    return (left, top, right, top, right, bottom, left, bottom)


# Silhouettes in a square from -1 to 1, x to the right, y down. Four numbers are an ellipse (centre x, y, radii), more
# are the corners of a polygon. A silhouette is the union of its parts, without those between "cut" and "add".
# fmt: off
SILHOUETTES = {
    "aeroplane": [
        (0, 0, 1, 0.17),  # fuselage
        (-0.25, -0.9, 0, -0.9, 0.35, 0, 0, 0.9, -0.25, 0.9, 0, 0),  # wings
        (-1, -0.5, -0.8, -0.5, -0.6, 0, -0.8, 0.5, -1, 0.5, -0.85, 0),  # tail
    ],
    "bicycle": [
        (-0.55, 0.25, 0.45, 0.45), (0.55, 0.25, 0.45, 0.45),  # wheels
        "cut", (-0.55, 0.25, 0.25, 0.25), (0.55, 0.25, 0.25, 0.25), "add",
        (-0.6, 0.2, -0.3, -0.5, 0.4, -0.5, 0.65, 0.2, 0.5, 0.3, 0.25, -0.3, 0.05, 0.35, -0.5, 0.35),  # frame
        _box(-0.5, -0.65, -0.1, -0.5), (0.25, -0.75, 0.6, -0.75, 0.6, -0.6, 0.25, -0.5),  # saddle and handlebar
    ],
    "bird": [
        (0, 0.1, 0.6, 0.35), (-0.45, 0, -1, -0.15, -0.95, 0.35),  # body and tail
        (-0.35, 0.05, 0.15, -0.95, 0.35, 0),  # wing
        (0.6, -0.25, 0.24, 0.24), (0.8, -0.35, 1, -0.2, 0.8, -0.12),  # head and beak
    ],
    "boat": [
        (-1, 0.3, 1, 0.3, 0.65, 0.85, -0.65, 0.85),  # hull
        (-0.06, -0.95, -0.06, 0.2, -0.75, 0.2), (0.06, -0.75, 0.06, 0.2, 0.65, 0.2),  # sails
        _box(-0.06, -0.95, 0.06, 0.35),  # mast
    ],
    "bottle": [_box(-0.34, -0.1, 0.34, 1), (0, -0.1, 0.34, 0.3), _box(-0.14, -1, 0.14, -0.2)],
    "bus": [_box(-1, -0.55, 1, 0.5), (-0.6, 0.5, 0.2, 0.2), (0.6, 0.5, 0.2, 0.2)],
    "car": [
        _box(-1, -0.05, 1, 0.35), (-0.65, 0, -0.35, -0.5, 0.3, -0.5, 0.65, 0),  # body and roof
        (-0.58, 0.35, 0.22, 0.22), (0.58, 0.35, 0.22, 0.22),  # wheels
    ],
    "cat": [
        (0, 0.4, 0.5, 0.6), (0.3, 0.9, 0.8, 0.3, 1, 0.35, 0.6, 1),  # body and tail
        (0, -0.4, 0.42, 0.36),  # head
        (-0.42, -0.35, -0.4, -1, -0.05, -0.65), (0.42, -0.35, 0.4, -1, 0.05, -0.65),  # ears
    ],
    "chair": [
        _box(-0.55, -1, -0.3, 0.2), _box(-0.55, -0.05, 0.55, 0.25),  # back and seat
        _box(-0.55, 0.2, -0.35, 1), _box(0.35, 0.2, 0.55, 1),  # legs
    ],
    "cow": [
        (-0.05, -0.05, 0.75, 0.42), _box(-0.65, 0.1, -0.4, 0.8), _box(0.3, 0.1, 0.55, 0.8),  # body and legs
        (0.78, -0.25, 0.24, 0.3),  # head
        (0.55, -0.75, 0.72, -0.4, 0.6, -0.35), (1, -0.75, 0.95, -0.35, 0.83, -0.4),  # horns
    ],
    "diningtable": [(0, -0.3, 1, 0.33), _box(-0.14, -0.2, 0.14, 0.75), (0, 0.75, 0.45, 0.14)],
    "dog": [
        (-0.1, 0.1, 0.62, 0.3), _box(-0.6, 0.1, -0.4, 0.9), _box(0.2, 0.1, 0.42, 0.9),  # body and legs
        (-0.7, 0.05, -0.98, -0.6, -0.8, -0.65, -0.5, -0.1),  # tail
        (0.55, -0.3, 0.3, 0.28), (0.65, -0.35, 1, -0.25, 1, -0.05, 0.65, -0.05),  # head and muzzle
    ],
    "horse": [
        (-0.1, 0, 0.6, 0.3), _box(-0.65, 0, -0.48, 1), _box(0.25, 0, 0.42, 1),  # body and legs
        (-0.6, -0.15, -0.95, 0.5, -0.8, 0.5),  # tail
        (0.2, 0.1, 0.6, -0.85, 0.85, -0.85, 0.5, 0.15), (0.55, -0.95, 0.75, -1, 1, -0.55, 0.85, -0.45),  # neck and head
    ],
    "motorbike": [
        (-0.6, 0.35, 0.4, 0.4), (0.6, 0.35, 0.4, 0.4),  # wheels
        (-0.8, -0.2, 0.1, -0.1, 0.35, -0.4, 0.55, 0.1, 0.3, 0.55, -0.4, 0.5),  # body
        (0.15, -0.7, 0.55, -0.6, 0.5, -0.3, 0.3, -0.3),  # handlebar
    ],
    "person": [
        (0, -0.77, 0.2, 0.23), (-0.34, -0.52, 0.34, -0.52, 0.3, 0.2, -0.3, 0.2),  # head and trunk
        (-0.3, 0.15, -0.03, 0.15, -0.08, 1, -0.3, 1), (0.03, 0.15, 0.3, 0.15, 0.3, 1, 0.08, 1),  # legs
        (-0.34, -0.52, -0.62, 0.1, -0.48, 0.16, -0.2, -0.3), (0.34, -0.52, 0.62, 0.1, 0.48, 0.16, 0.2, -0.3),  # arms
    ],
    "pottedplant": [
        (-0.42, 0.3, 0.42, 0.3, 0.28, 1, -0.28, 1),  # pot
        (-0.35, -0.3, 0.32, 0.45), (0.35, -0.3, 0.32, 0.45), (0, -0.5, 0.34, 0.5), (0, 0.1, 0.4, 0.3),  # leaves
    ],
    "sheep": [
        (-0.45, -0.1, 0.4, 0.38), (0, -0.25, 0.42, 0.38), (0.4, -0.1, 0.36, 0.36), (0, 0.15, 0.6, 0.3),  # body
        (0.8, -0.15, 0.2, 0.24), _box(-0.45, 0.2, -0.25, 0.75), _box(0.2, 0.2, 0.4, 0.75),  # head and legs
    ],
    "sofa": [
        _box(-0.8, -0.5, 0.8, 0.3), _box(-0.8, 0.1, 0.8, 0.5),  # back and seat
        _box(-1, -0.15, -0.7, 0.55), _box(0.7, -0.15, 1, 0.55),  # arms
    ],
    "train": [
        (-1, -0.4, 0.55, -0.4, 1, 0.1, 1, 0.4, -1, 0.4),
        (-0.7, 0.4, 0.14, 0.14), (-0.3, 0.4, 0.14, 0.14), (0.3, 0.4, 0.14, 0.14), (0.7, 0.4, 0.14, 0.14),  # wheels
    ],
    "tvmonitor": [_box(-0.95, -0.75, 0.95, 0.45), _box(-0.12, 0.4, 0.12, 0.7), _box(-0.45, 0.65, 0.45, 0.8)],
}
# fmt: on


def _wave(phase):
    """A smooth stripe, 0 .. 1, of period 1."""
    return 0.5 + 0.5 * np.sin(2 * np.pi * phase)


def _cell(x, y):
    """Distance of a point from the centre of its unit square, 0 .. 0.71."""
    return np.hypot(x % 1 - 0.5, y % 1 - 0.5)


# A texture maps x, y in periods and smooth noise n in 0..1 to the weight of the second colour, 0..1.
TEXTURES = {
    "aeroplane": lambda x, y, n: _wave(y) > 0.3,
    "bicycle": lambda x, y, n: _wave(1.25 * x) > 0.5,
    "bird": lambda x, y, n: _cell(x, y + 0.5 * np.floor(x % 2)) * 1.4,
    "boat": lambda x, y, n: y / 1.5 % 1,
    "bottle": lambda x, y, n: _wave(x / 2) ** 2,
    "bus": lambda x, y, n: (x / 2 % 1 > 0.25) & (y / 2 % 1 > 0.45),
    "car": lambda x, y, n: _wave((x + y) / 2),
    "cat": lambda x, y, n: _wave(x + 0.4 * np.sin(2 * y)),
    "chair": lambda x, y, n: np.maximum(_wave(x + y), _wave(x - y)) > 0.8,
    "cow": lambda x, y, n: n > 0.5,
    "diningtable": lambda x, y, n: _wave(y + 4 * n),
    "dog": lambda x, y, n: _cell(1.25 * x, 1.25 * y) < 0.28,
    "horse": lambda x, y, n: 0.5 + 0.5 * np.sin(6 * x + 6 * n) * np.sin(2 * y),
    "motorbike": lambda x, y, n: (np.floor(1.25 * x) + np.floor(1.25 * y)) % 2,
    "person": lambda x, y, n: np.where(y % 4 < 2, _wave(y) > 0.5, _wave(x) > 0.5),
    "pottedplant": lambda x, y, n: _wave(y + np.abs(x % 2 - 1)) > 0.5,
    "sheep": lambda x, y, n: _wave(2 * _cell(0.7 * x, 0.7 * y)),
    "sofa": lambda x, y, n: _cell(x / 2, y / 2) < 0.3,
    "train": lambda x, y, n: (_wave(x / 2) > 0.4) * (0.5 + 0.5 * (_wave(1.25 * y) > 0.5)),
    "tvmonitor": lambda x, y, n: _wave(1.25 * y) * _wave(x / 4 + y / 4),
}


def _inside(parts, x, y):
    """Which points are inside a silhouette: bool array of the shape of ``x`` and ``y``."""
    inside, adding = np.zeros(x.shape, bool), True
    for part in parts:
        if isinstance(part, str):
            adding = part == "add"
            continue
        if len(part) == 4:
            u, v = (x - part[0]) / part[2], (y - part[1]) / part[3]
            covered = u * u + v * v < 1
        else:
            covered = np.zeros(x.shape, bool)
            corners = list(zip(part[::2], part[1::2]))
            for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
                if ay != by:  # a point is inside when a ray to its left crosses the outline an odd number of times
                    covered ^= ((ay > y) != (by > y)) & (x < (y - ay) * (bx - ax) / (by - ay) + ax)
        inside = inside | covered if adding else inside & ~covered
    return inside


def _smooth(noise, height, width, cells, channels):
    """Smooth noise in 0 .. 1 of about ``cells`` bumps along the longer side: float32 [height, width, channels]."""
    rows, columns = (max(2, cells * side // max(height, width)) for side in (height, width))
    small = noise.random((rows, columns, channels), np.float32)
    layers = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(layer) for layer in layers], -1)


def _colour(noise):
    """A random muted colour: float32 array [3] in 0 .. 1."""
    colour = noise.random(3, np.float32)
    return 0.3 * colour + 0.7 * colour[0]


def _two_colours(noise, label):
    """Two colours of clearly different brightness, the first near the hue of the class: float32 arrays [3]."""
    hue = (GOLDEN_RATIO * label + 0.03 * noise.standard_normal()) % 1
    while True:
        first = np.array(colorsys.hsv_to_rgb(hue, 0.75, noise.uniform(0.5, 1)), np.float32)
        second = _colour(noise)
        if abs(first.mean() - second.mean()) > 0.3:
            return first, second


class Pose(NamedTuple):
    """Where an object is: its centre and half extents along its own axes in pixels, its rotation, and -1 if flipped."""

    x: float
    y: float
    half: tuple
    cos: float
    sin: float
    flip: float = 1

    def window(self, width, height):
        """The window that can contain the object, two slices, and its pixels' x and y along the object's axes."""
        reach = int(1.5 * max(self.half)) + 2
        rows = slice(max(0, int(self.y) - reach), min(height, int(self.y) + reach))
        columns = slice(max(0, int(self.x) - reach), min(width, int(self.x) + reach))
        y = (np.arange(rows.start, rows.stop) + 0.5 - self.y)[:, None]
        x = (np.arange(columns.start, columns.stop) + 0.5 - self.x)[None, :]
        return (rows, columns), (x * self.cos + y * self.sin) * self.flip, y * self.cos - x * self.sin


def _draw_pose(rng, width, height, label, num_objects):
    """Draw the Pose of an object of a class: the more objects in an image, the smaller each."""
    size = FREQUENCY_AND_SIZE[CLASSES[label]][1] * (0.32 + 0.34 * rng.random()) / (1 + 0.15 * (num_objects - 1))
    extent = size * min(width, height)
    aspect = 0.85 + 0.3 * rng.random()
    t = 0.26 * rng.random() - 0.13  # tangent of half the angle: gives cosine and sine without library functions
    x, y = width * (0.15 + 0.7 * rng.random()), height * (0.2 + 0.6 * rng.random())
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return Pose(x, y, (extent * aspect, extent / aspect), cos, sin, -1.0 if rng.random() < 0.5 else 1.0)


def _choose(rng, weights):
    """Draw a key of ``weights`` in proportion to its value, an integer."""
    point = rng.random() * sum(weights.values())
    return next(key for key, total in zip(weights, accumulate(weights.values())) if point < total)


def _scene(rng):
    """Draw an image's size and its objects, those behind first: (width, height), list of (class index, Pose)."""
    width, height = _choose(rng, SIZES)
    num_objects = _choose(rng, {1: 40, 2: 28, 3: 18, 4: 9, 5: 5})
    frequency = {name: pair[0] for name, pair in FREQUENCY_AND_SIZE.items()}
    labels = [CLASSES.index(_choose(rng, frequency)) for _ in range(num_objects)]
    return (width, height), [(label, _draw_pose(rng, width, height, label, num_objects)) for label in labels]


def _border(instances):
    """The pixels within BORDER of an outline: those with different instances in their neighbourhood."""
    image, side = Image.fromarray(instances), 2 * BORDER + 1
    highest, lowest = (image.filter(extreme(side)) for extreme in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    return np.asarray(highest) != np.asarray(lowest)


def _backdrop(noise, width, height):
    """A cluttered background: float32 array [height, width, 3] in 0 .. 1."""
    first, second = _colour(noise), _colour(noise)
    photo = first + (second - first) * _smooth(noise, height, width, 3, 1)
    photo += 0.25 * (_smooth(noise, height, width, 14, 1) - 0.5) + 0.1 * (_smooth(noise, height, width, 14, 3) - 0.5)
    for _ in range(noise.integers(4, 12)):
        angle = np.pi * noise.random()
        x, y, half = width * noise.random(), height * noise.random(), 10 + 0.15 * width * noise.random(2)
        window, x, y = Pose(x, y, half, np.cos(angle), np.sin(angle)).window(width, height)
        outline = (0, 0, 1, 1) if noise.random() < 0.5 else _box(-1, -1, 1, 1)
        inside = _inside([outline], x / half[0], y / half[1])
        photo[window][inside] += 0.7 * (_colour(noise) - photo[window][inside])
    return photo


def render_image(seed, name):
    """Draw an image of the toy set from an integer and its id: photo, uint8 [H, W, 3], and mask, uint8 [H, W]."""
    (width, height), objects = _scene(random.Random(f"{seed}/{name}"))
    noise = np.random.default_rng([seed, *name.encode()])
    photo = _backdrop(noise, width, height)
    mask, instances = np.zeros((2, height, width), np.uint8)
    for instance, (label, pose) in enumerate(objects, start=1):
        window, x, y = pose.window(width, height)
        inside = _inside(SILHOUETTES[CLASSES[label]], x / pose.half[0], y / pose.half[1])
        mask[window][inside], instances[window][inside] = label, instance

        x, y = x[inside], y[inside]
        period = 16 + 6 * noise.random()
        bumps = _smooth(noise, height, width, 20, 1)[window][inside][:, 0]
        blend = TEXTURES[CLASSES[label]](x / period, y / period, bumps)
        first, second = _two_colours(noise, label)
        light = 1 - 0.25 * y / pose.half[1]
        photo[window][inside] = (first + (second - first) * blend[:, None]) * light[:, None]
    mask[_border(instances)] = VOID
    photo += 0.03 * noise.standard_normal((height, width, 1), np.float32)
    return (np.clip(photo, 0, 1) * 255).astype(np.uint8), mask


def render(root, seed=2007):
    """Render the toy set into the folder ``root``, in VOC layout, completely or not at all."""

    def draw(name):
        photo, mask = render_image(seed, name)
        Image.fromarray(photo).save(folder / "JPEGImages" / f"{name}.jpg", quality=90)
        palette_image(mask).save(folder / "SegmentationClass" / f"{name}.png")

    names = [f"{index:06d}" for index in range(1, sum(SPLITS.values()) + 1)]
    with writing(root), atomic_folder(Path(root)) as folder:
        for inner in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (folder / inner).mkdir(parents=True)
        map_images(draw, names, "rendering")
        for split, count in SPLITS.items():
            ids, names = names[:count], names[count:]
            (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
