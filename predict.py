"""Segment photos with a trained model.

    python predict.py best_train_5_b.pt photo.jpg folder/ --out predictions

Writes for each photo NAME_mask.png, a palette PNG of the photo's size whose values are the class indices, and
NAME_overlay.png, the classes drawn over the photo. NAME is the photo's name without suffix; photos of the same name
get their folder's in front. legend.png names the overlays' colours. predictions.csv holds each photo's share of each
class: a later call adds its photos, and replaces the rows of those that are predicted again.
"""

import argparse
import csv
import io
import re
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from seg import checkpoint, cli, files, imaging, inference, report
from util import UserError, background_label

MAX_PIXELS = 2 * imaging.MAX_PIXELS  # Pillow refuses larger images itself


def find_photos(paths, out, recursive=False):
    """Find the photos among files and folders.

    A file is taken whatever its suffix. Of a folder, these are the files with a photo's suffix that are neither hidden
    nor below ``out``, with ``recursive`` also those in its subfolders.

    Returns a list of Paths, each file once. Raises a UserError if a path does not exist or holds no photo.
    """
    photos = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder: correct the path")
        found = [path] if path.is_file() else sorted(path.rglob("*") if recursive else path.iterdir())
        if path.is_dir():
            found = [file for file in found if _is_photo(file, path) and out.resolve() not in file.resolve().parents]
            if not found:
                advice = "correct the path" if recursive else "correct the path, or pass --recursive for subfolders"
                raise UserError(f"{path}: holds no photo, apart from what lies in {out}: {advice}")
        photos |= {file.resolve(): file for file in found}
    return list(photos.values())


def _is_photo(file, folder):
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in imaging.PHOTO_SUFFIXES and not is_hidden and not file.is_dir()


def output_names(photos):
    """A name for the results of each photo, a list of str: without suffix, and after its folder's if several share it.

    Raises a UserError if that does not suffice.
    """
    counts = Counter(photo.stem.lower() for photo in photos)  # some disks ignore the case of letters
    names = {}
    for photo in photos:
        name = photo.stem if counts[photo.stem.lower()] == 1 else f"{photo.parent.resolve().name}_{photo.stem}"
        if name.lower() in map(str.lower, names):
            raise UserError(
                f"{photo}: another photo has the same name, in a folder of the same name: rename one of them"
            )
        names[name] = photo
    return list(names)


def check_new(paths, overwrite, problem="exists already"):
    """Raise a UserError that names the first of ``paths`` that exists, unless ``overwrite``."""
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        problem += f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
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
        PIL image in RGB of the photo's size.
    """
    photo, colours = np.asarray(photo), imaging.distinct_colours()[mask]
    result = photo // 2 + colours // 2
    np.copyto(result, colours, where=find_contours(mask, 1 + max(mask.shape) // 2000)[..., None])
    np.copyto(result, photo, where=(mask == background_label(classes))[..., None])
    return Image.fromarray(result)


def find_contours(mask, distance):
    """Where a pixel of another class is exactly ``distance`` pixels above, below, left or right: bool [H, W]."""
    contours = np.zeros(mask.shape, bool)
    for labels, found in ((mask, contours), (mask.T, contours.T)):
        differs = labels[distance:] != labels[:-distance]
        found[distance:] |= differs
        found[:-distance] |= differs
    return contours


def draw_legend(classes):
    """The overlays' colours of all classes, each with its name: PIL image in RGB."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 16)
    width = max(round(font.getlength(name)) for name in classes) + 60
    image = Image.new("RGB", (width, 26 * len(classes) + 10), "white")
    draw = ImageDraw.Draw(image)
    for label, name in enumerate(classes):
        top = 6 + 26 * label
        fill = "white" if label == background_label(classes) else tuple(imaging.distinct_colours()[label].tolist())
        draw.rectangle((8, top, 40, top + 20), fill, "black")
        draw.text((50, top), name, "black", font)
    return image


def write_image(path, image, **options):
    """Write a PIL image as a PNG."""
    with files.atomic_write(path) as file:
        image.save(file, format="png", **options)


def write_legend(path, classes, overwrite):
    """Write ``draw_legend``; UserError if another file has that name, unless ``overwrite``."""
    legend = io.BytesIO()
    draw_legend(classes).save(legend, format="png")
    if path.exists() and path.read_bytes() != legend.getvalue():
        check_new([path], overwrite, "is not the legend of this model's classes")
    with files.atomic_write(path) as file:
        file.write(legend.getvalue())


def read_shares(path, header, overwrite):
    """The rows of an earlier call by photo: dict of str to list of str; UserError if ``path`` has other columns than
    ``header``, unless ``overwrite``."""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    if rows[:1] == [header]:
        return {row[0]: row for row in rows[1:]}
    check_new([path], overwrite, "is not a table of this model's classes")
    return {}


def write_shares(path, header, rows):
    """Write what ``read_shares`` returns."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows.values()])
    with files.atomic_write(path) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))  # a name may hold bytes that are not UTF-8


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

    photos = find_photos(args.photos, args.out, args.recursive)
    names = output_names(photos)
    outputs = [[args.out / f"{name}_{kind}.png" for kind in ("mask", "overlay")] for name in names]
    check_new([path for paths in outputs for path in paths], args.overwrite)
    model = checkpoint.load(args.checkpoint, args.device)
    model.size = args.size or model.size
    table, header = args.out / "predictions.csv", ["photo", "mask", *model.classes]
    rows, errors = read_shares(table, header, args.overwrite), []
    with files.writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    if not args.masks_only:
        write_legend(args.out / "legend.png", model.classes, args.overwrite)
    write_shares(table, header, rows)  # now, in case it cannot be written
    report.log(f"masks are computed at {report.size_text(model.size)} and upsampled to each photo's size")
    done = 0
    try:
        for path, (mask_path, overlay_path) in zip(
            report.progress(photos, len(photos), "predicting", "photo"), outputs
        ):
            try:
                photo = imaging.open_photo(path, MAX_PIXELS)
            except UserError as error:
                errors.append(str(error))
                continue
            mask = segment(model, photo, args.device)
            overlay_path.unlink(missing_ok=True)  # of an earlier mask
            write_image(mask_path, imaging.palette_image(mask))
            if not args.masks_only:
                write_image(overlay_path, overlay(photo, mask, model.classes), compress_level=1)
            shares = np.bincount(mask.ravel(), minlength=len(model.classes)) / mask.size
            rows[str(path)] = [str(path), mask_path.name, *(f"{share:.6f}" for share in shares)]
            done += 1
            by_share = [f"{model.classes[label]} {shares[label]:.1%}" for label in np.argsort(-shares) if shares[label]]
            report.log(f"{path}: {', '.join(by_share)}")
    finally:  # also after Ctrl-C or an error
        write_shares(table, header, rows)
        report.log(f"{done} of {len(photos)} photos are segmented: results in {args.out}, class shares in {table}")
    if errors:
        raise UserError("\nerror: ".join(errors))


if __name__ == "__main__":
    cli.run(main)
