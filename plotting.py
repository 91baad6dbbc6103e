"""Plots, written as PNG to a given path without a display.

``classes`` are the class names, masks are integer arrays [H, W] of class indices and VOID, photos are uint8 [H, W, 3],
and ``baseline`` is the name of a constant prediction with its Scores or its mean IoU.
"""

import itertools

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

import files
import imaging
import util
from imaging import PALETTE
from util import VOID

# Okabe and Ito's palette for the colour-blind; each colour has its own line style or hatch for black-and-white print.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++")
STYLES = ("-", "--", ":", "-.")


MAX_SIDE = 640  # of a photo in a plot in pixels
MAX_CLASSES = 40  # in a plot of classes
MAX_LETTERS = 24  # of a class name in a plot


def thumbnail(photo, mask):
    """Downscale a photo, a PIL image in RGB, and its mask, uint8 [H, W], for a plot; to the nearest pixel for the mask.

    Returns:
        uint8 arrays [h, w, 3] and [h, w], of at most 640 pixels per side; smaller images stay as they are.
    """
    scale = max(1, max(mask.shape) / MAX_SIDE)
    size = tuple(max(1, round(side / scale)) for side in mask.shape)
    return imaging.resize(photo, size), imaging.resize(Image.fromarray(mask), size, Image.Resampling.NEAREST)


def _most_frequent(counts):
    """The indices of the at most 40 largest of ``counts``, in ascending order."""
    return np.sort(np.argsort(-np.asarray(counts), kind="stable")[:MAX_CLASSES])


def _names(classes, labels):
    """The names of some classes, shortened where they are too long for a plot."""
    names = [classes[label] for label in labels]
    half = MAX_LETTERS // 2  # long names often differ at their ends
    return [name if len(name) <= MAX_LETTERS else f"{name[: half - 1]}…{name[-half:]}" for name in names]


def _shown(title, criterion, labels, classes):
    """The title of a plot, which says so if it does not show all classes."""
    return title if len(labels) == len(classes) else f"{title}\nthe {len(labels)} {criterion} of {len(classes)} classes"


