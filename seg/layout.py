"""The files of a folder in VOC layout: split lists, class names, masks, and the conversion of colour masks.

What a run reads is in data.py. docs/DATA.md describes the formats.
"""

import glob
import itertools
import os
import re
import shlex
import stat
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from seg import distributed, files, imaging
from util import VOID, UserError, background_label

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

LISTS = Path("ImageSets", "Segmentation")
MASK_SUFFIXES = (".png",)
SHOWN = 20  # of the faults of one kind
STRIP_PIXELS = 1 << 20  # of a mask in colours that are converted at a time

LABELLED = re.compile(r"(.*\S)\s+(-1|0|1)")  # a line of VOC's lists per class
SUFFIXES = "|".join(imaging.PHOTO_SUFFIXES).replace(".", r"\.")
FOLDER = "(?:/?(?:JPEGImages|SegmentationClass)/)?"
FILE_NAMES = re.compile(  # of a photo, or of a photo and its mask
    rf"{FOLDER}(.+?)({SUFFIXES})(?:[\s,]+{FOLDER}(.+)({SUFFIXES}))?", re.IGNORECASE
)
CONTROL = {chr(code) for code in (*range(32), *range(127, 160))}  # characters that no file name should have
COLOUR = re.compile(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\S.*)")


def refuse(message):
    """Raise a UserError: what is done with a fault, unless all faults are collected."""
    raise UserError(message)


def command(root, flags):
    """The command line that calls voc.py for a folder."""
    return f"python voc.py --data {shlex.quote(str(root))} {flags}"


def find_root(root):
    """Return ``root`` as a Path if it is a folder in VOC layout, else raise a UserError that says where data is."""
    root = Path(root)
    if os.path.isdir(root / LISTS):  # unlike Path.is_dir, without an error for a folder that cannot be read
        return root
    if os.path.isdir(root):
        files.walk(root, recursive=False)  # raises a UserError if it cannot be read
    for folder in (*sorted(root.glob("*")), *sorted(root.glob("*/*")), *root.parents):
        if os.path.isdir(folder / LISTS):
            raise UserError(f"{root} is not in VOC layout, but {folder} is: use --data {folder}")
    raise UserError(
        f"{root}: no data in VOC layout (JPEGImages, SegmentationClass, ImageSets/Segmentation): "
        "python download.py fetches VOC2007 (from archives on disk with --tar FILE --tar FILE), and "
        "python download.py --toy renders a toy set without network, for --data data/VOCdevkit/Toy"
    )


def list_images(folder, suffixes):
    """List the image files of ``folder`` and its subfolders: a dict from image ids to sorted lists of Paths.

    An id is a path below ``folder`` without its suffix, in composed Unicode (NFC). ``suffixes`` are in lower case,
    those of the files in any case. Hidden files are left out. A folder that does not exist has no images.
    """
    images = {}
    for path in files.walk(folder)[0] if os.access(folder, os.F_OK) else ():
        if path.suffix.lower() in suffixes:
            image_id = path.relative_to(folder).with_suffix("").as_posix()
            images.setdefault(unicodedata.normalize("NFC", image_id), []).append(path)
    return images


def single(paths):
    """The only one of the Paths with an id; UserError if there are several."""
    if len(paths) > 1:
        raise UserError(f"{paths[0]}: is not the only file with its id (also {paths[1].name}): keep one of them")
    return paths[0]


def check_exists(path, is_mask):
    """Raise a UserError if an image that a split lists is missing; it names the likely reason."""
    if os.path.exists(path):
        return
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder: put the {'masks' if is_mask else 'photos'} there")
    for other in sorted(path.parent.glob(f"{glob.escape(path.stem)}.*")):
        if other == path or other.stem != path.stem:
            continue
        if is_mask:
            raise UserError(f"{other}: is not a PNG, and JPEG changes the values of a mask: export the mask as PNG")
        if other.suffix.lower() in imaging.PHOTO_SUFFIXES:
            problem = "is hidden, or in a folder that two links lead to"
            raise UserError(f"{other}: {problem}: rename it, or write the other link's name in its id")
        raise UserError(f"{other}: is in a format that is not read here: convert it to JPEG or PNG")
    raise UserError(f"{path}: no such file, but a split lists it: add the file or remove its id")


