"""Plots, written as PNG to a given path without a display.

Masks are integer arrays [H, W] of class indices and VOID, photos are uint8 [H, W, 3], and a ``baseline`` is a constant
prediction: its Scores, or its name and mean IoU.
"""

import contextlib
import functools
import itertools
import math
import textwrap
import warnings

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

import util
from seg import files, imaging
from util import VOID

# Okabe and Ito's palette for the colour-blind; each colour has its own line style or hatch for black-and-white print.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++")
STYLES = ("-", "--", ":", "-.")

WIDTH = 10  # of a plot in inches: on a page, or in a notebook's cell, it is reduced little and its text stays readable
THUMBNAIL_SIDE = 640  # of a photo in a plot in pixels
MAX_CLASSES = 40  # in a plot of classes
MAX_COLUMNS = 5  # of pictures or panels
MAX_LETTERS = 24  # of a name

# Matplotlib warns of each letter that its fonts lack, and draws a box.
warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)


def thumbnail(photo, mask):
    """A photo, a PIL image in RGB, and its mask, uint8 [H, W], at most 640 pixels per side: uint8 [h, w, 3], [h, w]."""
    size = imaging.bounded_size(mask.shape, THUMBNAIL_SIDE)
    return imaging.resize(photo, size), imaging.resize_mask(mask, size)


@functools.cache
def _fonts(text):
    """Installed fonts that together have the letters of a text, a list of names, and the set of those that none has."""
    families, missing = ["DejaVu Sans"], set(filter(str.isprintable, text))
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name != families[0], font.name)):
        if missing and (font.style, font.weight) == ("normal", 400) and "LastResort" not in font.fname:
            with contextlib.suppress(OSError, RuntimeError):  # the font is gone, or cannot be read
                found = {letter for letter in missing if get_font(font.fname).get_char_index(ord(letter))}
                families += [font.name] if found and font.name not in families else []
                missing -= found
    return families, missing


def _shorten(name):
    """A name, without its middle if it is too long for a plot: long names often differ at their ends."""
    half = MAX_LETTERS // 2
    name = name if len(name) <= MAX_LETTERS else f"{name[: half - 1]}…{name[-half:]}"
    return name.replace("$", r"\$")  # not the beginning of a formula


def _class_name(classes, label):
    """The name of a class, shortened; its number if no font has its letters."""
    return f"class {label}" if _fonts("".join(classes))[1] & set(classes[label]) else _shorten(classes[label])


def _experiment(name):
    """The name of an experiment on one line and its title, if it has one, below: "train_4_a: cosine annealing"."""
    name, _, title = name.partition(": ")
    return f"{name}\n{textwrap.shorten(title, 28, placeholder='…')}".strip()


def _select(counts, criterion, classes, title):
    """Indices and names of the at most 40 classes with the largest ``counts``, and the title, which says so."""
    labels = np.sort(np.argsort(-np.asarray(counts), kind="stable")[:MAX_CLASSES])
    if len(labels) < len(classes):
        title += f"\nthe {len(labels)} {criterion} of {len(classes)} classes"
    return labels, [_class_name(classes, label) for label in labels], title


@contextlib.contextmanager
def _figure(path, width, height, title="", layout="constrained"):
    """A figure of a size in inches, saved to ``path`` at the end; the title has as many lines as it needs.

    It is drawn without pyplot and its windows, and with Matplotlib's own defaults, whatever a matplotlibrc says.
    """
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(width, height), dpi=130, layout=layout)
        figure.suptitle(_wrap(title, int(11 * width)))
        yield figure
        for text in figure.findobj(Text):
            text.set_fontfamily(_fonts(text.get_text())[0])
        with files.atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=figure.dpi, bbox_inches="tight", pil_kwargs={"compress_level": 1})


def _wrap(text, letters):
    return "\n".join(textwrap.fill(line, letters) for line in text.splitlines())


def _legend(figure, handles, columns=None):
    """Add a legend below the figure, whose file gets higher, by default in as many columns as fit; read by rows."""
    letters = max(len(handle.get_label()) for handle in handles)
    columns = columns or max(1, int(figure.get_figwidth() / (0.6 + 0.08 * letters)))
    handles = [handle for column in range(columns) for handle in handles[column::columns]]
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, fontsize=9)


