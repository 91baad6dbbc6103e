"""Evaluation and training, the same for all experiments."""

import functools
import math
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import CrossEntropyLoss, functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

import util
from seg import checkpoint, distributed, report, sanity
from seg.data import Loader
from seg.inference import check_loader, forward, predict_strips
from seg.run import Run
from util import VOID, Scores, UserError

_calls = []  # of ``fit``: args and the run's name


class Diverged(UserError):
    """A loss or gradient is not finite, and would be again after ``--resume``."""


def batch_loss(criterion, logits, masks):
    """Compute the criterion on a batch in float32; return it with the weight of the batch in a mean over batches.

    The weight is the number of labelled pixels, or for a cross-entropy with class weights the sum of their weights: 0
    for a batch without labelled pixels, whose loss is finite but means nothing.
    """
    class_weights = util.criterion_weights(criterion)
    if class_weights is None:
        weight, label = (masks != VOID).sum().float(), 0
    else:
        weight = functional.pad(class_weights, (0, VOID + 1 - len(class_weights)))[masks].sum()  # 0 for void
        label = class_weights.argmax()
    masks = masks.clone()
    masks[0, 0, 0] = torch.where(weight > 0, masks[0, 0, 0], label)  # a mean over no pixels would be NaN
    if type(criterion) is CrossEntropyLoss and logits.device.type == "cpu" and logits.shape[1] >= 16:
        # the same mean over a list of pixels: faster if the classes of one fill a vector register
        logits, masks = logits.float().movedim(1, -1).flatten(0, 2), masks.flatten()
    else:
        logits = logits.contiguous().float()  # faster with few classes; NLLLoss and losses that call view need it
    return criterion(logits, masks), weight


def _mean_loss(losses, device):
    """The mean over all processes of losses and weights [N, 2] from ``batch_loss``; NaN if all weights are 0."""
    losses, weights = losses.double().T
    total, weight = distributed.all_reduce(torch.stack(((losses * weights).sum(), weights.sum())), device).tolist()
    return total / weight if weight else math.nan


@torch.inference_mode()
def evaluate(model, loader, criterion, full_resolution=True):
    """Evaluate a model on all images of a voc.Loader; return Scores. Several processes share the batches.

    With ``full_resolution``, for reported metrics, logits are computed in float32 and upsampled to the size of each
    mask, and the assignment's IoU is computed too; without it, for validation during training, masks have the loader's
    size. Model and criterion are left in eval mode. Raises a UserError for a loader of training, or one that differs
    from a TrainedModel in classes or normalisation.
    """
    if loader.training:
        raise UserError("evaluate needs a loader without training=True, such as voc.Loader(split, size, batch_size=8)")
    check_loader(model, loader)
    model.eval()
    if isinstance(criterion, torch.nn.Module):
        criterion.eval()
    num_classes, device = len(loader.classes), loader.device
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    image_ious, assignment_ious = torch.zeros(2, len(loader.split), dtype=torch.float64)
    losses = [torch.zeros(2, device=device)]  # a process may have no batch
    min_count, rest = divmod(len(loader), distributed.world_size())
    with ThreadPoolExecutor() as pool:
        name = f"evaluating {loader.split.name}"
        count = min_count + (rest > 0)
        for images, masks, indices in report.progress(loader.batches(), count, name, min_count=min_count):
            logits = forward(model, images, full_precision=full_resolution)["out"]
            losses.append(torch.stack(batch_loss(criterion, logits, masks)))
            labels = logits.max(1).indices  # several times faster than argmax
            if not full_resolution:
                matrix += util.confusion_matrix(masks, labels, num_classes)
                continue
            assignment_ious[indices] = util.assignment_iou(masks.cpu(), labels.cpu(), num_classes)
            full_masks = pool.map(loader.split.mask, indices.tolist())
            # upsampling one image of a channels_last batch is far slower than of a contiguous one
            for index, image_logits, mask in zip(indices.tolist(), logits.contiguous(), full_masks):
                mask, before = torch.from_numpy(mask.astype("uint8", order="C", copy=False)).to(device), matrix.clone()
                for columns, prediction in predict_strips(image_logits, mask.shape):
                    matrix += util.confusion_matrix(mask[:, columns], prediction, num_classes)
                image_ious[index] = util.mean_iou((matrix - before).cpu())  # Apple GPUs lack float64
    loss = _mean_loss(torch.stack(losses).cpu(), device)
    matrix = distributed.all_reduce(matrix, device).cpu()
    if not full_resolution:
        return Scores(loss, matrix, loader.classes)
    image_ious, assignment_ious = distributed.all_reduce(torch.stack((image_ious, assignment_ious)), device).cpu()
    return Scores(loss, matrix, loader.classes, image_ious, assignment_ious.mean().item())


