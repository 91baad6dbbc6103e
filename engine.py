"""What all experiments share: their flags, the training loop, evaluation and checkpoints."""

import argparse
import contextlib
import csv
import importlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import util
from util import VOID, UserError

ROOT = Path(__file__).resolve().parent
LARGEST = 1 << 13  # side of a network's input in pixels that a checkpoint may ask for
PACKAGES = ("torch", "torchvision", "numpy", "pillow")


def arguments(doc, epochs, batch_size=16, pretrained=False):
    """Parse the flags of an experiment.

    Args:
        doc: the script's docstring, shown by ``--help``.
        epochs, batch_size: the experiment's own defaults.
        pretrained: whether the experiment starts from pretrained weights; adds the flag ``--no-pretrained``.

    Returns:
        argparse.Namespace with data (str), epochs, batch_size, seed (int), device (torch.device), out (Path),
        resume, compile (bool), limit (int or None) and, for an experiment with pretrained weights, pretrained (bool). A
        flag that is out of range raises a UserError. Under torchrun, this process has joined the others, and device is
        its own.
    """
    parser = shared_flags(doc, epochs, batch_size, pretrained)
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="continue from last_*.pt; start where there is none")
    args = parser.parse_args()
    args.device = _join(args.device)
    return args


def _join(device):
    """Join the other processes where torchrun started several; return this one's own device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        local, number = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= number:
            raise UserError(f"--nproc-per-node: this machine has {number} GPUs: start one process a GPU at most")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"--device {device}: several processes run on cuda or cpu: choose one of these")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def shared_flags(doc, epochs=None, batch_size=None, pretrained=True):
    """An argparse parser with the flags that serve one run as well as several; see ``arguments``."""
    own = "default: the experiment's own" if epochs is None else "default: %(default)s"
    parser = util.Parser(doc)
    data = "data/VOCdevkit/VOC2007"
    parser.add_argument("--data", default=data, metavar="DIR", help="folder in VOC layout (default: %(default)s)")
    parser.add_argument("--epochs", type=whole(1), default=epochs, metavar="N", help=own)
    parser.add_argument("--batch-size", type=whole(1), default=batch_size, metavar="N", help=own)
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--out", type=Path, default=".", metavar="DIR", help="where files go (default: this folder)")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="only the first N images of each split")
    parser.add_argument("--compile", action="store_true", help="compile the network first: minutes, then faster steps")
    if pretrained:
        text = "ResNet-18 starts from random weights, for a try-out; its files get _no_pretrained in their names"
        parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help=text)
    return parser


def whole(smallest, largest=2**32 - 1):  # NumPy takes no larger seed
    """A parser of whole numbers in a range, for argparse."""

    def parse(text):
        if not text.lstrip("+-").isdecimal() or not smallest <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {smallest} to {largest}")
        return int(text)

    return parse


@contextlib.contextmanager
def fetching(weights):
    """Turn a failure to get or to read one of torchvision's WeightsEnum into a UserError that says where to put it."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        name = Path(urlsplit(weights.url).path).name
        raise UserError(
            f"{Path(torch.hub.get_dir()) / 'checkpoints' / name}: pretrained weights cannot be loaded "
            f"({util.reason(error)}): "
            f"get {weights.url} and put it there (or into hub/checkpoints of a folder named by TORCH_HOME), or try "
            "the script out with --no-pretrained"
        ) from None


