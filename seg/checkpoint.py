"""Best and last checkpoints, which hold tensors and plain types only: save, resume and load."""

import ast
import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import io
import pickle
import platform
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import PIL
import torch

from seg import distributed, files, imaging
from util import UserError, reason

ROOT = Path(__file__).resolve().parent.parent  # where ``load`` looks for the files of networks
ADVICE = "resume with the original, or start again with --overwrite"
_loaded = {}  # by file name: the code of each network that ``load`` has imported, see ``files.read_code``


class TrainedModel(torch.nn.Module):
    """A network from a checkpoint, with what it takes to segment a photo.

    Attributes:
        network: the network itself; calling the model calls it.
        classes: tuple of class names. size: (height, width) to which photos are resized.
        mean, std: of the normalisation, tuples of three floats, see ``imaging.normalise``.
    """

    def __init__(self, network, classes, size, mean, std):
        super().__init__()
        self.network, self.classes, self.size = network, classes, size
        self.mean, self.std = mean, std

    def forward(self, images):
        outputs = self.network(images)
        num_logits = (outputs["out"] if isinstance(outputs, Mapping) else outputs).shape[1]
        if num_logits != len(self.classes):
            problem = f"the checkpoint names {len(self.classes)} classes, but its network predicts {num_logits}"
            raise UserError(f"{problem}: train it again")
        return outputs


def metadata(args, model, loaders):
    """The provenance of a run, and what ``load`` needs to rebuild its model: a dict of plain types.

    ``loaders`` are those of train, val and, if there is one, test.
    """
    arguments = getattr(model, "arguments", None)
    if not isinstance(arguments, dict):
        raise UserError(
            f"{args.script.name}: the network {type(model).__name__} cannot be rebuilt from a checkpoint: keep the "
            "keyword arguments of its constructor in a dict, self.arguments"
        )
    module, loader = type(model).__module__, loaders[1]
    flags = {name: getattr(args, name) for name in ("epochs", "batch_size", "limit", "compile")}
    return {
        "experiment": args.experiment,
        "code": args.code,
        "data_sha256": _data_sha256(loaders),
        "flags": flags | {name: str(getattr(args, name)) for name in ("data", "device", "out")},
        "defaults": args.defaults,
        "seed": args.seed,
        "dataset": loader.split.dataset,
        "classes": list(loader.classes),
        "size": list(loader.size),
        "mean": [float(value) for value in loader.mean],
        "std": [float(value) for value in loader.std],
        "module": args.script.stem if module == "__main__" else module,
        "class": type(model).__name__,
        "arguments": arguments,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": importlib.metadata.version("torchvision"),  # importing it takes seconds
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }


def _data_sha256(loaders):
    """A hash of the ids and masks of all splits. Not of the photos, whose pixels differ between versions of Pillow."""
    digest = hashlib.sha256()
    for loader in loaders:
        digest.update(repr(loader.split.ids).encode())
        for mask in loader.masks:
            digest.update(mask.cpu().contiguous().numpy())
    return digest.hexdigest()


def save_best(path, metadata, model, epoch, scores):
    """Write ``best_*.pt``: the model of ``epoch`` with its mean IoU and confusion matrix on val."""
    results = {"epoch": epoch, "val_miou": scores.miou, "val_matrix": scores.matrix}
    _save(path, metadata | results | {"model": model.state_dict()})


def save_last(path, metadata, history, **parts):
    """Write ``last_*.pt``: everything that is needed for exact continuation.

    ``parts`` are model, criterion, optimizer and scheduler, see ``training_state``.
    """
    _save(path, metadata | {"epoch": len(history), "history": history} | training_state(**parts))


def training_state(**parts):
    """The state of each part of a training; None for one that has no state."""
    return {name: _plain(part.state_dict()) if hasattr(part, "state_dict") else None for name, part in parts.items()}


def _plain(value):
    """A state with Python's numbers for NumPy's, such as those of a LambdaLR, which ``weights_only`` refuses."""
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def serialise(state):
    """A checkpoint's content as an io.BytesIO."""
    buffer = io.BytesIO()  # torch.save to a file does not raise OSError when the disk is full
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def _save(path, state):
    if distributed.is_main():
        with files.atomic_write(path) as file:
            file.write(serialise(state).getbuffer())


def resume(run_files, metadata, annealed, **parts):
    """Restore the state of the parts that ``save_last`` wrote; return the history, a list of dicts.

    With ``annealed``, the schedule depends on the number of epochs, which then has to be the same.

    Raises a UserError if the file is damaged or belongs to another run than ``metadata`` describes.
    """
    state = read(run_files.last, "history")
    try:
        _check_same_run(run_files, state, metadata, annealed)
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, state[name])
            elif hasattr(part, "load_state_dict"):
                part.load_state_dict(state[name])
        return list(state["history"])
    except UserError:
        raise
    except Exception as error:  # a missing or wrong entry raises one of many types
        raise UserError(f"{run_files.last}: does not fit the model or optimizer ({reason(error)}): {ADVICE}") from None


