"""Faults of the machine: a full disk, folders that cannot be written or vanish, signals, killed processes."""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TESTS, make_loaders, make_tiny, run_main

import download
import train
import util
from seg import engine, files, toy

resource = pytest.importorskip("resource", reason="needs a system that limits the size of files")
pytestmark = pytest.mark.usefixtures("tiny_net")

FLAGS = "--data Tiny --limit 2 --batch-size 2 --device cpu"
PLOTS = [f"plots/train_{name}.png" for name in ("curves", "iou", "confusion", "predictions")]
RESULTS = ["results/train_seed0.csv", "results/train_seed0.json", "plots/train_report.html"]
FILES = ["best_train.pt", "last_train.pt", *PLOTS, *RESULTS]


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


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def results(folder):
    """What a run's files hold, apart from the time that it took and the plots."""
    metrics = json.loads((folder / "results/train_seed0.json").read_text())
    models = [torch.load(folder / name, weights_only=True)["model"] for name in ("best_train.pt", "last_train.pt")]
    weights = [value.tolist() for model in models for value in model.values()]
    return (folder / "results/train_seed0.csv").read_bytes(), {**metrics, "seconds": 0, "epoch_seconds": 0}, weights


@contextlib.contextmanager
def disk_full_at(name):
    """Let the disk be full when the last bytes of the file ``name`` are written."""
    fsync = os.fsync

    def full(descriptor):
        if os.path.exists(f"{name}.{os.getpid()}.unfinished"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@contextlib.contextmanager
def file_size_limit(size):
    """Let the system refuse to write any file beyond a size in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITE_FAULTS = [(disk_full_at(name), name, "No space left on device") for name in FILES]
# these fail in the middle of a write; the files written before are smaller than the limit
SIZE_LIMITS = [(100, "results/train_seed0.csv"), (5_000, "best_train.pt"), (50_000, "plots/train_curves.png")]
WRITE_FAULTS += [(file_size_limit(size), name, "File too large") for size, name in SIZE_LIMITS]


@pytest.mark.parametrize(("fault", "name", "reason"), WRITE_FAULTS)
def test_a_full_disk_leaves_every_file_complete_and_the_run_resumes(runs, folder, capsys, fault, name, reason):
    before = contents(folder)
    with fault:
        assert run_train(folder, "--epochs 3 --resume") == 2
    output, errors = capsys.readouterr()
    assert len(errors.splitlines()) == 1 and f"{name}: cannot be written ({reason})" in errors
    # plots are drawn unless they are what cannot be written; the CSV is written before the first epoch
    drawn = name.endswith((".pt", ".json", ".html")) and reason != "File too large"
    assert (", drew plots/train_*.png" in output) == drawn
    assert (folder / name).read_bytes() == before[name]
    assert not list(folder.rglob("*.unfinished"))
    assert run_train(folder, "--epochs 3 --resume") == 0
    assert results(folder) == results(runs / "three")


@pytest.mark.parametrize(
    "step",
    [
        Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore advice.")),
        Mock(side_effect=MemoryError()),
        lambda *args: torch.empty(1 << 60, dtype=torch.uint8),  # a RuntimeError on a CPU
    ],
)
def test_running_out_of_memory_says_what_to_lower(folder, monkeypatch, capsys, step):
    monkeypatch.setattr(engine, "train_epoch", step)
    assert run_train(folder, "--epochs 3 --resume") == 2
    output, errors = capsys.readouterr()
    assert len(errors.splitlines()) == 1 and "): lower the batch size" in errors
    assert "stopped after epoch 2; kept best_train.pt and last_train.pt" in output


def test_a_data_set_that_does_not_fit_on_the_disk_leaves_nothing(runs, tmp_path):
    with tarfile.open(tmp_path / "archive.tar", "w") as tar:
        tar.add(runs / "Tiny", "VOCdevkit/Small")
    for make in (toy.render, lambda root: download.unpack([tmp_path / "archive.tar"], root)):
        with file_size_limit(1000), pytest.raises(util.UserError, match="cannot be written .File too large"):
            make(tmp_path / "data" / "Small")
        assert not list((tmp_path / "data").iterdir())


RUN = """
import sys, time
import pytest
import cli, conftest, engine, plotting, train
conftest.use_tiny_net(pytest.MonkeyPatch())
if "--slow" in sys.argv:
    sys.argv.remove("--slow")
    engine.train_epoch = plotting.class_iou = lambda *args: print("slow", flush=True) or time.sleep(60)
sys.argv[0] = "train.py"
cli.run(train.main)
"""


def start(folder, flags, **options):
    """Start train.py in a process of its own; with ``--slow``, training and drawing take a minute each."""
    line = [sys.executable, "-c", RUN, *FLAGS.split(), *flags.split()]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "PYTHONUNBUFFERED": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=env, **options)


def drop_root_privileges():
    """Let file modes hold for root too (Linux: without CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):  # PR_CAPBSET_DROP
        os._exit(77)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="drops root's privileges as Linux does")