def _plot_epochs(axis, histories, name, **style):
    """Draw a metric of train and val over the epochs of one or several runs."""
    for history in histories:
        for split, colour, line in (("train", ORANGE, "--"), ("val", BLUE, "-")):
            values = [row[f"{split}_{name}"] for row in history]
            style |= {"color": colour, "label": split, "clip_on": False}  # points at 0 are drawn whole
            axis.plot([row["epoch"] for row in history], values, line, **style)
    values = [value for line in axis.lines for value in line.get_ydata()]
    if name == "loss" and min(values) > 0 and max(values) > 20 * np.median(values):
        axis.set_yscale("log")  # a single epoch would flatten the others
    elif min(values) >= 0:
        axis.set_ylim(bottom=0)
    _epoch_axis(axis)


def _epoch_axis(axis):
    axis.set(xlabel="epoch", xlim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)


def curves(path, title, history, best_epoch, baseline, weighted):
    """Draw loss, pixel accuracy, mean IoU and learning rates over the epochs; ``history`` is that of a Run.

    ``baseline`` has the resolution of the history's metrics, and ``weighted`` says whether the loss has class weights.
    """
    with _figure(path, 8, 5.6, title) as figure:
        axes = figure.subplots(2, 2).ravel()
        titles = ("loss, weighted by class" if weighted else "loss", "pixel accuracy", "mean IoU")
        for axis, name, text in zip(axes, ("loss", "pixel_accuracy", "miou"), titles):
            if name != "loss":  # first, so that the axis shows it
                label = f"{util.baseline_name(baseline.classes)} on val"
                axis.axhline(getattr(baseline, name), color=GREY, linestyle=":", label=label)
            _plot_epochs(axis, [history], name, marker="o" if len(history) <= 60 else None, markersize=3)
            axis.axvline(best_epoch, color=GREY, linewidth=0.8, label=f"best epoch: {best_epoch}")
            axis.set_title(text)
        _plot_learning_rates(axes[3], history)
        _legend(figure, [handle for axis in axes[2:] for handle in axis.get_legend_handles_labels()[0]], columns=4)


def _plot_learning_rates(axis, history):
    """Draw the learning rate of each parameter group in each epoch, or in each batch if it changes within epochs.

    From the eighth group on, all share a name and a colour.
    """
    steps = [
        (row["epoch"] - 1 + (batch + 1) / len(row["batch_learning_rates"]), rates)
        for row in history
        for batch, rates in enumerate(row["batch_learning_rates"])
    ]
    ends = [history[0]["epoch"] - 1, *(end for end, _ in steps)]
    groups = np.array([rates for _, rates in steps]).T
    names = [f"parameter group {index + 1}" for index in range(len(groups)) if len(groups) > 1]
    names[7:] = [f"parameter groups 8 to {len(groups)}"] if len(groups) > 8 else names[7:]
    for index, (group, name) in enumerate(itertools.zip_longest(groups, names)):
        index = min(index, 7)
        axis.stairs(group, ends, baseline=None, label=name, color=(*COLOURS, GREY)[index], linestyle=STYLES[index % 4])
    _epoch_axis(axis)
    axis.set(title="learning rate", ylim=(0, None))
    if len(groups) > 1 and groups.max(1).min() > 0:  # groups often differ by orders of magnitude
        axis.set(yscale="log", ylim=(groups.max(1).min() / 100, 1.5 * groups.max()))  # annealing may end near zero


def class_iou(path, title, classes, scores):
    """Draw the IoU of each class as bars from 0 to 1. ``scores`` maps the names of splits or models to their Scores."""
    labels, names, title = _select(sum(each.matrix for each in scores.values()).sum(1), "most frequent", classes, title)
    bar = min(0.16, 13 / (len(labels) * len(scores)))  # the height of a bar in inches
    group = len(scores) * bar + 0.1
    with _figure(path, 8, len(labels) * group + 1.5, title) as figure:
        axis = figure.subplots()
        for index, (name, result) in enumerate(scores.items()):
            ious = util.iou(result.matrix).numpy()[labels]
            y = np.arange(len(labels)) + (index - (len(scores) - 1) / 2) * bar / group
            style = {"color": COLOURS[index % 7], "hatch": HATCHES[index % 7], "edgecolor": "white", "linewidth": 0}
            label = f"{name}: mean IoU {result.miou:.4f}"
            bars = axis.barh(y, np.nan_to_num(ious), bar / group, label=label, **style)
            if bar > 0.1:  # there is room for text
                texts = ["absent" if np.isnan(iou) else f"{iou:.2f}" for iou in ious]
                axis.bar_label(bars, texts, padding=3, fontsize=8)
        axis.set(xlabel="IoU", xlim=(0, 1), ylim=(len(labels) - 0.5, -0.5), axisbelow=True)
        axis.set_yticks(range(len(labels)), names)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        _legend(figure, axis.containers)


