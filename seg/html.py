"""HTML reports, each one file that loads nothing: that of a run, and the pieces for others.

All text is escaped, except what is of the type Html, which the pieces return.
"""

import base64
import html
import io
import re
import string
from pathlib import Path

import numpy as np
from PIL import Image

import util
from seg import files, imaging
from util import VOID

# read here, so that a run without this file ends before its training rather than after it
TEMPLATE = string.Template(
    Path(__file__).resolve().with_name("templates").joinpath("report.html").read_text(encoding="utf-8")
)
SAMPLE_SIDE = 400  # of these in pixels, so that a report has a few MB at most

PLOTS = {
    "curves": "Loss, pixel accuracy, mean IoU and learning rates over the epochs.",
    "iou": "IoU of each class.",
    "confusion": "Confusion matrix on val: each row shows what the pixels of a class are predicted as.",
    "augmentation": "Augmented samples of train, each with its mask.",
}


class Html(str):
    """Text that is HTML already."""


def escape(text):
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def write(path, title, summary, sections):
    """Write a report to ``path``: ``summary`` is a line below the title, ``sections`` maps headings to Html."""
    links = " ".join(f'<a href="#{number}">{escape(heading)}</a>' for number, heading in enumerate(sections, 1))
    body = [f'<header>\n<h1>{escape(title)}</h1>\n<p class="soft">{escape(summary)}</p>\n<nav>{links}</nav>\n</header>']
    body += ["<main>"]
    for number, (heading, content) in enumerate(sections.items(), 1):
        body.append(f'<section>\n<h2 id="{number}">{escape(heading)}</h2>\n{content}\n</section>')
    with files.atomic_write(path) as file:
        file.write(TEMPLATE.substitute(title=escape(title), body="\n".join([*body, "</main>"])).encode())


def text(markdown):
    """Paragraphs of Markdown whose only markup is ```code```."""
    paragraphs = (re.sub("`([^`]+)`", r"<code>\1</code>", escape(part)) for part in markdown.strip().split("\n\n"))
    return Html("\n".join(f"<p>{part}</p>" for part in paragraphs))


def facts(items):
    """The main results in large digits. ``items`` are (name, value, remark)."""
    boxes = []
    for name, value, remark in items:
        value, remark = f'<dd class="value">{escape(value)}</dd>', f'<dd class="soft">{escape(remark)}</dd>'
        boxes.append(f"<div><dt>{escape(name)}</dt>{value}{remark}</div>")
    return Html('<dl class="facts">\n' + "\n".join(boxes) + "\n</dl>")


def settings(items):
    """A dict from name to value, as a list."""
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items.items())
    return Html('<dl class="list">\n' + "\n".join(lines) + "\n</dl>")


def _scroll(content):
    """A box that scrolls by itself, also by keyboard, so that the page need not."""
    return Html(f'<div class="scroll" tabindex="0" role="group" aria-label="scrollable">\n{content}\n</div>')


def folded(summary, code):
    """Program text to unfold."""
    return Html(f"<details>\n<summary>{escape(summary)}</summary>\n{_scroll(f'<pre>{escape(code)}</pre>')}\n</details>")


def link(address, name):
    return Html(f'<a href="{escape(address)}">{escape(name)}</a>')


def table(header, rows, foot=(), bars=(), best=None):
    """A table that is sorted by a click on a heading. Cells are text; the first of a row names it.

    ``foot`` are rows that stay at the end, ``bars`` the headings of columns with shares, 0 to 1, to draw as bars, and
    ``best`` is the index of a row to mark.
    """
    # a column of numbers is aligned to the right and sorted as such; text may follow a number, such as ± and another
    columns = [[str(cell) for cell in column if cell not in ("", "-", "–")] for column in zip(*rows)]
    number = [bool(column) and all(re.match(r"[-+]?\d", cell) for cell in column) for column in columns]
    headings = zip(header, number)
    head = "".join(f'<th scope="col"{" class=number" * is_number}>{escape(name)}</th>' for name, is_number in headings)
    lines = ["<table>", f"<thead><tr>{head}</tr></thead>"]
    for tag, group in (("tbody", rows), ("tfoot", foot)):
        lines.append(f"<{tag}>")
        for index, (first, *cells) in enumerate(group):
            line = "<tr class=best>" if tag == "tbody" and index == best else "<tr>"
            line += f'<th scope="row"{" class=number" * number[0]}>{escape(first)}</th>'
            for name, cell, is_number in zip(header[1:], cells, number[1:]):
                share = re.match(r"[\d.]+", str(cell)) if name in bars and tag == "tbody" else None
                bar = f' bar" style="--share: {share[0]}' if share else ""
                kind = "number" if is_number else "long" if len(str(cell)) > 30 else ""
                line += f'<td class="{kind}{bar}">{escape(cell)}</td>'
            lines.append(f"{line}</tr>")
        lines.append(f"</{tag}>")
    return _scroll("\n".join([*lines, "</table>"]))


def plot(path, caption):
    """A plot, a PNG file, with a caption; nothing if there is no such file."""
    if not path.exists():
        return Html()
    image = f'<img src="{_data_uri(path.read_bytes(), "png")}" alt="{escape(caption)}">'
    return Html(f'<figure class="plot">\n{_scroll(image)}\n<figcaption>{escape(caption)}</figcaption>\n</figure>')


