"""Checks before the first epoch: a mistake in an edited script ends the run here, in one line that names the place."""

import contextlib
import copy
import traceback
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.optim import lr_scheduler

from seg import checkpoint, distributed, imaging
from util import VOID, UserError, is_out_of_memory, learning_rates, reason, seed_everything

# files in which a user's mistake may surface
SHARED = ("preflight", "engine", "voc", "imaging", "checkpoint", "processes", "util")
LENGTH_ARGUMENTS = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps", "PolynomialLR": "total_iters"}
NUM_IMAGES = 2  # of the batch on which everything is tried
NUM_PROBES = 64  # images on which the augmentation is tried
NUM_TRIES = 8  # steps in which a parameter may get its gradient


def check(args, metadata, train, forward, training_step, scheduler_interval, *, model, criterion, optimizer, scheduler):
    """Try augmentation, network, checkpoint, criterion and one training step on a few images; then undo the step.

    ``metadata`` is from ``checkpoint.metadata``, ``forward`` is ``engine.forward``; the others are as for
    ``engine.fit``. Returns a list of warnings; raises a UserError for the first fault.
    """
    script = args.script.name
    warnings = _check_scheduler(script, scheduler, optimizer, scheduler_interval, args.epochs, len(train))
    with _stage(script, "the augmentation"):
        warnings += _check_augmentation(train)
        images, masks, _ = next(train.batches())
        smallest = len(train.split) * train.repeats // len(train)  # of batches of 2, the last may have one image
        images, masks = images[: min(NUM_IMAGES, smallest)], masks[: min(NUM_IMAGES, smallest)]
        masks[0, 0, 0] = VOID
    network = f"the network {type(model).__name__}"
    with _restored_afterwards(model, criterion, optimizer):
        with _stage(script, network), torch.no_grad():
            logits = forward(model.eval(), images)["out"]
            _check_logits(logits, images, train.classes)
            val_images = images.new_zeros(1, 3, *metadata["size"])
            _check_logits(forward(model, val_images)["out"], val_images, train.classes)
        with _stage(script, "the criterion (masks hold util.VOID for void)"):
            warnings += _check_criterion(criterion, logits.contiguous(), masks)
        rates, numbers = learning_rates(optimizer), _numbers(criterion)
        with _stage(script, "the training step"), _frozen_batch_norm(model.train()) as following:
            used, wanted = set(), set(map(id, _optimized(optimizer)))
            for _ in range(NUM_TRIES if distributed.world_size() == 1 else 1):  # some leave out layers at random
                used |= _try_training_step(training_step, model, images, masks, criterion, optimizer)
                if wanted <= used:
                    break
        if following:
            advice = "unless that is intended, use torchvision's FrozenBatchNorm2d or override train() in the network"
            warnings.append(f"frozen batch norm still updates its running statistics ({_some(following)}): {advice}")
        if learning_rates(optimizer) != rates:
            advice = "unless that depends on index and count only, pass a scheduler to engine.fit"
            warnings.append(f"training_step changes the learning rate, and --resume may not restore it: {advice}")
        if changed := [name for attributes, name, value in numbers if repr(attributes.get(name)) != repr(value)]:
            advice = "if the loss depends on it, register it as a buffer"
            warnings.append(f"the criterion changes its {_some(changed)}, which --resume does not restore: {advice}")
        with _stage(script, network), torch.no_grad():  # after the step, which may change more than the parameters
            warnings += checkpoint.check_rebuilding(model, images, forward, metadata)
        with _stage(script, "saving the state of criterion, optimizer and scheduler"):
            state = checkpoint.training_state(criterion=criterion, optimizer=optimizer, scheduler=scheduler)
            torch.load(checkpoint.serialise(state), "cpu", weights_only=True)
            if checkpoint.unsaved(optimizer):
                advice = "return it from state_dict, and take it back in load_state_dict"
                warnings.append(f"the state of the optimizer within the optimizer is in no checkpoint: {advice}")
        with _stage(script, "the optimizer"):
            return warnings + _check_parameters(model, criterion, optimizer, used)