def device(text):
    """The torch.device of a ``--device`` flag."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = text.partition(":")
    usable = {
        "cpu": not index,
        "cuda": torch.cuda.is_available()
        and (not index or index.isdecimal() and int(index) < torch.cuda.device_count()),
        "mps": torch.backends.mps.is_available() and not index,
    }
    if kind not in usable:
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N, mps")
    if not usable[kind]:
        raise argparse.ArgumentTypeError(f"this machine's PyTorch has no {text}: use --device cpu")
    return torch.device(text)


@dataclass
class Scores:
    """The figures of a model on one split.

    Attributes:
        loss: mean of the criterion over the labelled pixels, at the network's input size.
        matrix: int64 [C, C] on the CPU, see ``util.confusion_matrix``.
        classes: the C class names.
        assignment_iou: see ``util.assignment_iou``; mean over the images, at the network's input size. None where it
            was not asked for.
        images: int64 [N, 3, C] on the CPU: for each image its pixels of each class that were found rightly, that are
            truly the class, and that were called so. Sums of these over any choice of images give its IoU. None where
            it was not asked for.
    """

    loss: float
    matrix: torch.Tensor
    classes: tuple
    assignment_iou: float | None = None
    images: torch.Tensor | None = None

    @property
    def pixel_accuracy(self):
        return util.pixel_accuracy(self.matrix)

    @property
    def miou(self):
        return util.mean_iou(self.matrix)

    @property
    def background(self):
        """Name and Scores of predicting one class everywhere: background, or without such a class the commonest."""
        label = self.classes.index("background") if "background" in self.classes else self.matrix.sum(1).argmax().item()
        return self.classes[label], Scores(math.nan, util.constant_matrix(self.matrix, label), self.classes)

    def as_dict(self):
        """The figures as plain types for JSON, with None for NaN."""
        constant = self.background[1]
        iou = util.iou(self.matrix).tolist()
        return {
            "loss": _plain(self.loss),
            "pixel_accuracy": _plain(self.pixel_accuracy),
            "miou": _plain(self.miou),
            "iou": {name: _plain(value) for name, value in zip(self.classes, iou)},
            "background": {"pixel_accuracy": _plain(constant.pixel_accuracy), "miou": _plain(constant.miou)},
            "assignment_iou": self.assignment_iou,
        }


def _plain(number):
    return number if math.isfinite(number) else None


def _bar(iterable, total, name, unit="batch"):
    """A progress bar on stderr, one for all processes, that vanishes at its end; none where stderr is no terminal."""
    return tqdm(iterable, name, total, leave=False, disable=True if util.ranks()[0] else None, unit=unit)


def _autocast(device):
    """bfloat16 on GPUs that compute with it, float32 everywhere else: CPUs are slower with it."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def _loss(criterion, logits, masks):
    """The criterion's mean over a batch in float32, and what the mean was divided by (labelled pixels or their weight).

    Weighted by the second, the means of batches, or of processes, add up to the mean over all. Where all is void, the
    second is 0 and the first a number that does not count. Nothing here waits for a GPU.
    """
    weight = getattr(criterion, "weight", None)
    if weight is None:
        total = (masks != VOID).sum().float()
    else:
        total = functional.pad(weight, (0, VOID + 1 - len(weight)))[masks].sum()
    logits = logits.float()
    if type(criterion) is torch.nn.CrossEntropyLoss and criterion.reduction == "mean":
        # The same sum, as lists of pixels without copies, and on a CPU one image at a time, which stays in its cache.
        parts = len(masks) if masks.device.type == "cpu" else 1
        parts = zip(logits.movedim(1, -1).flatten(0, 2).chunk(parts), masks.flatten().chunk(parts))
        options = {"ignore_index": criterion.ignore_index, "label_smoothing": criterion.label_smoothing}
        sums = [functional.cross_entropy(*part, weight, reduction="sum", **options) for part in parts]
        return torch.stack(sums).sum() / total.clamp(min=1e-12), total
    masks = masks.clone()
    masks[:1, 0, 0].masked_fill_(total == 0, 0)  # a mean over no pixel would be NaN, and so would its gradients be
    return criterion(logits, masks), total


def _mean(losses, device):
    """The mean over all processes of what ``_loss`` gave for their batches, [N, 2] on the CPU; NaN without any."""
    means, totals = losses.double().T
    total, weight = util.add_up(torch.stack(((means * totals).sum(), totals.sum())), device).tolist()
    return total / weight if weight else math.nan


