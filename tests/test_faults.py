"""Faults of the machine: a full disk, folders that cannot be written or vanish, a second signal, a closed pipe."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TESTS, contents, make_tiny, results, run_main

import train
import util
from seg import engine, files, report, signals

pytest.importorskip("fcntl", reason="needs signals and forks")
pytestmark = pytest.mark.usefixtures("tiny_net")

FLAGS = "--data Tiny --limit 2 --batch-size 2 --device cpu"
FILES = ["last_train.pt", "best_train.pt", "results/train_seed0.csv", "results/train_seed0.json"]
FILES += [f"plots/train_{name}" for name in "curves.png iou.png confusion.png predictions.png report.html".split()]


def run_train(folder, flags):
    return run_main(folder, train, f"{FLAGS} {flags}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_net):
    """A folder with two runs of train.py, of two epochs and of three, each epoch better than the one before."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny(folder / "Tiny")
    assert run_train(folder, "--epochs 2 --out two") == run_train(folder, "--epochs 3 --out three") == 0
    return folder


@pytest.fixture
def folder(runs, tmp_path):
    """A folder with the run of two epochs, to be continued."""
    shutil.copytree(runs / "two", tmp_path, dirs_exist_ok=True)
    make_tiny(tmp_path / "Tiny")
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_every_file_complete_and_the_run_resumes(runs, folder, monkeypatch, capsys, name):
    before, fsync = contents(folder), os.fsync

    def full(descriptor):
        """Let the disk be full when the last bytes of the file are written."""
        if list(folder.glob(f"{name}.*.unfinished")):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run_train(folder, "--epochs 3 --resume") == 2
    assert capsys.readouterr().err == f"error: {name}: cannot be written (No space left on device): free some space\n"
    assert (folder / name).read_bytes() == before[folder / name]
    assert not list(folder.rglob("*.unfinished"))
    assert run_train(folder, "--epochs 3 --resume") == 0
    assert results(folder) == results(runs / "three")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nMore advice."), MemoryError()])
def test_running_out_of_memory_says_what_to_lower(folder, monkeypatch, capsys, error):
    monkeypatch.setattr(engine, "train_epoch", Mock(side_effect=error))
    assert run_train(folder, "--epochs 3 --resume") == 2
    output, errors = capsys.readouterr()
    assert len(errors.splitlines()) == 1 and "): lower the batch size" in errors
    assert "stopped after epoch 2; kept best_train.pt and last_train.pt" in output


def test_a_read_only_folder_is_reported_before_the_training(folder, capsys):
    assert run_train(folder, "--epochs 3 --out /sys") == 2  # in which not even root can create a file
    output, errors = capsys.readouterr()
    assert errors.startswith("error: /sys/plots: cannot be written (") and errors.count("\n") == 1
    assert "epoch" not in output


def test_a_folder_that_vanishes_during_the_run_is_reported(folder, monkeypatch, capsys):
    shutil.copytree(folder, folder / "out")
    monkeypatch.setattr(util, "seed_epoch", lambda *args: shutil.rmtree(folder / "out"))  # at the begin of an epoch
    assert run_train(folder, "--epochs 3 --resume --out out") == 2
    output, errors = capsys.readouterr()
    assert errors.startswith("error: out/last_train.pt: cannot be written (No such file") and errors.count("\n") == 1
    assert "kept nothing" in output


def start(folder, *line):
    """Start Python in a process of its own, which finds this project and its tests."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}", "PYTHONUNBUFFERED": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *line], cwd=folder, stdout=pipe, stderr=pipe, text=True, env=env)


# Runs train.py; a training step takes a minute.
SLOW = """
import sys, time
import pytest
import conftest, train
from seg import cli, engine
conftest.use_tiny_net(pytest.MonkeyPatch())
engine.train_epoch = lambda *args, **options: print("slow", flush=True) or time.sleep(60)
cli.run(train.main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_run_at_once_and_leaves_every_file_complete(folder, number):
    before = contents(folder)
    process = start(folder, "-c", SLOW, *FLAGS.split(), "--epochs", "3", "--resume")
    next(line for line in process.stdout if line == "slow\n")
    process.send_signal(number)
    time.sleep(0.5)  # else the system might merge them
    process.send_signal(number)
    expected = "\nstopping; a second signal ends the process at once\n"
    assert (process.communicate(timeout=5)[1], process.returncode) == (expected, -number)
    assert contents(folder) == before and not list(folder.rglob("*.unfinished"))


def test_a_signal_that_arrives_in_a_destructor_is_not_lost():
    class Sender:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    items = []
    with signals.handled(), pytest.raises(SystemExit) as stop:
        for item in report.progress(range(3), 3, "counting"):
            items.append(item)
            Sender()
    assert (stop.value.code, items) == (143, [0])


@pytest.mark.parametrize(("redirection", "code"), [("> /dev/full", 2), (">&- 2>&-", 0)])
def test_a_full_or_missing_output_loses_no_file(folder, redirection, code):
    line = f"exec {sys.executable} {ROOT}/train.py {FLAGS} --epochs 1 --out new {redirection}"
    done = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True)
    full = "error: the output cannot be written (No space left on device): free some space\n"
    assert (done.returncode, done.stderr) == (code, full if code else "")
    assert (folder / "new/last_train.pt").exists() == (code == 0)


def test_a_closed_pipe_on_stdout_ends_the_run_quietly(folder):
    process = start(folder, ROOT / "train.py", *FLAGS.split(), "--out", "elsewhere")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_a_file_that_another_program_has_open_is_replaced_when_it_is_closed(tmp_path, monkeypatch):
    replace, attempt = os.replace, Mock(side_effect=[PermissionError, PermissionError, None])
    monkeypatch.setattr(os, "replace", lambda *paths: attempt() or replace(*paths))
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with files.atomic_write(tmp_path / "a.csv") as file:
        file.write(b"new")
    assert (tmp_path / "a.csv").read_bytes() == b"new" and attempt.call_count == 3


def test_what_a_killed_process_left_is_deleted_by_a_later_write(tmp_path):
    stale, recent = (tmp_path / f"a.csv.{number}.unfinished" for number in (1, 2))  # recent: it may be in use
    for path in (stale, recent):
        path.write_bytes(b"incomplete")
    os.utime(stale, (time.time() - files.STALE_AFTER - 60,) * 2)
    with files.atomic_write(tmp_path / "a.csv"):
        pass
    assert not stale.exists() and recent.exists()