def _data_uri(data, kind):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def predictions(samples, classes):
    """Predictions to page through. ``samples`` yields (name, IoU, photo, mask, predicted mask).

    Photos are uint8 [H, W, 3], masks uint8 [H, W] with VOID; the IoU is that of the image by itself, NaN if undefined.
    """
    titles, articles = [], []
    for name, iou, *arrays in samples:
        titles.append(escape(f"{name}, mean IoU {_format('iou', iou)}"))
        articles.append(f'<article class="sample">\n<h3>{titles[-1]}</h3>\n{_sample(*arrays, classes)}\n</article>')
    options = "".join(f"<option>{number}: {title}</option>" for number, title in enumerate(titles, 1))
    controls = f"""<div class="controls" hidden>
<button type="button" class="previous">← previous</button>
<button type="button" class="next">next →</button>
<select aria-label="image">{options}</select>
</div>"""
    return Html("\n".join([controls, *articles]))


def _sample(photo, truth, predicted, classes):
    """Photo, ground truth, prediction and wrong pixels of an image, and the classes in it."""
    height, width = imaging.bounded_size(truth.shape, SAMPLE_SIDE)
    photo = imaging.resize(Image.fromarray(photo), (height, width))
    truth, predicted = (
        imaging.resize(Image.fromarray(mask), (height, width), Image.Resampling.NEAREST) for mask in (truth, predicted)
    )
    wrong = imaging.wrong_pixels(photo, truth, predicted)
    colours = imaging.class_colours(classes)
    images = {"photo": Image.fromarray(photo), "ground truth": imaging.palette_image(truth, colours)}
    images |= {"prediction": imaging.palette_image(predicted, colours), "wrong pixels": Image.fromarray(wrong)}
    lines = ['<div class="images">']
    for name, image in images.items():
        file, kind = io.BytesIO(), "png" if image.mode == "P" else "jpeg"
        image.save(file, kind, quality=80, subsampling=0)  # thin lines of wrong pixels keep their colour
        attributes = f'class="{kind}" width="{width}" height="{height}" alt="{name}"'
        source = _data_uri(file.getvalue(), kind)
        lines.append(f'<figure><figcaption>{name}</figcaption><img src="{source}" {attributes}></figure>')
    lines += ["</div>", '<ul class="legend">']
    names = {**dict(enumerate(classes)), VOID: "void, not evaluated"}
    legend = [(colours[label], names[label]) for label in np.union1d(truth, predicted).tolist()]
    for (red, green, blue), name in [*legend, (imaging.WRONG, "wrong pixels")]:
        lines.append(f'<li><i style="background: rgb({red}, {green}, {blue})"></i>{escape(name)}</li>')
    return "\n".join([*lines, "</ul>"])


def _format(name, value):
    """A value of the metrics or the history as text."""
    if value is None or value != value:  # NaN
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{_words(key)} {_format(key, each)}" for key, each in value.items())
    if name in ("parameters", "multiply_adds"):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1f}" if name == "seconds" else f"{value:.4g}" if "learning_rate" in name else f"{value:.4f}"
    return str(value)


def _words(name):
    """The heading of a metric: mean IoU for miou."""
    return name.replace("miou", "mean IoU").replace("_", " ")


def write_run(run, title, samples):
    """Write the report of a finished run.

    Args:
        run_files: files.RunFiles; the plots that exist are taken into the report.
        metrics: what is in the JSON. history: a list of dicts, one per epoch.
        samples: see ``predictions``.
        metadata: from ``checkpoint.metadata``.
    """
    run_files, metrics, history, metadata = run, run.metrics, run.history, run.metrics
    splits = {name: metrics[name] for name in ("val", "test") if metrics[name]}
    classes, best_epoch, epochs = metadata["classes"], metrics["best_epoch"], metrics["epochs"]
    baseline = util.baseline_name(classes)
    plots = {name: plot(run_files.plot(name), caption) for name, caption in PLOTS.items()}

    results = []
    for split, scores in splits.items():
        for name in ("miou", "pixel_accuracy"):
            remark = f"{baseline}: {_format(name, scores['background'][name])}"
            results.append((f"{split} {_words(name)}", _format(name, scores[name]), remark))
    results.append(("best epoch", f"{best_epoch} of {epochs}", "by mean IoU on val"))

    rows = [[name, *(_format("iou", scores["iou"][name]) for scores in splits.values())] for name in classes]
    foot = [["mean", *(_format("miou", scores["miou"]) for scores in splits.values())]]
    header = ["class", *(f"{split} IoU" for split in splits)]
    iou_table = table(header, rows, foot, bars=header)

    columns = [name for name, value in history[0].items() if not isinstance(value, list)]
    rows = [[_format(name, row[name]) for name in columns] for row in history]
    best = [row["epoch"] for row in history].index(best_epoch)
    epoch_table = table([_words(name) for name in columns], rows, best=best)

    items = {"network": metadata["network"], "input size": "{1}x{0}".format(*metadata["size"])}
    left_out = ("val", "test", "epoch_seconds", "size", "code")
    items |= {_words(name): _format(name, value) for name, value in metrics.items() if name not in left_out}
    items |= {f"{split} loss": _format("loss", scores["loss"]) for split, scores in splits.items()}
    for split, scores in splits.items():
        items[f"{split}, the assignment's IoU"] = _format("", scores["assignment_iou"])

    sections = {
        "Results": facts(results) + plots["curves"],
        "Classes": iou_table + plots["iou"],
        "Predictions on val": predictions(samples, classes),
        "Confusion matrix": plots["confusion"],
        "Epochs": text("The best epoch is marked.") + epoch_table,
        "Augmentation": plots["augmentation"],
        "Settings": settings(items)
        + folded("The script as it ran", next(iter(metadata["code"][-1]["files"].values()))),
    }
    summary = f"Best epoch {best_epoch} of {epochs}, seed {metrics['seed']}. Void pixels are not evaluated."
    write(run_files.report, title, summary, {name: content for name, content in sections.items() if content})
