"""Large photos at native resolution: cut into tiles for training, and predicted in overlapping windows."""

import itertools
import json
import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

import util
from seg import files, imaging, inference, report, signals, voc_layout
from seg.data import Split
from util import VOID, UserError


def starts(length, side, overlap):
    """Where tiles begin along a photo's side of ``length`` pixels: the last tile ends with the photo."""
    return [*range(0, length - side, side - overlap), max(0, length - side)]


def crop(image, top, left, size, fill=0):
    """The tile of a PIL image at a position, of a size (height, width); what lies outside the image is ``fill``."""
    tile = Image.new(image.mode, size[::-1], fill)
    tile.paste(image, (-left, -top))
    return tile


def cut(root, out, size, overlap, suffix):
    """Cut the photos and masks of a folder in VOC layout into tiles, another such folder, each in its photo's split.

    ``size`` is (height, width), ``overlap`` in pixels, less than both; ``suffix``, .png or .jpg, is the format of the
    photos' tiles. Tiles without a labelled pixel are left out; smaller photos are padded with black and void. ``out``
    gets its name when it is complete.
    """
    if out.exists():
        raise UserError(f"{out}: exists already: choose another --out")
    root = voc_layout.find_root(root)
    splits = [Split(root, name) for name in voc_layout.split_names(root)]

    def cut_photo(index):
        (photo, mask), ids = split.pair(index), []
        image = Image.fromarray(mask)
        for top, left in itertools.product(*(starts(*sides, overlap) for sides in zip(mask.shape, size))):
            labels = np.asarray(crop(image, top, left, size, VOID))
            if (labels != VOID).any():
                ids.append(f"{split.ids[index]}_y{top}_x{left}")
                save(imaging.palette_image(labels), folder / "SegmentationClass" / f"{ids[-1]}.png")
                save(crop(photo, top, left, size), folder / "JPEGImages" / f"{ids[-1]}{suffix}")
        return ids

    def save(image, path):
        signals.check()
        path.parent.mkdir(parents=True, exist_ok=True)  # an id may be in a subfolder
        image.save(path, quality=95)  # of a JPEG

    with files.writing(out), files.atomic_folder(out) as folder:
        (folder / voc_layout.LISTS).mkdir(parents=True)
        (folder / voc_layout.TILES).write_text(json.dumps({"size": size}))
        (folder / "classes.txt").write_text("\n".join(splits[0].classes), encoding="utf-8")
        for split in splits:
            ids = sum(voc_layout.map_images(cut_photo, range(len(split)), f"cutting {split.name}"), [])
            (folder / voc_layout.LISTS / f"{split.name}.txt").write_text("\n".join(ids), encoding="utf-8")
            print(f"{split.name}: {len(split)} photos, {len(ids)} tiles of {imaging.size_text(size)}")
    print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*')) / 1e9:.3g} GB")


@torch.inference_mode()
def predict(model, photo, device="cpu", name="predicting"):
    """The classes in a photo, a PIL image in RGB, by a model from ``checkpoint.load``: uint8 array [H, W].

    A sliding window as large as the training's tiles, or for other models as the network's input, moves over the photo
    with an overlap of a quarter. The windows' logits are added before the argmax, with lower weight towards a window's
    borders. Only the logits of one row of windows are in memory. ``name`` is that of the progress bar.
    """
    height, width = size = model.tiles or model.size
    ramps = [((torch.arange(side) + 0.5) / (side // 4)).clamp(max=1) for side in size]
    weights = torch.outer(*(torch.minimum(ramp, ramp.flip(0)) for ramp in ramps)).to(device)
    logits = torch.zeros(len(model.classes), height, max(width, photo.width), device=device)
    mask = np.empty((photo.height, photo.width), np.uint8)
    tops, lefts = starts(photo.height, height, height // 4), starts(photo.width, width, width // 4)
    for top, end in report.progress(zip(tops, [*tops[1:], photo.height]), len(tops), name, "row"):
        for batch in (lefts[first : first + 4] for first in range(0, len(lefts), 4)):
            images = np.stack([imaging.resize(crop(photo, top, left, size), model.size) for left in batch])
            images = imaging.normalise(torch.tensor(images).permute(0, 3, 1, 2), device, model.mean, model.std)
            outputs = inference.forward(model, images, full_precision=True)["out"].contiguous()
            for left, output in zip(batch, outputs):
                window = functional.interpolate(output[None], size, mode="bilinear", align_corners=False)[0]
                logits[:, :, left : left + width] += weights * window
        count = end - top  # of rows that the next windows do not reach
        mask[top:end] = logits[:, :count, : photo.width].max(0).indices.byte().cpu().numpy()
        logits[:, : height - count] = logits[:, count:].clone()
        logits[:, height - count :] = 0
    return mask


def evaluate(model, split, device="cpu"):
    """Scores of ``predict`` on all photos of a Split, at full resolution; without a loss and the assignment's IoU."""
    inference.check_classes(model, split)
    matrices = []
    for index in range(len(split)):
        photo, truth = split.pair(index)
        masks = truth, predict(model, photo, device, f"{index + 1} of {len(split)}")
        parts = zip(*(torch.from_numpy(mask).split(256) for mask in masks))  # rows, so that memory stays bounded
        matrices.append(sum(util.confusion_matrix(*part, len(split.classes)) for part in parts))
    return util.Scores(math.nan, sum(matrices), split.classes, torch.tensor([*map(util.mean_iou, matrices)]))
