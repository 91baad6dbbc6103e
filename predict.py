"""Segment photos with a trained model, or score it on a split.

    python predict.py best_train_5_b.pt photo.jpg folder/ --out predictions
    python predict.py best_train_5_b.pt --data data/VOCdevkit/VOC2007 --split test

The first writes for each photo NAME_mask.png, a palette PNG of the photo's size whose values are the class indices, and
NAME_overlay.jpg, the classes drawn over the photo. NAME is the photo's name without suffix; photos of the same name
get their folder's in front. legend.png names the overlays' colours. predictions.csv holds each photo's share of each
class: a later call adds its photos, and replaces the rows of those that are predicted again. A call that was stopped
goes on with --resume. With --tiles, large photos are not resized: docs/DATA.md, Large photos.

The second prints the results as at the end of a run, at full resolution, and writes SPLIT_scores.csv: each photo and
its mean IoU, the worst first, which is a way to find wrong masks.
"""

import csv
import io
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops

from seg import checkpoint, cli, engine, files, imaging, inference, report, tiles
from seg.data import Loader, Split
from util import VOID, UserError, background_label


def find_photos(paths, out, recursive=False):
    """The photos among files and folders, a list of Paths; UserError for a path that does not exist or holds none.

    A file is taken whatever its suffix. Of a folder, these are the files with a photo's suffix that are neither hidden
    nor in ``out``, with ``recursive`` also those in its subfolders.
    """

    def is_photo(file):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        return file.suffix.lower() in imaging.PHOTO_SUFFIXES and not is_hidden and file.resolve().parent != out

    photos, out = {}, out.resolve()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder: correct the path")
        found = [path]
        if path.is_dir():
            found = sorted(filter(is_photo, path.rglob("*") if recursive else path.iterdir()))
        if not found:
            advice = "choose another folder or --out, or pass --recursive to search subfolders"
            raise UserError(f"{path}: holds no photo outside --out: {advice}")
        photos |= {file.resolve(): file for file in found}
    return list(photos.values())


def output_names(photos):
    """The names of the photos' results, without suffix, and after the folder's if several photos share one."""
    counts = Counter(photo.stem.lower() for photo in photos)  # some disks ignore the case of letters
    names = {}
    for photo in photos:
        name = photo.stem if counts[photo.stem.lower()] == 1 else f"{photo.parent.resolve().name}_{photo.stem}"
        if name.lower() in names:
            raise UserError(f"{photo}: the results of another photo, too, would be called {name}: rename one of them")
        names[name.lower()] = name
    return list(names.values())


def check_new(paths, overwrite, problem="exists already"):
    """Raise a UserError that names the first of ``paths`` that exists, unless ``overwrite``."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path}: {problem}: replace with --overwrite, or choose another place")


def segment(model, photo, device="cpu"):
    """The classes in a photo, a PIL image in RGB, by a model from ``checkpoint.load``: uint8 array [H, W]."""
    image = torch.tensor(imaging.resize(photo, model.size)).permute(2, 0, 1)[None]
    images = imaging.normalise(image, device, model.mean, model.std)
    return inference.predict_image(model, images, (photo.height, photo.width))


def overlay(photo, mask, classes, num_rows=1024):
    """Draw the classes over a photo: half its colours, with a contour around each class; background stays as it is.

    ``photo`` is a PIL image in RGB, ``mask`` a uint8 array [H, W] of class indices, of its size. Draws into ``photo``,
    ``num_rows`` rows at a time so that memory stays bounded, and returns it.
    """
    width = 1 + max(mask.shape) // 2000  # of a contour in pixels, on either side of an outline
    for top in range(0, photo.height, num_rows):
        first, end = max(0, top - width), min(photo.height, top + num_rows + width)
        strip, strip_mask = photo.crop((0, first, photo.width, end)), mask[first:end]
        is_contour = np.zeros(strip_mask.shape, bool)
        for labels, found in ((strip_mask, is_contour), (strip_mask.T, is_contour.T)):
            differs = labels[width:] != labels[:-width]
            found[width:] |= differs
            found[:-width] |= differs
        image = imaging.palette_image(strip_mask, imaging.DISTINCT_COLOURS // 2)
        result = ImageChops.add(strip.point(lambda value: value // 2), image.convert("RGB"))  # NumPy would be slower
        image.putpalette(imaging.DISTINCT_COLOURS.tobytes())
        result.paste(image.convert("RGB"), mask=Image.fromarray(is_contour))
        if (background := background_label(classes)) is not None:
            result.paste(strip, mask=Image.fromarray(strip_mask == background))
        photo.paste(result.crop((0, top - first, photo.width, top - first + num_rows)), (0, top))
    return photo


def encode(image, **options):
    """A PIL image as the bytes of a file, with ``options`` of Pillow's ``save``."""
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def read_rows(path, header, overwrite):
    """The rows of an earlier call by mask, lists of str; UserError for another ``header``, unless ``overwrite``."""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    if rows[:1] != [header]:
        check_new([path], overwrite, "is not a table of this model's classes")
        return {}
    return {row[1]: row for row in rows[1:] if row}


def write_rows(path, header, rows):
    """Write a table to ``path``, whose folder need not exist yet."""
    files.make_folder(path.parent)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    files.write(path, text.getvalue().encode("utf-8", "surrogateescape"))  # a name may hold bytes that are not UTF-8


