"""Segment photos with a trained model.

    python predict.py best_train_5_b.pt photo.jpg folder/ --out predictions

Writes for each photo NAME_mask.png, a palette PNG of the photo's size whose values are the class indices, and
NAME_overlay.png, the classes drawn over the photo; legend.png names the overlays' colours, and predictions.csv holds
each photo's share of each class. NAME is the photo's name without suffix; photos of the same name get their folder's
in front.
"""

import csv
import functools
import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import checkpoint
import cli
import engine
import files
import imaging
import reporting
from util import UserError

MAX_PIXELS = 2 * imaging.MAX_PIXELS  # Pillow refuses larger images itself
RESULTS = ("_mask.png", "_overlay.png")
LEGEND, SHARES = "legend.png", "predictions.csv"
STRIP_ROWS = 256  # rows of an overlay that are drawn at a time


@functools.cache
def photo_suffixes():
    """The suffixes, in lower case, of the formats that Pillow decodes: a set of str."""
    not_decoded = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow only recognises these
    formats = Image.registered_extensions().items()
    return {suffix for suffix, name in formats if name in Image.OPEN and name not in not_decoded}


def find_photos(paths, out, recursive=False):
    """Find the photos among files and folders.

    A file is taken whatever its suffix, unless it is a mask, an overlay or the legend of an earlier prediction into
    ``out``; of a folder, all files in a format that Pillow decodes and that are not hidden, with ``recursive`` also
    those of its subfolders that are not hidden.

    Returns:
        List of Paths, each file once, in the order of ``paths`` and sorted by name within a folder; and the list of
        the files and subfolders that were skipped.

    Raises a UserError if a path does not exist or holds no photo.
    """
    photos, skipped = {}, {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder: correct the path")
        found, others = _walk(path, recursive) if path.is_dir() else ([path], [])
        results = [file for file in found if file.name.endswith(RESULTS) or _is_same(file, out / LEGEND)]
        found = [file for file in found if file not in results]
        if not found:
            advice = "correct the path" if recursive else "correct the path, or pass --recursive for subfolders"
            raise UserError(f"{path}: holds no photo ({len(results + others)} files or folders skipped): {advice}")
        photos |= {os.path.abspath(file): file for file in found}
        skipped |= {os.path.abspath(file): file for file in results + others}
    return list(photos.values()), list(skipped.values())


def _walk(folder, recursive):
    """The photos below a folder, and what else is in it, both sorted by name."""
    photos, others = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            others.append(path)
        elif path.is_dir() and recursive:
            below = _walk(path, recursive)
            photos += below[0]
            others += below[1]
        else:
            is_photo = path.is_file() and path.suffix.lower() in photo_suffixes()
            (photos if is_photo else others).append(path)
    return photos, others


def _is_same(path, other):
    return os.path.abspath(path) == os.path.abspath(other)


def output_names(photos):
    """A different name for the results of each photo, whatever their order and the case of letters: list of str.

    It is the photo's name without suffix. Photos that would share one get as much of their path as it takes: first
    their folder, then their suffix, then the folders above. Raises a UserError if that does not suffice.
    """
    candidates = []
    for photo in photos:
        folders = Path(os.path.abspath(photo)).parent.parts[1:]
        longer = ["_".join((*folders[-count:], photo.name)) for count in range(1, len(folders) + 1)]
        candidates.append([photo.stem, "_".join((*folders[-1:], photo.stem)), *longer])
    while True:
        counts = Counter(names[0].casefold() for names in candidates)
        shared = [counts[names[0].casefold()] > 1 for names in candidates]
        if not any(shared):
            return [names[0] for names in candidates]
        for photo, names, is_shared in zip(photos, candidates, shared):
            if is_shared and len(names) == 1:
                raise UserError(f"{photo}: another photo has nearly the same path: rename one of them")
            if is_shared:
                del names[0]


def check_new(paths, overwrite, what="prediction"):
    """Raise a UserError that names the first of ``paths``, files of a ``what``, that exists, unless ``overwrite``."""
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        count = f"{len(existing)} results are" if len(existing) > 1 else "is"
        problem = f"{count} from an earlier {what}"
        raise UserError(f"{existing[0]}: {problem}: replace with --overwrite, or choose another place")


@torch.inference_mode()
def segment(model, photo, device="cpu"):
    """Predict the classes of a photo, a PIL image in RGB, with a model from ``checkpoint.load`` on ``device``.

    Returns:
        uint8 array [H, W] of class indices, of the photo's size.
    """
    image = torch.tensor(imaging.resize(photo, model.size)).permute(2, 0, 1)[None]
    images = imaging.normalise(image, device, model.mean, model.std)
    logits = engine.forward(model, images, full_precision=True)["out"][0]
    return engine.predict_mask(logits, (photo.height, photo.width)).cpu().numpy()


@functools.cache
def overlay_palette():
    """Colours of classes in an overlay: uint8 [255, 3], RGB, the same in every run.

    VOC's palette gives neighbours such as classes 1 and 8 dark reds. Here each colour is, of 4,096, the one that is
    farthest from all before in the Oklab colour space (Björn Ottosson, 2020), without greys and extremes of lightness.
    """
    levels = np.linspace(0, 255, 16)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    linear = np.where(colours > 10.3, ((colours / 255 + 0.055) / 1.055) ** 2.4, colours / 255 / 12.92)
    to_lms = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    lab = np.cbrt(linear @ np.transpose(to_lms)) @ np.transpose(to_lab)
    suitable = (lab[:, 0] > 0.35) & (lab[:, 0] < 0.95) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.06)
    colours, lab = colours[suitable], lab[suitable]
    chosen = [int(np.argmax(lab[:, 1]))]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < 255:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return colours[chosen].astype(np.uint8)