def _heat_map(axis, values, rows, columns, highest=1, least=0.0):
    """Draw values [R, C] in 0..1 as colours and in percent, those below ``least`` without text, and NaN hatched."""
    axis.patch.set(facecolor="#EEEEEE", edgecolor="#BBBBBB", hatch="////")  # seen where a value is NaN
    axis.imshow(np.ma.masked_invalid(values), cmap="cividis", vmin=0, vmax=highest)
    for (row, column), value in np.ndenumerate(values):
        if value >= least:
            colour = "black" if value > highest / 2 else "white"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5, color=colour)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), rows)


def confusion(path, title, classes, matrix):
    """Draw a confusion matrix, int64 [C, C] with rows ground truth, each row in percent of its pixels."""
    labels, names, title = _select(matrix.sum(0) + matrix.sum(1), "most frequent", classes, title)
    cells, text = max(3, 0.33 * len(labels)), 0.08 * max(map(len, names))
    with _figure(path, cells + text + 1.3, cells + 0.7 * text + 1.2, title, "compressed") as figure:
        axis = figure.subplots()
        shares = (matrix / matrix.sum(1, keepdim=True).double()).numpy()[np.ix_(labels, labels)]
        rows = [f"{name} (no pixels)" if absent else name for name, absent in zip(names, np.isnan(shares).all(1))]
        _heat_map(axis, shares, rows, names, least=0.005)
        axis.set(xlabel="prediction, in percent of the ground truth", ylabel="ground truth")


def predictions(path, title, classes, samples, models=("prediction",)):
    """Draw photo, ground truth and predictions side by side, and the wrong pixels if there is one model.

    ``samples`` is a list of (name, photo, ground truth, prediction, ...), with one prediction per model; those of many
    models continue on the next line.
    """
    shows_errors = len(models) == 1
    titles = ["ground truth", *models, *["wrong pixels"] * shows_errors]
    num_lines = math.ceil((1 + len(titles)) / MAX_COLUMNS)
    columns = math.ceil((1 + len(titles)) / num_lines)
    side = min(2.5, WIDTH / columns)
    ratios = [min(2, photo.shape[0] / photo.shape[1]) for _, photo, *_ in samples for _ in range(num_lines)]
    with _figure(path, columns * side, sum(ratios) * side + 0.3 * len(ratios) + 0.5, title, "compressed") as figure:
        axes = figure.subplots(len(ratios), columns, height_ratios=ratios)
        colours = imaging.class_colours(classes)
        for (name, photo, truth, *masks), line in zip(samples, axes.reshape(len(samples), -1)):
            pictures = [photo, *(colours[mask] for mask in (truth, *masks))]
            if shows_errors:
                pictures.append(imaging.wrong_pixels(photo, truth, *masks))
            for axis, picture, text in zip(line, pictures, (name, *titles)):
                axis.imshow(picture)
                axis.set_title(_wrap(text, MAX_LETTERS), fontsize=9, pad=3)
                axis.set(xticks=[], yticks=[])
            for axis in line[len(pictures) :]:
                axis.remove()
        handles = _class_handles(classes, [mask for sample in samples for mask in sample[2:]], colours)
        _legend(figure, handles + [Patch(facecolor=ORANGE, edgecolor="black", label="wrong pixels")] * shows_errors)


