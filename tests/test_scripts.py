"""The experiments as a user runs them: whole commands in a shell."""

import difflib
import json
import math
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import engine
import voc

CPU = ["--device", "cpu", "--limit", "2", "--batch-size", "2"]


def command(script, *flags):
    # A warning of our making ends the run; what libraries say about each other's age is theirs.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning", "-W", "ignore::ResourceWarning"]
    return [sys.executable, *warnings, str(ROOT / script), *map(str, flags)]


def test_train_runs_from_another_folder_and_leaves_its_files(tiny, tmp_path):
    done = subprocess.run(
        command("train.py", "--data", tiny, "--epochs", 2, *CPU), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    lines = done.stdout.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert [line.split()[0] for line in lines[-4:-1]] == ["plots", "checkpoint", "figures"]
    figures = json.loads((tmp_path / "results" / "train_seed0.json").read_text())
    assert (figures["experiment"], figures["dataset"], figures["epochs"]) == ("train", "Tiny", 2)
    assert lines[-1].startswith(f"train seed 0: val mean IoU {figures['val']['miou']:.4f}")
    assert len((tmp_path / "results" / "train_seed0.csv").read_text().splitlines()) == 3
    for name in ("curves", "iou", "confusion", "predictions"):
        picture = np.array(Image.open(tmp_path / "plots" / f"train_{name}.png").convert("L"))
        assert min(picture.shape) > 400 and picture.std() > 10  # large enough to print, and not blank
    model = engine.load(tmp_path / "best_train.pt")
    assert model.classes == voc.CLASSES and model.size == 224
    assert (tmp_path / "last_train.pt").exists()


def test_4_a_anneals_the_rate_once_an_epoch_over_all_epochs(tiny, tmp_path):
    subprocess.run(
        command("train_4_a.py", "--data", tiny, "--epochs", 3, *CPU), cwd=tmp_path, capture_output=True, check=True
    )
    rows = (tmp_path / "results" / "train_4_a_seed0.csv").read_text().splitlines()[1:]
    rates = [float(row.split(",")[1]) for row in rows]
    # Loshchilov and Hutter (2017), equation 5, from the baseline's rate to 0 after the last epoch
    expected = [5e-4 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    assert rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("first", "second", "idea"), [("train.py", "train_4_a.py", "scheduler")])
def test_the_difference_between_neighbours_is_the_idea(first, second, idea):
    """Below the docstrings, the lines of two scripts differ only where ``idea`` is set, and by one line."""
    bodies = [(ROOT / name).read_text().split('"""')[2].splitlines() for name in (first, second)]
    changed = [
        line for line in difflib.unified_diff(*bodies, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert len(changed) == 2 and all(line[1:].strip().startswith(f"{idea} = ") for line in changed)


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("train*.py")))
def test_an_experiment_fits_on_one_screen_and_does_no_work_itself(script):
    text = (ROOT / script).read_text()
    assert len(text.splitlines()) <= 60
    for word in ("no_grad", "for ", "while ", "if variant", "softmax", "argmax"):
        assert word not in text.split('"""')[2], word


def test_ctrl_c_in_training_keeps_plots_and_checkpoint_and_resume_goes_on(tiny, tmp_path):
    line = command("train.py", "--data", tiny, "--epochs", 400, *CPU)
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for text in process.stdout:
        if text.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "stopped by Ctrl-C\n"
    assert "stopped after epoch" in out and "best_train.pt" in out
    engine.load(tmp_path / "best_train.pt")
    assert len(list((tmp_path / "plots").glob("train_*.png"))) == 4
    done = len((tmp_path / "results" / "train_seed0.csv").read_text().splitlines()) - 1
    resumed = command("train.py", "--data", tiny, "--epochs", done + 1, "--resume", *CPU)
    text = subprocess.run(resumed, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert f"after epoch {done}" in text and text.count("\nepoch ") == 1


def test_without_data_it_says_how_to_get_some(tmp_path):
    done = subprocess.run(command("train.py"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 6
    for way in ("python download.py\n", "--tar FILE", "--toy"):
        assert way.strip() in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["VOC2007-sample", "CamVid"])
def test_real_photos(sample, tmp_path, name):
    data = sample.parent / name
    subprocess.run(
        command("train.py", "--data", data, "--epochs", 1, *CPU), cwd=tmp_path, capture_output=True, check=True
    )
    figures = json.loads((tmp_path / "results" / "train_seed0.json").read_text())
    assert (figures["dataset"], figures["test"]) == (name, None)
    assert len(figures["val"]["iou"]) == (11 if name == "CamVid" else 21)


def test_make_demo_and_test_use_only_what_is_tracked():
    """The commands of the README call files that git knows, so that a fresh clone has them."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in (
        "Makefile",
        "requirements.txt",
        "requirements-dev.txt",
        "train.py",
        "download.py",
        "toy.py",
        ".ci/run",
    ):
        assert name in tracked
