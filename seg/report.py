"""What a run prints and writes about itself: its description, a line per epoch, metrics, tables and plots.

``Run`` reads the metrics of a finished run.
"""

import contextlib
import csv
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import util
from seg import checkpoint, distributed, files, html
from util import Scores, UserError

LINE_INTERVAL = 30  # seconds without a line after which ``progress`` prints one
INTERVALS = {"curves": 20, "predictions": 60}  # seconds between two drawings during a run
DRAWING_SHARE = 0.01  # of a run's time, for each of the two
FIRST_COST = 2  # seconds that a drawing is expected to take before the first
NUM_SHOWN, NUM_PAGED = 5, 13  # images in the plot of predictions and in the HTML report, besides best, median, worst

_last_line = time.perf_counter()


def progress(iterable, total, name, unit="batch", status=lambda: ""):
    """Yield from ``iterable`` with a progress bar on stderr, which disappears at its end, in the main process.

    If stderr is not a terminal, print a line instead whenever nothing was printed for 30 seconds. ``status()`` is shown
    with either; it is called at most once per second.
    """
    bar = tqdm(iterable, name, total, leave=False, unit=unit, disable=None if distributed.is_main() else True)
    shown = time.perf_counter()
    for done, item in enumerate(bar, 1):
        yield item
        now = time.perf_counter()
        if not distributed.is_main():
            continue
        if bar.disable and now - _last_line > LINE_INTERVAL:
            log(f"{name}: {done}/{total}  {status()}".rstrip())
        elif not bar.disable and now - shown > 1:
            bar.set_postfix_str(status(), refresh=False)
            shown = now


def log(text):
    """Print a line in the main process, without breaking the progress bars, and flush it."""
    global _last_line
    if distributed.is_main():
        tqdm.write(text)
        sys.stdout.flush()
        _last_line = time.perf_counter()


def size_text(size):
    """The size (height, width) as text, width first as usual for photos."""
    height, width = size
    return f"{width}x{height}"


def history_row(epoch, learning_rates, train, val):
    """The row of an epoch in the history: a dict of plain types, to which ``fit`` adds its seconds.

    ``learning_rates`` is a list with one list per batch, which holds the rate of each parameter group; ``train`` and
    ``val`` are Scores.
    """
    row = {"epoch": epoch}
    for group, rate in enumerate(learning_rates[0], 1):
        row["learning_rate" if group == 1 else f"learning_rate_{group}"] = rate
    for name, scores in (("train", train), ("val", val)):
        row |= {f"{name}_{metric}": getattr(scores, metric) for metric in ("loss", "pixel_accuracy", "miou")}
    changes = any(rates != learning_rates[0] for rates in learning_rates)
    return row | {"batch_learning_rates": learning_rates if changes else learning_rates[:1]}


def loss_name(criterion):
    """The criterion's name; a weighted loss cannot be compared with others."""
    name = getattr(criterion, "__name__", type(criterion).__name__)
    return name + (", weighted by class" if util.class_weights(criterion) is not None else "")


def num_parameters(model):
    """The number of parameters, without those of averages of the weights."""
    averages = [module for module in model.modules() if isinstance(module, AveragedModel)]
    copies = {id(parameter) for average in averages for parameter in average.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in copies)


