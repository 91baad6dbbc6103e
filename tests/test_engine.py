"""The training loop on a tiny data set at 32x32: the best epoch, metrics, checkpoints, resuming and messages."""

import contextlib
import functools
import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny
from PIL import Image
from tiny_net import TinyNet
from torch.nn import CrossEntropyLoss, functional

import checkpoint
import cli
import engine
import util
import voc
from util import UserError

pytestmark = pytest.mark.usefixtures("tiny_net")

SIZE = 32
SCRIPT = ROOT / "train.py"


def fit(data, out, *, criterion=None, scheduler=None, patience=9, lr=1e-3, plots=False, setup=None, **flags):
    """Run an experiment as a script would and return its metrics.

    ``scheduler(optimizer, model)`` makes the scheduler, ``setup(train)`` may change the training loader.
    """
    defaults = {"script": SCRIPT, "epochs": 2, "batch_size": 3, "seed": 0, "limit": None, "resume": False}
    fixed = {"experiment": "train", "data": str(data), "out": out, "device": torch.device("cpu"), "compile": False}
    args = Namespace(**fixed | defaults | flags)
    util.seed_everything(args.seed)
    train, val, test = voc.loaders(data, args.batch_size, size=SIZE, limit=args.limit, seed=args.seed)
    if setup:
        setup(train)
    model = TinyNet(len(train.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    with pytest.MonkeyPatch.context() as patch:
        if not plots:  # drawing takes longer than all the rest
            patch.setattr(engine, "_draw_plots", lambda *args: None)
        engine.fit(
            args,
            model,
            train,
            val,
            test,
            criterion=criterion or CrossEntropyLoss(ignore_index=voc.VOID),
            optimizer=optimizer,
            scheduler=scheduler(optimizer, model) if scheduler else None,
            patience=patience,
        )
    return json.loads((out / "results" / f"train_seed{args.seed}.json").read_text())


def history(out):
    return (out / "results" / "train_seed0.csv").read_text().splitlines()


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_equal_weights(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four epochs: its data, its folder and its metrics."""
    folder = tmp_path_factory.mktemp("finished")
    data = make_tiny(folder / "Tiny")
    return data, folder / "out", fit(data, folder / "out", epochs=4, plots=True)


def test_a_run_writes_the_documented_files_and_metrics(finished):
    _, out, metrics = finished
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    plots = {f"plots/train_{name}.png" for name in ("curves", "iou", "confusion", "predictions")}
    results = {f"results/train_seed0.{suffix}" for suffix in ("csv", "json")}
    assert written == {"best_train.pt", "last_train.pt"} | results | plots
    head = ["experiment", "dataset", "seed", "device", "epochs", "best_epoch", "parameters", "multiply_adds", "seconds"]
    assert list(metrics) == [*head, "flags", "versions", "val", "test"]
    # 3x3 from 3 to 16 channels, then 1x1 from 16 to 21, at each pixel
    assert metrics["multiply_adds"] == SIZE**2 * (9 * 3 * 16 + 16 * 21)
    assert metrics["flags"] == {"epochs": 4, "batch_size": 3, "limit": None}
    assert (metrics["experiment"], metrics["dataset"], metrics["epochs"]) == ("train", "Tiny", 4)
    for split in ("val", "test"):
        assert list(metrics[split]) == ["loss", "pixel_accuracy", "miou", "iou", "background", "assignment_iou"]
        assert list(metrics[split]["iou"]) == list(voc.CLASSES)
        assert list(metrics[split]["background"]) == ["pixel_accuracy", "miou"]


def test_a_checkpoint_records_its_provenance(finished):
    _, out, metrics = finished
    state = torch.load(out / "best_train.pt", weights_only=True)
    assert state["script"] == SCRIPT.read_text()
    assert (state["experiment"], state["seed"], state["dataset"]) == ("train", 0, "Tiny")
    assert state["flags"]["batch_size"] == 3 and state["classes"] == list(voc.CLASSES)
    assert (state["size"], state["mean"], state["std"]) == (SIZE, list(voc.MEAN), list(voc.STD))
    assert state["versions"]["torch"] == torch.__version__.split("+")[0]
    assert state["epoch"] == metrics["best_epoch"]
    assert state["val_miou"] == float(history(out)[state["epoch"]].split(",")[-1])


def test_the_best_checkpoint_reproduces_the_metrics_exactly_and_evaluation_changes_no_weight(finished):
    data, out, metrics = finished
    model = checkpoint.load(out / "best_train.pt")
    assert model.classes == voc.CLASSES and not model.training
    model.train()  # evaluate has to leave this mode, for dropout and batch norm
    _, val, test = voc.loaders(data, 3, size=SIZE)
    for loader, split in ((val, "val"), (test, "test")):
        scores = engine.evaluate(model, loader, CrossEntropyLoss(ignore_index=voc.VOID))
        assert scores.as_dict() == metrics[split]
    assert metrics["val"]["miou"] != metrics["test"]["miou"]
    assert_equal_weights(model.state_dict(), weights(out / "best_train.pt"))


def test_metrics_equal_those_of_a_plain_loop_at_full_resolution(finished):
    """The oracle evaluates image by image, with PIL and NumPy."""
    data, out, metrics = finished
    model = checkpoint.load(out / "best_train.pt")
    intersection, union, num_correct, num_labelled = np.zeros(21), np.zeros(21), 0, 0
    log_likelihood, num_small = 0.0, 0
    for name in voc.Split(data, "test").ids:
        photo = Image.open(data / "JPEGImages" / f"{name}.jpg").convert("RGB")
        mask = Image.open(data / "SegmentationClass" / f"{name}.png")
        small = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) / 255
        image = ((small - voc.MEAN) / voc.STD).astype(np.float32).transpose(2, 0, 1)[None]
        with torch.no_grad():
            logits = model(torch.tensor(image))
        truth = np.asarray(mask)
        upsampled = functional.interpolate(logits, truth.shape, mode="bilinear", align_corners=False)
        prediction = upsampled[0].argmax(0).numpy()
        labelled = truth != 255
        for c in range(21):
            intersection[c] += (labelled & (truth == c) & (prediction == c)).sum()
            union[c] += (labelled & ((truth == c) | (prediction == c))).sum()
        num_correct += (truth == prediction)[labelled].sum()
        num_labelled += labelled.sum()
        log_probabilities = torch.log_softmax(logits[0].double(), 0).numpy()
        for (y, x), label in np.ndenumerate(np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.NEAREST))):
            if label != 255:
                log_likelihood += log_probabilities[label, y, x]
                num_small += 1
    expected = {voc.CLASSES[c]: intersection[c] / union[c] if union[c] else None for c in range(21)}
    miou = np.mean([value for value in expected.values() if value is not None])
    # a single image is rounded differently from a batch, which may change one pixel of about 7,000
    assert metrics["test"]["iou"] == pytest.approx(expected, abs=1e-3)
    assert metrics["test"]["miou"] == pytest.approx(miou, abs=1e-3)
    assert metrics["test"]["pixel_accuracy"] == pytest.approx(num_correct / num_labelled, abs=1e-3)
    assert metrics["test"]["loss"] == pytest.approx(-log_likelihood / num_small, rel=1e-4)  # float32 sums


def test_baseline_metrics_equal_those_counted_from_the_masks(finished):
    data, _, metrics = finished
    split = voc.Split(data, "val")
    labels = np.concatenate([split.mask(index).ravel() for index in range(len(split))])
    labels = labels[labels != 255]
    share = (labels == 0).mean()
    assert metrics["val"]["background"]["pixel_accuracy"] == pytest.approx(share, rel=1e-12)
    assert metrics["val"]["background"]["miou"] == pytest.approx(share / len(np.unique(labels)), rel=1e-12)


@pytest.mark.parametrize("class_weights", [None, torch.linspace(0.2, 3, 21)])
def test_the_mean_loss_over_batches_equals_the_mean_over_all_pixels(finished, class_weights):
    data, out, _ = finished
    model = checkpoint.load(out / "best_train.pt")
    images, masks, _ = next(voc.loaders(data, 4, size=SIZE)[1].batches())
    masks = masks.clone()
    masks[0, :20] = voc.VOID  # batches of very different weight

    def mean_loss(batch_size):
        loader = voc.loaders(data, batch_size, size=SIZE)[1]
        batches = zip(images.split(batch_size), masks.split(batch_size), torch.arange(4).split(batch_size))
        loader.batches = lambda: batches
        criterion = CrossEntropyLoss(class_weights, ignore_index=voc.VOID)
        return engine.evaluate(model, loader, criterion, full_resolution=False).loss

    with torch.no_grad():
        expected = functional.cross_entropy(model(images), masks, class_weights, ignore_index=255).item()
    assert [mean_loss(batch_size) for batch_size in (1, 3, 4)] == pytest.approx([expected] * 3, rel=1e-5)  # float32


@pytest.mark.parametrize(
    "options", [{}, {"weight": torch.tensor([1.0, 3.0, 0.5])}, {"label_smoothing": 0.1}, {"reduction": "sum"}]
)
def test_the_loss_of_a_batch_is_that_of_the_criterion(options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 6, 5, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    masks = torch.randint(0, 3, (4, 6, 5), generator=generator)
    masks[0, :4], masks[2] = voc.VOID, voc.VOID
    criterion = CrossEntropyLoss(ignore_index=voc.VOID, **options)
    loss, weight = engine.batch_loss(criterion, logits, masks)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = criterion(logits, masks)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    class_weights = options.get("weight", torch.ones(3))
    assert weight == pytest.approx(sum(class_weights[label].item() for label in masks[masks != voc.VOID]))


@pytest.mark.parametrize("class_weights", [None, torch.linspace(1, 2, 21)])
def test_a_batch_without_labelled_pixels_moves_no_weight_and_counts_in_no_mean(tiny, class_weights):
    train, _, _ = voc.loaders(tiny, 2, size=SIZE)
    labelled = next(train.batches(1))
    void = (labelled[0], torch.full_like(labelled[1], voc.VOID), labelled[2])
    criterion = CrossEntropyLoss(class_weights, ignore_index=voc.VOID)

    def new_model():
        torch.manual_seed(0)
        model = TinyNet(21)
        return model, torch.optim.SGD(model.parameters(), lr=1)

    def moved(batch):
        model, optimizer = new_model()
        before = [parameter.clone() for parameter in model.parameters()]
        loss, weight, norm = engine.training_step(model, *batch[:2], criterion, optimizer)
        assert loss.isfinite() and (weight == 0) == (norm == 0)
        return [not torch.equal(*pair) for pair in zip(before, model.parameters())]

    def mean_loss(*batches):
        model, optimizer = new_model()
        train.batches = lambda epoch: iter(batches)
        return engine.train_epoch(model, train, 1, criterion, optimizer)

    assert all(moved(labelled)) and not any(moved(void))
    assert mean_loss(labelled, void) == mean_loss(labelled)
    assert math.isnan(mean_loss(void))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    data, out, metrics = finished
    again = fit(data, tmp_path / "again", epochs=4)
    assert history(tmp_path / "again") == history(out)
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}
    assert_equal_weights(weights(tmp_path / "again" / "last_train.pt"), weights(out / "last_train.pt"))
    other = fit(data, tmp_path / "other", epochs=1, seed=1)
    assert other["val"]["loss"] != fit(data, tmp_path / "one", epochs=1)["val"]["loss"]


def test_a_compiled_network_gives_the_same_run(finished, tmp_path, monkeypatch, capsys):
    data, out, metrics = finished
    # the same operations; generated code rounds differently and takes long to compile
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = fit(data, tmp_path, epochs=4, compile=True)
    assert "torch.compile" in capsys.readouterr().out
    assert {**compiled, "seconds": 0} == {**metrics, "seconds": 0}
    assert history(tmp_path) == history(out)
    assert_equal_weights(weights(tmp_path / "last_train.pt"), weights(out / "last_train.pt"))


def cosine(optimizer, model):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)


class Stop(Exception):
    """Stands for whatever stops a run: Ctrl-C, an error."""


def stop_in_epoch(last):
    """Let the training loader fail after the first batch of epoch ``last``."""

    def setup(train):
        batches = train.batches

        def stopping(epoch=0):
            for batch in batches(epoch):
                yield batch
                if epoch == last:
                    raise Stop

        train.batches = stopping

    return setup


def test_a_stopped_run_keeps_its_files_and_resumes_to_identical_results(tiny, tmp_path, capsys):
    fit(tiny, tmp_path / "complete", epochs=4, scheduler=cosine)
    out = tmp_path / "stopped"
    with pytest.raises(Stop):
        fit(tiny, out, epochs=4, scheduler=cosine, resume=True, setup=stop_in_epoch(3), plots=True)
    output = capsys.readouterr().out
    assert "stopped after epoch 2" in output and "best_train.pt" in output and "--resume" in output
    assert len(history(out)) == 3 and len(list((out / "plots").glob("train_*.png"))) == 4
    assert checkpoint.load(out / "best_train.pt").classes == voc.CLASSES
    fit(tiny, out, epochs=4, scheduler=cosine, resume=True)
    assert history(out) == history(tmp_path / "complete")
    for name in ("best_train.pt", "last_train.pt"):
        assert_equal_weights(weights(out / name), weights(tmp_path / "complete" / name))


def test_a_run_stopped_in_its_first_epoch_keeps_nothing_and_says_so(tiny, tmp_path, capsys):
    with pytest.raises(Stop):
        fit(tiny, tmp_path, setup=stop_in_epoch(1))
    assert "nothing to keep" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.pt"))


def test_a_run_resumes_with_more_epochs_unless_its_schedule_depends_on_them(tiny, tmp_path):
    fit(tiny, tmp_path / "resumed", epochs=1)
    fit(tiny, tmp_path / "resumed", epochs=3, resume=True)
    fit(tiny, tmp_path / "complete", epochs=3)
    assert history(tmp_path / "resumed") == history(tmp_path / "complete")
    fit(tiny, tmp_path / "cosine", epochs=1, scheduler=cosine)
    with pytest.raises(UserError, match="epochs 1, not 3"):
        fit(tiny, tmp_path / "cosine", epochs=3, scheduler=cosine, resume=True)


CODE = SCRIPT.read_text()


@pytest.mark.parametrize(
    ("changed", "first_change"),
    [
        (CODE.replace('"""', '"""Faster. ', 1).replace("scheduler = None", "scheduler = None  # none yet"), None),
        (
            CODE.replace('"""', "# Copyright\n\n", 1)
            .replace('"""', "", 1)
            .replace("import torch\n", "import torch\n\n"),
            None,
        ),
        (CODE.replace('lr": 1e-2', 'lr": 2e-2'), "'lr': 0.01"),
        (
            CODE.replace("augment = None", "augment = True").replace("scheduler = None", "scheduler = 1"),
            "augment = None",
        ),
        (CODE.replace("    weight = None\n", ""), "weight = None"),
        (CODE.replace("    weight = None\n", "    weight = None\n    print(weight)\n"), "print(weight)"),
    ],
)
def test_a_run_resumes_with_other_comments_but_not_with_other_code(tiny, tmp_path, changed, first_change):
    script = tmp_path / "train.py"
    script.write_text(CODE)
    fit(tiny, tmp_path, epochs=1, script=script)
    assert changed != CODE
    script.write_text(changed)
    refusal = pytest.raises(UserError, match="last_train.pt: the script has changed") if first_change else None
    with refusal or contextlib.nullcontext() as error:
        fit(tiny, tmp_path, epochs=2, script=script, resume=True)
    assert len(history(tmp_path)) == (2 if first_change else 3)
    assert not first_change or first_change in str(error.value)


