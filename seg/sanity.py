"""A check before the first epoch, which trains nothing. Modes and random numbers are set anew in every epoch."""

import contextlib
import copy
import sys

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from seg import checkpoint, distributed, report
from seg.inference import forward
from util import VOID, UserError, is_out_of_memory, reason

NUM_IMAGES = 2  # of a batch that are used
NUM_PROBES = 16  # images on which the borders of an augmentation are looked at
TOLERANCE = 1e-3  # of rebuilt logits, relative to how much they vary: only the order of sums may differ


def check(metadata, train, val, *, model, criterion, optimizer, scheduler, scheduler_interval):
    """Try augmentation, network, criterion and checkpoint on some images of train and val, without gradients.

    ``metadata`` is that of the run, the others are as for ``engine.fit``. Returns a list of warnings; raises a
    UserError for what cannot work at all, and whatever a user's own code raises.
    """
    warnings = _parameter_warnings(model, criterion, optimizer)
    if scheduler is not None and not hasattr(scheduler, "state_dict"):
        warnings.append(f"{type(scheduler).__name__} has no state_dict: after --resume, it starts anew")
    steps = metadata["flags"]["epochs"] * (len(train) if scheduler_interval == "batch" else 1)
    length = getattr(scheduler, "total_steps", getattr(scheduler, "T_max", steps))
    if length != steps:
        warnings.append(f"the scheduler is for {length} steps, but takes {steps}: interval {scheduler_interval}")
    for name in ("pretrained", "weights", "weights_backbone", "encoder_weights"):
        if model.arguments.get(name):
            advice = "see Pretrained weights in docs/EDITING.md"
            warnings.append(f"self.arguments asks for {name}: a download whenever a checkpoint is loaded: {advice}")
    with torch.no_grad():
        with doing("trying the augmentation"):
            warnings += _border_warnings(train)
            images, masks = (part[:NUM_IMAGES] for part in next(train.batches())[:2])
        if invalid := set(masks.unique().tolist()) - {*range(len(train.classes)), VOID}:
            raise UserError(f"augment gives masks the label {min(invalid)}, which is no class: resize to the nearest")
        with doing("trying the network"):
            _check_logits(forward(model.eval(), images)["out"], images, train.classes)
            images, masks = val_batch(val)
            logits = forward(model, images)["out"]
            _check_logits(logits, images, val.classes)
        with doing(f"trying the criterion, with {VOID} for void"):
            warnings += _check_criterion(copy.deepcopy(criterion), logits.contiguous(), masks)
        check_round_trip(metadata | {"model": model.state_dict()}, model, images)
    return warnings


