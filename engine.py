"""Evaluation and training, the same for all experiments."""

import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn import CrossEntropyLoss, functional
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import files
import processes
import util
from util import VOID, Scores, UserError


def batch_loss(criterion, logits, masks):
    """Compute the criterion on a batch in float32; return it with the weight of the batch in a mean over batches.

    The weight is the number of labelled pixels, or with class weights in the cross-entropy the sum of theirs. It is 0
    for a batch without labelled pixels, whose loss is finite but means nothing.
    """
    if isinstance(criterion, CrossEntropyLoss) and criterion.weight is not None:
        weights = functional.pad(criterion.weight, (0, VOID + 1 - len(criterion.weight)))  # 0 for void
        weight = weights[masks].sum()
    else:
        weight = (masks != VOID).sum().float()
    masks = masks.clone()
    masks[0, 0, 0] *= weight > 0  # a mean over no pixels would be NaN: label one as class 0
    logits = logits.float()
    if type(criterion) is CrossEntropyLoss and logits.device.type == "cpu":
        # the same mean over a list of pixels, without rearranging channels_last logits: 4 % of a training epoch
        logits, masks = logits.movedim(1, -1).flatten(0, 2), masks.flatten()
    return criterion(logits, masks), weight


def _mean_loss(losses, device):
    """The mean over all processes of losses and weights [N, 2] from ``batch_loss``; NaN if all weights are 0."""
    losses, weights = losses.double().T
    total, weight = processes.all_reduce(torch.stack(((losses * weights).sum(), weights.sum())), device).tolist()
    return total / weight if weight else math.nan


def _forward(model, images):
    """The logits of a batch, computed in bfloat16 on GPUs that support it, else in float32."""
    if images.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        with torch.autocast("cuda", torch.bfloat16):
            return model(images)
    return model(images)


def predict_mask(logits, shape):
    """Upsample logits [C, h, w] bilinearly to ``shape`` [H, W] and take the argmax: int64 [H, W]."""
    logits = functional.interpolate(logits[None].float(), shape, mode="bilinear", align_corners=False)
    return logits.argmax(1)[0]


