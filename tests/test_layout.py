"""Which project file may import which (lowest level first), where names are defined, and what an import does."""

import ast
import subprocess
import symtable
import sys

import pytest
from conftest import ROOT

import compare

MODELS = "basic_fcn custom_fcn resnet_fcn resnet_unet unet"
LEVELS = f"""util {MODELS}
processes files
cli
imaging
dataset
voc
checkpoint transforms plotting html_report toy
preflight reporting
engine download
predict compare onnx_graph {" ".join(compare.EXPERIMENTS)}
export"""
LEVEL = {name: level for level, names in enumerate(LEVELS.splitlines()) for name in names.split()}
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in LEVEL}


def imports(name):
    """The modules that a file imports, anywhere in it, and (module, name) of what it takes from them."""
    nodes = list(ast.walk(ast.parse(SOURCES[name])))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names = {(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    names |= {(node.value.id, node.attr) for node in attributes if node.value.id in modules}
    return modules | {module for module, _ in names}, names


@pytest.mark.parametrize("name", LEVEL)
def test_file_imports_only_files_of_lower_levels(name):
    modules, lower = imports(name)[0], {other for other in LEVEL if LEVEL[other] < LEVEL[name]}
    assert modules & {path.stem for path in ROOT.glob("*.py")} <= lower
    assert name.startswith("train") or not modules & set(MODELS.split())
    assert name not in MODELS.split() or {module.split(".")[0] for module in modules} <= {"torch", "torchvision"}


@pytest.mark.parametrize("name", LEVEL)
def test_name_is_taken_from_the_file_that_defines_it(name):
    for module, taken in imports(name)[1]:
        if module in LEVEL:
            symbol = symtable.symtable(SOURCES[module], module, "exec").lookup(taken)
            assert symbol.is_assigned() and not symbol.is_imported(), f"{module}.{taken}"


def test_import_prints_writes_and_downloads_nothing(tmp_path, monkeypatch):
    code = f"""import os, sys, matplotlib.figure, torchvision, tqdm  # first: libraries may fill caches of their own
def audit(event, args):
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    assert not writes and event not in ("os.mkdir", "socket.connect", "subprocess.Popen"), (event, args)
sys.addaudithook(audit)
import {", ".join(LEVEL)}"""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
