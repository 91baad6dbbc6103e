"""The HTML reports, read as a browser does: what they hold, that they load nothing, and that their script works."""

import base64
import io
import math
import re
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_compare import run_compare, tables, write_run

import util
from seg import html, imaging
from seg.run import Run
from util import VOID

# names that would break out of text and of attributes
CLASSES = ["background", "absent", "<script>alert(1)</script>", 'cat" onclick="alert(1)', "dog & cow's"]
CODE = "print('</script><img src=x>')\nprint('{{ body }} {% title %} & more')"
EMPTY = {"meta", "img"}
SHAPES = ((60, 80), (640, 500), (1, 30))


class Page(HTMLParser):
    """The elements of a page, (tag, attributes); its texts by tag, and its tables as lists of rows of cells."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.tables, self.open = [], {}, [], []
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


def samples():
    """Photos of grey squares with their masks and predictions; the second is larger than it is shown."""
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate(SHAPES):
        squares = rng.integers(0, len(CLASSES) - 1, (2, height // 20 + 1, width // 20 + 1), dtype=np.uint8)
        squares[0] %= len(CLASSES) - 2  # one class is only predicted
        mask, predicted = np.kron(squares, np.ones((1, 20, 20), np.uint8))[:, :height, :width]
        photo = np.repeat(50 * predicted[:, :, np.newaxis], 3, axis=2)
        mask[:, :4] = VOID
        yield f"photo <b>{index}</b>", math.nan if index == 2 else 0.5, photo, mask, predicted


def write_report(out, has_test=True, epochs=2):
    """Write the report of a made-up run; return the run."""
    run = Run(out, "train_x", 3)
    run.plots.mkdir()
    for name in ("curves", "iou", "confusion"):
        Image.new("RGB", (130, 70), "red").save(run.plot(name))
    matrix = torch.from_numpy(np.random.default_rng(0).integers(1, 100, (len(CLASSES), len(CLASSES))))
    matrix[1] = matrix[:, 1] = 0
    val, test = (util.Scores(1.5, matrix**power, CLASSES, assignment_iou=0.125).as_dict() for power in (1, 2))
    run.metrics = {
        "experiment": "train_x", "title": "<idea>", "dataset": "Made", "seed": 3, "epochs": epochs,
        "best_epoch": epochs, "loss": "CrossEntropyLoss", "network": "Net(width=8)", "parameters": 1_500_000,
        "flags": {"batch_size": 16, "limit": None}, "size": [224, 320], "commit": None,
        "code": [{"epoch": 1, "files": {"x.py": "pass"}}, {"epoch": 2, "files": {"train_x.py": CODE, "net.py": "x"}}],
        "versions": {"torch": "2.9"}, "val": val, "test": test if has_test else None,
    }  # fmt: skip
    row = {"learning_rate": 1e-3, "learning_rate_2": 1e-5, "train_loss": 2.5, "val_miou": 0.25}
    row |= {"batch_learning_rates": [[1], [2]], "seconds": 1.23}
    run.history = [{"epoch": epoch, **row} for epoch in range(1, epochs + 1)]
    html.write_run(run, "train_x: <idea>, Made", samples())
    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run = write_report(tmp_path_factory.mktemp("report"))
    return Page(run.report), run.metrics


def test_the_report_of_a_run_shows_the_metrics(report):
    page, metrics = report
    results, classes, epochs, settings = page.tables
    for split, row in zip(("val", "test"), results[1:], strict=True):
        shown, scores = dict(zip(results[0], row)), metrics[split]
        assert shown["split"] == split and shown["loss"] == "1.5000" and shown["the assignment's IoU"] == "0.1250"
        for heading, name in (("mean IoU", "miou"), ("pixel accuracy", "pixel_accuracy")):
            assert shown[heading] == f"{scores[name]:.4f}"
            assert f"{heading} {scores['background'][name]:.4f}" in shown["baseline"]
    assert classes[0] == ["class", "val IoU", "test IoU"]
    for row, name in zip(classes[1:], CLASSES):
        ious = [metrics[split]["iou"][name] for split in ("val", "test")]
        assert row == [name, *("–" if iou is None else f"{iou:.4f}" for iou in ious)]
    assert classes[-1] == ["mean", *(f"{metrics[split]['miou']:.4f}" for split in ("val", "test"))]
    shares = [re.search(r"--share: (.*)", style)[1] for style in page.attributes("style") if "--share" in style]
    assert shares == [cell for row in classes[1:] for cell in row[1:]]
    header = ["epoch", "learning rate", "learning rate 2", "train loss", "val mean IoU", "seconds"]
    assert epochs == [header] + [[str(n), "0.001", "1e-05", "2.5000", "0.2500", "1.2"] for n in (1, 2)]
    rows = [attributes.get("class") for tag, attributes in page.elements if tag == "tr"]
    assert rows[-len(settings) - 2 : -len(settings)] == [None, "best"]
    assert [plot.size for plot in page.images("IoU of each class.")] == [(130, 70)]
    assert "Confusion matrix" in page.texts["h2"] and "Augmentation" not in page.texts["h2"]  # not drawn
    expected = {"network": "Net(width=8)", "input size": "320x224", "seed": "3", "parameters": "1,500,000"}
    expected |= {"flags": "batch size 16, limit –", "loss": "CrossEntropyLoss", "versions": "torch 2.9"}
    assert expected.items() <= dict(settings).items()


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


def test_images_are_those_of_the_samples_and_their_legend_names_the_classes(report):
    page, _ = report
    images = {name: page.images(name) for name in ("photo", "ground truth", "prediction", "wrong pixels")}
    for index, (_, _, photo, mask, predicted) in enumerate(samples()):
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
    void = images["ground truth"][0].convert("RGB").getpixel((0, 0))
    assert void == tuple(imaging.PALETTE[VOID].tolist())
    names = [*CLASSES[:-1], "void, not evaluated", "wrong pixels"]
    assert page.texts["li"][: len(names)] == names and CLASSES[-1] not in page.texts["li"]


def test_a_report_has_no_column_for_a_missing_test_split(tmp_path):
    page = Page(write_report(tmp_path, has_test=False, epochs=1).report)
    assert page.tables[1][0] == ["class", "val IoU"] and len(page.tables[0]) == len(page.tables[2]) == 2


def test_the_comparison_has_the_tables_of_the_markdown_and_links_to_reports(tmp_path, monkeypatch):
    names = ("train", "train_my run&co")
    for seed in range(3):
        for name, iou in zip(names, (0.25, 0.75)):
            run = write_run(tmp_path / f"seed{seed}", name, seed, [iou, iou + 0.01 * seed, iou])
            if (seed, name) in ((0, names[0]), (2, names[1])):
                run.plots.mkdir()
                run.report.touch()
    found = tables(run_compare(tmp_path, monkeypatch))
    markdown = [[list(rows[0]), *(list(row.values()) for row in rows)] for rows in found]
    page = Page(tmp_path / "RESULTS.html")
    assert page.tables[:-1] == markdown and page.texts["h1"] == ["Results on Made, all images"]
    header, *rows = page.tables[-1]
    assert header[:4] == ["experiment", "seed", "val mean IoU", "test mean IoU"] and header[-1] == "report"
    assert [row[:2] for row in rows] == [[name, str(seed)] for name in names for seed in range(3)]
    assert [row[-1] for row in rows] == ["report"] + 4 * [""] + ["report"]
    links = [address for address in page.attributes("href") if not address.startswith("#")]
    assert links == ["seed0/plots/train_report.html", "seed2/plots/train_my%20run%26co_report.html"]
    assert len([address for address in page.attributes("src") if address.startswith("data:image/png")]) == 3


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone")
def test_git_ignores_what_the_commands_write_into_the_clone():
    written = "best_train_mine.pt last_train_mine.pt .train_mine.lock results/a.csv best_train.onnx page_5_b/page.js"
    written += " RESULTS.md RESULTS.html plots/train_mine_iou.png plots/train_mine_report.html plots/comparison.png"
    written += " data/a.tar predictions/val_scores.csv demo/plots/a.png seed0/best_train.pt comparison/RESULTS.md"
    done = subprocess.run(["git", "check-ignore", *written.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == written.split()


def test_tables_sort_and_predictions_are_paged_in_a_browser(browser, tmp_path):
    run = write_report(tmp_path)
    page = browser.new_page(viewport={"width": 600, "height": 900})
    page.goto(run.report.as_uri())
    table = page.locator("table").nth(1)

    def names():
        return table.locator("tbody tr th").all_inner_texts()

    ious = run.metrics["val"]["iou"]
    ranked = sorted((name for name in CLASSES if ious[name] is not None), key=ious.get)
    by_name = [CLASSES[2], "absent", "background", *CLASSES[3:]]
    assert names() == CLASSES
    # the class without an IoU is last in any order; a third click restores the first order
    for column, expected in ((1, [*ranked[::-1], "absent"]), (1, [*ranked, "absent"]), (1, CLASSES), (0, by_name)):
        table.locator("thead button").nth(column).click()
        assert names() == expected
    assert table.locator("tfoot").inner_text().startswith("mean")

    def shown():
        return [page.locator("article").nth(index).is_visible() for index in range(3)].index(True)

    pages = [shown()]
    for name in ("next", "next", "next", "previous"):
        page.get_by_role("button", name=name).click()
        pages.append(shown())
    page.locator("select").select_option(index=1)
    assert [*pages, shown()] == [0, 1, 2, 0, 2, 1]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # also on a phone
    page.emulate_media(media="print")
    assert page.locator("article").nth(2).is_visible()  # all of them
