"""Faults of the machine: a full disk, folders that cannot be written or vanish, signals at a bad moment."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from conftest import ROOT, call, make_tiny

import download
import engine
import toy
import train
import util
import voc

resource = pytest.importorskip("resource", reason="needs a system that limits the size of files")

FLAGS = "--data Tiny --limit 2 --batch-size 2 --device cpu"
FILES = [
    "best_train.pt",
    "last_train.pt",
    *(f"plots/train_{name}.png" for name in ("curves", "iou", "confusion", "predictions")),
    *(f"results/train_seed0.{kind}" for kind in ("csv", "json", "npz")),
]


def train_on(folder, flags):
    """Run train.py on small pictures in a folder; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voc, "loaders", lambda *given, size, real=voc.loaders, **named: real(*given, size=32, **named))
        return call(folder, train, f"{FLAGS} {flags}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the tiny set and two runs of train.py in folders of their own, of two epochs and of three."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny(folder / "Tiny")
    assert train_on(folder, "--epochs 2 --out two") == train_on(folder, "--epochs 3 --out three") == 0
    return folder


@pytest.fixture
def stopped(runs, tmp_path):
    """A folder with a run of two epochs, to be continued."""
    shutil.copytree(runs / "two", tmp_path, dirs_exist_ok=True)
    (tmp_path / "Tiny").symlink_to(runs / "Tiny")
    return tmp_path


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def check_whole_run(folder, runs):
    """Check that a folder holds what the undisturbed run of three epochs left."""
    found, expected = contents(folder), contents(runs / "three")
    assert found["results/train_seed0.csv"] == expected["results/train_seed0.csv"]
    for name in ("best_train.pt", "last_train.pt"):
        ours, theirs = (torch.load(path / name, weights_only=True)["model"] for path in (folder, runs / "three"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def refusing(name):
    """An ``os.fsync`` that finds the disk full where it is to sync the file that becomes ``name``."""
    real = os.fsync

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{name}.unfinished"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    return fsync


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux to know an open file's name")
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_every_file_whole_and_the_run_continues(runs, stopped, monkeypatch, capsys, name):
    before = contents(stopped)
    if name == "best_train.pt":  # let the third epoch be the best
        state = torch.load(stopped / "last_train.pt", weights_only=True)
        for row in state["history"]:
            row["val_miou"] -= 1
        torch.save(state, stopped / "last_train.pt")
        before["last_train.pt"] = (stopped / "last_train.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refusing(name))
        assert train_on(stopped, "--epochs 3 --resume") == 2
    told = capsys.readouterr()
    said = told.err.splitlines()
    assert len(said) == 1 and f"{name}: cannot be written (No space left on device)" in said[0]
    drawn = not name.startswith("plots") and not name.endswith("csv")  # which comes before the first epoch
    assert (", drew plots/train_*.png" in told.out) == drawn
    assert (stopped / name).read_bytes() == before[name]
    assert not list(stopped.rglob("*.unfinished"))
    assert train_on(stopped, "--epochs 3 --resume") == 0
    if name != "best_train.pt":
        check_whole_run(stopped, runs)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore advice."), MemoryError()]
)
def test_running_out_of_memory_says_what_to_lower(stopped, monkeypatch, capsys, error):
    def step(*given):
        raise error

    monkeypatch.setattr(engine, "training_step", step)
    assert train_on(stopped, "--epochs 3 --resume") == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "): lower --batch-size" in said.err
    assert "stopped after epoch 2; kept best_train.pt and last_train.pt" in said.out


def test_a_cpu_that_runs_out_of_memory_is_understood(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: torch.empty(1 << 60, dtype=torch.uint8))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.splitlines()) == 1 and "lower --batch-size" in said


@contextlib.contextmanager
def files_no_larger_than(size):
    """Let the system refuse to write any file beyond a size in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 5_000, 300_000, 5_000_000])
def test_a_write_that_breaks_off_leaves_the_earlier_files(stopped, capsys, size):
    """At these sizes break: the CSV, a picture's pixels kept in .cache, and checkpoints near start and middle."""
    before = contents(stopped)
    (stopped / "Tiny").unlink()
    make_tiny(stopped / "Tiny")
    with files_no_larger_than(size):
        code = train_on(stopped, "--epochs 3 --resume")
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and len(said) == 1 and "cannot be written (File too large)" in said[0], said
    assert {name: before[name] for name in FILES[:2]} == {name: (stopped / name).read_bytes() for name in FILES[:2]}
    assert not list(stopped.rglob("*.unfinished"))


def test_a_data_set_that_finds_no_room_is_named_and_leaves_nothing(runs, tmp_path):
    with tarfile.open(tmp_path / "archive.tar", "w") as tar:
        tar.add(runs / "Tiny", "VOCdevkit/Small")
    for make in (toy.render, lambda root: download.unpack([tmp_path / "archive.tar"], root)):
        with files_no_larger_than(1000), pytest.raises(util.UserError, match="cannot be written .File too large"):
            make(tmp_path / "data" / "Small")
        assert not list((tmp_path / "data").iterdir())


def test_a_folder_that_cannot_be_made_is_named(stopped, capsys):
    (stopped / "file").write_text("")
    assert train_on(stopped, "--epochs 1 --out file") == 2
    assert "file/plots: cannot be written (Not a directory)" in capsys.readouterr().err


def without_power():
    """In a process to come: take from root the power to write where modes forbid it (Linux: CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):  # PR_CAPBSET_DROP
        os._exit(77)


def process(folder, *flags, code=None, **options):
    line = [sys.executable, *(["-c", code] if code else [str(ROOT / "train.py")]), *FLAGS.split(), *flags]
    return subprocess.Popen(
        line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}, **options,
    )  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes root's powers away as Linux does")
def test_a_folder_made_read_only_is_named_before_the_training_and_data_there_is_only_read(stopped):
    before = contents(stopped)
    (stopped / "Tiny").unlink()
    make_tiny(stopped / "Tiny").chmod(0o555)
    (stopped / "results").chmod(0o555)
    ends = []
    for flags in (("--resume", "--epochs", "3"), ("--epochs", "1", "--out", "elsewhere")):
        running = process(stopped, *flags, preexec_fn=without_power)
        ends.append((*running.communicate(timeout=60), running.returncode))
    if ends[0][2] == 77:
        pytest.skip("root here may not give up its powers")
    (said, error, code), whole = ends
    assert (code, said) == (2, "")
    assert error == "error: results: cannot be written (Permission denied): free some space or choose another --out\n"
    assert contents(stopped) == before
    assert whole[1:] == ("", 0) and "train seed 0: val mean IoU" in whole[0]
    assert not (stopped / "Tiny" / ".cache").exists()


def test_a_folder_that_vanishes_is_named(stopped, monkeypatch, capsys):
    real = engine.train_epoch

    def vanish(*given):
        shutil.rmtree(stopped / "out")
        return real(*given)

    shutil.copytree(stopped, stopped / "out", symlinks=True)
    monkeypatch.setattr(engine, "train_epoch", vanish)
    assert train_on(stopped, "--epochs 3 --resume --out out") == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "cannot be written (No such file or directory)" in said.err
    assert "stopped after epoch 2; kept nothing" in said.out


SLOW = """
import sys, time
import engine, plotting, train, util, voc
def slow(what):
    return lambda *given: (print(what, flush=True), time.sleep(60))
engine.train_epoch, plotting.class_iou = slow("training"), slow("drawing")
real = voc.loaders
voc.loaders = lambda *given, size, **named: real(*given, size=32, **named)
sys.argv[0] = "train.py"
cli.run(train.main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_at_once_with_all_files_whole(stopped, number):
    """The first one comes in the third epoch, the second one while the plots are drawn, which here takes a minute."""
    before = contents(stopped)
    running = process(stopped, "--epochs", "3", "--resume", code=SLOW)
    for line in running.stdout:
        if line in ("training\n", "drawing\n"):
            running.send_signal(number)
            began = time.monotonic()
        if line == "drawing\n":
            break
    assert (running.communicate(timeout=60)[1], running.returncode) == ("", -number)
    assert time.monotonic() - began < 5  # of the minute that drawing takes
    now = contents(stopped)
    assert [name for name in FILES if now[name] != before[name]] == ["plots/train_curves.png"]  # drawn anew, whole
    assert not list(stopped.rglob("*.unfinished"))


def test_who_reads_the_output_may_go(stopped):
    running = process(stopped, "--epochs", "1", "--out", "elsewhere")
    running.stdout.close()
    assert running.stderr.read() == "" and running.wait() == 141


def test_what_a_killed_process_left_in_the_cache_is_taken_away_but_not_what_another_writes(runs, tmp_path):
    data = make_tiny(tmp_path / "Tiny")
    (data / ".cache").mkdir()
    old, new = (data / ".cache" / f"train_32_{name}.unfinished" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("")
    os.utime(old, (time.time() - 2 * voc.ABANDONED,) * 2)
    voc.load_resized(voc.Split(data, "train"), 32)
    assert new.exists() and not old.exists()
