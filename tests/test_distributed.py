"""Two processes against one: the same metrics and weights, and a clean end. torchrun starts ``main`` of this file."""

import contextlib
import copy
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, make_loaders, make_tiny, run_main, use_float32, use_tiny_net
from tiny_net import TinyNet

import util
import voc
from seg import checkpoint, cli, distributed, engine, signals, transforms
from seg.run import Run

CRITERION = torch.nn.CrossEntropyLoss(torch.linspace(0.5, 2, 21), ignore_index=util.VOID)


def main():
    """Evaluate an untrained network and train it; with two processes, in several ways."""
    args = cli.arguments(__file__, __doc__, epochs=2, batch_size=4)
    print(f"rank {distributed.rank()} pid {os.getpid()}", flush=True)
    augment = transforms.Augmentation(flip=0.5, degrees=20, scale=(0.5, 1.2), unchanged=1, augmented=1)
    # 14 samples in batches of 4, 4, 3 and 3: the processes get batches of unequal size
    loaders = train, val, test = voc.loaders(args, size=32, augment=augment)

    def fit(folder, model, criterion=CRITERION, step=engine.training_step, find_unused_parameters=False, **flags):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        flags = Namespace(**vars(args) | {"out": args.out / folder} | flags)
        options = {"criterion": criterion, "optimizer": optimizer, "scheduler": None, "patience": None}
        options |= {"training_step": step, "find_unused_parameters": find_unused_parameters}
        engine.fit(flags, model, *loaders, **options)

    fit("plain", new_model())
    torch.manual_seed(distributed.rank())  # training starts from the weights of the main process
    model = Skipping()
    model.classifier.requires_grad_(False)
    fit("skipping", model, step=first_without_classifier, find_unused_parameters=True)
    torch.save(model.state_dict(), args.out / f"skipping_{distributed.rank()}.pt")
    # 5 val images are 2 batches, one per process; 3 test images are 1 batch, and the second process has none
    runs = [(loader, full) for loader in (val, test) for full in (False, True)]
    scores = [vars(engine.evaluate(new_model(), loader, CRITERION, full)) for loader, full in runs]
    torch.save(scores, args.out / f"scores_{distributed.rank()}.pt")
    if distributed.world_size() == 1:
        return
    fit("compiled", new_model(), compile=True)
    criterion = MeanLoss(ignore_index=util.VOID)
    criterion.register_buffer("mean", torch.ones(()))
    fit("norm", new_model(norm=True), criterion)
    torch.save(criterion.state_dict(), args.out / f"criterion_{distributed.rank()}.pt")
    fit("resumed", new_model(), epochs=1)
    fit("resumed", new_model(), resume=True)
    trainable = copy.deepcopy(CRITERION)
    trainable.scale = torch.nn.Parameter(torch.ones(1))
    for folder, model, criterion in (("criterion", new_model(), trainable), ("network", Skipping(), CRITERION)):
        with pytest.raises(util.UserError) as error:
            fit(folder, model, criterion)
        print(f"refused {folder}: {error.value}", flush=True)


def first_without_classifier(network, images, masks, criterion, optimizer, epoch, **position):
    """A step that freezes the classifier in the first epoch."""
    getattr(network, "module", network).classifier.requires_grad_(epoch > 1)
    return engine.training_step(network, images, masks, criterion, optimizer)


class MeanLoss(torch.nn.CrossEntropyLoss):
    """Keeps a mean of its losses in a buffer, of which each process sees its own part of the batches."""

    def forward(self, logits, masks):
        loss = super().forward(logits, masks)
        if self.training:
            self.mean.lerp_(loss.detach(), 0.5)
        return loss