def spoil_after(last):
    """A scheduler that spoils the network at the end of epoch ``last`` and of all after it."""

    def make(optimizer, model):
        state = SimpleNamespace(epoch=0)

        def step():
            state.epoch += 1
            if state.epoch >= last:
                with torch.no_grad():
                    model.classifier.bias.fill_(-1e3)
                    model.classifier.bias[20] = 1e3

        return SimpleNamespace(step=step, state_dict=dict, load_state_dict=lambda state: None)

    return make


def test_the_best_epoch_is_reported_rather_than_the_last(tiny, tmp_path):
    metrics = fit(tiny, tmp_path, epochs=4, scheduler=spoil_after(2))
    mious = [float(row.split(",")[-1]) for row in history(tmp_path)[1:]]
    assert metrics["best_epoch"] == 1 + int(np.argmax(mious)) < 4
    assert mious[3] == 0.0 < metrics["val"]["miou"]  # the spoiled network predicts tvmonitor, which is in no image


def test_early_stopping_waits_for_its_patience(tiny, tmp_path, capsys):
    metrics = fit(tiny, tmp_path, epochs=9, scheduler=spoil_after(1), patience=2)
    assert (metrics["epochs"], metrics["best_epoch"]) == (3, 1)
    assert "no better mean IoU for 2 epochs" in capsys.readouterr().out