def check_pair(photo_path, mask_path, photo, mask, classes):
    """Raise a UserError if an upright photo and its mask differ in size, or if the mask holds values without a class.

    ``photo`` is a PIL image, ``mask`` an integer array [H, W]. Without ``classes``, any value is right.
    """
    if classes and ((mask >= len(classes)) & (mask != VOID)).any():
        problem = f"has the value {mask[mask != VOID].max()} in the split, which has {len(classes)} classes"
        raise UserError(f"{mask_path}: {problem}: change it in the method mask of your voc.Split")
    mask_size = mask.shape[::-1]
    if photo.size == mask_size:
        return
    size, upright = ("{}x{}".format(*size) for size in (mask_size, photo.size))
    if imaging.open_image(photo_path).size == mask_size:
        problem = f"fits its photo only without the photo's EXIF orientation ({size}, but upright {upright})"
        advice = f"rotate the mask, or remove the orientation from {photo_path.name}"
        raise UserError(f"{mask_path}: {problem}: {advice}")
    raise UserError(f"{mask_path}: is {size}, but its photo is {upright}: a mask needs the size of its photo")


def write_cache(path, pixels):
    """Save an array in ``.cache``, with the permissions of the data's folder: others who share it share the cache."""
    folder = path.parent
    mode = stat.S_IMODE(folder.parent.stat().st_mode)
    if not folder.exists():
        folder.mkdir()
        folder.chmod(mode)
    with files.atomic_write(path) as file:
        np.save(file, pixels)
    path.chmod(mode & 0o666)


