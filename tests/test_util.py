"""Metrics against other libraries and against cases counted by hand; seeding, memory format and Ctrl-C."""

import math
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
import torch
from conftest import DEVICES, ROOT
from torchmetrics.classification import MulticlassJaccardIndex

import util
from seg import distributed
from util import VOID


@DEVICES
@pytest.mark.parametrize("num_classes", [2, 21])
def test_metrics_agree_with_scikit_learn_and_torchmetrics(num_classes, device):
    generator, shape = torch.Generator().manual_seed(7), (4, 31, 29)
    truth, guess = torch.randint(num_classes, (2, *shape), generator=generator)
    prediction = torch.where(torch.rand(shape, generator=generator) < 0.5, truth, guess)
    truth[torch.rand(shape, generator=generator) < 0.2] = VOID
    matrix = util.confusion_matrix(truth.to(device), prediction.to(device), num_classes)
    assert matrix.dtype == torch.int64
    (y_true, y_pred), labels = (each[truth != VOID].numpy() for each in (truth, prediction)), range(num_classes)
    assert matrix.tolist() == sklearn.metrics.confusion_matrix(y_true, y_pred, labels=labels).tolist()
    assert util.pixel_accuracy(matrix) == pytest.approx(sklearn.metrics.accuracy_score(y_true, y_pred), rel=1e-12)
    jaccard = sklearn.metrics.jaccard_score(y_true, y_pred, labels=labels, average=None)
    assert util.iou(matrix).tolist() == pytest.approx(jaccard.tolist(), rel=1e-12)
    assert util.mean_iou(matrix) == pytest.approx(jaccard.mean(), rel=1e-12)
    jaccard = MulticlassJaccardIndex(num_classes, average=None, ignore_index=VOID)(prediction, truth)
    assert util.iou(matrix).tolist() == pytest.approx(jaccard.tolist(), rel=1e-6)  # float32 there


def test_metrics_counted_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 2, VOID]])
    prediction = torch.tensor([[0, 0, 3, 1], [1, 0, 0, 4]])
    matrix = util.confusion_matrix(truth, prediction, 5)
    assert matrix.tolist() == [[2, 0, 0, 1, 0], [1, 2, 0, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert util.pixel_accuracy(matrix) == 4 / 7
    # Class 2 is never predicted, 3 never right, and 4 predicted on void only, so that its IoU is undefined.
    assert util.iou(matrix)[:4].tolist() == [2 / 5, 2 / 3, 0, 0] and util.iou(matrix)[4].isnan()
    assert util.mean_iou(matrix) == pytest.approx((2 / 5 + 2 / 3) / 4, rel=1e-15)
    empty = util.confusion_matrix(torch.full((2, 3), VOID), torch.zeros(2, 3, dtype=torch.int64), 3)
    assert not empty.any() and math.isnan(util.pixel_accuracy(empty)) and math.isnan(util.mean_iou(empty))


@pytest.mark.parametrize(
    ("truth", "prediction", "word"),
    [([0, 3], [0, 1], "truth"), ([0, -1], [0, 1], "truth"), ([0, 1], [3, 1], "prediction"), ([0, 1], [0], "shape")],
)
def test_labels_outside_the_classes_and_different_shapes_are_refused(truth, prediction, word):
    with pytest.raises(ValueError, match=word):
        util.confusion_matrix(torch.tensor(truth), torch.tensor(prediction), 3)


def test_without_a_background_class_the_baseline_predicts_the_majority_class():
    matrix = torch.tensor([[3, 1, 0], [2, 0, 1], [0, 5, 2]])
    baseline = util.Scores(1.5, matrix, ("sky", "tree", "road")).baseline
    assert util.baseline_name(baseline.classes) == "majority-class baseline"
    assert baseline.matrix.tolist() == [[0, 0, 4], [0, 0, 3], [0, 0, 7]]


def test_the_assignments_iou_counts_void_as_background_and_averages_over_images():
    # All pixels are predicted as background. Image one is all background: IoU 1 for it, 0 for the two absent classes.
    # Image two is half background and void, half class 1: IoU 2 / 4 for background, 0 for the others.
    truth = torch.tensor([[[0, 0], [0, 0]], [[0, VOID], [1, 1]]])
    scores = util.assignment_iou(truth, torch.zeros_like(truth), 3)
    assert scores.tolist() == pytest.approx([1 / 3, (2 / 4) / 3], rel=1e-15)


def test_each_seed_epoch_and_rank_has_random_numbers_of_its_own_and_repeats_them():
    def draw(seed, *arguments):
        seed(*arguments)
        return random.random(), np.random.rand(), torch.rand(1).item()

    calls = [(util.seed_everything, seed) for seed in (3, 4)]
    calls += [(util.seed_epoch, *each) for each in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**32 - 1, 1, 0))]
    draws = [draw(*call) for call in calls]
    assert draws == [draw(*call) for call in calls]
    assert all(len(set(numbers)) == len(calls) for numbers in zip(*draws))


def test_ctrl_c_is_still_ignored_in_a_background_job():
    """A shell starts its background jobs with SIGINT ignored."""
    code = "import os, signal; from seg import cli; cli.run(lambda: os.kill(os.getpid(), signal.SIGINT)); print('done')"
    options = {"cwd": ROOT, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    assert subprocess.check_output([sys.executable, "-c", code], **options) == b"done\n"


def test_apple_gpus_get_contiguous_tensors():
    """Batch norm on channels_last tensors gives wrong gradients there (pytorch issue 175189)."""
    formats = [distributed.memory_format(device) for device in ("mps", torch.device("mps:0"), "cpu", "cuda:1")]
    assert formats == [torch.contiguous_format] * 2 + [torch.channels_last] * 2