def test_the_network_learns(tiny, tmp_path):
    metrics = fit(tiny, tmp_path, epochs=20, lr=3e-2, patience=20)
    losses = [float(row.split(",")[2]) for row in history(tmp_path)[1:]]
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["val"]["miou"] > 1.5 * metrics["val"]["background"]["miou"]


def test_without_a_test_split_results_are_on_val_and_the_log_says_so(tmp_path, capsys):
    data = make_tiny(tmp_path / "Tiny", (("train", 4), ("val", 3)))
    metrics = fit(data, tmp_path / "out", epochs=1)
    assert metrics["test"] is None and metrics["val"]["miou"] is not None
    assert "has no test.txt: the results are on val" in capsys.readouterr().out


def test_the_log_shows_the_all_background_baseline_and_warns_of_results_below_it(tiny, tmp_path, capsys):
    fit(tiny, tmp_path, epochs=1, lr=1e-9)
    output = capsys.readouterr().out
    assert "all-background baseline on val: pixel accuracy" in output
    assert "not above the all-background baseline" in output and "warning: on test" in output


def test_without_a_background_class_the_baseline_is_the_majority_class(tiny, tmp_path, capsys):
    (tiny / "classes.txt").write_text("\n".join(f"class{label}" for label in range(16)))
    fit(tiny, tmp_path / "out", epochs=1)
    assert "all-class0 baseline on val" in capsys.readouterr().out


