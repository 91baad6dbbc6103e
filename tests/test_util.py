"""Metrics against other libraries and against cases counted by hand; seeding, malloc settings and Ctrl-C."""

import functools
import math
import platform
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
import torch
from conftest import ROOT
from torchmetrics.classification import MulticlassJaccardIndex

import util
from seg import distributed
from util import VOID

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_classes", [2, 21])
def test_metrics_agree_with_scikit_learn_and_torchmetrics(num_classes, device):
    generator, shape = torch.Generator().manual_seed(7), (4, 31, 29)
    truth, guess = torch.randint(num_classes, (2, *shape), generator=generator)
    prediction = torch.where(torch.rand(shape, generator=generator) < 0.5, truth, guess)
    truth[torch.rand(shape, generator=generator) < 0.2] = VOID
    matrix = util.confusion_matrix(truth.to(device), prediction.to(device), num_classes)
    assert matrix.dtype == torch.int64
    labelled = truth != VOID
    y_true, y_pred, labels = truth[labelled].numpy(), prediction[labelled].numpy(), range(num_classes)
    assert matrix.tolist() == sklearn.metrics.confusion_matrix(y_true, y_pred, labels=labels).tolist()
    accuracy = sklearn.metrics.accuracy_score(y_true, y_pred)
    assert util.pixel_accuracy(matrix) == pytest.approx(accuracy, rel=1e-12)  # both are float64
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
    # Class 0: 3 pixels of ground truth, 4 predicted, 2 in both; class 1: 3, 2 and 2. Class 2 is never predicted, class
    # 3 never right, and class 4 predicted on void only, so that its IoU is undefined.
    assert util.iou(matrix)[:4].tolist() == [2 / 5, 2 / 3, 0, 0]
    assert util.iou(matrix)[4].isnan()
    assert util.mean_iou(matrix) == pytest.approx((2 / 5 + 2 / 3) / 4, rel=1e-15)


@pytest.mark.parametrize("shape", [(2, 3), (0,)])
def test_metrics_without_labelled_pixels_are_nan(shape):
    truth = torch.full(shape, VOID)
    matrix = util.confusion_matrix(truth, torch.zeros_like(truth), 3)
    assert matrix.shape == (3, 3) and matrix.sum() == 0
    assert math.isnan(util.pixel_accuracy(matrix)) and math.isnan(util.mean_iou(matrix))
    assert util.iou(matrix).isnan().all()


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
    prediction = torch.zeros_like(truth)
    assert util.assignment_iou(truth, prediction, 3).tolist() == pytest.approx([1 / 3, (2 / 4) / 3], rel=1e-15)
    # The official metric leaves out void and the absent class 2, over both images: 5 / 7 for background, 0 for class 1.
    matrix = util.confusion_matrix(truth, prediction, 3)
    assert util.mean_iou(matrix) == pytest.approx((5 / 7) / 2, rel=1e-15)


def test_a_seed_repeats_the_random_numbers_of_torch_and_numpy():
    def draw(seed):
        util.seed_everything(seed)
        return torch.rand(3).tolist(), np.random.rand(3).tolist()

    assert draw(3) == draw(3)
    assert all(first != other for first, other in zip(draw(3), draw(4)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_malloc_keeps_freed_memory_for_the_next_batch_on_a_cpu():
    code = """
import re, sys, torch, processes
distributed.set_malloc_options(torch.device(sys.argv[1]))
del (block := [torch.ones(64 << 18)])[0]  # 64 MiB
print(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    kilobytes = {}
    for device in ("cpu", "cuda"):
        kilobytes[device] = int(subprocess.check_output([sys.executable, "-c", code, device], cwd=ROOT, text=True))
    assert kilobytes["cpu"] > kilobytes["cuda"] + 32 * 1024  # otherwise processes differ by a few MiB


def test_ctrl_c_is_still_ignored_in_a_background_job():
    """A shell starts its background jobs with SIGINT ignored."""
    code = "import os, signal, cli; cli.run(lambda: os.kill(os.getpid(), signal.SIGINT)); print('done')"
    ignore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=ignore)
    assert (result.returncode, result.stdout) == (0, "done\n")


def test_each_rank_and_epoch_has_its_own_random_numbers():
    def numbers(*seed):
        util.seed_epoch(*seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = numbers(0, 1, 0)
    assert numbers(0, 1, 0) == first
    for other in (numbers(1, 1, 0), numbers(0, 2, 0), numbers(0, 1, 1), numbers(2**32 - 1, 1, 0)):
        assert not set(other) & set(first)


def test_apple_gpus_get_contiguous_tensors():
    """Batch norm on channels_last tensors gives wrong gradients there (pytorch issue 175189)."""
    assert (
        distributed.memory_format("mps") is distributed.memory_format(torch.device("mps:0")) is torch.contiguous_format
    )
    assert distributed.memory_format("cpu") is distributed.memory_format("cuda:1") is torch.channels_last