def load_optimizer(optimizer, state):
    """Load the state of an optimizer, but keep the dicts of its parameter groups, which a script may hold.

    An optimizer that wraps another one shares them with it, and the scheduler changes those of the outer one.
    """
    optimizers = [optimizer, *inner_optimizers(optimizer)]
    groups = [list(each.param_groups) for each in optimizers]
    optimizer.load_state_dict(state)
    for each, before in zip(optimizers, groups):
        for index, group in enumerate(before):
            group.update(each.param_groups[index])
            each.param_groups[index] = group


def inner_optimizers(optimizer):
    """The optimizers among an optimizer's attributes, such as one that it wraps."""
    return [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]


def unsaved(optimizer):
    """The tensors in the state of the optimizers within an optimizer that its own state lacks, a list."""
    state = optimizer.state_dict()
    saved = {id(tensor) for tensor in _tensors(state)}
    inner = [tensor for each in inner_optimizers(optimizer) for tensor in _tensors(each.state)]
    return [tensor for tensor in inner if id(tensor) not in saved]


def _tensors(value):
    """Yield the tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _check_same_run(run_files, state, metadata, annealed):
    """Raise a UserError that names the first thing in which a run differs from the one it is to continue."""
    before, now = ({**source["flags"], **source} for source in (state, metadata))
    if "code" not in before:
        problem = "was written by an earlier version, which kept less about a run"
        raise UserError(f"{run_files.last}: {problem}: finish with that version, or start again with --overwrite")
    names = ["seed", "batch_size", "limit", "dataset", "classes", "size"]
    for name in [*names, "epochs"] if annealed else names:
        if before[name] != now[name]:
            raise UserError(f"{run_files.last}: its run had {name} {before[name]}, not {now[name]}: {ADVICE}")
    if before["data_sha256"] != now["data_sha256"]:
        raise UserError(f"{run_files.last}: its run had other image ids or masks, on train, val or test: {ADVICE}")
    if change := code_change(before["code"], now["code"]):
        raise UserError(f"{run_files.last}: {change}: {ADVICE}")
    done, epochs = len(before["history"]), now["epochs"]
    if done > epochs:
        raise UserError(f"{run_files.last}: its run has {done} epochs, more than {epochs}: raise --epochs")
    if not run_files.best.exists():
        raise UserError(f"{run_files.best}: is missing, so the run cannot be continued: start again with --overwrite")


def check_new_run(run_files, resume):
    """Raise a UserError if the files of an earlier run are in the way; ``resume``: whether ``--resume`` was given."""
    existing = run_files.existing()
    killed_in_first_epoch = existing == [run_files.best]  # before it wrote last_*.pt
    if not existing or (resume and killed_in_first_epoch):
        return
    run = ""
    with contextlib.suppress(UserError, KeyError):
        state = read(run_files.best, "epoch")
        run = f" (seed {state['seed']} on {state['dataset']}, best epoch {state['epoch']})"
    advice = "continue it with --resume, " if run_files.last.exists() else ""
    advice += "replace it with --overwrite, or choose another --out"
    raise UserError(f"{existing[0]}: is from an earlier run{run}: {advice}")


def code_change(before, now, without=None):
    """The first difference between two results of ``files.read_code``, as text; None if there is none.

    Comments and a module's docstring do not count, nor does the function called ``without``.
    """
    for name in {**before, **now}:
        old, new = (_lines(code.get(name, ""), without) for code in (before, now))
        changes = list(difflib.unified_diff(old, new, n=0, lineterm=""))
        if changes:
            return f"{name} has changed since ({changes[3]!r})"  # after the three lines of the diff's header
    return None


def _lines(text, without):
    """The lines of a file for ``code_change``; as they are if the file has a syntax error."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return text.splitlines()
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    tree.body = [node for node in tree.body if without is None or getattr(node, "name", None) != without]
    return ast.unparse(tree).splitlines()


def read(path, key):
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
    ``weights_only=True``: a stranger's checkpoint cannot run code.

    Prints a warning if the network's code was edited since the training.

    Raises:
        UserError: the file is missing, unreadable or not of this project, or the network's file is missing.
    """
    state = read(path, "size")
    module, name = state["module"], state["class"]
    try:
        model = build(state)
        if change := _network_change(state):
            print(f"warning: {path}: {change}: it may predict differently than in its training", file=sys.stderr)
    except MissingNetworkError:
        raise UserError(f"{path}: its network {name} of {module}.py is not in {ROOT}: put the file there") from None
    except Exception as error:  # a missing or wrong entry raises one of many types
        raise UserError(f"{path}: does not fit the {name} in {module}.py ({reason(error)}): has it changed?") from None
    distributed.set_memory_format(model, device)
    return model.eval().to(device)


def _network_change(state):
    """How the network's code, as ``build`` has imported it, differs from that of the training; None if it does not.

    Of a network that stands in its script, what the script imports does not count, nor the function ``main``.
    """
    file = f"{state['module']}.py"
    before = state.get("code", {})  # an earlier version of this repository kept none
    if file not in _loaded or file not in before:  # a script has imported the network itself
        return None
    names = [file] if file == next(iter(before)) else [name for name in _loaded[file] if name in before]
    before, now = ({name: code[name] for name in names} for code in (before, _loaded[file]))
    return code_change(before, now, without="main")


class MissingNetworkError(Exception):
    """The class of a network is not at the top level of one of the project's top-level files."""


