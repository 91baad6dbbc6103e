"""Plots, written as PNG to a given path without a display.

``classes`` are the class names, masks are integer arrays [H, W] of class indices and VOID, photos are uint8 [H, W, 3],
and a ``baseline`` is a constant prediction: its Scores, or its name and mean IoU.
"""

import itertools
import math
import textwrap
import warnings

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

import util
from seg import files, imaging
from util import VOID

# Okabe and Ito's palette for the colour-blind; each colour has its own line style or hatch for black-and-white print.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++")
STYLES = ("-", "--", ":", "-.")

WIDTH = 10  # of a plot in inches: on a page, or in a notebook's cell, it is reduced little and its text stays readable
THUMBNAIL_SIDE = 640  # of a photo in a plot in pixels
MAX_CLASSES = 40  # in a plot of classes
MAX_LETTERS = 24  # of a name in a plot
MAX_COLUMNS = 5  # of pictures or panels
SLANTED = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}  # text of an axis

# Matplotlib warns of each letter that its font lacks, such as Chinese ones, and draws a box.
warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)


def thumbnail(photo, mask):
    """Downscale a photo, a PIL image in RGB, and its mask, uint8 [H, W], for a plot; to the nearest pixel for the mask.

    Returns:
        uint8 arrays [h, w, 3] and [h, w], of at most 640 pixels per side; smaller images stay as they are.
    """
    size = imaging.bounded_size(mask.shape, THUMBNAIL_SIDE)
    return imaging.resize(photo, size), imaging.resize(Image.fromarray(mask), size, Image.Resampling.NEAREST)


def _most_frequent(counts):
    """The indices of the at most 40 largest of ``counts``, in ascending order."""
    return np.sort(np.argsort(-np.asarray(counts), kind="stable")[:MAX_CLASSES])


def _shortened(names):
    """A list of names, shortened where they are too long for a plot."""
    half = MAX_LETTERS // 2  # long names often differ at their ends
    short = [name if len(name) <= MAX_LETTERS else f"{name[: half - 1]}…{name[-half:]}" for name in names]
    return [textwrap.fill(name, MAX_LETTERS) if short.count(text) > 1 else text for name, text in zip(names, short)]


def _experiment(name):
    """The name of an experiment on one line and its idea, if it has one, below it: "train_4_a: cosine annealing"."""
    name, _, idea = name.partition(": ")
    return "\n".join(filter(None, (name, textwrap.shorten(idea, 28, placeholder="…"))))


def _select(counts, criterion, classes, title):
    """Indices and names of the at most 40 classes with the largest ``counts``, and the title, which says so."""
    labels = _most_frequent(counts)
    if len(labels) < len(classes):
        title += f"\nthe {len(labels)} {criterion} of {len(classes)} classes"
    return labels, _shortened([classes[label] for label in labels]), title


def _figure(width, height, title="", layout="constrained"):
    """A figure on the Agg canvas, whatever backend the user has selected, with a title in as many lines as it needs."""
    figure = Figure(figsize=(width, height), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    if title:
        lines = [textwrap.fill(line, int(11 * width)) for line in title.splitlines()]
        figure.suptitle("\n".join(lines), y=None if layout else 1 - 0.08 / height)
    return figure


def _legend_shape(handles, width):
    """The numbers of rows and columns of a legend of these handles that fits into a width in inches."""
    letters = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(width / (0.6 + 0.08 * letters))))
    return math.ceil(len(handles) / columns), columns


def _save(figure, path):
    for text in figure.findobj(Text):
        if "$" in text.get_text() and not text.get_text().startswith("$\\mathdefault"):  # Matplotlib's own tick labels
            text.set_parse_math(False)  # a name may hold dollar signs
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=figure.dpi)