def val_batch(val):
    """The first images of val, normalised, float32 [B, 3, H, W], and their masks, int64 [B, H, W].

    A quarter of the first mask is void, its last row class 0.
    """
    images, masks = val.take(torch.arange(min(NUM_IMAGES, len(val.split))))
    images, masks = val.normalise(images), masks.long()
    masks[0, : masks.shape[1] // 4], masks[0, -1] = VOID, 0
    return images, masks


@contextlib.contextmanager
def doing(what):
    """Before the traceback of an error in a user's own code, print what the run was doing."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"--compile: {reason(error)}: install what is missing, or leave out --compile") from None
        if "find_unused_parameters" in str(error):  # DistributedDataParallel's error
            advice = "freeze those that no step uses, or pass find_unused_parameters=True to engine.fit"
            raise UserError(f"several processes: a step has left out parameters: {advice}") from None
        if not (is_out_of_memory(error) or distributed.is_connection_lost(error)):
            print(f"error while {what}:", file=sys.stderr)
        raise


def check_round_trip(state, model, images):
    """Check that a model can be rebuilt from its checkpoint, and then computes the same logits in eval mode.

    ``state`` is the content of a best checkpoint, ``images`` as from ``val_batch``. Raises a UserError for a fault.
    """
    problem, found = f"the network {state['class']} cannot be rebuilt from its checkpoint", state["arguments"]
    try:
        state = torch.load(checkpoint.serialise(state), "cpu", weights_only=True)
    except Exception:  # pickle raises one of many types
        advice = "self.arguments has to hold numbers, strings, lists and dicts only"
        raise UserError(f"{problem}: {advice}; it is {found}") from None
    try:
        rebuilt = checkpoint.build(state).network
    except UserError as error:
        raise UserError(f"{problem}: {error}") from None
    except Exception as error:
        advice = "self.arguments has to hold the keyword arguments of its constructor"
        raise UserError(f"{problem} ({reason(error)}): {advice}; it is {found}") from None
    rebuilt.to(images.device, memory_format=distributed.memory_format(images.device))
    logits = []
    with torch.no_grad():
        for network in (model, rebuilt):
            torch.manual_seed(0)  # some networks draw random numbers in eval mode, too
            logits.append(forward(network.eval(), images, full_precision=True)["out"])
    first, second = logits
    # the logits of a new network hardly vary: the tolerance is a part of that
    variation = (first - first.mean((2, 3), keepdim=True)).abs().max().nan_to_num()
    if not torch.allclose(first, second, rtol=0, atol=TOLERANCE * variation.item(), equal_nan=True):
        advice = "What its constructor depends on has to be in self.arguments, and what changes in training or is "
        advice += "drawn at random in a parameter or buffer (layers in an nn.ModuleList)"
        raise UserError(f"{problem}: rebuilt, it computes other logits. {advice}; self.arguments is {found}")


def check_first_step(training_step, model, optimizer, epoch):
    """The training step, which checks in the first one, of ``epoch``, what it returns and what gets a gradient.

    A parameter without one is a warning.
    """

    def step(*args, **position):
        result = training_step(*args, **position)
        if (position["epoch"], position["index"]) != (epoch, 0):
            return result
        dimensions = [getattr(value, "ndim", None) for value in result] if isinstance(result, tuple) else []
        if dimensions not in ([0, 0, 0, 4], [0, 0, 0, 4, 3]):
            expected = "loss, weight and norm, three scalar tensors, and logits, a tensor [B, C, H, W]"
            raise UserError(f"training_step has to return {expected}, as engine.training_step does")
        optimized = {each for each in _optimized(optimizer) if each.requires_grad}
        trained = {name: each.grad for name, each in model.named_parameters() if each in optimized}
        unused = [name for name, gradient in trained.items() if gradient is None]
        if 0 < len(unused) < len(trained):  # if there are none at all, the step has set them to None
            report.log(f"warning: the first step gave no gradient to {_some(unused)}, which the optimizer holds")
        return result

    return step


def _parameter_warnings(model, criterion, optimizer):
    """Warnings about parameters that are not where they should be, and about frozen batch norm that would drift."""
    optimized, named = _optimized(optimizer), dict(model.named_parameters())
    if isinstance(criterion, torch.nn.Module):
        named |= {f"criterion.{name}": parameter for name, parameter in criterion.named_parameters()}
        if distributed.world_size() > 1 and any(parameter.requires_grad for parameter in criterion.parameters()):
            raise UserError("several processes train the parameters of the network only, not of the criterion: use one")
    warnings = []
    trainable = [name for name, each in named.items() if each.requires_grad]
    if left_out := [name for name in trainable if named[name] not in optimized]:
        count = f"{len(left_out)} of {len(trainable)}"
        warnings.append(f"{count} trainable parameters are not in the optimizer: {_some(left_out)}")
    averages = [module for module in model.modules() if isinstance(module, AveragedModel)]
    averaged = {layer for average in averages for layer in average.modules()}  # not what is trained
    layers = {name: layer for name, layer in model.train().named_modules() if isinstance(layer, _BatchNorm)}
    frozen = [name for name, layer in layers.items() if layer.affine and not layer.weight.requires_grad]
    updated = {layer for layer in layers.values() if layer.training and layer.track_running_stats} - averaged
    if drifting := [name for name in frozen if layers[name] in updated]:
        advice = "unless that is intended, use torchvision's FrozenBatchNorm2d or override train() in the network"
        warnings.append(f"frozen batch norm still updates its running statistics ({_some(drifting)}): {advice}")
    return warnings


def _border_warnings(train):
    """A warning, in a list, if the augmentation fills what lies outside a mask with a class."""
    if train.augment is None:
        return []
    images, masks = train.take(torch.arange(NUM_PROBES) % len(train.split))
    params = train.augment.draw(NUM_PROBES, torch.Generator().manual_seed(0))
    _, masks = train.augmented(images, torch.ones_like(masks), params)
    if filled := set(masks.unique().tolist()) - {1, VOID}:
        advice = f"fill={{tv_tensors.Image: 0, tv_tensors.Mask: {VOID}}}, or fill_mask={VOID} in albumentations"
        return [f"augment fills the borders of masks with the class {min(filled)}: fill them with void, {advice}"]
    return []


def _check_logits(logits, images, classes):
    expected = (len(images), len(classes), *images.shape[2:])
    if logits.shape != expected:
        advice = f"it needs an output channel for each of the {len(classes)} classes of the data"
        raise UserError(f"the network's logits have shape {list(logits.shape)}, not {list(expected)}: {advice}")


def _check_criterion(criterion, logits, masks):
    """Check that a criterion returns a finite scalar; return a warning, in a list, if it depends on void pixels."""
    if isinstance(criterion, torch.nn.Module):
        criterion.eval()
    other_logits = logits.clone()
    other_logits[:, 0] += 10 * (masks == VOID)
    losses = [criterion(each, masks.clone()) for each in (logits.clone(), other_logits)]  # some write into them
    loss = losses[0]
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        found = f"tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise UserError(f"the criterion returns a {found}: it has to return the mean over the pixels, a scalar tensor")
    if not loss.isfinite():
        raise UserError(f"the loss of a batch of val is {loss.item()} before the training: check network and criterion")
    if not torch.isclose(*losses, rtol=1e-4):
        advice = "unless that is intended, leave out pixels where masks == util.VOID"
        return [f"the loss depends on void pixels: {advice}"]
    return []


def _optimized(optimizer):
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
