"""Segment photos with a trained model.

    python predict.py best_train_5_b.pt photo.jpg folder/ --out predictions

Writes for each photo NAME_mask.png, a palette PNG of the photo's size whose values are the class indices, and
NAME_overlay.png, the classes drawn over the photo. NAME is the photo's name without suffix; photos of the same name
get their folder's in front. legend.png names the overlays' colours, and predictions.csv holds each photo's share of
each class: both describe the latest call only, and are also written after Ctrl-C.
"""

import argparse
import csv
import functools
import io
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from seg import checkpoint, cli, files, imaging, inference, report
from util import UserError, background_label

RESULTS = ("_mask.png", "_overlay.png")
LEGEND, SHARES = "legend.png", "predictions.csv"
MAX_NAME = 220  # bytes of a photo's name in those of its results: with what is appended, file systems allow 255
STRIP_ROWS = 256  # rows of an overlay that are drawn at a time


@functools.cache
def photo_suffixes():
    """The suffixes, in lower case, of the formats that Pillow decodes: a set of str."""
    not_decoded = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow only recognises these
    formats = Image.registered_extensions().items()
    return {suffix for suffix, name in formats if name in Image.OPEN and name not in not_decoded}


def find_photos(paths, out, recursive=False):
    """Find the photos among files and folders.

    A file is taken whatever its suffix, unless ``is_result``; of a folder, all files in a format that Pillow decodes
    that are neither hidden nor results, with ``recursive`` also those of its subfolders that are not hidden.

    Returns:
        List of Paths, each file once, in the order of ``paths`` and sorted by name within a folder; and the list of
        the files and subfolders that were skipped.

    Raises a UserError if a path does not exist or holds no photo, or if a folder cannot be read.
    """
    photos, skipped = {}, {}
    for path in map(Path, paths):
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder: correct the path")
        found, others = files.walk(path, recursive) if os.path.isdir(path) else ([path], [])
        candidates = {file for file in found if file == path or _looks_like_photo(file)}
        stems = {file.with_suffix("") for file in candidates}
        candidates -= {file for file in candidates if is_result(file, out, stems)}
        others += [file for file in found if file not in candidates]
        if not candidates:
            advice = "correct the path" if recursive else "correct the path, or pass --recursive for subfolders"
            raise UserError(f"{path}: holds no photo ({len(others)} files or folders skipped): {advice}")
        photos |= {os.path.abspath(file): file for file in found if file in candidates}
        skipped |= {os.path.abspath(file): file for file in others}
    return list(photos.values()), list(skipped.values())


def _looks_like_photo(path):
    """Whether a file has a photo's suffix; also a link to a file that is missing, so that it gets reported."""
    return path.suffix.lower() in photo_suffixes() and (path.is_file() or path.is_symlink())


def is_result(path, out, stems):
    """Whether a file is named like a mask, an overlay or a legend and lies where one is expected.

    That is in ``out`` or beside a predictions.csv, or, for ``x_mask.png`` and ``x_overlay.png``, beside a photo
    ``x``; ``stems`` are the Paths of the photos without their suffixes.
    """
    is_image = path.name.endswith(RESULTS)
    if is_image and path.parent / path.name.rpartition("_")[0] in stems:
        return True
    if not is_image and path.name != LEGEND:
        return False
    return os.path.realpath(path.parent) == os.path.realpath(out) or os.path.exists(path.parent / SHARES)