def samples(path, title, classes, images, masks):
    """Draw photos, a multiple of 4, each with its mask to the right of it."""
    ratio = images.shape[1] / images.shape[2]
    with _figure(path, 14, 1.75 * ratio * len(images) / 4 + 0.5, title, "compressed") as figure:
        colours = imaging.class_colours(classes)
        pictures = [picture for image, mask in zip(images, masks) for picture in (image, colours[mask])]
        for axis, picture in zip(figure.subplots(len(images) // 4, 8).flat, pictures):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        _legend(figure, _class_handles(classes, masks, colours))


def comparison(path, title, scores, baseline):
    """Draw the mean IoU of experiments. ``scores`` maps each to a list with one mean IoU per seed."""
    with _figure(path, 8, 0.5 * len(scores) + 1.4, title) as figure:
        axis = figure.subplots()
        axis.axvline(baseline[1], color=GREY, linestyle=":", label=f"{baseline[0]}: {baseline[1]:.4f}")
        for y, values in enumerate(scores.values()):
            deviation = np.std(values, ddof=1) if len(values) > 1 else 0
            mean, whisker = np.mean(values), deviation or None
            axis.barh(y, mean, xerr=whisker, capsize=4, color=BLUE, alpha=0.5, label=None if y else "mean over seeds")
            axis.plot(values, [y] * len(values), "o", color="black", markersize=3, label=None if y else "one seed")
            end = max(mean + deviation, *values)
            axis.annotate(f"{mean:.4f}", (end, y), (6, 0), textcoords="offset points", va="center")
        axis.set_yticks(range(len(scores)), map(_experiment, scores))
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set(xlabel="mean IoU (whisker: standard deviation)", xlim=(0, None), axisbelow=True)
        axis.grid(axis="x", alpha=0.3)
        _legend(figure, axis.get_legend_handles_labels()[0], columns=3)


def classes_by_experiment(path, title, experiments, classes, ious):
    """Draw IoU per class as a heat map: float array [experiments, classes] in 0..1, NaN for an absent class."""
    labels, names, title = _select(np.nan_to_num(ious).max(0), "best", classes, title)
    with _figure(path, 0.33 * len(labels) + 3.5, 0.4 * len(experiments) + 2.4, title) as figure:
        axis = figure.subplots()
        highest = max(np.nan_to_num(ious).max(), 0.01)
        _heat_map(axis, ious[:, labels], list(map(_experiment, experiments)), names, highest)
        axis.set(aspect="auto", xlabel="IoU in percent (hatched: absent)")


def histories(path, title, runs, losses, baseline):
    """Draw loss and mean IoU over the epochs, a row per experiment.

    ``runs`` maps an experiment to the histories of its seeds, ``losses`` to the name of its loss.
    """
    with _figure(path, WIDTH, 2 * len(runs) + 0.5, title) as figure:
        axes = figure.subplots(len(runs), 2).reshape(-1, 2)  # also of a single run
        for (loss, miou), (name, seeds) in zip(axes, runs.items()):
            style = {"linewidth": 1, "marker": "." if len(seeds[0]) == 1 else None}
            _plot_epochs(loss, seeds, "loss", **style)
            line = miou.axhline(baseline[1], color=GREY, linestyle=":", label=baseline[0])
            _plot_epochs(miou, seeds, "miou", **style)
            loss.set_title(losses[name], fontsize=9)
            loss.set_ylabel(_experiment(name), fontsize=9)
            miou.set_title("mean IoU", fontsize=9)
        highest = max(miou.get_ylim()[1] for _, miou in axes)
        for _, miou in axes:
            miou.set_ylim(0, highest)
        _legend(figure, [*loss.lines[:2], line], columns=3)


def overlay_legend(path, classes):
    """Draw the colours of ``predict.overlay``, with white for the background, which it does not paint."""
    colours = np.where(np.arange(VOID)[:, None] == util.background_label(classes), 255, imaging.DISTINCT_COLOURS)
    with _figure(path, 3, 1) as figure:
        _legend(figure, _class_handles(classes, [range(len(classes))], colours), columns=1)


def _class_handles(classes, masks, colours):
    """Legend entries of the classes, void included, that occur in a list of masks."""
    labels = np.unique(np.concatenate([np.ravel(mask) for mask in masks])).tolist()
    names = ["void" if label == VOID else _class_name(classes, label) for label in labels]
    return [Patch(facecolor=colours[label] / 255, edgecolor="black", label=name) for label, name in zip(labels, names)]
