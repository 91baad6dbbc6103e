"""The experiments as a user runs them: what they write and print, how they differ, and how they stop."""

import difflib
import importlib
import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SHARED, linked, run_main, skip_drawing, use_tiny_net
from PIL import Image

import train
import train_4_a
import train_5_b
from seg import checkpoint, voc_layout

FLAGS = "--device cpu --limit 2 --batch-size 2"
EXPERIMENTS = ("train", "train_4_a", "train_4_b", "train_4_c", "train_5_a", "train_5_b", "train_5_c", "train_6")
PLOTS = ("curves", "iou", "confusion", "predictions")


def source(name):
    """The docstring of a script and the code below it."""
    _, docstring, code = (ROOT / f"{name}.py").read_text(encoding="utf-8").split('"""')
    return docstring, code


@pytest.mark.parametrize("name", [*EXPERIMENTS, "train_5_b_no_pretrained", "train_6_no_pretrained"])
def test_experiment_writes_its_files_to_the_current_folder(tiny, tmp_path, monkeypatch, capsys, name):
    script, flags = name.removesuffix("_no_pretrained"), f"--data {tiny} --epochs 1 {FLAGS}"
    if name in ("train_5_b", "train_6") and not (SHARED / "torch").is_dir():
        pytest.skip("needs the ImageNet weights")
    flags += " --no-pretrained" * (name != script)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights" if name != script else SHARED / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    if script != "train_4_c":  # it has all plots
        skip_drawing(monkeypatch)
    assert run_main(tmp_path, importlib.import_module(script), flags) == 0
    output, error = capsys.readouterr()
    assert error == ""  # no progress bar where there is no terminal
    about_data = "warning: ", f"{tiny} has no classes.txt: the class names are VOC's"
    lines = [line for line in output.splitlines() if not line.startswith(about_data)]  # of the small set
    assert not any(word in output for word in ("batch norm", "not in the optimizer", "no gradient", "void pixels"))
    assert lines[0].startswith(f"{name}: Tiny") and sum(line.startswith("epoch 1/1 ") for line in lines) == 1
    assert [line.split()[0] for line in lines[-5:-1]] == ["report", "plots", "checkpoint", "metrics"]
    metrics = json.loads((tmp_path / "results" / f"{name}_seed0.json").read_text())
    assert lines[-1].startswith(f"{name} seed 0: val mean IoU {metrics['val']['miou']:.4f}")
    assert (metrics["experiment"], metrics["dataset"], metrics["epochs"]) == (name, "Tiny", 1)
    code = source(script)[1]
    assert metrics["loss"].endswith("weighted by class") == ("weight = None" not in code)
    assert ("an epoch shows each train image 3 times" in output) == (name in ("train_4_b", "train_4_c"))
    plots = [*PLOTS, "augmentation"] if "augment = None" not in code else PLOTS
    expected = {f"{name}_{plot}.png" for plot in plots} | {f"{name}_report.html"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == expected
    assert {path.name for path in tmp_path.glob("*.pt")} == {f"best_{name}.pt", f"last_{name}.pt"}
    model = checkpoint.load(tmp_path / f"best_{name}.pt")
    sizes = {"train_5_b": (320, 320), "train_6": (352, 480)}
    assert (model.classes, model.size) == (voc_layout.CLASSES, sizes.get(script, (224, 224)))


def test_damaged_or_missing_imagenet_weights_are_named(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    path = tmp_path / "home" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    for missing in (True, False):
        if not missing:
            path.write_bytes(b"not weights")
        assert run_main(tmp_path, train_5_b, f"--data {tiny} {FLAGS}") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {path}: ") and "--no-pretrained" in error
        assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in error


def test_4_a_decays_the_learning_rate_once_per_epoch(tiny, tmp_path, monkeypatch):
    skip_drawing(monkeypatch)
    assert run_main(tmp_path, train_4_a, f"--data {tiny} --device cpu --epochs 3 --limit 2 --batch-size 1") == 0
    rates = np.loadtxt(tmp_path / "results" / "train_4_a_seed0.csv", delimiter=",", skiprows=1)[:, 1]
    # Loshchilov and Hutter (2017), equation 5, from the baseline's rate to 0 after the last epoch
    assert rates == pytest.approx([5e-4 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)], rel=1e-9)


@pytest.mark.parametrize(("index", "idea"), [(1, "scheduler"), (2, "augment"), (3, "weight")])
def test_experiment_differs_from_its_base_only_in_the_idea(index, idea):
    """Below the docstrings, in the line that sets ``idea`` and in what is imported for it."""
    base, name = EXPERIMENTS[index - 1 : index + 1]
    codes = [source(script)[1].splitlines() for script in (base, name)]
    changes = [line[2:].strip() for line in difflib.ndiff(*codes) if line[0] in "+-"]
    changes = [line for line in changes if not line.startswith("from seg import ")]
    assert len(changes) == 2 and all(line.startswith(f"{idea} = ") for line in changes)
    assert f"Differs from {base}.py only in the {idea}" in source(name)[0]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_leaves_the_work_to_other_files(name):
    assert not any(word in source(name)[1] for word in ("no_grad", "for ", "while ", "if variant", "softmax", "argmax"))


def test_plots_are_explained_before_the_first_run():
    text = (ROOT / "plots" / "README.md").read_text(encoding="utf-8")
    assert [plot for plot in (*PLOTS, "augmentation", "report") if f"_{plot}." not in text] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_training_keeps_curves_and_checkpoints(tiny, tmp_path, number, code):
    warnings = "-W error -W ignore::DeprecationWarning -W ignore::ResourceWarning"  # these two come from libraries
    line = [sys.executable, *warnings.split(), ROOT / "train.py", "--data", tiny, "--epochs", "400", *FLAGS.split()]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(text.startswith("epoch   2/400 ") for text in iter(process.stdout.readline, ""))
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (code, "\nstopping; a second signal ends the process at once\n")
    assert "stopped after epoch" in output and "best_train.pt" in output
    assert checkpoint.load(tmp_path / "best_train.pt") and (tmp_path / "last_train.pt").exists()
    with Image.open(tmp_path / "plots" / "train_curves.png") as image:
        assert min(image.size) > 400 and np.std(image.convert("L")) > 10  # large enough to print, not blank


@pytest.mark.parametrize(("name", "num_classes"), [("VOC2007-sample", 21), ("CamVid", 11)])
def test_real_photos_can_be_trained_on(tmp_path, monkeypatch, name, num_classes):
    data = SHARED / "data" / "VOCdevkit" / name
    if not data.is_dir():
        pytest.skip(f"needs the photos in {data}")
    use_tiny_net(monkeypatch)
    assert run_main(tmp_path, train, f"--data {linked(data, tmp_path / name)} --epochs 1 {FLAGS}") == 0
    metrics = json.loads((tmp_path / "results" / "train_seed0.json").read_text())
    assert (metrics["dataset"], metrics["test"], len(metrics["val"]["iou"])) == (name, None, num_classes)
