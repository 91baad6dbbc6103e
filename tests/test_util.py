"""The metrics against a loop over pixels, against torchmetrics and scikit-learn, and against cases counted by hand."""

import functools
import math
import platform
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
from util import VOID

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


def random_labels(num_classes, shape, seed, void=0.2):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(num_classes, shape, generator=generator)
    # half of the pixels right, so that intersections are not all tiny
    guess = torch.randint(num_classes, shape, generator=generator)
    prediction = torch.where(torch.rand(shape, generator=generator) < 0.5, truth, guess)
    truth[torch.rand(shape, generator=generator) < void] = VOID
    return truth, prediction


def by_pixel(truth, prediction, num_classes):
    """Pixel accuracy and IoU of each class by sets of pixel positions, without any matrix."""
    truth, prediction = truth.flatten().tolist(), prediction.flatten().tolist()
    counted = [k for k, label in enumerate(truth) if label != 255]
    accuracy = sum(truth[k] == prediction[k] for k in counted) / len(counted)
    ious = []
    for c in range(num_classes):
        real = {k for k in counted if truth[k] == c}
        found = {k for k in counted if prediction[k] == c}
        ious.append(len(real & found) / len(real | found) if real | found else math.nan)
    return accuracy, ious


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_classes", [2, 11, 21])
def test_agrees_with_a_loop_over_pixels(num_classes, device):
    truth, prediction = random_labels(num_classes, (3, 17, 23), seed=num_classes)
    accuracy, ious = by_pixel(truth, prediction, num_classes)
    matrix = util.confusion_matrix(truth.to(device), prediction.to(device), num_classes)
    assert matrix.dtype == torch.int64
    assert util.pixel_accuracy(matrix) == pytest.approx(accuracy, rel=1e-12)  # both are float64
    assert util.iou(matrix).tolist() == pytest.approx(ious, rel=1e-12)
    assert util.mean_iou(matrix) == pytest.approx(np.mean(ious), rel=1e-12)


def test_agrees_with_scikit_learn_and_torchmetrics():
    truth, prediction = random_labels(21, (4, 31, 29), seed=7)
    labelled = truth != VOID
    matrix = util.confusion_matrix(truth, prediction, 21)
    real, found = truth[labelled].numpy(), prediction[labelled].numpy()
    assert matrix.tolist() == sklearn.metrics.confusion_matrix(real, found, labels=range(21)).tolist()
    assert util.pixel_accuracy(matrix) == pytest.approx(sklearn.metrics.accuracy_score(real, found), rel=1e-12)
    jaccard = sklearn.metrics.jaccard_score(real, found, labels=range(21), average=None)
    assert util.iou(matrix).tolist() == pytest.approx(jaccard.tolist(), rel=1e-12)
    oracle = MulticlassJaccardIndex(21, average=None, ignore_index=VOID)
    assert util.iou(matrix).tolist() == pytest.approx(oracle(prediction, truth).tolist(), rel=1e-6)  # float32 there


def test_matrices_of_parts_add_up_to_the_matrix_of_the_whole():
    truth, prediction = random_labels(5, (6, 8, 9), seed=1)
    whole = util.confusion_matrix(truth, prediction, 5)
    parts = [util.confusion_matrix(t, p, 5) for t, p in zip(truth.split([1, 3, 2]), prediction.split([1, 3, 2]))]
    assert torch.equal(sum(parts), whole)


def test_by_hand():
    truth = torch.tensor([[0, 0, 1], [1, 1, VOID]])
    prediction = torch.tensor([[0, 1, 1], [1, 0, 2]])
    matrix = util.confusion_matrix(truth, prediction, 4)
    # class 0: hit 1 of {2 true, 2 predicted}; class 1: hit 2 of {3 true, 3 predicted}; the 2 lies on void; 3 is nowhere
    assert matrix.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert util.pixel_accuracy(matrix) == 3 / 5
    assert util.iou(matrix)[:2].tolist() == [1 / 3, 2 / 4]
    assert util.iou(matrix)[2:].isnan().all()
    assert util.mean_iou(matrix) == pytest.approx((1 / 3 + 2 / 4) / 2, rel=1e-15)


