"""The comparison: its statistics against SciPy on made-up runs, and what it runs, skips, resumes and reports."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT
from PIL import Image

import compare
import util

CLASSES = ("background", "cat", "dog")


def write_run(out, experiment, seed, images, limit=None, test=True, seconds=6.0):
    """Write what a run leaves: ``images`` are counts [N, 3, 3], and the scores in the JSON are theirs."""
    hits, truth, called = images.sum(0)
    with np.errstate(invalid="ignore"):
        iou = hits / (truth + called - hits)
    plain = [None if math.isnan(value) else value for value in iou.tolist()]
    split = {"loss": 1.0, "pixel_accuracy": hits.sum() / truth.sum(), "miou": float(np.nanmean(iou))}
    split |= {"iou": dict(zip(CLASSES, plain)), "background": {"pixel_accuracy": 0.7, "miou": 0.3}}
    split |= {"assignment_iou": 0.1}
    figures = {"experiment": experiment, "dataset": "Made", "seed": seed, "device": "cpu", "epochs": 3}
    figures |= {"best_epoch": 1, "parameters": 1_500_000, "multiply_adds": 2_000_000_000, "seconds": seconds}
    figures |= {"flags": {"epochs": 3, "batch_size": 16, "limit": limit}, "versions": {"torch": "2.9"}}
    figures |= {"val": split, "test": split if test else None}
    path = out / "results" / f"{experiment}_seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures))
    path.with_suffix(".csv").write_text("epoch,train_loss,val_loss,val_miou\n1,2.5,2.0,0.1\n2,1.5,1.75,0.2\n")
    np.savez_compressed(path.with_suffix(".npz"), **{name: images for name in (("val", "test") if test else ("val",))})
    return compare.Run.read(path)


def counts(seed, skill=0.5, number=40, classes=3):
    """Made-up counts of images [number, 3, 3]: ``skill`` is the share of each class that is found."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((number, 3), np.int64)
    truth[:, :classes] = rng.integers(50, 200, (number, classes))
    hits = (truth * np.clip(rng.normal(skill, 0.1, (number, 3)), 0, 1)).astype(np.int64)
    called = hits + rng.integers(0, 60, (number, 3)) * (truth > 0)
    return np.stack((hits, truth, called), 1)


def report(out, monkeypatch, *flags):
    """Run compare.py's main in ``out`` and return what it wrote."""
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(out), *map(str, flags)])
    compare.main()
    return (out / "RESULTS.md").read_text()


@pytest.mark.parametrize("freedom", [*range(1, 12), 30, 99])
def test_the_quantile_of_t_is_scipys(freedom):
    assert compare.t_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-9)


@pytest.mark.parametrize("number", [3, 5])
def test_the_interval_over_seeds_is_that_of_the_paired_t_test(tmp_path, number):
    one, other = (
        {seed: write_run(tmp_path / name, name, seed, counts(seed + shift, skill)) for seed in range(number)}
        for name, shift, skill in (("a", 0, 0.6), ("b", 100, 0.5))
    )
    found = compare.difference(one, other, "val")
    values = [[runs[seed].score("val", "miou") for seed in range(number)] for runs in (one, other)]
    expected = scipy.stats.ttest_rel(*values).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.mean == pytest.approx(np.mean(values[0]) - np.mean(values[1])) and found.over == "seeds"
    assert found.clear == (expected.low > 0)


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_few_seeds_the_interval_is_scipys_paired_bootstrap_over_images(tmp_path, seeds):
    pairs = [(counts(seed, 0.55), counts(seed, 0.55) * [[[9], [10], [10]]] // 10) for seed in range(seeds)]
    one = {seed: write_run(tmp_path / "a", "a", seed, first) for seed, (first, _) in enumerate(pairs)}
    other = {seed: write_run(tmp_path / "b", "b", seed, second) for seed, (_, second) in enumerate(pairs)}
    found = compare.difference(one, other, "test")

    def miou(images):
        hits, truth, called = images.sum(0)
        return (hits / (truth + called - hits)).mean()

    def statistic(chosen):
        return np.mean([miou(first[chosen]) - miou(second[chosen]) for first, second in pairs])

    sample = (np.arange(40),)
    expected = scipy.stats.bootstrap(sample, statistic, n_resamples=4000, vectorized=False, method="percentile", rng=1)
    # A bound from 2000 resamples has a standard error of sqrt(0.025 * 0.975 / 2000) / density, that is about 0.06
    # standard errors of the statistic in its normal approximation; two such draws differ by five of them at most.
    margin = 5 * 0.08 * expected.standard_error
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=margin)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=margin)
    assert found.mean == pytest.approx(statistic(np.arange(40))) and found.over == "images"


def test_equal_figures_are_no_clear_difference(tmp_path):
    for number in (1, 4):
        runs = {seed: write_run(tmp_path / str(number), "a", seed, counts(seed)) for seed in range(number)}
        found = compare.difference(runs, runs, "val")
        assert (found.mean, found.low, found.high, found.clear) == (0, 0, 0, False)