def check_types(args, train, val, test, parts):
    """Check what ``fit`` gets before anything uses it: the loaders, and types and modes of the others."""
    script = args.script.name
    others = [loader for loader in (val, test) if loader is not None]
    if not train.training or any(loader.training for loader in others):
        raise UserError(f"{script}: engine.fit takes the loaders train, val and test in this order")
    _check_loaders(args, train, others)
    for name, part in parts.items():
        if isinstance(part, type):
            raise UserError(f"{script}: {name} is the class {part.__name__}, not an instance of it: call it")
    if hasattr(parts["model"], "_orig_mod"):
        raise UserError(f"{script}: the network is compiled already: leave out torch.compile and pass --compile")
    _check_modes(script, "network", parts["model"], torch.nn.Module)
    if getattr(parts["criterion"], "training", False):  # not left in eval mode by an earlier run
        _check_modes(script, "criterion", parts["criterion"], (_NormBase, _DropoutNd))  # other layers have no modes
    if any(map(is_lazy, parts["model"].parameters())):
        raise UserError(f"{script}: the network has lazy layers: call it on a batch before the optimizer is made")


def _check_loaders(args, train, others):
    """Check that flags, final scores and predict.py use what the loaders use."""
    script = args.script.name
    if train.batch_size != args.batch_size:
        advice = f"pass args.batch_size to voc.loaders, and set batch_size={train.batch_size} in cli.arguments"
        raise UserError(f"{script}: train has batches of {train.batch_size}, not of {args.batch_size}: {advice}")
    if len({loader.size for loader in others}) > 1:
        raise UserError(f"{script}: val and test differ in size: make both with the same size")
    if train.seed != args.seed:
        raise UserError(f"{script}: train has seed {train.seed}, not {args.seed}: pass seed=args.seed to its loader")
    for loader in (train, *others):
        name = loader.split.name
        if loader.device.type != args.device.type:
            raise UserError(f"{script}: {name} is on the device {loader.device}: pass device=args.device to its loader")
        if args.limit and len(set(loader.ids)) > args.limit:
            raise UserError(f"{script}: {name} is larger than --limit {args.limit}: pass limit=args.limit to voc.Split")
        if tuple(loader.split.ids) != loader.ids:
            raise UserError(f"{script}: the ids of {name} were changed after loading: change them before voc.Loader")
        if loader.classes != train.classes:
            raise UserError(f"{script}: train and {name} differ in classes or their order: use the same classes.txt")
        if (*loader.mean, *loader.std) != (*train.mean, *train.std):
            raise UserError(f"{script}: the loaders differ in mean or std: set them in each, before engine.fit")
        images = loader.images[:1]
        normalised = imaging.normalise(images, loader.device, loader.mean, loader.std)
        if not torch.equal(loader.normalise(images).to(loader.device), normalised):
            advice = "set its mean and std, or change the images in the network's forward"
            raise UserError(f"{script}: the loader has its own normalise, which predict.py would not use: {advice}")
    for loader in others:
        name = loader.split.name
        if loader.augment is not None:
            raise UserError(f"{script}: {name} is augmented: leave out augment for val and test")
        for method in ("photo", "resized"):
            if loader.split.replaces(method):
                advice = "change the images in the network's forward, or their files"
                raise UserError(f"{script}: {name} has its own {method}, which predict.py would not use: {advice}")
        if not torch.equal(loader.count(), loader.counts):
            problem = f"the masks of {name} were changed, but final scores are computed from their files"
            raise UserError(f"{script}: {problem}: change them in the method mask of a subclass of voc.Split")


def _check_modes(script, name, module, types):
    """Put a module into training mode; refuse one whose parts of these types have been put into eval mode before."""
    in_eval_mode = {part_name: part for part_name, part in module.named_modules() if not part.training}
    if module.train() is not module:
        raise UserError(f"{script}: train() of the {name} has to return self, as that of torch.nn.Module does")
    changed = [part_name for part_name, part in in_eval_mode.items() if part.training and isinstance(part, types)]
    if "" in changed:
        raise UserError(f"{script}: the {name} is in eval mode: call its train() before engine.fit")
    if changed:
        problem = f"{_some(changed)} of the {name} is in eval mode, which training would end"
        advice = f"override train() in the {name}, or use torchvision's FrozenBatchNorm2d"
        raise UserError(f"{script}: {problem}: {advice}")