def _figure(width, height):
    """A figure on the Agg canvas, whatever backend the user has selected."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)


def curves(path, title, history, best_epoch, baseline, weighted):
    """Draw loss, pixel accuracy, mean IoU and learning rates over the epochs.

    ``history`` is a list of the dicts of ``reporting.history_row``, ``baseline`` has the resolution of its val metrics,
    and ``weighted`` tells whether the loss has class weights.
    """
    figure = _figure(10, 7)
    figure.suptitle(title)
    (loss, accuracy), (miou, learning_rate) = figure.subplots(2, 2)
    epochs = [row["epoch"] for row in history]
    baseline_name, baseline_scores = baseline
    loss.set_title("loss, weighted by class" if weighted else "loss")
    levels = {"pixel_accuracy": baseline_scores.pixel_accuracy, "miou": baseline_scores.miou}
    for axis, name in ((loss, "loss"), (accuracy, "pixel_accuracy"), (miou, "miou")):
        for split, colour, style in (("train", ORANGE, "--"), ("val", BLUE, "-")):
            values = [row[f"{split}_{name}"] for row in history]
            marker = "o" if len(history) <= 60 else None
            axis.plot(epochs, values, style, color=colour, label=split, marker=marker, markersize=3)
        if name in levels:
            axis.axhline(levels[name], color=GREY, linestyle=":", label=f"{baseline_name} on val")
        axis.axvline(best_epoch, color=GREY, linewidth=0.8, label=f"best epoch: {best_epoch}")
    accuracy.set_title("pixel accuracy")
    miou.set_title("mean IoU")
    _plot_learning_rates(learning_rate, history)
    for axis in (loss, accuracy, miou, learning_rate):
        axis.set(xlabel="epoch", xlim=(0, max(1.03 * epochs[-1], epochs[-1] + 0.5)))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    for axis in (loss, accuracy, miou):
        axis.update_datalim([(0, 0)])  # include 0 before the margin at the top is computed
        axis.autoscale_view(scalex=False)
        axis.set_ylim(bottom=0)
    figure.legend(*miou.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    _save(figure, path)


def _plot_learning_rates(axis, history):
    """Draw the learning rate of each parameter group in each epoch, or in each batch if it changes within epochs."""
    steps = [
        (row["epoch"] - 1 + (batch + 1) / len(row["batch_learning_rates"]), rates)
        for row in history
        for batch, rates in enumerate(row["batch_learning_rates"])
    ]
    ends = [history[0]["epoch"] - 1] + [end for end, _ in steps]
    groups = np.array([rates for _, rates in steps]).T
    for index, (rates, colour, style) in enumerate(zip(groups, itertools.cycle(COLOURS), itertools.cycle(STYLES)), 1):
        axis.stairs(rates, ends, baseline=None, color=colour, linestyle=style, label=f"parameter group {index}")
    axis.set_title("learning rate")
    if len(groups) > 1:
        axis.legend()
    if len(groups) > 1 and groups.min() > 0:
        axis.set_yscale("log")  # groups often differ by orders of magnitude
    else:
        axis.set_ylim(bottom=0, top=1.05 * groups.max() or None)


def class_iou(path, title, classes, scores):
    """Draw the IoU of each class as bars. ``scores`` maps the names of up to seven splits or models to their Scores."""
    labels = _most_frequent(sum(result.matrix.sum(1) for result in scores.values()))
    figure = _figure(min(24, max(6, 0.13 * len(labels) * (2 + len(scores))) + 3), 5)
    figure.suptitle(_shown(title, "most frequent", labels, classes))
    axis = figure.subplots()
    width = 0.8 / len(scores)
    for index, ((name, result), colour, hatch) in enumerate(zip(scores.items(), COLOURS, HATCHES)):
        values = util.iou(result.matrix).numpy()[labels]
        x = np.arange(len(labels)) + (index - (len(scores) - 1) / 2) * width
        label = f"{name}: mean IoU {result.miou:.4f}"
        axis.bar(x, values, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
        for absent in x[np.isnan(values)]:
            axis.text(absent, 0, " absent", rotation=90, ha="center", va="bottom", fontsize=7, color=colour)
        axis.axhline(result.miou, color=colour, linestyle=("--", ":", "-.")[index % 3], linewidth=1)
    highest = max(np.nan_to_num(bars.datavalues).max() for bars in axis.containers)
    axis.set(ylabel="IoU", xlim=(-0.7, len(labels) - 0.3), ylim=(0, min(1, max(1.05 * highest, 0.01))))
    axis.set_xticks(range(len(labels)), _names(classes, labels), rotation=60, ha="right")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    _save(figure, path)


def confusion(path, title, classes, matrix):
    """Draw a confusion matrix, int64 [C, C] with rows ground truth, each row in percent of its pixels.

    Of more than 40 classes, those most frequent in the ground truth are shown.
    """
    labels = _most_frequent(matrix.sum(1))
    side = max(5, 0.42 * len(labels) + 2)
    figure = _figure(side + 0.8, side)
    axis = figure.subplots()
    counts = matrix.double()
    shares = (counts / counts.sum(1, keepdim=True)).numpy()[np.ix_(labels, labels)]
    image = axis.imshow(np.ma.masked_invalid(shares), cmap="cividis", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(np.nan_to_num(shares) >= 0.005)):
        share = shares[row, column]
        colour = "black" if share > 0.5 else "white"
        axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set(title=_shown(title, "most frequent", labels, classes), xlabel="prediction", ylabel="ground truth")
    axis.set_xticks(range(len(labels)), _names(classes, labels), rotation=60, ha="right")
    axis.set_yticks(range(len(labels)), _names(classes, labels))
    figure.colorbar(image, label="share of the ground truth's pixels (numbers: percent)", shrink=0.8)
    _save(figure, path)


def predictions(path, title, classes, samples, models=("prediction",)):
    """Draw photo, ground truth and predictions side by side.

    ``samples`` is a list of (name, photo, ground truth mask, predicted mask, ...), with one prediction per model.
    """
    columns = 2 + len(models)
    figure = _figure(3.1 * columns + 1.7, 2.6 * len(samples) + 0.6)
    figure.suptitle(title)
    axes = figure.subplots(len(samples), columns, squeeze=False)
    for row, (name, photo, *masks) in zip(axes, samples):
        for axis, image in zip(row, (photo, *(PALETTE[mask] for mask in masks))):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    for axis, name in zip(axes[0], ("photo", "ground truth", *models)):
        axis.set_title(name)
    _legend(figure, classes, [mask for sample in samples for mask in sample[2:]])
    _save(figure, path)


def samples(path, title, classes, images, masks):
    """Draw photos, a multiple of 4, each with its mask to the right of it."""
    figure = _figure(14, 1.6 * len(images) / 4 + 0.4)
    figure.suptitle(title)
    axes = figure.subplots(len(images) // 4, 8).flat
    for image_axis, mask_axis, image, mask in zip(axes[::2], axes[1::2], images, masks):
        image_axis.imshow(image)
        mask_axis.imshow(PALETTE[mask])
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    _legend(figure, classes, masks)
    _save(figure, path)


def comparison(path, title, scores, baseline):
    """Draw the mean IoU of experiments. ``scores`` maps each to a list with one mean IoU per seed."""
    scores = {name: values for name, values in scores.items() if values}
    figure = _figure(8, 0.5 * len(scores) + 1.4)
    axis = figure.subplots()
    for y, values in enumerate(scores.values()):
        deviation = np.std(values, ddof=1) if len(values) > 1 else None
        axis.barh(y, np.mean(values), xerr=deviation, capsize=4, color=BLUE, alpha=0.5)
        axis.plot(values, [y] * len(values), "o", color="black", markersize=3)
    name, miou = baseline
    axis.axvline(miou, color=GREY, linestyle=":", label=f"{name}: {miou:.4f}")
    axis.set(title=title, xlabel="mean IoU (bar: mean over seeds, whisker: standard deviation, dots: seeds)")
    axis.set_yticks(range(len(scores)), scores)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center")
    _save(figure, path)


def classes_by_experiment(path, title, experiments, classes, ious):
    """Draw IoU per class as a heat map: float array [experiments, classes] in 0..1, NaN for an absent class."""
    labels = _most_frequent(np.nan_to_num(ious).max(0))
    ious = ious[:, labels]
    figure = _figure(0.5 * len(labels) + 3, 0.42 * len(experiments) + 2.4)
    axis = figure.subplots()
    highest = max(np.nan_to_num(ious).max(), 0.01)
    image = axis.imshow(np.ma.masked_invalid(ious), cmap="cividis", vmin=0, vmax=highest, aspect="auto")
    for (row, column), value in np.ndenumerate(ious):
        text = "-" if np.isnan(value) else f"{100 * value:.0f}"
        colour = "black" if np.isnan(value) or value > highest / 2 else "white"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set(title=_shown(title, "best", labels, classes))
    axis.set_xticks(range(len(labels)), _names(classes, labels), rotation=60, ha="right")
    axis.set_yticks(range(len(experiments)), experiments)
    figure.colorbar(image, label="IoU (numbers: percent)")
    _save(figure, path)


def histories(path, title, runs, baseline):
    """Draw loss and mean IoU over the epochs. ``runs`` maps an experiment to the histories of its seeds."""
    figure = _figure(2.1 * len(runs) + 1, 4.6)
    figure.suptitle(title)
    axes = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False)
    for (loss, miou), (name, seeds) in zip(axes.T, runs.items()):
        for history in seeds:
            epochs = [row["epoch"] for row in history]
            loss.plot(epochs, [row["train_loss"] for row in history], "--", color=ORANGE, linewidth=1)
            loss.plot(epochs, [row["val_loss"] for row in history], "-", color=BLUE, linewidth=1)
            miou.plot(epochs, [row["val_miou"] for row in history], "-", color=BLUE, linewidth=1)
        miou.axhline(baseline[1], color=GREY, linestyle=":")
        loss.set_title(name, fontsize=10)
        miou.set_xlabel("epoch")
        miou.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (loss, miou):
            axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="loss", yscale="log")  # one diverging epoch would flatten the others
    axes[0, 0].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    axes[1, 0].set(ylabel="val mean IoU", ylim=(0, None))
    styles = (("train", ORANGE, "--"), ("val", BLUE, "-"), (baseline[0], GREY, ":"))
    lines = [Line2D([], [], color=colour, linestyle=style, label=label) for label, colour, style in styles]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    _save(figure, path)


def _legend(figure, classes, masks):
    """Name the colours of the classes, and of void, that occur most in a list of masks, as many as the figure holds."""
    counts = sum(np.bincount(np.ravel(mask), minlength=VOID + 1) for mask in masks)
    present = np.flatnonzero(counts)
    most_frequent = present[np.argsort(-counts[present], kind="stable")]
    capacity = max(3, int(4.5 * figure.get_figheight()) - 2)  # a line takes 0.21 inches; one may count the rest
    labels = np.sort(most_frequent[:capacity]).tolist()
    names = _names({**dict(enumerate(classes)), VOID: "void"}, labels)
    colours = PALETTE[labels] / 255
    handles = [Patch(facecolor=colour, edgecolor="black", label=name) for colour, name in zip(colours, names)]
    if len(present) > len(labels):
        handles.append(Line2D([], [], linestyle="", label=f"and {len(present) - len(labels)} more"))
    figure.legend(handles=handles, loc="outside right upper")