@torch.inference_mode()
def evaluate(model, loader, criterion, native=True, features=None):
    """Score a model on all images of a loader, each process its own batches; all get the scores of the whole.

    Args:
        model: maps images [B, 3, S, S] to logits [B, C, S, S]; left in eval mode.
        loader: a voc.Loader on the model's device.
        criterion: the loss to report.
        native: score at each mask's own resolution, logits upsampled bilinearly to it, and add the assignment's IoU
            and the counts of each image: the figures to report. Otherwise score at the loader's size, which is faster:
            for validation in training.
        features: for a model with a frozen backbone, in two parts ``encode`` and ``decode``: a dict, empty at first,
            that keeps what ``encode`` gave for each batch of this loader. Without it, nothing is kept.

    Returns:
        Scores.
    """
    model.eval()
    number, device = len(loader.classes), loader.device
    matrix = torch.zeros(number, number, dtype=torch.int64, device=device)
    losses = []
    assignment = torch.zeros(len(loader.split), dtype=torch.float64)
    counts = torch.zeros(len(loader.split), 3, number, dtype=torch.int64, device=device)
    rank, processes = util.ranks()
    batches = zip(loader.order()[0][rank::processes], loader.batches())
    with ThreadPoolExecutor() as pool:
        for places, (images, masks) in _bar(batches, -(-len(loader) // processes), f"scoring {loader.split.name}"):
            logits = _logits(model, images, features, places[0].item())
            losses.append(torch.stack(_loss(criterion, logits, masks)))
            if not native:
                matrix += util.confusion_matrix(masks, logits.argmax(1), number)
                continue
            assignment[places] = util.assignment_iou(masks.cpu(), logits.argmax(1).cpu(), number)
            truths = pool.map(loader.split.mask, places.tolist())
            # upsampling one image out of a channels_last batch is far slower
            for place, image_logits, truth in zip(places.tolist(), logits.contiguous(), truths):
                truth = torch.from_numpy(truth).to(device)
                one = util.confusion_matrix(truth, predict(image_logits, truth.shape), number)
                counts[place] = torch.stack((one.diagonal(), one.sum(1), one.sum(0)))
                matrix += one
    losses = torch.stack(losses).cpu() if losses else torch.zeros(0, 2)  # a process may have no batch
    matrix, loss = util.add_up(matrix, device).cpu(), _mean(losses, device)
    if not native:
        return Scores(loss, matrix, loader.classes)
    # Every image was filled in by one process and is 0 elsewhere: sums over processes put them together.
    assignment, counts = (util.add_up(values, device).cpu() for values in (assignment, counts))
    return Scores(loss, matrix, loader.classes, assignment.mean().item(), counts)


def _logits(model, images, features=None, key=None):
    """The logits of a batch; what a frozen backbone gave for it is kept in ``features``, see ``evaluate``."""
    with _autocast(images.device):
        if features is None or not hasattr(model, "encode"):
            return model(images)
        if key not in features:
            features[key] = model.encode(images)
        return model.decode(features[key], images.shape[-2:])


def predict(logits, shape):
    """The classes at another resolution: logits [C, S, S], upsampled bilinearly to ``shape``, then argmax.

    Returns:
        int64 tensor of the given shape [H, W].
    """
    logits = functional.interpolate(logits[None].float(), shape, mode="bilinear", align_corners=False)
    return logits.argmax(1)[0]


def fit(*, script, args, model, train, val, test, criterion, optimizer, scheduler, patience):
    """Train a model, keep its best and last state, then score the best on val and test, plot, and print a summary.

    Writes under ``args.out``, named after the script: ``best_*.pt`` (the best by mean IoU on val, scored at the
    loader's size), ``last_*.pt``, ``plots/*_*.png`` and ``results/*_seed*.csv``, ``.json`` and ``.npz``, the last with
    ``Scores.images`` of val and test.

    Args:
        script: the experiment's ``__file__``. With ``--no-pretrained``, ``_no_pretrained`` is added to its name.
        args: from ``arguments``.
        model: on ``args.device``; ``model.arguments`` holds the keyword arguments that it was made with.
        train, val, test: voc.Loaders; test may be None.
        criterion: maps logits [B, C, S, S] and masks [B, S, S] to a mean over the pixels that are not void.
        optimizer: over the model's parameters.
        scheduler: stepped once an epoch, or None.
        patience: stop after so many epochs without a better mean IoU.

    Raises:
        UserError: a file cannot be written, ``--resume`` finds another run's files, or the loss is not finite. The
            plots and checkpoints of the epochs before are kept, as they are on Ctrl-C.
    """
    stem = Path(script).stem + ("" if getattr(args, "pretrained", True) else "_no_pretrained")
    files = _Files(args.out, stem, args.seed)
    util.keep_memory(args.device)
    model.to(memory_format=torch.channels_last)
    about = _about(script, stem, args, model, train)
    history, seconds = [], 0.0
    if args.resume and files.last.exists():
        history, seconds = _restore(files, about, model, optimizer, scheduler)
        files.write_rows(history)
    _describe(files, args, model, train, val, test, criterion, len(history))
    forward = network = torch.compile(model, dynamic=False) if args.compile else model
    if util.ranks()[1] > 1:
        if args.device.type == "cuda":  # batch norm over the whole batch, as a single process has it
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        network = DistributedDataParallel(forward)
    if args.compile:
        _warm_up(model, network, forward, train, val, criterion)
    features = {}

    try:
        epochs = range(len(history) + 1, args.epochs + 1)
        for epoch in _bar(epochs, len(epochs), files.stem, unit="epoch"):
            if history and len(history) - _best(history)["epoch"] >= patience:
                _say(f"no better mean IoU for {patience} epochs: stopping early")
                break
            began = time.perf_counter()
            rate = optimizer.param_groups[0]["lr"]
            train_loss = _train(network, train, epoch, criterion, optimizer)
            scores = evaluate(forward, val, criterion, native=False, features=features)
            row = {
                "epoch": epoch,
                "learning_rate": rate,
                "train_loss": train_loss,
                "val_loss": scores.loss,
                "val_pixel_accuracy": scores.pixel_accuracy,
                "val_miou": scores.miou,
            }
            # The best is written before the last: a kill between the two repeats the epoch and finds the same best.
            if _best([*history, row]) is row:
                found = {"epoch": epoch, "val_miou": scores.miou, "val_matrix": scores.matrix}
                _save(about | found | {"model": model.state_dict()}, files.best)
            if scheduler is not None:
                scheduler.step()
            took = time.perf_counter() - began
            seconds += took
            _save(about | _progress([*history, row], seconds, model, optimizer, scheduler), files.last)
            history.append(row)
            files.write_rows(history)
            _say(_line(history, args.epochs, took, scores))
        _finish(files, about, args.device, history, seconds, train, val, test, criterion)
    except BaseException:
        _keep(files, history, train, val)
        raise


def _warm_up(model, network, forward, train, val, criterion):
    """Take a step on made-up batches of every size to come, so that no epoch pays for compiling; change nothing."""
    began = time.perf_counter()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rank, processes = util.ranks()
    with torch.random.fork_rng():
        for loader in (train, val):
            model.train(loader.training)
            step = processes if loader.training else 1  # training shares out each batch, scoring whole batches
            for number in sorted({len(places[rank % step :: step]) for places in loader.order()[0]}):
                images = loader.normalise(loader.images[:1].expand(number, -1, -1, -1))
                masks = torch.zeros(number, loader.size, loader.size, dtype=torch.int64, device=loader.device)
                if loader.training:
                    _loss(criterion, _logits(network, images), masks)[0].backward()
                else:
                    with torch.inference_mode():
                        _logits(forward, images)
    model.zero_grad()
    model.load_state_dict(state)
    _say(f"compiled in {time.perf_counter() - began:.1f} s, which the times of the epochs leave out")


def _train(network, loader, epoch, criterion, optimizer):
    """Take one step a batch; return the mean loss over the epoch's labelled pixels.

    Raises:
        UserError: the loss or the gradient of a batch is not finite. No weight that comes of it outlives this: the
            caller has the epochs before on disk.
    """
    network.train()
    batches = _bar(loader.batches(epoch), len(loader), f"epoch {epoch}")
    steps = [torch.stack(_step(network, images, masks, criterion, optimizer)) for images, masks in batches]
    steps = torch.stack(steps).cpu()  # only now, so that no step waits for a GPU
    _check(steps, loader, epoch)
    return _mean(steps[:, :2], loader.device)


def _step(network, images, masks, criterion, optimizer):
    """Train on one batch; return what ``_loss`` does and the gradient's norm.

    A function of its own, so that no large tensor outlives its step.
    """
    optimizer.zero_grad()
    loss, total = _loss(criterion, _logits(network, images), masks)
    # Processes average their gradients: so weighted, the average is the gradient of the whole batch's mean.
    share = util.ranks()[1] * total / util.add_up(total, images.device).clamp(min=1e-12)
    (loss * share).backward()
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    )
    optimizer.step()
    return loss.detach(), total, norm


def _check(steps, loader, epoch):
    """Raise a UserError that names the first of an epoch's batches whose loss or gradient is not finite, if any.

    ``steps`` [N, 3] holds what ``_step`` returned for each.
    """
    losses, _, norms = steps.T
    finite = losses.isfinite() & norms.isfinite()
    if finite.all():
        return
    batch = int(finite.int().argmin())
    what, value = ("gradient", norms[batch]) if losses[batch].isfinite() else ("loss", losses[batch])
    places = loader.order(epoch)[0][batch] % len(loader.split)
    ids = ", ".join(loader.split.ids[place] for place in places[:8]) + (", ..." if len(places) > 8 else "")
    before = losses[:batch]
    if batch and before.max() > 10 * before[0].abs():
        hint = f"the losses before grew from {before[0]:.3g} to {before.max():.3g}: lower the learning rate"
    else:
        hint = "the losses before did not grow: look at these images, at the network and at the loss"
    raise UserError(f"the {what} is {value} in epoch {epoch}, batch {batch + 1} of {len(steps)} (images {ids}): {hint}")


def _best(history):
    """The row of the epoch with the highest mean IoU on val, the first of equals."""
    return max(history, key=lambda row: row["val_miou"])


class _Files:
    """The paths of a run's files, in folders that exist."""

    def __init__(self, out, stem, seed):
        self.stem, self.plots = stem, out / "plots"
        self.best, self.last = out / f"best_{stem}.pt", out / f"last_{stem}.pt"
        results = (out / "results" / f"{stem}_seed{seed}.{kind}" for kind in ("csv", "json", "npz"))
        self.rows, self.figures, self.images = results
        for folder in (self.plots, self.figures.parent, out):
            with util.writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()  # rather now than after the first epoch

    def plot(self, name):
        return self.plots / f"{self.stem}_{name}.png"

    def write_rows(self, history):
        if util.ranks()[0] > 0:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        with util.replacing(self.rows) as file:
            file.write(text.getvalue().encode())


def _save(state, path):
    """Write a checkpoint; of several processes, the first does."""
    if util.ranks()[0] == 0:
        whole = io.BytesIO()  # given a file, torch.save tells of a full disk in other ways than OSError
        torch.save(state, whole)
        with util.replacing(path) as file:
            file.write(whole.getbuffer())


def _about(script, stem, args, model, loader):
    """What a checkpoint tells a stranger about where it comes from, and ``load`` about how to rebuild the model."""
    module = type(model).__module__
    return {
        "experiment": stem,
        "script": Path(script).read_text(encoding="utf-8"),
        "flags": {
            name: value if isinstance(value, (int, type(None))) else str(value) for name, value in vars(args).items()
        },
        "seed": args.seed,
        "dataset": _dataset(loader),
        "classes": list(loader.classes),
        "size": loader.size,
        "mean": list(loader.mean),
        "std": list(loader.std),
        "module": Path(script).stem if module == "__main__" else module,
        "class": type(model).__name__,
        "arguments": model.arguments,
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
    }


def _dataset(loader):
    return loader.split.root.resolve().name


def _progress(history, seconds, model, optimizer, scheduler):
    """All that an exact continuation needs, in types that ``weights_only`` loads."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "epoch": len(history),
        "history": history,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "random": {
            "python": random.getstate(),
            "numpy": numpy_state,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    }


def _restore(files, about, model, optimizer, scheduler):
    """Put the state of ``last_*.pt`` back; return its history and seconds. UserError where it is from another run."""
    state = _read(files.last, "history")
    try:
        _compare(files, state, about, schedule=scheduler is not None)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
        streams = state["random"]
        random.setstate(streams["python"])
        np.random.set_state(streams["numpy"])
        torch.set_rng_state(streams["torch"])
        if torch.cuda.is_available() and len(streams["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(streams["cuda"])
        return list(state["history"]), float(state["seconds"])
    except UserError:
        raise
    except Exception as error:  # what is missing or of another kind surfaces as one of many types
        raise UserError(f"{files.last}: is of another model or optimizer ({util.reason(error)}): start anew") from None


def _compare(files, state, about, schedule):
    """Raise a UserError that names the first thing in which a run differs from the one that it is to continue."""
    flags = ["seed", "batch_size", "limit"] + ["epochs"] * schedule
    for name in [*flags, "dataset", "classes", "size"]:
        before, now = (source["flags"][name] if name in flags else source[name] for source in (state, about))
        if before != now:
            raise UserError(f"{files.last}: its run had {name} {before}, not {now}: resume with the same or start anew")
    for before, now in itertools.zip_longest(state["script"].splitlines(), about["script"].splitlines()):
        if before != now:
            raise UserError(f"{files.last}: its script had {before!r}, not {now!r}: resume with the same or start anew")
    done, epochs = len(state["history"]), about["flags"]["epochs"]
    if done > epochs:
        raise UserError(f"{files.last}: its run has {done} epochs, more than {epochs}: raise --epochs or start anew")
    if not files.best.exists():
        raise UserError(f"{files.best}: is gone, so {files.last} cannot be continued: start anew without --resume")


def _read(path, key):
    """The content of a checkpoint, which must hold ``key``; UserError for a file that is none of ours."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: train a model first, or correct the path") from None
    except Exception as error:  # a broken archive surfaces as one of many types
        text = f"is no readable checkpoint ({util.reason(error)}): give a best_*.pt of this project"
        raise UserError(f"{path}: {text}") from None
    if not isinstance(state, dict) or not {"module", "class", "arguments", "model", "classes", key} <= state.keys():
        raise UserError(f"{path}: was not written by this project: give a best_*.pt of this project")
    return state


