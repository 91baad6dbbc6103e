"""Best and last checkpoints, which hold tensors and plain types only: save, resume and load."""

import ast
import contextlib
import difflib
import importlib
import io
import pickle
import platform
import random
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

import files
import processes
from util import UserError, reason

ROOT = Path(__file__).resolve().parent  # where ``load`` looks for the files of networks
MAX_SIZE = 1 << 13  # largest side of a network's input in pixels that a checkpoint may ask for
PACKAGES = ("torch", "torchvision", "numpy", "pillow")
ADVICE = "resume with the same, or start again without --resume"


def metadata(args, model, loader):
    """The provenance of a run, and what ``load`` needs to rebuild its model: a dict of plain types."""
    module = type(model).__module__
    flags = {name: value if isinstance(value, (int, type(None))) else str(value) for name, value in vars(args).items()}
    return {
        "experiment": args.experiment,
        "script": args.script.read_text(encoding="utf-8"),
        "flags": flags,
        "seed": args.seed,
        "dataset": loader.split.dataset,
        "classes": list(loader.classes),
        "size": loader.size,
        "mean": list(loader.mean),
        "std": list(loader.std),
        "module": args.script.stem if module == "__main__" else module,
        "class": type(model).__name__,
        "arguments": model.arguments,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def save_best(path, metadata, model, epoch, scores):
    """Write ``best_*.pt``: the model of ``epoch`` with its mean IoU and confusion matrix on val."""
    results = {"epoch": epoch, "val_miou": scores.miou, "val_matrix": scores.matrix}
    _save(path, metadata | results | {"model": model.state_dict()})


def save_last(path, metadata, history, seconds, model, optimizer, scheduler):
    """Write ``last_*.pt``: everything that is needed for exact continuation."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state = {
        "epoch": len(history),
        "history": history,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "random": {
            "python": random.getstate(),
            "numpy": numpy_state,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    }
    _save(path, metadata | state)


def _save(path, state):
    if not processes.is_main():
        return
    buffer = io.BytesIO()  # torch.save to a file does not raise OSError when the disk is full
    torch.save(state, buffer)
    with files.atomic_write(path) as file:
        file.write(buffer.getbuffer())


def resume(run_files, metadata, model, optimizer, scheduler):
    """Restore the state that ``save_last`` wrote; return history (a list of dicts) and seconds (float) so far.

    Raises a UserError if the file is damaged or belongs to another run than ``metadata`` describes.
    """
    state = read(run_files.last, "history")
    try:
        _check_same_run(run_files, state, metadata, has_schedule=scheduler is not None)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
        random_state = state["random"]
        random.setstate(random_state["python"])
        np.random.set_state(random_state["numpy"])
        torch.set_rng_state(random_state["torch"])
        if torch.cuda.is_available() and len(random_state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(random_state["cuda"])
        return list(state["history"]), float(state["seconds"])
    except UserError:
        raise
    except Exception as error:  # a missing or wrong entry raises one of many types
        raise UserError(f"{run_files.last}: fits another model or optimizer ({reason(error)}): {ADVICE}") from None


def _check_same_run(run_files, state, metadata, has_schedule):
    """Raise a UserError that names the first thing in which a run differs from the one it is to continue."""
    before, now = ({**source["flags"], **source} for source in (state, metadata))
    names = ["seed", "batch_size", "limit", "dataset", "classes", "size"]
    for name in [*names, "epochs"] if has_schedule else names:
        if before[name] != now[name]:
            raise UserError(f"{run_files.last}: its run had {name} {before[name]}, not {now[name]}: {ADVICE}")
    changes = list(difflib.unified_diff(_code(before["script"]), _code(now["script"]), n=0, lineterm=""))
    if changes:
        first_change = changes[3]  # after the three lines of the diff's header
        raise UserError(f"{run_files.last}: the script has changed since ({first_change!r}): {ADVICE}")
    done, epochs = len(before["history"]), now["epochs"]
    if done > epochs:
        raise UserError(f"{run_files.last}: its run has {done} epochs, more than {epochs}: raise --epochs")
    if not run_files.best.exists():
        raise UserError(f"{run_files.best}: is missing, so the run cannot be continued: start without --resume")


def _code(script):
    """The lines of a script without comments and without its docstring."""
    tree = ast.parse(script)
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.unparse(tree).splitlines()


def read(path, key):
    """The content of a checkpoint with the entry ``key``; UserError if the file is not one of this project."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: train a model first, or correct the path") from None
    except Exception as error:  # a damaged archive raises one of many types
        raise UserError(f"{path}: is not a readable checkpoint ({reason(error)}): pass a best_*.pt") from None
    if not isinstance(state, dict) or not {"module", "class", "arguments", "model", "classes", key} <= state.keys():
        raise UserError(f"{path}: was not written by this project: pass a best_*.pt")
    return state


def load(path, device="cpu"):
    """Load the model of a checkpoint, ready to predict: in eval mode on ``device``, in channels_last.

    Its attributes ``classes`` (tuple of names), ``size`` (side in pixels of the square to which photos are resized),
    ``mean`` and ``std`` (of the normalisation) are set. Its class is looked up by name among the project's top-level
    files, and the file is read with ``weights_only=True``: a stranger's checkpoint cannot run code.

    Raises:
        UserError: the file is missing, unreadable or not of this project, or the model's file is missing.
    """
    state = read(path, "size")
    module, class_name = state["module"], state["class"]
    missing = UserError(f"{path}: its model {class_name} of {module}.py is not in {ROOT}: put the file there")
    if not str(module).isidentifier() or not (ROOT / f"{module}.py").is_file():
        raise missing
    model_class = getattr(importlib.import_module(module), str(class_name), None)
    if not (isinstance(model_class, type) and issubclass(model_class, torch.nn.Module)):
        raise missing
    try:
        with torch.device("meta"):  # the weights come from the file: nothing to initialise or allocate
            model = model_class(**state["arguments"])
        model.load_state_dict(state["model"], assign=True)
        model.classes, model.size = tuple(map(str, state["classes"])), state["size"]
        model.mean, model.std = (tuple(map(float, state[name])) for name in ("mean", "std"))
        if len(model.classes) != state["arguments"]["num_classes"] or not len(model.mean) == len(model.std) == 3:
            raise ValueError("classes, mean or std do not fit the network")
        if not 0 < model.size <= MAX_SIZE:
            raise ValueError(f"its size is {model.size}")
    except Exception as error:  # a missing or wrong entry raises one of many types
        raise UserError(
            f"{path}: does not fit the {class_name} in {module}.py ({reason(error)}): has it changed?"
        ) from None
    return model.eval().to(device, memory_format=torch.channels_last)


@contextlib.contextmanager
def downloading(weights):
    """Turn a failure to download or read one of torchvision's WeightsEnum into a UserError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        folder, name = Path(torch.hub.get_dir()) / "checkpoints", Path(urlsplit(weights.url).path).name
        raise UserError(
            f"{folder / name}: pretrained weights cannot be loaded ({reason(error)}): download {weights.url} into that "
            "folder, or into hub/checkpoints below $TORCH_HOME; --no-pretrained does without"
        ) from None
