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

BATCH_SIZE = 4  # windows that are predicted at a time


def starts(length, side, overlap):
    """Where tiles begin along a photo's side of ``length`` pixels: the last tile ends with the photo."""
    last = max(0, length - side)
    return [*range(0, last, side - overlap), last]


def crop(image, top, left, size, fill=0):
    """The tile of a PIL image at a position, of a size (height, width); what lies outside the image is ``fill``."""
    tile = Image.new(image.mode, size[::-1], fill)
    tile.paste(image, (-left, -top))
    return tile


def cut(root, out, size, overlap, suffix):
    """Write the tiles of a folder in VOC layout as another one, in which a photo's tiles are in the photo's split.

    ``size`` is (height, width); ``overlap`` in pixels, smaller than both; ``suffix`` that of the photos' format. Tiles
    without a labelled pixel are left out; smaller photos are filled up with black and void. A call that was stopped is
    continued by the same call.
    """
    root, record, lists = voc_layout.find_root(root), out / voc_layout.TILES, out / voc_layout.LISTS
    settings = json.dumps({"size": size, "overlap": overlap, "suffix": suffix, "data": str(root.resolve())})
    is_unfinished = record.exists() and not lists.exists() and record.read_text(encoding="utf-8") == settings
    if any(out.glob("*")) and not is_unfinished:
        raise UserError(f"{out}: holds something else: delete it, or choose another --out")
    files.make_folder(out)
    files.write(record, settings.encode())

    def cut_photo(index):
        photo, mask, ids = split.photo(index), split.mask(index), []
        voc_layout.check_sizes(split.photo_path(index), split.mask_path(index), photo.size, mask.shape[::-1])
        image = Image.fromarray(mask)
        for top, left in itertools.product(*(starts(*sides, overlap) for sides in zip(mask.shape, size))):
            labels = np.asarray(crop(image, top, left, size, VOID))
            if (labels != VOID).any():
                ids.append(f"{split.ids[index]}_y{top}_x{left}")
                save(imaging.palette_image(labels), out / "SegmentationClass" / f"{ids[-1]}.png")
                save(crop(photo, top, left, size), out / "JPEGImages" / f"{ids[-1]}{suffix}")
        return ids

    def save(image, path):
        signals.check()
        if not path.exists():
            files.make_folder(path.parent)  # an id may be in a subfolder
            with files.atomic_write(path) as file:
                image.save(file, Image.registered_extensions()[path.suffix], quality=95)

    tiles = {}
    for name in voc_layout.split_names(root):
        split = Split(root, name)
        tiles[name] = sum(voc_layout.map_images(cut_photo, range(len(split)), f"cutting {name}"), [])
    files.write(out / "classes.txt", "\n".join(split.classes).encode())
    files.make_folder(lists)
    for name, ids in tiles.items():
        files.write(lists / f"{name}.txt", "\n".join(ids).encode())
    num_bytes = sum(path.stat().st_size for path in out.rglob("*"))
    print(f"{out}: {sum(map(len, tiles.values()))} tiles of {imaging.size_text(size)}, {num_bytes / 1e9:.3g} GB")


@torch.inference_mode()
def predict(model, photo, device="cpu", name="predicting"):
    """The classes in a photo, a PIL image in RGB, by a model from ``checkpoint.load``: uint8 array [H, W].

    The photo is seen in windows that overlap by a quarter, of the size of the tiles that the model was trained on, or
    else of the network's input. Their logits are added before the argmax, with less weight towards the borders of a
    window; only those of a row of windows are in memory.
    """
    height, width = size = model.tiles or model.size
    ramps = [((torch.arange(side) + 0.5) / (side // 4)).clamp(max=1) for side in size]
    rows, columns = (torch.minimum(ramp, ramp.flip(0)) for ramp in ramps)
    weights = (rows[:, None] * columns).to(device)
    logits = torch.zeros(len(model.classes), height, max(width, photo.width), device=device)
    mask = np.empty((photo.height, photo.width), np.uint8)
    tops, lefts = starts(photo.height, height, height // 4), starts(photo.width, width, width // 4)
    ends = [*tops[1:], photo.height]
    for top, end in report.progress(zip(tops, ends), len(tops), name, "row"):
        for batch in torch.tensor(lefts).split(BATCH_SIZE):
            windows = [crop(photo, top, left, size) for left in batch.tolist()]
            images = torch.from_numpy(np.stack([imaging.resize(window, model.size) for window in windows]))
            images = imaging.normalise(images.permute(0, 3, 1, 2), device, model.mean, model.std)
            outputs = inference.forward(model, images, full_precision=True)["out"].contiguous()
            for left, output in zip(batch.tolist(), outputs):
                window = functional.interpolate(output[None], size, mode="bilinear", align_corners=False)[0]
                logits[:, :, left : left + width] += weights * window
        count = end - top  # of rows that no other window reaches
        mask[top:end] = logits[:, :count, : photo.width].max(0).indices.byte().cpu().numpy()
        logits[:, : height - count] = logits[:, count:].clone()
        logits[:, height - count :] = 0
    return mask


def evaluate(model, split, device="cpu"):
    """Scores of ``predict`` on all photos of a Split, at full resolution; without a loss and the assignment's IoU."""
    inference.check_classes(model, split)
    matrices = []
    for index in range(len(split)):
        masks = split.mask(index), predict(model, split.photo(index), device, f"{index + 1} of {len(split)}")
        parts = zip(*(torch.from_numpy(mask).split(256) for mask in masks))  # rows, so that memory stays bounded
        matrices.append(sum(util.confusion_matrix(*part, len(split.classes)) for part in parts))
    image_ious = torch.tensor([util.mean_iou(matrix) for matrix in matrices])
    return util.Scores(math.nan, sum(matrices), split.classes, image_ious)
