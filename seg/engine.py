"""Evaluation and training, the same for all experiments."""

import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import CrossEntropyLoss, functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

import util
from seg import checkpoint, distributed, files, report, sanity
from seg.inference import check_loader, forward, predict_index, predict_strips
from util import VOID, Scores, UserError


def batch_loss(criterion, logits, masks):
    """Compute the criterion on a batch in float32; return it with the weight of the batch in a mean over batches.

    The weight is the number of labelled pixels, or for a cross-entropy with class weights the sum of their weights.
    It is 0 for a batch without labelled pixels, whose loss is finite but means nothing.
    """
    class_weights = util.class_weights(criterion)
    if class_weights is not None:
        weight = functional.pad(class_weights, (0, VOID + 1 - len(class_weights)))[masks].sum()  # 0 for void
    else:
        weight = (masks != VOID).sum().float()
    masks = masks.clone()
    label = 0 if class_weights is None else class_weights.argmax()
    masks[0, 0, 0] = torch.where(weight > 0, masks[0, 0, 0], label)  # a mean over no pixels would be NaN
    logits = logits.float()
    if type(criterion) is CrossEntropyLoss and logits.device.type == "cpu":
        # the same mean over a list of pixels, without rearranging channels_last logits: 4 % of a training epoch
        logits, masks = logits.movedim(1, -1).flatten(0, 2), masks.flatten()
    elif type(criterion) is not CrossEntropyLoss:
        logits = logits.contiguous()  # for losses that call view, and for NLLLoss
    return criterion(logits, masks), weight


def _mean_loss(losses, device=None):
    """The mean of losses and weights [N, 2] from ``batch_loss``; NaN if all weights are 0.

    With ``device``, the mean over all processes.
    """
    losses, weights = losses.double().T
    sums = torch.stack(((losses * weights).sum(), weights.sum()))
    total, weight = (sums if device is None else distributed.all_reduce(sums, device)).tolist()
    return total / weight if weight else math.nan


@torch.inference_mode()
def evaluate(model, loader, criterion, full_resolution=True):
    """Evaluate a model on all images of a voc.Loader; return Scores. Several processes share the batches.

    Args:
        model: maps images to logits, see ``forward``. Model and criterion are left in eval mode.
        full_resolution: evaluate at the resolution of each mask, to which the logits are upsampled, and compute the
            assignment's IoU: for reported metrics, in float32. Otherwise evaluate at the loader's size: faster, for
            validation during training.

    Raises a UserError if the loader shuffles or augments, or differs from a TrainedModel in classes or normalisation.
    """
    if loader.training or loader.augment is not None:
        raise UserError("evaluate needs a loader without training=True and augment, such as voc.Loader(split, size, 8)")
    check_loader(model, loader)
    model.eval()
    if isinstance(criterion, torch.nn.Module):
        criterion.eval()
    num_classes, device = len(loader.classes), loader.device
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    image_ious, assignment_ious = torch.zeros(2, len(loader.split), dtype=torch.float64)
    losses = [torch.zeros(2, device=device)]  # a process may have no batch
    num_batches = math.ceil(len(loader) / distributed.world_size())
    with ThreadPoolExecutor() as pool:
        name = f"evaluating {loader.split.name}"
        for images, masks, indices in report.progress(loader.batches(), num_batches, name):
            logits = forward(model, images, full_precision=full_resolution)["out"]
            losses.append(torch.stack(batch_loss(criterion, logits, masks)))
            if not full_resolution:
                matrix += util.confusion_matrix(masks, logits.argmax(1), num_classes)
                continue
            assignment_ious[indices] = util.assignment_iou(masks.cpu(), logits.argmax(1).cpu(), num_classes)
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


def training_step(network, images, masks, criterion, optimizer, index, count):
    """Take one optimizer step. A script may pass a function of its own with these parameters to ``fit``.

    Args:
        network: the model, compiled or wrapped in DistributedDataParallel if so asked.
        images: float32 [B, 3, H, W]. masks: int64 [B, H, W].
        index, count: position of the batch in its epoch, from 0, and number of batches.

    Returns:
        loss and weight of the batch, see ``batch_loss``, and the gradient's norm, scalar tensors; and the logits
        [B, C, H, W], for the metrics on train.
    """
    optimizer.zero_grad()
    logits = forward(network, images)["out"]
    loss, weight = batch_loss(criterion, logits, masks)
    norm = backward(network, loss, weight)
    optimizer.step()
    return loss, weight, norm, logits


