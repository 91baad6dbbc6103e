"""Two processes against one: the same metrics and weights, and a clean end. torchrun starts ``main`` of this file."""

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
from conftest import ROOT, make_loaders, make_tiny, run_main, use_float32, use_tiny_net
from tiny_net import TinyNet

import util
import voc
from seg import checkpoint, cli, distributed, engine, transforms


def main():
    """Evaluate an untrained network; train it plainly, with ``--compile``, and with batch norm and dropout."""
    args = cli.arguments(__file__, __doc__, epochs=2, batch_size=4)
    os.write(1, f"rank {distributed.rank()} pid {os.getpid()}\n".encode())  # print would mix the lines of two processes
    augment = transforms.Augmentation(flip=0.5, degrees=20, scale=(0.5, 1.2), unchanged=1, augmented=1)
    # 14 samples in batches of 4, 4, 3 and 3: the processes get batches of unequal size
    train, val, test = voc.loaders(args, size=32, augment=augment)
    criterion = AveragedLoss(voc.class_weights(train.split), ignore_index=util.VOID)

    # 5 val images are 2 batches, one per process; 3 test images are 1 batch, and the second process has none
    model = new_model()
    scores = [engine.evaluate(model, loader, criterion, full) for loader in (val, test) for full in (False, True)]
    args.out.mkdir(exist_ok=True)
    torch.save([vars(score) for score in scores], args.out / f"scores_{distributed.rank()}.pt")

    for name in ("plain", "compiled", "norm") if distributed.world_size() > 1 else ("plain",):
        model = new_model(norm=name == "norm")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        flags = Namespace(**vars(args) | {"out": args.out / name, "compile": name == "compiled"})
        experiment = {"criterion": criterion, "optimizer": optimizer, "scheduler": None, "patience": 100_000}
        engine.fit(flags, model, train, val, test, **experiment, training_step=logged_step)
    torch.save(criterion.mean, args.out / f"loss_{distributed.rank()}.pt")


class AveragedLoss(torch.nn.CrossEntropyLoss):
    """Keeps a running mean of the loss, which differs between the processes during an epoch."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, logits, masks):
        loss = super().forward(logits, masks)
        if self.training:
            self.mean.lerp_(loss.detach(), 0.5)
        return loss


def logged_step(*args, **position):
    """Take a training step; print a random number."""
    if position["count"] > 1:  # not the trial before the first epoch
        os.write(1, f"random {distributed.rank()} {torch.rand(1).item()}\n".encode())
    return engine.training_step(*args, **position)


def new_model(norm=False):
    torch.manual_seed(0)
    return TinyNet(21, norm)  # batch norm would see each process's part of a batch


@contextlib.contextmanager
def torchrun(*flags):
    """Run this file under torchrun with two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, __file__, "--device", "cpu"]
    line = list(map(str, [sys.executable, *launcher, *flags]))
    env, pipe = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.PIPE
    with subprocess.Popen(line, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()  # with its workers, if a test has failed


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_net):
    """A folder with data and the results of ``main`` in one process and in two, in float32."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny(folder / "Tiny", (("train", 7), ("val", 5), ("test", 3)))
    with pytest.MonkeyPatch.context() as patch:
        use_float32(patch)
        assert run_main(folder, sys.modules[__name__], "--data Tiny --out 1 --device cpu") == 0
    with torchrun("--data", folder / "Tiny", "--out", folder / "2") as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (folder / "output").write_text(output)
    return folder


@pytest.mark.parametrize("name", ["plain", "compiled"])
def test_two_processes_take_the_same_steps_as_one(runs, name):
    paths = ("1/plain/last_test_distributed.pt", f"2/{name}/last_test_distributed.pt")
    one, two = (torch.load(runs / path, weights_only=True) for path in paths)
    # float32 sums in another order, over 8 steps
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-4, atol=1e-6)
    for column in ("train_loss", "val_loss"):
        losses = [[row[column] for row in state["history"]] for state in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    untrained = new_model().state_dict()
    assert not any(torch.equal(one["model"][key], untrained[key]) for key in untrained)


def test_buffers_of_a_loss_are_the_same_in_all_processes(runs):
    first, second = (torch.load(runs / "2" / f"loss_{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second != 0


def test_only_the_main_process_prints(runs):
    output = (runs / "output").read_text()  # of three runs
    assert output.count("\nepoch ") == 6
    assert output.count("\ntest_distributed seed 0: val mean IoU") == 3


def test_random_numbers_differ_between_the_processes(runs):
    """Dropout would otherwise drop the same in each part of a batch."""
    lines = [line.split() for line in (runs / "output").read_text().splitlines() if line.startswith("random ")]
    numbers = {rank: {value for _, other, value in lines if other == rank} for rank in "01"}
    assert len(numbers["0"]) > 1 and not numbers["0"] & numbers["1"]


def test_val_is_evaluated_with_the_same_batch_norm_in_all_processes(runs, float32):
    folder = runs / "2" / "norm"
    best = checkpoint.load(folder / "best_test_distributed.pt")
    criterion = torch.nn.CrossEntropyLoss(voc.class_weights(voc.Split(runs / "Tiny", "train")), ignore_index=util.VOID)
    val = make_loaders(runs / "Tiny", 4, size=32)[1]
    row = engine.best_epoch(torch.load(folder / "last_test_distributed.pt", weights_only=True)["history"])
    scores = engine.evaluate(best, val, criterion, full_resolution=False)
    assert scores.miou == row["val_miou"]
    assert scores.loss == pytest.approx(row["val_loss"], rel=1e-6)  # float32 sums


def test_every_image_is_scored_once_whatever_the_number_of_processes(runs):
    paths = ("1/scores_0.pt", "2/scores_0.pt", "2/scores_1.pt")
    expected, *others = (torch.load(runs / path, weights_only=True) for path in paths)
    num_labelled = sum((voc.Split(runs / "Tiny", "val").mask(index) != util.VOID).sum() for index in range(5))
    assert expected[1]["matrix"].sum() == num_labelled  # val at full resolution
    for scores in others:
        for score, single in zip(scores, expected):
            assert torch.equal(score["matrix"], single["matrix"])
            assert score["assignment_iou"] == single["assignment_iou"]
            assert score["loss"] == pytest.approx(single["loss"], rel=1e-9)  # float64 sums in another order


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
    assert torch.load(tmp_path / "plain" / "last_test_distributed.pt", weights_only=True)["history"]


def test_a_batch_too_small_for_the_processes_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "main_process_first", contextlib.nullcontext)
    with pytest.raises(util.UserError, match="2 images are too few for 4 processes: raise --batch-size"):
        make_loaders(tiny, 3, size=16)


if __name__ == "__main__":
    # the same operations; generated code rounds differently and takes long to compile
    torch.compile = functools.partial(torch.compile, backend="eager")
    use_float32(pytest.MonkeyPatch())
    use_tiny_net(pytest.MonkeyPatch())
    cli.run(main)