def curves(path, title, history, best_epoch, baseline, weighted):
    """Draw loss, pixel accuracy, mean IoU and learning rates over the epochs.

    ``history`` is a list of the dicts of ``report.history_row``, ``baseline`` has the resolution of its val metrics,
    and ``weighted`` tells whether the loss has class weights.
    """
    figure = _figure(WIDTH, 7, title)
    (loss, accuracy), (miou, learning_rate) = figure.subplots(2, 2)
    epochs = [row["epoch"] for row in history]
    loss.set_title("loss, weighted by class" if weighted else "loss")
    baseline_label = f"{util.baseline_name(baseline.classes)} on val"
    levels = {"pixel_accuracy": baseline.pixel_accuracy, "miou": baseline.miou}
    for axis, name in ((loss, "loss"), (accuracy, "pixel_accuracy"), (miou, "miou")):
        for split, colour, style in (("train", ORANGE, "--"), ("val", BLUE, "-")):
            values = [row[f"{split}_{name}"] for row in history]
            marker = "o" if len(history) <= 60 else None
            axis.plot(epochs, values, style, color=colour, label=split, marker=marker, markersize=3)
        if name in levels:
            axis.axhline(levels[name], color=GREY, linestyle=":", label=baseline_label)
        axis.axvline(best_epoch, color=GREY, linewidth=0.8, label=f"best epoch: {best_epoch}")
    accuracy.set_title("pixel accuracy")
    miou.set_title("mean IoU")
    _plot_learning_rates(learning_rate, history)
    for axis in (loss, accuracy, miou, learning_rate):
        axis.set(xlabel="epoch", xlim=(0, max(1.03 * epochs[-1], epochs[-1] + 0.5)))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    losses = [row[f"{split}_loss"] for row in history for split in ("train", "val")]
    from_zero = [accuracy, miou]
    if min(losses) > 0 and max(losses) > 20 * np.median(losses):
        loss.set_yscale("log")  # a single epoch would flatten the others
    elif min(losses) >= 0:
        from_zero.append(loss)
    for axis in from_zero:
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
    highest = groups.max(1)  # of each group
    if len(groups) > 1 and highest.min() > 0:
        axis.set_yscale("log")  # groups often differ by orders of magnitude
        axis.set_ylim(highest.min() / 100, 1.5 * highest.max())  # annealing may end near zero
    else:
        axis.set_ylim(bottom=0, top=1.05 * groups.max() or None)