def train_epoch(network, loader, epoch, criterion, optimizer, training_step=training_step, scheduler=None):
    """Take one step per batch, and one of the scheduler.

    Returns:
        Scores of the batches as the network saw them, with the weights of that moment: the loss is the mean over all
        labelled pixels, the confusion matrix is of every fourth row and column.
        The learning rates, a list with one list per batch, which holds the rate of each parameter group.

    Raises a UserError if the loss or the gradient of a batch is not finite; the weights are unusable then.
    """
    network.train()
    if isinstance(criterion, torch.nn.Module):
        criterion.train()
    num_classes, device = len(loader.classes), loader.device
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    results, batch_indices, learning_rates = [], [], []
    batches = report.progress(
        loader.batches(epoch),
        len(loader),
        f"epoch {epoch}",
        status=lambda: f"loss {_mean_loss(torch.stack(results)[:, :2].cpu()):.4f}",
    )
    for index, (images, masks, indices) in enumerate(batches):
        learning_rates.append(util.learning_rates(optimizer))
        *result, logits = training_step(network, images, masks, criterion, optimizer, index=index, count=len(loader))
        results.append(torch.stack([value.detach() for value in result]))
        batch_indices.append(indices)
        matrix += _sampled_confusion_matrix(masks, logits.detach(), num_classes)
        if scheduler is not None:
            scheduler.step()
    losses, weights, norms = torch.stack(results).T.cpu()  # only here: .cpu() synchronises with a GPU
    _check_finite(losses, norms, batch_indices, loader.split.ids, epoch)
    loss = _mean_loss(torch.stack((losses, weights), 1), device)
    return Scores(loss, distributed.all_reduce(matrix, device).cpu(), loader.classes), learning_rates


def _sampled_confusion_matrix(masks, logits, num_classes):
    """The confusion matrix of every fourth row and column, which is enough for a curve and takes little time."""
    return util.confusion_matrix(masks[:, ::4, ::4], logits[:, :, ::4, ::4].max(1).indices, num_classes)


def _check_finite(losses, norms, batch_indices, ids, epoch):
    """Raise a UserError that names the first batch of an epoch with a loss or gradient norm that is not finite."""
    finite = losses.isfinite() & norms.isfinite()
    if finite.all():
        return
    batch = int(finite.int().argmin())
    name, value = ("gradient", norms[batch]) if losses[batch].isfinite() else ("loss", losses[batch])
    indices = batch_indices[batch].tolist()
    images = ", ".join(ids[index] for index in indices[:8]) + (", ..." if len(indices) > 8 else "")
    before = losses[:batch]
    if batch and before.max() > 10 * before[0].abs():
        hint = f"the losses before grew from {before[0]:.3g} to {before.max():.3g}: lower the learning rate"
    else:
        hint = "the losses before did not grow: check these images, the network and the loss"
    place = f"epoch {epoch}, batch {batch + 1} of {len(losses)} (images {images})"
    raise UserError(f"the {name} is {value} in {place}: {hint}")


