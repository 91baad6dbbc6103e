"""Compare the time of an epoch with that of a plain PyTorch loop and of another version, in alternation in one run.

    python benchmarks/speed.py --data data/VOCdevkit/Toy --experiments train train_5_a --before ../earlier

An epoch is training on train and validation on val, at the network's input size. The variants:

    N workers         a loop as commonly written: images decoded at each access, torchvision's v2 transforms, float32 in
                      contiguous memory, an optimizer that is not fused, loss.item() in each step, IoU with NumPy for
                      each image and class. Its DataLoader has N workers; of several N, the fastest counts.
    before, after     engine.train_epoch and engine.evaluate, as engine.fit calls them: of --before and of this checkout
    compiled, graphs  after with torch.compile, and with its mode reduce-overhead, which uses CUDA graphs (--compile)

Each has its own process. After a first epoch, they take turns; ratios are medians, with their range. The second table
has the shares of operations in an epoch of training, on GPUs those of their kernels and what takes longest on the CPU.
Peak memory is that of the GPU, or of the process without its workers. Other flags: as for the experiments.
"""

import contextlib
import importlib
import math
import os
import re
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

ROOT = os.environ.get("SPEED_ROOT") or str(Path(__file__).resolve().parent.parent)  # set for the processes of before
sys.path.insert(0, ROOT)

import compare
from seg import cli, distributed, engine
from seg.imaging import MEAN, STD
from seg.transforms import Augmentation
from util import VOID

COMPILED = {"compiled": {}, "graphs": {"mode": "reduce-overhead"}}
KINDS = {  # of operations; the first that fits counts
    "convolutions backward": "convolution_backward",
    "convolutions forward": "aten::.*conv",
    "batch norm": "batch_norm",
    "casts and copies": "aten::copy_",
    "cross-entropy": "log_softmax|nll_loss",
    "activation": "relu|threshold|clamp_min",
    "interpolation": "upsample",
    "optimizer": "[Aa]dam|foreach|addc|lerp",
    "zeroing": "zero_|fill_",
}


