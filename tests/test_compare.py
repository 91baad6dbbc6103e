"""The comparison: its statistics against SciPy, its tables, and what it runs, skips and passes on."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT
from PIL import Image

import compare
import util
from seg import files, plotting

CLASSES = ("background", "cat", "dog")
OPTIONS = {"has_test": True, "classes": CLASSES, "mious": (0.1, 0.2), "epoch_seconds": (2.0, 4.0)}


def write_run(out, experiment, seed, ious, limit=None, epochs=3, batch_size=16, **options):
    """Write a made-up run with the given IoU of each class, NaN for an absent one; return the Run."""
    has_test, classes, mious, epoch_seconds = (options.get(name, default) for name, default in OPTIONS.items())
    split = {"pixel_accuracy": 0.8, "miou": float(np.nanmean(ious)), "assignment_iou": 0.1}
    split["iou"] = {name: None if math.isnan(iou) else float(iou) for name, iou in zip(classes, ious)}
    split["background"] = {"pixel_accuracy": options.get("background", 0.7), "miou": 0.3}
    metrics = {"experiment": experiment, "dataset": "Made", "seed": seed, "device": "cpu", "epochs": len(mious)}
    optional = ("dataset", "device", "idea", "loss", "size", "data_sha256", "code")
    metrics |= {name: options[name] for name in optional if options.get(name)}
    metrics |= {"parameters": 1_500_000, "multiply_adds": 2_000_000_000}
    metrics |= {"seconds": sum(epoch_seconds), "epoch_seconds": epoch_seconds}
    metrics |= {"flags": {"epochs": epochs, "batch_size": batch_size, "limit": limit}, "versions": {"torch": "2.9"}}
    metrics |= {"defaults": {"epochs": 3, "batch_size": 16}}
    metrics |= {"val": split | {"miou": split["miou"] / 2}, "test": split if has_test else None}
    path = out / "results" / f"{experiment}_seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics))
    rows = "".join(f"{epoch},{3 - epoch / 2},{2 - epoch / 4},{miou}\n" for epoch, miou in enumerate(mious, 1))
    path.with_suffix(".csv").write_text(f"epoch,train_loss,val_loss,val_miou\n{rows}")
    return compare.Run.read(path)


def random_ious(seed, mean=0.5):
    return np.random.default_rng(seed).normal(mean, 0.05, 3)


def run_compare(out, monkeypatch, *flags):
    """Run compare.py's main with the output folder ``out`` and return the report that it wrote."""
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(out), *map(str, flags)])
    compare.main()
    return (out / "RESULTS.md").read_text(encoding="utf-8")


