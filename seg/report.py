"""What a run prints and draws: its description, a line per epoch, tables, plots and the HTML report."""

import math
import sys
import time

import numpy as np
from tqdm import tqdm

import util
from seg import checkpoint, distributed, inference
from seg.imaging import size_text

DRAWING_INTERVAL = 60  # seconds between two drawings during a run
NUM_SHOWN, NUM_PAGED = 5, 13  # images in the plot of predictions and in the HTML report, besides best, median, worst


def progress(iterable, total, name, unit="batch", min_count=0):
    """A tqdm bar on stderr in the main process, which disappears at its end; every 30 s where that is no terminal.

    A signal stops it, see ``distributed.stoppable``.
    """
    seconds = 0.1 if sys.stderr.isatty() else 30
    options = {"leave": False, "mininterval": seconds, "delay": seconds, "disable": not distributed.is_main()}
    return tqdm(distributed.stoppable(iterable, min_count), name, total, unit=unit, **options)


def log(text):
    """Print a line in the main process, without breaking the progress bars, and flush it."""
    if distributed.is_main():
        (tqdm.write if sys.stderr.isatty() else print)(text)
        sys.stdout.flush()


def history_row(epoch, learning_rates, train, val):
    """The row of an epoch in the history: a dict of plain types, to which ``fit`` adds its seconds.

    ``learning_rates`` holds a list per batch with the rate of each parameter group; ``train`` and ``val`` are Scores.
    """
    row = {"epoch": epoch}
    for group, rate in enumerate(learning_rates[0], 1):
        row["learning_rate" if group == 1 else f"learning_rate_{group}"] = rate
    for name, scores in (("train", train), ("val", val)):
        row |= {f"{name}_{metric}": getattr(scores, metric) for metric in ("loss", "pixel_accuracy", "miou")}
    changes = any(rates != learning_rates[0] for rates in learning_rates)
    return row | {"batch_learning_rates": learning_rates if changes else learning_rates[:1]}


