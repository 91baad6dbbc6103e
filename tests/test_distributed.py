"""Several processes, as torchrun starts them, against one: the same figures, the same weights, and a clean end."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, make_tiny

import engine
import util
import voc

WORKER = """
from pathlib import Path
import torch
import engine, transforms, util, voc

checkpoint.ROOT = Path(__file__).resolve().parent  # where engine.load looks for the network

class Net(torch.nn.Module):  # without batch norm, which would see each process's part of a batch
    def __init__(self, num_classes):
        super().__init__()
        self.arguments = {"num_classes": num_classes}
        self.body = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.classifier = torch.nn.Conv2d(8, num_classes, 1)

    def forward(self, images):
        return self.classifier(self.body(images).relu())

def main():
    args = cli.arguments("A test.", epochs=2, batch_size=4)
    util.seed_everything(args.seed)
    augment = transforms.Augmentation(flip=0.5, degrees=20, scale=(0.5, 1.2), unchanged=1, augmented=1)
    train, val, test = voc.loaders(args.data, args.batch_size, 32, augment, args.limit, args.seed, args.device)
    model = Net(len(train.classes))
    weight = voc.class_weights(train.split)
    engine.fit(
        script=__file__, args=args, model=model, train=train, val=val, test=test,
        criterion=torch.nn.CrossEntropyLoss(weight, ignore_index=voc.VOID),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), scheduler=None, patience=9,
    )

if __name__ == "__main__":
    cli.run(main)
"""


def torchrun(processes, script, *flags):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return list(map(str, [sys.executable, *launch, script, "--device", "cpu", *flags]))


@pytest.fixture(scope="module")
def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, environment):
    """A folder with the same experiment, run with one process and with two."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_tiny(folder / "Tiny", (("train", 7), ("val", 5), ("test", 3)))
    script = folder / "train_net.py"
    script.write_text(WORKER)
    for number in (1, 2):
        line = torchrun(number, script, "--data", data, "--out", folder / str(number))
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\nepoch ") == 2, done.stdout  # one process speaks
    return folder


def saved(runs, number):
    return torch.load(runs / str(number) / "last_train_net.pt", weights_only=True)


def test_two_processes_take_the_steps_of_one(runs):
    one, several = saved(runs, 1), saved(runs, 2)
    for name, expected in one["model"].items():
        # float32 sums in another order, over 8 steps
        torch.testing.assert_close(several["model"][name], expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(one["model"]["body.weight"], engine_start(runs))
    for key in ("train_loss", "val_loss"):
        expected = [row[key] for row in one["history"]]
        assert [row[key] for row in several["history"]] == pytest.approx(expected, rel=1e-4)


def engine_start(runs):
    """The weights of the first convolution before the first step."""
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 8, 3, padding=1).weight


def test_every_image_is_scored_once_whatever_the_number_of_processes(runs, tmp_path, environment):
    script = runs / "score.py"  # beside train_net.py, where engine.load is told to look for the network
    script.write_text("""
import sys
from pathlib import Path
import torch
import engine, util, voc

def main():
    args = cli.arguments("A test.", epochs=1, batch_size=4)
    checkpoint.ROOT = Path(__file__).resolve().parent
    sys.path.insert(0, str(checkpoint.ROOT))
    model = checkpoint.load(checkpoint.ROOT / "1" / "best_train_net.pt")
    _, val, test = voc.loaders(args.data, args.batch_size, 32)
    criterion = torch.nn.CrossEntropyLoss(ignore_index=voc.VOID)
    scores = [vars(engine.evaluate(model, loader, criterion, native)) for loader in (val, test) for native in (0, 1)]
    rank, processes = util.ranks()
    torch.save(scores, args.out / f"{rank}_of_{processes}.pt")

if __name__ == "__main__":
    cli.run(main)
""")
    for number in (1, 3):  # of 2 batches of val and 1 of test, some processes get none
        line = torchrun(number, script, "--data", runs / "Tiny", "--out", tmp_path)
        subprocess.run(line, env=environment, check=True, capture_output=True)
    expected, *others = (torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.pt"), key=by_number))
    assert len(others) == 3 and expected[1]["images"].shape == (5, 3, 21) and expected[1]["matrix"].sum() > 5 * 40 * 40
    for scores in others:
        for score, single in zip(scores, expected):
            assert torch.equal(score["matrix"], single["matrix"])
            assert score["assignment_iou"] == single["assignment_iou"]
            assert score["images"] is single["images"] is None or torch.equal(score["images"], single["images"])
            assert score["loss"] == pytest.approx(single["loss"], rel=1e-9)  # float64 sums in another order


def by_number(path):
    return path.stem.split("_")[::-1]


def test_killing_one_process_ends_the_other_with_a_message(runs, tmp_path, environment):
    line = torchrun(2, runs / "train_net.py", "--data", runs / "Tiny", "--out", tmp_path, "--epochs", 100_000)
    # In one piece: what two processes print at once comes out mixed.
    pid = "import os; os.write(1, f'process {os.environ[\"RANK\"]} {os.getpid()}\\n'.encode());"
    script = tmp_path / "train_net.py"
    endless = (runs / "train_net.py").read_text().replace("patience=9", "patience=100_000")
    script.write_text(pid + endless)
    line[line.index(str(runs / "train_net.py"))] = str(script)
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launch:
        pids = {}
        for text in launch.stdout:
            if text.startswith("process "):
                _, rank, number = text.split()
                pids[rank] = int(number)
            if text.startswith("epoch "):
                break
        assert launch.poll() is None and len(pids) == 2, launch.communicate()
        began = time.monotonic()
        os.kill(pids["1"], signal.SIGKILL)
        _, said = launch.communicate(timeout=60)
        assert time.monotonic() - began < 30 and launch.returncode != 0
    assert "SIGKILL" in said or "exitcode: -9" in said.replace(" ", "").replace("exitcode:-9", "exitcode: -9")
    with pytest.raises(ProcessLookupError):
        os.kill(pids["0"], 0)
    assert checkpoint._read(tmp_path / "last_train_net.pt", "history")["history"]  # whole, and ready to resume


def test_too_few_images_for_the_processes_are_named(tiny, monkeypatch):
    monkeypatch.setattr(voc, "ranks", lambda: (0, 4))
    monkeypatch.setattr(voc, "first_process_first", contextlib.nullcontext)
    with pytest.raises(util.UserError, match="batches of 2 images are too few for 4 processes: raise --batch-size"):
        voc.loaders(tiny, 3, 16)


def test_an_experiment_under_torchrun_leaves_its_files_once(runs, tmp_path, environment):
    line = torchrun(2, ROOT / "train.py", "--data", runs / "Tiny", "--epochs", 1, "--limit", 4, "--out", tmp_path)
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train seed 0: val mean IoU") == 1
    assert len((tmp_path / "results" / "train_seed0.csv").read_text().splitlines()) == 2
    assert len(list((tmp_path / "plots").iterdir())) == 4