def fit(
    args,
    model,
    train,
    val,
    test,
    *,
    criterion,
    optimizer,
    scheduler,
    patience=10,
    scheduler_interval="epoch",
    training_step=training_step,
):
    """Train a model, save its best and last state, then evaluate the best on val and test, plot and print a summary.

    Writes the files of ``files.RunFiles``. The best epoch has the highest mean IoU on val at the loader's size, and of
    several the lowest val loss. After Ctrl-C or an error, the checkpoints and plots of the epochs before are kept.
    Raises a UserError if ``sanity.check`` finds a fault, if a file cannot be written, if another run's files are in
    the way, or if the loss is not finite.

    Args:
        args: from ``cli.arguments``.
        model: ``model.arguments`` holds the keyword arguments of its constructor. See ``forward``.
        train, val, test: voc.Loaders; test may be None.
        criterion: maps logits, float32 [B, C, H, W], and masks, int64 [B, H, W] with VOID, to a scalar: a mean over the
            labelled pixels.
        optimizer: over the model's parameters.
        scheduler: None, or stepped once per ``scheduler_interval``, "epoch" or "batch". ReduceLROnPlateau is stepped
            after each epoch, with the val loss, or in mode "max" with the mean IoU on val.
        patience: stop after so many ``epochs_without_progress``; None: never. It has no effect with any scheduler but
            ReduceLROnPlateau: an annealed run goes to its end.
        training_step: takes the place of ``engine.training_step``.
    """
    finished = getattr(args, "finished", ())  # by earlier calls of this function in the same script
    if args.experiment in finished:
        problem = f"{args.script.name}: engine.fit is called twice for {args.experiment}"
        raise UserError(f"{problem}: set args.experiment to a name of its own before each call")
    run_files = files.RunFiles(args.out, args.experiment, args.seed)
    annealed = not (scheduler is None or isinstance(scheduler, ReduceLROnPlateau))
    stops_early = scheduler is None and patience is not None
    parts = {"model": model, "criterion": criterion, "optimizer": optimizer, "scheduler": scheduler}
    sanity.check_types(args, train, val, test, parts)
    with run_files.locked() if distributed.is_main() else contextlib.nullcontext():
        resuming = args.resume and run_files.last.exists()
        if not (resuming or args.overwrite):
            checkpoint.check_new_run(run_files, args.resume)
        distributed.set_malloc_options(args.device)
        distributed.set_memory_format(model, args.device)
        modules = [module for module in (model, criterion) if isinstance(module, torch.nn.Module)]
        for module in modules:
            module.to(args.device)
        loaders = [loader for loader in (train, val, test) if loader is not None]
        metadata = checkpoint.metadata(args, model, loaders)
        warnings = sanity.check(args, metadata, train, forward, training_step, scheduler_interval, **parts)
        if args.overwrite and distributed.is_main():
            run_files.delete()
        history = checkpoint.resume(run_files, metadata, annealed, **parts) if resuming else []
        run_report = report.Report(run_files, args, criterion, train, val, test, predict_index)
        stopping = f"patience {patience} epochs" if stops_early else f"all {args.epochs} epochs are run"
        run_report.start(model, history, stopping, warnings)
        network, parallel = _wrap(model, args)

        def run_epoch(epoch):
            """Train and validate for an epoch; return its row of the history and the Scores on val."""
            util.seed_epoch(args.seed, epoch, distributed.rank())
            batch_scheduler = scheduler if scheduler_interval == "batch" else None
            train_scores, learning_rates = train_epoch(
                parallel, train, epoch, criterion, optimizer, training_step, batch_scheduler
            )
            for module in modules:
                distributed.broadcast(module.buffers())  # each process has its own statistics of batch norm
            scores = evaluate(network, val, criterion, full_resolution=False)
            if not math.isfinite(scores.loss):
                raise UserError(f"the val loss is {scores.loss} in epoch {epoch}: lower the learning rate")
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(scores.miou if scheduler.mode == "max" else scores.loss)
            elif scheduler is not None and scheduler_interval == "epoch":
                scheduler.step()
            return report.history_row(epoch, learning_rates, train_scores, scores), scores

        try:
            epochs = range(len(history) + 1, args.epochs + 1)
            for epoch in report.progress(epochs, len(epochs), args.experiment, unit="epoch"):
                if history and stops_early and epochs_without_progress(history, val.baseline.miou) >= patience:
                    report.log(f"no progress on val for {patience} epochs: stopping early")
                    break
                start = time.perf_counter()
                row, scores = run_epoch(epoch)
                # best before last: a run that is killed in between repeats the epoch and finds the same best
                if best_epoch([*history, row]) is row:
                    checkpoint.save_best(run_files.best, metadata, model, epoch, scores)
                row["seconds"] = round(time.perf_counter() - start, 3)
                checkpoint.save_last(run_files.last, metadata, [*history, row], **parts)
                history.append(row)
                run_report.epoch(history, best_epoch(history))
            with distributed.main_process_first():  # it has written the file
                best_model = checkpoint.load(run_files.best, args.device)
            scored = zip(("val", "test"), loaders[1:])
            results = {name: evaluate(best_model, loader, criterion) for name, loader in scored}
            run_report.finish(metadata, best_model, history, best_epoch(history), results)
            args.finished = {*finished, args.experiment}
            model.train()  # as it was
            util.seed_epoch(args.seed, 0, len(args.finished))  # what follows does not depend on --resume
        except BaseException:
            run_report.stop(history)
            raise


def _wrap(model, args):
    """The model as it is evaluated, compiled if so asked, and as it is trained, in one or several processes."""
    network = torch.compile(model) if args.compile else model
    if distributed.world_size() == 1:
        return network, network
    if args.device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # batch norm over the whole batch
    return network, DistributedDataParallel(network)


def best_epoch(history):
    """The row of the epoch with the highest mean IoU on val; of several, the one with the lowest val loss."""
    return max(history, key=lambda row: (row["val_miou"], -row["val_loss"]))


def epochs_without_progress(history, baseline_miou):
    """The number of epochs since the last progress: a higher mean IoU or a lower loss on val than before.

    Until the mean IoU is above that of the all-background baseline, a lower loss on train is progress too: a network
    that has not learned the classes yet predicts background, whose mean IoU does not change.
    """
    best = [max(history, key=lambda row: row["val_miou"]), min(history, key=lambda row: row["val_loss"])]
    if best[0]["val_miou"] <= baseline_miou:
        best.append(min(history, key=lambda row: row["train_loss"]))
    return len(history) - max(row["epoch"] for row in best)
