"""A run on disk: its folder, lock, metadata, history, results and checkpoints; written here and read here."""

import ast
import csv
import itertools
import json
import math

import numpy as np

from seg.checkpoint import ROOT
from util import UserError


class Run:
    """The files of a run below the output folder ``out``. A folder holds one run of an experiment.

    Attributes:
        name: the experiment, the stem of its files' names. seed: an int.
        best, last: the Paths of the checkpoints. csv: of the history, a row per epoch. json: of the metrics.
        report: of the HTML report in the folder ``plots``.
        history: list of dicts, one per epoch, see ``report.history_row``.
        metrics: the content of the JSON, a dict.
    """

    def __init__(self, out, name, seed):
        self.name, self.seed = name, seed
        self.plots, results = out / "plots", out / "results"
        self.best, self.last = out / f"best_{name}.pt", out / f"last_{name}.pt"
        self.csv, self.json = (results / f"{name}_seed{seed}{suffix}" for suffix in (".csv", ".json"))
        self.report = self.plots / f"{name}_report.html"

    @classmethod
    def read(cls, path):
        """The finished run whose metrics are in ``path``, a JSON file; UserError if it was not written by a run."""
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            run = cls(path.parents[1], metrics["experiment"], metrics["seed"])
            with open(run.csv, newline="", encoding="utf-8") as file:
                run.history = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            metrics["epochs"], metrics["defaults"], metrics["val"]["miou"], metrics["flags"]["limit"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: was not written by a run ({error!r}): delete it and run again") from None
        if isinstance(metrics.get("code"), dict):  # an earlier version kept the first text only
            metrics["code"] = [{"epoch": 1, "files": metrics["code"]}]
        metrics.setdefault("title", metrics.get("idea", ""))  # its name in an earlier version
        run.metrics = metrics
        return run

    def plot(self, name):
        return self.plots / f"{self.name}_{name}.png"

    @property
    def splits(self):
        """The splits with results; experiments are compared on the last."""
        return ("val",) if self.metrics["test"] is None else ("val", "test")

    @property
    def classes(self):
        return tuple(self.metrics["val"]["iou"])

    def score(self, split, name):
        """A metric of a split as a float, NaN if there is none."""
        value = (self.metrics[split] or {}).get(name)
        return math.nan if value is None else value

    def class_ious(self, split):
        """The IoU of each class on a split: float array [C], NaN for a class that does not occur."""
        return np.array(list(self.metrics[split]["iou"].values()), float)

    def code_change(self):
        """How the code of this run differs from that in the project's folder today, as text; None if it does not."""
        code = self.metrics.get("code", [])
        for version in code:
            now = {name: _text(ROOT / name) for name in version["files"]}
            if change := code_change(version["files"], now):
                return change
        return None


def _text(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def code_change(before, now):
    """The first difference between two dicts from a file's name to its text, as text; None if there is none.

    The docstring of a file does not count: it holds results.
    """
    for name in {**before, **now}:
        old, new = (_below_docstring(files.get(name, "")) for files in (before, now))
        for first, second in itertools.zip_longest(old, new):
            if first != second:
                line = second if second is not None else first
                return f"{name} has changed ({line.strip()!r})"
    return None


def _below_docstring(text):
    """The lines of a file below its docstring; all of them if it has a syntax error."""
    lines = text.splitlines()
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return lines
    return lines if ast.get_docstring(tree) is None else lines[tree.body[0].end_lineno :]
