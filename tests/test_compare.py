"""The comparison: its statistics against SciPy, its tables, and what it runs, skips and passes on."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT
from PIL import Image

import compare
import util
from seg import plotting
from seg.run import Run

CLASSES = ("background", "cat", "dog")
TRAIN = (ROOT / "train.py").read_text(encoding="utf-8")


def write_run(out, name, seed, ious, limit=None, epochs=3, batch_size=16, has_test=True, classes=CLASSES, **changes):
    """Write a made-up run with the given IoU of each class, NaN for an absent one, and change its JSON."""
    split = {"pixel_accuracy": 0.8, "miou": float(np.nanmean(ious)), "assignment_iou": 0.1}
    split["iou"] = {name: None if math.isnan(iou) else float(iou) for name, iou in zip(classes, ious)}
    split["background"] = {"pixel_accuracy": 0.7, "miou": 0.3}
    metrics = {
        "experiment": name, "title": "", "dataset": "Made", "seed": seed, "device": "cpu", "epochs": 2, "best_epoch": 2,
        "loss": "CrossEntropyLoss", "parameters": 1_500_000, "seconds": 6.0, "size": [32, 32], "data_sha256": "a",
        "flags": {"epochs": epochs, "batch_size": batch_size, "limit": limit}, "versions": {"torch": "2.9"},
        "defaults": {"epochs": 3, "batch_size": 16}, "code": [],
        "val": split | {"miou": split["miou"] / 2}, "test": split if has_test else None,
    }  # fmt: skip
    run = Run(out, name, seed)
    run.json.parent.mkdir(parents=True, exist_ok=True)
    run.json.write_text(json.dumps(metrics | changes))
    run.csv.write_text("epoch,train_loss,val_loss,train_miou,val_miou\n1,2.5,1.75,0.2,0.1\n2,2.0,1.5,0.3,0.2\n")
    return run


def random_ious(seed, mean=0.5):
    return np.random.default_rng(seed).normal(mean, 0.05, 3)


def run_compare(out, monkeypatch, *flags):
    """Run compare.py's main with the output folder ``out`` and return the report that it wrote."""
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(out), *map(str, flags)])
    compare.main()
    return (out / "RESULTS.md").read_text(encoding="utf-8")


def tables(text):
    """The rows of each table in a text, as dicts from heading to cell."""
    found = []
    for part in text.split("\n\n"):
        if part.startswith("| "):
            heading, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines())
            found.append([dict(zip(heading, row, strict=True)) for row in rows])
    return found


def seeds_by_experiment(text):
    """The number of seeds, a str, of each experiment in the table of results."""
    return {row["experiment"]: row["seeds"] for row in tables(text)[0]}


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 11, 30])
def test_interval_is_that_of_the_paired_t_test(num_seeds):
    values, base = np.random.default_rng(num_seeds).normal(0.5, 0.05, (2, num_seeds))
    mean, interval = compare.mean_and_interval((values - base).tolist())
    assert mean == pytest.approx(np.mean(values - base))
    if num_seeds < 3:
        assert interval is None
        return
    expected = scipy.stats.ttest_rel(values, base).confidence_interval(0.95)
    # the quantiles have six decimals; more seeds than the table has get its last quantile, which is slightly too large
    factor = scipy.stats.t.ppf(0.975, 10) / scipy.stats.t.ppf(0.975, 29) if num_seeds == 30 else 1
    assert interval[1] - interval[0] == pytest.approx(factor * (expected.high - expected.low), rel=1e-6)
    assert sum(interval) / 2 == pytest.approx(mean)