@torch.inference_mode()
def evaluate(model, loader, criterion, full_resolution=True):
    """Evaluate a model on all images of a voc.Loader; return Scores. Several processes share the batches.

    Args:
        model: maps images [B, 3, S, S] to logits [B, C, S, S]; left in eval mode.
        full_resolution: evaluate at the resolution of each mask, to which the logits are upsampled, and compute the
            assignment's IoU: for reported metrics. Otherwise evaluate at the loader's size: faster, for validation
            during training.
    """
    model.eval()
    num_classes, device = len(loader.classes), loader.device
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    assignment_total = torch.zeros((), dtype=torch.float64)
    losses = [torch.zeros(2, device=device)]  # a process may have no batch
    num_batches = -(-len(loader) // processes.world_size())
    with ThreadPoolExecutor() as pool:
        for images, masks, indices in _progress(loader.batches(), num_batches, f"evaluating {loader.split.name}"):
            logits = _forward(model, images)
            losses.append(torch.stack(batch_loss(criterion, logits, masks)))
            if not full_resolution:
                matrix += util.confusion_matrix(masks, logits.argmax(1), num_classes)
                continue
            assignment_total += util.assignment_iou(masks.cpu(), logits.argmax(1).cpu(), num_classes).sum()
            full_masks = pool.map(loader.split.mask, indices.tolist())
            # upsampling one image of a channels_last batch is far slower than of a contiguous one
            for image_logits, mask in zip(logits.contiguous(), full_masks):
                mask = torch.from_numpy(mask).to(device)
                matrix += util.confusion_matrix(mask, predict_mask(image_logits, mask.shape), num_classes)
    loss = _mean_loss(torch.stack(losses).cpu(), device)
    matrix = processes.all_reduce(matrix, device).cpu()
    if not full_resolution:
        return Scores(loss, matrix, loader.classes)
    assignment_total = processes.all_reduce(assignment_total, device).item()
    return Scores(loss, matrix, loader.classes, assignment_total / len(loader.split))


def training_step(network, images, masks, criterion, optimizer):
    """Take one optimizer step; return loss and weight of the batch, see ``batch_loss``, and the gradient's norm."""
    optimizer.zero_grad()
    loss, weight = batch_loss(criterion, _forward(network, images), masks)
    # DistributedDataParallel averages the gradients: scaled like this, the average is that of the whole batch
    scale = processes.world_size() * weight / processes.all_reduce(weight, images.device).clamp(min=1e-12)
    (loss * scale).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    optimizer.step()
    return loss.detach(), weight, norm


def train_epoch(network, loader, epoch, criterion, optimizer):
    """Take one step per batch; return the mean loss over the labelled pixels of the epoch.

    Raises a UserError if the loss or the gradient of a batch is not finite; the weights are unusable then.
    """
    network.train()
    steps, batch_indices = [], []
    for images, masks, indices in _progress(loader.batches(epoch), len(loader), f"epoch {epoch}"):
        steps.append(torch.stack(training_step(network, images, masks, criterion, optimizer)))
        batch_indices.append(indices)
    steps = torch.stack(steps).cpu()  # only here, so that no step waits for a GPU
    _check_finite(steps[:, 0], steps[:, 2], batch_indices, loader.split.ids, epoch)
    return _mean_loss(steps[:, :2], loader.device)


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


def fit(args, model, train, val, test, *, criterion, optimizer, scheduler, patience):
    """Train a model, save its best and last state, then evaluate the best on val and test, plot and print a summary.

    Writes the files of ``files.RunFiles``. The best epoch has the highest mean IoU on val at the loader's size. After
    Ctrl-C or an error, the checkpoints and plots of the epochs before are kept. Raises a UserError if a file cannot be
    written, if ``--resume`` finds the files of another run, or if the loss is not finite.

    Args:
        args: from ``cli.arguments``.
        model: on ``args.device``; ``model.arguments`` holds the keyword arguments of its constructor.
        train, val, test: voc.Loaders; test may be None.
        criterion: maps logits [B, C, S, S] and masks [B, S, S] to a mean over the labelled pixels.
        optimizer: over the model's parameters.
        scheduler: stepped once per epoch, or None.
        patience: stop after so many epochs without a better mean IoU.
    """
    run_files = files.RunFiles(args.out, args.experiment, args.seed)
    processes.set_malloc_options(args.device)
    model.to(memory_format=torch.channels_last)
    metadata = checkpoint.metadata(args, model, train)
    history, seconds = [], 0.0
    if args.resume and run_files.last.exists():
        history, seconds = checkpoint.resume(run_files, metadata, model, optimizer, scheduler)
        _write_history(run_files.history, history)
    _describe(run_files, args, model, train, val, test, criterion, len(history))
    if processes.world_size() > 1 and args.device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # batch norm over the whole batch
    network = torch.compile(model) if args.compile else model
    parallel = DistributedDataParallel(network) if processes.world_size() > 1 else network

    try:
        epochs = range(len(history) + 1, args.epochs + 1)
        for epoch in _progress(epochs, len(epochs), args.experiment, unit="epoch"):
            if history and len(history) - best_epoch(history)["epoch"] >= patience:
                _print(f"no better mean IoU for {patience} epochs: stopping early")
                break
            start = time.perf_counter()
            learning_rate = optimizer.param_groups[0]["lr"]
            train_loss = train_epoch(parallel, train, epoch, criterion, optimizer)
            scores = evaluate(network, val, criterion, full_resolution=False)
            row = {
                "epoch": epoch,
                "learning_rate": learning_rate,
                "train_loss": train_loss,
                "val_loss": scores.loss,
                "val_pixel_accuracy": scores.pixel_accuracy,
                "val_miou": scores.miou,
            }
            # best before last: a run that is killed in between repeats the epoch and finds the same best
            if best_epoch([*history, row]) is row:
                checkpoint.save_best(run_files.best, metadata, model, epoch, scores)
            if scheduler is not None:
                scheduler.step()
            epoch_seconds = time.perf_counter() - start
            seconds += epoch_seconds
            checkpoint.save_last(run_files.last, metadata, [*history, row], seconds, model, optimizer, scheduler)
            history.append(row)
            _write_history(run_files.history, history)
            _print(_epoch_line(history, args.epochs, epoch_seconds, scores))
        _report(run_files, metadata, args.device, history, seconds, train, val, test, criterion)
    except BaseException:
        _report_stop(run_files, history, train, val)
        raise


def best_epoch(history):
    """The row of the epoch with the highest mean IoU on val, the first if several are equal."""
    return max(history, key=lambda row: row["val_miou"])


def _progress(iterable, total, name, unit="batch"):
    """A progress bar on stderr that disappears at its end; none in other processes or if stderr is not a terminal."""
    return tqdm(iterable, name, total, leave=False, unit=unit, disable=None if processes.is_main() else True)


def _print(text):
    """Print a line in the main process, without breaking the progress bars, and flush it."""
    if processes.is_main():
        tqdm.write(text)
        sys.stdout.flush()


def _write_history(path, history):
    if processes.is_main():
        lines = [",".join(history[0])] + [",".join(map(str, row.values())) for row in history]
        with files.atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())