def load(path, device="cpu"):
    """Load the model of a checkpoint, ready to predict.

    The model's class is looked up by the names in the checkpoint among the project's own top-level files only, and the
    file is read with ``weights_only``: a checkpoint from a stranger can run no code of its own.

    Returns:
        the model in eval mode on ``device``, in channels_last, with the attributes ``classes`` (tuple of names),
        ``size`` (side in pixels of the square that photos are squeezed to), ``mean`` and ``std`` (its normalisation).

    Raises:
        UserError: the file is missing, unreadable or not ours, or its model is not in this project.
    """
    state = _read(path, "size")
    name, kind = state["module"], state["class"]
    missing = UserError(f"{path}: holds a model {kind} of {name}.py, which is not in {ROOT}: put that file there")
    if not str(name).isidentifier() or not (ROOT / f"{name}.py").is_file():
        raise missing
    model_class = getattr(importlib.import_module(name), str(kind), None)
    if not (isinstance(model_class, type) and issubclass(model_class, torch.nn.Module)):
        raise missing
    try:
        with torch.device("meta"):  # the weights come from the file: nothing to draw or to allocate
            model = model_class(**state["arguments"])
        model.load_state_dict(state["model"], assign=True)
        model.classes, model.size = tuple(map(str, state["classes"])), state["size"]
        model.mean, model.std = (tuple(map(float, state[name])) for name in ("mean", "std"))
        if len(model.classes) != state["arguments"]["num_classes"] or not len(model.mean) == len(model.std) == 3:
            raise ValueError("classes, mean or std do not fit the network")
        if not 0 < model.size <= LARGEST:
            raise ValueError(f"its size is {model.size}")
    except Exception as error:  # what is missing or of another kind surfaces as one of many types
        raise UserError(
            f"{path}: does not fit {kind} in {name}.py ({util.reason(error)}): was that file changed since?"
        ) from None
    return model.eval().to(device, memory_format=torch.channels_last)