def test_report_has_mean_and_deviation_over_the_seeds_of_every_experiment(tmp_path, monkeypatch):
    mious = {}
    for index, (name, mean) in enumerate((("train_4_a", 0.4), ("train", 0.4), ("train_mine", 0.8))):
        ious = [random_ious(10 * index + seed, mean) for seed in range(3)]
        for seed in range(3):
            write_run(tmp_path / f"seed{seed}", name, seed, ious[seed])
        mious[name] = np.mean(ious, axis=1)
    text = run_compare(tmp_path, monkeypatch)
    (baseline, *results), differences = tables(text)
    assert baseline["experiment"] == "all-background baseline" and baseline["test mean IoU"] == "0.3000"
    assert [row["experiment"] for row in results] == ["train", "train_4_a", "train_mine"]
    for row in results:
        values = mious[row["experiment"]]
        assert row["test mean IoU"] == f"{np.mean(values):.4f} ± {scipy.stats.tstd(values):.4f}"
        assert (row["seeds"], row["epochs"], row["parameters"]) == ("3", "3", "1.50 M")
    # an experiment of the user builds on the baseline
    assert [row["split"] for row in differences] == ["val", "test"] * 2
    for row, name, clear in zip(differences[1::2], ("train_4_a", "train_mine"), ("no", "yes"), strict=True):
        expected = np.mean(mious[name]) - np.mean(mious["train"])
        assert (row["experiment"], row["compared with"], row["clear"]) == (name, "train", clear)
        assert row["difference in mean IoU"] == f"{expected:+.4f}"
    for name in ("comparison", "classes", "curves"):
        assert f"](plots/{name}.png)" in text
        with Image.open(tmp_path / "plots" / f"{name}.png") as plot:
            assert min(plot.size) > 250 and np.std(plot.convert("L")) > 10


def test_runs_of_other_code_or_other_masks_are_named_once_per_experiment(tmp_path, monkeypatch):
    edited = TRAIN.replace("util.seed_everything(args.seed)", "pass")
    assert edited != TRAIN
    codes = [TRAIN, TRAIN.replace('"""', '"""Mean IoU: 0.5. ', 1), edited, edited]  # a docstring holds results
    for seed, text in enumerate(codes):
        write_run(tmp_path, "train", seed, random_ious(seed), code=[{"epoch": 1, "files": {"train.py": text}}])
    for seed, sha256 in enumerate("aba"):
        write_run(tmp_path, "train_4_a", seed, random_ious(seed), data_sha256=sha256)
    write_run(tmp_path, "train_6", 0, random_ious(0), size=[32, 48], data_sha256="c")  # another size, another hash
    text = run_compare(tmp_path, monkeypatch).partition("## Changed since")[2]
    (rows,) = tables(text)
    assert [tuple(row.values())[:2] for row in rows] == [("train", "2, 3"), ("train_4_a", "1")]
    assert "train.py" in rows[0]["change"] and rows[1]["change"] == "other image ids or masks"


@pytest.mark.parametrize("other", [{"classes": ("background", "dog", "cat")}, {"has_test": False}])
def test_runs_with_other_classes_or_splits_are_refused(other, tmp_path, monkeypatch):
    write_run(tmp_path, "train", 0, random_ious(0))
    write_run(tmp_path, "train_4_a", 0, random_ious(0), **other)
    with pytest.raises(util.UserError, match="seed0.json: differs from .* in the names of the classes or the split"):
        run_compare(tmp_path, monkeypatch)


def test_an_experiment_is_compared_with_the_one_it_builds_on_or_with_the_first_that_is_named(tmp_path, monkeypatch):
    for experiment in ("train_5_a", "train_mine", "train_a"):
        write_run(tmp_path, experiment, 0, random_ious(0))

    def pairs(*flags):
        _, differences = tables(run_compare(tmp_path, monkeypatch, *flags))
        return [(row["experiment"], row["compared with"]) for row in differences[::2]]  # of val

    assert pairs() == [("train_a", "train_5_a"), ("train_mine", "train_5_a")]
    write_run(tmp_path, "train", 0, random_ious(0))
    assert pairs() == [("train_5_a", "train"), ("train_a", "train"), ("train_mine", "train")]
    named = ["train_mine", "train_5_a", "train"]
    assert pairs("--experiments", *named) == [(name, "train_mine") for name in named[1:]]