def overlay(photo, mask, classes):
    """Draw the classes over a photo: half its colours, with a contour around each class; background stays as it is.

    Args:
        photo: PIL image in RGB. mask: uint8 array [H, W] of class indices, of the photo's size. classes: their names.

    Returns:
        PIL image in RGB of the photo's size. It is drawn in strips of rows, in little more memory than that.
    """
    is_object = np.array([name != "background" for name in classes])
    contours = find_contours(mask, 1 + max(mask.shape) // 2000)
    result = np.array(photo)
    for top in range(0, len(mask), STRIP_ROWS):
        rows = slice(top, top + STRIP_ROWS)
        colours = overlay_palette()[mask[rows]]
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
    font, step = ImageFont.load_default(16), 26
    width = max(round(font.getlength(classes[label])) for label in labels) + 60
    image = Image.new("RGB", (width, step * len(labels) + 10), "white")
    draw = ImageDraw.Draw(image)
    for row, label in enumerate(labels):
        top = 6 + step * row
        fill = "white" if classes[label] == "background" else tuple(overlay_palette()[label].tolist())
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
        file.write(text.getvalue().encode())


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
    parser.add_argument("--recursive", action="store_true", help="take the photos in subfolders too")
    parser.add_argument("--masks-only", action="store_true", help="write no overlays")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier prediction")
    args = parser.parse_args()

    if Path(args.checkpoint).suffix.lower() in photo_suffixes():
        raise UserError(f"{args.checkpoint}: is a photo, not a checkpoint: pass the best_*.pt first, then the photos")
    photos, skipped = find_photos(args.photos, args.out, args.recursive)
    suffixes = RESULTS[:1] if args.masks_only else RESULTS
    outputs = [[args.out / f"{name}{suffix}" for suffix in suffixes] for name in output_names(photos)]
    legend, shares_file = args.out / LEGEND, args.out / SHARES
    shared = [shares_file] if args.masks_only else [legend, shares_file]
    check_new([*sum(outputs, []), *shared], args.overwrite)
    model = checkpoint.load(args.checkpoint, args.device)
    with files.writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    if skipped:
        names = ", ".join(path.name for path in skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        has_subfolders = not args.recursive and any(path.is_dir() for path in skipped)
        advice = "; --recursive takes subfolders" if has_subfolders else ""
        reporting.log(f"skipped {len(skipped)} that are hidden, no photos or earlier results ({names}){advice}")
    reporting.log(f"masks are computed at {reporting.size_text(model.size)} and upsampled to each photo's size")

    rows, errors = [], []
    for path, paths in zip(reporting.progress(photos, len(photos), "predicting", "photo"), outputs):
        try:
            photo = imaging.open_photo(path, MAX_PIXELS)
        except UserError as error:
            errors.append(str(error))
            continue
        mask = segment(model, photo, args.device)
        write_image(paths[0], imaging.palette_image(mask))
        if not args.masks_only:
            write_image(paths[1], overlay(photo, mask, model.classes), compress_level=1)
        counts = np.bincount(mask.ravel(), minlength=len(model.classes))
        shares = counts / mask.size
        rows.append((path, paths[0].name, shares))
        by_share = [f"{model.classes[label]} {shares[label]:.1%}" for label in np.argsort(-shares) if shares[label]]
        reporting.log(f"{path}: {', '.join(by_share)}")
    if rows:
        write_shares(shares_file, model.classes, rows)
        if not args.masks_only:
            predicted = np.flatnonzero(sum(shares for _, _, shares in rows))
            write_image(legend, draw_legend(model.classes, predicted.tolist()))
        what = "masks" if args.masks_only else "masks and overlays"
        reporting.log(f"{what} of {len(rows)} photos are in {args.out}, the share of each class in {shares_file}")
    if errors:
        raise UserError("\nerror: ".join(errors))


if __name__ == "__main__":
    cli.run(main)
