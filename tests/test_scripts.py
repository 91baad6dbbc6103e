"""The experiments as a user runs them: whole commands in a shell."""

import difflib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SHARED, linked
from PIL import Image

import engine
import voc

CPU = ["--device", "cpu", "--limit", "2", "--batch-size", "2"]


def command(script, *flags):
    # A warning of our making ends the run; what libraries say about each other's age is theirs.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning", "-W", "ignore::ResourceWarning"]
    return [sys.executable, *warnings, str(ROOT / script), *map(str, flags)]


SCRIPTS = sorted(path.name for path in ROOT.glob("train*.py"))


@pytest.fixture
def weights(monkeypatch):
    """Let torchvision find the weights that lie beside the project; without them, 5_b runs from random ones."""
    if (SHARED / "torch" / "hub" / "checkpoints").is_dir():
        monkeypatch.setenv("TORCH_HOME", str(SHARED / "torch"))
        return []
    return ["--no-pretrained"]


def test_there_are_seven_experiments():
    letters = ("", *(f"_{number}_{letter}" for number in (4, 5) for letter in "abc"))
    assert sorted(f"train{suffix}.py" for suffix in letters) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_experiment_runs_from_another_folder_and_leaves_its_files(tiny, tmp_path, script, weights):
    extra = weights if script == "train_5_b.py" else []
    line = command(script, "--data", tiny, "--epochs", 2, *CPU, *extra)
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    stem = script.removesuffix(".py") + ("_no_pretrained" if extra else "")
    lines = done.stdout.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert [line.split()[0] for line in lines[-4:-1]] == ["plots", "checkpoint", "figures"]
    figures = json.loads((tmp_path / "results" / f"{stem}_seed0.json").read_text())
    assert (figures["experiment"], figures["dataset"], figures["epochs"]) == (stem, "Tiny", 2)
    assert lines[-1].startswith(f"{stem} seed 0: val mean IoU {figures['val']['miou']:.4f}")
    assert len((tmp_path / "results" / f"{stem}_seed0.csv").read_text().splitlines()) == 3
    augmented = "augment = None" not in (ROOT / script).read_text()
    plots = {"curves", "iou", "confusion", "predictions"} | ({"augmentation"} if augmented else set())
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{stem}_{name}.png" for name in plots}
    for name in plots:
        picture = np.array(Image.open(tmp_path / "plots" / f"{stem}_{name}.png").convert("L"))
        assert min(picture.shape) > 400 and picture.std() > 10  # large enough to print, and not blank
    model = checkpoint.load(tmp_path / f"best_{stem}.pt")
    assert model.classes == voc.CLASSES and model.size == 224
    assert (tmp_path / f"last_{stem}.pt").exists()
    weighted = script >= "train_4_c.py"  # computed and printed where used, and nowhere else
    assert ("class weights of the loss: background " in done.stdout) == weighted
    tripled = "an epoch shows each train image 3 times" in done.stdout
    assert tripled == (script in ("train_4_b.py", "train_4_c.py"))


def test_weights_that_cannot_be_loaded_are_named_in_one_line(tiny, tmp_path):
    nowhere = os.environ | {"TORCH_HOME": str(tmp_path / "none"), "https_proxy": "http://127.0.0.1:9"}
    line = command("train_5_b.py", "--data", tiny, *CPU)
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=nowhere)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ") and "--no-pretrained" in error
    assert str(tmp_path / "none/hub/checkpoints/resnet18-f37072fd.pth") in error
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in error
    assert not list(tmp_path.glob("*.pt"))


def test_a_broken_weights_file_is_named_in_one_line(tiny, tmp_path):
    broken = tmp_path / "home/hub/checkpoints/resnet18-f37072fd.pth"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not weights")
    line = command("train_5_b.py", "--data", tiny, *CPU)
    home = os.environ | {"TORCH_HOME": str(tmp_path / "home")}
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=home)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and str(broken) in done.stderr


def test_without_pretrained_weights_every_output_says_so(tiny, tmp_path):
    line = command("train_5_b.py", "--data", tiny, "--epochs", 1, "--no-pretrained", *CPU)
    nowhere = os.environ | {"TORCH_HOME": str(tmp_path / "none"), "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=nowhere, check=True)
    for folder in ("plots", "results", "."):
        files = [path.name for path in (tmp_path / folder).iterdir() if path.is_file()]
        assert files and all("train_5_b_no_pretrained" in name for name in files)
    assert done.stdout.splitlines()[0].startswith("train_5_b_no_pretrained: ")
    assert checkpoint.read(tmp_path / "best_train_5_b_no_pretrained.pt", "epoch")["experiment"].endswith("no_pretrained")


def test_4_a_anneals_the_rate_once_an_epoch_over_all_epochs(tiny, tmp_path):
    subprocess.run(
        command("train_4_a.py", "--data", tiny, "--epochs", 3, *CPU), cwd=tmp_path, capture_output=True, check=True
    )
    rows = (tmp_path / "results" / "train_4_a_seed0.csv").read_text().splitlines()[1:]
    rates = [float(row.split(",")[1]) for row in rows]
    # Loshchilov and Hutter (2017), equation 5, from the baseline's rate to 0 after the last epoch
    expected = [5e-4 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    assert rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "idea"),
    [
        ("train.py", "train_4_a.py", "scheduler"),
        ("train_4_a.py", "train_4_b.py", "augment"),
        ("train_4_b.py", "train_4_c.py", "weight"),
    ],
)
def test_the_difference_between_neighbours_is_the_idea(first, second, idea):
    """Below the docstrings, two scripts differ in the one line that sets ``idea``, and in what they import for it."""
    bodies = [(ROOT / name).read_text().split('"""')[2].splitlines() for name in (first, second)]
    changed = [
        line for line in difflib.unified_diff(*bodies, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    changed = [line[1:].strip() for line in changed if not line[1:].startswith("import ")]
    assert len(changed) == 2 and all(line.startswith(f"{idea} = ") for line in changed)
    docstring = (ROOT / second).read_text().split('"""')[1]
    assert f"Differs from {first} only in the {idea}" in docstring


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_experiment_fits_on_one_screen_and_does_no_work_itself(script):
    text = (ROOT / script).read_text()
    assert len(text.splitlines()) <= 60
    for word in ("no_grad", "for ", "while ", "if variant", "softmax", "argmax"):
        assert word not in text.split('"""')[2], word


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "stopped by Ctrl-C\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_in_training_keeps_plots_and_checkpoint_and_resume_goes_on(tiny, tmp_path, number, code, said):
    line = command("train.py", "--data", tiny, "--epochs", 400, *CPU)
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for text in process.stdout:
        if text.startswith("epoch"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and err == said
    assert "stopped after epoch" in out and "best_train.pt" in out
    checkpoint.load(tmp_path / "best_train.pt")
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
def test_real_photos(tmp_path, name):
    data = SHARED / "data" / "VOCdevkit" / name
    if not data.is_dir():
        pytest.skip(f"needs the photos in {data}")
    data = linked(data, tmp_path / name)
    subprocess.run(
        command("train.py", "--data", data, "--epochs", 1, *CPU), cwd=tmp_path, capture_output=True, check=True
    )
    figures = json.loads((tmp_path / "results" / "train_seed0.json").read_text())
    assert (figures["dataset"], figures["test"]) == (name, None)
    assert len(figures["val"]["iou"]) == (11 if name == "CamVid" else 21)


def test_what_the_readme_promises_is_held_by_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    defined = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 5 and all(f"def {name}(" in defined for name in named)


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