def test_a_run_with_other_flags_stands_beside_those_with_the_defaults(tmp_path, monkeypatch, capsys):
    for name in ("train_6_no_pretrained", "train"):
        write_run(tmp_path, name, 0, random_ious(0))
    write_run(tmp_path, "train_x", 0, random_ious(0), epochs=1)
    write_run(tmp_path, "train_y", 0, random_ious(0), limit=8)
    for name, epochs in (("train", 1), ("train_x", 2)):  # not averaged with the runs of seed 0
        write_run(tmp_path / "seed1", name, 1, random_ious(1), epochs=epochs)
    names = ["train_6", "train", "train_x", "train_y", "train_z"]
    found, differences = tables(run_compare(tmp_path, monkeypatch, "--experiments", *names))
    rows = [(row["experiment"], row["seeds"], row["epochs"]) for row in found[1:]]
    assert rows == [("train_6_no_pretrained", "1", "3"), ("train", "1", "3"), ("train_x", "1", "2")]
    assert {row["compared with"] for row in differences} == {"train_6_no_pretrained"}
    warnings = [f"warning: {tmp_path} has no comparable run of {name}: it is left out" for name in names[3:]]
    assert capsys.readouterr().err.splitlines() == warnings


@pytest.mark.parametrize(("dataset", "expected"), [("VOC2007", ["0.055", "0.0613", ""]), ("Toy", [None] * 3)])
def test_published_results_stand_beside_those_on_the_same_data_only(tmp_path, monkeypatch, dataset, expected):
    for name in ("train", "train_4_a", "train_mine"):
        write_run(tmp_path, name, 0, random_ious(0), dataset=dataset)
    results = tables(run_compare(tmp_path, monkeypatch))[0][1:]
    assert [row.get("published IoU") for row in results] == expected


def test_tables_name_the_title_and_plots_the_loss_of_each_experiment(tmp_path, monkeypatch):
    cross_entropy, weighted = "CrossEntropyLoss", "CrossEntropyLoss, weighted by class"
    recorded = {"train_4_b": ("augmentation", (cross_entropy,)), "train_mine": ("", (weighted, cross_entropy))}
    for name, (title, losses) in recorded.items():
        for seed, loss in enumerate(losses):
            write_run(tmp_path / f"seed{seed}", name, seed, random_ious(seed), title=title, loss=loss)
    draw = mock.Mock(wraps=plotting.histories)
    monkeypatch.setattr(plotting, "histories", draw)
    results, differences = tables(run_compare(tmp_path, monkeypatch))[:2]
    assert [row["experiment"] for row in results[1:]] == ["train_4_b: augmentation", "train_mine"]
    assert differences[0]["compared with"] == "train_4_b"
    runs, losses = draw.call_args.args[2:4]
    assert list(map(len, runs.values())) == [1, 2]
    assert losses == {"train_4_b: augmentation": cross_entropy, "train_mine": f"{cross_entropy} and {weighted}"}


def test_report_names_the_classes_that_change_most_and_leaves_absent_ones_out(tmp_path, monkeypatch):
    classes = ("background", "cat", "dog", "absent", "cow", "sheep")
    for seed, change in enumerate((0.10, 0.12)):
        before = [0.5, 0.5, 0.5, math.nan, 0.5, (math.nan, 0.5)[seed]]
        after = [0.45, 0.5 - change, 0.5 + change, math.nan, 0.51, 0.52]
        for name, ious in (("train_5_b", before), ("train_5_b_no_pretrained", after)):
            write_run(tmp_path / f"seed{seed}", name, seed, ious, classes=classes, has_test=False)
    (row,) = tables(run_compare(tmp_path, monkeypatch))[1]
    assert row["classes that gain"] == "dog +0.11, sheep +0.02, cow +0.01"
    assert row["classes that lose"] == "cat -0.11, background -0.05"


def test_report_leaves_out_what_one_seed_without_test_split_and_background_class_lacks(tmp_path, monkeypatch):
    write_run(tmp_path, "train", 0, random_ious(0), has_test=False, classes=("sky", "cat", "dog"))
    text = run_compare(tmp_path, monkeypatch)
    assert "| majority-class baseline |" in text and "background" not in text
    assert "test mean IoU" not in text and "±" not in text.split("| experiment")[1] and "compared with" not in text


def test_runs_of_several_settings_are_not_mixed(tmp_path, monkeypatch):
    write_run(tmp_path, "train", 0, random_ious(0), limit=8)
    assert "the first 8 images" in run_compare(tmp_path, monkeypatch)  # all runs have this setting
    write_run(tmp_path / "seed1", "train", 1, random_ious(1), limit=4)
    with pytest.raises(util.UserError, match="no finished run with these flags: .*--seeds"):
        run_compare(tmp_path, monkeypatch)
    write_run(tmp_path / "seed1", "train", 1, random_ious(1))
    text = run_compare(tmp_path, monkeypatch)  # also without --data
    assert "all images" in text and seeds_by_experiment(text)["train"] == "1"
    text = run_compare(tmp_path, monkeypatch, "--data", tmp_path / "Made", "--limit", 8)
    assert "the first 8 images" in text and seeds_by_experiment(text)["train"] == "1"


