"""A second run in the same folder: refused, resumed or, if asked for, in place of the first; never beside it."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_main

import train
from seg import checkpoint, files

pytestmark = pytest.mark.usefixtures("tiny_net")

FLAGS = "--data Tiny --limit 2 --batch-size 2 --device cpu"


@pytest.fixture
def folder(tiny):
    """A folder with a run of seed 0."""
    assert run(tiny.parent, "--epochs 2") == 0
    return tiny.parent


def run(folder, flags):
    return run_main(folder, train, f"{FLAGS} {flags}")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts}


@pytest.mark.parametrize("flags", ["--epochs 2", "--epochs 2 --seed 1", "--epochs 1"])
def test_a_second_run_is_refused_and_changes_nothing(folder, capsys, flags):
    before = contents(folder)
    capsys.readouterr()
    assert run(folder, flags) == 2
    output, error = capsys.readouterr()
    assert all(line.startswith("warning: ") for line in output.splitlines()) and error.count("\n") == 1
    assert error.startswith("error: best_train.pt: is from an earlier run (seed 0 on Tiny, best epoch ")
    assert all(way in error for way in ("continue it with --resume", "--overwrite", "--out"))
    assert contents(folder) == before
    assert run(folder, f"{flags} --out elsewhere") == 0


def test_the_code_of_a_run_is_that_of_its_script_and_of_what_it_imports(tmp_path):
    texts = {
        "script.py": "# coding: latin-1\nimport a, util, torch\nimport p.q.r\nfrom lib import losses\nx = '\u00f6'\n",
        "a.py": "\ufeffimport lib.nets.blocks as blocks\n",
        "lib/__init__.py": "",
        "lib/losses.py": "from . import shared\nfrom .nets import heads\n",
        "lib/shared.py": "from ..outside import x\n",
        "lib/nets/__init__.py": "",
        "lib/nets/blocks.py": "from ..shared import a\n",
        "lib/nets/heads.py": "import broken\n",
        "p/__init__.py": "",
        "p/q/__init__.py": "",
        "p/q/r.py": "import binary\n",
        "broken.py": "def",
        "outside.py": "x = 1\n",
    }
    for name, text in {"unused.py": "", "util.py": "", **texts}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="latin-1" if name == "script.py" else "utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "binary.py").write_bytes(b"\xff")
    link = tmp_path / "elsewhere" / "link.py"
    link.symlink_to(tmp_path / "script.py")
    expected = {name: text.removeprefix("\ufeff") for name, text in texts.items()}
    for script in (tmp_path / "script.py", link):
        code = files.read_code(script)
        assert code == expected and next(iter(code)) == "script.py"


def test_files_without_a_checkpoint_to_continue_are_not_overwritten_either(folder, capsys):
    for name, flags in (("last_train.pt", "--resume"), ("best_train.pt", "")):
        (folder / name).unlink()
        before = contents(folder)
        assert run(folder, f"--epochs 2 {flags}") == 2
        error = capsys.readouterr().err
        assert "is from an earlier run" in error and "--overwrite" in error and "--resume" not in error
        assert contents(folder) == before


def test_overwrite_replaces_all_that_the_first_run_has_left(folder):
    others = [folder / "plots" / "train_4_a_curves.png", folder / "results" / "train_seed_sweep_seed0.csv"]
    for other in others:
        other.write_bytes(b"of another experiment")
    assert run(folder, "--epochs 1 --seed 1 --overwrite") == 0
    assert {path.name for path in folder.glob("results/train_seed[0-9]*")} == {"train_seed1.json", "train_seed1.csv"}
    states = [torch.load(folder / f"{kind}_train.pt", weights_only=True) for kind in ("best", "last")]
    assert [state["seed"] for state in states] == [1, 1] and all(other.exists() for other in others)


def test_overwrite_deletes_nothing_if_the_new_run_cannot_start(folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(train.torch.nn, "CrossEntropyLoss", lambda *args, **options: None)
    assert run(folder, "--epochs 1 --overwrite") == 2
    assert contents(folder) == before


def test_overwrite_and_resume_exclude_each_other(folder, capsys):
    assert run(folder, "--resume --overwrite") == 2
    assert "not allowed with" in capsys.readouterr().err


def test_a_run_killed_in_its_first_epoch_is_resumed_from_the_start(folder):
    """It may have written its best model, but not last_train.pt."""
    expected = checkpoint.load(folder / "best_train.pt").state_dict()
    for path in (*folder.glob("results/*"), *folder.glob("plots/*"), folder / "last_train.pt"):
        path.unlink()
    assert run(folder, "--epochs 2 --resume") == 0
    torch.testing.assert_close(checkpoint.load(folder / "best_train.pt").state_dict(), expected, rtol=0, atol=0)


HOLDER = """
import pathlib, sys, time
from seg import files
with files.RunFiles(pathlib.Path(sys.argv[1]), "train", 0).locked():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_two_runs_at_the_same_time_do_not_share_a_folder(tiny, capsys):
    folder = tiny.parent
    line = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        assert run(folder, "--epochs 1 --seed 1") == 2
        error = capsys.readouterr().err
        assert error == "error: .: another run of train is writing to this folder: wait, or choose another --out\n"
        assert run(folder, "--epochs 1 --seed 1 --out other") == 0
        other.kill()
    assert run(folder, "--epochs 1 --seed 1") == 0  # a killed process holds nothing
