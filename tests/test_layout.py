"""Which project file may import which, where each name is defined, and that an import has no side effects."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

import compare

MODELS = {"basic_fcn", "custom_fcn", "resnet_fcn", "unet"}
LEVELS = (  # a file imports only files of the levels above it in this list
    {"util", *MODELS},
    {"processes", "files"},
    {"cli"},
    {"voc"},
    {"checkpoint", "transforms", "plotting", "toy"},
    {"engine", "download"},
    {"predict", "compare", *compare.EXPERIMENTS},
)
FILES = sorted(set().union(*LEVELS))
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in FILES}
# Fails on every attempt to write or to connect once the libraries are loaded, which may fill caches of their own.
AUDIT = """
import os, sys

def hook(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    assert not writes and event not in ("os.mkdir", "socket.connect", "subprocess.Popen"), (event, args)
sys.addaudithook(hook)
"""


def imports(name):
    """The modules that a file imports, anywhere in it, and the names it takes from them by either form of import."""
    modules, names = {}, set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {(node.module, alias.name) for alias in node.names}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            names.add((modules[node.value.id], node.attr))
    return {*modules.values(), *(module for module, _ in names)}, names


@pytest.mark.parametrize("name", FILES)
def test_file_imports_only_files_of_lower_levels(name):
    modules = imports(name)[0]
    level = next(level for level, names in enumerate(LEVELS) if name in names)
    allowed = set().union(*LEVELS[:level]) - (set() if name in compare.EXPERIMENTS else MODELS)
    project = {path.stem for path in ROOT.glob("*.py")}
    assert modules & project <= allowed
    assert name not in MODELS or {module.partition(".")[0] for module in modules} <= {"torch", "torchvision"}


@pytest.mark.parametrize("name", FILES)
def test_name_is_taken_from_the_file_that_defines_it(name):
    for module, taken in imports(name)[1]:
        if module in FILES:
            body = TREES[module].body
            ...
