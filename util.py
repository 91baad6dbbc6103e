"""Metrics from one confusion matrix per split, the seed of a run, and errors that the user can correct."""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch

VOID = 255


class UserError(Exception):
    """An error that the user can correct. Its text is one line: which file or flag, what is wrong, what to do."""


def reason(error):
    """The first line of an exception's message, with the next if it ends with a colon; its type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def is_out_of_memory(error):
    """Whether an exception means that memory ran out, on a CPU or a GPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def background_label(classes):
    """The index of the class ``background``, also if written ``Background`` or ``_background_``; None without one."""
    names = [name.strip("_ ").lower() for name in classes]
    return names.index("background") if "background" in names else None


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch with an int from 0 to 2^32 - 1, and restrict cuDNN to deterministic kernels.

    On a CPU, the same seed and the same number of threads then give identical results. On a GPU, results still differ
    in the last digits, and more after many steps: the backward pass of bilinear upsampling adds in random order.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def seed_epoch(seed, epoch, rank):
    """Seed an epoch of a run, each rank differently: a resumed run then needs no saved random state."""
    seed_everything(int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0]))


def confusion_matrix(truth, prediction, num_classes):
    """Count pixels by ground truth (rows) and prediction (columns), without those whose ground truth is void.

    Both are integer tensors of one shape, with values 0 .. num_classes - 1, and VOID in ``truth``. Returns an int64
    tensor [num_classes, num_classes] on their device. Raises a ValueError if the shapes differ, or if a value is not a
    class (values on a GPU are not checked).
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth has shape {tuple(truth.shape)}, prediction {tuple(prediction.shape)}")
    # One row for every value of a uint8 mask. Void pixels land in row 255, which is cut off at the end: selecting the
    # labelled pixels beforehand would copy both tensors, and synchronise with a GPU.
    num_rows = VOID + 1
    cells = (truth.long() * num_classes + prediction.long()).flatten()
    if cells.is_cuda:  # bincount and the checks below would synchronise with the GPU
        counts = cells.new_zeros(num_rows * num_classes).scatter_add_(0, cells, torch.ones_like(cells))
        return counts.view(num_rows, num_classes)[:num_classes]
    for name, labels, largest in (("truth", truth, VOID), ("prediction", prediction, num_classes - 1)):
        low, high = torch.stack(labels.aminmax()).tolist() if labels.numel() else (0, 0)
        if not 0 <= low <= high <= largest:
            raise ValueError(f"{name} holds values outside 0 .. {num_classes - 1}")
    counts = torch.bincount(cells, minlength=num_rows * num_classes).view(num_rows, num_classes)
    if counts[num_classes:VOID].any():
        raise ValueError(f"truth holds values outside 0 .. {num_classes - 1}")
    return counts[:num_classes]


def pixel_accuracy(matrix):
    """Share of the labelled pixels that are predicted correctly, ``trace / sum``: float, NaN for an empty matrix."""
    return (matrix.diagonal().sum().double() / matrix.sum()).item()


def iou(matrix):
    """Intersection over union of each class over a whole split, as PASCAL VOC defines it (Everingham et al., 2010).

    ``iou[c] = C[c, c] / (row c + column c - C[c, c])`` for a confusion matrix C: float64 tensor in [0, 1], NaN for a
    class in neither ground truth nor prediction.
    """
    intersection = matrix.diagonal().double()
    return intersection / (matrix.sum(0) + matrix.sum(1) - intersection)


def mean_iou(matrix):
    """Mean of ``iou(matrix)`` over the classes for which it is defined: float in [0, 1], NaN for an empty matrix."""
    return iou(matrix).nanmean().item()


def assignment_iou(truth, prediction, num_classes):
    """IoU as the assignment's own code computes it.

    It differs from the official metric in three ways: void counts as background (class 0); each image is scored by
    itself; a class in neither ground truth nor prediction of an image counts as 0 in the mean over all classes. A
    perfect prediction of an image with two of 21 classes scores 2/21. Takes tensors [B, H, W] as ``confusion_matrix``;
    returns a float64 tensor [B] in [0, 1], of which the score of a split is the mean over its images.
    """
    truth = truth.masked_fill(truth == VOID, 0)
    scores = [iou(confusion_matrix(t, p, num_classes)).nan_to_num(0.0).mean() for t, p in zip(truth, prediction)]
    return torch.stack(scores)


def baseline_name(classes):
    """The name of ``Scores.baseline``."""
    return ("majority-class" if background_label(classes) is None else "all-background") + " baseline"


def criterion_weights(criterion):
    """The class weights of a cross-entropy, float32 [C], or None."""
    return criterion.weight if isinstance(criterion, torch.nn.CrossEntropyLoss) else None


@dataclass
class Scores:
    """The results of a model on one split; the last two are None if they were not computed.

    Attributes:
        loss: mean of the criterion over the labelled pixels, at the network's input size.
        matrix: int64 [C, C] on the CPU, see ``confusion_matrix``. classes: the C class names.
        image_ious: mean IoU of each image by itself, float64 [N], NaN without a labelled pixel.
        assignment_iou: mean over the images, at the network's input size.
    """

    loss: float
    matrix: torch.Tensor
    classes: tuple
    image_ious: torch.Tensor | None = None
    assignment_iou: float | None = None

    @property
    def pixel_accuracy(self):
        return pixel_accuracy(self.matrix)

    @property
    def miou(self):
        return mean_iou(self.matrix)

    @property
    def baseline(self):
        """Scores of the all-background baseline; of the majority class if there is no background class."""
        label = background_label(self.classes)
        label = self.matrix.sum(1).argmax().item() if label is None else label
        matrix = torch.zeros_like(self.matrix)
        matrix[:, label] = self.matrix.sum(1)
        return Scores(math.nan, matrix, self.classes)

    def as_dict(self):
        """The metrics as plain types for JSON, with None for NaN."""
        baseline, ious = self.baseline, iou(self.matrix).tolist()
        return {
            **{name: _none_if_nan(getattr(self, name)) for name in ("loss", "pixel_accuracy", "miou")},
            "iou": {name: _none_if_nan(value) for name, value in zip(self.classes, ious)},
            "background": {name: _none_if_nan(getattr(baseline, name)) for name in ("pixel_accuracy", "miou")},
            "assignment_iou": self.assignment_iou,
        }


def _none_if_nan(value):
    return value if math.isfinite(value) else None