@contextlib.contextmanager
def _stage(script, name):
    """Turn any error in the block into a UserError that names the script, the stage and the line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{script}: {error}") from None
    except Exception as error:  # whatever a user's own code raises
        if is_out_of_memory(error) or distributed.is_connection_lost(error):
            raise
        frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        frames = [(path, line) for path, line in frames if path.parent == checkpoint.ROOT and path.stem not in SHARED]
        place = f"{frames[-1][0].name}, line {frames[-1][1]}: " if frames else ""
        raise UserError(f"{script}: {name} fails ({place}{type(error).__name__}: {reason(error)})") from error


@contextlib.contextmanager
def _restored_afterwards(model, criterion, optimizer):
    """Restore parameters, buffers and the state of the optimizer after the block."""
    modules = [module for module in (model, criterion) if isinstance(module, torch.nn.Module)]
    parts = [part for module in modules for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    tables = [(table, dict(table)) for part in parts for table in (part._parameters, part._buffers)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    numbers = _numbers(criterion)
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    fresh = [inner for inner in checkpoint.inner_optimizers(optimizer) if not inner.state]
    yield
    for table, entries in tables:  # the forward pass may add or replace buffers
        table.clear()
        table.update(entries)
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)
            tensor.grad = None
    checkpoint.load_optimizer(optimizer, optimizer_state)
    for inner in fresh:
        inner.state.clear()
    for attributes, name, value in numbers:
        attributes[name] = value


def _numbers(criterion):
    """The attributes of a criterion and its modules that are numbers: a list of (dict of the attributes, name, number).

    Those that a checkpoint holds are left out.
    """
    if isinstance(criterion, torch.nn.Module):
        parts = [part for part in criterion.modules() if type(part).get_extra_state is torch.nn.Module.get_extra_state]
    else:
        parts = [] if hasattr(criterion, "state_dict") else [criterion]
    found = [(vars(part), *item) for part in parts if hasattr(part, "__dict__") for item in vars(part).items()]
    return [(attributes, name, value) for attributes, name, value in found if isinstance(value, int | float)]


def _check_scheduler(script, scheduler, optimizer, interval, epochs, num_batches):
    """Check what the scheduler belongs to, when it is stepped, and how long it is; return a list of warnings."""
    if interval not in ("epoch", "batch"):
        raise UserError(f'{script}: scheduler_interval={interval!r}: pass "epoch" or "batch"')
    if scheduler is None:
        return []
    name = type(scheduler).__name__
    if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        advice = "derive it from torch.optim.lr_scheduler.LRScheduler, or use LambdaLR"
        raise UserError(f"{script}: {name} has no state_dict and load_state_dict, and cannot resume: {advice}")
    groups = getattr(scheduler, "optimizer", optimizer).param_groups
    if [*map(id, groups)] != [*map(id, optimizer.param_groups)]:
        raise UserError(f"{script}: the {name} was made for another optimizer: make it with the one that fit gets")
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        if interval == "batch":
            raise UserError(f"{script}: {name} is stepped after each epoch: leave out scheduler_interval")
        return []
    steps = epochs * num_batches if interval == "batch" else epochs
    for part, part_steps in _final_schedulers(scheduler, steps):
        argument = LENGTH_ARGUMENTS.get(type(part).__name__)
        if argument and part_steps <= 0:
            problem = f"the last scheduler, a {type(part).__name__}, begins after step {steps - part_steps} of {steps}"
            advice = "begin it earlier, or raise --epochs"
            advice += ', or pass scheduler_interval="batch" to engine.fit' if interval == "epoch" else ""
            raise UserError(f"{script}: {problem}, once per {interval}: {advice}")
        length = getattr(part, argument) if argument else part_steps
        if length == part_steps or (argument == "T_max" and length == part_steps - 1 > 0):
            continue
        if interval == "epoch" and length == epochs * num_batches:
            advice = 'pass scheduler_interval="batch" to engine.fit'
        else:
            advice = "derive it from args.epochs" + (" and len(train)" if interval == "batch" else "")
        problem = f"{type(part).__name__} has {argument} {length}"
        raise UserError(f"{script}: {problem}, but is stepped {part_steps} times, once per {interval}: {advice}")
    lengths = [(type(part).__name__, *argument) for part in _all_schedulers(scheduler) for argument in _lengths(part)]
    advice = ': pass scheduler_interval="batch" to engine.fit if it counts batches' if interval == "epoch" else ""
    return [
        f"{name} has {argument} {length}, but is stepped {steps} times, once per {interval}{advice}"
        for name, argument, length in lengths
        if length > steps
    ]


def _all_schedulers(scheduler):
    """A scheduler and those within it."""
    return [scheduler, *(part for inner in getattr(scheduler, "_schedulers", ()) for part in _all_schedulers(inner))]


def _lengths(scheduler):
    """The attributes of a PyTorch scheduler that are numbers of steps, with their values, the smallest of several."""
    if not type(scheduler).__module__.startswith("torch.optim"):
        return
    for argument in ("total_iters", "step_size", "milestones", "_milestones", "T_0", "total_size"):
        if value := getattr(scheduler, argument, None):
            yield argument.strip("_"), value if isinstance(value, int | float) else min(value)


def _final_schedulers(scheduler, steps):
    """The schedulers within a scheduler that run to the end, each with the number of its steps."""
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        return _final_schedulers(scheduler._schedulers[-1], steps - scheduler._milestones[-1])
    if isinstance(scheduler, lr_scheduler.ChainedScheduler):
        return [part for inner in scheduler._schedulers for part in _final_schedulers(inner, steps)]
    return [(scheduler, steps)]


def _check_augmentation(train):
    """Check that an augmentation makes no new labels by filling with 0, scaling or interpolating masks.

    Returns a list of warnings: of labels that may be pasted, masks that are moved differently than images, and random
    numbers that are not seeded.
    """
    if train.augment is None:
        return []
    height, width = train.size
    images, masks = train.take(torch.arange(NUM_PROBES) % len(train.split))
    corner, rest = (3, 1) if len(train.classes) > 3 else (1, VOID)  # labels
    images, masks = torch.full_like(images, 50), torch.full_like(masks, rest)
    images[:, :, : height // 2, : width // 2], masks[:, : height // 2, : width // 2] = 200, corner
    params = train.augment.draw(NUM_PROBES, torch.Generator().manual_seed(0))
    before = images.clone(), masks.clone()  # some augmentations write into them
    seed = torch.randint(2**32, ()).item()  # not that of the run, with which a network may be built
    seed_everything(seed)
    images, masks = train.augmented(images, masks, params)
    new = set(masks.unique().tolist()) - {corner, rest, VOID}
    advice = "keep labels, and fill what lies outside the photo with void, such as "
    advice += f"fill={{tv_tensors.Image: 0, tv_tensors.Mask: {VOID}}}"
    if new and (new <= {0, 2} or max(new) >= len(train.classes)):  # filled or interpolated
        raise UserError(f"augment gives masks a new label, {min(new)}: {advice}")
    warnings = [f"augment gives masks new labels: unless it pastes from other images, {advice}"] if new else []
    seed_everything(seed)
    again = train.augmented(*before, params)
    if not (torch.equal(images, again[0]) and torch.equal(masks, again[1])):
        advice = "draw from Python's, NumPy's or PyTorch's global random numbers, or in draw from its generator"
        warnings.append(f"augment gives other results with the same seed: {advice}")
    bright, dark = (
        (images.float().mean(1) * (masks == label)).sum((1, 2)) / (masks == label).sum((1, 2))
        for label in (corner, rest)
    )
    if (bright < dark).sum() > NUM_PROBES / 8:  # more than by erasing parts; NaN where a label is not in sight
        advice = "unless it inverts colours, pass both to the transform in one call"
        warnings.append(f"augment seems to move masks differently than their images: {advice}")
    return warnings


def _check_logits(logits, images, classes):
    expected = (len(images), len(classes), *images.shape[2:])
    if logits.shape != expected:
        advice = f"it needs an output channel for each of the {len(classes)} classes of the data"
        raise UserError(f"the network's logits have shape {list(logits.shape)}, not {list(expected)}: {advice}")


def _check_criterion(criterion, logits, masks):
    """Check the criterion on a batch; return a warning, in a list, if it has a gradient at void pixels."""
    if getattr(criterion, "ignore_index", VOID) != VOID:
        raise UserError("the criterion has to ignore void: pass ignore_index=util.VOID")
    if getattr(criterion, "reduction", "mean") == "sum":
        raise UserError('the criterion returns a sum, which grows with the batch: leave out reduction="sum"')
    logits = logits.clone().requires_grad_()  # a tensor of inference mode cannot require gradients
    loss = criterion(logits.clone(), masks.clone())  # some criteria write into them
    if not isinstance(loss, torch.Tensor):
        raise UserError(f"the criterion returns a {type(loss).__name__}: it has to return a tensor with one value")
    if loss.ndim:
        raise UserError(f"the criterion returns a tensor of shape {list(loss.shape)}: take the mean over the pixels")
    (gradient,) = torch.autograd.grad(loss, logits, allow_unused=True) if loss.requires_grad else (None,)
    if gradient is not None and gradient.movedim(1, -1)[masks == VOID].any():
        advice = "unless that is intended, leave out those where masks == util.VOID"
        return [f"the criterion has a gradient at void pixels: {advice}"]
    return []


@contextlib.contextmanager
def _frozen_batch_norm(model):
    """Yield a list for the names of frozen batch norm layers whose statistics follow the batches in the block."""
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm) and layer.affine}
    following = []
    hooks = [
        layer.register_forward_hook(lambda layer, *_: following.append(layers[layer]) if layer.training else None)
        for layer in layers
        if layer.track_running_stats and not layer.weight.requires_grad
    ]
    try:
        yield following
    finally:
        for hook in hooks:
            hook.remove()


def _try_training_step(training_step, model, images, masks, criterion, optimizer):
    """Take a training step; return the ids of the parameters for which it computes a gradient."""
    used = set()
    parameters = [*_optimized(optimizer), *model.parameters()]
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: used.add(id(parameter)))
        for parameter in parameters
        if parameter.requires_grad
    ]
    try:
        result = training_step(model, images, masks, criterion, optimizer, index=0, count=1)
    finally:
        for hook in hooks:
            hook.remove()
    values = result if isinstance(result, tuple) else ()
    if len(values) != 4 or [value.ndim for value in values if isinstance(value, torch.Tensor)] != [0, 0, 0, 4]:
        expected = "loss, weight, norm and logits as engine.training_step does: three scalars and a tensor [B, C, H, W]"
        raise UserError(f"training_step has to return {expected}")
    if values[3].shape[2:] != masks.shape[1:]:
        raise UserError(f"training_step returns logits of shape {list(values[3].shape)} for masks {list(masks.shape)}")
    torch.stack([value.detach() for value in values[:3]])  # as train_epoch does
    # a step of the user's may set gradients itself, without the hooks
    return used | {id(parameter) for parameter in parameters if parameter.grad is not None}


def _optimized(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_parameters(model, criterion, optimizer, used):
    """Refuse parameters in the optimizer without a gradient; return a warning about others that are not in it."""
    parameters = dict(model.named_parameters())
    if isinstance(criterion, torch.nn.Module):
        others = [item for item in criterion.named_parameters() if all(item[1] is not p for p in model.parameters())]
        parameters |= {f"criterion.{name}": parameter for name, parameter in others}
    names = {id(parameter): name for name, parameter in parameters.items()}
    optimized = {id(parameter) for parameter in _optimized(optimizer)}
    if not optimized <= names.keys():
        problem = f"{len(optimized - names.keys())} parameters of neither the network nor the criterion"
        advice = "no checkpoint would save them: make it from model.parameters()"
        raise UserError(f"the optimizer holds {problem}: {advice}")
    in_criterion = [name for index, name in names.items() if index in optimized and name.startswith("criterion.")]
    if in_criterion and distributed.world_size() > 1:
        problem = "several processes train the parameters of the network only"
        raise UserError(f"{_some(in_criterion)}: {problem}: train in one process")
    unused = [name for index, name in names.items() if index in optimized - used]
    if unused:
        problem = f"{len(unused)} parameters that get no gradient ({_some(unused)})"
        advice = "leave them out, or let the loss depend on them (requires_grad_(True), a training_step of your own)"
        raise UserError(f"the optimizer holds {problem}: {advice}")
    trainable = {name: id(parameter) for name, parameter in parameters.items() if parameter.requires_grad}
    left_out = [name for name, index in trainable.items() if index not in optimized]
    without_gradient = [name for name in left_out if trainable[name] not in used]
    if without_gradient and distributed.world_size() > 1:
        advice = "freeze what is not used, requires_grad_(False)"
        raise UserError(f"several processes need a gradient for {_some(without_gradient)}: {advice}")
    problem = f"{len(left_out)} trainable parameters are not in the optimizer, and change only if training_step does it"
    return [f"{problem}: {_some(left_out)}"] if left_out else []


def _some(names):
    names = list(dict.fromkeys(names))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
