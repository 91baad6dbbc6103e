"""HTML reports of a run and of a comparison, each one file that loads nothing."""

import base64
import dataclasses
import io
import re
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from seg import files, imaging
from util import VOID

SIDE = 400  # of the pictures of a sample in pixels, so that a report has a few MB at most


@dataclasses.dataclass
class Section:
    """A part of a report: paragraphs of Markdown whose only markup is `code`, a table, a plot, samples and code.

    ``rows`` are dicts from heading to cell, a str; those in ``foot`` stay at the end when the table is sorted, and
    ``best`` is marked. ``bars`` are the headings of columns with values of 0 to 1 to draw as bars. ``plot`` is the path
    of a PNG file, relative to the report, and its caption. ``samples`` are from ``_sample``.
    """

    heading: str
    text: str = ""
    rows: list | tuple = ()
    foot: list | tuple = ()
    bars: list | tuple = ()
    best: dict | None = None
    plot: tuple | None = None
    samples: list | tuple = ()
    code: str = ""

    @property
    def columns(self):
        """The headings, each with its CSS class. Numbers are sorted as such; text may follow, such as ± 0.01."""
        kinds = {}
        for name in headings(self.rows):
            cells = {str(row.get(name, "")) for row in self.rows} - {"", "-", "–"}
            is_number = all(re.match(r"[-+]?\d", cell) for cell in cells)
            kinds[name] = "number" if is_number else "long" if max(map(len, cells)) > 30 else ""
        return kinds


def headings(rows):
    """The keys of a table's rows, in the order of the row with the most."""
    return list(dict.fromkeys(name for row in [max(rows, key=len), *rows] for name in row))


def _paragraphs(text):
    text = re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup("".join(f"<p>{part}</p>" for part in text.split("\n\n") if part))


def _data_uri(picture):
    """The content of a PNG file, or of a PIL image, as an address: masks exactly, photos as JPEG."""
    if isinstance(picture, Path):
        data, kind = picture.read_bytes(), "png"
    else:
        file, kind = io.BytesIO(), "png" if picture.mode == "P" else "jpeg"
        picture.save(file, kind, quality=80, subsampling=0)  # thin lines of wrong pixels keep their colour
        data = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


_environment = jinja2.Environment(loader=jinja2.PackageLoader("seg"), autoescape=True, trim_blocks=True)
_environment.filters |= {"paragraphs": _paragraphs, "data_uri": _data_uri}
TEMPLATE = _environment.get_template("report.html")


def write(path, title, summary, sections):
    """Write a report to ``path``; ``summary`` is a line below the title, ``sections`` a list of Section."""
    text = TEMPLATE.render(title=title, summary=summary, sections=sections, folder=path.parent)
    files.write(path, text.encode())


def _sample(classes, name, iou, photo, truth, predicted):
    """A prediction: its title, images, a dict from name to PIL image, and legend, a list of (name, colour)."""
    size, colours = imaging.bounded_size(truth.shape, SIDE), imaging.class_colours(classes)
    photo = imaging.resize(Image.fromarray(photo), size)
    truth, predicted = (imaging.resize_mask(mask, size) for mask in (truth, predicted))
    images = {"photo": Image.fromarray(photo), "ground truth": imaging.palette_image(truth, colours)}
    images["prediction"] = imaging.palette_image(predicted, colours)
    images["wrong pixels"] = Image.fromarray(imaging.wrong_pixels(photo, truth, predicted))
    names = {**dict(enumerate(classes)), VOID: "void, not evaluated"}
    legend = [(names[label], tuple(colours[label].tolist())) for label in np.union1d(truth, predicted).tolist()]
    title = f"{name}, mean IoU {_text('iou', iou)}"
    return {"title": title, "images": images, "legend": [*legend, ("wrong pixels", imaging.WRONG)]}


def _text(name, value):
    """A metric, or a dict of metrics, as text."""
    if value is None or value != value:  # NaN
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{heading} {text}" for heading, text in _row(value).items())
    if isinstance(value, float):
        is_metric = name.endswith(("iou", "loss", "accuracy"))  # others are learning rates and a script's own flags
        return f"{value:.1f}" if name == "seconds" else f"{value:.4f}" if is_metric else f"{value:.4g}"
    return f"{value:,}" if name == "parameters" else str(value)


def _row(values, left_out=()):
    """Metrics as a row of a table: a dict from heading, such as mean IoU for miou, to text."""
    names = {"miou": "mean IoU", "assignment_iou": "the assignment's IoU", "background": "baseline"}
    return {
        names.get(name, name.replace("miou", "mean IoU").replace("_", " ")): _text(name, value)
        for name, value in values.items()
        if name not in left_out
    }


def write_run(run, title, samples):
    """Write the report of a finished run, with the plots that exist.

    ``samples`` yields name, IoU, photo, mask and predicted mask of an image. The IoU is that of the image by itself, or
    NaN, the photo is uint8 [H, W, 3], and masks are uint8 [H, W] with VOID.
    """

    def plot(name, caption):
        return (run.plot(name).name, caption) if run.plot(name).exists() else None

    metrics, splits = run.metrics, {name: run.metrics[name] for name in run.splits}
    results = [{"split": name} | _row(scores, left_out=("iou",)) for name, scores in splits.items()]
    ious = [
        {"class": name} | {f"{split} IoU": _text("iou", scores["iou"][name]) for split, scores in splits.items()}
        for name in run.classes
    ]
    mean = {"class": "mean"} | {f"{split} IoU": _text("iou", scores["miou"]) for split, scores in splits.items()}
    epochs = [_row(row, left_out=("batch_learning_rates",)) for row in run.history]
    settings = {"input size": imaging.size_text(metrics["size"])}
    settings |= _row(metrics, left_out=("title", "val", "test", "epoch_seconds", "size", "code"))
    script = next(iter(metrics["code"][-1]["files"].values()))
    sections = [
        Section("Results", rows=results),
        Section("Predictions on val", samples=[_sample(run.classes, *sample) for sample in samples]),
        Section("Classes", rows=ious, foot=[mean], bars=list(mean)[1:], plot=plot("iou", "IoU of each class.")),
        Section("Curves", plot=plot("curves", "Loss, pixel accuracy, mean IoU and learning rates.")),
        Section("Confusion matrix", plot=plot("confusion", "What the pixels of each class of val are predicted as.")),
        Section("Epochs", "The best epoch is marked.", rows=epochs, best=epochs[metrics["best_epoch"] - 1]),
        Section("Augmentation", plot=plot("augmentation", "Augmented samples of train, each with its mask.")),
        Section("Settings", rows=[{"setting": name, "value": text} for name, text in settings.items()], code=script),
    ]
    sections = [section for section in sections if section != Section(section.heading)]  # not the empty ones
    summary = f"Best epoch {metrics['best_epoch']} of {metrics['epochs']}, seed {metrics['seed']}."
    write(run.report, title, f"{summary} Void pixels are not evaluated.", sections)