class Report:
    """What a run prints and writes about itself, in the main process.

    ``predict(model, loader, index, shape)`` returns the predicted mask, uint8 [H, W], of an image of a loader. The
    other parameters are those of ``engine.fit``.
    """

    def __init__(self, run_files, args, criterion, train, val, test, predict):
        # not at the top: wrong flags are reported without waiting for Matplotlib
        from seg import plotting  # before the first epoch, after which a signal could leave Matplotlib half imported

        self.plotting = plotting
        self.files, self.args, self.criterion, self.predict = run_files, args, criterion, predict
        self.train, self.val, self.test = train, val, test
        self.title = f"{run_files.experiment}{args.idea and ': '}{args.idea}, {val.split.dataset}"
        if args.limit:
            self.title += f" (first {args.limit} images)"
        self.start_time = time.perf_counter()
        self.drawn = {}  # by plot, during the run: the time of the last drawing, and what it took
        self.can_draw = True
        self.predicted_epoch = None

    def start(self, model, history, stopping, warnings):
        """Print what is about to run. ``stopping`` says when it ends, ``warnings`` is from ``sanity.check``."""
        args, train, val, test = self.args, self.train, self.val, self.test
        images = ", ".join(f"{len(loader.split)} {loader.split.name}" for loader in (train, val, test) if loader)
        if train.repeats > 1:
            images += f" (an epoch shows each train image {train.repeats} times)"
        sizes = dict.fromkeys(size_text(loader.size) for loader in (train, val))
        images += f" images at {' and '.join(sizes)}"
        log(f"{self.files.experiment}: {train.split.dataset}, {images}, {len(train.classes)} classes")
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        network = f"{type(model).__name__}, {num_parameters(model):,} parameters ({trained:,} trainable)"
        log(f"{network}, batch {args.batch_size}, seed {args.seed}, device {distributed.device_name(args.device)}")
        if util.class_weights(self.criterion) is not None:
            weights = zip(train.classes, self.criterion.weight.tolist())
            log(f"class weights of the loss: {', '.join(f'{name} {weight:.2f}' for name, weight in weights)}")
        name, baseline = util.baseline_name(val.classes), val.baseline
        log(f"{name} on val: pixel accuracy {baseline.pixel_accuracy:.4f}, mean IoU {baseline.miou:.4f}")
        size = size_text(val.size)
        log(f"val is evaluated at {size} after each epoch, and at full resolution at the end; {stopping}")
        if test is None:
            log(f"{train.split.root} has no test.txt: the results are on val, which also selects the best epoch")
        if args.compile:
            log("the first epoch includes the time of torch.compile")
        for warning in warnings:
            log(f"warning: {warning}")
        if history:
            log(f"continuing {self.files.last} after epoch {len(history)}")
            self._write_history(history)
        elif args.resume:
            log("nothing to resume: starting")

    def epoch(self, history, best):
        """After an epoch: write the CSV, print a line, and redraw plots. ``best`` is the row of the best epoch."""
        row, epochs = history[-1], self.args.epochs
        self._write_history(history)
        name = util.baseline_name(self.val.classes)
        warning = "" if row["val_miou"] > self.val.baseline.miou else f"  not above the {name}"
        log(
            f"epoch {row['epoch']:{len(str(epochs))}d}/{epochs}  loss {row['train_loss']:.4f} "
            f"(val {row['val_loss']:.4f})  pixel accuracy {row['val_pixel_accuracy']:.4f}  "
            f"mean IoU {row['val_miou']:.4f} (best {best['val_miou']:.4f}, epoch {best['epoch']})  "
            f"{row['seconds']:.1f} s{warning}"
        )
        if distributed.is_main() and self.can_draw:
            try:
                self._draw_during_run(history, best["epoch"])
            except Exception as error:  # such as a full disk: training may go on
                log(f"warning: the plots are not updated any more ({util.reason(error)})")
                self.can_draw = False

    def stop(self, history):
        """After Ctrl-C or an error: draw the plots of the epochs before, and print what is kept."""
        if not history:
            log(f"{self.files.experiment}: stopped before the end of its first epoch: there is nothing to keep")
        if not history or not distributed.is_main():
            return
        plots = ""
        try:
            best = checkpoint.read(self.files.best, "val_matrix")
            model = checkpoint.load(self.files.best, self.args.device)
            scores = Scores(math.nan, best["val_matrix"], self.val.classes)
            self._draw_all(model, history, best["epoch"], {f"val at {size_text(self.val.size)}": scores})
            plots = f", drew {self.files.plot('*')}"
        except Exception as error:  # the reason for the stop, such as a full disk, matters more
            log(f"warning: the plots were not drawn ({util.reason(error)})")
        kept = [str(path) for path in (self.files.best, self.files.last) if path.exists()]
        resume = "--resume instead of --overwrite" if self.args.overwrite else "--resume"
        advice = f": the same command with {resume} continues" if len(kept) == 2 else ""
        text = " and ".join(kept) or "nothing"
        log(f"{self.files.experiment}: stopped after epoch {len(history)}; kept {text}{plots}{advice}")

    def finish(self, metadata, model, history, best, scores):
        """At the end: write metrics and plots; print tables and paths.

        ``model`` is that of the epoch whose row is ``best``, ``scores`` maps splits to its Scores, val first.
        """
        if not distributed.is_main():
            return
        epoch = best["epoch"]
        metrics = self._write_metrics(metadata, model, history, epoch, scores)
        log(_table(scores, self.val.classes))
        for name, result in scores.items():
            if not result.miou > result.baseline.miou:
                log(f"warning: on {name} the mean IoU is not above the {util.baseline_name(self.val.classes)}")
        self._draw_all(model, history, epoch, scores)
        self._write_html(metadata, metrics, model, history, scores["val"].image_ious)
        log(f"\nreport      {self.files.report}\nplots       {self.files.plot('*')}\ncheckpoint  {self.files.best}")
        log(f"metrics     {self.files.metrics}, {self.files.history}")
        summary = ", ".join(f"{name} mean IoU {result.miou:.4f}" for name, result in scores.items())
        log(f"{self.files.experiment} seed {self.args.seed}: {summary} (epoch {epoch} of {len(history)})")

    def _write_history(self, history):
        """Write the CSV, a row per epoch. It holds no times: the same seed gives the same file."""
        if distributed.is_main():
            left_out = ("batch_learning_rates", "seconds")
            rows = [{name: value for name, value in row.items() if name not in left_out} for row in history]
            lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
            with files.atomic_write(self.files.history) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())

    def _write_metrics(self, metadata, model, history, epoch, scores):
        """Write the JSON of a finished run, the results of the best ``epoch``; return its content."""
        device = self.args.device
        metrics = {
            "experiment": self.files.experiment,
            "idea": self.args.idea,
            "dataset": metadata["dataset"],
            "seed": metadata["seed"],
            "device": distributed.device_name(device),
            "epochs": len(history),
            "best_epoch": epoch,
            "loss": loss_name(self.criterion),
            "parameters": num_parameters(model),
            "multiply_adds": _multiply_adds(model, device),
            "seconds": round(sum(row["seconds"] for row in history), 3),
            "epoch_seconds": [row["seconds"] for row in history],
            "flags": {name: metadata["flags"][name] for name in ("epochs", "batch_size", "limit")},
            "defaults": metadata["defaults"],
            "versions": metadata["versions"],
            "val": scores["val"].as_dict(),
            "test": scores["test"].as_dict() if "test" in scores else None,
            "size": metadata["size"],
            "data_sha256": metadata["data_sha256"],
            "code": metadata["code"],
        }
        with files.atomic_write(self.files.metrics) as file:
            file.write(json.dumps(metrics, indent=2, allow_nan=False).encode() + b"\n")
        return metrics

    def _write_html(self, metadata, metrics, model, history, image_ious):
        """Write the HTML report of a finished run; ``metrics`` is from ``_write_metrics``."""
        chosen = self._choose_images(NUM_PAGED, image_ious)
        samples = zip(chosen.items(), self._samples(model, list(chosen), "writing the report"))
        samples = (
            (", ".join([self.val.split.ids[index], *ranks]), image_ious[index].item(), *sample)
            for (index, ranks), sample in samples
        )
        html.write_run(self.files, self.title, metrics, history, samples, metadata)

    def _choose_images(self, count, image_ious):
        """Choose images of val, evenly spaced, and the best, the median and the worst.

        Returns a dict from the image's index to which of the three it is, a list of str.
        """
        num_images = len(self.val.split)
        evenly_spaced = np.linspace(0, num_images - 1, min(count, num_images)).round().astype(int).tolist()
        chosen = {index: [] for index in evenly_spaced}
        if image_ious is not None:
            ranked = [index for index in image_ious.argsort().tolist() if not image_ious[index].isnan()]
            for rank, place in (("best", -1), ("median", len(ranked) // 2), ("worst", 0)) if ranked else ():
                chosen.setdefault(ranked[place], []).append(rank)
        return chosen

    def _samples(self, model, indices, description):
        """Yield photo, mask and prediction of some val images, at the size of a thumbnail."""
        split = self.val.split
        for index in progress(indices, len(indices), description, "photo"):
            photo, mask = self.plotting.thumbnail(split.photo(index), split.mask(index))
            yield photo, mask, self.predict(model, self.val, index, mask.shape)

    def _draw_during_run(self, history, best_epoch):
        """Redraw the curves, and the predictions if there is a better epoch, when it is time to.

        The first curves are drawn in any case.
        """
        if not self.drawn or self._is_due("curves"):
            with self._timed("curves"):
                self._draw_curves(history, best_epoch)
        if best_epoch != self.predicted_epoch and self._is_due("predictions"):
            with self._timed("predictions"):
                self._draw_predictions(checkpoint.load(self.files.best, self.args.device), best_epoch)
            self.predicted_epoch = best_epoch

    def _is_due(self, name):
        """Whether a plot's interval since its last drawing has passed, and it keeps to its share of the time."""
        last, cost = self.drawn.get(name, (self.start_time, FIRST_COST))
        return time.perf_counter() - last >= max(INTERVALS[name], cost / DRAWING_SHARE)

    @contextlib.contextmanager
    def _timed(self, name):
        start = time.perf_counter()
        yield
        now = time.perf_counter()
        self.drawn[name] = now, now - start

    def _draw_all(self, model, history, epoch, scores):
        """Draw all plots. ``scores`` maps splits to the Scores of the best ``epoch``, val first."""
        name, val_scores = next(iter(scores.items()))
        title, classes, train = f"{self.title}, epoch {epoch}", self.val.classes, self.train
        self._draw_curves(history, epoch)
        self.plotting.class_iou(self.files.plot("iou"), title, classes, scores)
        self.plotting.confusion(self.files.plot("confusion"), f"{title}, {name}", classes, val_scores.matrix)
        self._draw_predictions(model, epoch, val_scores.image_ious)
        if train.augment is not None:
            images, masks = train.augmented_samples(16)
            images, masks = images.permute(0, 2, 3, 1).cpu().numpy(), masks.cpu().numpy()
            self.plotting.samples(self.files.plot("augmentation"), f"{self.title} train", train.classes, images, masks)

    def _draw_curves(self, history, best_epoch):
        title = f"{self.title}, at {size_text(self.val.size)}"
        weighted = util.class_weights(self.criterion) is not None
        self.plotting.curves(self.files.plot("curves"), title, history, best_epoch, self.val.baseline, weighted)

    def _draw_predictions(self, model, epoch, image_ious=None):
        """Draw predictions for the images of ``_choose_images``."""
        chosen = self._choose_images(NUM_SHOWN, image_ious)
        names = [
            "\n".join([self.val.split.ids[index], *(f"{rank}, mean IoU {image_ious[index]:.2f}" for rank in ranks)])
            for index, ranks in chosen.items()
        ]
        samples = self._samples(model, list(chosen), "drawing predictions")
        samples = [(name, *sample) for name, sample in zip(names, samples)]
        title = f"{self.title} val, epoch {epoch}"
        self.plotting.predictions(self.files.plot("predictions"), title, self.val.classes, samples)


def _multiply_adds(model, device):
    """Multiply-adds of a forward pass on one image of the model's size, as PyTorch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # only here: it takes long to import

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is not counted, nor is attention in one kernel
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(torch.zeros(1, 3, *model.size, device=device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


def _table(scores, classes):
    """The results as text: IoU of each class, then mean IoU and pixel accuracy next to those of the baseline."""
    columns = [result.as_dict() for result in scores.values()]

    def row(name, values):
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        return f"{name:34}" + "".join(f" {cell:>9}" for cell in cells)

    lines = ["", f"{'IoU per class':34}" + "".join(f" {name:>9}" for name in scores)]
    lines += [row(f"  {name}", [column["iou"][name] for column in columns]) for name in classes]
    for name, key in (("mean IoU", "miou"), ("pixel accuracy", "pixel_accuracy")):
        lines.append(row(name, [column[key] for column in columns]))
        lines.append(row(f"  {util.baseline_name(classes)}", [column["background"][key] for column in columns]))
    lines.append(row("loss", [column["loss"] for column in columns]))
    lines.append(row("the assignment's IoU", [column["assignment_iou"] for column in columns]))
    return "\n".join(lines)


@dataclass
class Run:
    """A run: the metrics of its JSON, its history, a list of dicts with one per epoch, and the JSON's path."""

    metrics: dict
    history: list
    path: Path | None = None

    @classmethod
    def read(cls, path):
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
                history = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            metrics["experiment"], metrics["epochs"], metrics["defaults"]
            metrics["val"]["miou"], metrics["flags"]["limit"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: was not written by a run ({error!r}): delete it and run again") from None
        return cls(metrics, history, path)

    @property
    def splits(self):
        """The splits with results; experiments are compared on the last."""
        return ("val",) if self.metrics["test"] is None else ("val", "test")

    @property
    def machine(self):
        """Its device and PyTorch's version, as text."""
        return f"{self.metrics['device']}, torch {self.metrics['versions']['torch']}"

    @property
    def report(self):
        """The path of its HTML report, which may not exist."""
        return self.path.parents[1] / "plots" / f"{self.metrics['experiment']}_report.html"

    @property
    def classes(self):
        return tuple(self.metrics["val"]["iou"])

    @property
    def baseline_name(self):
        return util.baseline_name(self.classes)

    def minutes_until(self, miou):
        """The time until mean IoU on val, at the input's size, first reaches a value; NaN if it does not."""
        seconds = itertools.accumulate(self.metrics.get("epoch_seconds", []))
        return next((time / 60 for row, time in zip(self.history, seconds) if row["val_miou"] >= miou), math.nan)

    @property
    def setting(self):
        """Dataset, limit, epochs and batch size; None for what is the experiment's own."""
        flags, defaults = self.metrics["flags"], self.metrics["defaults"]
        changed = (None if flags[name] == defaults[name] else flags[name] for name in ("epochs", "batch_size"))
        return (self.metrics["dataset"], flags["limit"], *changed)

    def matches(self, args):
        """Whether the run is what compare.py's flags ask for. A flag that was not given means the experiment's own."""
        flags, defaults = self.metrics["flags"], self.metrics["defaults"]
        wanted = {name: getattr(args, name) or defaults[name] for name in ("epochs", "batch_size")}
        return self.metrics["dataset"] == Path(args.data).resolve().name and flags == wanted | {"limit": args.limit}

    def score(self, split, name):
        """A metric of a split as a float, NaN if there is none."""
        value = (self.metrics[split] or {}).get(name)
        return math.nan if value is None else value

    def class_ious(self, split):
        """The IoU of each class on a split: float array [C], NaN for a class that does not occur."""
        return np.array(list(self.metrics[split]["iou"].values()), float)

    def code_change(self, folder):
        """How the experiment's code in ``folder`` differs from that of the run, see ``checkpoint.code_change``.

        None if it does not, if the folder lacks the script, or if the run is of a version that kept no code.
        """
        name, code = self.metrics["experiment"], self.metrics.get("code")
        # the last is the script, which may have several experiments
        scripts = (f"{name}.py", f"{name.removesuffix('_no_pretrained')}.py", *list(code or ())[:1])
        script = next((folder / file for file in scripts if (folder / file).is_file()), None)
        return checkpoint.code_change(code, files.read_code(script)) if code and script else None