class ImageDataset(Dataset):
    """Images and masks of a voc.Split, decoded, resized and augmented at each access."""

    def __init__(self, split, size, augmentation):
        self.split, self.size = split, size[::-1]  # width first, as Pillow takes it
        fill = {tv_tensors.Image: [255 * value for value in MEAN], tv_tensors.Mask: VOID}
        dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
        transforms = [v2.RandomHorizontalFlip(augmentation.flip)]
        if augmentation.degrees:
            transforms.append(v2.RandomRotation(augmentation.degrees, v2.InterpolationMode.BILINEAR, fill=fill))
        if augmentation.scale != (1.0, 1.0):
            transforms.append(v2.RandomResizedCrop(size, scale=(augmentation.scale[0] ** 2, 1), ratio=(1, 1)))
        if any(augmentation.colour):
            transforms.append(v2.ColorJitter(*augmentation.colour))
        self.transform = v2.Compose([*transforms, v2.ToDtype(dtypes, scale=True), v2.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        photo, mask = map(Image.open, (self.split.photo_path(index), self.split.mask_path(index)))
        photo = photo.convert("RGB").resize(self.size, Image.Resampling.BILINEAR)
        mask = np.array(mask.resize(self.size, Image.Resampling.NEAREST))
        return self.transform(tv_tensors.Image(photo), tv_tensors.Mask(mask))


def ours(args, model, train, val, test, *, criterion, optimizer, compile_options=None, **others):
    """Take the arguments of engine.fit; return functions that train and validate as it does, and the steps an epoch."""
    distributed.set_malloc_options(args.device)
    model.to(args.device, memory_format=distributed.memory_format(args.device))
    network = model if compile_options is None else torch.compile(model, **compile_options)
    step = partial(others.get("training_step", engine.training_step), epochs=args.epochs)
    scheduler = others["scheduler"] if others.get("scheduler_interval") == "batch" else None

    def train_epoch(epoch):
        engine.train_epoch(network, train, epoch, criterion, optimizer, step, scheduler)

    return train_epoch, partial(engine.evaluate, network, val, criterion, full_resolution=False), len(train)


def plain(num_workers, args, model, train, val, test, *, criterion, optimizer, **_):
    """Like ``ours``, as commonly written."""
    torch.backends.cudnn.deterministic = False  # PyTorch's default, as is the next
    for group in optimizer.param_groups:
        group["fused"] = None
    datasets = [ImageDataset(train.split, train.size, Augmentation())] * train.unchanged
    if train.augment is not None:
        datasets += [ImageDataset(train.split, train.size, train.augment)] * (train.repeats - train.unchanged)
    options = dict(num_workers=num_workers, persistent_workers=num_workers > 0, pin_memory=args.device.type == "cuda")
    train_batches = DataLoader(ConcatDataset(datasets), train.batch_size, shuffle=True, **options)
    val_batches = DataLoader(ImageDataset(val.split, val.size, Augmentation()), val.batch_size, **options)

    def train_epoch(epoch):
        model.train()
        for images, masks in train_batches:
            loss = criterion(model(images.to(args.device)), masks.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    def validate():
        model.eval()
        intersection, union = np.zeros((2, len(train.classes)))
        with torch.no_grad():
            for images, masks in val_batches:
                logits = model(images.to(args.device))
                criterion(logits, masks.to(args.device)).item()
                for truth, prediction in zip(masks.numpy(), logits.argmax(1).cpu().numpy()):
                    for label in range(len(union)):
                        is_true, is_predicted = truth == label, (prediction == label) & (truth != VOID)
                        intersection[label] += (is_true & is_predicted).sum()
                        union[label] += (is_true | is_predicted).sum()
        return np.mean(intersection[union > 0] / union[union > 0])

    return train_epoch, validate, len(train_batches)


@cache
def set_up(variant, experiment, flags, device):
    """What ``ours`` or ``plain`` return for what the experiment's main() passes to engine.fit; once per process."""
    argv = mock.patch("sys.argv", [f"{experiment}.py", *flags, "--device", str(device)])
    with mock.patch("seg.engine.fit") as fit, argv, contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(experiment).main()
    if variant.endswith(" workers"):
        return plain(int(variant.split()[0]), *fit.call_args.args, **fit.call_args.kwargs)
    return ours(*fit.call_args.args, **fit.call_args.kwargs, compile_options=COMPILED.get(variant))


def timed(device, function, *args):
    """The seconds that a call takes."""
    start = time.perf_counter()
    function(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_epoch(epoch, *setup):
    """The seconds of training and of validation in an epoch."""
    train, validate, _ = set_up(*setup)
    return timed(setup[-1], train, epoch), timed(setup[-1], validate)


def profile(epoch, seconds, *setup):
    """Profile an epoch of training that takes ``seconds`` without a profiler; return a row of the second table."""
    (train, _, num_steps), (variant, experiment, _, device) = set_up(*setup), setup
    on_gpu, memory = device.type == "cuda", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else 1024 * memory  # kilobytes on Linux
    with torch.profiler.profile() as profiler:
        profiled_seconds = timed(device, train, epoch)
    row = {"experiment": experiment, "variant": variant, "step": f"{1000 * seconds / num_steps:.4g} ms"}
    row |= {"peak memory": f"{memory / 1e9:.2f} GB"}
    return row | shares(profiler.key_averages(), on_gpu, seconds, profiled_seconds)


def shares(events, on_gpu, seconds, profiled_seconds):
    """The shares of events in the time of an epoch, as text; kernels take as long with a profiler as without."""
    times, host = dict.fromkeys(["kernels"] * on_gpu + [*KINDS], 0.0), Counter()
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            times["kernels"] += 0 if event.is_user_annotation else event.self_device_time_total  # it holds kernels
            continue
        host[event.key] += event.self_cpu_time_total / 1e6 / profiled_seconds
        if kind := next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), None):
            times[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    times = {kind: time / 1e6 / (seconds if on_gpu else profiled_seconds) for kind, time in times.items()}
    times["rest"] = 1 - sum(times[kind] for kind in KINDS)
    longest = ", ".join(f"{key} {share:.0%}" for key, share in host.most_common(6))
    return {kind: f"{share:.1%}" for kind, share in times.items()} | ({"longest on the CPU": longest} if on_gpu else {})


def outcome(variant, future):
    """The result of a call in a variant's process; None, after a message, if it failed."""
    if error := future.exception():
        print(f"{variant} failed: {error.__cause__ or repr(error)}", file=sys.stderr)
    return None if error else future.result()


def measure(args, experiment, flags):
    """Measure an experiment's variants in turns; return a row of the first table, and rows of the second."""
    variants = [f"{count} workers" for count in sorted({*args.workers})] + ["before"] * bool(args.before) + ["after"]
    pretrained = ["--no-pretrained"] * (experiment in ("train_5_b", "train_6"))
    setup, pools, first = (experiment, (*flags, *pretrained), args.device), {}, {}
    for variant in variants + [*COMPILED] * args.compile:
        os.environ["SPEED_ROOT"] = args.before if variant == "before" else ROOT  # until its process has started
        pools[variant] = ProcessPoolExecutor(1, get_context("spawn"))
        first[variant] = pools[variant].submit(time_epoch, 1, variant, *setup)
    pools = {variant: pool for variant, pool in pools.items() if outcome(variant, first[variant])}
    times, end = {variant: [] for variant in pools}, time.monotonic() + args.seconds
    for epoch in range(2, 2 + args.rounds):
        for variant, pool in pools.items() if epoch == 2 or time.monotonic() < end else ():
            times[variant].append(pool.submit(time_epoch, epoch, variant, *setup).result())
    rows = []
    for variant, pool in pools.items():
        seconds = median(training for training, _ in times[variant])
        rows.append(outcome(variant, pool.submit(profile, 2 + args.rounds, seconds, variant, *setup)))
        pool.shutdown()
    return summary(experiment, {variant: [sum(pair) for pair in pairs] for variant, pairs in times.items()}), rows


def summary(experiment, times):
    """A row of the first table from the seconds of each variant's epochs."""
    workers = sorted((name for name in times if name.endswith(" workers")), key=lambda name: median(times[name]))
    row = {"experiment": experiment, "rounds": len(times["after"])}
    for name in workers[:1] + [name for name in times if name not in workers]:
        heading, note = ("common loop", f", {name}") if name in workers else (name, "")
        row[heading] = f"{median(times[name]):.3g} s{note}"
        ratios = [own / reference for own, reference in zip(times[name], times["after"])]
        if name != "after":
            row[f"{heading} / after"] = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return row


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--experiments", nargs="+", default=["train"], metavar="NAME", help="default: train")
    parser.add_argument("--before", metavar="DIR", help="another checkout of this project, such as a git worktree")
    parser.add_argument("--workers", nargs="*", type=cli.integer(0), default=[0, os.cpu_count()], metavar="N")
    parser.add_argument("--compile", action="store_true", help="measure the variants compiled and graphs, too")
    parser.add_argument("--rounds", type=cli.integer(1), default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no more rounds after this time")
    parser.add_argument("--device", type=cli.parse_device, default="auto", help="default: auto")
    args, flags = parser.parse_known_args()
    print(f"{distributed.device_name(args.device)}, {os.cpu_count()} CPU cores, torch {torch.__version__}\n")
    results = [measure(args, experiment, flags) for experiment in args.experiments]
    print(compare.markdown_table([row for row, _ in results]), end="\n\n")
    print(compare.markdown_table([row for _, rows in results for row in rows if row]))


if __name__ == "__main__":
    cli.run(main)
