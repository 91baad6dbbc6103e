"""The HTML reports, read as a browser does: what they hold, that they load nothing, and that their script works."""

import base64
import html.parser
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from test_compare import run_compare, table_rows, write_run

import util
from seg import files, html, imaging
from util import VOID

# names that would break out of text and of attributes
CLASSES = ["background", "absent", "<script>alert(1)</script>", 'cat" onclick="alert(1)', "dog & cow's"]
CODE = "print('</script><img src=x>')\nprint('$body ${title} & more')"
EMPTY = {"meta", "img", "br", "link", "input"}
SHAPES = ((60, 80), (640, 500), (1, 30))


class Page(html.parser.HTMLParser):
    """The elements of a page, (tag, attributes); its texts by tag, and its tables as lists of rows of cells."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.tables, self.rows, self.open = [], {}, [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in EMPTY:
            return
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.rows.append(dict(attributes))
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]

    def images(self, alt):
        """The images with a text, decoded."""
        sources = [attributes["src"] for tag, attributes in self.elements if tag == "img" and attributes["alt"] == alt]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]


def history_of(epochs):
    row = {"learning_rate": 1e-3, "learning_rate_2": 1e-5, "train_loss": 2.5, "val_loss": 2.0, "val_miou": 0.25}
    return [{"epoch": epoch, **row, "seconds": 1.23, "batch_rates": [[1], [2]]} for epoch in range(1, epochs + 1)]


def samples(rng):
    """Photos of grey squares with their masks and predictions; the second is larger than it is shown."""
    for index, (height, width) in enumerate(SHAPES):
        squares = rng.integers(0, len(CLASSES) - 1, (2, height // 20 + 1, width // 20 + 1), dtype=np.uint8)
        squares[0] %= len(CLASSES) - 2  # one class is only predicted
        mask, predicted = np.kron(squares, np.ones((1, 20, 20), np.uint8))[:, :height, :width]
        photo = np.repeat(50 * predicted[:, :, np.newaxis], 3, axis=2)
        mask[:, :4] = VOID
        yield f"photo <b>{index}</b>", math.nan if index == 2 else 0.5, photo, mask, predicted


def write_report(out, has_test=True, epochs=2, classes=CLASSES):
    """Write the report of a made-up run; return its path and the metrics."""
    run_files = files.RunFiles(out, "train_x", 3)
    for name in ("curves", "iou", "confusion"):
        Image.new("RGB", (130, 70), "red").save(run_files.plot(name))
    matrix = torch.from_numpy(np.random.default_rng(0).integers(1, 100, (len(classes), len(classes))))
    matrix[1] = matrix[:, 1] = 0
    val, test = (util.Scores(1.5, matrix**power, classes, assignment_iou=0.125).as_dict() for power in (1, 2))
    metrics = {"experiment": "train_x", "dataset": "Made", "seed": 3, "epochs": epochs, "best_epoch": epochs}
    metrics |= {"loss": "CrossEntropyLoss", "parameters": 1_500_000, "flags": {"batch_size": 16, "limit": None}}
    metrics |= {"versions": {"torch": "2.9"}, "val": val, "test": test if has_test else None}
    metadata = {"classes": classes, "size": [224, 320], "class": "Net", "arguments": {"width": 8}}
    metadata |= {"code": {"train.py": CODE}}
    shown = samples(np.random.default_rng(0))
    html.write_run(run_files, "train_x: <idea>, Made", metrics, history_of(epochs), shown, metadata)
    return run_files.report, json.loads(json.dumps(metrics))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path, metrics = write_report(tmp_path_factory.mktemp("report"))
    return Page(path), metrics


def test_the_report_of_a_run_shows_the_metrics(report):
    page, metrics = report
    names, values = page.texts["dt"], page.texts["dd"]
    shown = dict(zip(names[:5], values[:10:2]))  # each result has a remark
    for split in ("val", "test"):
        assert shown[f"{split} mean IoU"] == f"{metrics[split]['miou']:.4f}"
        assert shown[f"{split} pixel accuracy"] == f"{metrics[split]['pixel_accuracy']:.4f}"
        baseline = metrics[split]["background"]
        for name in ("miou", "pixel_accuracy"):
            assert f"all-background baseline: {baseline[name]:.4f}" in values
    assert shown["best epoch"] == "2 of 2"
    classes, epochs = page.tables
    assert classes[0] == ["class", "val IoU", "test IoU"]
    for row, name in zip(classes[1:], CLASSES):
        ious = [metrics[split]["iou"][name] for split in ("val", "test")]
        assert row == [name, *("–" if iou is None else f"{iou:.4f}" for iou in ious)]
    assert classes[-1] == ["mean", *(f"{metrics[split]['miou']:.4f}" for split in ("val", "test"))]
    header = ["epoch", "learning rate", "learning rate 2", "train loss", "val loss", "val mean IoU", "seconds"]
    assert epochs == [header] + [[str(n), "0.001", "1e-05", "2.5000", "2.0000", "0.2500", "1.2"] for n in (1, 2)]
    assert [row.get("class") for row in page.rows[-2:]] == [None, "best"]
    shares = [re.search(r"--share: ([\d.]+)", style)[1] for style in page.attributes("style") if "--share" in style]
    assert shares == [cell for row in classes[1:-1] for cell in row[1:] if cell != "–"]
    settings = dict(zip(names[5:], values[10:]))
    expected = {"network": "Net(width=8)", "input size": "320x224", "seed": "3", "parameters": "1,500,000"}
    expected |= {"flags": "batch size 16, limit –", "loss": "CrossEntropyLoss", "val loss": "1.5000"}
    assert expected.items() <= settings.items() and settings["test, the assignment's IoU"] == "0.1250"


def test_nothing_is_loaded_and_no_text_becomes_markup(report):
    page, _ = report
    addresses = page.attributes("src") + page.attributes("href")
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert not {"link", "object", "iframe", "base", "b", "idea"} & {tag for tag, _ in page.elements}
    assert page.texts["script"][1:] == [] and not page.attributes("onclick")
    policy = next(attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert page.texts["h1"] == page.texts["title"] == ["train_x: <idea>, Made"]
    assert page.texts["pre"] == [CODE]
    assert page.texts["h3"] == [f"photo <b>{n}</b>, mean IoU {iou}" for n, iou in enumerate(("0.5000", "0.5000", "–"))]


def test_images_are_those_of_the_samples(report):
    page, _ = report
    expected = list(samples(np.random.default_rng(0)))
    images = {name: page.images(name) for name in ("photo", "ground truth", "prediction", "wrong pixels")}
    for index, (_, _, photo, mask, predicted) in enumerate(expected):
        shown = {name: np.asarray(found[index]) for name, found in images.items()}
        height, width = (400, 312) if index == 1 else mask.shape
        assert shown["photo"].shape == shown["wrong pixels"].shape == (height, width, 3)
        assert shown["ground truth"].shape == shown["prediction"].shape == (height, width)
        if index == 1:
            continue
        assert (shown["ground truth"] == mask).all() and (shown["prediction"] == predicted).all()
        assert np.abs(shown["photo"].astype(float) - photo).max() < 30  # JPEG is not exact
        wrong = np.repeat((150 + 0.4 * photo.mean(2)).astype(np.uint8)[:, :, np.newaxis], 3, axis=2)
        wrong[predicted != mask] = imaging.WRONG
        wrong[mask == VOID] = imaging.PALETTE[VOID]
        assert np.abs(shown["wrong pixels"].astype(float) - wrong).mean() < 5
    plots = page.images(html.PLOTS["curves"])
    assert [plot.size for plot in plots] == [(130, 70)] and not page.images(html.PLOTS["augmentation"])
    void = images["ground truth"][0].convert("RGB").getpixel((0, 0))
    assert void == tuple(imaging.PALETTE[VOID].tolist())


def test_the_legend_names_the_classes_of_each_image(report):
    page, _ = report
    names = [*CLASSES[:-1], "void, not evaluated", "wrong pixels"]
    assert page.texts["li"][: len(names)] == names and CLASSES[-1] not in page.texts["li"]


def test_a_report_has_no_column_for_a_missing_test_split(tmp_path):
    page = Page(write_report(tmp_path, has_test=False, epochs=1)[0])
    assert page.tables[0][0] == ["class", "val IoU"] and len(page.tables[1]) == 2
    assert not any("test" in text for text in page.texts["dt"])


def test_the_report_belongs_to_the_files_of_a_run(tmp_path):
    path, _ = write_report(tmp_path)
    run_files = files.RunFiles(tmp_path, "train_x", 3)
    assert path == tmp_path / "plots" / "train_x_report.html" and path in run_files.existing()
    run_files.delete()
    assert not path.exists()


def test_the_comparison_has_the_tables_of_the_markdown_and_links_to_reports(tmp_path, monkeypatch):
    names = ("train", "train_4_a", "train_my run&co")
    for seed in range(3):
        for name, iou in zip(names, (0.25, 0.5, 0.75)):
            write_run(tmp_path / f"seed{seed}", name, seed, [iou, iou + 0.01 * seed, iou])
    for folder, name in (("seed0", "train"), ("seed2", "train_my run&co")):
        (tmp_path / folder / "plots").mkdir()
        (tmp_path / folder / "plots" / f"{name}_report.html").touch()
    markdown = table_rows(run_compare(tmp_path, monkeypatch))
    page = Page(tmp_path / "RESULTS.html")
    *tables, runs = page.tables
    scores = ["val mean IoU", "test mean IoU"]
    assert [row for table in tables for row in table] == [row for row in markdown if row[0] != "---"]
    assert page.texts["h1"] == ["Results on Made, all images"]
    assert runs[0] == ["experiment", "seed", *scores, "epochs", "best epoch", "seconds", "report"]
    assert [row[:2] for row in runs[1:]] == [[name, str(seed)] for name in names for seed in range(3)]
    assert [row[-1] for row in runs[1:]] == ["report"] + 7 * [""] + ["report"]
    links = [address for address in page.attributes("href") if not address.startswith("#")]
    assert links == ["seed0/plots/train_report.html", "seed2/plots/train_my%20run%26co_report.html"]
    assert len([address for address in page.attributes("src") if address.startswith("data:image/png")]) == 3


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

# Uses the page as a reader does; what it sees goes into the element that the test reads.
READER = """<script>
const seen = {}, button = column => document.querySelectorAll("th button")[column];
const names = () => [...document.querySelector("tbody").rows].map(row => row.cells[0].textContent);
const shown = () => samples.map(sample => !sample.hidden).join();
const press = (key, target) => target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
seen.start = [names(), shown()];
seen.sorted = [1, 1, 1, 0, 1].map(column => {
  button(column).click();
  return [names(), document.querySelector("th[aria-sort]").getAttribute("aria-sort")];
});
seen.pages = [];
for (const act of [() => press("ArrowRight", document.body), () => document.querySelector(".next").click(),
    () => press("ArrowRight", document.body), () => press("ArrowLeft", document.body),
    () => document.querySelector(".previous").click(), () => press("ArrowLeft", document.querySelector(".scroll"))]) {
  act();
  seen.pages.push(shown());
}
seen.width = [document.documentElement.scrollWidth, innerWidth];
const result = document.createElement("output");
result.textContent = JSON.stringify(seen);
document.body.append(result);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_tables_sort_and_predictions_are_paged_in_a_browser(report, tmp_path):
    path, metrics = write_report(tmp_path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", f"{READER}</body>"), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    line = [CHROMIUM, *options, "--window-size=600,900", "--dump-dom", path.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    output = re.search("<output>(.*)</output>", done.stdout)
    assert output, done.stderr
    seen = json.loads(html.unescape(output[1]))
    first, second, third = ("true,false,false", "false,true,false", "false,false,true")
    assert seen["start"] == [CLASSES, first]
    ious = metrics["val"]["iou"]
    ranked = sorted((name for name in CLASSES if ious[name] is not None), key=ious.get)
    descending, by_name = [*ranked[::-1], "absent"], [CLASSES[2], "absent", CLASSES[0], *CLASSES[3:]]
    expected = [(descending, "descending"), ([*ranked, "absent"], "ascending"), (CLASSES, "none")]
    expected += [(by_name, "ascending"), (descending, "descending")]
    assert [tuple(each) for each in seen["sorted"]] == expected
    assert seen["pages"] == [second, third, first, third, second, second]
    assert seen["width"][0] <= seen["width"][1]
