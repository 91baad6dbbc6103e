"""Score the same predictions by the official metric and by the assignment's, one difference between them at a time.

    python benchmarks/metric.py --data data/VOCdevkit/Toy --split test best_train.pt best_train_5_a.pt

Scores class 0 everywhere (VOC's background), the ground truth itself and the checkpoints given, all at 224x224, so that
only the way of counting differs. Without checkpoints, no photos are needed.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compare
import util
import voc
from seg import checkpoint, cli, imaging, inference

SIZE = 224


def mean_ious(pairs, num_classes):
    """The mean IoU of (ground truth, prediction), integer tensors [H, W], by each metric: a dict from name to text."""
    matrices, void_as_background, assignment = [], [], []
    for truth, prediction in pairs:
        matrices.append(util.confusion_matrix(truth, prediction, num_classes))
        void_as_background.append(util.confusion_matrix(truth % util.VOID, prediction, num_classes))  # 255 becomes 0
        assignment.append(util.assignment_iou(truth[None], prediction[None], num_classes).item())
    scores = {
        "mean IoU": util.mean_iou(sum(matrices)),
        "void as background": util.mean_iou(sum(void_as_background)),
        "mean over images": np.mean([util.mean_iou(matrix) for matrix in matrices]),
        "mean over images, absent as 0": np.mean([util.iou(matrix).nan_to_num(0).mean() for matrix in matrices]),
        "the assignment's: all three": np.mean(assignment),
    }
    return {metric: f"{score:.4f}" for metric, score in scores.items()}


def predict(path, split):
    """Yield the prediction of a checkpoint for each image of a split."""
    model = checkpoint.load(path)
    loader = voc.Loader(split, SIZE, batch_size=1, mean=model.mean, std=model.std)
    for index in range(len(split)):
        yield torch.from_numpy(inference.predict_index(model, loader, index, (SIZE, SIZE)))


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--data", default="data/VOCdevkit/VOC2007")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=cli.integer(1))
    args = parser.parse_args()
    split = voc.Split(args.data, args.split, args.limit)
    masks = [torch.tensor(imaging.resize_mask(split.mask(index), (SIZE, SIZE))) for index in range(len(split))]
    predictions = {f"all {split.classes[0]}": [torch.zeros_like(mask) for mask in masks]}
    predictions["the ground truth itself"] = [mask % util.VOID for mask in masks]
    predictions |= {f"`{path.name}`": predict(path, split) for path in args.checkpoints}
    scores = {name: mean_ious(zip(masks, predicted), len(split.classes)) for name, predicted in predictions.items()}
    print(f"{split.root} {split.name}, {len(split)} images at {SIZE}x{SIZE}, torch {torch.__version__}\n")
    print(compare.markdown_table([{"prediction": name} | row for name, row in scores.items()]))


if __name__ == "__main__":
    cli.run(main)