def test_only_seeds_that_both_have_are_paired(tmp_path):
    one = {seed: write_run(tmp_path, "a", seed, counts(seed, 0.6)) for seed in (0, 1, 7)}
    other = {seed: write_run(tmp_path, "b", seed, counts(seed + 9, 0.5)) for seed in (1, 2)}
    found = compare.difference(one, other, "val")
    assert found.mean == pytest.approx(one[1].score("val", "miou") - other[1].score("val", "miou"))
    assert compare.difference({0: one[0]}, {2: other[2]}, "val") is None


def test_a_class_that_is_nowhere_counts_in_no_mean(tmp_path):
    images = counts(0, classes=2)
    one, other = write_run(tmp_path, "a", 0, images), write_run(tmp_path, "b", 0, counts(5, 0.3, classes=2))
    every = np.ones((1, len(images)))
    assert compare.resample(images, every)[0] == pytest.approx(one.score("val", "miou"))
    found = compare.difference({0: one}, {0: other}, "val")
    assert math.isfinite(found.low) and found.low < found.mean < found.high


def test_the_report_holds_every_run_and_nothing_typed_by_hand(tmp_path, monkeypatch):
    values = {}
    for name, skill in (("train_4_a", 0.5), ("train", 0.4), ("train_mine", 0.6)):
        pace = {"seconds": 12.0} if name == "train_4_a" else {}
        runs = [write_run(tmp_path / f"seed{seed}", name, seed, counts(seed, skill), **pace) for seed in range(3)]
        values[name] = [one.score("val", "miou") for one in runs]
    text = report(tmp_path, monkeypatch)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[:6]] == [
        "experiment",
        "---",
        "background everywhere",
        "train",
        "train_4_a",
        "train_mine",
    ]
    head = rows[0]
    for row in rows[3:6]:
        mean, deviation = np.mean(values[row[0]]), scipy.stats.tstd(values[row[0]])
        assert row[head.index("val mean IoU")] == f"{mean:.4f} ± {deviation:.4f}"
        assert row[1] == "3" and row[head.index("parameters")] == "1.50 M"
        assert row[head.index("multiply-adds")] == "2.00 G"
        assert row[head.index("time an epoch")] == ("2.0" if row[0] == "train_4_a" else "1.0")
    assert [row[head.index("published, VOC2007")] for row in rows[2:6]] == ["", "0.055", "0.0613", ""]
    changes = {row[0]: row for row in rows[8:]}
    expected = np.mean(values["train_4_a"]) - np.mean(values["train"])
    assert changes["train_4_a"][1:3] == ["train", f"{expected:+.4f}"] and changes["train_mine"][1] == "train"
    for name in ("comparison", "classes", "curves"):
        picture = np.array(Image.open(tmp_path / "plots" / f"{name}.png").convert("L"))
        assert min(picture.shape) > 250 and picture.std() > 10


def test_the_classes_that_change_most_are_named_with_their_mean_change(tmp_path, monkeypatch):
    images = {}
    for name in ("train_5_b", "train_5_b_no_pretrained"):
        for seed in range(2):
            images[name, seed] = counts(seed, 0.5)
            if name == "train_5_b":
                images[name, seed][:, 0, 1] = images[name, seed][:, 1, 1] * (8 + seed) // 10
                images[name, seed][:, 0, 2] = images[name, seed][:, 1, 2] // 10
            write_run(tmp_path / f"seed{seed}", name, seed, images[name, seed], test=False)
    row = [line for line in report(tmp_path, monkeypatch).splitlines() if line.startswith("| train_5_b_no_")][-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]

    def iou(one, label):
        hits, truth, called = one.sum(0)[:, label]
        return hits / (truth + called - hits)

    cat, dog = (
        np.mean([iou(images[cells[0], seed], label) - iou(images["train_5_b", seed], label) for seed in range(2)])
        for label in (1, 2)
    )
    assert cat < -0.1 and dog > 0.1
    assert cells[1] == "train_5_b" and cells[-2:] == [f"dog {dog:+.2f}", f"cat {cat:+.2f}"]


def test_without_a_class_called_background_the_commonest_class_is_the_one_to_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CLASSES", ("sky", "cat", "dog"))
    write_run(tmp_path, "train", 0, counts(0), test=False)
    text = report(tmp_path, monkeypatch)
    assert "| the commonest class everywhere |" in text and "background everywhere" not in text


def test_without_test_split_and_with_one_seed_the_report_has_neither(tmp_path, monkeypatch):
    write_run(tmp_path, "train", 0, counts(0), test=False)
    text = report(tmp_path, monkeypatch)
    assert "test mean IoU" not in text and "±" not in text.split("| experiment")[1] and "builds on" not in text


