"""What a run prints and writes about itself: its description, a line per epoch, metrics, tables and plots."""

import json
import sys

import numpy as np
import torch
from torch.nn import CrossEntropyLoss
from tqdm import tqdm

import files
import html_report
import processes
import util


def progress(iterable, total, name, unit="batch"):
    """A progress bar on stderr that disappears at its end; none in other processes or if stderr is not a terminal."""
    return tqdm(iterable, name, total, leave=False, unit=unit, disable=None if processes.is_main() else True)


def log(text):
    """Print a line in the main process, without breaking the progress bars, and flush it."""
    if processes.is_main():
        tqdm.write(text)
        sys.stdout.flush()


def size_text(size):
    """The size (height, width) as text, width first as usual for photos."""
    height, width = size
    return f"{width}x{height}"


def write_history(path, history):
    """Write the rows of ``history``, a list of dicts, as a CSV."""
    if processes.is_main():
        lines = [",".join(history[0])] + [",".join(map(str, row.values())) for row in history]
        with files.atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())


def _num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def describe(run_files, args, model, train, val, test, criterion, stopping, warnings, epochs_done):
    """Print what is about to run. ``stopping`` says when it ends, ``warnings`` is from ``preflight.check``."""
    images = ", ".join(f"{len(loader.split)} {loader.split.name}" for loader in (train, val, test) if loader)
    if train.repeats > 1:
        images += f" (an epoch shows each train image {train.repeats} times)"
    size = size_text(train.size)
    log(f"{run_files.experiment}: {train.split.dataset}, {images} images at {size}, {len(train.classes)} classes")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    network = f"{type(model).__name__}, {_num_parameters(model):,} parameters ({trained:,} of them trained)"
    log(f"{network}, batch {args.batch_size}, seed {args.seed}, device {args.device}")
    if isinstance(criterion, CrossEntropyLoss) and criterion.weight is not None:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(train.classes, criterion.weight.tolist()))
        log(f"class weights of the loss: {weights}")
    name, baseline = val.baseline
    log(f"{name} on val: pixel accuracy {baseline.pixel_accuracy:.4f}, mean IoU {baseline.miou:.4f}")
    log(f"val is evaluated at {size} after each epoch, and at full resolution at the end; {stopping}")
    if test is None:
        log(f"{train.split.root} has no test.txt: the results are on val, which also selects the best epoch")
    if args.compile:
        log("the first epoch includes the time of torch.compile")
    for warning in warnings:
        log(f"warning: {warning}")
    if epochs_done:
        log(f"continuing {run_files.last} after epoch {epochs_done}")
    elif args.resume:
        log("nothing to resume: starting")


def epoch_line(history, best, epochs, seconds, scores):
    """One line about the epoch that has just ended; ``best`` is the row of the best epoch."""
    row = history[-1]
    name, baseline = scores.baseline
    warning = "" if scores.miou > baseline.miou else f"  not above the {name}"
    return (
        f"epoch {row['epoch']:{len(str(epochs))}d}/{epochs}  loss {row['train_loss']:.4f} (val {row['val_loss']:.4f})  "
        f"pixel accuracy {row['val_pixel_accuracy']:.4f}  mean IoU {row['val_miou']:.4f} "
        f"(best {best['val_miou']:.4f}, epoch {best['epoch']})  {seconds:.1f} s{warning}"
    )


def draw_plots(run_files, history, train, val, epoch, scores, predict):
    """Draw the plots of a run.

    ``scores`` maps splits to the Scores of the best ``epoch``, val first; ``predict(index, shape)`` returns the mask
    that its model predicts for an image of val.
    """
    import plotting  # only here: training should not wait for matplotlib

    title = f"{run_files.experiment} on {val.split.dataset}"
    name, val_scores = next(iter(scores.items()))
    samples = []
    shown = np.linspace(0, len(val.split) - 1, min(5, len(val.split))).round().astype(int).tolist()
    for index in progress(shown, len(shown), "drawing plots", "photo"):
        photo, mask = plotting.thumbnail(val.split.photo(index), val.split.mask(index))
        samples.append((val.split.ids[index], photo, mask, predict(index, mask.shape)))
    curves_title = f"{title}, val at {size_text(val.size)}"
    plotting.curves(run_files.plot("curves"), curves_title, history, epoch, val_scores.baseline)
    plotting.class_iou(run_files.plot("iou"), f"{title}, epoch {epoch}", val.classes, scores)
    plotting.confusion(run_files.plot("confusion"), f"{title}, {name}, epoch {epoch}", val.classes, val_scores.matrix)
    plotting.predictions(run_files.plot("predictions"), f"{title}, val, epoch {epoch}", val.classes, samples)
    if train.augment is not None:
        images, masks = train.augmented_samples(16)
        images, masks = images.permute(0, 2, 3, 1).cpu().numpy(), masks.cpu().numpy()
        plotting.samples(run_files.plot("augmentation"), f"{title}, train", train.classes, images, masks)