def backward(network, loss, weight):
    """Compute the gradients of a batch's loss and return their norm; loss and weight as from ``batch_loss``."""
    # DistributedDataParallel averages the gradients: scaled like this, the average is that of the whole batch
    scale = distributed.world_size() * weight / distributed.all_reduce(weight, loss.device).clamp(min=1e-12)
    (loss * scale).backward()
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])


def training_step(network, images, masks, criterion, optimizer, **position):
    """Take one optimizer step. A script may pass a function of its own with these parameters to ``fit``.

    ``network`` is the model, compiled or wrapped in DistributedDataParallel if so asked, ``images`` are float32
    [B, 3, H, W], ``masks`` int64 [B, H, W]. ``position`` holds the ``index`` of the batch in its epoch, from 0, the
    ``count`` of batches, the ``epoch``, from 1, and the number of ``epochs``. Returns loss and weight, see
    ``batch_loss``, and the gradient's norm, scalar tensors; and for the metrics on train the logits [B, C, H, W], and
    if the masks that belong to them are not those that were passed, a fifth value, int64 [B, H, W].
    """
    optimizer.zero_grad()
    network.zero_grad()  # also of what the optimizer does not hold: it would add up, and count in the norm
    logits = forward(network, images)["out"]
    loss, weight = batch_loss(criterion, logits, masks)
    norm = backward(network, loss, weight)
    optimizer.step()
    return loss, weight, norm, logits


def train_epoch(network, loader, epoch, criterion, optimizer, training_step=training_step, scheduler=None):
    """Take one step per batch, and one of the scheduler.

    Returns Scores of the batches as the network saw them, with the weights of that moment, whose confusion matrix is of
    every fourth row and column; and the learning rates, a list per batch with the rate of each parameter group. Raises
    a UserError if logits and masks of a batch differ in size, and Diverged if its loss or gradient is not finite; the
    weights are unusable then.
    """
    network.train()
    if isinstance(criterion, torch.nn.Module):
        criterion.train()
    num_classes, device = len(loader.classes), loader.device
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    results, batch_indices, learning_rates = [], [], []
    bar = report.progress(loader.batches(epoch), len(loader), f"epoch {epoch}", min_count=len(loader))
    for index, (images, masks, indices) in enumerate(bar):
        learning_rates.append([float(group["lr"]) for group in optimizer.param_groups])
        position = {"index": index, "count": len(loader), "epoch": epoch}
        values = training_step(network, images, masks, criterion, optimizer, **position)
        *result, logits, masks = values if len(values) == 5 else (*values, masks)
        if logits[:, 0].shape != masks.shape:
            problem = f"training_step returned logits {list(logits.shape)}, but the masks are {list(masks.shape)}"
            raise UserError(f"{problem}: return the masks that belong to the logits as a fifth value")
        results.append(torch.stack([value.detach() for value in result]))
        batch_indices.append(indices)
        labels = logits.detach()[:, :, ::4, ::4].max(1).indices  # a sample is enough for a curve, and takes little time
        matrix += util.confusion_matrix(masks[:, ::4, ::4], labels, num_classes)
        if scheduler is not None:
            scheduler.step()
        if index % 10 == 0:  # not after each batch: .item() synchronises with a GPU
            bar.set_postfix_str(f"loss {results[-1][0].item():.4f}", refresh=False)
    if len({len(rates) for rates in learning_rates}) > 1:
        raise UserError(f"a step of epoch {epoch} added parameter groups: add them before engine.fit, frozen at first")
    losses, weights, norms = torch.stack(results).T.cpu()  # only here: .cpu() synchronises with a GPU
    _check_finite(losses, norms, batch_indices, loader.split.ids, epoch)
    loss = _mean_loss(torch.stack((losses, weights), 1), device)
    return Scores(loss, distributed.all_reduce(matrix, device).cpu(), loader.classes), learning_rates


