"""How fast the experiments run, as ratios from one run: against loops as commonly written, and against the hardware.

    python benchmarks/speed.py --data data/VOCdevkit/Toy                     the baseline at VOC2007's size
    python benchmarks/speed.py --data data/VOCdevkit/Toy --limit 48 --all    all seven, on a part of it

For each experiment, an epoch of training and validation is timed in turn, ROUNDS times over, each way in a process of
its own: ours; ours with glibc's malloc as it comes (see ``processes.set_malloc_options``); (a) a plain loop, which decodes each
picture when its turn comes and counts IoU with NumPy image by image and class by class; (b) the same loop fed by
DataLoader's worker processes and torchvision's v2 transforms; and with --compile, ours compiled. All see the same
images in the same order and start from the same weights; without augmentation, they end at nearly the same weights: a
last bit that is rounded otherwise turns single ReLUs on or off, which an epoch in float64 shows to be all. Then: how
soon a second run takes its first step and its peak memory, beside ``import torch`` alone, and how an epoch grows with
images and pixels.
"""

import copy
import functools
import importlib
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compare
import engine
import util
import voc
from basic_fcn import FCN

ROUNDS = 3


class Pictures(Dataset):
    """Photos and masks, decoded anew each time, as most public loaders have it."""

    def __init__(self, split, size, change=None):
        self.split, self.size, self.change = split, (size, size), change

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        photo, mask = self.split.paths(index)
        with Image.open(photo) as image:
            photo = np.array(image.convert("RGB").resize(self.size, Image.Resampling.BILINEAR))
        with Image.open(mask) as image:
            mask = np.array(image.resize(self.size, Image.Resampling.NEAREST))
        photo, mask = torch.from_numpy(photo).permute(2, 0, 1), torch.from_numpy(mask)
        if self.change is not None:
            photo, mask = self.change(tv_tensors.Image(photo), tv_tensors.Mask(mask))
        return v2.functional.normalize(photo / 255, voc.MEAN, voc.STD), mask.long()


def v2_transforms(augment, size):
    """torchvision's transforms for what an Augmentation of ours does."""
    fill = {tv_tensors.Image: [round(255 * value) for value in voc.MEAN], tv_tensors.Mask: voc.VOID}
    steps = [v2.RandomHorizontalFlip(augment.flip)]
    if augment.degrees:
        steps.append(v2.RandomRotation(augment.degrees, v2.InterpolationMode.BILINEAR, fill=fill))
    if augment.scale != (1.0, 1.0):
        steps.append(v2.RandomResizedCrop(size, scale=(augment.scale[0] ** 2, 1), ratio=(1, 1), antialias=False))
    return v2.Compose(steps)


def numpy_counts(truth, prediction, number, hits, union):
    """Add the pixels of each class, image by image and class by class."""
    for true, called in zip(truth, prediction):
        labelled = true != voc.VOID
        for label in range(number):
            is_true, is_called = (true == label) & labelled, (called == label) & labelled
            hits[label] += np.logical_and(is_true, is_called).sum()
            union[label] += np.logical_or(is_true, is_called).sum()