def predict_photos(model, args):
    """Write the results of the photos in ``args``; see the top of this file."""
    photos = find_photos(args.photos, args.out, args.recursive)
    names = [[args.out / f"{name}_{kind}" for kind in ("mask.png", "overlay.jpg")] for name in output_names(photos)]
    table, legend = args.out / "predictions.csv", args.out / "legend.png"
    header = ["photo", "mask", *model.classes]
    rows = read_rows(table, header, args.overwrite)
    kept = {tuple(row[:2]) for row in rows.values() if args.resume and (args.out / row[1]).exists()}
    jobs = [(photo, *paths) for photo, paths in zip(photos, names) if (str(photo), paths[0].name) not in kept]
    # beside a table, the legend is that of an earlier call; with --resume, a mask without a row was being written
    new = [] if args.masks_only or table.exists() else [legend]
    new += [path for job in jobs for path in job[1:] if not args.resume or path.name in rows]
    check_new(
        new, args.overwrite, "is of a photo at another path" if args.resume else "exists already (--resume skips it)"
    )
    write_rows(table, header, rows.values())  # now, in case it cannot be written
    if not args.masks_only:
        from seg import plotting  # only here: importing Matplotlib takes a moment

        plotting.overlay_legend(legend, model.classes)

    done, errors = len(photos) - len(jobs), []
    try:
        for path, mask_path, overlay_path in report.progress(jobs, len(jobs), "predicting", "photo"):
            try:
                photo = imaging.open_photo(path)
            except UserError as error:
                errors.append(str(error))
                continue
            mask = (tiles.predict if args.tiles else segment)(model, photo, args.device)
            overlay_path.unlink(missing_ok=True)  # that of an earlier mask
            files.write(mask_path, encode(imaging.palette_image(mask), format="png"))
            if not args.masks_only:
                options = {"format": "jpeg", "quality": 90, "subsampling": 0}  # a PNG would take longer than the rest
                files.write(overlay_path, encode(overlay(photo, mask, model.classes), **options))
            shares = np.divide(Image.fromarray(mask).histogram()[: len(model.classes)], mask.size)
            rows[mask_path.name] = [path, mask_path.name, *(f"{share:.6f}" for share in shares)]
            done += 1
            labels = [label for label in np.argsort(-shares) if shares[label] >= 0.0005]  # the rest would be 0.0%
            report.log(f"{path}: {', '.join(f'{model.classes[label]} {shares[label]:.1%}' for label in labels)}")
    finally:  # also after Ctrl-C or an error
        write_rows(table, header, rows.values())
        earlier = f" ({len(photos) - len(jobs)} of an earlier call)" if args.resume else ""
        report.log(f"masks of {done} of {len(photos)} photos are in {args.out}{earlier}, shares of classes in {table}")
    if errors:
        raise UserError("\nerror: ".join(errors))


def evaluate(model, split, device="cpu", tiled=False):
    """Scores of a model from ``checkpoint.load`` on all photos of a Split, at full resolution."""
    if tiled:
        return tiles.evaluate(model, split, device)
    loader = Loader(split, model.size, batch_size=8, device=device, mean=model.mean, std=model.std)
    return engine.evaluate(model, loader, torch.nn.CrossEntropyLoss(ignore_index=VOID))


def score(model, args):
    """Print the results on the split in ``args`` and write the table of its photos; see the top of this file."""
    path = args.out / f"{args.split}_scores.csv"
    check_new([path], args.overwrite)
    split = Split(args.data, args.split)
    scores = evaluate(model, split, args.device, args.tiles)
    report.log(report.table({args.split: scores}, split.classes))
    order = scores.image_ious.argsort(stable=True).tolist()  # NaN, of a photo without a labelled pixel, is last
    rows = [(split.photo_path(index), split.mask_path(index), f"{scores.image_ious[index]:.4f}") for index in order]
    write_rows(path, ["photo", "mask", "mean_iou"], rows)
    report.log(f"the mean IoU of each photo, the worst first, is in {path}")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoint", help="a best_*.pt")
    parser.add_argument("photos", nargs="*", metavar="photo", help="photos, or folders of photos")
    parser.add_argument("--data", metavar="DIR", help="instead of photos: a folder in VOC layout, to score the model")
    parser.add_argument("--split", default="val", help="of --data (default: %(default)s)")
    parser.add_argument("--out", type=Path, default="predictions", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", type=cli.parse_device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    text = "resize photos to N x N pixels instead of the training's size; a little more can gain mean IoU: try on val"
    parser.add_argument("--size", type=cli.parse_size, metavar="N|WxH", help=text)
    parser.add_argument("--tiles", action="store_true", help="slide a window over photos, at their own resolution")
    parser.add_argument("--recursive", action="store_true", help="take the photos in subfolders too")
    parser.add_argument("--masks-only", action="store_true", help="write no overlays")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    parser.add_argument("--resume", action="store_true", help="leave out photos that predictions.csv holds already")
    args = parser.parse_intermixed_args()  # photos may follow a flag
    if bool(args.photos) == bool(args.data):
        raise UserError("pass either photos, to segment them, or --data DIR, to score the model on a split")
    model = checkpoint.load(args.checkpoint, args.device)
    model.size = args.size or model.size
    window = imaging.size_text(model.tiles or model.size)
    how = f"in windows of {window}" if args.tiles else "and upsampled to each photo's size"
    report.log(f"masks are computed at {imaging.size_text(model.size)} {how}")
    if args.tiles != bool(model.tiles):
        trained = "tiles: pass" if model.tiles else "whole photos: leave out"
        report.log(f"warning: the model was trained on {trained} --tiles")
    (score if args.data else predict_photos)(model, args)


if __name__ == "__main__":
    cli.run(main)