def test_unknown_experiments_and_missing_or_damaged_results_are_named(tmp_path, monkeypatch, started, capsys):
    with pytest.raises(util.UserError, match="train_nine"):
        run_compare(tmp_path, monkeypatch, "--experiments", "train", "train_nine", "--seeds", 0)
    assert not started  # not even the first one
    with pytest.raises(util.UserError, match="no finished run"):
        run_compare(tmp_path, monkeypatch)
    write_run(tmp_path, "train_4_a", 0, random_ious(0))
    paths = [tmp_path / "results" / f"{name}_seed0.json" for name in ("train", "tuned")]
    for path, text in zip(paths, ('{"experiment": "tr', '[{"lr": 0.1}]')):  # damaged; of another tool
        path.write_text(text)
    text = run_compare(tmp_path, monkeypatch, "--data", tmp_path / "Made", "--experiments", "train_4_a", "--seeds", 0)
    assert seeds_by_experiment(text)["train_4_a"] == "1" and not started
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    for path, warning in zip(paths, warnings):
        assert warning.startswith(f"warning: {path}: was not written by a run of this version (")
        assert warning.endswith("): it is left out")


@pytest.fixture
def started(monkeypatch):
    """Instead of starting a process, write the files of a made-up run; return the commands. train_5_a fails."""
    commands = []

    class Process:
        def __init__(self, command):
            commands.append(command)
            name, flags = Path(command[1]).stem, dict(zip(command, command[1:]))
            self.returncode = 2 if name == "train_5_a" else 0
            if self.returncode == 0:
                seed, limit = int(flags["--seed"]), int(flags["--limit"]) if "--limit" in flags else None
                name += "_no_pretrained" if "--no-pretrained" in command else ""
                batch_size = int(flags.get("--batch-size", 16))
                write_run(Path(flags["--out"]), name, seed, random_ious(seed), limit, batch_size=batch_size)

        def poll(self):
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Process)
    return commands


def test_only_missing_runs_are_started(tmp_path, monkeypatch, started):
    flags = ["--data", tmp_path / "Made", "--experiments", "train", "train_4_a"]
    write_run(tmp_path / "seed0", "train", 0, random_ious(0))
    write_run(tmp_path, "train_4_a", 0, random_ious(0, 0.1), epochs=1)  # a short try, which does not count as done
    first = run_compare(tmp_path, monkeypatch, *flags, "--seeds", 0)
    assert len(started) == 1 and {str(tmp_path / "seed0"), "--resume"} <= set(started[0])
    assert {row["test mean IoU"] for row in tables(first)[0][1:]} == {f"{np.mean(random_ious(0)):.4f}"}
    assert run_compare(tmp_path, monkeypatch, *flags, "--seeds", 0) == first and len(started) == 1
    run_compare(tmp_path, monkeypatch, *flags, "--seeds", 0, 1)
    assert len(started) == 3 and all(str(tmp_path / "seed1") in command for command in started[1:])
    run_compare(tmp_path, monkeypatch, *flags, "--seeds", 0, "--batch-size", 8)  # another batch size is another run
    assert len(started) == 5
    run = write_run(tmp_path / "seed1", "train", 1, random_ious(1))
    run.csv.write_text(run.csv.read_text() + "3,1.5,1.2,0.3,0.3\n")  # was continued, and stopped
    run_compare(tmp_path, monkeypatch, *flags, "--seeds", 1)
    assert len(started) == 6
    run.last.touch()  # was stopped while it drew its plots: there is no report
    run_compare(tmp_path, monkeypatch, *flags, "--seeds", 1)
    assert len(started) == 7