def _read_lines(path, hint):
    """The stripped lines of a text file, without empty ones at its end; UserError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}): save it as UTF-8") from None
    except OSError as error:
        advice = hint if isinstance(error, FileNotFoundError) else "make it a text file that you may read"
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): {advice}") from None
    if "\0" in text:  # UTF-16
        raise UserError(f"{path}: is not UTF-8 text (it holds zero bytes): save it as UTF-8")
    return [line.strip() for line in text.rstrip().splitlines()]


def read_ids(path, known, report=refuse):
    """Read a split list: the image ids, a list of str in NFC, and the number of lines that are left out.

    A line is an id; or the name of a photo, alone or followed by that of its mask; or an id followed by 1, 0 or -1, as
    in VOC's lists per class. Lines with -1, which means that the image does not show the class, are left out. A line
    that is one of the ``known`` ids as a whole is that id. ``report`` is called with the message of each fault; a file
    that cannot be read is a UserError.
    """
    hint = "write one image id per line into it"
    ids, num_left_out = [], 0
    for line in filter(None, _read_lines(path, hint)):
        image_id = PurePosixPath(unicodedata.normalize("NFC", line)).as_posix()  # ./a is a
        if image_id not in known:
            labelled = LABELLED.fullmatch(image_id)
            image_id = labelled[1] if labelled else image_id
            names = FILE_NAMES.fullmatch(image_id)
            image_id = names[1] if names else image_id
            if names and names[3] not in (None, names[1]):
                report(f"{path}: lists a photo and a mask of different names ({line!r}): rename one, and list their id")
                continue
            if labelled and labelled[2] == "-1":
                num_left_out += 1
                continue
        if not CONTROL.isdisjoint(image_id) or Path(image_id).is_absolute() or ".." in Path(image_id).parts:
            report(f"{path}: lists an invalid id ({line!r}): write the path of a photo below JPEGImages")
            continue
        ids.append(image_id)
    counts = Counter(ids)
    for image_id, count in counts.items():
        if count > 1:
            report(f"{path}: lists an id more than once ({image_id}, {count} times): keep one line")
    if not ids and num_left_out:
        report(f"{path}: the split is empty, as all its lines end with -1: {hint}")
    elif not ids:
        report(f"{path}: the split is empty: {hint}")
    return list(counts), num_left_out


def read_classes(path, report=refuse):
    """The class names in ``path``, a tuple of str, empty if their number is wrong; faults as in ``read_ids``."""
    names = _read_lines(path, "write one class name per line into it")
    if not 2 <= len(names) <= VOID:
        report(f"{path}: needs 2 to {VOID} different class names, one per line; it has {len(names)}")
    for index, name in enumerate(names[:VOID]):
        if not name:
            report(f"{path}: line {index + 1} is empty, but names the class of value {index}: fill or remove it")
        elif name.startswith("#"):
            report(f"{path}: line {index + 1} begins with #, but each line is the name of a class: remove it")
        elif name in names[:index]:
            report(f"{path}: line {index + 1} repeats a class name ({name}): name each class once")
    return tuple(names) if 2 <= len(names) <= VOID else ()


def read_mask(path, num_classes, root, colours):
    """Read a mask: uint8 array [H, W] of class indices below ``num_classes`` and VOID, at its own resolution.

    ``colours``, a dict from a palette's colour to the value and the mask in which it was seen first, is extended.

    Raises a UserError if the file is missing or unreadable, is neither a palette nor a greyscale image, holds other
    values, or has VOC's colours, or those of an earlier mask, at other values.
    """
    convert = f"{command(root, '--from-colours colours.txt')} converts colours to class indices"
    image = imaging.open_image(path)
    if image.format != "PNG":
        raise UserError(f"{path}: is {image.format}, not PNG, in spite of its name: export the mask as PNG")
    if image.mode.startswith(("I", "F")):
        advice = "save class indices as a palette or 8-bit greyscale PNG"
        raise UserError(f"{path}: is an image in mode {image.mode}, not a mask of class indices: {advice}")
    if image.mode not in ("P", "L", "1"):
        raise UserError(f"{path}: is an image in mode {image.mode}, not a mask of class indices: {convert}")
    mask = np.asarray(image).astype(np.uint8)
    if image.mode == "L":
        with open(path, "rb") as file:
            bits = file.read(25)[24]  # per pixel, from the header
        mask //= 255 // (2**bits - 1)  # Pillow has scaled 2 and 4 bits to 0..255
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    if image.mode == "P" and _has_vocs_colours_elsewhere(image, values, num_classes):
        raise UserError(f"{path}: has VOC's colours in another order, as an image editor saves them: {convert}")
    if image.mode == "P":
        palette = [tuple(colour) for colour in np.reshape(image.getpalette("RGB"), (-1, 3)).tolist()]
        for value, colour in enumerate(palette):
            if value not in values or palette.count(colour) > 1:  # a palette may be filled up with one colour
                continue
            first, other = colours.setdefault(colour, (value, path))
            if first != value:
                problem = f"its palette has the colour {colour} at {value}, but that of {other} at {first}"
                advice = f"if the colours are right, {convert}; if the values are, save the masks as greyscale"
                raise UserError(f"{path}: {problem}: {advice}")
    invalid = values[(values >= num_classes) & (values != VOID)]
    if invalid.size:
        known = f"a class (0 .. {num_classes - 1}) nor void ({VOID})"
        advice = f"correct the mask or {root / 'classes.txt'}; {convert}"
        raise UserError(f"{path}: holds the value {invalid[0]}, which is neither {known}: {advice}")
    return mask


def _has_vocs_colours_elsewhere(image, values, num_classes):
    """Whether all colours of a palette image are different ones of VOC's, and one besides black is at another index.

    Of VOC's colours, those of the classes and void count. Palettes of a user's own, also if grey or all black, pass.
    """
    index_of = {tuple(imaging.PALETTE[index].tolist()): index for index in (*range(num_classes), VOID)}
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    colours = [tuple(colour) for colour in palette[values[values < len(palette)]].tolist()]
    misplaced = [colour for value, colour in zip(values, colours) if index_of.get(colour) != value and any(colour)]
    return bool(misplaced) and len({*colours} & {*index_of}) == len(values)


def label_fault(split, counts, training):
    """Why a split cannot be trained on or scored, as a message, from the pixels of each class, [C]; None if it can."""
    if not counts.any():
        return f"{split.root}: no mask of the split {split.name} has a labelled pixel: all is void ({VOID})"
    present = np.flatnonzero(counts)
    if training and len(present) == 1 and (present[0] == 0 or background_label(split.classes) != 0):
        hint = "" if len(split) == len(split.all_ids) else ", or raise --limit"
        only = f"{split.classes[present[0]]} (value {present[0]})"
        problem = f"the masks of the split {split.name} show only {only} and void"
        advice = f"{VOID} is void, and an object needs the value of its class, such as 1: correct the masks{hint}"
        return f"{split.root}: {problem}: {advice}"
    return None


def warnings(splits, counts):
    """What is suspicious about a dataset, a list of messages.

    Args:
        splits: Splits, train and val first. counts: for each, the pixels of each class, [C].
    """
    texts = [f"{split.name}: left out {_count(split.num_left_out, 'line')} with -1 at the end" for split in splits]
    texts = [text for text, split in zip(texts, splits) if split.num_left_out]
    classes = splits[0].classes
    texts += named_like_void(classes)
    boxes = [name for name in classes if any(unicodedata.east_asian_width(letter) in "WF" for letter in name)]
    if boxes:
        texts.append(f"plots and legends show boxes in the names of {_shorten(boxes)}: their font lacks these letters")
    absent = [name for name, count in zip(classes, counts[0]) if not count]
    only_val = [name for name, *pixels in zip(classes, *counts[:2]) if not pixels[0] and pixels[1]]
    if absent:
        texts.append(f"train has no pixel of {len(absent)} of {len(classes)} classes: {_shorten(absent)}")
    if only_val:
        texts.append(f"val, but not train, has pixels of {_shorten(only_val)}: these cannot be learned")
    for split, pixels in zip(splits[1:], counts[1:]):
        present = [name for name, count in zip(classes, pixels) if count]
        if len(present) == 1:
            texts.append(f"{split.name} shows no class but {present[0]}: its scores say little")
    for first, second in itertools.combinations(splits, 2):
        shared = set(first.all_ids) & set(second.all_ids)
        if shared:
            texts.append(f"{len(shared)} of the {len(second.all_ids)} ids of {second.name} are in {first.name} too")
    return texts


def named_like_void(classes):
    """A warning, in a list, if the names of classes sound like void."""
    found = [name for name in classes if name.strip("_ ").lower() in ("void", "ignore", "unlabeled", "unlabelled")]
    advice = f"if these pixels are to be left out, give them the value {VOID} (in a file of colours, the name void)"
    return [f"trained and scored like any other class: {_shorten(found)}; {advice}"] if found else []


def _count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shorten(names, shown=20):
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def split_names(root):
    """The splits of a run: train, val and, if it has a list, test."""
    return ("train", "val", "test") if (root / LISTS / "test.txt").exists() else ("train", "val")


def map_images(function, items, name):
    """Call a function for each item, in up to 8 threads; return the results as a list, or raise the first error.

    ``name`` labels a progress bar.
    """
    with ThreadPoolExecutor(min(os.cpu_count(), 8)) as pool:  # a photo of 24 million pixels takes 300 MB
        disable = None if distributed.is_main() else True  # None shows it in a terminal only
        return list(tqdm(pool.map(function, items), name, len(items), unit=" images", disable=disable))


def report_faults(root, faults):
    """Print messages, each once and the first 20 of a kind; raise a UserError with their number if there are any."""
    faults = list(dict.fromkeys(faults))
    by_kind = {}
    for message in faults:
        by_kind.setdefault(_kind(root, message), []).append(message)
    for messages in by_kind.values():
        print(*messages[:SHOWN], sep="\n")
        if len(messages) > SHOWN:
            print(f"... and {len(messages) - SHOWN} more of this kind")
    if faults:
        raise UserError(f"{root}: {_count(len(faults), 'fault')}, listed above")


def _kind(root, message):
    """The folder of the file that a message names, and what is wrong, without details, names and numbers."""
    path, _, problem = message.removeprefix(f"{root}{os.sep}").partition(": ")
    return Path(path).parts[:1], re.sub(r"\d+", "N", re.split(r"[:(,]", problem)[0])


def _read_colours(path):
    """Read lines ``R G B name``: the class names, and the value of each colour, R * 65536 + G * 256 + B: int16 [2^24].

    A class's value is its position; the name ``void``, which may occur several times, stands for VOID; the value of a
    colour without a class is -1. Empty lines and those that begin with # are left out.
    """
    names, table = [], np.full(1 << 24, -1, np.int16)
    for number, line in enumerate(_read_lines(path, "write one line R G B name per class into it"), start=1):
        if not line or line.startswith("#"):
            continue
        found = COLOUR.fullmatch(line)
        if not found or max(map(int, found.groups()[:3])) > 255:
            raise UserError(f"{path}: line {number} is {line!r}: write R G B name, with R, G and B from 0 to 255")
        red, green, blue, name = *map(int, found.groups()[:3]), found[4]
        colour = red << 16 | green << 8 | blue
        if table[colour] >= 0 or name in names:
            raise UserError(f"{path}: line {number} repeats a colour or a name ({line}): write each once")
        is_void = name.lower() == "void"
        table[colour] = VOID if is_void else len(names)
        names += [] if is_void else [name]
    if not 2 <= len(names) <= VOID:
        raise UserError(f"{path}: needs 2 to {VOID} classes, one line R G B name for each; it has {len(names)}")
    return names, table


def _indices(path, table, colours_path):
    """A mask in colours as a uint8 array [H, W] of class indices and VOID; ``table`` is from ``_read_colours``.

    Works in strips of rows, in little more memory than the two images. Raises a UserError for a colour without a class,
    and for transparent pixels.
    """
    image = imaging.open_image(path)
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path}: is an image in mode {image.mode}: save its colours as an 8-bit RGB PNG")
    mask, unknown = np.empty((image.height, image.width), np.uint8), Counter()
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        red, green, blue, alpha = np.moveaxis(np.asarray(strip).astype(np.int32), -1, 0)
        if alpha.min() < 255:
            raise UserError(f"{path}: has transparent pixels: save it without transparency, in a colour for each class")
        colours = red << 16 | green << 8 | blue
        labels = table[colours]
        mask[top : top + rows] = labels
        unknown.update(dict(zip(*map(np.ndarray.tolist, np.unique(colours[labels < 0], return_counts=True)))))
    if unknown:
        colour, count = unknown.most_common(1)[0]
        name = f"{colour >> 16} {colour >> 8 & 255} {colour & 255}"
        others = f", and {len(unknown) - 1} other colours" if len(unknown) > 1 else ""
        advice = f"add it to {colours_path}, or correct the mask"
        if len(unknown) > SHOWN:
            advice = "smoothing (anti-aliasing) or JPEG has blended colours: export the masks without, as PNG"
        raise UserError(f"{path}: holds colours without a class ({name} in {count} pixels{others}): {advice}")
    return mask


def from_colours(root, colours_path):
    """Convert the masks of a folder in VOC layout from colours to class indices, all of them or none.

    ``SegmentationClass`` gets palette PNGs, and ``SegmentationClass_colours`` the originals. Writes ``classes.txt``.

    Args:
        root: the folder. colours_path: a text file with a line ``R G B name`` for each class, and one for void.

    Raises:
        UserError: a colour has no class, a file cannot be read or written, or something would be overwritten.
    """
    root = find_root(root)
    names, table = _read_colours(Path(colours_path))
    masks, originals, classes = root / "SegmentationClass", root / "SegmentationClass_colours", root / "classes.txt"
    if originals.exists():
        advice = f"to convert them again, delete {masks} and rename this folder to {masks.name}"
        raise UserError(f"{originals}: exists, so the masks have been converted: {advice}")
    if classes.exists() and read_classes(classes) != tuple(names):
        raise UserError(f"{classes}: names other classes than {colours_path}: correct one of them, or move it away")
    images = list_images(masks, imaging.PHOTO_SUFFIXES)
    if not images:
        raise UserError(f"{masks}: holds no image: put the masks in colours there")

    def convert(image_id):
        target = unfinished / f"{image_id}.png"
        try:
            mask = _indices(single(images[image_id]), table, colours_path)
        except UserError as error:
            return str(error)
        target.parent.mkdir(parents=True, exist_ok=True)
        imaging.palette_image(mask).save(target)
        return None

    with files.writing(masks), files.atomic_folder(masks) as unfinished:
        faults = map_images(convert, list(images), "converting")
        report_faults(root, filter(None, faults))
        with files.atomic_write(classes) as file:
            file.write("".join(f"{name}\n" for name in names).encode())
        masks.rename(originals)
    for text in named_like_void(names):
        print(f"warning: {text}")
    print(f"{masks}: {len(images)} masks of {len(names)} classes; the originals are in {originals}")
