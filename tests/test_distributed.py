"""Two processes under torchrun against a single one: the same metrics and weights, and a clean end.

torchrun starts this file itself, see ``main``.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, make_tiny, run_main, use_tiny_net
from tiny_net import TinyNet

import checkpoint
import cli
import engine
import processes
import transforms
import util
import voc

NAME = "test_distributed"


def main():
    """Train, evaluate the best checkpoint, and train again with ``--compile``."""
    args = cli.arguments(__file__, __doc__, epochs=2, batch_size=4)
    os.write(1, f"rank {processes.rank()} pid {os.getpid()}\n".encode())  # print would mix the lines of two processes
    augment = transforms.Augmentation(flip=0.5, degrees=20, scale=(0.5, 1.2), unchanged=1, augmented=1)
    # 14 samples in batches of 4, 4, 3 and 3: the processes get batches of unequal size
    train, val, test = voc.loaders(args.data, args.batch_size, size=32, augment=augment, seed=args.seed)
    criterion = torch.nn.CrossEntropyLoss(voc.class_weights(train.split), ignore_index=voc.VOID)

    def fit(name, compile):
        util.seed_everything(args.seed)
        model = TinyNet(len(train.classes), norm=False)  # batch norm would see each process's part of a batch
        engine.fit(
            Namespace(**vars(args) | {"out": args.out / name, "compile": compile}),
            model,
            train,
            val,
            test,
            criterion=criterion,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            scheduler=None,
            patience=100_000,
        )

    fit("plain", compile=False)
    model = checkpoint.load(args.out / "plain" / f"best_{NAME}.pt")
    # 5 val images are 2 batches, one per process; 3 test images are 1 batch, and the second process has none
    scores = [
        vars(engine.evaluate(model, loader, criterion, full_resolution))
        for loader in (val, test)
        for full_resolution in (False, True)
    ]
    torch.save(scores, args.out / f"scores_{processes.rank()}.pt")
    # the same operations; generated code rounds differently and takes long to compile
    torch.compile = functools.partial(torch.compile, backend="eager")
    fit("compiled", compile=True)


def torchrun(*flags):
    """Start this file under torchrun with two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, __file__, "--device", "cpu"]
    return subprocess.Popen(
        list(map(str, [sys.executable, *launcher, *flags])),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_net):
    """A folder with data and the results of ``main`` in one process and in two."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny(folder / "Tiny", (("train", 7), ("val", 5), ("test", 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", torch.compile)  # restores it afterwards
        assert run_main(folder, sys.modules[__name__], "--data Tiny --out 1 --device cpu") == 0
    process = torchrun("--data", folder / "Tiny", "--out", folder / "2")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (folder / "output").write_text(output)
    return folder


def last(runs, count, name="plain"):
    return torch.load(runs / str(count) / name / f"last_{NAME}.pt", weights_only=True)


def test_two_processes_take_the_same_steps_as_one(runs):
    one, two = last(runs, 1), last(runs, 2)
    # float32 sums in another order, over 8 steps
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-4, atol=1e-6)
    for key in ("train_loss", "val_loss"):
        assert [row[key] for row in two["history"]] == pytest.approx([row[key] for row in one["history"]], rel=1e-4)
    torch.manual_seed(0)
    untrained = TinyNet(21, norm=False).state_dict()
    assert not any(torch.equal(value, untrained[name]) for name, value in one["model"].items())


def test_compiled_networks_take_the_same_steps_with_unequal_batches(runs):
    plain, compiled = last(runs, 2), last(runs, 2, "compiled")
    torch.testing.assert_close(compiled["model"], plain["model"], rtol=0, atol=0)


def test_one_process_prints_and_writes_the_files(runs):
    output = (runs / "output").read_text()
    assert output.count("\nepoch ") == 4 and output.count(f"\n{NAME} seed 0: val mean IoU") == 2  # plain and compiled
    names = [
        sorted(path.relative_to(runs / count) for path in (runs / count / "plain").rglob("*")) for count in ("1", "2")
    ]
    assert names[0] == names[1] and len(names[0]) == 11  # checkpoints, CSV, JSON, five plots and two folders


def test_every_image_is_scored_once_whatever_the_number_of_processes(runs):
    expected, *others = (
        torch.load(runs / path, weights_only=True) for path in ("1/scores_0.pt", "2/scores_0.pt", "2/scores_1.pt")
    )
    num_pixels = sum((voc.Split(runs / "Tiny", "val").mask(index) != voc.VOID).sum() for index in range(5))
    assert expected[1]["matrix"].sum() == num_pixels
    for scores in others:
        for score, single in zip(scores, expected):
            assert torch.equal(score["matrix"], single["matrix"])
            assert score["assignment_iou"] == pytest.approx(single["assignment_iou"], rel=1e-12)  # float64 sums
            assert score["loss"] == pytest.approx(single["loss"], rel=1e-9)


def test_killing_one_process_ends_the_other_and_keeps_a_readable_checkpoint(runs, tmp_path):
    with torchrun("--data", runs / "Tiny", "--out", tmp_path, "--epochs", 100_000) as launcher:
        pids = {}
        for line in launcher.stdout:
            if line.startswith("rank "):
                _, rank, _, pid = line.split()
                pids[int(rank)] = int(pid)
            if line.startswith("epoch "):
                break
        assert launcher.poll() is None and len(pids) == 2, launcher.communicate()
        killed = time.monotonic()
        os.kill(pids[1], signal.SIGKILL)
        errors = launcher.communicate(timeout=60)[1].replace(" ", "")
        assert time.monotonic() - killed < 30 and launcher.returncode != 0
    assert "SIGKILL" in errors or "exitcode:-9" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert torch.load(tmp_path / "plain" / f"last_{NAME}.pt", weights_only=True)["history"]


def test_a_batch_too_small_for_the_processes_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    monkeypatch.setattr(processes, "main_process_first", contextlib.nullcontext)
    with pytest.raises(util.UserError, match="4 processes cannot share a batch of 2 images: raise --batch-size"):
        voc.loaders(tiny, 3, size=16)


if __name__ == "__main__":
    use_tiny_net(pytest.MonkeyPatch())
    cli.run(main)