class Fails(CrossEntropyLoss):
    """Multiplies the loss of one training step by a factor; with ``backward``, only its gradient."""

    def __init__(self, step, factor, backward=False):
        super().__init__(ignore_index=voc.VOID)
        self.steps_left, self.factor, self.backward = step, factor, backward

    def forward(self, logits, masks):
        self.steps_left -= logits.requires_grad
        loss = super().forward(logits, masks)
        if self.steps_left or not logits.requires_grad:
            return loss
        return loss + (loss - loss.detach()) * self.factor if self.backward else loss * self.factor


@pytest.mark.parametrize(
    ("criterion", "batch", "problem"),
    [
        (Fails(3, math.nan), 1, "the loss is nan"),
        (Fails(4, math.inf), 2, "the loss is inf"),
        (Fails(4, 3e38, backward=True), 2, "the gradient is inf"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_keeps_the_best(
    tiny, tmp_path, criterion, batch, problem
):
    message = f"{problem} in epoch 2, batch {batch} of 2.*did not grow"
    with pytest.raises(UserError, match=message) as error:
        fit(tiny, tmp_path, epochs=3, criterion=criterion)
    train = voc.loaders(tiny, 3, size=SIZE)[0]
    _, _, indices = list(train.batches(2))[batch - 1]
    assert f"(images {', '.join(train.split.ids[index] for index in indices)})" in str(error.value)
    for name in ("best", "last"):
        state = torch.load(tmp_path / f"{name}_train.pt", weights_only=True)
        assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())


class Explodes(CrossEntropyLoss):
    steps = 0

    def forward(self, logits, masks):
        self.steps += logits.requires_grad
        return super().forward(logits, masks) * 1e5**self.steps


def test_a_loss_that_grew_before_it_overflowed_suggests_a_lower_learning_rate(tiny, tmp_path):
    message = "the (loss|gradient) is inf in epoch 1, batch [45] of 5.* grew from .*: lower the learning rate"
    with pytest.raises(UserError, match=message):
        fit(tiny, tmp_path, epochs=2, batch_size=1, criterion=Explodes(ignore_index=voc.VOID))


def test_flags_have_the_documented_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = cli.arguments(str(SCRIPT), "An experiment.", epochs=7)
    assert (args.script, args.experiment, args.data) == (SCRIPT, "train", "data/VOCdevkit/VOC2007")
    assert (args.epochs, args.batch_size, args.seed) == (7, 16, 0)
    assert (args.out, args.resume, args.limit, args.compile) == (Path("."), False, None, False)
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert args.device.type == best
