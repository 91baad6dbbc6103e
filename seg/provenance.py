"""What a run keeps about itself: its code, data, settings and versions."""

import ast
import contextlib
import hashlib
import importlib.metadata
import itertools
import platform
import subprocess
import sys
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from seg import distributed, voc_layout
from seg.files import ROOT
from util import UserError, criterion_weights


def metadata(args, name, parts, loaders):
    """The provenance of a run, and what ``checkpoint.load`` needs to rebuild its model: a dict of plain types."""
    model, criterion = parts["model"], parts["criterion"]
    if hasattr(model, "_orig_mod"):
        raise UserError(f"{args.script.name}: the network is compiled already: leave out torch.compile, pass --compile")
    arguments = getattr(model, "arguments", None)
    if not isinstance(arguments, dict):
        problem = f"the network {type(model).__name__} cannot be rebuilt from a checkpoint"
        advice = "keep the keyword arguments of its constructor in a dict, self.arguments (docs/EDITING.md, Network)"
        raise UserError(f"{args.script.name}: {problem}: {advice}")
    module, train = type(model).__module__, loaders[0]
    loss = getattr(criterion, "__name__", type(criterion).__name__)
    return {
        "experiment": name,
        "title": args.title,
        "dataset": train.split.dataset,
        "seed": args.seed,
        "device": distributed.device_name(args.device),
        "loss": loss + (", weighted by class" if criterion_weights(criterion) is not None else ""),
        "network": f"{type(model).__name__}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})",
        "parameters": num_parameters(model),
        **{f"{part}_class": type(parts[part]).__name__ for part in ("optimizer", "scheduler")},
        "flags": {flag: getattr(args, flag) for flag in ("limit", "compile", *args.defaults)}
        | {"batch_size": train.batch_size, "data": str(args.data), "out": str(args.out)},
        "defaults": args.defaults,
        "classes": list(train.classes),
        "size": list(loaders[1].size),  # of val, which is that of predictions
        "tiles": voc_layout.tile_size(train.split.root),
        "mean": list(train.mean),
        "std": list(train.std),
        "module": args.script.stem if module == "__main__" else module,
        "class": type(model).__name__,
        "arguments": arguments,
        "data_sha256": _data_sha256(loaders),
        "code": [{"epoch": 1, "files": read_code(args.script)}],
        "commit": _commit(args.script.resolve().parent),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}
        | {package: importlib.metadata.version(package) for package in ("torchvision", "numpy", "pillow")},
    }


def num_parameters(model):
    """The number of parameters, without those of averages of the weights."""
    averages = [module for module in model.modules() if isinstance(module, AveragedModel)]
    copies = {id(parameter) for average in averages for parameter in average.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in copies)


def _data_sha256(loaders):
    """A hash of the ids and masks of all splits. Not of the photos, whose pixels differ between versions of Pillow."""
    sha256 = hashlib.sha256()
    for loader in loaders:
        sha256.update(repr(loader.split.ids).encode())
        for mask in loader.masks:
            sha256.update(mask.cpu().contiguous().numpy())
    return sha256.hexdigest()


def _commit(folder):
    """The git commit of a folder, with "-dirty" if files have changed since; None if there is none."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):  # git is not installed
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def read_code(script):
    """The text of a script and of all modules that it has imported from its folder or the project's, but ``seg``.

    A dict from the file's path, below the project's folder or else the script's; the script comes first.
    """
    folders, paths = (ROOT, script.resolve().parent), [script.resolve()]
    names = {path.stem for folder in folders for path in folder.iterdir()} - {"seg"}
    for name, module in sorted(sys.modules.copy().items()):
        top = name.partition(".")[0]
        if top in names:  # of some thousand modules: resolving all their paths would take a moment
            path = Path(getattr(module, "__file__", None) or "").resolve()
            if any(folder / f"{top}.py" == path or folder / top in path.parents for folder in folders):
                paths.append(path)
    below = [path.relative_to(folders[0] if path.is_relative_to(folders[0]) else folders[1]) for path in paths]
    return {name.as_posix(): read_text(path) for name, path in zip(below, paths)}


def versions(code):
    """What a checkpoint or JSON holds as ``code``: a list of dicts; an earlier version of the project kept one text."""
    return [{"epoch": 1, "files": code}] if isinstance(code, dict) else code or []


def read_text(path):
    """The text of a file; "" if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def code_change(before, now):
    """The first difference between two results of ``read_code``, as text; None if there is none.

    The docstring of a file does not count: it holds results.
    """
    for name in {**before, **now}:
        old, new = (_below_docstring(texts.get(name, "")) for texts in (before, now))
        for first, second in itertools.zip_longest(old, new):
            if first != second:
                return f"{name} has changed ({(first if second is None else second).strip()!r})"
    return None


def _below_docstring(text):
    """The lines of a file below its docstring, without empty ones; all of them if it has a syntax error."""
    start = 0
    with contextlib.suppress(SyntaxError):
        tree = ast.parse(text)
        start = 0 if ast.get_docstring(tree) is None else tree.body[0].end_lineno
    return [line for line in text.split("\n")[start:] if line.strip()]