def _say(text):
    """Print a line, once of all processes, without tearing the progress bars, at once also into a file or a pipe."""
    if util.ranks()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


def _describe(files, args, model, train, val, test, criterion, epochs_done):
    """Print what is about to run."""
    images = ", ".join(f"{len(loader.split)} {loader.split.name}" for loader in (train, val, test) if loader)
    if train.copies > 1:
        images += f" (an epoch shows each train image {train.copies} times)"
    _say(f"{files.stem}: {_dataset(train)}, {images} images, {len(train.classes)} classes, {train.size}x{train.size}")
    network = f"{type(model).__name__}, {_parameters(model):,} parameters"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trained < _parameters(model):
        network += f" ({trained:,} of them trained)"
    _say(f"{network}, batch {args.batch_size}, seed {args.seed}, device {args.device}")
    if getattr(criterion, "weight", None) is not None:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(train.classes, criterion.weight.tolist()))
        _say(f"class weights of the loss: {weights}")
    counts = torch.bincount(val.masks.flatten().cpu(), minlength=256)[: len(val.classes)]
    name, constant = Scores(math.nan, torch.diag(counts), val.classes).background
    floor = f"pixel accuracy {constant.pixel_accuracy:.4f}, mean IoU {constant.miou:.4f}"
    _say(f"the score to beat, {name} everywhere: {floor}")
    _say(f"scores of each epoch: val at {val.size}x{val.size}; in the end: the best epoch at the masks' own sizes")
    if test is None:
        _say(f"{train.split.root} has no test.txt: the final scores are on val, which also chose the best epoch")
    if epochs_done:
        _say(f"continuing {files.last} after epoch {epochs_done}")
    elif args.resume:
        _say(f"no {files.last} yet: starting")