def test_runs_on_several_data_sets_are_not_mixed(tmp_path, monkeypatch):
    write_run(tmp_path, "train", 0, counts(0), limit=8)
    write_run(tmp_path / "seed1", "train", 1, counts(1))
    with pytest.raises(util.UserError, match="Made with --limit 8, Made"):
        report(tmp_path, monkeypatch)
    text = report(tmp_path, monkeypatch, "--data", tmp_path / "Made", "--limit", 8)
    assert "the first 8 images" in text and "| train | 1 |" in text


def test_nothing_to_report_and_a_broken_file_are_named(tmp_path, monkeypatch):
    with pytest.raises(util.UserError, match="no finished run"):
        report(tmp_path, monkeypatch)
    write_run(tmp_path, "train", 0, counts(0))
    (tmp_path / "results" / "train_seed0.json").write_text('{"experiment": "tr')
    with pytest.raises(util.UserError, match="train_seed0.json: is not what a run wrote"):
        report(tmp_path, monkeypatch)


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run, kept for questions."""
    lines, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda line: (lines.append(line), popen(line))[1])
    return lines


def test_what_is_missing_is_run_what_is_done_is_not_and_what_stopped_goes_on(tiny, tmp_path, monkeypatch, commands):
    experiments = {name: compare.EXPERIMENTS[name] for name in ("train", "train_4_a")}
    monkeypatch.setattr(compare, "EXPERIMENTS", experiments)
    flags = ["--data", tiny, "--device", "cpu", "--limit", 2, "--batch-size", 2, "--epochs", 1, "--seeds", 0]
    out = tmp_path / "out"
    first = report(out, monkeypatch, *flags)
    assert len(commands) == 2 and (out / "seed0" / "best_train_4_a.pt").exists()
    assert report(out, monkeypatch, *flags) == first and len(commands) == 2
    # stopped before its figures were written: the checkpoints are there
    (out / "seed0" / "results" / "train_seed0.json").unlink()
    before = (out / "seed0" / "last_train.pt").stat().st_mtime_ns
    again = report(out, monkeypatch, *flags)
    assert len(commands) == 3 and "--resume" in commands[-1]
    assert (out / "seed0" / "last_train.pt").stat().st_mtime_ns == before  # its epoch was not repeated
    assert again == first


def test_killed_in_the_middle_and_run_again_it_ends_with_the_same_table(tiny, tmp_path):
    code = (
        "import compare, sys, util; compare.EXPERIMENTS = {n: compare.EXPERIMENTS[n] for n in ('train', 'train_4_a')}; "
    )
    line = [sys.executable, "-c", code + "cli.run(compare.main)", "--data", tiny, "--device", "cpu", "--limit", "2"]
    line += ["--batch-size", "2", "--epochs", "2", "--seeds", "0"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    tables = []
    for out, kill in (("whole", False), ("killed", True), ("killed", False)):
        with subprocess.Popen([*line, "--out", tmp_path / out], **options) as process:
            for text in process.stdout:
                if kill and text.startswith("epoch 1/2"):
                    process.terminate()
            code = process.wait()
        assert code == (143 if kill else 0)
        if not kill:
            table = (tmp_path / out / "RESULTS.md").read_text()
            rows = [row.split("|")[:-2] for row in table.splitlines() if row.startswith("| ")]  # all but the time
            tables.append(rows)
    assert len(tables[0]) == 8 and tables[0] == tables[1]


def test_a_failing_run_is_reported_and_the_rest_goes_on(tiny, tmp_path, monkeypatch, commands, capsys):
    experiments = {name: compare.EXPERIMENTS["train"] for name in ("train_none", "train")}
    monkeypatch.setattr(compare, "EXPERIMENTS", experiments)
    flags = ["--data", tiny, "--device", "cpu", "--limit", 2, "--batch-size", 2, "--epochs", 1, "--seeds", 0]
    with pytest.raises(util.UserError, match="1 runs failed.*train_none.py.*exit code 2"):
        report(tmp_path / "out", monkeypatch, *flags)
    assert len(commands) == 2
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "| train | 1 |" in text and "train_none.py" in text.split("## Failed")[1]


def test_no_pretrained_reaches_the_one_script_that_has_it(tiny, tmp_path, monkeypatch):
    lines = []

    class Done:
        def __init__(self, line):
            lines.append(line)

        def wait(self):
            return 0

    monkeypatch.setattr(subprocess, "Popen", Done)
    with pytest.raises(util.UserError, match="no finished run"):
        report(tmp_path / "out", monkeypatch, "--data", tiny, "--seeds", 3, 4, "--no-pretrained", "--compile")
    assert len(lines) == 14
    assert [line[1].split("/")[-1] for line in lines if "--no-pretrained" in line] == ["train_5_b.py"] * 2
    assert all("--compile" in line and "--epochs" not in line and "--limit" not in line for line in lines)
