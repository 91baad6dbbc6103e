"""The files of a folder in VOC layout, as in docs/DATA.md: lists, class names, masks, and masks in colours."""

import contextlib
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from seg import distributed, files, imaging, signals
from util import VOID, UserError, background_label

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

LISTS = Path("ImageSets", "Segmentation")
TILES = "tiles.json"  # what ``tiles.cut`` records in its folder
COLOUR = re.compile(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\S.*)")  # R G B name
CLASS_FILE = re.compile("class|label|name|categor|colou?r", re.IGNORECASE)  # in names of files
LABELMAP = re.compile(r"^([^:]+):(\d+),(\d+),(\d+)(:.*)?$")  # name:R,G,B:parts:actions, as CVAT writes it
SPLITTING = 'one image id per line (docs/DATA.md, "Split lists", has a program that splits at random)'


def command(root, *flags, script="voc.py"):
    """The command line that calls a script for a folder."""
    return files.command_line(["python", script, "--data", root, *flags])


def conversion(root):
    """The command line that converts masks in colours."""
    return command(root, "--from-colours", next(root.glob("labelmap.txt"), "colours.txt"))


def find_root(root):
    """Return ``root`` as a Path if it is a folder in VOC layout, else raise a UserError that says where data is.

    Raises a PermissionError for a folder that cannot be read: what is in it would seem to be missing.
    """
    root = Path(root)
    for folder in (LISTS, "JPEGImages", "SegmentationClass"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.scandir(root / folder).close()
    if (root / LISTS).is_dir():
        return root
    if (root / "SegmentationClass").is_dir():
        raise UserError(f"{root}: no data in VOC layout: write the lists in {LISTS.as_posix()}, {SPLITTING}")
    for folder in (*sorted(root.glob("*")), *sorted(root.glob("*/*")), *root.parents):
        if os.path.isdir(folder / LISTS):
            raise UserError(f"{root} is not in VOC layout, but {folder} is: use --data {folder}")
    problem = f"no data in VOC layout (JPEGImages, SegmentationClass, {LISTS.as_posix()})"
    raise UserError(
        f"{root}: {problem if root.exists() else 'no such folder'}: docs/DATA.md says how to bring your own data into "
        "this layout, python download.py fetches VOC2007 (from archives on disk with --tar FILE --tar FILE), and "
        "python download.py --toy renders a toy set without network, for --data data/VOCdevkit/Toy"
    )


def split_names(root):
    """The splits of a run: train, val and, if it has a list, test."""
    return ("train", "val", "test") if (root / LISTS / "test.txt").exists() else ("train", "val")


def tile_size(root):
    """The size [height, width] of the tiles in a folder that ``tiles.cut`` has written; None for others."""
    path = root / TILES
    return json.loads(path.read_text(encoding="utf-8"))["size"] if path.exists() else None


def list_images(folder, suffixes=imaging.PHOTO_SUFFIXES):
    """The image files in a folder and its subfolders: a dict from ids, paths without suffix, to Paths.

    Suffixes may be in any case, and hidden files are left out. Raises a UserError for two files with the same id.
    """
    images = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() in suffixes:
                other = images.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
                if other != path:
                    raise UserError(f"{path}: is not the only file with its id (also {other.name}): keep one of them")
    return images


def check_sizes(photo_path, mask_path, photo_size, mask_size):
    """Raise a UserError if an upright photo and its mask differ in size, both (width, height)."""
    if photo_size == mask_size:
        return
    size, upright = ("{}x{}".format(*size) for size in (mask_size, photo_size))
    if photo_path.exists() and imaging.open_image(photo_path).size == mask_size:
        problem = f"fits its photo only without the photo's EXIF orientation ({size}, but upright {upright})"
        raise UserError(f"{mask_path}: {problem}: rotate the mask, or remove the orientation from {photo_path.name}")
    raise UserError(f"{mask_path}: is {size}, but its photo is {upright}: a mask needs the size of its photo")


def _read_lines(path):
    """The stripped lines of a text file, without empty ones at its end; UserError if it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): correct the path, or save it as UTF-8 text") from None
    return [line.strip() for line in text.rstrip().split("\n")]


def read_ids(path):
    """Read a split list, an id or the name of a photo per line: the ids, a list of str. UserError if it has a fault."""
    if not path.exists():
        names = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt"))) or "none"
        raise UserError(f"{path}: no such split (there are: {names}): rename one, or write it, {SPLITTING}")
    ids = {}
    for line in filter(None, _read_lines(path)):
        photo = PurePosixPath(line)
        if photo.is_absolute() or ".." in photo.parts or min(line) < " ":
            raise UserError(f"{path}: lists an invalid id ({line!r}): write the path of a photo below JPEGImages")
        image_id = (photo.with_suffix("") if photo.suffix.lower() in imaging.PHOTO_SUFFIXES else photo).as_posix()
        if image_id in ids:
            raise UserError(f"{path}: lists an id more than once ({image_id}): keep one line")
        ids[image_id] = True
    if not ids:
        raise UserError(f"{path}: the split is empty: write one image id per line into it")
    return list(ids)


def read_classes(root):
    """The class names in ``classes.txt``, or VOC's 21 without it: a tuple of str. UserError if the file has a fault."""
    path = root / "classes.txt"
    if not path.exists():
        return CLASSES
    return _check_classes(path, dict(enumerate(_read_lines(path), 1)))


def _check_classes(path, names):
    """The class names in a file, a dict from lines to names, as a tuple of str. UserError if they have a fault."""
    classes = tuple(names.values())
    for index, (line, name) in enumerate(names.items()):
        if name in ("", "__ignore__", *classes[:index]) or re.match(r"#|\d+\s*[:,;]", name):
            problem = f"line {line} ({name!r}) is empty, a comment, numbered, void or a repetition"
            raise UserError(f"{path}: {problem}: name each class once, in the order of the values in the masks")
    if not 2 <= len(classes) <= VOID:
        raise UserError(f"{path}: needs 2 to {VOID} different class names, one per line; it has {len(classes)}")
    return classes


def read_mask(path, num_classes, root):
    """Read a mask: uint8 array [H, W] of class indices below ``num_classes`` and VOID, at its own resolution.

    Raises a UserError if the file is unreadable, is not a palette or greyscale PNG, or holds other values.
    """
    convert = f"{conversion(root)} converts colours to class indices"
    image = imaging.open_image(path)
    if image.format != "PNG":
        raise UserError(f"{path}: is {image.format}, not PNG, in spite of its name: export the mask as PNG")
    if image.mode not in ("P", "L", "1", "I;16"):
        problem = f"is an image in mode {image.mode}, not a mask of class indices (palette or greyscale)"
        raise UserError(f"{path}: {problem}: {convert}")
    mask = np.asarray(image, np.uint16 if image.mode == "I;16" else np.uint8)
    if image.mode == "L":  # undo that Pillow scales 2 and 4 bits to 0..255; the PNG's byte 24 is the number of bits
        mask = mask // (255 // (2 ** path.read_bytes()[24] - 1))
    values = np.unique(mask)
    if image.mode == "P" and _is_reordered(image, values, num_classes):
        raise UserError(f"{path}: has VOC's colours in another order, as image editors save them: {convert}")
    invalid = values[(values >= num_classes) & (values != VOID)]
    if invalid.size:
        known = f"a class (0 .. {num_classes - 1}) nor void ({VOID})"
        advice = f"correct the mask or {root / 'classes.txt'}; {convert}"
        raise UserError(f"{path}: holds the value {invalid[0]}, which is neither {known}: {advice}")
    return mask.astype(np.uint8)


def _is_reordered(image, values, num_classes):
    """Whether the ``values`` of a palette image have VOC's colours of the classes and void, but in another order."""
    palette = dict(enumerate(map(tuple, np.reshape(image.getpalette("RGB"), (-1, 3)).tolist())))
    vocs = {tuple(imaging.PALETTE[value].tolist()): value for value in (*range(num_classes), VOID)}
    colours = [(value, palette[value]) for value in values if any(palette.get(value, ()))]  # black is often a filling
    return all(colour in vocs for _, colour in colours) and any(vocs[colour] != value for value, colour in colours)


def class_counts(split):
    """Count the pixels of each class over all masks of a split, and the images that show it: two int64 arrays [C]."""

    def count(index):
        return np.bincount(split.mask(index).ravel(), minlength=VOID + 1)[: len(split.classes)]

    counts = np.stack(map_images(count, range(len(split)), f"counting {split.name}"))
    return counts.sum(0), (counts > 0).sum(0)


def check_labels(split, counts, training, size=None):
    """Raise a UserError if images cannot be trained on or scored. ``counts`` are the pixels of each class, [C].

    They are counted at ``size``, (H, W), or without it at the size of the masks.
    """
    present = np.flatnonzero(counts)
    is_uniform = training and len(present) == 1 and (present[0] == 0 or background_label(split.classes) != 0)
    if len(present) and not is_uniform:
        return
    full_counts = class_counts(split)[0] if size else counts
    if lost := [name for name, before, left in zip(split.classes, full_counts, counts) if before and not left]:
        problem = f"at {imaging.size_text(size)}, nothing is left of {', '.join(lost)} in the masks of {split.name}"
        raise UserError(f"{split.root}: {problem}: raise size in the script, or cut the photos into tiles")
    if not len(present):
        raise UserError(f"{split.root}: no mask of the split {split.name} has a labelled pixel: all is void ({VOID})")
    problem = f"the masks of {split.name} show only {split.classes[present[0]]} (value {present[0]}) and void"
    advice = f"{VOID} is void, and an object needs the value of its class, such as 1"
    advice += f": {conversion(split.root)} converts 0 and 255" if (split.root / LISTS).is_dir() else ""
    raise UserError(f"{split.root}: {problem}: {'raise --limit; ' if split.limit else ''}{advice}")


def print_warnings(splits, counts, size=None):
    """In the main process, print what is suspicious in splits, train first, and the pixels of their classes, [C] each.

    They are counted at ``size``, (H, W), or without it at the size of the masks.
    """
    texts, train = [], splits[0]
    at = f"at {imaging.size_text(size)}, " if size else ""
    if absent := [name for name, count in zip(train.classes, counts[0]) if not count]:
        if train.classes is CLASSES:
            text = f"{train.root} has no classes.txt: the class names are VOC's 21 ({', '.join(CLASSES[:4])}, ...)"
            if found := ", ".join(path.name for path in sorted(train.root.glob("*.*")) if CLASS_FILE.search(path.name)):
                text = f"warning: {text}; if {found} holds yours, copy it to classes.txt, or {conversion(train.root)}"
            texts.append(text)
        text = f"{at}{train.name} has no pixel of {len(absent)} of {len(counts[0])} classes: {', '.join(absent)}"
        text += "; if the masks have some, raise size in the script" if size and not train.limit else ""
        text += "" if counts[0][0] else "; if the masks' labels begin at 1, put background first in classes.txt"
        texts.append(f"warning: {text}")
    if size and (tiles := tile_size(train.root)) and tuple(tiles) != size:
        texts.append(f"warning: {at}tiles of {imaging.size_text(tiles)} are resized: set size in the script to theirs")
    for split, pixels in zip(splits[1:], counts[1:]):
        present = [name for name, count in zip(split.classes, pixels) if count]
        if len(present) == 1:
            texts.append(f"warning: {at}{split.name} shows no class but {present[0]}: its scores say little")
    for first, second in itertools.combinations(splits, 2):
        if shared := {*first.ids} & {*second.ids}:
            texts.append(f"warning: {len(shared)} of the {len(second)} ids of {second.name} are in {first.name} too")
    if texts and distributed.is_main():
        print(*texts, sep="\n", flush=True)


def map_images(function, items, name, faults=None):
    """Call a function for each item, in up to 8 threads, with a progress bar of this name: a list of the results.

    With ``faults``, see ``attempt``, it goes on after a UserError.
    """

    def call(item):
        signals.check()  # here, as a pool starts all calls before it ends
        return function(item) if faults is None else attempt(faults, function, item)

    with ThreadPoolExecutor(min(os.cpu_count(), 8)) as pool:  # a photo of 24 million pixels takes 300 MB
        hidden = None if distributed.is_main() else True  # None shows it in a terminal only
        return list(tqdm(pool.map(call, items), name, len(items), unit=" images", disable=hidden))


def attempt(faults, function, *args):
    """Call a function and return its result, or None for a UserError, whose message is added to ``faults``."""
    try:
        return function(*args)
    except UserError as error:
        faults.append(str(error))


def report_faults(root, faults):
    """Print messages, each once, and raise a UserError with their number if there are any."""
    if faults := sorted({*faults}):
        print(*faults, sep="\n")
        raise UserError(f"{root}: {len(faults)} fault{'s' if len(faults) > 1 else ''}, listed above")


def _read_colours(path):
    """Read lines ``R G B name`` or those of a ``labelmap.txt``, void included.

    Returns the class names, and a dict from R * 65536 + G * 256 + B to values.
    """
    names, values = {}, {}
    lines = {number: line for number, line in enumerate(_read_lines(path), 1) if line and not line.startswith("#")}
    for number, line in lines.items():
        found = COLOUR.fullmatch(LABELMAP.sub(r"\2 \3 \4 \1", line))
        if not found or max(map(int, found.groups()[:3])) > 255:
            raise UserError(f"{path}: holds the line {line!r}: write R G B name, with R, G and B from 0 to 255")
        red, green, blue, name = *map(int, found.groups()[:3]), found[4]
        colour = red << 16 | green << 8 | blue
        if colour in values:
            raise UserError(f"{path}: repeats a colour ({line}): write each once")
        is_void = name.lower() == "void"
        values[colour] = VOID if is_void else len(names)
        names |= {} if is_void else {number: name}
    return _check_classes(path, names), values


def _read_coloured_mask(path, values, colours_path):
    """A mask in colours as a uint8 array [H, W] of class indices and VOID; ``values`` is from ``_read_colours``."""
    image = imaging.open_image(path)
    if image.mode.startswith("I"):
        raise UserError(f"{path}: has more than 8 bits per pixel: save it with 8 bits, class indices as they are")
    red, green, blue = np.moveaxis(np.asarray(imaging.to_rgb(image), np.int32), 2, 0)
    packed = red << 16 | green << 8 | blue
    colours, inverse = np.unique(packed.ravel(), return_inverse=True)
    unknown = [f"{colour >> 16} {colour >> 8 & 255} {colour & 255}" for colour in colours if colour not in values]
    if unknown:
        advice = f"add them to {colours_path}, or export the mask as PNG without smoothing (anti-aliasing)"
        raise UserError(f"{path}: has colours without a class ({unknown[0]}; {len(unknown)} in all): {advice}")
    return np.array([values[colour] for colour in colours], np.uint8)[inverse].reshape(packed.shape)


def from_colours(root, colours_path):
    """Convert the masks of a folder in VOC layout from colours to class indices, all of them or none.

    ``SegmentationClass`` gets palette PNGs, and ``SegmentationClass_colours`` the originals. Writes ``classes.txt``.
    The file ``colours_path`` has a line ``R G B name`` for each class, and for void, or it is a ``labelmap.txt`` of
    CVAT. Raises a UserError if it fails.
    """
    root = find_root(root)
    names, values = _read_colours(Path(colours_path))
    masks, originals, classes = root / "SegmentationClass", root / "SegmentationClass_colours", root / "classes.txt"
    images, faults = list_images(masks), []
    if not images:
        raise UserError(f"{masks}: holds no image: put the masks in colours there")
    if originals.exists():
        advice = f"to convert them again, delete {masks} and rename this folder to {masks.name}"
        raise UserError(f"{originals}: exists, so the masks have been converted: {advice}")
    if classes.exists() and read_classes(root) != names:
        raise UserError(f"{classes}: names other classes than {colours_path}: correct one of them, or move it away")

    def convert(image_id):
        mask, target = _read_coloured_mask(images[image_id], values, colours_path), unfinished / f"{image_id}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        imaging.palette_image(mask).save(target)

    with files.writing(masks), files.atomic_folder(masks) as unfinished:
        map_images(convert, list(images), "converting", faults)
        report_faults(root, faults)
        files.write(classes, "".join(f"{name}\n" for name in names).encode())
        masks.rename(originals)
    print(f"{masks}: {len(images)} masks of {len(names)} classes; the originals are in {originals}")