def output_names(photos):
    """A different name for the results of each photo, whatever their order and the case of letters: list of str.

    It is the photo's name without suffix. Photos that would share one get as much of their path as it takes: first
    their folder, then their suffix, then the folders above. Raises a UserError if that does not suffice, or if a name
    is too long.
    """
    candidates = []
    for photo in photos:
        folders = Path(os.path.abspath(photo)).parent.parts[1:]
        longer = ["_".join((*folders[-count:], photo.name)) for count in range(1, len(folders) + 1)]
        candidates.append([photo.stem, "_".join((*folders[-1:], photo.stem)), *longer])
    while True:
        keys = [unicodedata.normalize("NFC", names[0]).casefold() for names in candidates]  # equal on some disks
        counts = Counter(keys)
        shared = [counts[key] > 1 for key in keys]
        if not any(shared):
            break
        for photo, names, is_shared in zip(photos, candidates, shared):
            if is_shared and len(names) == 1:
                raise UserError(f"{photo}: another photo has nearly the same path: rename one of them")
            if is_shared:
                del names[0]
    for photo, names in zip(photos, candidates):
        if len(os.fsencode(names[0])) > MAX_NAME:
            raise UserError(f"{photo}: is too long a name for its results (over {MAX_NAME} bytes): rename it")
    return [names[0] for names in candidates]


def check_new(paths, overwrite):
    """Raise a UserError that names the first of ``paths`` that exists, unless ``overwrite``."""
    existing = [path for path in paths if os.path.exists(path)]
    if existing and not overwrite:
        problem = "exists already" + (f" (and {len(existing) - 1} more)" if len(existing) > 1 else "")
        raise UserError(f"{existing[0]}: {problem}: replace with --overwrite, or choose another place")


def parse_size(text):
    """An argparse type: the size of the network's input as (height, width), from N for a square or WIDTHxHEIGHT."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    width, height = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if any(side % 32 or not 0 < side <= imaging.MAX_SIDE for side in (width, height)):
        problem = f"{text!r} is neither N nor WIDTHxHEIGHT in multiples of 32 up to {imaging.MAX_SIDE}"
        raise argparse.ArgumentTypeError(problem)
    return height, width


@torch.inference_mode()
def segment(model, photo, device="cpu"):
    """Predict the classes of a photo, a PIL image in RGB, with a model from ``checkpoint.load`` on ``device``.

    Returns:
        uint8 array [H, W] of class indices, of the photo's size.
    """
    image = torch.tensor(imaging.resize(photo, model.size)).permute(2, 0, 1)[None]
    images = imaging.normalise(image, device, model.mean, model.std)
    logits = inference.forward(model, images, full_precision=True)["out"][0]
    return inference.predict_mask(logits, (photo.height, photo.width)).cpu().numpy()


def overlay(photo, mask, classes):
    """Draw the classes over a photo: half its colours, with a contour around each class; background stays as it is.

    Args:
        photo: PIL image in RGB. mask: uint8 array [H, W] of class indices, of the photo's size. classes: their names.

    Returns:
        PIL image in RGB of the photo's size. It is drawn in strips of rows, in little more memory than that.
    """
    is_object = np.arange(len(classes)) != background_label(classes)
    contours = find_contours(mask, 1 + max(mask.shape) // 2000)
    result = np.array(photo)
    for top in range(0, len(mask), STRIP_ROWS):
        rows = slice(top, top + STRIP_ROWS)
        colours = imaging.distinct_colours()[mask[rows]]
        blend = np.where(contours[rows, :, None], colours, result[rows] // 2 + colours // 2)
        np.copyto(result[rows], blend, where=is_object[mask[rows]][..., None])
    return Image.fromarray(result)


def find_contours(mask, distance):
    """Where a pixel of another class is exactly ``distance`` pixels above, below, left or right: bool [H, W]."""
    contours = np.zeros(mask.shape, bool)
    for labels, found in ((mask, contours), (mask.T, contours.T)):
        differs = labels[distance:] != labels[:-distance]
        found[distance:] |= differs
        found[:-distance] |= differs
    return contours


def draw_legend(classes, labels):
    """The overlays' colours of some classes, each with its name, as a PIL image; ``labels`` are their indices."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 16)
    step = 26
    width = max(round(font.getlength(classes[label])) for label in labels) + 60
    image = Image.new("RGB", (width, step * len(labels) + 10), "white")
    draw = ImageDraw.Draw(image)
    for row, label in enumerate(labels):
        top = 6 + step * row
        fill = "white" if label == background_label(classes) else tuple(imaging.distinct_colours()[label].tolist())
        draw.rectangle((8, top, 40, top + 20), fill, "black")
        draw.text((50, top), classes[label], "black", font)
    return image


