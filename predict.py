"""Segment photos with a trained model.

    python predict.py best_train_5_b.pt photo.jpg folder/ --out predictions

Writes for each photo NAME_mask.png, a VOC palette PNG of the photo's own size whose values are the classes, and
NAME_overlay.png to look at; prints the share of each class.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps

import engine
import plotting
import voc
from util import Parser, UserError, replacing, run, writing


def find(paths):
    """The photos among files and folders (not their subfolders), each once, in order.

    Raises:
        UserError: a path does not exist, or a folder holds no photo.
    """
    photos = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder: correct the path")
        inside = [file for file in sorted(path.iterdir()) if is_photo(file)] if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: holds no photo ({', '.join(voc.PHOTO_SUFFIXES)}): correct the path")
        photos += inside
    return list(dict.fromkeys(photos))


def is_photo(path):
    return path.is_file() and path.suffix.lower() in voc.PHOTO_SUFFIXES


@torch.inference_mode()
def segment(model, photo, device="cpu"):
    """The classes of a photo.

    Args:
        model: from ``engine.load``, on ``device``.
        photo: PIL image in RGB, of any size.

    Returns:
        uint8 array [H, W] of class indices, of the photo's size.
    """
    image = torch.tensor(voc.squeeze(photo, model.size)).permute(2, 0, 1)[None]
    logits = model(voc.normalise(image, device, model.mean, model.std))[0]
    return engine.predict(logits, (photo.height, photo.width)).byte().cpu().numpy()


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a best_*.pt")
    parser.add_argument("photos", nargs="+", metavar="photo", help="photos, or folders of photos")
    parser.add_argument("--out", type=Path, default="predictions", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", type=engine.device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    args = parser.parse_args()

    photos = find(args.photos)
    model = engine.load(args.checkpoint, args.device)
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)

    names, failures = set(), []
    for path in photos:
        try:
            photo = voc.to_rgb(ImageOps.exif_transpose(voc.open_picture(path)))
        except UserError as error:
            failures.append(error)
            continue
        name = path.stem if path.stem not in names else f"{path.stem}_{len(names)}"
        names.add(name)
        labels = segment(model, photo, args.device)
        with replacing(args.out / f"{name}_mask.png") as file:
            voc.picture(labels).save(file, format="png")
        plotting.overlay(args.out / f"{name}_overlay.png", path.name, model.classes, np.asarray(photo), labels)
        shares = np.bincount(labels.ravel(), minlength=len(model.classes)) / labels.size
        found = ", ".join(
            f"{model.classes[label]} {shares[label]:.1%}" for label in np.argsort(-shares) if shares[label]
        )
        print(f"{path}: {found}")
    if names:
        print(f"masks and overlays of {len(names)} photos are in {args.out}")
    if failures:
        raise UserError("\nerror: ".join(map(str, failures)))


if __name__ == "__main__":
    run(main)