def build(state):
    """Build a TrainedModel on the CPU from a checkpoint's content.

    Raises a MissingNetworkError if the class cannot be found, and one of many exceptions if its weights do not fit.
    """
    network = _network_class(str(state["module"]), str(state["class"]))(**state["arguments"])
    network.load_state_dict(state["model"])
    classes = tuple(map(str, state["classes"]))
    mean, std = (tuple(map(float, state[name])) for name in ("mean", "std"))
    if not len(mean) == len(std) == 3:
        raise ValueError("mean and std do not have three values")
    return TrainedModel(network, classes, imaging.height_width(state["size"]), mean, std)


def _network_class(module, name):
    path = ROOT / f"{module}.py"
    if path.name != f"{module}.py" or not path.is_file():
        raise MissingNetworkError
    if module not in sys.modules:  # by its path, as a file's name may hold a dot
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        try:
            _loaded[path.name] = files.read_code(path)
            spec.loader.exec_module(sys.modules[module])
        except BaseException:
            del sys.modules[module]
            raise
    found = getattr(sys.modules[module], name, None)
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise MissingNetworkError
    return found


def check_rebuilding(model, images, forward, metadata):
    """Check on some images that a model can be rebuilt from its checkpoint, and then computes the same in eval mode.

    ``forward`` is ``engine.forward``. Writes into parameters that are zero. Returns a list of warnings; raises a
    UserError for the first fault.
    """
    problem = f"the network {metadata['class']} cannot be rebuilt from its checkpoint"
    found = f"; it is {metadata['arguments']}"
    for parameter in model.parameters():
        # a layer that starts with zeros would hide those before it
        if parameter.is_floating_point() and parameter.layout == torch.strided and not parameter.any():
            parameter.uniform_(0.005, 0.02)
    try:
        state = torch.load(serialise(metadata | {"model": model.state_dict()}), "cpu", weights_only=True)
    except Exception:  # pickle raises one of many types
        advice = "self.arguments has to hold numbers, strings, lists and dicts only"
        raise UserError(f"{problem}: {advice}{found}") from None
    try:
        rebuilt = build(state).network
    except UserError as error:
        raise UserError(f"{problem}: {error}") from None
    except MissingNetworkError:
        raise UserError(f"{problem}: define the class at the top level of a file in {ROOT}") from None
    except Exception as error:
        advice = "self.arguments has to hold the keyword arguments of its constructor"
        raise UserError(f"{problem} ({reason(error)}): {advice}{found}") from None
    before, after = state["model"], model.eval().state_dict()
    changed = {name for name in before.keys() & after.keys() if not _equal(before[name], after[name])}
    changed |= before.keys() ^ after.keys()
    if changed:
        advice = "keep the weights of each mode in a module of its own, as resnet_unet.AveragedResNetUNet does"
        raise UserError(f"the network {metadata['class']} changes {min(changed)} in eval mode: {advice}")
    distributed.set_memory_format(rebuilt.to(images.device), images.device)
    first, other = (forward(network.eval(), images, full_precision=True)["out"] for network in (model, rebuilt))
    rng_state = _rng_state(images.device)
    second = forward(model, images, full_precision=True)["out"]
    is_random = not torch.equal(rng_state, _rng_state(images.device))
    # The logits of a new network hardly vary: the tolerance is a part of that. A GPU may round to the digits of TF32.
    scale = (first - first.mean((2, 3), keepdim=True)).abs().max().nan_to_num()
    tolerance = {"rtol": 0.0, "atol": (1e-2 if images.is_cuda else 1e-4) * scale.item(), "equal_nan": True}
    is_rebuilt = torch.allclose(first, other, **tolerance)
    if not torch.allclose(first, second, **tolerance) or (is_random and not is_rebuilt):
        advice = "dropout needs training=self.training"
        raise UserError(f"the network {metadata['class']} computes other logits each time in eval mode: {advice}")
    if not is_rebuilt:
        advice = "What its constructor depends on has to be in self.arguments"
        advice += ", and what changes in training or is drawn at random in a parameter or buffer"
        raise UserError(f"{problem}: rebuilt, it computes other logits. {advice}{found}")
    if is_random:
        advice = "if its logits depend on them, draw them only if self.training"
        return [f"the network {metadata['class']} draws random numbers in eval mode: {advice}"]
    return []


def _equal(first, second):
    """Whether two tensors are equal, NaN included; what cannot be compared, such as sparse tensors, counts as equal."""
    with contextlib.suppress(AttributeError, RuntimeError):
        return torch.equal(first.cpu().nan_to_num(), second.cpu().nan_to_num())
    return True


def _rng_state(device):
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


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