def table_rows(text):
    """The rows of all tables in a text, as lists of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def runs_with(mious, seeds=range(99)):
    """Runs that hold only a mean IoU on val, as a dict from seed to Run."""
    return {seed: compare.Run({"val": {"miou": float(miou)}}, []) for seed, miou in zip(seeds, mious)}


@pytest.mark.parametrize("num_seeds", [*range(3, 12), 30])
def test_interval_is_that_of_the_paired_t_test(num_seeds):
    values, base = np.random.default_rng(num_seeds).normal(0.5, 0.05, (2, num_seeds))
    mean, low, high = compare.paired_difference(runs_with(values), runs_with(base), "val")
    expected = scipy.stats.ttest_rel(values, base).confidence_interval(0.95)
    assert mean == pytest.approx(np.mean(values - base)) == (low + high) / 2
    # the quantiles have six decimals; more seeds than the table has get its last quantile, which is slightly too large
    factor = scipy.stats.t.ppf(0.975, 10) / scipy.stats.t.ppf(0.975, 29) if num_seeds == 30 else 1
    assert high - low == pytest.approx(factor * (expected.high - expected.low), rel=1e-6)


def test_fewer_than_three_common_seeds_give_no_interval():
    runs = runs_with([0.6, 0.7, 0.9], seeds=[0, 1, 7])
    for seeds, mean in (([1, 2], 0.4), ([1, 0], 0.45)):
        found = compare.paired_difference(runs, runs_with([0.3, 0.1], seeds), "val")
        assert found == (pytest.approx(mean), None, None)
    assert compare.paired_difference(runs, runs_with([0.3], [2]), "val") == (None, None, None)


def test_report_has_mean_and_deviation_over_the_seeds_of_every_experiment(tmp_path, monkeypatch):
    mious = {}
    for index, (name, mean) in enumerate((("train_4_a", 0.4), ("train", 0.4), ("train_mine", 0.8))):
        ious = [random_ious(10 * index + seed, mean) for seed in range(3)]
        for seed in range(3):
            write_run(tmp_path / f"seed{seed}", name, seed, ious[seed])
        mious[name] = np.mean(ious, axis=1)
    rows = table_rows(run_compare(tmp_path, monkeypatch))
    baseline, *results = (dict(zip(rows[0], row)) for row in rows[2:6])
    assert baseline["experiment"] == "all-background baseline" and baseline["test mean IoU"] == "0.3000"
    assert [row["experiment"] for row in results] == ["train", "train_4_a", "train_mine"]
    for row in results:
        values = mious[row["experiment"]]
        assert row["test mean IoU"] == f"{np.mean(values):.4f} ± {scipy.stats.tstd(values):.4f}"
        assert (row["seeds"], row["parameters"], row["multiply-adds"]) == ("3", "1.50 M", "2.00 G")
    # an experiment of the user builds on the baseline
    for row, name, clear in zip(rows[8:10], ("train_4_a", "train_mine"), ("no", "yes"), strict=True):
        expected = np.mean(mious[name]) - np.mean(mious["train"])
        assert row[:3] == [name, "train", f"{expected:+.4f}"] and row[4] == clear
    for name in ("comparison", "classes", "curves"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as plot:
            assert min(plot.size) > 250 and np.std(plot.convert("L")) > 10


def test_a_changed_script_is_noticed_in_all_of_its_experiments():
    """A script may train in phases, each under a name of its own."""
    for text, change in (((ROOT / "train.py").read_text(encoding="utf-8"), None), ("pass", "train.py")):
        code = files.read_code(ROOT / "train.py") | {"train.py": text}
        found = compare.Run({"experiment": "train_second_phase", "code": code}, []).code_change(ROOT)
        assert found is change if change is None else change in found


@pytest.mark.parametrize("edited", ["train_mine.py", "mine.py", None])
def test_runs_of_another_version_of_the_code_are_named(edited, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    texts = {"train_mine.py": '"""Mine."""\nimport mine\nlr = 1e-3\n', "mine.py": "width = 8\n"}
    for seed in range(2):
        write_run(tmp_path, "train_mine", seed, random_ious(seed), **({"code": texts} if seed else {}))  # 0 is older
    for name, text in texts.items():
        text = text.replace("1e-3", "1e-2").replace("8", "16") if name == edited else f"# a comment\n{text}"
        (tmp_path / name).write_text(text.replace("Mine.", "Val mean IoU: 0.5"))
    text = run_compare(tmp_path, monkeypatch)
    lines = {"train_mine.py": "-lr = 0.001", "mine.py": "-width = 8"}
    rows = [row for row in table_rows(text) if "has changed" in row[-1]]
    assert rows == ([["train_mine", "1", f"{edited} has changed since ({lines[edited]!r})"]] if edited else [])
    assert ("## Changed since" in text) == bool(edited)


def test_a_script_with_a_syntax_error_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    write_run(tmp_path, "train_mine", 0, random_ious(0), code={"train_mine.py": "lr = 1e-3\n"})
    (tmp_path / "train_mine.py").write_text("lr = (1e-3\n")
    assert "train_mine.py has changed since ('-lr = 0.001')" in run_compare(tmp_path, monkeypatch)


def test_runs_on_other_masks_are_named(tmp_path, monkeypatch):
    for seed, data in enumerate(("a", "b", "a")):
        write_run(tmp_path, "train", seed, random_ious(seed), size=[32, 32], data_sha256=data)
    write_run(tmp_path, "train_6", 0, random_ious(0), size=[32, 48], data_sha256="c")  # another size, other hashes
    write_run(tmp_path, "train_5_b", 1, random_ious(1), size=[64, 64], data_sha256="d", background=0.8)
    rows = [row for row in table_rows(run_compare(tmp_path, monkeypatch)) if "other image" in row[-1]]
    assert rows == [[name, "1", "other image ids or masks"] for name in ("train", "train_5_b")]


@pytest.mark.parametrize("other", [{"classes": ("background", "dog", "cat")}, {"has_test": False}])
def test_runs_with_other_classes_or_splits_are_refused(other, tmp_path, monkeypatch):
    write_run(tmp_path, "train", 0, random_ious(0))
    write_run(tmp_path, "train_4_a", 0, random_ious(0), **other)
    with pytest.raises(util.UserError, match="seed0.json: differs from .* in the names of the classes or the split"):
        run_compare(tmp_path, monkeypatch)


def test_only_scripts_that_have_the_flag_get_no_pretrained(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--no-pretrained"])
    args = compare.cli.shared_flags("").parse_args()
    calls = ("cli.arguments(__file__, __doc__,\n    epochs=2, pretrained=True)", "timm.create_model(pretrained=True)")
    for name, call in zip(("with", "without"), calls):
        (tmp_path / f"{name}.py").write_text(f"x = {call}\n")
        assert ("--no-pretrained" in compare.command(args, f"{name}.py", 0)) == (name == "with")


def test_a_copied_folder_is_not_taken_for_that_of_a_seed(tmp_path, monkeypatch):
    for folder in ("seed0_old", "seed0"):
        write_run(tmp_path / folder, "train", 0, [0.2, 0.2, 0.2 if folder == "seed0" else 0.8])
    assert table_rows(run_compare(tmp_path, monkeypatch))[3][7] == "0.2000"


def test_a_script_of_the_user_is_compared_with_the_baseline_or_else_with_the_first(tmp_path, monkeypatch):
    for experiment in ("train", "train_5_a", "train_mine", "train_mine_no_pretrained"):
        write_run(tmp_path, experiment, 0, random_ious(0))
    pairs = [["train_5_a", "train"], ["train_mine", "train"], ["train_mine_no_pretrained", "train_mine"]]
    found = [row[:2] for row in table_rows(run_compare(tmp_path, monkeypatch)) if len(row) == 7][2:]
    assert found == pairs
    text = run_compare(tmp_path, monkeypatch, "--experiments", "train_5_a", "train_mine")
    assert [row[:2] for row in table_rows(text) if len(row) == 7][2:3] == [["train_mine", "train_5_a"]]


@pytest.mark.parametrize("dataset", ["VOC2007", "Toy"])
def test_published_results_stand_beside_those_on_the_same_data_only(dataset, tmp_path, monkeypatch):
    for name in ("train", "train_4_a", "train_mine"):
        write_run(tmp_path, name, 0, random_ious(0), dataset=dataset)
    rows = table_rows(run_compare(tmp_path, monkeypatch, "--data", dataset))
    results = [dict(zip(rows[0], row)) for row in rows[3:6]]
    column = "published IoU"
    assert [row.get(column) for row in results] == (["0.055", "0.0613", ""] if dataset == "VOC2007" else [None] * 3)


def test_report_says_how_long_a_run_takes_to_reach_a_mean_iou(tmp_path, monkeypatch):
    runs = {  # seconds of the epochs, mean IoU after each
        ("train", 0): ((60, 120, 30), (0.3, 0.55, 0.45)),
        ("train", 1): ((90, 90, 90), (0.4, 0.45, 0.49)),
        ("train_4_a", 0): ((6, 6, 6), (0.1, 0.2, 0.39)),
        ("train_4_a", 1): ((6, 12, 12), (0.1, 0.2, 0.39)),
        ("train_4_a", 2): ((600, 600, 600), (0.1, 0.2, 0.39)),
    }
    for (name, seed), (epoch_seconds, mious) in runs.items():
        options = {"epoch_seconds": epoch_seconds, "mious": mious, "device": "laptop" if seed == 2 else "cpu"}
        write_run(tmp_path / f"seed{seed}", name, seed, random_ious(seed), **options)
    rows = table_rows(run_compare(tmp_path, monkeypatch))
    assert rows[-5:] == [
        ["experiment", "device", "0.20", "0.30", "0.40", "0.50", "end"],
        ["---"] * 7,
        ["train", "cpu", "1.2", "1.2", "2.2", "3.0 (1 of 2)", "4.0"],
        ["train_4_a", "cpu", "0.2", "0.4", "-", "-", "0.4"],
        ["train_4_a", "laptop", "20.0", "30.0", "-", "-", "30.0"],
    ]


def test_tables_and_plots_name_the_idea_and_plots_the_loss_of_each_experiment(tmp_path, monkeypatch):
    cross_entropy, weighted = "CrossEntropyLoss", "CrossEntropyLoss, weighted by class"
    recorded = {"train_4_b": ("augmentation", (cross_entropy,) * 2), "train_4_c": ("weighted loss", (weighted,) * 2)}
    recorded |= {"train_mine": (None, (weighted, cross_entropy)), "train_old": (None, (None, None))}
    for name, (idea, losses) in recorded.items():
        for seed, loss in enumerate(losses):
            write_run(tmp_path / f"seed{seed}", name, seed, random_ious(seed), idea=idea, loss=loss)
    drawn = {}
    for plot in ("histories", "comparison", "classes_by_experiment"):
        monkeypatch.setattr(plotting, plot, lambda path, title, *rest, plot=plot: drawn.update({plot: rest}))
    rows = table_rows(run_compare(tmp_path, monkeypatch))
    names = ["train_4_b: augmentation", "train_4_c: weighted loss", "train_mine", "train_old"]
    assert [row[0] for row in rows[3:7]] == names
    assert rows[9][:2] == ["train_4_c: weighted loss", "train_4_b"]
    assert all(list(rest[0]) == names for rest in drawn.values())
    assert drawn["histories"][1] == dict(zip(names, (cross_entropy, weighted, f"{cross_entropy} and {weighted}", None)))
    assert len(drawn["histories"][0]["train_mine"]) == 2


def test_report_names_the_classes_that_change_most_and_leaves_absent_ones_out(tmp_path, monkeypatch):
    classes = ("background", "cat", "dog", "cow", "sheep", "absent")
    for seed, change in enumerate((0.10, 0.12)):
        before = [0.5, 0.5, 0.5, 0.5, (math.nan, 0.5)[seed], math.nan]
        after = [0.5, 0.5 - change, 0.5 + change, 0.51, 0.52, math.nan]
        for name, ious in (("train_5_b", before), ("train_5_b_no_pretrained", after)):
            write_run(tmp_path / f"seed{seed}", name, seed, ious, classes=classes, has_test=False)
    row = table_rows(run_compare(tmp_path, monkeypatch))[7]
    assert row[:2] == ["train_5_b_no_pretrained", "train_5_b"]
    assert row[-2:] == ["dog +0.11, sheep +0.02, cow +0.01", "cat -0.11"]


def test_report_leaves_out_what_one_seed_without_test_split_and_background_class_lacks(tmp_path, monkeypatch):
    write_run(tmp_path, "train", 0, random_ious(0), has_test=False, classes=("sky", "cat", "dog"))
    text = run_compare(tmp_path, monkeypatch)
    assert "| majority-class baseline |" in text and "background" not in text
    assert "test mean IoU" not in text and "±" not in text.split("| experiment")[1] and "compared with" not in text


def test_runs_on_several_datasets_are_not_mixed(tmp_path, monkeypatch):
    write_run(tmp_path, "train", 0, random_ious(0), limit=8)
    write_run(tmp_path / "seed1", "train", 1, random_ious(1))
    with pytest.raises(util.UserError, match="there are runs with: --data Made; --data Made --limit 8"):
        run_compare(tmp_path, monkeypatch)
    text = run_compare(tmp_path, monkeypatch, "--data", tmp_path / "Made", "--limit", 8)
    assert "the first 8 images" in text and "| train | 1 |" in text


def test_a_short_try_neither_counts_as_done_nor_hides_the_finished_run(tmp_path, monkeypatch, started):
    flags = ["--data", tmp_path / "Made", "--experiments", "train"]
    write_run(tmp_path, "train", 0, random_ious(0, 0.1), epochs=1)
    write_run(tmp_path / "seed1", "train", 1, random_ious(1))
    first = run_compare(tmp_path, monkeypatch, *flags, "--seeds", 0, 1)  # without --epochs: the script's own 3
    assert len(started) == 1 and f"{tmp_path / 'seed0'}" in started[0]
    rows = table_rows(first)
    row = dict(zip(rows[0], rows[3]))
    values = [np.mean(random_ious(seed)) for seed in (0, 1)]
    assert (row["seeds"], row["epochs"]) == ("2", "3") and row["test mean IoU"].startswith(f"{np.mean(values):.4f}")
    assert run_compare(tmp_path, monkeypatch, *flags).splitlines()[4:] == first.splitlines()[4:]
    short = table_rows(run_compare(tmp_path, monkeypatch, *flags, "--epochs", 1, "--seeds", 0))
    assert len(started) == 1 and short[3][1:3] == ["1", "1"]


def test_unknown_experiments_and_missing_or_damaged_results_are_named(tmp_path, monkeypatch, started):
    with pytest.raises(util.UserError, match="train_nine"):
        run_compare(tmp_path, monkeypatch, "--experiments", "train", "train_nine", "--seeds", 0)
    assert not started  # not even the first one
    with pytest.raises(util.UserError, match="no finished run found"):
        run_compare(tmp_path, monkeypatch)
    write_run(tmp_path, "train", 0, random_ious(0))
    (tmp_path / "results" / "train_seed0.json").write_text('{"experiment": "tr')
    with pytest.raises(util.UserError, match="train_seed0.json: was not written by a run"):
        run_compare(tmp_path, monkeypatch)


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

        def wait(self):
            pass

    monkeypatch.setattr(subprocess, "Popen", Process)
    return commands


def test_only_missing_runs_are_started(tmp_path, monkeypatch, started):
    flags = ["--data", tmp_path / "Made", "--experiments", "train", "train_4_a", "--epochs", 3]
    first = run_compare(tmp_path, monkeypatch, *flags, "--seeds", 0)
    assert run_compare(tmp_path, monkeypatch, *flags, "--seeds", 0) == first and len(started) == 2
    run_compare(tmp_path, monkeypatch, *flags, "--seeds", 0, 1)
    assert len(started) == 4 and all(f"{tmp_path / 'seed1'}" in command for command in started[2:])
    run_compare(tmp_path, monkeypatch, *flags, "--seeds", 0, "--batch-size", 8)  # another batch size is another run
    assert len(started) == 6


def test_a_finished_run_that_was_continued_and_stopped_is_not_done(tmp_path, monkeypatch, started):
    flags = ["--data", tmp_path / "Made", "--experiments", "train", "--seeds", 0]
    path = write_run(tmp_path / "seed0", "train", 0, random_ious(0)).path.with_suffix(".csv")
    run_compare(tmp_path, monkeypatch, *flags)
    assert not started
    path.write_text(path.read_text() + "3,1.5,1.2,0.3\n")
    run_compare(tmp_path, monkeypatch, *flags)
    assert len(started) == 1


def test_failed_run_is_reported_and_the_others_go_on_with_the_same_flags(tmp_path, monkeypatch, started):
    flags = ["--limit", 4, "--device", "cpu", "--no-pretrained", "--compile", "--seeds", 3]
    with pytest.raises(util.UserError, match="1 runs failed.*train_5_a.py.*exit code 2"):
        run_compare(tmp_path, monkeypatch, "--data", tmp_path / "Made", *flags)
    assert [Path(command[1]).stem for command in started] == list(compare.EXPERIMENTS)
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "| train_5_c | 1 |" in text and "train_5_a.py" in text.split("## Failed")[1]
    for command in started:
        assert {"--compile", "--resume"} <= set(command) and "--epochs" not in command
        assert (command[command.index("--limit") + 1], command[command.index("--device") + 1]) == ("4", "cpu")
        assert ("--no-pretrained" in command) == (Path(command[1]).stem in ("train_5_b", "train_6"))


SLOW_RUN = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(1.5)
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
    program = f"import pathlib, cli, compare; compare.ROOT = pathlib.Path({str(tmp_path)!r}); cli.run(compare.main)"
    line = [sys.executable, "-c", program, "--seeds", "0", "--experiments", "train"]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "start_new_session": True}
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True, **options) as process:
        assert "training\n" in iter(process.stdout.readline, "")
        # Ctrl-C reaches the run as well, but SIGTERM only the process that it is sent to
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        assert process.wait(timeout=60) == code
        assert (tmp_path / "saved").exists()


# Runs the scripts in this process, because starting Python for each takes long, and without plots.
IN_ONE_PROCESS = """
import runpy, subprocess, sys
from unittest import mock
import cli, compare, engine