class Plain:
    """An experiment in a loop as commonly written; ``workers`` None decodes in the loop itself."""

    def __init__(self, parts, workers):
        self.model = copy.deepcopy(parts["model"]).to(memory_format=torch.contiguous_format)
        self.criterion, self.train, self.val = parts["criterion"], parts["train"], parts["val"]
        self.optimizer = optimizer_of(parts, self.model)
        options = {"num_workers": 0}
        if workers:
            pin = self.train.device.type == "cuda"
            options = {"num_workers": workers, "persistent_workers": True, "pin_memory": pin}
        size, augment = self.train.size, self.train.augment
        sets = [Pictures(self.train.split, size)] * self.train.plain
        if augment is not None:
            changed = Pictures(self.train.split, size, v2_transforms(augment, size))
            sets += [changed] * (self.train.copies - self.train.plain)
        self.order = []  # the same list object each epoch, so that the workers live on
        self.batches = DataLoader(ConcatDataset(sets), batch_sampler=self.order, **options)
        self.val_batches = DataLoader(Pictures(self.val.split, size), self.val.batch_size, **options)
        if workers:  # they start once a run, which is not to count as an epoch's time
            self.order[:] = [[0]]
            for _ in (*self.batches, *self.val_batches):
                pass

    def epoch(self, number):
        """Train and validate; return the seconds of both."""
        device, classes = self.train.device, len(self.train.classes)
        began = time.perf_counter()
        self.order[:] = [places.tolist() for places in self.train.order(number)[0]]
        self.model.train()
        for images, masks in self.batches:
            loss = self.criterion(self.model(images.to(device)), masks.to(device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
        middle = time.perf_counter()
        self.model.eval()
        hits, union = np.zeros((2, classes), np.int64)
        with torch.no_grad():
            for images, masks in self.val_batches:
                logits = self.model(images.to(device))
                self.criterion(logits, masks.to(device)).item()
                numpy_counts(masks.numpy(), logits.argmax(1).cpu().numpy(), classes, hits, union)
        self.miou = np.mean(hits[union > 0] / union[union > 0])
        return middle - began, time.perf_counter() - middle


class Ours:
    """An experiment as engine.fit runs it."""

    def __init__(self, parts, compiled=False, keep_memory=True):
        self.train, self.val, self.criterion = parts["train"], parts["val"], parts["criterion"]
        if keep_memory:
            processes.set_malloc_options(self.train.device)
        self.model = copy.deepcopy(parts["model"]).to(memory_format=torch.channels_last)
        self.optimizer = optimizer_of(parts, self.model)
        self.network, self.features = self.model, {}
        if compiled:
            self.network = torch.compile(self.model, dynamic=False)
            engine._warm_up(self.model, self.network, self.network, self.train, self.val, self.criterion)

    def epoch(self, number):
        """Train and validate; return the seconds of both."""
        began = time.perf_counter()
        engine.train_epoch(self.network, self.train, number, self.criterion, self.optimizer)
        middle = time.perf_counter()
        scores = engine.evaluate(self.network, self.val, self.criterion, full_resolution=False, features=self.features)
        self.miou = scores.miou
        return middle - began, time.perf_counter() - middle

    def facts(self):
        """What a training epoch and a validation consist of, beside their times."""
        masks = self.val.masks.long().split(self.val.batch_size)
        pairs = [(truth, truth.masked_fill(truth == voc.VOID, 0)) for truth in masks]
        number = len(self.val.classes)
        work = {
            "data": lambda: deque(self.train.batches(1), maxlen=0),  # each is gone before the next, as in fit
            "metric": lambda: sum(util.confusion_matrix(*pair, number) for pair in pairs).sum().item(),
        }
        took = {name: statistics.median(seconds(one) for _ in range(ROUNDS)) for name, one in work.items()}
        return {
            "train": len(self.train.split) * self.train.copies,
            "val": len(self.val.split),
            "augmented": self.train.augment is not None,
            "flops": step_flops(self),
            **took,
        }


def parts_of(script, flags):
    """What an experiment hands to engine.fit."""
    parts = {}
    with mock.patch("engine.fit", lambda **given: parts.update(given)), mock.patch("sys.argv", [script, *flags]):
        importlib.import_module(script).main()
    return parts


def optimizer_of(parts, model):
    """The experiment's optimizer, for a copy of its model."""
    theirs = dict(zip(map(id, parts["model"].parameters()), model.parameters()))
    groups = [
        {**group, "params": [theirs[id(one)] for one in group["params"]]} for group in parts["optimizer"].param_groups
    ]
    return type(parts["optimizer"])(groups)


def apart(one, other):
    """How far two lists of weights are apart, as a share of how large they are."""
    pairs = list(zip(one, other))
    return (sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(b).sum() for _, b in pairs)) ** 0.5


def step_flops(ours):
    """Floating-point operations of a training step on one image, counted by PyTorch."""
    images, masks = next(ours.train.batches(1))
    ours.model.train()
    with FlopCounterMode(display=False) as counter:
        engine.batch_loss(ours.criterion, ours.model(images), masks)[0].backward()
    ours.model.zero_grad()
    return counter.get_total_flops() / len(images)


def product_rate(device):
    """FLOP/s of a large matrix product in the type that training computes in."""
    side, kind = (8192, torch.bfloat16) if device.type == "cuda" else (3000, torch.float32)
    one, other = torch.randn(2, side, side, device=device, dtype=kind)
    return 2 * side**3 / min(seconds(lambda: (one @ other)[0, 0].item()) for _ in range(5))


def seconds(work):
    """How long some work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


WAYS = {
    "ours": Ours,
    "malloc": functools.partial(Ours, keep_memory=False),
    "a": functools.partial(Plain, workers=None),
    "b": functools.partial(Plain, workers=os.cpu_count()),
    "compiled": functools.partial(Ours, compiled=True),
}


def serve(pipe, way, script, flags):
    """In a process of its own: run an epoch whenever asked for its number; in the end, tell the facts of ours."""
    parts = parts_of(script, flags)
    runner = WAYS[way](parts)
    pipe.send("ready")
    while number := pipe.recv():
        took = runner.epoch(number)
        weights = [one.detach().cpu().numpy() for one in runner.model.parameters()] if number == 1 else None
        pipe.send((took, runner.miou, weights, peak()))
    pipe.send(runner.facts() if way == "ours" else None)


def measure(script, args):
    """A row of the table for one experiment."""
    processes = multiprocessing.get_context("spawn")
    pipes, times, mious, weights, peaks = {}, {}, set(), {}, {}
    for way in [way for way in WAYS if way != "compiled" or args.compile]:
        pipes[way], theirs = processes.Pipe()
        processes.Process(target=serve, args=(theirs, way, script, args.flags)).start()
        pipes[way].recv()  # one after the other, since the first decodes what the others find
        times[way] = []
    device = cli.parse_device("auto")
    rates = [product_rate(device)]
    for number in range(1, ROUNDS + 1):
        for way, pipe in pipes.items():
            pipe.send(number)
            took, miou, arrays, peaks[way] = pipe.recv()
            times[way].append(took)
            if number == 1:
                mious.add(f"{miou:.4f}")
                weights[way] = arrays
        rates.append(product_rate(device))
    told = []
    for pipe in pipes.values():  # ours first, while the others still wait
        pipe.send(0)
        told.append(pipe.recv())
    facts = told[0]
    whole = {way: statistics.median(map(sum, pairs)) for way, pairs in times.items()}
    train_time, val_time = (statistics.median(pair[index] for pair in times["ours"]) for index in (0, 1))
    distance = max(apart(arrays, weights["a"]) for arrays in weights.values())
    return [
        script,
        *(f"{whole[way] / whole['ours']:.2f}" for way in ("a", "b", "malloc")),
        f"{whole['a'] / whole['compiled']:.2f}" if args.compile else "-",
        f"{facts['val'] / val_time / (facts['train'] / train_time):.1f}",
        f"{facts['data'] / train_time:.1%}",
        f"{facts['metric'] / val_time:.1%}",
        f"{facts['flops'] * facts['train'] / train_time / statistics.median(rates):.0%}",
        " / ".join(f"{peaks[way]:.1f}" for way in ("ours", "malloc", "a", "b")),
        "-" if facts["augmented"] else f"{distance:.0e}, {' '.join(sorted(mious))}",
    ]


def same_mathematics(args):
    """Print how far (a) is from ours after an epoch of plain gradient descent, as a share of how far both went."""

    def exactly(model, given):
        """Normalise anew in float64: what two ways of doing so in float32 give differs in the last bit."""
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (voc.MEAN, voc.STD))
        return (((given[0].double() * std + mean) * 255).round() / 255 - mean) / std

    print()
    for kind in (torch.float32, torch.float64):
        parts = parts_of("train", [*args.flags, "--limit", "48", "--device", "cpu"])
        parts["model"].to(kind)
        if kind == torch.float64:
            parts["model"].register_forward_pre_hook(exactly)
        parts["optimizer"] = torch.optim.SGD(parts["model"].parameters(), lr=0.01)
        start = [one.detach().numpy().copy() for one in parts["model"].parameters()]
        changes = []
        for runner in (Ours(parts, keep_memory=False), Plain(parts, None)):
            runner.epoch(1)
            changes.append([now.detach().numpy() - one for now, one in zip(runner.model.parameters(), start)])
        print(f"An epoch of gradient descent in {kind}: changes of the weights {apart(*changes):.0e} apart.")


HEAD = ["experiment", "a / ours", "b / ours", "malloc / ours", "a / compiled", "images a second, val / train", "data"]
HEAD += ["metric", "FLOP/s / product's", "peak GB: ours / malloc / a / b", "weights apart, mean IoU"]


def peak():
    """The most memory that this process held at once, in GB; 0 where the system does not tell."""
    try:  # resource.getrusage calls so what may be that of the process which started this one
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
    except OSError:
        return 0.0


def child(code, *flags):
    """Run Python code that ends with PRINT in a process of its own; return the seconds to there and its peak in GB."""
    began = time.time()
    said = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    now, kilobytes = said.split()[-2:]
    return float(now) - began, int(kilobytes) / 1e6


PRINT = r"""
    import os, re, time
    now = time.time()
    print(now, re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1], flush=True)
    os._exit(0)
