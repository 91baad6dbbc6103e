"""A second run in the same folder: refused, resumed after any kill, or in place of the first; never beside it."""

import contextlib
import itertools
import os

import pytest
import torch
from conftest import contents, results, run_main
from tiny_net import TinyNet

import train
from seg import checkpoint, report
from seg.run import Run

pytestmark = pytest.mark.usefixtures("tiny_net")

FLAGS = "--data Tiny --limit 2 --batch-size 2 --device cpu"


@pytest.fixture
def folder(tiny):
    """A folder with a run of seed 0."""
    assert run(tiny.parent, "--epochs 2") == 0
    return tiny.parent


def run(folder, flags):
    return run_main(folder, train, f"{FLAGS} {flags}")


@pytest.fixture
def mious(monkeypatch):
    """The mean IoU on val of each of three epochs, which a test may change."""
    values, row = {1: 0.2, 2: 0.4, 3: 0.3}, report.history_row
    monkeypatch.setattr(report, "history_row", lambda epoch, *args: row(epoch, *args) | {"val_miou": values[epoch]})
    return values


class Killed(BaseException):
    """Stands for the end of the process."""


@contextlib.contextmanager
def killed_at(number, before):
    """Raise Killed before or after what the n-th call of ``os.replace`` does, and at any later one."""
    replace, calls = os.replace, itertools.count(1)

    def replace_or_die(*paths):
        call = next(calls)
        if call < number or call == number and not before:
            replace(*paths)
        if call >= number:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        yield


@pytest.mark.parametrize("before", [True, False])
def test_a_run_killed_at_any_write_resumes_to_the_results_of_one_that_was_not(tiny, mious, before):
    folder = tiny.parent
    assert run(folder, "--epochs 3") == 0
    expected, values = results(folder), dict(mious)
    assert (expected[1]["best_epoch"], expected[1]["epochs"]) == (2, 3)
    for number in itertools.count(1):
        for path in (*folder.glob("*.pt"), *folder.glob("plots/*"), *folder.glob("results/*")):
            path.unlink()
        mious.update(values)
        with contextlib.suppress(Killed), killed_at(number, before):
            assert run(folder, "--epochs 3") == 0
            break
        if (folder / "last_train.pt").exists():  # these epochs would not be as good if they were trained again
            mious.update({row["epoch"]: 0.0 for row in checkpoint.read(folder / "last_train.pt")["history"]})
        assert run(folder, "--epochs 3 --resume") == 0
        assert results(folder) == expected, f"killed at write {number}"
    assert number > 8 + 1 + 5  # last, best and CSV (epoch 3 is not the best); JSON; plots and report


def test_a_run_whose_best_checkpoint_was_deleted_is_not_continued(tiny, mious, capsys):
    folder = tiny.parent
    assert run(folder, "--epochs 3") == 0
    (folder / "best_train.pt").unlink()
    before = contents(folder)
    capsys.readouterr()
    assert run(folder, "--epochs 3 --resume") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: best_train.pt: is missing") and "--overwrite" in error
    assert contents(folder) == before


@pytest.mark.parametrize("flags", ["--epochs 2", "--epochs 2 --seed 1", "--epochs 1"])
def test_a_second_run_is_refused_and_changes_nothing(folder, capsys, flags):
    before = contents(folder)
    capsys.readouterr()
    assert run(folder, flags) == 2
    output, error = capsys.readouterr()
    about_data = "warning: ", "Tiny has no classes.txt: the class names are VOC's"
    assert all(line.startswith(about_data) for line in output.splitlines()) and error.count("\n") == 1
    assert error.startswith("error: best_train.pt: is from an earlier run: ")
    assert all(way in error for way in ("continue it with --resume", "--overwrite", "--out"))
    assert contents(folder) == before
    assert run(folder, f"{flags} --out elsewhere") == 0


def test_files_without_a_checkpoint_to_continue_are_not_overwritten_either(folder, capsys):
    for name, flags in (("last_train.pt", "--resume"), ("best_train.pt", "")):
        (folder / name).unlink()
        before = contents(folder)
        assert run(folder, f"--epochs 2 {flags}") == 2
        error = capsys.readouterr().err
        assert "is from an earlier run" in error and "--overwrite" in error and "--resume" not in error
        assert contents(folder) == before


def test_overwrite_replaces_what_the_first_run_has_left_once_the_new_run_can_start(folder, capsys, monkeypatch):
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(train, "FCN", lambda num_classes: TinyNet(num_classes - 1))
        assert run(folder, "--epochs 1 --overwrite") == 2
    assert contents(folder) == before
    others = [folder / "plots/train_4_a_curves.png", folder / "results/train_seed_sweep_seed0.csv"]
    others += [folder / "results/train_4_a_seed0.csv", folder / "best_train_4_a.pt"]
    for other in others:
        other.write_bytes(b"of another experiment")
    assert run(folder, "--epochs 1 --seed 1 --overwrite") == 0
    assert {path.name for path in folder.glob("results/train_seed[0-9]*")} == {"train_seed1.json", "train_seed1.csv"}
    states = [torch.load(folder / f"{kind}_train.pt", weights_only=True) for kind in ("best", "last")]
    assert [state["seed"] for state in states] == [1, 1] and all(other.exists() for other in others)
    assert run(folder, "--resume --overwrite") == 2 and "not allowed with" in capsys.readouterr().err


def test_two_runs_at_the_same_time_do_not_share_a_folder(tiny, capsys):
    folder = tiny.parent
    with Run(folder, "train", 0)._locked():
        assert run(folder, "--epochs 1 --seed 1 --overwrite") == 2
        error = capsys.readouterr().err
        assert error == "error: .: another run of train is writing to this folder: wait, or choose another --out\n"
        assert run(folder, "--epochs 1 --seed 1 --out other") == 0
    assert run(folder, "--epochs 1 --seed 1") == 0