def _num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def _describe(run_files, args, model, train, val, test, criterion, epochs_done):
    """Print what is about to run."""
    images = ", ".join(f"{len(loader.split)} {loader.split.name}" for loader in (train, val, test) if loader)
    if train.repeats > 1:
        images += f" (an epoch shows each train image {train.repeats} times)"
    size = f"{train.size}x{train.size}"
    _print(f"{run_files.experiment}: {train.split.dataset}, {images} images at {size}, {len(train.classes)} classes")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    network = f"{type(model).__name__}, {_num_parameters(model):,} parameters ({trained:,} of them trained)"
    _print(f"{network}, batch {args.batch_size}, seed {args.seed}, device {args.device}")
    if isinstance(criterion, CrossEntropyLoss) and criterion.weight is not None:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(train.classes, criterion.weight.tolist()))
        _print(f"class weights of the loss: {weights}")
    counts = torch.bincount(val.masks.flatten().cpu(), minlength=256)[: len(val.classes)]
    name, baseline = Scores(math.nan, torch.diag(counts), val.classes).baseline
    _print(f"{name} on val: pixel accuracy {baseline.pixel_accuracy:.4f}, mean IoU {baseline.miou:.4f}")
    _print(f"val is evaluated at {size} after each epoch, and at full resolution at the end")
    if test is None:
        _print(f"{train.split.root} has no test.txt: the results are on val, which also selects the best epoch")
    if args.compile:
        _print("the first epoch includes the time of torch.compile")
    if args.resume:
        _print(
            f"continuing {run_files.last} after epoch {epochs_done}" if epochs_done else "nothing to resume: starting"
        )


def _epoch_line(history, epochs, seconds, scores):
    """One line about the epoch that has just ended."""
    row, best = history[-1], best_epoch(history)
    name, baseline = scores.baseline
    warning = "" if scores.miou > baseline.miou else f"  not above the {name}"
    return (
        f"epoch {row['epoch']:{len(str(epochs))}d}/{epochs}  loss {row['train_loss']:.4f} (val {row['val_loss']:.4f})  "
        f"pixel accuracy {row['val_pixel_accuracy']:.4f}  mean IoU {row['val_miou']:.4f} "
        f"(best {best['val_miou']:.4f}, epoch {best['epoch']})  {seconds:.1f} s{warning}"
    )


def _draw_plots(run_files, history, train, val, model, epoch, scores):
    """Draw the plots of a run: ``model`` is that of the best ``epoch``, ``scores`` maps splits to Scores, val first."""
    import plotting  # only here: training should not wait for matplotlib

    title = f"{run_files.experiment} on {val.split.dataset}"
    name, val_scores = next(iter(scores.items()))
    samples = []
    for index in np.linspace(0, len(val.split) - 1, min(5, len(val.split))).round().astype(int).tolist():
        mask = val.split.mask(index)
        prediction = predict_index(model, val, index, mask.shape)
        samples.append((val.split.ids[index], np.asarray(val.split.photo(index)), mask, prediction))
    curves_title = f"{title}, val at {val.size}x{val.size}"
    plotting.curves(run_files.plot("curves"), curves_title, history, epoch, val_scores.baseline)
    plotting.class_iou(run_files.plot("iou"), f"{title}, epoch {epoch}", val.classes, scores)
    plotting.confusion(run_files.plot("confusion"), f"{title}, {name}, epoch {epoch}", val.classes, val_scores.matrix)
    plotting.predictions(run_files.plot("predictions"), f"{title}, val, epoch {epoch}", val.classes, samples)
    if train.augment is not None:
        images, masks = train.augmented_samples(16)
        images, masks = images.permute(0, 2, 3, 1).cpu().numpy(), masks.cpu().numpy()
        plotting.samples(run_files.plot("augmentation"), f"{title}, train", train.classes, images, masks)