class Reporter:
    """What a run prints and draws, in the main process. It only reads the run, which is open."""

    def __init__(self, run, args, criterion, train, val, test):
        from seg import plotting  # not at the top: wrong flags are reported without waiting for Matplotlib

        self.plotting, self.run, self.args = plotting, run, args
        self.train, self.val, self.test = train, val, test
        self.is_weighted = util.criterion_weights(criterion) is not None
        title, limit = run.metadata["title"], f" (first {args.limit} images)" if args.limit else ""
        self.title = f"{run.name}{title and ': '}{title}, {val.split.dataset}{limit}"
        self.last_drawing = time.perf_counter()  # or the start; infinity after a drawing that failed

    def start(self, model, scheduled, interval, patience, warnings):
        """Print what is about to run. The parameters are those of ``fit`` or say what holds."""
        args, train, val, test = self.args, self.train, self.val, self.test
        images = ", ".join(f"{len(loader.split)} {loader.split.name}" for loader in (train, val, test) if loader)
        repeats = f" (an epoch shows each train image {train.repeats} times)" if train.repeats > 1 else ""
        images += f"{repeats} images at {size_text(train.size)}"
        log(f"{self.run.name}: {train.split.dataset}, {images}, {len(train.classes)} classes")
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        network = f"{type(model).__name__}, {self.run.metadata['parameters']:,} parameters ({trained:,} trainable)"
        log(f"{network}, batch {train.batch_size}, seed {args.seed}, device {self.run.metadata['device']}")
        schedule = f"the scheduler is stepped once per {interval}" if scheduled else "constant learning rate"
        stop = f"stopping early after {patience} epochs without progress on val" if patience else "no early stopping"
        log(f"{schedule}; {stop}")
        name, baseline = util.baseline_name(val.classes), val.baseline
        log(f"{name} on val: pixel accuracy {baseline.pixel_accuracy:.4f}, mean IoU {baseline.miou:.4f}")
        log(f"val is evaluated at {size_text(val.size)} after each epoch, and at full resolution at the end")
        if test is None:
            log("there is no test split: the results are on val, which also selects the best epoch")
        for warning in warnings:
            log(f"warning: {warning}")
        if self.run.history:
            log(f"continuing {self.run.last} after epoch {len(self.run.history)} of {args.epochs}")
        elif args.resume:
            log("nothing to resume: starting")

    def epoch(self):
        """After an epoch: print a line, and draw curves and predictions if it is time to."""
        row, best, epochs = self.run.history[-1], self.run.best_row, self.args.epochs
        name = util.baseline_name(self.val.classes)
        warning = "" if row["val_miou"] > self.val.baseline.miou else f"  not above the {name}"
        log(
            f"epoch {row['epoch']:{len(str(epochs))}d}/{epochs}  loss {row['train_loss']:.4f} "
            f"(val {row['val_loss']:.4f})  pixel accuracy {row['val_pixel_accuracy']:.4f}  "
            f"mean IoU {row['val_miou']:.4f} (best {best['val_miou']:.4f}, epoch {best['epoch']})  "
            f"{row['seconds']:.1f} s{warning}"
        )
        if time.perf_counter() - self.last_drawing < DRAWING_INTERVAL or not distributed.is_main():
            return
        try:
            self._draw_curves()
            self._draw_predictions(checkpoint.load(self.run.best, self.args.device))
            self.last_drawing = time.perf_counter()
        except Exception as error:  # such as a full disk: training may go on
            log(f"warning: the plots are not updated any more ({util.reason(error)})")
            self.last_drawing = math.inf

    def stop(self, resumes):
        """After Ctrl-C or an error: draw the curves, which takes only a moment, and print what is kept.

        ``resumes`` tells whether the same command with ``--resume`` would go on.
        """
        run = self.run
        if not run.history:
            log(f"{run.name}: stopped before the end of its first epoch: there is nothing to keep")
        if not run.history or not distributed.is_main():
            return
        try:
            self._draw_curves()
        except Exception as error:  # the reason for the stop, such as a full disk, matters more
            log(f"warning: the curves were not drawn ({util.reason(error)})")
        kept = " and ".join(str(path) for path in (run.best, run.last) if path.exists()) or "nothing"
        flags = "" if self.args.resume else " with --resume" + " instead of --overwrite" * self.args.overwrite
        advice = f": the same command{flags} continues" if resumes and run.last.exists() else ""
        log(f"{run.name}: stopped after epoch {len(run.history)}; kept {kept}{advice}")

    def finish(self, model, scores):
        """At the end: print tables and paths, draw the plots and write the HTML report.

        ``model`` is that of the best epoch, ``scores`` maps val and, if there is one, test to its Scores.
        """
        if not distributed.is_main():
            return
        from seg import html  # only here: most of a run does without Jinja2

        run, image_ious = self.run, scores["val"].image_ious
        log(table(scores, self.val.classes))
        for name, result in scores.items():
            if not result.miou > result.baseline.miou:
                log(f"warning: on {name} the mean IoU is not above the {util.baseline_name(self.val.classes)}")
        title, classes, train = f"{self.title}, epoch {run.best_row['epoch']}", self.val.classes, self.train
        self._draw_curves()
        self.plotting.class_iou(run.plot("iou"), title, classes, scores)
        self.plotting.confusion(run.plot("confusion"), f"{title}, val", classes, scores["val"].matrix)
        self._draw_predictions(model, image_ious)
        if train.augment is not None:
            images, masks = train.augmented_samples(16)
            images, masks = images.permute(0, 2, 3, 1).cpu().numpy(), masks.cpu().numpy()
            self.plotting.samples(run.plot("augmentation"), f"{self.title} train", classes, images, masks)
        html.write_run(run, self.title, self._samples(model, NUM_PAGED, image_ious, "writing the report"))
        log(f"\nreport      {run.report}\nplots       {run.plot('*')}\ncheckpoint  {run.best}")
        log(f"metrics     {run.json}, {run.csv}")
        summary = ", ".join(f"{name} mean IoU {result.miou:.4f}" for name, result in scores.items())
        log(f"{run.name} seed {run.seed}: {summary} (epoch {run.best_row['epoch']} of {len(run.history)})")

    def _samples(self, model, count, image_ious, description):
        """Yield name, IoU, photo, mask and prediction of images of val: evenly spaced, best, median and worst."""
        split = self.val.split
        indices = np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int).tolist()
        ranked = [] if image_ious is None else image_ious.argsort()[: image_ious.isfinite().sum()].tolist()
        ranks = {ranked[len(ranked) // 2]: "median", ranked[0]: "worst", ranked[-1]: "best"} if ranked else {}
        indices = list(dict.fromkeys([*indices, *ranks]))
        for index in progress(indices, len(indices), description, "photo"):
            photo, mask = self.plotting.thumbnail(split.photo(index), split.mask(index))
            name = ", ".join(filter(None, (split.ids[index], ranks.get(index))))
            iou = math.nan if image_ious is None else image_ious[index].item()
            yield name, iou, photo, mask, inference.predict_index(model, self.val, index, mask.shape)

    def _draw_curves(self):
        title, path = f"{self.title}, at {size_text(self.val.size)}", self.run.plot("curves")
        epoch = self.run.best_row["epoch"]
        self.plotting.curves(path, title, self.run.history, epoch, self.val.baseline, self.is_weighted)

    def _draw_predictions(self, model, image_ious=None):
        samples = self._samples(model, NUM_SHOWN, image_ious, "drawing predictions")
        samples = [(name if np.isnan(iou) else f"{name}\nmean IoU {iou:.2f}", *rest) for name, iou, *rest in samples]
        title = f"{self.title} val, epoch {self.run.best_row['epoch']}"
        self.plotting.predictions(self.run.plot("predictions"), title, self.val.classes, samples)


def table(scores, classes):
    """The results as text: IoU of each class, then mean IoU and pixel accuracy next to those of the baseline."""
    results = [result.as_dict() for result in scores.values()]
    rows = [(f"  {name}", [result["iou"][name] for result in results]) for name in classes]
    for name, key in (("mean IoU", "miou"), ("pixel accuracy", "pixel_accuracy")):
        rows.append((name, [result[key] for result in results]))
        rows.append((f"  {util.baseline_name(classes)}", [result["background"][key] for result in results]))
    for name, key in (("loss", "loss"), ("the assignment's IoU", "assignment_iou")):
        rows.append((name, [result[key] for result in results]))
    lines = ["", f"{'IoU per class':34}" + "".join(f" {split:>9}" for split in scores)]
    for name, values in rows:
        lines.append(f"{name:34}" + "".join(f" {'-' if value is None else f'{value:.4f}':>9}" for value in values))
    return "\n".join(lines)