"""
FIRST_STEP = f"""
import sys, engine, train
def first(device):
{PRINT}
engine._autocast = first  # called where the first batch goes into the network
sys.argv[0] = "train.py"
train.main()
"""
ALONE = f"if True:\n    import torch\n{PRINT}"
GIVEN = """
import util
processes.set_malloc_options = lambda device: None
"""
WHOLE = f"""
import sys, train
if True:
    sys.argv[0] = "train.py"
    train.main()
{PRINT}
"""


def start_and_memory(args, folder):
    """Print how soon train.py takes its first step, and how much memory it needs."""
    flags = [*args.flags, "--out", folder]
    pairs = [(child(FIRST_STEP, *flags)[0], child(ALONE)[0]) for _ in range(ROUNDS + 1)][1:]  # the first decodes
    later, ratio = (statistics.median(values) for values in zip(*((a - b, a / b) for a, b in pairs)))
    print(
        f"\nA second run's first step comes {later:.1f} s after `import torch` alone would be done ({ratio:.2f} times)."
    )
    alone = child(ALONE)[1]
    kept, given = (child(start + WHOLE, *flags, "--epochs", "1")[1] - alone for start in ("", GIVEN))
    print(f"Peak memory of train.py: {kept:.2f} GB above that of `import torch` alone.")
    print(f"With glibc's malloc as it comes: {given:.2f} GB above it.")


def growth(args):
    """How a training epoch of the baseline grows with images and pixels, as multiples of the smallest."""
    device = cli.parse_device("auto")
    criterion = torch.nn.CrossEntropyLoss(ignore_index=voc.VOID)
    rows, unit = [], None
    processes.set_malloc_options(device)
    for size in (112, 224, 448):
        rows.append([f"{size} x {size}"])
        for images in (13, 52, 208):
            split = voc.Split(args.data, "train", images)
            train = voc.Loader(split, size, 13, training=True, device=device)
            model = FCN(len(split.classes)).to(device, memory_format=torch.channels_last)
            optimizer = torch.optim.Adam(model.parameters(), fused=True)
            epochs = [
                functools.partial(engine.train_epoch, model, train, k, criterion, optimizer)
                for k in range(ROUNDS if images < 208 else 1)
            ]
            took = min(map(seconds, epochs))
            unit = unit or took
            rows[-1].append(f"{took / unit:.1f}")
    print("\n" + compare.table(["epoch's time", "13 images", "52 images", "208 images"], rows))


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", default="data/VOCdevkit/Toy")
    parser.add_argument("--limit", type=cli.integer(1))
    parser.add_argument("--all", action="store_true", help="all seven experiments, not the baseline alone")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    args.flags = ["--data", args.data] + (["--limit", str(args.limit)] if args.limit else [])
    device = cli.parse_device("auto")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {ROUNDS} rounds\n")
    rows = [measure(script, args) for script in (compare.EXPERIMENTS if args.all else ["train"])]
    print(compare.table(HEAD, rows))
    if not args.all:
        same_mathematics(args)
        with tempfile.TemporaryDirectory() as folder:
            start_and_memory(args, folder)
        growth(args)


if __name__ == "__main__":
    cli.run(main)
