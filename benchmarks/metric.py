"""What each way of counting makes of the same predictions: the official metric, and the assignment's step by step.

    python benchmarks/metric.py --data data/VOCdevkit/Toy --split test best_train.pt best_train_5_a.pt

Scores the first class everywhere (VOC's background), the truth itself and the checkpoints given, all at 224x224, so
that nothing but the counting differs. Without checkpoints, masks are enough.
"""

import statistics
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compare
import engine
import util
import voc

SIZE = 224
WAYS = (
    "mean IoU",
    "void as background",
    "mean over images",
    "and absent classes as 0",
    "the assignment's: all three",
)


def score(pairs, number):
    """Mean IoU of (truth, prediction) pairs, integer tensors [H, W], by each of WAYS."""
    total, void_as_background = torch.zeros(2, number, number, dtype=torch.int64)
    each, absent_as_0, assignment = [], [], []
    for truth, prediction in pairs:
        matrix = util.confusion_matrix(truth, prediction, number)
        total += matrix
        void_as_background += util.confusion_matrix(truth.masked_fill(truth == voc.VOID, 0), prediction, number)
        each.append(util.mean_iou(matrix))
        absent_as_0.append(util.iou(matrix).nan_to_num(0).mean().item())
        assignment.append(util.assignment_iou(truth[None], prediction[None], number).item())
    means = map(statistics.mean, (each, absent_as_0, assignment))
    return [util.mean_iou(total), util.mean_iou(void_as_background), *means]


@torch.inference_mode()
def predictions(path, split):
    """Yield truth and the prediction of a checkpoint for each image of a split."""
    model = checkpoint.load(path)
    for index in range(len(split)):
        photo, mask = split.pair(index, SIZE)
        logits = model(voc.normalise(torch.tensor(photo).permute(2, 0, 1)[None], "cpu", model.mean, model.std))
        yield torch.tensor(mask), logits[0].argmax(0)


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--data", default="data/VOCdevkit/VOC2007")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=cli.integer(1))
    args = parser.parse_args()
    split = voc.Split(args.data, args.split, args.limit)
    number = len(split.classes)
    images = (Image.fromarray(split.mask(index)) for index in range(len(split)))
    masks = [torch.tensor(voc.resize(image, SIZE, Image.Resampling.NEAREST)) for image in images]
    rows = [[f"{split.classes[0]} everywhere", *score(((mask, torch.zeros_like(mask)) for mask in masks), number)]]
    truths = ((mask, mask.masked_fill(mask == voc.VOID, 0)) for mask in masks)
    rows.append(["the truth itself", *score(truths, number)])
    for path in args.checkpoints:
        rows.append([f"`{path.name}`", *score(predictions(path, split), number)])
    print(f"{split.root} {split.name}, {len(split)} images at {SIZE}x{SIZE}, torch {torch.__version__}\n")
    print(compare.table(["prediction", *WAYS], [[row[0], *(f"{value:.4f}" for value in row[1:])] for row in rows]))


if __name__ == "__main__":
    cli.run(main)