def test_a_class_only_predicted_counts_as_zero_and_one_missed_too():
    truth, prediction = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 0])
    matrix = util.confusion_matrix(truth, prediction, 4)
    assert util.iou(matrix)[:3].tolist() == [1 / 3, 0, 0]
    assert util.mean_iou(matrix) == pytest.approx(1 / 9, rel=1e-15)


@pytest.mark.parametrize("shape", [(2, 3), (0,)])
def test_nothing_labelled_gives_nan(shape):
    truth = torch.full(shape, VOID)
    matrix = util.confusion_matrix(truth, torch.zeros_like(truth), 3)
    assert matrix.sum() == 0
    assert math.isnan(util.pixel_accuracy(matrix)) and math.isnan(util.mean_iou(matrix))
    assert util.iou(matrix).isnan().all()


@pytest.mark.parametrize(
    ("truth", "prediction", "word"),
    [([0, 3], [0, 1], "truth"), ([0, -1], [0, 1], "truth"), ([0, 1], [3, 1], "prediction"), ([0, 1], [0], "shape")],
)
def test_what_is_no_class_is_refused(truth, prediction, word):
    with pytest.raises(ValueError, match=word):
        util.confusion_matrix(torch.tensor(truth), torch.tensor(prediction), 3)


def test_constant_matrix_is_the_matrix_of_a_constant_prediction():
    truth, prediction = random_labels(6, (40, 40), seed=3)
    matrix = util.confusion_matrix(truth, prediction, 6)
    expected = util.confusion_matrix(truth, torch.full_like(truth, 2), 6)
    assert torch.equal(util.constant_matrix(matrix, 2), expected)


def test_the_assignments_iou_counts_void_as_background_and_averages_over_images():
    # Image one is all background and void, and predicted so: IoU 1 for background, 0 for the two absent classes.
    # Image two is half class 1, predicted background: background 2 / 4, class 1 gets 0 / 2, class 2 is absent.
    truth = torch.tensor([[[0, VOID], [0, 0]], [[0, 0], [1, 1]]])
    scores = util.assignment_iou(truth, torch.zeros_like(truth), 3)
    assert scores.tolist() == pytest.approx([1 / 3, (2 / 4) / 3], rel=1e-15)
    # The official figure for the same: background 5 / 7 (void left out), class 1 gets 0, class 2 is nowhere.
    matrix = util.confusion_matrix(truth, torch.zeros_like(truth), 3)
    assert util.mean_iou(matrix) == pytest.approx((5 / 7) / 2, rel=1e-15)


def test_one_seed_gives_one_stream():
    draws = []
    for _ in range(2):
        util.seed_everything(3)
        draws.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))
    util.seed_everything(4)
    assert draws[0] == draws[1] != (torch.rand(3).tolist(), np.random.rand(3).tolist())


def test_a_user_error_ends_a_command_with_one_line_and_exit_code_2(capsys):
    def main():
        raise util.UserError("file.txt: is empty: fill it")

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: file.txt: is empty: fill it\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
def test_freed_memory_is_kept_for_the_next_batch():
    code = """
import re, torch, util
processes.set_malloc_options(torch.device("cpu"))
del (block := [torch.ones(64 << 18)])[0]  # 64 MiB
print(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    kilobytes = {}
    for name, line in (("kept", code), ("given back", code.replace('"cpu"', '"cuda"'))):
        kilobytes[name] = int(subprocess.check_output([sys.executable, "-c", line], cwd=ROOT, text=True))
    assert kilobytes["kept"] > kilobytes["given back"] + 32 * 1024  # runs differ by a few MiB


@pytest.mark.parametrize(("ignored", "code", "said"), [(False, 130, ""), (True, 0, "went on\n")])
def test_ctrl_c_is_ignored_where_a_shell_has_asked_for_that(ignored, code, said):
    """As shells do for what they start in the background."""
    line = "import os, signal, util; cli.run(lambda: os.kill(os.getpid(), signal.SIGINT)); print('went on')"
    before = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN) if ignored else None
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=before)
    assert (done.returncode, done.stdout) == (code, said)