def _check_finite(losses, norms, batch_indices, ids, epoch):
    """Raise a UserError that names the first batch of an epoch with a loss or gradient norm that is not finite."""
    finite = losses.isfinite() & norms.isfinite()
    if finite.all():
        return
    batch = int(finite.int().argmin())
    name, value = ("gradient", norms[batch]) if losses[batch].isfinite() else ("loss", losses[batch])
    indices = batch_indices[batch].tolist()
    images = ", ".join(ids[index] for index in indices[:8]) + (", ..." if len(indices) > 8 else "")
    place = f"epoch {epoch}, batch {batch + 1} of {len(losses)} (images {images})"
    advice = f"lower the learning rate and start again if the loss grew from {losses[0]:.3g}, else check these images"
    raise Diverged(f"the {name} is {value} in {place}: {advice}")


def fit(
    args, model, train, val, test, *, criterion, optimizer, scheduler, patience=10,
    scheduler_interval="epoch", training_step=training_step, find_unused_parameters=False, after_epoch=None, name=None,
):  # fmt: skip
    """Train a model, save its best and last state, then evaluate the best on val and test, plot and print a summary.

    Writes the files of ``run.Run``. The best epoch has the highest mean IoU on val at the loader's size, and of several
    the lowest val loss. After Ctrl-C or an error, the checkpoints and curves of the epochs before are kept.

    Args:
        args: from ``cli.arguments``.
        model: see ``forward``; ``model.arguments`` holds the keyword arguments of its constructor.
        train, val, test: voc.Loaders; test may be None.
        criterion: maps logits, float32 [B, C, H, W], and masks, int64 [B, H, W], to a mean over the labelled pixels.
        scheduler: None, or stepped once per ``scheduler_interval``, "epoch" or "batch". ReduceLROnPlateau is stepped
            after each epoch, with the val loss, or in mode "max" with the mean IoU on val.
        patience: stop after so many ``epochs_without_progress``, None: never; without effect with a scheduler.
        training_step: takes the place of ``engine.training_step``.
        find_unused_parameters: as for DistributedDataParallel, for layers that are skipped at random.
        after_epoch: called in the main process with the row of each epoch, a dict from column to number, once its
            checkpoints are written; such as for a logger.
        name: of the run's files, by default the script's. A script that calls ``fit`` several times names each.

    Raises a UserError for a fault that ``sanity.check`` finds, for a file that cannot be written, if another run's
    files are in the way, and if the loss is not finite.
    """
    loaders = [loader for loader in (train, val, test) if loader is not None]
    if not (all(isinstance(loader, Loader) for loader in loaders) and train.training and not val.training):
        advice = "as voc.loaders returns them (docs/EDITING.md, Data, for a Dataset of your own)"
        raise UserError(f"engine.fit takes the loaders train, val and test in this order, {advice}")
    intervals = ["epoch"] if isinstance(scheduler, ReduceLROnPlateau) else ["epoch", "batch"]
    if scheduler_interval not in intervals:
        raise UserError(f"scheduler_interval is {scheduler_interval!r}: it has to be {' or '.join(intervals)}")
    parts = {"model": model, "criterion": criterion, "optimizer": optimizer, "scheduler": scheduler}
    patience = patience if scheduler is None else None
    distributed.set_malloc_options(args.device)
    model.to(args.device, memory_format=distributed.memory_format(args.device))
    if isinstance(criterion, torch.nn.Module):
        criterion.to(args.device)
    run = Run(args.out, name or args.experiment, args.seed)
    if args.script.is_file() and any(args is other and run.name == name for other, name in _calls):
        raise UserError(f"engine.fit is called twice for {run.name}: pass a name= of its own to each call")
    _calls.append((args, run.name))
    with run.open(args, parts, loaders) as resuming:
        scheduled = not (scheduler is None or isinstance(scheduler, ReduceLROnPlateau))
        warnings = run.restore(parts, scheduled) if resuming else []
        warnings += sanity.check(run.metadata, train, val, **parts, scheduler_interval=scheduler_interval)
        if args.overwrite:
            run.delete()
        step = functools.partial(training_step, epochs=args.epochs)
        step = sanity.check_first_step(step, model, optimizer, epoch=len(run.history) + 1)
        reporter = report.Reporter(run, args, criterion, train, val, test)
        reporter.start(model, scheduler is not None, scheduler_interval, patience, warnings)
        try:
            networks = _wrap(model, args, optimizer, find_unused_parameters)
            _run_epochs(args, run, reporter, parts, loaders, patience, scheduler_interval, networks, step, after_epoch)
            with distributed.main_process_first():  # it has written the file
                best_model = checkpoint.load(run.best, args.device)
            scored = zip(("val", "test"), loaders[1:])
            scores = {split: evaluate(best_model, loader, criterion) for split, loader in scored}
            if distributed.is_main():
                run.finish(scores)
            reporter.finish(best_model, scores)
        except BaseException as error:
            reporter.stop(resumes=not isinstance(error, Diverged))
            raise
    model.train()  # as it was
    util.seed_epoch(args.seed, 0, zlib.crc32(run.name.encode()))  # what follows does not depend on --resume


