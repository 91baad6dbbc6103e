"""Every table of the report is what its command prints from the runs that are kept next to it."""

import importlib
import itertools
import json
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_ablation import VARIANTS

import compare
import util
import voc

README, REPORT = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "REPORT.md"))
DOCUMENTS = ("README.md", "REPORT.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
RUNS, SPLITS = ROOT / "report" / "camvid", ("val", "test")


def table_rows(text):
    """The rows of the tables in Markdown, without the lines below their headings."""
    return [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]


def everything(folder):
    """Flags that choose all runs of a folder, which have one setting."""
    flags = dict.fromkeys(("limit", "epochs", "batch_size", "experiments"))
    return SimpleNamespace(**flags, data="", seeds=[], own=[], out=folder)


def test_results_are_those_of_the_runs(monkeypatch):
    text = (RUNS / "RESULTS.md").read_text(encoding="utf-8")
    command = re.search(r"`python (compare\.py [^`]*)`", text)[1]
    assert f"python {command}" in REPORT
    monkeypatch.setattr("sys.argv", shlex.split(command))
    found = compare.sections(compare.collect(everything(RUNS)), failures=[])
    text = text.partition("## Changed since")[0].rstrip("\n") + "\n"  # which compares with today's code
    assert compare.report([section for section in found if section.heading != "Changed since"]) == text
    assert [row for row in table_rows(text) if row not in REPORT] == []


def test_the_scores_of_each_drive_are_those_of_the_runs_and_in_the_report(monkeypatch):
    """On the lists that a run scores too, they are the run's own, but for pixels that change with the threads."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = json.loads((RUNS / "splits.json").read_text(encoding="utf-8"))
    for experiment, seeds in compare.collect(everything(RUNS)).items():
        for seed, run in seeds.items():
            for split in SPLITS:
                ious = results[experiment][f"CamVid {split}"][f"seed{seed}"]["iou"]
                assert ious == pytest.approx(run.metrics[split]["iou"], abs=1e-6)
    table = importlib.import_module("splits").table(results)
    assert [row for row in table_rows(table) if row not in REPORT] == []


def test_the_tables_of_the_ablations_are_those_of_their_runs():
    """Each run of a variant is compared with its base's of the same seed, which for CamVid is in report/camvid."""
    rows, names, on_camvid = [], [], compare.collect(everything(RUNS))
    for dataset, splits in (("CamVid", SPLITS), ("CamVid-0006R0", ("val",))):
        found = compare.collect(everything(ROOT / "report" / "ablation" / dataset))
        bases = on_camvid | found
        for name, split in itertools.product(found.keys() - compare.EXPERIMENTS.keys(), splits):
            base = VARIANTS[name][0] if name in VARIANTS else name.removesuffix("_no_pretrained")
            names.append(compare.full_name(name, found[name].values()))
            rows.append(compare.difference_row(names[-1], found[name], base, bases[base], split))
    printed = table_rows(compare.markdown_table(rows))[1:]
    assert sorted(printed) == sorted(row for row in table_rows(REPORT) if row.split(" | ")[0][2:] in names)


def test_the_first_tables_of_the_report_repeat_the_figures_of_the_complete_ones():
    """Scores, then differences, in bold if clear; those on 0006R0 are in benchmarks/TRIED.md."""
    complete = [row.strip("| ").split(" | ") for row in table_rows((RUNS / "RESULTS.md").read_text(encoding="utf-8"))]
    scores = {name.partition(":")[0]: cells for name, *cells in complete if len(cells) > 8}
    differences = {(name.partition(":")[0], cells[1]): cells for name, *cells in complete if cells[1] in SPLITS}
    first = [row.strip("| ").replace(".py", "").replace("`", "") for row in table_rows(REPORT) if "| `train" in row]
    first = [row.split(" | ") for row in first]
    names = list(compare.EXPERIMENTS)
    assert [cells[0] for cells in first] == names + names[1:]
    tried = (ROOT / "benchmarks" / "TRIED.md").read_text(encoding="utf-8")
    other_drive = {name: float(re.search(rf"\| `{name}.py` \|[^|]*\| (0\.\d+)", tried)[1]) for name in names}
    for name, _, *found in first[:8]:
        assert found == [scores[name][0], scores[name][2], f"{other_drive[name]:.4f}"]
    for name, base, *found, verdict in first[8:]:
        assert verdict.startswith("no") == ("**" not in found[0] + found[1])
        assert f"{other_drive[name] - other_drive[base]:+.4f}" == found.pop()
        for split, difference in zip(SPLITS, found):
            other, _, mean, _, clear, *_ = differences[name, split]
            assert (other, f"**{mean}**" if clear == "yes" else mean) == (base, difference)


def test_class_frequencies_are_those_of_the_real_masks(sample):
    counts = [voc.class_counts(voc.Split(sample, f"{split}_masks")) for split in ("train", "val")]
    for label, name in enumerate(voc.CLASSES):
        cells = [f"{pixels[label] / pixels.sum():.4f} | {images[label]}" for pixels, images in counts]
        assert f"| {name} | {cells[0]} | {cells[1]} |" in REPORT


def test_assignment_iou_of_a_perfect_prediction_is_that_of_the_real_masks(sample):
    """In each image, it is the share of the 21 classes that occur at 224x224 with void as background."""
    assert "python benchmarks/metric.py --data data/VOCdevkit/VOC2007 --split val" in REPORT
    split = voc.Split(sample, "val_masks")
    masks = (
        Image.fromarray(split.mask(index)).resize((224, 224), Image.Resampling.NEAREST) for index in range(len(split))
    )
    num_classes = [len(np.unique(np.asarray(mask) % util.VOID)) for mask in masks]
    score = f"{np.mean(num_classes) / 21:.4f}"
    assert any(row.endswith(f"| 1.0000 | 1.0000 | 1.0000 | {score} | {score} |") for row in table_rows(REPORT))


@pytest.mark.parametrize("experiment", compare.EXPERIMENTS)
def test_scores_in_the_script_and_in_the_readme_are_those_of_the_runs(experiment):
    runs = list(compare.collect(everything(RUNS))[experiment].values())
    val, test = (compare.mean_and_std([run.score(split, "miou") for run in runs]) for split in SPLITS)
    (row,) = (row for row in table_rows(README) if row.startswith(f"| `{experiment}.py` |"))
    assert row.endswith(f" | {val} | {test} |")
    text = (ROOT / f"{experiment}.py").read_text(encoding="utf-8")
    epochs, batch_size = map(int, re.search(r"__doc__, epochs=(\d+)(?:, batch_size=(\d+))?", text).groups(default=16))
    assert all(run.metrics["defaults"] == {"epochs": epochs, "batch_size": batch_size} for run in runs)
    assert f"Mean IoU on CamVid: val {val}, test {test} ({len(runs)} seeds, {epochs} epochs, " in text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_tests_that_a_document_names_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    files = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert [link for link in files if not ((ROOT / name).parent / link).exists()] == []
    defined = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    tests = re.findall(r"`(test_\w+)`", text)
    assert [test for test in tests if f"def {test}(" not in defined] == []
    assert tests or name != "docs/GUARANTEES.md"
    assert "@@" not in text and "to be measured" not in text