@torch.inference_mode()
def predict_index(model, loader, index, shape):
    """The prediction for one image of a loader at ``shape`` [H, W]: int64 array [H, W]."""
    logits = model(loader.normalise(loader.images[index : index + 1]))[0]
    return predict_mask(logits, shape).cpu().numpy()


def _report_stop(run_files, history, train, val):
    """After Ctrl-C or an error: draw the plots of the epochs before, and print what is kept."""
    if not processes.is_main():
        return
    if not history:
        _print(f"{run_files.experiment}: stopped before the end of its first epoch: there is nothing to keep")
        return
    plots = ""
    try:
        best = checkpoint.read(run_files.best, "val_matrix")
        scores = {f"val at {val.size}x{val.size}": Scores(math.nan, best["val_matrix"], val.classes)}
        _draw_plots(run_files, history, train, val, checkpoint.load(run_files.best, val.device), best["epoch"], scores)
        plots = f", drew {run_files.plot('*')}"
    except (UserError, RuntimeError) as error:  # the reason for the stop, such as a full disk, matters more
        _print(util.reason(error))
    kept = [str(path) for path in (run_files.best, run_files.last) if path.exists()]
    advice = ": the same command with --resume continues" if len(kept) == 2 else ""
    kept = " and ".join(kept) or "nothing"
    _print(f"{run_files.experiment}: stopped after epoch {len(history)}; kept {kept}{plots}{advice}")


def _report(run_files, metadata, device, history, seconds, train, val, test, criterion):
    """Evaluate the best checkpoint at full resolution; write metrics and plots; print tables and paths."""
    with processes.main_process_first():  # it has written the file
        model = checkpoint.load(run_files.best, device)
    scores = {loader.split.name: evaluate(model, loader, criterion) for loader in (val, test) if loader is not None}
    if not processes.is_main():
        return
    best = best_epoch(history)["epoch"]
    metrics = {
        "experiment": run_files.experiment,
        "dataset": metadata["dataset"],
        "seed": metadata["seed"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "epochs": len(history),
        "best_epoch": best,
        "parameters": _num_parameters(model),
        "multiply_adds": _multiply_adds(model),
        "seconds": round(seconds, 3),
        "flags": {name: metadata["flags"][name] for name in ("epochs", "batch_size", "limit")},
        "versions": metadata["versions"],
        "val": scores["val"].as_dict(),
        "test": scores["test"].as_dict() if test is not None else None,
    }
    with files.atomic_write(run_files.metrics) as file:
        file.write(json.dumps(metrics, indent=2, allow_nan=False).encode() + b"\n")
    _draw_plots(run_files, history, train, val, model, best, scores)
    _print(_table(scores, val.classes))
    for name, result in scores.items():
        baseline_name, baseline = result.baseline
        if not result.miou > baseline.miou:
            _print(f"warning: on {name} the mean IoU is not above the {baseline_name}")
    _print(f"\nplots       {run_files.plot('*')}\ncheckpoint  {run_files.best}")
    _print(f"metrics     {run_files.metrics}, {run_files.history}")
    summary = ", ".join(f"{name} mean IoU {result.miou:.4f}" for name, result in scores.items())
    _print(f"{run_files.experiment} seed {metadata['seed']}: {summary} (epoch {best} of {len(history)})")


def _multiply_adds(model):
    """Multiply-adds of a forward pass on one image of the model's size, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode  # only here: it takes long to import

    image = torch.zeros(1, 3, model.size, model.size, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2


def _table(scores, classes):
    """The results as text: IoU of each class, then mean IoU and pixel accuracy next to those of the baseline."""
    columns = [result.as_dict() for result in scores.values()]
    baseline_name = next(iter(scores.values())).baseline[0]

    def row(name, values):
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        return f"{name:34}" + "".join(f" {cell:>9}" for cell in cells)

    lines = ["", f"{'IoU per class':34}" + "".join(f" {name:>9}" for name in scores)]
    lines += [row(f"  {name}", [column["iou"][name] for column in columns]) for name in classes]
    for name, key in (("mean IoU", "miou"), ("pixel accuracy", "pixel_accuracy")):
        lines.append(row(name, [column[key] for column in columns]))
        lines.append(row(f"  {baseline_name}", [column["background"][key] for column in columns]))
    lines.append(row("loss", [column["loss"] for column in columns]))
    lines.append(row("the assignment's IoU", [column["assignment_iou"] for column in columns]))
    return "\n".join(lines)