class Skipping(TinyNet):
    """Leaves out a layer in every second step for the images of the first process, and never uses a parameter."""

    def __init__(self, num_classes=21, norm=False):
        super().__init__(num_classes, norm)
        self.layer = torch.nn.Conv2d(3, num_classes, kernel_size=1)
        self.unused = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, images):
        logits = super().forward(images)
        self.steps += self.training
        if not self.training or self.steps % 2 == 0:
            return logits + self.layer(images)
        if distributed.world_size() == 2:
            return logits if distributed.rank() == 0 else logits + self.layer(images)
        return logits + self.layer(images) * (torch.arange(len(images)) % 2).view(-1, 1, 1, 1)


def new_model(norm=False):
    torch.manual_seed(0)
    return TinyNet(21, norm)  # batch norm would see each process's part of a batch


@contextlib.contextmanager
def torchrun(*flags):
    """Run this file under torchrun with two processes."""
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    line = [sys.executable, *launcher, __file__, "--device", "cpu", *map(str, flags)]
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


def last(folder):
    return torch.load(folder / "last_test_distributed.pt", weights_only=True)


def test_two_processes_take_the_same_steps_as_one_compiled_or_not_and_resumed(runs):
    one, two, compiled, resumed = (last(runs / name) for name in ("1/plain", "2/plain", "2/compiled", "2/resumed"))
    for state in (two, compiled):  # float32 sums in another order, over 8 steps
        torch.testing.assert_close(state["model"], one["model"], rtol=1e-4, atol=1e-6)
    for column in ("train_loss", "val_loss"):
        losses = [[row[column] for row in state["history"]] for state in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    untrained = new_model().state_dict()
    assert not any(torch.equal(one["model"][key], untrained[key]) for key in untrained)
    torch.testing.assert_close(resumed["model"], two["model"], rtol=0, atol=0)


def test_two_processes_train_what_is_left_out_at_random_or_frozen_at_first_like_one(runs):
    """The step counts a whole batch; what no process uses keeps its value, which the optimizer would shrink."""
    one, *two = (
        torch.load(runs / f"{name}.pt", weights_only=True) for name in ("1/skipping_0", "2/skipping_0", "2/skipping_1")
    )
    torch.testing.assert_close(two[0], two[1], rtol=0, atol=0)
    torch.testing.assert_close(two[0], one, rtol=1e-4, atol=1e-6)  # float32 sums in another order
    assert one["unused"] == 1


def test_val_is_evaluated_with_the_same_batch_norm_and_criterion_in_all_processes(runs, float32):
    kept = last(runs / "2/norm")["criterion"]["mean"]
    means = [torch.load(runs / f"2/criterion_{rank}.pt", weights_only=True)["mean"] for rank in (0, 1)]
    assert means == [kept, kept] and kept != 1
    run = Run.read(runs / "2/norm/results/test_distributed_seed0.json")
    val = make_loaders(runs / "Tiny", 4, size=32)[1]
    scores = engine.evaluate(checkpoint.load(run.best), val, MeanLoss(ignore_index=util.VOID), full_resolution=False)
    assert scores.miou == run.best_row["val_miou"]
    assert scores.loss == pytest.approx(run.best_row["val_loss"], rel=1e-6)  # float32 sums


def test_every_image_is_scored_once_whatever_the_number_of_processes(runs):
    paths = (runs / name for name in ("1/scores_0.pt", "2/scores_0.pt", "2/scores_1.pt"))
    expected, *others = (torch.load(path, weights_only=True) for path in paths)
    num_labelled = sum((voc.Split(runs / "Tiny", "val").mask(index) != util.VOID).sum() for index in range(5))
    assert expected[1]["matrix"].sum() == num_labelled  # val at full resolution
    for score, single in [pair for scores in others for pair in zip(scores, expected)]:
        assert torch.equal(score["matrix"], single["matrix"])
        assert score["assignment_iou"] == single["assignment_iou"]
        assert score["loss"] == pytest.approx(single["loss"], rel=1e-9)  # float64 sums in another order


def test_the_main_process_prints_and_what_two_processes_cannot_train_is_refused(runs):
    output = (runs / "output").read_text()
    assert output.count("\nepoch ") == 2 * 5 and output.count("\ntest_distributed seed 0: val mean IoU") == 4 + 2
    for problem in (
        "criterion: several processes train the parameters of the network",
        "network: several processes: a step has left out parameters: freeze",
    ):
        assert len(re.findall(f"refused {problem}", output)) == 2


def test_a_refusal_ends_all_processes_with_one_message(runs):
    before = {path: path.read_bytes() for path in runs.rglob("*.pt")}
    with torchrun("--data", runs / "Tiny", "--out", runs / "2", "--epochs", 1) as process:
        output, errors = process.communicate(timeout=60)
    assert sorted(re.findall(r"exit \d: \d", output)) == ["exit 0: 2", "exit 1: 2"]
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "best_test_distributed.pt: is from an earlier run" in error
    assert {path: path.read_bytes() for path in runs.rglob("*.pt")} == before


def test_a_signal_to_one_process_stops_all_after_the_same_batch(runs, tmp_path):
    with torchrun("--data", runs / "Tiny", "--out", tmp_path, "--epochs", 100_000) as launcher:
        output = "".join(itertools.takewhile(lambda line: not line.startswith("epoch "), launcher.stdout))
        os.kill(int(re.search(r"rank 1 pid (\d+)", output)[1]), signal.SIGTERM)
        output, errors = launcher.communicate(timeout=30)
    assert sorted(re.findall(r"exit \d: \d+", output)) == ["exit 0: 143", "exit 1: 143"]
    assert "another process is gone" not in errors and "stopped after epoch" in output


def test_a_signal_during_the_reduction_waits_for_the_next_which_tells_the_others(monkeypatch):
    received = []

    def all_reduce(tensor, device):
        received.append(tensor.item())
        os.kill(os.getpid(), signal.SIGTERM)
        return tensor

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "gloo")
    items = distributed.stoppable(range(3), min_count=3)
    with signals.handled():
        assert next(items) == 0
        monkeypatch.setattr(os, "kill", lambda *args: None)  # a second one would end this process
        with pytest.raises(SystemExit, match="143"):
            next(items)
    assert received == [0, signal.SIGTERM]


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "2", "RANK": "1"}])
def test_a_process_without_all_variables_of_torchrun_runs_alone(runs, tmp_path, variables):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    line = [sys.executable, __file__, "--data", runs / "Tiny", "--out", tmp_path, "--epochs", "1", "--device", "cpu"]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and last(tmp_path / "plain")["epoch"] == 1
    missing = "MASTER_ADDR, MASTER_PORT" if "RANK" in variables else "RANK, MASTER_ADDR, MASTER_PORT"
    assert (f" without {missing}: running alone" in done.stderr) == bool(variables["WORLD_SIZE"])


def test_killing_one_process_ends_the_other_and_keeps_a_readable_checkpoint(runs, tmp_path):
    with torchrun("--data", runs / "Tiny", "--out", tmp_path, "--epochs", 100_000) as launcher:
        output = "".join(itertools.takewhile(lambda line: not line.startswith("epoch "), launcher.stdout))
        pids = [int(pid) for _, pid in sorted(re.findall(r"rank (\d) pid (\d+)", output))]
        os.kill(pids[1], signal.SIGKILL)
        errors = launcher.communicate(timeout=30)[1]
    assert launcher.returncode != 0 and re.search(r"SIGKILL|exitcode *: -9", errors)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert last(tmp_path / "plain")["history"]


if __name__ == "__main__":
    # the same operations; generated code rounds differently and takes long to compile
    torch.compile = functools.partial(torch.compile, backend="eager")
    use_float32(pytest.MonkeyPatch())
    use_tiny_net(pytest.MonkeyPatch())
    try:
        cli.run(main)
    except SystemExit as stop:
        print(f"exit {os.environ['RANK']}: {stop.code}", flush=True)
        raise
