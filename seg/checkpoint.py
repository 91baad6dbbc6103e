"""Checkpoints, which hold tensors and plain types only: save, read, and rebuild a network."""

import importlib.util
import io
import pickle
import sys
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

from seg import distributed, files, provenance
from seg.files import ROOT
from util import UserError, reason


class TrainedModel(torch.nn.Module):
    """A network from a checkpoint, with what it takes to segment a photo.

    ``network`` is the network itself, which is called by calling the model, ``classes`` a tuple of names, and ``size``
    the (height, width) to which photos are resized; ``mean`` and ``std`` are as in ``imaging.normalise``. ``tiles`` is
    the [height, width] of the tiles that the network was trained on, or None.
    """

    def __init__(self, network, classes, size, mean, std, tiles=None):
        super().__init__()
        self.network, self.classes, self.size = network, classes, size
        self.mean, self.std, self.tiles = mean, std, tiles

    def forward(self, images):
        return self.network(images)


def plain(value):
    """A state with Python's numbers for NumPy's, such as those of a LambdaLR, which ``weights_only`` refuses."""
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def serialise(state):
    """A checkpoint's content as an io.BytesIO."""
    buffer = io.BytesIO()  # torch.save to a file does not raise OSError when the disk is full
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def save(path, state):
    """Write a checkpoint, so that ``path`` is complete at any moment; UserError if that fails."""
    files.write(path, serialise(state).getbuffer())


def read(path, key="model"):
    """The content of a checkpoint with the entry ``key``; UserError if the file is not one of this project."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript, which is refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: train a model first, or correct the path") from None
    except Exception as error:  # a damaged archive raises one of many types
        problem = reason(error)
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in problem:  # PyTorch advises to disable it
            problem = "it holds more than tensors and plain types, or is no PyTorch file"
        raise UserError(f"{path}: is not a readable checkpoint of this project ({problem}): pass a best_*.pt") from None
    if not isinstance(state, dict) or not {"module", "class", "arguments", "model", "classes", key} <= state.keys():
        raise UserError(f"{path}: was not written by this project: pass a best_*.pt")
    return state


def load(path, device="cpu"):
    """Load the model of a checkpoint, ready to predict: a TrainedModel in eval mode on ``device``.

    The class of its network is looked up by name among the project's top-level files, and the file is read with
    ``weights_only=True``: a stranger's checkpoint cannot run code. Prints a warning if the network's file has changed
    since the training. Raises a UserError if the file cannot be read or its network cannot be rebuilt.
    """
    state = read(path, "size")
    file = f"{state['module']}.py"
    try:
        model = build(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a missing or wrong entry raises one of many types
        advice = f'train again, or restore {file}, which the checkpoint holds under "code"'
        raise UserError(f"{path}: does not fit {state['class']} of {file} ({reason(error)}): {advice}") from None
    versions, now = provenance.versions(state.get("code")), provenance.read_text(ROOT / file)
    before = versions[-1]["files"].get(file) if versions else None
    if before is not None and (change := provenance.code_change({file: before}, {file: now})):
        print(f"warning: {path}: {change}: it may predict differently than in its training", file=sys.stderr)
    return model.eval().to(device, memory_format=distributed.memory_format(device))


def build(state):
    """Build a TrainedModel on the CPU from a checkpoint's content.

    Raises a UserError if the class of the network cannot be found, and one of many exceptions if its weights do not
    fit.
    """
    try:
        network = _network_class(str(state["module"]), str(state["class"]))(**state["arguments"])
    except OSError as error:  # such as those of urllib, requests and huggingface_hub
        advice = "the checkpoint has its weights: let its constructor load none (docs/EDITING.md, Pretrained weights)"
        raise UserError(f"its network {state['class']} could not load a file ({reason(error)}): {advice}") from None
    network.load_state_dict(state["model"])
    return TrainedModel(network, *(tuple(state[key]) for key in ("classes", "size", "mean", "std")), state.get("tiles"))


def _network_class(module, name):
    """The class ``name`` at the top level of the project's file ``<module>.py``."""
    path = ROOT / f"{module}.py"
    if path.name == f"{module}.py" and path.is_file():
        if module not in sys.modules:  # by its path, as a file's name may hold a dot
            spec = importlib.util.spec_from_file_location(module, path)
            sys.modules[module] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[module])
            except BaseException:
                del sys.modules[module]
                raise
        found = getattr(sys.modules[module], name, None)
        if isinstance(found, type) and issubclass(found, torch.nn.Module):
            return found
    raise UserError(f"its network {name} is not at the top level of {path.name} in {ROOT}: put it into a file there")


def download(weights):
    """Download one of torchvision's WeightsEnum unless it is there already; None does nothing.

    Raises a UserError that says what to do if it cannot be downloaded or read.
    """
    if weights is None:
        return
    try:
        weights.get_state_dict(check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        folder, name = Path(torch.hub.get_dir()) / "checkpoints", Path(urlsplit(weights.url).path).name
        raise UserError(
            f"{folder / name}: pretrained weights cannot be loaded ({reason(error)}): download {weights.url} into that "
            "folder, or into hub/checkpoints below $TORCH_HOME; --no-pretrained does without"
        ) from None
