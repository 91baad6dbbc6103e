"""Every table of the report is what its command prints from the runs kept beside it: nothing is typed by hand."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import compare
import voc

REPORT = (ROOT / "REPORT.md").read_text(encoding="utf-8")
FOLDERS = sorted(path.parent for path in (ROOT / "report").glob("*/RESULTS.md"))


def rows(text):
    """The rows of the tables in Markdown."""
    return [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_results_are_those_of_the_runs(folder, monkeypatch):
    text = (folder / "RESULTS.md").read_text(encoding="utf-8")
    command = re.search(r"`python (compare\.py [^`]*)`", text)[1]
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    ((dataset, limit), experiments), *others = compare.collect(folder).items()
    assert not others
    ordered = {name: experiments[name] for name in compare.EXPERIMENTS}
    ordered |= {name: experiments[name] for name in sorted(experiments.keys() - ordered.keys())}
    assert compare.report(dataset, limit, ordered, []) == text
    assert f"python {command}" in REPORT
    for row in rows(text):
        assert row in REPORT


@pytest.mark.parametrize("study", ["network", "augmentation", "weights"])
def test_ablations_are_those_of_the_runs(study):
    line = re.search(rf"python (benchmarks/ablation\.py {study} [^\n`]*)", REPORT)[1]
    done = subprocess.run([sys.executable, *shlex.split(line)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert rows(done.stdout)
    for row in rows(done.stdout):
        assert row in REPORT


def test_frequencies_are_those_of_the_real_masks(sample):
    counted = [voc.class_counts(voc.Split(sample, f"{split}_masks")) for split in ("train", "val")]
    for number, name in enumerate(voc.CLASSES):
        cells = [f"{pixels[number] / pixels.sum():.4f} | {images[number]}" for pixels, images in counted]
        assert f"| {name} | {cells[0]} | {cells[1]} |" in REPORT


def test_all_pictures_of_the_report_are_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", REPORT)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_what_the_assignments_iou_makes_of_the_real_masks(sample):
    """Of the truth itself: in each image, of the 21 classes, those that it shows at 224x224 with void as background."""
    assert "python benchmarks/metric.py --data data/VOCdevkit/VOC2007 --split val" in REPORT
    split = voc.Split(sample, "val_masks")
    masks = (Image.fromarray(split.mask(index)) for index in range(len(split)))
    shown = [len(set(np.unique(voc.resize(mask, 224, Image.Resampling.NEAREST)) % voc.VOID)) for mask in masks]
    score = f"{np.mean(shown) / 21:.4f}"
    assert f"| the truth itself | 1.0000 | 1.0000 | 1.0000 | {score} | {score} |" in REPORT


@pytest.mark.parametrize("experiment", compare.EXPERIMENTS)
def test_the_figure_in_each_script_is_that_of_its_runs(experiment):
    ((_, experiments),) = compare.collect(ROOT / "report" / "toy").items()
    runs = experiments[experiment].values()
    figure = f"{compare.spread([one.score('test', 'miou') for one in runs])} ({len(runs)} seeds, 12 epochs of 96 images"
    assert f"Test mean IoU on the toy set: {figure}" in (ROOT / f"{experiment}.py").read_text(encoding="utf-8")
