"""Segment photos with a trained model.

    python predict.py best_train_5_b.pt photo.jpg folder/ --out predictions

Writes for each photo NAME_mask.png, a palette PNG of the photo's size whose values are the class indices, and
NAME_overlay.png, the classes drawn over the photo; prints the share of each class.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps

import checkpoint
import cli
import engine
import files
import imaging
import plotting
from util import UserError


def find_photos(paths):
    """The photos among files and folders (without subfolders), each once, in order; UserError for a wrong path."""
    photos = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder: correct the path")
        found = [path]
        if path.is_dir():
            found = [file for file in sorted(path.iterdir()) if file.suffix.lower() in imaging.PHOTO_SUFFIXES]
        if not found:
            raise UserError(f"{path}: holds no photo ({', '.join(imaging.PHOTO_SUFFIXES)}): correct the path")
        photos += found
    return list(dict.fromkeys(photos))


@torch.inference_mode()
def segment(model, photo, device="cpu"):
    """Predict the classes of a photo, a PIL image in RGB, with a model from ``checkpoint.load`` on ``device``.

    Returns:
        uint8 array [H, W] of class indices, of the photo's size.
    """
    image = torch.tensor(imaging.resize(photo, model.size)).permute(2, 0, 1)[None]
    images = imaging.normalise(image, device, model.mean, model.std)
    logits = engine.forward(model, images, full_precision=True)["out"][0]
    return engine.predict_mask(logits, (photo.height, photo.width)).byte().cpu().numpy()


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoint", help="a best_*.pt")
    parser.add_argument("photos", nargs="+", metavar="photo", help="photos, or folders of photos")
    parser.add_argument("--out", type=Path, default="predictions", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", type=cli.parse_device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    args = parser.parse_args()

    photos = find_photos(args.photos)
    model = checkpoint.load(args.checkpoint, args.device)
    with files.writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)

    names, errors = set(), []
    for path in photos:
        try:
            photo = imaging.to_rgb(ImageOps.exif_transpose(imaging.open_image(path)))
        except UserError as error:
            errors.append(str(error))
            continue
        name = path.stem if path.stem not in names else f"{path.stem}_{len(names)}"
        names.add(name)
        mask = segment(model, photo, args.device)
        with files.atomic_write(args.out / f"{name}_mask.png") as file:
            imaging.palette_image(mask).save(file, format="png")
        plotting.overlay(args.out / f"{name}_overlay.png", path.name, model.classes, np.asarray(photo), mask)
        shares = np.bincount(mask.ravel(), minlength=len(model.classes)) / mask.size
        by_share = [f"{model.classes[label]} {shares[label]:.1%}" for label in np.argsort(-shares) if shares[label]]
        print(f"{path}: {', '.join(by_share)}")
    if names:
        print(f"masks and overlays of {len(names)} photos are in {args.out}")
    if errors:
        raise UserError("\nerror: ".join(errors))


if __name__ == "__main__":
    cli.run(main)