def _run_epochs(args, run, reporter, parts, loaders, patience, scheduler_interval, networks, step, after_epoch):
    """Train, validate and record the epochs that are left, see ``fit``; stop early if ``patience`` says so."""
    model, criterion, optimizer, scheduler = (parts[name] for name in ("model", "criterion", "optimizer", "scheduler"))
    (train, val, *_), (network, parallel) = loaders, networks
    batch_scheduler = scheduler if scheduler_interval == "batch" else None
    modules = [module for module in (model, criterion) if isinstance(module, torch.nn.Module)]
    is_rebuilt = False  # whether the round trip of a saved best checkpoint was tried
    for epoch in range(len(run.history) + 1, args.epochs + 1):
        if patience and run.history and epochs_without_progress(run.history, val.baseline.miou) >= patience:
            report.log(f"no progress on val for {patience} epochs: stopping early")
            break
        start = time.perf_counter()
        util.seed_epoch(args.seed, epoch, distributed.rank())
        with sanity.doing(f"training epoch {epoch}"):
            train_scores, rates = train_epoch(parallel, train, epoch, criterion, optimizer, step, batch_scheduler)
            for module in modules:
                distributed.broadcast(module.buffers())  # each process has its own, such as statistics of batch norm
            scores = evaluate(network, val, criterion, full_resolution=False)
            if not math.isfinite(scores.loss):
                problem = f"the val loss is {scores.loss} in epoch {epoch}"
                raise Diverged(f"{problem}: start again with a lower learning rate")
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(scores.miou if scheduler.mode == "max" else scores.loss)
            elif scheduler is not None and batch_scheduler is None:
                scheduler.step()
        row = report.history_row(epoch, rates, train_scores, scores)
        row["seconds"] = round(time.perf_counter() - start, 3)
        run.record(row, parts)
        if run.best_row is row and not is_rebuilt and distributed.is_main():  # again, now that the weights have moved
            sanity.check_round_trip(checkpoint.read(run.best), model, sanity.val_batch(val)[0])
            is_rebuilt = True
        reporter.epoch()
        if after_epoch and distributed.is_main():
            after_epoch({name: value for name, value in row.items() if name != "batch_learning_rates"})


def _wrap(model, args, optimizer, find_unused_parameters):
    """The model as it is evaluated, compiled if so asked, and as it is trained, in one or several processes."""
    network = torch.compile(model) if args.compile else model
    if distributed.world_size() == 1:
        return network, network
    if args.device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # batch norm over the whole batch
    # DistributedDataParallel leaves out what is frozen now, which a training step may unfreeze later
    frozen = [each for group in optimizer.param_groups for each in group["params"] if not each.requires_grad]
    frozen = torch.nn.ParameterList(frozen).requires_grad_(True)
    parallel = DistributedDataParallel(network, find_unused_parameters=find_unused_parameters or len(frozen) > 0)
    frozen.requires_grad_(False)
    return network, parallel


def epochs_without_progress(history, baseline_miou):
    """The number of epochs since the last progress: a higher mean IoU or a lower loss on val than before.

    Until the mean IoU is above that of the all-background baseline, a lower loss on train is progress too: a network
    that has not learned the classes yet predicts background, whose mean IoU does not change.
    """
    best = [max(history, key=lambda row: row["val_miou"]), min(history, key=lambda row: row["val_loss"])]
    if best[0]["val_miou"] <= baseline_miou:
        best.append(min(history, key=lambda row: row["train_loss"]))
    return len(history) - max(row["epoch"] for row in best)
