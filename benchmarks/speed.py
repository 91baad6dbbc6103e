"""Compare the time of an epoch with that of a plain PyTorch loop: ratios, measured in alternation in one run.

    python benchmarks/speed.py --data data/VOCdevkit/Toy --experiments train train_4_b --compile

An epoch is training on train and validation on val, at the network's input size. The variants:

    ours      engine.train_epoch and engine.evaluate, as engine.fit calls them
    plain     a loop as commonly written: images decoded at each access, torchvision's v2 transforms, float32 in
              contiguous memory, an optimizer that is not fused, loss.item() in each step, IoU with NumPy for each
              image and class
    workers   plain, with a DataLoader worker process per CPU core
    malloc    ours with the default settings of glibc's malloc, see distributed.set_malloc_options
    float32   ours without bfloat16, see distributed.has_bfloat16
    compiled  ours with torch.compile, if --compile is given

Each has its own process. After a first epoch, they take turns for ROUNDS epochs. Other flags: as for the experiments.
"""

import importlib
import os
import resource
import sys
import time
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compare
from seg import cli, distributed, engine
from seg.imaging import MEAN, STD
from seg.transforms import Augmentation
from util import VOID

ROUNDS = 3


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


def ours(args, model, train, val, test, *, criterion, optimizer, malloc=True, bfloat16=True, compiled=False, **_):
    """Take the arguments of engine.fit and return a function that runs an epoch as engine.fit does."""
    if malloc:
        distributed.set_malloc_options(train.device)
    if not bfloat16:
        distributed.has_bfloat16 = lambda device: False  # the process runs no other variant
    model.to(memory_format=torch.channels_last)
    network = torch.compile(model) if compiled else model

    def run_epoch(epoch):
        engine.train_epoch(network, train, epoch, criterion, optimizer)
        return engine.evaluate(network, val, criterion, full_resolution=False).miou

    return run_epoch


def plain(args, model, train, val, test, *, criterion, optimizer, num_workers=0, **_):
    """Take the arguments of engine.fit and return a function that runs an epoch as commonly written."""
    for group in optimizer.param_groups:
        group["fused"] = None  # PyTorch's default
    datasets = [ImageDataset(train.split, train.size, Augmentation())] * train.unchanged
    if train.augment is not None:
        datasets += [ImageDataset(train.split, train.size, train.augment)] * (train.repeats - train.unchanged)
    options = dict(num_workers=num_workers, persistent_workers=num_workers > 0, pin_memory=args.device.type == "cuda")
    train_batches = DataLoader(ConcatDataset(datasets), train.batch_size, shuffle=True, **options)
    val_batches = DataLoader(ImageDataset(val.split, val.size, Augmentation()), val.batch_size, **options)

    def run_epoch(epoch):
        model.train()
        for images, masks in train_batches:
            loss = criterion(model(images.to(args.device)), masks.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
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

    return run_epoch


VARIANTS = {"ours": ours, "plain": plain, "workers": partial(plain, num_workers=os.cpu_count())}
VARIANTS |= {"malloc": partial(ours, malloc=False), "float32": partial(ours, bfloat16=False)}
VARIANTS |= {"compiled": partial(ours, compiled=True)}


@cache
def set_up(variant, experiment, flags, device):
    """The function that runs an epoch, made from what the experiment's main() passes to engine.fit."""
    with (
        mock.patch("seg.engine.fit") as fit,
        mock.patch("sys.argv", [f"{experiment}.py", *flags, "--device", str(device)]),
    ):
        importlib.import_module(experiment).main()
    return VARIANTS[variant](*fit.call_args.args, **fit.call_args.kwargs)


def time_epoch(epoch, variant, experiment, flags, device):
    """Run an epoch; return its seconds and the peak memory of this process so far, without its workers, in GB."""
    run_epoch = set_up(variant, experiment, flags, device)  # only once per process
    start = time.perf_counter()
    run_epoch(epoch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def measure(experiment, variants, flags, device):
    """Measure the variants of an experiment in turns; return a row of the table for each."""
    pools = {variant: ProcessPoolExecutor(1, get_context("spawn")) for variant in variants}
    results = {variant: [] for variant in variants}
    for epoch in range(1, ROUNDS + 2):
        for variant, pool in pools.items():
            results[variant].append(pool.submit(time_epoch, epoch, variant, experiment, flags, device).result())
    _, *reference = [seconds for seconds, _ in results["ours"]]
    rows = []
    for variant, pool in pools.items():
        pool.shutdown()
        (first, *seconds), memory = zip(*results[variant])
        ratio = median(own / our for own, our in zip(seconds, reference))
        row = {"experiment": experiment, "variant": variant, "epoch / ours": f"{ratio:.2f}"}
        row |= {"first epoch / ours": f"{first / median(reference):.2f}", "peak memory": f"{memory[-1]:.2f} GB"}
        rows.append(row | ({"epoch": f"{1000 * median(seconds):.1f} ms"} if device.type == "cuda" else {}))
    return rows


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--experiments", nargs="+", default=["train"], metavar="NAME", help="default: train")
    parser.add_argument("--device", type=cli.parse_device, default="auto", help="default: auto")
    parser.add_argument("--compile", action="store_true")
    args, flags = parser.parse_known_args()
    machine = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {ROUNDS} rounds\n")
    variants = [variant for variant in VARIANTS if variant != "compiled" or args.compile]
    rows = []
    for experiment in args.experiments:
        pretrained = ["--no-pretrained"] if experiment in ("train_5_b", "train_6") else []
        rows += measure(experiment, variants, (*flags, *pretrained), args.device)
    print(compare.markdown_table(rows))


if __name__ == "__main__":
    cli.run(main)
