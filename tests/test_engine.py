"""The training loop and its files, on a tiny set at 32x32: what is chosen, kept, resumed and reported."""

import functools
import json
import math
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Evil, make_tiny
from PIL import Image
from tiny_net import TinyNet

import engine
import util
import voc
from util import UserError

pytestmark = pytest.mark.usefixtures("models_of_the_tests")

SIZE = 32


def flags(data, out, **changes):
    defaults = {"data": str(data), "epochs": 2, "batch_size": 3, "seed": 0, "device": torch.device("cpu"), "out": out}
    return Namespace(**defaults | {"resume": False, "limit": None, "compile": False} | changes)


def fit(data, out, *, criterion=None, scheduler=None, patience=9, rate=1e-3, after=None, **changes):
    """Run an experiment as a script would; ``after(train)`` may meddle with the training loader."""
    args = flags(data, out, **changes)
    util.seed_everything(args.seed)
    train, val, test = voc.loaders(data, args.batch_size, SIZE, limit=args.limit, seed=args.seed)
    if after:
        after(train)
    model = TinyNet(len(train.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    engine.fit(
        script=str(ROOT / "train.py"),
        args=args,
        model=model,
        train=train,
        val=val,
        test=test,
        criterion=criterion or torch.nn.CrossEntropyLoss(ignore_index=voc.VOID),
        optimizer=optimizer,
        scheduler=scheduler(optimizer, model) if scheduler else None,
        patience=patience,
    )
    return json.loads((out / "results" / f"train_seed{args.seed}.json").read_text())


def rows(out):
    return (out / "results" / "train_seed0.csv").read_text().splitlines()


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four epochs: its data, its folder and its JSON figures."""
    folder = tmp_path_factory.mktemp("finished")
    data = make_tiny(folder / "Tiny")
    return data, folder / "out", fit(data, folder / "out", epochs=4)


def test_the_files_of_the_contract(finished):
    data, out, figures = finished
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    plots = {f"plots/train_{name}.png" for name in ("curves", "iou", "confusion", "predictions")}
    results = {f"results/train_seed0.{kind}" for kind in ("csv", "json", "npz")}
    assert written == {"best_train.pt", "last_train.pt"} | results | plots
    head = ["experiment", "dataset", "seed", "device", "epochs", "best_epoch", "parameters", "multiply_adds", "seconds"]
    assert list(figures) == [*head, "flags", "versions", "val", "test"]
    # 3x3 from 3 to 16 channels, then 1x1 from 16 to 21, at each pixel
    assert figures["multiply_adds"] == SIZE**2 * (9 * 3 * 16 + 16 * 21)
    assert figures["flags"] == {"epochs": 4, "batch_size": 3, "limit": None}
    assert (figures["experiment"], figures["dataset"], figures["epochs"]) == ("train", "Tiny", 4)
    for split in ("val", "test"):
        assert list(figures[split]) == ["loss", "pixel_accuracy", "miou", "iou", "background", "assignment_iou"]
        assert list(figures[split]["iou"]) == list(voc.CLASSES)
        assert list(figures[split]["background"]) == ["pixel_accuracy", "miou"]


def test_a_checkpoint_tells_where_it_comes_from(finished):
    _, out, figures = finished
    state = torch.load(out / "best_train.pt", weights_only=True)
    assert state["script"] == (ROOT / "train.py").read_text()
    assert (state["experiment"], state["seed"], state["dataset"]) == ("train", 0, "Tiny")
    assert state["flags"]["batch_size"] == 3 and state["classes"] == list(voc.CLASSES)
    assert (state["size"], state["mean"], state["std"]) == (SIZE, list(voc.MEAN), list(voc.STD))
    assert state["versions"]["torch"] == torch.__version__.split("+")[0]
    assert state["epoch"] == figures["best_epoch"]
    assert state["val_miou"] == float(rows(out)[state["epoch"]].split(",")[-1])


def test_the_best_checkpoint_reproduces_the_figures_exactly(finished):
    data, out, figures = finished
    model = checkpoint.load(out / "best_train.pt")
    assert model.classes == voc.CLASSES and not model.training
    _, val, test = voc.loaders(data, 3, model.size)
    criterion = torch.nn.CrossEntropyLoss(ignore_index=voc.VOID)
    for loader, name in ((val, "val"), (test, "test")):
        assert engine.evaluate(model, loader, criterion).as_dict() == figures[name]
    assert figures["val"]["miou"] != figures["test"]["miou"]


def test_the_counts_of_each_image_are_kept(finished):
    """Their sum gives the IoU that is reported, and each row the pixels of its own mask."""
    data, out, figures = finished
    with np.load(out / "results" / "train_seed0.npz") as file:
        counts = {name: file[name] for name in file}
    assert set(counts) == {"val", "test"} and counts["val"].shape == (4, 3, 21) and counts["test"].shape == (3, 3, 21)
    for name, images in counts.items():
        hits, truth, called = images.sum(0)
        with np.errstate(invalid="ignore"):
            iou = hits / (truth + called - hits)
        assert [None if np.isnan(value) else value for value in iou] == list(figures[name]["iou"].values())
        split = voc.Split(data, name)
        for index, image in enumerate(images):
            mask = split.mask(index)
            assert image[1].tolist() == [(mask == label).sum() for label in range(21)]
            assert image[2].sum() == (mask != voc.VOID).sum()


def test_evaluation_is_in_eval_mode_and_changes_nothing(finished):
    data, out, _ = finished
    _, val, _ = voc.loaders(data, 3, SIZE)
    criterion = torch.nn.CrossEntropyLoss(ignore_index=voc.VOID)
    model = checkpoint.load(out / "best_train.pt")
    expected = engine.evaluate(model, val, criterion).as_dict()
    assert engine.evaluate(model.train(), val, criterion).as_dict() == expected  # no dropout, no batch statistics
    assert same(model.state_dict(), weights(out / "best_train.pt"))


def test_figures_are_those_of_a_plain_loop_at_the_masks_own_size(finished):
    """An independent evaluation, image by image with PIL and NumPy, gives what the JSON says."""
    data, out, figures = finished
    model = checkpoint.load(out / "best_train.pt")
    split = voc.Split(data, "test")
    intersection, union, right, total, nll, labelled = np.zeros(21), np.zeros(21), 0, 0, 0.0, 0
    for name in split.ids:
        photo = Image.open(data / "JPEGImages" / f"{name}.jpg").convert("RGB")
        mask = Image.open(data / "SegmentationClass" / f"{name}.png")
        small = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) / 255
        image = ((small - voc.MEAN) / voc.STD).astype(np.float32).transpose(2, 0, 1)[None]
        with torch.no_grad():
            logits = model(torch.tensor(image))
        truth = np.asarray(mask)
        up = torch.nn.functional.interpolate(logits, truth.shape, mode="bilinear", align_corners=False)
        prediction = up[0].argmax(0).numpy()
        counted = truth != 255
        for c in range(21):
            intersection[c] += (counted & (truth == c) & (prediction == c)).sum()
            union[c] += (counted & ((truth == c) | (prediction == c))).sum()
        right += (truth == prediction)[counted].sum()
        total += counted.sum()
        log_probabilities = torch.log_softmax(logits[0].double(), 0).numpy()
        for (y, x), label in np.ndenumerate(np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.NEAREST))):
            if label != 255:
                nll -= log_probabilities[label, y, x]
                labelled += 1
    expected = {voc.CLASSES[c]: intersection[c] / union[c] if union[c] else None for c in range(21)}
    # one pixel of about 7,000 may fall differently, since the batch of the run is rounded in another order
    assert figures["test"]["iou"] == pytest.approx(expected, abs=1e-3)
    assert figures["test"]["miou"] == pytest.approx(np.mean([v for v in expected.values() if v is not None]), abs=1e-3)
    assert figures["test"]["pixel_accuracy"] == pytest.approx(right / total, abs=1e-3)
    assert figures["test"]["loss"] == pytest.approx(nll / labelled, rel=1e-4)  # float32 sums


def test_background_scores_are_those_of_the_split(finished):
    data, _, figures = finished
    split = voc.Split(data, "val")
    truth = np.concatenate([split.mask(index).ravel() for index in range(len(split))])
    truth = truth[truth != 255]
    present = len(np.unique(truth))
    assert figures["val"]["background"]["pixel_accuracy"] == pytest.approx((truth == 0).mean(), rel=1e-12)
    assert figures["val"]["background"]["miou"] == pytest.approx((truth == 0).mean() / present, rel=1e-12)


def test_loss_does_not_depend_on_the_batch_size_even_weighted(finished):
    data, out, _ = finished
    model = checkpoint.load(out / "best_train.pt")
    weight = torch.linspace(0.2, 3, 21)
    for criterion in (
        torch.nn.CrossEntropyLoss(ignore_index=255),
        torch.nn.CrossEntropyLoss(ignore_index=255, weight=weight),
    ):
        losses = [
            engine.evaluate(model, voc.loaders(data, n, SIZE)[1], criterion, full_resolution=False).loss for n in (1, 3, 4)
        ]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)  # float32 means


def test_one_seed_gives_the_same_bytes_and_another_does_not(finished, tmp_path):
    data, out, figures = finished
    again = fit(data, tmp_path / "again", epochs=4)
    assert rows(tmp_path / "again") == rows(out)
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}
    assert same(weights(tmp_path / "again" / "last_train.pt"), weights(out / "last_train.pt"))
    other = fit(data, tmp_path / "other", epochs=4, seed=1)
    assert other["val"]["loss"] != figures["val"]["loss"]


@pytest.mark.parametrize(
    "options", [{}, {"weight": torch.tensor([1.0, 3.0, 0.5])}, {"label_smoothing": 0.1}, {"reduction": "sum"}]
)
def test_the_loss_is_the_criterions_own(options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 6, 5, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    masks = torch.randint(0, 3, (4, 6, 5), generator=generator)
    masks[0, :4], masks[2] = voc.VOID, voc.VOID
    criterion = torch.nn.CrossEntropyLoss(ignore_index=voc.VOID, **options)
    loss, total = engine.batch_loss(criterion, logits, masks)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = criterion(logits, masks)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    weight = options.get("weight", torch.ones(3))
    assert total == pytest.approx(sum(weight[label].item() for label in masks[masks != voc.VOID]))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_that_is_void_all_over_moves_no_weight_and_counts_in_no_mean(tiny, weighted):
    train, _, _ = voc.loaders(tiny, 2, SIZE)
    labelled = next(train.batches(1))
    void = (labelled[0], torch.full_like(labelled[1], voc.VOID))
    criterion = torch.nn.CrossEntropyLoss(torch.linspace(1, 2, 21) if weighted else None, ignore_index=voc.VOID)

    def step(*batches):
        torch.manual_seed(0)
        model = TinyNet(21)
        before = [parameter.clone() for parameter in model.parameters()]
        train.batches = lambda epoch: iter(batches)
        loss = engine.train_epoch(model, train, 1, criterion, torch.optim.SGD(model.parameters(), lr=1))
        return loss, [torch.equal(one, other) for one, other in zip(before, model.parameters())]

    loss, unmoved = step(void)
    assert math.isnan(loss) and all(unmoved)
    loss, unmoved = step(labelled)
    assert not any(unmoved)
    assert step(labelled, void)[0] == loss


def test_compiling_changes_nothing_but_speed(finished, tmp_path, monkeypatch, capsys):
    data, out, figures = finished
    # the same operations without generated code, which would round otherwise and takes minutes to make
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    again = fit(data, tmp_path, epochs=4, compile=True)
    assert "compiled in" in capsys.readouterr().out
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}
    assert rows(tmp_path) == rows(out)
    assert same(weights(tmp_path / "last_train.pt"), weights(out / "last_train.pt"))


def cosine(optimizer, model):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)


class Stop(Exception):
    """Stands for whatever ends a run: Ctrl-C, an error."""


def stop_in_epoch(number):
    """Let the training loader fail after a batch of epoch ``number``."""

    def after(train):
        whole = train.batches

        def batches(epoch=0):
            for batch in whole(epoch):
                yield batch
                if epoch == number:
                    raise Stop

        train.batches = batches

    return after


def test_a_stopped_run_keeps_its_files_and_resumes_to_the_same_bytes(tiny, tmp_path, capsys):
    fit(tiny, tmp_path / "whole", epochs=4, scheduler=cosine)
    out = tmp_path / "stopped"
    with pytest.raises(Stop):
        fit(tiny, out, epochs=4, scheduler=cosine, resume=True, after=stop_in_epoch(3))
    said = capsys.readouterr().out
    assert "stopped after epoch 2" in said and "best_train.pt" in said and "--resume" in said
    assert len(rows(out)) == 3 and len(list((out / "plots").glob("train_*.png"))) == 4
    assert checkpoint.load(out / "best_train.pt").classes == voc.CLASSES
    fit(tiny, out, epochs=4, scheduler=cosine, resume=True)
    assert rows(out) == rows(tmp_path / "whole")
    for name in ("best_train.pt", "last_train.pt"):
        assert same(weights(out / name), weights(tmp_path / "whole" / name))


def test_stopped_before_the_first_epoch_there_is_nothing_and_it_says_so(tiny, tmp_path, capsys):
    with pytest.raises(Stop):
        fit(tiny, tmp_path, after=stop_in_epoch(1))
    assert "nothing to keep" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"seed": 1}, "seed 0, not 1"), ({"batch_size": 2}, "batch_size 3, not 2"), ({"limit": 2}, "limit None, not 2")],
)
def test_resuming_with_other_settings_is_refused(finished, changes, word):
    data, out, _ = finished
    with pytest.raises(UserError, match=word):
        fit(data, out, resume=True, **changes)


def test_more_epochs_continue_a_run_unless_a_schedule_depends_on_them(tiny, tmp_path):
    fit(tiny, tmp_path / "plain", epochs=1)
    fit(tiny, tmp_path / "plain", epochs=3, resume=True)
    fit(tiny, tmp_path / "whole", epochs=3)
    assert rows(tmp_path / "plain") == rows(tmp_path / "whole")
    fit(tiny, tmp_path / "cosine", epochs=1, scheduler=cosine)
    with pytest.raises(UserError, match="epochs 1, not 3"):
        fit(tiny, tmp_path / "cosine", epochs=3, scheduler=cosine, resume=True)


def spoil_after(number):
    """A scheduler that ruins the network at the end of epoch ``number`` and from then on."""

    def make(optimizer, model):
        state = SimpleNamespace(epoch=0)

        def step():
            state.epoch += 1
            if state.epoch >= number:
                with torch.no_grad():
                    model.classifier.bias.fill_(-1e3)
                    model.classifier.bias[20] = 1e3

        return SimpleNamespace(step=step, state_dict=dict, load_state_dict=lambda state: None)

    return make


def test_the_best_epoch_is_reported_not_the_last(tiny, tmp_path):
    figures = fit(tiny, tmp_path, epochs=4, scheduler=spoil_after(2))
    ious = [float(row.split(",")[-1]) for row in rows(tmp_path)[1:]]
    assert figures["best_epoch"] == 1 + int(np.argmax(ious)) < 4
    assert ious[3] == 0.0 < figures["val"]["miou"]  # the spoilt network predicts tvmonitor, which no image shows


def test_early_stopping_waits_for_its_patience(tiny, tmp_path, capsys):
    figures = fit(tiny, tmp_path, epochs=9, scheduler=spoil_after(1), patience=2)
    assert (figures["epochs"], figures["best_epoch"]) == (3, 1)
    assert "no better mean IoU for 2 epochs" in capsys.readouterr().out


def test_the_loss_falls_and_the_network_learns(tmp_path):
    data = make_tiny(tmp_path / "Tiny")
    figures = fit(data, tmp_path / "out", epochs=20, rate=3e-2, patience=20)
    losses = [float(row.split(",")[2]) for row in rows(tmp_path / "out")[1:]]
    assert losses[-1] < 0.5 * losses[0]
    assert figures["val"]["miou"] > 1.5 * figures["val"]["background"]["miou"]


def test_without_a_test_split_val_is_scored_and_that_is_said(tmp_path, capsys):
    data = make_tiny(tmp_path / "Tiny", (("train", 4), ("val", 3)))
    figures = fit(data, tmp_path / "out", epochs=1)
    assert figures["test"] is None and figures["val"]["miou"] is not None
    assert "has no test.txt: the final scores are on val" in capsys.readouterr().out


def test_the_score_to_beat_is_shown_and_a_warning_while_it_is_not_beaten(tiny, tmp_path, capsys):
    fit(tiny, tmp_path, epochs=1, scheduler=None, rate=1e-9)
    said = capsys.readouterr().out
    assert "the score to beat, background everywhere" in said
    assert "no better than all background" in said and "warning: on test" in said


def test_data_without_a_background_class_is_held_against_its_commonest(tmp_path, capsys):
    data = make_tiny(tmp_path / "Tiny")
    (data / "classes.txt").write_text("\n".join(f"class{k}" for k in range(16)))
    fit(data, tmp_path / "out", epochs=1)
    assert "the score to beat, class0 everywhere" in capsys.readouterr().out


class Fails(torch.nn.CrossEntropyLoss):
    """Gives the loss of one training step a factor; with ``backward``, only its gradient."""

    def __init__(self, step, factor, backward=False):
        super().__init__(ignore_index=voc.VOID)
        self.left, self.factor, self.backward = step, factor, backward

    def forward(self, logits, masks):
        self.left -= logits.requires_grad
        loss = super().forward(logits, masks)
        if self.left or not logits.requires_grad:
            return loss
        return loss + (loss - loss.detach()) * self.factor if self.backward else loss * self.factor


@pytest.mark.parametrize(
    "criterion, words",
    [
        (Fails(3, math.nan), "the loss is nan in epoch 2, batch 1 of 2"),
        (Fails(4, math.inf), "the loss is inf in epoch 2, batch 2 of 2"),
        (Fails(4, 3e38, backward=True), "the gradient is inf in epoch 2, batch 2 of 2"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_keeps_the_best(tiny, tmp_path, criterion, words):
    with pytest.raises(UserError, match=words + ".*did not grow") as error:
        fit(tiny, tmp_path, epochs=3, criterion=criterion)
    train = voc.loaders(tiny, 3, SIZE)[0]
    batch = int(words.split("batch ")[1][0]) - 1
    assert f"(images {', '.join(train.split.ids[place] for place in train.order(2)[0][batch])})" in str(error.value)
    for name in ("best", "last"):
        state = torch.load(tmp_path / f"{name}_train.pt", weights_only=True)
        assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4


class Explodes(torch.nn.CrossEntropyLoss):
    steps = 0

    def forward(self, logits, masks):
        self.steps += logits.requires_grad
        return super().forward(logits, masks) * 1e5**self.steps


def test_a_loss_that_explodes_is_told_apart_from_bad_data(tiny, tmp_path):
    with pytest.raises(
        UserError,
        match="the (loss|gradient) is inf in epoch 1, batch [45] of 5.* grew from .*: lower the learning rate",
    ):
        fit(tiny, tmp_path, epochs=2, batch_size=1, criterion=Explodes(ignore_index=voc.VOID))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state: Evil(), "no readable checkpoint"),
        (lambda state: [1, 2], "not written by this project"),
        (lambda state: {**state, "module": "os"}, "not in"),
        (lambda state: {**state, "module": "../util"}, "not in"),
        (lambda state: {**state, "module": "util", "class": "run"}, "not in"),
        (lambda state: {**state, "arguments": {"num_classes": 5}}, "does not fit"),
        (lambda state: {**state, "arguments": {"other": 5}}, "does not fit"),
    ],
)
def test_a_strange_checkpoint_is_refused_and_runs_no_code(finished, tmp_path, change, word):
    _, out, _ = finished
    state = change(torch.load(out / "best_train.pt", weights_only=True))
    torch.save(state, tmp_path / "strange.pt")
    with pytest.raises(UserError, match=word) as error:
        checkpoint.load(tmp_path / "strange.pt")
    assert "strange.pt" in str(error.value) and "\n" not in str(error.value) and not hasattr(checkpoint, "ran")


@pytest.mark.parametrize(("content", "word"), [(b"", "readable"), (b"text", "readable"), (None, "no such file")])
def test_what_is_no_checkpoint_is_named(tmp_path, content, word):
    if content is not None:
        (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=f"a.pt: .*{word}"):
        checkpoint.load(tmp_path / "a.pt")


def test_a_torn_checkpoint_is_named(finished, tmp_path):
    _, out, _ = finished
    content = (out / "best_train.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="torn.pt: is no readable checkpoint"):
        checkpoint.load(tmp_path / "torn.pt")


def test_flags_and_their_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = cli.arguments("An experiment.", epochs=7)
    assert (args.data, args.epochs, args.batch_size, args.seed) == ("data/VOCdevkit/VOC2007", 7, 16, 0)
    assert (str(args.out), args.resume, args.limit) == (".", False, None)
    assert args.device.type == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