def _parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def _multiply_adds(model):
    """Multiplications with an addition that one image of the model's size takes, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode  # as above

    image = torch.zeros(1, 3, model.size, model.size, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2


def _line(history, epochs, took, scores):
    """One line on the epoch that just ended."""
    row, best = history[-1], _best(history)
    beaten = scores.miou > scores.background[1].miou
    return (
        f"epoch {row['epoch']:{len(str(epochs))}d}/{epochs}  loss {row['train_loss']:.4f} (val {row['val_loss']:.4f})  "
        f"pixel accuracy {row['val_pixel_accuracy']:.4f}  mean IoU {row['val_miou']:.4f} "
        f"(best {best['val_miou']:.4f}, epoch {best['epoch']})  {took:.1f} s"
        + ("" if beaten else f"  no better than all {scores.background[0]}")
    )


def _plot(files, history, train, val, model, best, scores):
    """Draw the pictures of a run.

    Args:
        model: of the best epoch.
        best: the number of that epoch.
        scores: dict from a name, such as "val" or "test", to the model's Scores, that of val first.
    """
    import plotting  # only here: it takes time and memory that no training should wait or pay for

    name, val_scores = next(iter(scores.items()))
    title = f"{files.stem} on {_dataset(val)}"
    chosen = torch.linspace(0, len(val.split) - 1, min(5, len(val.split))).round().long()
    with torch.inference_mode():
        logits = model(val.normalise(val.images[chosen])).contiguous()
    rows = []
    for index, image_logits in zip(chosen.tolist(), logits):
        truth = val.split.mask(index)
        prediction = predict(image_logits, truth.shape).cpu().numpy()
        rows.append((val.split.ids[index], np.asarray(val.split.photo(index)), truth, prediction))
    plotting.curves(
        files.plot("curves"), f"{title}, val at {val.size}x{val.size}", history, best, val_scores.background
    )
    plotting.class_iou(files.plot("iou"), f"{title}, epoch {best}", val.classes, scores)
    plotting.confusion(files.plot("confusion"), f"{title}, {name}, epoch {best}", val.classes, val_scores.matrix)
    plotting.predictions(files.plot("predictions"), f"{title}, val, epoch {best}", val.classes, rows)
    if train.augment is not None:
        images, masks = train.augmented(16)
        images, masks = images.permute(0, 2, 3, 1).cpu().numpy(), masks.cpu().numpy()
        plotting.samples(files.plot("augmentation"), f"{title}, train", train.classes, images, masks)


def _keep(files, history, train, val):
    """After a stop by Ctrl-C or an error: draw what there is, and say what is kept."""
    if util.ranks()[0] > 0:
        return
    if not history:
        _say(f"{files.stem}: stopped before its first epoch ended, so there is nothing to keep")
        return
    drawn = ""
    try:
        best = _read(files.best, "val_matrix")
        scores = {f"val at {val.size}x{val.size}": Scores(math.nan, best["val_matrix"], val.classes)}
        _plot(files, history, train, val, load(files.best, val.device), best["epoch"], scores)
        drawn = f", drew {files.plot('*')}"
    except (UserError, RuntimeError) as error:  # the reason for the stop, such as a full disk, matters more
        _say(util.reason(error))
    kept = [str(path) for path in (files.best, files.last) if path.exists()]
    _say(
        f"{files.stem}: stopped after epoch {len(history)}; kept {' and '.join(kept) or 'nothing'}{drawn}"
        + (": the same command with --resume continues" if len(kept) == 2 else "")
    )


def _finish(files, about, device, history, seconds, train, val, test, criterion):
    """Score the best checkpoint at the masks' own sizes; write the figures and plots, print tables and paths."""
    with util.first_process_first():  # it wrote the file
        model = load(files.best, device)
    scores = {loader.split.name: evaluate(model, loader, criterion) for loader in (val, test) if loader is not None}
    if util.ranks()[0] > 0:
        return
    figures = {
        "experiment": files.stem,
        "dataset": about["dataset"],
        "seed": about["seed"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "epochs": len(history),
        "best_epoch": _best(history)["epoch"],
        "parameters": _parameters(model),
        "multiply_adds": _multiply_adds(model),
        "seconds": round(seconds, 3),
        "flags": {name: about["flags"][name] for name in ("epochs", "batch_size", "limit")},
        "versions": about["versions"],
        "val": scores["val"].as_dict(),
        "test": scores["test"].as_dict() if test is not None else None,
    }
    with util.replacing(files.images) as file:
        np.savez_compressed(file, **{name: result.images.numpy() for name, result in scores.items()})
    with util.replacing(files.figures) as file:
        file.write(json.dumps(figures, indent=2, allow_nan=False).encode() + b"\n")
    _plot(files, history, train, val, model, figures["best_epoch"], scores)
    _say(_table(scores, val.classes))
    for name, result in scores.items():
        constant_name, constant = result.background
        if not result.miou > constant.miou:
            _say(f"warning: on {name} this is no better than predicting {constant_name} everywhere")
    _say(f"\nplots       {files.plot('*')}\ncheckpoint  {files.best}\nfigures     {files.figures}, {files.rows}")
    summary = ", ".join(f"{name} mean IoU {result.miou:.4f}" for name, result in scores.items())
    _say(f"{files.stem} seed {about['seed']}: {summary} (best of {len(history)} epochs: {_best(history)['epoch']})")


def _table(scores, classes):
    """The final figures as text: IoU of each class, then the totals beside those of a constant prediction."""
    columns = [result.as_dict() for result in scores.values()]
    constant = next(iter(scores.values())).background[0]

    def row(name, values):
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        return f"{name:34}" + "".join(f" {cell:>9}" for cell in cells)

    lines = ["", f"{'IoU of class':34}" + "".join(f" {name:>9}" for name in scores)]
    lines += [row(f"  {name}", [column["iou"][name] for column in columns]) for name in classes]
    for name, key in (("mean IoU", "miou"), ("pixel accuracy", "pixel_accuracy")):
        lines.append(row(name, [column[key] for column in columns]))
        lines.append(row(f"  of {constant} everywhere", [column["background"][key] for column in columns]))
    lines.append(row("loss", [column["loss"] for column in columns]))
    lines.append(row("the assignment's own IoU", [column["assignment_iou"] for column in columns]))
    return "\n".join(lines)
