"""Which file may import which, that an import does nothing, and the limits on the length of files and functions."""

import ast
import graphlib
import subprocess
import sys

import pytest
from conftest import ROOT

NETWORKS = {"basic_fcn", "custom_fcn", "resnet_fcn", "resnet_unet", "unet"}
PATHS = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("*.py")}
EXPERIMENTS = {name for name in PATHS if name.startswith("train")}
PATHS |= {f"seg.{path.stem}": path for path in ROOT.glob("seg/*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}
ALL_PATHS = [path for pattern in ("*.py", "seg/*.py", "benchmarks/**/*.py") for path in ROOT.glob(pattern)]


def imports(name):
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"seg.{alias.name}" for alias in node.names} if node.module == "seg" else {node.module}
    return found


def test_imports_form_no_circle():
    graphlib.TopologicalSorter({name: imports(name) & PATHS.keys() for name in PATHS}).prepare()


@pytest.mark.parametrize("name", PATHS)
def test_file_imports_only_what_its_place_allows(name):
    machinery, own = {other for other in PATHS if other.startswith("seg.")} | {"util"}, imports(name) & PATHS.keys()
    if name in NETWORKS:
        assert {module.partition(".")[0] for module in imports(name)} <= {"torch", "torchvision"}
    elif name in machinery:
        assert own <= (set() if name == "util" else machinery)
    elif name in EXPERIMENTS:
        assert own <= machinery | NETWORKS | {"voc"}
    else:
        assert not own & (NETWORKS | EXPERIMENTS)


def test_import_prints_writes_and_downloads_nothing(tmp_path, monkeypatch):
    code = f"""import os, sys, matplotlib.figure, torchvision, tqdm  # first: libraries may fill caches of their own
def audit(event, args):
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    assert not writes and event not in ("os.mkdir", "socket.connect", "subprocess.Popen"), (event, args)
sys.addaudithook(audit)
import {", ".join(PATHS)}"""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_takes_seconds_to_import_is_imported_where_it_is_used():
    """torchvision imports PyTorch's compiler, which takes as long as PyTorch, as does every optimizer."""
    others = {"resnet_fcn", "resnet_unet", "train_5_b", "train_6", "compare", "seg.plotting", "seg.html"}
    code = f"import sys, {', '.join(PATHS.keys() - others)}; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not {"torchvision", "matplotlib", "jinja2", "onnx"} & {*modules}


@pytest.mark.parametrize("path", ALL_PATHS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    largest = 52 if path.stem == "train_6" else 48 if path.stem in EXPERIMENTS else 350
    assert text.count("\n") <= largest or path.name == "toy.py"
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 70] == []
    assert [line for line in text.splitlines() if len(line) > 120] == []