def class_iou(path, title, classes, scores):
    """Draw the IoU of each class as bars from 0 to 1. ``scores`` maps the names of splits or models to their Scores."""
    matrix = sum(result.matrix for result in scores.values())
    labels, names, title = _select(matrix.sum(1), "most frequent", classes, title)
    values = np.stack([util.iou(result.matrix).numpy()[labels] for result in scores.values()])
    bar = min(max(0.11, 0.3 / len(values)), 8.5 / len(values))  # in inches, as the next
    group = len(values) * bar + 0.12
    num_rows = math.ceil(len(labels) / int((WIDTH - 0.8) / group))
    columns = math.ceil(len(labels) / num_rows)
    width = max(5, columns * group + 0.8)
    is_slanted = 0.08 * max(map(len, names)) > (width - 0.8) / columns
    pairs = [(COLOURS[index % 7], HATCHES[(index + index // 7) % 7]) for index in range(len(scores))]  # 49 different
    styles = [{"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0} for colour, hatch in pairs]
    texts = [f"{name}: mean IoU {result.miou:.4f}" for name, result in scores.items()]
    handles = [Patch(label=text, **style) for text, style in zip(texts, styles)]
    legend_rows, legend_columns = _legend_shape(handles, width)
    figure = _figure(width, num_rows * (3 if is_slanted else 2.4) + 0.2 * legend_rows + 0.8, title)
    offsets = (np.arange(len(values)) - (len(values) - 1) / 2) * bar / group
    for start, axis in zip(range(0, len(labels), columns), np.ravel(figure.subplots(num_rows))):
        x = np.arange(len(names[start : start + columns]))
        for heights, offset, style in zip(values[:, start : start + columns], offsets, styles):
            bars = axis.bar(x + offset, np.nan_to_num(heights), bar / group, **style)
            if bar > 0.1:  # there is room for text
                texts = ["absent" if np.isnan(value) else f"{value:.2f}" for value in heights]
                axis.bar_label(bars, texts, padding=2, fontsize=7, rotation=90)
        axis.set(ylabel="IoU", xlim=(-0.5, columns - 0.5), ylim=(0, 1), axisbelow=True)
        axis.set_xticks(x, names[start : start + columns], fontsize=9, **(SLANTED if is_slanted else {}))
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns, fontsize=9)
    _save(figure, path)


def _heat_map(axis, values, rows, columns, highest=1, least=0.0):
    """Draw values [R, C] in 0..1 as colours and in percent, those below ``least`` without text, and NaN hatched."""
    axis.patch.set(facecolor="#EEEEEE", edgecolor="#BBBBBB", hatch="////")  # seen where a value is NaN
    axis.imshow(np.ma.masked_invalid(values), cmap="cividis", vmin=0, vmax=highest)
    for (row, column), value in np.ndenumerate(values):
        if value >= least:
            colour = "black" if value > highest / 2 else "white"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5, color=colour)
    axis.set_xticks(range(len(columns)), columns, **SLANTED)
    axis.set_yticks(range(len(rows)), rows)


def confusion(path, title, classes, matrix):
    """Draw a confusion matrix, int64 [C, C] with rows ground truth, each row in percent of its pixels.

    Of more than 40 classes, those most frequent in ground truth and prediction are shown. A class without ground truth
    is marked.
    """
    labels, names, title = _select(matrix.sum(0) + matrix.sum(1), "most frequent", classes, title)
    letters, cells = max(map(len, names)), max(3, 0.33 * len(labels))
    figure = _figure(cells + 0.08 * letters + 1.3, cells + 0.06 * letters + 1.2, title)
    axis = figure.subplots()
    shares = (matrix / matrix.sum(1, keepdim=True).double()).numpy()[np.ix_(labels, labels)]
    rows = [f"{name} (no pixels)" if absent else name for name, absent in zip(names, np.isnan(shares).all(1))]
    _heat_map(axis, shares, rows, names, least=0.005)
    axis.set(xlabel="prediction, in percent of the ground truth", ylabel="ground truth")
    _save(figure, path)


def predictions(path, title, classes, samples, models=("prediction",)):
    """Draw photo, ground truth and predictions side by side, and the wrong pixels if there is one model.

    ``samples`` is a list of (name, photo, ground truth mask, predicted mask, ...), with one prediction per model. The
    name may have several lines. All pictures have one width, so that photos of any shape leave no gaps; only what is
    more than twice as high as wide is drawn narrower.
    """
    shows_errors = len(models) == 1
    titles = ["ground truth", *_shortened(models), *["wrong pixels"] * shows_errors]
    num_lines = math.ceil((1 + len(titles)) / MAX_COLUMNS)
    columns = math.ceil((1 + len(titles)) / num_lines)
    side, gap = min(2.5, WIDTH / columns), 0.06  # inches
    colours = imaging.class_colours(classes)
    width = columns * side + gap
    handles = _class_handles(classes, [mask for sample in samples for mask in sample[2:]])
    handles += [Patch(facecolor=ORANGE, edgecolor="black", label="wrong pixels")] * shows_errors
    legend_rows, legend_columns = _legend_shape(handles, width)
    heights = [min(2, photo.shape[0] / photo.shape[1]) * (side - gap) for _, photo, *_ in samples]
    headings = [0.08 + 0.15 * (1 + name.count("\n")) for name, *_ in samples]
    y = num_lines * sum(heights + headings) + gap  # where the next line begins
    height = y + 0.19 * legend_rows + 0.4
    figure = _figure(width, height, title, layout=None)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 1 - 0.32 / height), "borderaxespad": 0}
    figure.legend(handles=handles, ncols=legend_columns, fontsize=9, frameon=False, **place)
    for (name, photo, truth, *masks), picture_height, heading in zip(samples, heights, headings):
        pictures = [photo, *(colours[mask] for mask in (truth, *masks))]
        if shows_errors:
            pictures.append(imaging.wrong_pixels(photo, truth, *masks))
        name = "\n".join(_shortened(name.splitlines()))
        for index, (picture, text) in enumerate(zip(pictures, (name, *titles))):
            if (column := index % columns) == 0:
                y -= heading + picture_height
            box = (gap + column * side) / width, y / height, (side - gap) / width, picture_height / height
            axis = figure.add_axes(box, xticks=[], yticks=[])
            axis.imshow(picture)
            axis.set_title(text, fontsize=9, pad=3)
    _save(figure, path)


def samples(path, title, classes, images, masks):
    """Draw photos, a multiple of 4, each with its mask to the right of it."""
    figure = _figure(14, 1.6 * len(images) / 4 + 0.8, title)
    colours = imaging.class_colours(classes)
    pictures = [picture for image, mask in zip(images, masks) for picture in (image, colours[mask])]
    for axis, picture in zip(figure.subplots(len(images) // 4, 8).flat, pictures):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
    handles = _class_handles(classes, masks)
    figure.legend(handles=handles, loc="outside lower center", ncols=_legend_shape(handles, 14)[1])
    _save(figure, path)


def comparison(path, title, scores, baseline):
    """Draw the mean IoU of experiments. ``scores`` maps each to a list with one mean IoU per seed."""
    scores = {name: values for name, values in scores.items() if values}
    figure = _figure(8, 0.5 * len(scores) + 1.8, title)
    axis = figure.subplots()
    axis.axvline(baseline[1], color=GREY, linestyle=":", label=f"{baseline[0]}: {baseline[1]:.4f}")
    for y, values in enumerate(scores.values()):
        deviation = np.std(values, ddof=1) if len(values) > 1 else 0
        mean, whisker = np.mean(values), deviation or None
        axis.barh(y, mean, xerr=whisker, capsize=4, color=BLUE, alpha=0.5, label="mean over seeds" if y == 0 else None)
        axis.plot(values, [y] * len(values), "o", color="black", markersize=3, label="one seed" if y == 0 else None)
        end = max(mean + deviation, *values)
        axis.annotate(f"{mean:.4f}", (end, y), (6, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(scores)), map(_experiment, scores))
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(xlabel="mean IoU (whisker: standard deviation)", xlim=(0, None), axisbelow=True)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    _save(figure, path)


def classes_by_experiment(path, title, experiments, classes, ious):
    """Draw IoU per class as a heat map: float array [experiments, classes] in 0..1, NaN for an absent class."""
    labels, names, title = _select(np.nan_to_num(ious).max(0), "best", classes, title)
    figure = _figure(0.33 * len(labels) + 3.5, 0.4 * len(experiments) + 2.4, title)
    axis = figure.subplots()
    highest = max(np.nan_to_num(ious).max(), 0.01)
    _heat_map(axis, ious[:, labels], list(map(_experiment, experiments)), names, highest)
    axis.set(aspect="auto", xlabel="IoU in percent (hatched: absent)")
    _save(figure, path)


def histories(path, title, runs, losses, baseline):
    """Draw loss and mean IoU over the epochs. ``runs`` maps an experiment to the histories of its seeds.

    ``losses`` maps an experiment to the name of its loss, such as "CrossEntropyLoss, weighted by class", or to None if
    that is not known. Only panels of one loss share an axis.
    """
    num_rows = math.ceil(len(runs) / MAX_COLUMNS)
    columns = math.ceil(len(runs) / num_rows)
    figure = _figure(max(5, 2 * columns + 0.6), 4.4 * num_rows + 0.8, title)
    keys, shared = [losses[name] or name for name in runs], {}
    all_epochs = [epoch for seeds in runs.values() for history in seeds for epoch in history]
    positive = min(epoch[f"{split}_loss"] for epoch in all_epochs for split in ("train", "val")) > 0
    for index, (name, seeds) in enumerate(runs.items()):
        column = index % columns
        place = 2 * (index - column) + column + 1
        loss = figure.add_subplot(2 * num_rows, columns, place, sharey=shared.get(keys[index]))
        miou = figure.add_subplot(2 * num_rows, columns, place + columns, sharey=shared.get("mean IoU"))
        shared = {keys[index]: loss, "mean IoU": miou} | shared
        lines = (loss, "train_loss", "--", ORANGE), (loss, "val_loss", "-", BLUE), (miou, "val_miou", "-", BLUE)
        for history in seeds:
            epochs, marker = [epoch["epoch"] for epoch in history], "." if len(history) == 1 else None
            for axis, key, style, colour in lines:
                axis.plot(epochs, [epoch[key] for epoch in history], style, color=colour, marker=marker, linewidth=1)
        miou.axhline(baseline[1], color=GREY, linestyle=":")
        if positive:
            loss.set_yscale("log")  # one diverging epoch would flatten the others
            locator = LogLocator(subs=(1, 2, 5))
            loss.yaxis.set(major_locator=locator, major_formatter="{x:g}", minor_locator=NullLocator())
        loss_lines = textwrap.wrap(losses[name] or "unknown loss", 24) if len(set(losses.values())) > 1 else []
        loss.set_title("\n".join((_experiment(name), *loss_lines)), fontsize=9)
        loss.set_ylabel("loss" if column == 0 else "")
        loss.tick_params(labelleft=column == 0 or keys[index] != keys[index - 1])
        miou.set(xlabel="epoch", ylabel="" if column else "val mean IoU")
        miou.tick_params(labelleft=column == 0)
        for axis in (loss, miou):
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
            axis.grid(alpha=0.3)
    miou.set_ylim(bottom=0)
    handles = [*loss.lines[:2], miou.lines[-1]]
    figure.legend(handles, ("train", "val", baseline[0]), loc="outside lower center", ncols=3)
    _save(figure, path)


def _class_handles(classes, masks):
    """Legend entries of the at most 40 classes, void included, that occur most in a list of masks."""
    counts = sum(np.bincount(np.ravel(mask), minlength=VOID + 1) for mask in masks)
    labels = [label for label in _most_frequent(counts).tolist() if counts[label]]
    names = _shortened(["void" if label == VOID else classes[label] for label in labels])
    colours = imaging.class_colours(classes)[labels] / 255
    handles = [Patch(facecolor=colour, edgecolor="black", label=name) for colour, name in zip(colours, names)]
    if (counts > 0).sum() > len(labels):
        handles.append(Line2D([], [], linestyle="", label=f"and {(counts > 0).sum() - len(labels)} more"))
    return handles
