"""Metrics from one confusion matrix, the seed of a run, and errors a user can mend.

Every figure that is reported comes from one int64 confusion matrix per split. Matrices of batches, of images or of
processes add up, so the figures do not depend on how a split was cut into pieces.
"""

import argparse
import contextlib
import ctypes
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed

VOID = 255


class UserError(Exception):
    """Something the user can mend. Its text is one line: which file or flag, what is wrong, what to do."""


class Parser(argparse.ArgumentParser):
    """argparse's parser, which shows a description as it was written, and raises a UserError for a bad flag."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (--help explains the flags)")


def run(main):
    """Call ``main()`` as a command: a UserError ends it with one line and exit code 2, Ctrl-C with 130, SIGTERM 143.

    Both signals surface in ``main`` as an exception, so that it can keep what it has; a second one ends it at once.
    """
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores Ctrl-C
        signal.signal(signal.SIGINT, _stop)
    try:
        main()
        if ranks()[1] > 1:
            _leave()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # of a CPU
            print(f"error: out of memory ({reason(error)}): lower --batch-size, or size in the script", file=sys.stderr)
            sys.exit(2)
        rank, processes = ranks()
        if processes == 1 or not (isinstance(error, distributed.DistBackendError) or "gloo" in str(error)):
            raise
        print(f"error: process {rank} of {processes} stopped, since another one is gone: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # who read the output has gone, as ``head`` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python would complain at its end
        sys.exit(141)  # as a shell calls an end by SIGPIPE


def reason(error):
    """The first line of what an error says, or else its kind."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _stop(number, frame):
    """Handle a signal: the first raises an exception, the next one kills."""
    signal.signal(number, signal.SIG_DFL)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@contextlib.contextmanager
def writing(path):
    """Turn a failure to write ``path`` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}): free some space or choose another --out"
        ) from None


@contextlib.contextmanager
def replacing(path):
    """Yield a file to write bytes to, which becomes ``path`` in the end, so that ``path`` is always whole.

    Until then the file lies beside it, ended by ``.unfinished``. Where writing fails, it is taken away, and what was
    at ``path`` before stays.

    Raises:
        UserError: the file cannot be written.
    """
    unfinished = Path(f"{path}.unfinished")
    with writing(path):
        try:
            with open(unfinished, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


@contextlib.contextmanager
def appearing(folder):
    """Yield a folder to fill, which becomes ``folder`` in the end, or vanishes where that is not reached."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _leave():
    """End one of several processes, all of which have done their work."""
    if distributed.get_backend() == "nccl":
        distributed.destroy_process_group()
        return
    # gloo's teardown waits for ever (torch 2.6) or, where another process went first, now and then aborts.
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def ranks():
    """The number of this process and how many there are, 0 and 1 unless torchrun started several."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def add_up(tensor, device):
    """The sum of a tensor over all processes, on the device where they meet; all of them have to call this.

    A single process gets its own tensor back, where it is.
    """
    if ranks()[1] > 1:
        tensor = tensor.to(device, copy=True)
        distributed.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def first_process_first():
    """Let the first process do the work inside before the others, for example to write what they will read."""
    rank, processes = ranks()
    if rank > 0:
        distributed.barrier()
    yield
    if rank == 0 and processes > 1:
        distributed.barrier()


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch, and let cuDNN choose only deterministic kernels.

    On a CPU, the same seed and the same number of threads then give the same bytes in every figure.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def keep_memory(device):
    """For work on a CPU, let malloc keep what is freed for the next batch, where it is glibc's; else, change nothing.

    As it comes, glibc gives every large block back to the system, which then clears and maps each page anew, batch
    after batch. ``python benchmarks/speed.py`` measures what that costs a CPU, and how much memory this costs instead.
    """
    if device.type != "cpu":
        return
    no_trimming, no_mapping = (-1, -1), (-4, 0)  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(*no_trimming)
            libc.mallopt(*no_mapping)


def confusion_matrix(truth, prediction, num_classes):
    """Count pixels by true and by predicted class, leaving out the pixels whose truth is void.

    Args:
        truth: integer tensor of any shape, each value a class (0 .. num_classes - 1) or VOID (255).
        prediction: integer tensor of the same shape and device, each value a class.
        num_classes: C.

    Returns:
        int64 tensor [C, C] on the same device: rows truth, columns prediction. Add matrices to merge them.

    Raises:
        ValueError: the shapes differ, or a value is no class (values on a GPU are not looked at).
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth has shape {tuple(truth.shape)}, prediction {tuple(prediction.shape)}")
    values = VOID + 1  # of truth: a row for each, of which only the classes' are kept
    pairs = (truth.long() * num_classes + prediction.long()).flatten()
    if pairs.is_cuda:  # bincount and a look at the values would wait for the GPU
        counts = pairs.new_zeros(values * num_classes).scatter_add_(0, pairs, torch.ones_like(pairs))
        return counts.view(values, num_classes)[:num_classes]
    if pairs.numel() == 0:
        return pairs.new_zeros(num_classes, num_classes)
    for name, labels, largest in (("truth", truth, VOID), ("prediction", prediction, num_classes - 1)):
        low, high = (bound.item() for bound in labels.aminmax())
        if not 0 <= low <= high <= largest:
            raise ValueError(f"{name} holds values outside 0 .. {num_classes - 1}")
    counts = torch.bincount(pairs, minlength=values * num_classes).view(values, num_classes)
    if counts[num_classes:VOID].any():
        raise ValueError(f"truth holds values outside 0 .. {num_classes - 1}")
    return counts[:num_classes]


def pixel_accuracy(matrix):
    """Share of the labelled pixels that are right, ``trace / sum``: a float in [0, 1], NaN for an empty matrix."""
    return (matrix.diagonal().sum().double() / matrix.sum()).item()


def iou(matrix):
    """Intersection over union of each class, as PASCAL VOC defines it over a whole split (Everingham et al., 2010).

    ``iou[c] = C[c, c] / (row c + column c - C[c, c])`` for a confusion matrix C [C, C].

    Returns:
        float64 tensor [C] in [0, 1]; NaN for a class that is in neither truth nor prediction.
    """
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


def mean_iou(matrix):
    """Mean of ``iou(matrix)`` over the classes that have one: a float in [0, 1], NaN for an empty matrix."""
    return iou(matrix).nanmean().item()


def constant_matrix(matrix, label):
    """The confusion matrix of predicting class ``label`` everywhere, given any prediction's matrix [C, C]."""
    constant = torch.zeros_like(matrix)
    constant[:, label] = matrix.sum(1)
    return constant


def assignment_iou(truth, prediction, num_classes):
    """IoU as the assignment's own code computes it, only to be set beside its published figures.

    It departs from the official metric in three ways: void counts as background (class 0), each image is scored on its
    own, and a class that an image lacks in truth and prediction counts 0 in the mean over all classes. A perfect
    prediction of an image with two of 21 classes so scores 2/21.

    Args:
        truth: integer tensor [B, H, W], each value a class or VOID (255).
        prediction: integer tensor [B, H, W], each value a class.

    Returns:
        float64 tensor [B], one score in [0, 1] an image; the score of a split is the mean over its images.
    """
    truth = truth.masked_fill(truth == VOID, 0)
    scores = [iou(confusion_matrix(t, p, num_classes)).nan_to_num(0.0).mean() for t, p in zip(truth, prediction)]
    return torch.stack(scores)