def test_failed_run_is_reported_and_the_others_go_on_with_the_same_flags(tmp_path, monkeypatch, started):
    flags = ["--limit", 4, "--device", "cpu", "--no-pretrained", "--compile", "--seeds", 3]
    with pytest.raises(util.UserError, match="1 runs failed.*train_5_a.py.*exit code 2"):
        run_compare(tmp_path, monkeypatch, "--data", tmp_path / "Made", *flags)
    assert [Path(command[1]).stem for command in started] == list(compare.EXPERIMENTS)
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert seeds_by_experiment(text)["train_5_c"] == "1" and "train_5_a.py" in text.split("## Failed")[1]
    for command in started:
        assert {"--compile", "--resume"} <= set(command) and "--epochs" not in command
        assert (command[command.index("--limit") + 1], command[command.index("--device") + 1]) == ("4", "cpu")
        assert ("--no-pretrained" in command) == (Path(command[1]).stem in ("train_5_b", "train_6"))


def test_flags_of_a_scripts_own_are_passed_on_and_compared(tmp_path, monkeypatch, started):
    """Also a script whose name means something else to glob, written with .py."""
    (tmp_path / "train[1].py").touch()
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    flags = ["--data", tmp_path / "Made", "--experiments", "train[1].py", "--seeds", 0]
    settings = {"epochs": 3, "batch_size": 16, "lr": 0.1, "flip": True}
    write_run(tmp_path / "seed0", "train[1]", 0, random_ious(0), defaults=settings, flags=settings | {"limit": None})
    for own, is_done in (([], True), (["--lr", "1e-1"], True), (["--lr", "1e-3"], False), (["--no-flip"], False)):
        started.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "write_run", lambda *args, **options: None)  # keep the first run
            with contextlib.nullcontext() if is_done else pytest.raises(util.UserError, match="no finished run"):
                assert seeds_by_experiment(run_compare(tmp_path, monkeypatch, *flags, "--", *own))["train[1]"] == "1"
        assert [command[-len(own) :] for command in started] == ([] if is_done else [own])
    write_run(tmp_path / "seed0", "train[1]", 0, random_ious(0), defaults=settings, flags=settings | {"limit": 4})
    text = run_compare(tmp_path, monkeypatch, *flags[:2], "--", "--lr", "0.1", "--limit", 4)  # one of the shared flags
    assert seeds_by_experiment(text)["train[1]"] == "1"
    write_run(tmp_path / "seed0", "train[1]", 0, random_ious(0))  # of a script without such flags
    with pytest.raises(util.UserError, match="no finished run"):
        run_compare(tmp_path, monkeypatch, *flags[:2], "--", "--lr", "0.1")


SLOW_RUN = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
print("training", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_comparison_waits_until_its_run_has_saved(tmp_path, number, code):
    (tmp_path / "train.py").write_text(SLOW_RUN)
    imports = "import pathlib, compare; from seg import cli"
    program = f"{imports}; compare.ROOT = pathlib.Path({str(tmp_path)!r}); cli.run(compare.main)"
    line = [sys.executable, "-c", program, "--seeds", "0", "--experiments", "train"]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "start_new_session": True}
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True, **options) as process:
        assert "training\n" in iter(process.stdout.readline, "")
        # Ctrl-C reaches the run as well, but SIGTERM only the process that it is sent to
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        assert process.wait(timeout=60) == code
        assert (tmp_path / "saved").exists()


def test_a_script_of_the_user_is_run_and_reported(tiny, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(ROOT / "seg", project / "seg", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "tests" / "tiny_net.py"):
        shutil.copy(path, project)
    (project / "basic_fcn.py").write_text("from tiny_net import TinyNet as FCN\n")
    (project / "train_mine.py").write_text(TRAIN.replace("size=224", "size=32"), encoding="utf-8")
    flags = "--experiments train_mine --seeds 7 --epochs 1 --limit 2 --batch-size 2 --device cpu --data"
    line = [sys.executable, "compare.py", *flags.split(), str(tiny)]
    done = subprocess.run(line, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = tables((project / "RESULTS.md").read_text(encoding="utf-8"))
    test = json.loads((project / "seed7" / "results" / "train_mine_seed7.json").read_text())["test"]
    assert results[1]["experiment"] == "train_mine: Baseline"
    assert results[1]["test mean IoU"] == f"{test['miou']:.4f}"
    assert (project / "seed7" / "plots" / "train_mine_report.html").exists()