class Process:
    def __init__(self, command):
        with mock.patch("sys.argv", command[1:]):
            runpy.run_path(command[1])["main"]()
        self.returncode = 0
    def wait(self):
        pass

with mock.patch("subprocess.Popen", Process), mock.patch("seg.report.Report._draw_all"):
    cli.run(compare.main)
"""


def test_script_of_the_user_is_compared_with_ours(tiny, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "report_template.html"):
        shutil.copy(path, project)
    shutil.copy(ROOT / "tests" / "tiny_net.py", project)
    (project / "basic_fcn.py").write_text("from tiny_net import TinyNet as FCN\n")
    script = (ROOT / "train.py").read_text(encoding="utf-8").replace("size=224", "size=32")
    for name in ("train.py", "train_mine.py"):
        (project / name).write_text(script, encoding="utf-8")
    assert "size=32" in script
    flags = "--experiments train train_mine --seeds 0 1 2 --epochs 1 --limit 2 --batch-size 2 --device cpu --data"
    line = [sys.executable, "-c", IN_ONE_PROCESS, *flags.split(), str(tiny)]
    done = subprocess.run(line, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = table_rows((project / "RESULTS.md").read_text(encoding="utf-8"))
    assert [row[:2] for row in rows[3:5]] == [["train: baseline", "3"], ["train_mine: baseline", "3"]]
    # the same script with the same seeds: no difference at all
    assert rows[7][:5] == ["train_mine: baseline", "train", "+0.0000", "+0.0000 to +0.0000", "no"]
    (project / "train_mine.py").write_text(script.replace("lr", "LR", 1), encoding="utf-8")
    done = subprocess.run(line, cwd=project, capture_output=True, text=True)
    rows = [row[:2] for row in table_rows(done.stdout) if "train_mine.py has changed since" in row[-1]]
    assert [done.returncode, rows] == [0, [["train_mine", str(seed)] for seed in range(3)]]
