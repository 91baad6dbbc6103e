"""The figures of a run, drawn to given paths without a display."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

import util
from voc import PALETTE, VOID

# Okabe and Ito's colours, told apart by the colour-blind; each comes with its own line style or hatch for print.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++")


def _figure(width, height):
    """A figure that belongs to the Agg canvas, whatever backend the user has chosen."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure, path):
    with util.replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)


def curves(path, title, history, best_epoch, background):
    """Draw loss, pixel accuracy, mean IoU and learning rate over the epochs, the best epoch marked.

    Args:
        history: list of dicts with epoch, learning_rate, train_loss, val_loss, val_pixel_accuracy and val_miou.
        background: name and engine.Scores of a constant prediction on val, drawn as the line to beat.
    """
    figure = _figure(10, 7)
    figure.suptitle(title)
    axes = figure.subplots(2, 2).flat
    epochs = [row["epoch"] for row in history]
    constant, floor = background
    panels = (
        ("loss", (("train_loss", "train", ORANGE, "--"), ("val_loss", "val", BLUE, "-")), None),
        ("pixel accuracy", (("val_pixel_accuracy", "val", BLUE, "-"),), floor.pixel_accuracy),
        ("mean IoU", (("val_miou", "val", BLUE, "-"),), floor.miou),
        ("learning rate", (("learning_rate", "", GREEN, "-"),), None),
    )
    for axis, (name, lines, level) in zip(axes, panels):
        for key, label, colour, style in lines:
            axis.plot(epochs, [row[key] for row in history], style, color=colour, label=label, marker="o", markersize=3)
        if level is not None:
            axis.axhline(level, color=GREY, linestyle=":", label=f"{constant} everywhere")
        if name != "learning rate":
            axis.axvline(best_epoch, color=GREY, linewidth=0.8, label=f"best epoch: {best_epoch}")
            axis.legend()
        axis.set(title=name, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.update_datalim([(epochs[0], 0)])  # so that the margin above is a share of all that is shown
        axis.autoscale_view()
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    _finish(figure, path)


def class_iou(path, title, classes, scores):
    """Draw the IoU of each class as bars, one colour a split or a model.

    Args:
        classes: the class names.
        scores: dict from the name of a split or a model, at most seven, to its engine.Scores.
    """
    figure = _figure(max(6, 0.13 * len(classes) * (2 + len(scores))) + 3, 5)
    figure.suptitle(title)
    axis = figure.subplots()
    width = 0.8 / len(scores)
    for number, ((name, result), colour, hatch) in enumerate(zip(scores.items(), COLOURS, HATCHES)):
        values = util.iou(result.matrix).numpy()
        places = np.arange(len(classes)) + (number - (len(scores) - 1) / 2) * width
        label = f"{name}: mean IoU {result.miou:.4f}"
        axis.bar(places, values, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
        for place in places[np.isnan(values)]:
            axis.text(place, 0, " absent", rotation=90, ha="center", va="bottom", fontsize=7, color=colour)
        axis.axhline(result.miou, color=colour, linestyle=("--", ":", "-.")[number % 3], linewidth=1)
    highest = max(np.nanmax(bar.datavalues) for bar in axis.containers)
    axis.set(ylabel="IoU", xlim=(-0.7, len(classes) - 0.3), ylim=(0, min(1, max(1.05 * highest, 0.01))))
    axis.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    _finish(figure, path)


def confusion(path, title, classes, matrix):
    """Draw a confusion matrix, int64 [C, C] with rows truth, each row as shares of the true class's pixels."""
    side = max(5, 0.42 * len(classes) + 2)
    figure = _figure(side + 0.8, side)
    axis = figure.subplots()
    counts = matrix.double()
    shares = (counts / counts.sum(1, keepdim=True)).numpy()
    image = axis.imshow(np.ma.masked_invalid(shares), cmap="cividis", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(np.nan_to_num(shares) >= 0.005)):
        share = shares[row, column]
        axis.text(
            column,
            row,
            f"{100 * share:.0f}",
            ha="center",
            va="center",
            fontsize=7,
            color="black" if share > 0.5 else "white",
        )
    axis.set(title=title, xlabel="prediction", ylabel="truth")
    axis.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    figure.colorbar(image, label="share of the true class's pixels (figures: percent)", shrink=0.8)
    _finish(figure, path)


def predictions(path, title, classes, rows, models=("prediction",)):
    """Draw photo, truth and one or more predictions side by side, with a legend of the classes in them.

    Args:
        classes: the class names.
        rows: list of (name, photo uint8 [H, W, 3], truth [H, W], prediction [H, W], ...), labels being classes or VOID.
        models: heading of each column of predictions.
    """
    columns = 2 + len(models)
    figure = _figure(3.1 * columns + 1.7, 2.6 * len(rows) + 0.6)
    figure.suptitle(title)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, photo, *labels) in zip(axes, rows):
        for axis, picture in zip(line, (photo, *(PALETTE[label] for label in labels))):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    for axis, name in zip(axes[0], ("photo", "truth", *models)):
        axis.set_title(name)
    _legend(figure, classes, [label for row in rows for label in row[2:]])
    _finish(figure, path)


def overlay(path, title, classes, photo, labels):
    """Draw a photo with its classes laid over it in VOC's colours, background left clear, and a legend.

    Args:
        photo: uint8 [H, W, 3].
        labels: integer array [H, W], classes.
    """
    height, width = labels.shape
    figure = _figure(8, min(24, max(3, 6.5 * height / width)))
    axis = figure.subplots()
    background = np.array([name == "background" for name in classes])
    share = np.where(background[labels], 0, 0.6)[..., None]
    axis.imshow(((1 - share) * photo + share * PALETTE[labels]).round().astype(np.uint8))
    axis.set(xticks=[], yticks=[], title=title)
    _legend(figure, classes, [labels])
    _finish(figure, path)


def samples(path, title, classes, images, masks):
    """Draw what a network is shown in training: each image with its mask to the right of it.

    Args:
        classes: the class names.
        images: uint8 array [N, H, W, 3], N a multiple of 4.
        masks: integer array [N, H, W], classes and VOID.
    """
    figure = _figure(14, 1.6 * len(images) / 4 + 0.4)
    figure.suptitle(title)
    axes = figure.subplots(len(images) // 4, 8)
    pictures = (picture for image, mask in zip(images, masks) for picture in (image, PALETTE[mask]))
    for axis, picture in zip(axes.flat, pictures):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
    _legend(figure, classes, masks)
    _finish(figure, path)


def comparison(path, title, scores, background):
    """Draw the mean IoU of experiments: a bar for the mean, a whisker for the standard deviation, a dot for each seed.

    Args:
        scores: dict from an experiment to its list of mean IoU, one a seed.
        background: name and mean IoU of a constant prediction, drawn as the line to beat.
    """
    scores = {name: values for name, values in scores.items() if values}
    figure = _figure(8, 0.5 * len(scores) + 1.4)
    axis = figure.subplots()
    for place, values in enumerate(scores.values()):
        deviation = np.std(values, ddof=1) if len(values) > 1 else None
        axis.barh(place, np.mean(values), xerr=deviation, capsize=4, color=BLUE, alpha=0.5)
        axis.plot(values, [place] * len(values), "o", color="black", markersize=3)
    constant, floor = background
    axis.axvline(floor, color=GREY, linestyle=":", label=f"{constant} everywhere: {floor:.4f}")
    axis.set(title=title, xlabel="mean IoU (bar: mean over seeds, whisker: standard deviation, dots: seeds)")
    axis.set_yticks(range(len(scores)), scores)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center")
    _finish(figure, path)


def classes_by_experiment(path, title, experiments, classes, ious):
    """Draw IoU per class and experiment as a heat map.

    Args:
        experiments, classes: names of rows and columns.
        ious: float array [experiments, classes] in 0..1, NaN for a class that does not occur.
    """
    figure = _figure(0.5 * len(classes) + 3, 0.42 * len(experiments) + 2.4)
    axis = figure.subplots()
    top = max(np.nanmax(ious), 0.01)
    image = axis.imshow(np.ma.masked_invalid(ious), cmap="cividis", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(ious):
        text = "-" if np.isnan(value) else f"{100 * value:.0f}"
        colour = "black" if np.isnan(value) or value > top / 2 else "white"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set(title=title)
    axis.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    axis.set_yticks(range(len(experiments)), experiments)
    figure.colorbar(image, label="IoU (figures: percent)")
    _finish(figure, path)


def histories(path, title, runs, background):
    """Draw loss and mean IoU of each epoch: a column for each experiment, a line for each seed.

    Args:
        runs: dict from an experiment to a list with the history of each seed, as ``curves`` takes it.
        background: name and mean IoU of a constant prediction on val, drawn as the line to beat.
    """
    figure = _figure(2.1 * len(runs) + 1, 4.6)
    figure.suptitle(title)
    axes = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False)
    for (loss, miou), (name, seeds) in zip(axes.T, runs.items()):
        for history in seeds:
            epochs = [row["epoch"] for row in history]
            loss.plot(epochs, [row["train_loss"] for row in history], "--", color=ORANGE, linewidth=1)
            loss.plot(epochs, [row["val_loss"] for row in history], "-", color=BLUE, linewidth=1)
            miou.plot(epochs, [row["val_miou"] for row in history], "-", color=BLUE, linewidth=1)
        miou.axhline(background[1], color=GREY, linestyle=":")
        loss.set_title(name, fontsize=10)
        miou.set_xlabel("epoch")
        miou.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (loss, miou):
            axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="loss", yscale="log")  # one epoch gone astray would press the others flat
    axes[0, 0].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    axes[1, 0].set(ylabel="val mean IoU", ylim=(0, None))
    styles = (("train", ORANGE, "--"), ("val", BLUE, "-"), (f"{background[0]} everywhere", GREY, ":"))
    lines = [Line2D([], [], color=colour, linestyle=style, label=label) for label, colour, style in styles]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    _finish(figure, path)


def _legend(figure, classes, masks):
    """Name the colours of the classes, and of void, that occur in a list of masks."""
    shown = set().union(*map(np.unique, masks))
    patches = [
        Patch(facecolor=PALETTE[label] / 255, edgecolor="black", label="void" if label == VOID else classes[label])
        for label in sorted(shown)
    ]
    figure.legend(handles=patches, loc="outside right upper")