def test_a_read_only_folder_is_reported_before_the_training(folder):
    before = contents(folder)
    (folder / "results").chmod(0o555)
    process = start(folder, "--epochs 3 --resume", preexec_fn=drop_root_privileges)
    output, errors = process.communicate(timeout=60)
    if process.returncode == 77:
        pytest.skip("root cannot drop its privileges here")
    assert process.returncode == 2 and "epoch" not in output
    assert errors == "error: results: cannot be written (Permission denied): choose a folder that can be written\n"
    assert contents(folder) == before


def test_a_folder_that_vanishes_during_the_run_is_reported(folder, monkeypatch, capsys):
    train_epoch = engine.train_epoch
    shutil.copytree(folder, folder / "out")
    monkeypatch.setattr(engine, "train_epoch", lambda *args: shutil.rmtree(folder / "out") or train_epoch(*args))
    assert run_train(folder, "--epochs 3 --resume --out out") == 2
    output, errors = capsys.readouterr()
    assert len(errors.splitlines()) == 1 and "cannot be written (No such file or directory)" in errors
    assert "stopped after epoch 2; kept nothing" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_run_at_once_and_leaves_every_file_complete(folder, number):
    before = contents(folder)
    process = start(folder, "--epochs 3 --resume --slow")
    for _ in range(2):  # in the third epoch, and while the plots of the second are drawn
        next(line for line in process.stdout if line == "slow\n")
        process.send_signal(number)
        sent = time.monotonic()
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", -number)
    assert time.monotonic() - sent < 5
    after = contents(folder)
    assert [name for name in FILES if after[name] != before[name]] == ["plots/train_curves.png"]
    assert not list(folder.rglob("*.unfinished"))


def test_a_closed_pipe_on_stdout_ends_the_run_quietly(folder):
    process = start(folder, "--epochs 1 --out elsewhere")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_a_file_that_another_program_has_open_is_replaced_when_it_is_closed(tmp_path, monkeypatch):
    replace, attempt = os.replace, Mock(side_effect=[PermissionError, PermissionError, None])
    monkeypatch.setattr(os, "replace", lambda *paths: attempt() or replace(*paths))
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with files.atomic_write(tmp_path / "a.csv") as file:
        file.write(b"new")
    assert (tmp_path / "a.csv").read_bytes() == b"new" and attempt.call_count == 3


KILLED = """
import os, signal, sys
from seg import files
with files.atomic_write(sys.argv[1]) as file:
    file.write(b"incomplete")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_process_killed_while_writing_left_is_deleted_by_a_later_write(folder):
    make_loaders(folder / "Tiny", 2, size=32)  # writes the data cache, whose name ends with a digest
    (cache,) = (folder / "Tiny" / ".cache").glob("train_*.npy")
    last = folder / "last_train.pt"
    before = last.read_bytes()
    process = subprocess.Popen([sys.executable, "-c", KILLED, last], cwd=ROOT)
    assert process.wait() == -signal.SIGKILL and last.read_bytes() == before
    left = Path(f"{last}.{process.pid}.unfinished")
    stale = [left, Path(f"{cache}.{process.pid}.unfinished")]
    recent = [Path(f"{path}.1.unfinished") for path in (last, cache)]  # another process may be writing them right now
    for path in (stale[1], *recent):
        shutil.copy(left, path)
    for path in stale:
        os.utime(path, (time.time() - files.STALE_AFTER - 60,) * 2)
    cache.unlink()
    assert run_train(folder, "--epochs 3 --resume") == 0
    make_loaders(folder / "Tiny", 2, size=32)
    assert not any(path.exists() for path in stale) and all(path.exists() for path in recent)