def write_shares(path, classes, rows):
    """Write ``rows``, (photo, name of its mask, share of each class), as a CSV."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["photo", "mask", *classes])
    writer.writerows([photo, mask, *(f"{share:.6f}" for share in shares)] for photo, mask, shares in rows)
    with files.atomic_write(path) as file:
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))  # a name may hold bytes that are not UTF-8


def write_image(path, image, **options):
    """Write a PIL image as a PNG."""
    with files.atomic_write(path) as file:
        image.save(file, format="png", **options)


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoint", help="a best_*.pt")
    parser.add_argument("photos", nargs="+", metavar="photo", help="photos, or folders of photos")
    parser.add_argument("--out", type=Path, default="predictions", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", type=cli.parse_device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    text = "resize photos to N x N pixels instead of the training's size; a little more can gain mean IoU: try on val"
    parser.add_argument("--size", type=parse_size, metavar="N|WxH", help=text)
    parser.add_argument("--recursive", action="store_true", help="take the photos in subfolders too")
    parser.add_argument("--masks-only", action="store_true", help="write no overlays")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results of the photos")
    args = parser.parse_args()

    if Path(args.checkpoint).suffix.lower() in photo_suffixes() or os.path.isdir(args.checkpoint):
        raise UserError(f"{args.checkpoint}: is not a checkpoint: pass the best_*.pt first, then photos and folders")
    photos, skipped = find_photos(args.photos, args.out, args.recursive)
    outputs = [[args.out / f"{name}{suffix}" for suffix in RESULTS] for name in output_names(photos)]
    check_new([path for paths in outputs for path in paths], args.overwrite)
    model = checkpoint.load(args.checkpoint, args.device)
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"{args.checkpoint}: holds weights that are not finite: train it again")
    model.size = args.size or model.size
    with files.writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    if skipped:
        names = ", ".join(path.name for path in skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        has_subfolders = not args.recursive and any(path.is_dir() for path in skipped)
        advice = "; --recursive takes subfolders" if has_subfolders else ""
        report.log(f"skipped {len(skipped)}: hidden, not photos, or earlier results ({names}){advice}")
    report.log(f"masks are computed at {report.size_text(model.size)} and upsampled to each photo's size")

    rows, errors = [], []
    write_shares(args.out / SHARES, model.classes, rows)  # now, in case it cannot be written
    try:
        for path, paths in zip(report.progress(photos, len(photos), "predicting", "photo"), outputs):
            for earlier in paths:
                with files.writing(earlier):
                    earlier.unlink(missing_ok=True)
            try:
                photo = imaging.open_photo(path)
            except UserError as error:
                errors.append(str(error))
                continue
            mask = segment(model, photo, args.device)
            write_image(paths[0], imaging.palette_image(mask))
            if not args.masks_only:
                write_image(paths[1], overlay(photo, mask, model.classes), compress_level=1)
            shares = np.bincount(mask.ravel(), minlength=len(model.classes)) / mask.size
            rows.append((path, paths[0].name, shares))
            by_share = [f"{model.classes[label]} {shares[label]:.1%}" for label in np.argsort(-shares) if shares[label]]
            report.log(f"{path}: {', '.join(by_share)}")
    finally:  # also after Ctrl-C or an error
        write_shares(args.out / SHARES, model.classes, rows)
        if rows and not args.masks_only:
            predicted = np.flatnonzero(sum(shares for _, _, shares in rows))
            write_image(args.out / LEGEND, draw_legend(model.classes, predicted.tolist()))
        what = "masks" if args.masks_only else "masks and overlays"
        done = f"{what} of {len(rows)} of {len(photos)} photos are in {args.out}"
        report.log(f"{done}, the share of each class in {args.out / SHARES}")
    if errors:
        raise UserError("\nerror: ".join(errors))


if __name__ == "__main__":
    cli.run(main)
