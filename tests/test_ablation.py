"""Ablations: each differs from its base in one line, trains, and records what ran."""

import difflib
import importlib
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_main, skip_drawing

import voc
from seg.run import Run

FOLDER = ROOT / "benchmarks" / "ablation"
# the base, and what stands in the line that differs in the base and in the variant
VARIANTS = {
    "without_skips": ("train_5_a", "CustomFCN(len(train.classes))", "(len(train.classes), skips=False)"),
    "without_shortcuts": ("train_5_a", "CustomFCN(len(train.classes))", "(len(train.classes), residual=False)"),
    "without_context": ("train_5_a", "CustomFCN(len(train.classes))", "(len(train.classes), context=False)"),
    "copies": ("train_4_b", "unchanged=1, augmented=2)", "Augmentation(unchanged=3, augmented=0)"),
    "constant_learning_rate": ("train_4_b", "CosineAnnealingLR(", "ConstantLR(optimizer, factor=1.0)"),
}
NETWORKS = {"train_4_b": "basic_fcn.py", "train_5_a": "custom_fcn.py"}


def test_the_variants_are_those_listed_here_and_each_has_a_name_of_its_own():
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == set(VARIANTS) and not names & {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_its_base_in_one_line(name):
    base, before, after = VARIANTS[name]
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / f"{base}.py", FOLDER / f"{name}.py")]
    (_, _, old), (_, docstring, new) = (text.split('"""') for text in texts)
    removed, added = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in "+-"]
    assert before in removed and after in added
    assert f"Differs from {base}.py only in " in docstring and f"python benchmarks/ablation/{name}.py\n" in docstring


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_records_its_own_text_and_that_of_its_network(tiny, tmp_path, monkeypatch, name):
    base, path = VARIANTS[name][0], FOLDER / f"{name}.py"
    flags = f"--data {tiny} --out {tmp_path} --device cpu --epochs 1 --limit 2 --batch-size 2"
    if name == "copies":  # one as a user types it
        command = [sys.executable, path.relative_to(ROOT), *flags.split()]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, check=True)
    else:
        skip_drawing(monkeypatch)
        loaders = voc.loaders
        monkeypatch.setattr(voc, "loaders", lambda args, size, **options: loaders(args, 64, **options))
        monkeypatch.syspath_prepend(FOLDER)
        assert run_main(ROOT, importlib.import_module(name), flags) == 0
    (metrics,) = (tmp_path / "results").glob(f"{name}_*.json")
    code = Run.read(metrics).metrics["code"][0]["files"]
    for file in (f"benchmarks/ablation/{name}.py", NETWORKS[base]):
        assert code[file] == (ROOT / file).read_text(encoding="utf-8")