def write_metrics(run_files, metadata, device, history, epoch, seconds, model, scores):
    """Write the JSON of a finished run and return it: the results of the best ``epoch``, whose model is ``model``."""
    metrics = {
        "experiment": run_files.experiment,
        "dataset": metadata["dataset"],
        "seed": metadata["seed"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "epochs": len(history),
        "best_epoch": epoch,
        "parameters": _num_parameters(model),
        "multiply_adds": _multiply_adds(model, device),
        "seconds": round(seconds, 3),
        "flags": {name: metadata["flags"][name] for name in ("epochs", "batch_size", "limit")},
        "defaults": metadata["defaults"],
        "versions": metadata["versions"],
        "val": scores["val"].as_dict(),
        "test": scores["test"].as_dict() if "test" in scores else None,
    }
    with files.atomic_write(run_files.metrics) as file:
        file.write(json.dumps(metrics, indent=2, allow_nan=False).encode() + b"\n")
    return metrics


def write_html(run_files, metadata, metrics, history, val, predict):
    """Write the HTML report of a finished run; ``metrics`` is from ``write_metrics``, ``predict`` as ``draw_plots``."""
    import plotting

    def samples():
        shown = html_report.indices(len(val.split))
        for index in progress(shown, len(shown), "writing the report", "photo"):
            photo, mask = plotting.thumbnail(val.split.photo(index), val.split.mask(index))
            predicted = predict(index, mask.shape)
            matrix = util.confusion_matrix(torch.tensor(mask), torch.tensor(predicted), len(val.classes))
            yield val.split.ids[index], util.mean_iou(matrix), photo, mask, predicted

    title = f"{run_files.experiment}, {metrics['dataset']}"
    html_report.write_run(run_files, title, metrics, history, samples(), metadata)


def summarise(run_files, seed, epochs, epoch, scores, classes):
    """Print the results of a finished run, where its files are, and a last line with its mean IoU."""
    log(_table(scores, classes))
    for name, result in scores.items():
        baseline_name, baseline = result.baseline
        if not result.miou > baseline.miou:
            log(f"warning: on {name} the mean IoU is not above the {baseline_name}")
    log(f"\nreport      {run_files.report}\nplots       {run_files.plot('*')}\ncheckpoint  {run_files.best}")
    log(f"metrics     {run_files.metrics}, {run_files.history}")
    summary = ", ".join(f"{name} mean IoU {result.miou:.4f}" for name, result in scores.items())
    log(f"{run_files.experiment} seed {seed}: {summary} (epoch {epoch} of {epochs})")


def _multiply_adds(model, device):
    """Multiply-adds of a forward pass on one image of the model's size, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode  # only here: it takes long to import

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *model.size, device=device))
    return counter.get_total_flops() // 2


def _table(scores, classes):
    """The results as text: IoU of each class, then mean IoU and pixel accuracy next to those of the baseline."""
    columns = [result.as_dict() for result in scores.values()]
    baseline_name = next(iter(scores.values())).baseline[0]

    def row(name, values):
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        return f"{name:34}" + "".join(f" {cell:>9}" for cell in cells)

    lines = ["", f"{'IoU per class':34}" + "".join(f" {name:>9}" for name in scores)]
    lines += [row(f"  {name}", [column["iou"][name] for column in columns]) for name in classes]
    for name, key in (("mean IoU", "miou"), ("pixel accuracy", "pixel_accuracy")):
        lines.append(row(name, [column[key] for column in columns]))
        lines.append(row(f"  {baseline_name}", [column["background"][key] for column in columns]))
    lines.append(row("loss", [column["loss"] for column in columns]))
    lines.append(row("the assignment's IoU", [column["assignment_iou"] for column in columns]))
    return "\n".join(lines)
