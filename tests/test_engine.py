"""The training loop on a tiny data set at 32x32: metrics, best epoch, early stopping, resuming, plots and messages."""

import ast
import base64
import copy
import functools
import io
import math
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DEVICES, ROOT, make_loaders, make_tiny, results
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from tiny_net import TinyNet
from torch.nn import CrossEntropyLoss, functional
from torch.optim import lr_scheduler

import util
import voc
from seg import checkpoint, cli, distributed, engine, imaging, inference, plotting, report
from seg.run import Run
from seg.voc_layout import CLASSES
from util import UserError

pytestmark = pytest.mark.usefixtures("tiny_net")

SIZE = 32
SCRIPT = ROOT / "train.py"
CRITERION = CrossEntropyLoss(ignore_index=util.VOID)


def fit(data, out, flags="", *, criterion=CRITERION, scheduler=None, lr=1e-3, change=None, **options):
    """Run an experiment as a script would; return its Run. ``change(epoch, step, *batch)`` changes a batch."""
    flags = ["train.py", "--data", str(data), "--out", str(out), "--device", "cpu", *flags.split()]
    with mock.patch("sys.argv", flags):
        args = cli.arguments(SCRIPT, "A title: an explanation.", epochs=2, batch_size=3)
    util.seed_everything(args.seed)
    train, val, test = voc.loaders(args, size=SIZE)
    if change:
        batches = train.batches
        train.batches = lambda epoch=0: (change(epoch, step, *batch) for step, batch in enumerate(batches(epoch)))
    model = TinyNet(len(train.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = scheduler and scheduler(optimizer)
    engine.fit(args, model, train, val, test, criterion=criterion, optimizer=optimizer, scheduler=scheduler, **options)
    return Run.read(out / "results" / "train_seed0.json")


def mislabel(epoch, step, images, masks, indices):
    """From epoch 3 on, let all masks show tvmonitor, which is in no image of val."""
    return images, masks if epoch < 3 else torch.full_like(masks, 20), indices


def train_nine_epochs(data, out, flags="", **options):
    """A run that improves for two epochs of nine."""
    return fit(data, out, f"--epochs 9 {flags}", lr=0.1, change=mislabel, **{"patience": 2, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose last epoch is not its best: its data, its Run, and what its plot of predictions shows."""
    folder = tmp_path_factory.mktemp("finished")
    data = make_tiny(folder / "Tiny")
    return data, train_nine_epochs(data, folder / "out"), plotting.predictions.call_args.args[3]


def test_a_run_writes_the_documented_files_metrics_and_provenance(finished):
    _, run, _ = finished
    written = {str(path.relative_to(run.out)) for path in run.out.rglob("*") if path.is_file()}
    plots = {f"plots/train_{name}.png" for name in ("curves", "iou", "confusion", "predictions")}
    others = {"results/train_seed0.csv", "results/train_seed0.json", "plots/train_report.html", ".train.lock"}
    assert written == {"best_train.pt", "last_train.pt"} | others | plots
    metrics, state = run.metrics, torch.load(run.best, weights_only=True)
    keys = "experiment title dataset seed device loss network parameters flags defaults classes size data_sha256 code"
    keys += " optimizer_class scheduler_class tiles commit versions epochs best_epoch seconds epoch_seconds val test"
    assert metrics.keys() == set(keys.split())
    assert [metrics[key] for key in ("experiment", "title", "dataset", "seed")] == ["train", "A title", "Tiny", 0]
    assert metrics["flags"] == {"epochs": 9, "batch_size": 3, "limit": None}
    # a bias each: 3x3 from 3 to 16 channels, 1x1 from 16 to 21; batch norm
    assert metrics["parameters"] == (9 * 3 + 1) * 16 + (16 + 1) * 21 + 2 * 16
    for split in ("val", "test"):
        assert list(metrics[split]) == ["loss", "pixel_accuracy", "miou", "iou", "background", "assignment_iou"]
        assert tuple(metrics[split]["iou"]) == tuple(state["classes"]) == CLASSES
    ((epoch, code),) = [version.values() for version in state["code"]]
    assert epoch == 1 and next(iter(code)) == "train.py" and {"basic_fcn.py", "util.py", "voc.py"} < code.keys()
    assert not [name for name in code if name.startswith(("seg/", "tests/", ".venv"))]
    assert all((ROOT / name).read_text() == text for name, text in code.items()) and code == metrics["code"][0]["files"]
    assert (state["module"], state["class"], state["arguments"]["num_classes"]) == ("tiny_net", "TinyNet", 21)
    assert (state["size"], state["mean"], state["std"]) == ([SIZE, SIZE], list(imaging.MEAN), list(imaging.STD))
    assert state["versions"]["torch"] == torch.__version__
    assert state["val_miou"] == run.history[state["epoch"] - 1]["val_miou"]


def test_the_best_epoch_is_reported_and_the_run_stops_after_its_patience(finished):
    data, run, _ = finished
    mious, losses = ([row[name] for row in run.history] for name in ("val_miou", "val_loss"))
    best_epoch = 1 + int(np.argmax(mious))
    assert run.metrics["best_epoch"] == best_epoch
    assert len(mious) == max(best_epoch, 1 + int(np.argmin(losses))) + 2 < 9
    best, last = map(checkpoint.load, (run.best, run.last))
    assert best.classes == CLASSES and not best.training
    weights = copy.deepcopy(best.state_dict())
    best.train()  # evaluate has to leave this mode, for dropout and batch norm
    for split, loader in zip(("val", "test"), make_loaders(data, 3, size=SIZE)[1:]):
        best_scores, last_scores = (engine.evaluate(model, loader, CRITERION).as_dict() for model in (best, last))
        assert best_scores == run.metrics[split] != last_scores
    assert run.metrics["val"]["miou"] != run.metrics["test"]["miou"]
    torch.testing.assert_close(best.state_dict(), weights, rtol=0, atol=0)


def test_the_program_of_metrics_md_scores_a_checkpoint(finished, tmp_path, monkeypatch, capsys):
    data, run, _ = finished
    (tmp_path / "MyData").symlink_to(data)
    shutil.copy(run.best, tmp_path)
    monkeypatch.chdir(tmp_path)
    document = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    exec(re.search("```python\n(.*?)```", document, re.DOTALL)[1], {})
    assert ast.literal_eval(capsys.readouterr().out) == run.metrics["test"]


@pytest.mark.parametrize("strip_size", [inference.STRIP_SIZE, 21 * 60 * 20])  # whole masks; 20 columns
def test_metrics_equal_those_of_a_plain_loop_at_full_resolution(finished, monkeypatch, strip_size):
    """The oracle evaluates image by image, with PIL and scikit-learn."""
    data, run, _ = finished
    model = checkpoint.load(run.best)
    model.network.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(0))  # predicts many classes
    labels, losses = [], []
    for name in voc.Split(data, "test").ids:
        photo = Image.open(data / "JPEGImages" / f"{name}.jpg").convert("RGB")
        mask = Image.open(data / "SegmentationClass" / f"{name}.png")
        small_mask = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.NEAREST)).astype(int)
        image = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) / 255
        image = torch.tensor((image - imaging.MEAN) / imaging.STD).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            logits = model(image)
        truth = torch.tensor(small_mask)[None]
        losses.append(functional.cross_entropy(logits, truth, ignore_index=255, reduction="none"))
        upsampled = functional.interpolate(logits, mask.size[::-1], mode="bilinear", align_corners=False)
        labels += zip(np.asarray(mask).ravel(), upsampled[0].argmax(0).flatten().tolist())
    truth, prediction = np.array([pair for pair in labels if pair[0] != 255]).T
    occurring, share = np.union1d(truth, prediction), (truth == 0).mean()
    ious = jaccard_score(truth, prediction, labels=occurring, average=None)
    monkeypatch.setattr(inference, "STRIP_SIZE", strip_size)
    metrics = engine.evaluate(model, make_loaders(data, 3, size=SIZE)[2], CRITERION).as_dict()
    # a single image is rounded differently from a batch, which may change one pixel of about 7,000
    expected = dict.fromkeys(CLASSES) | {CLASSES[label]: iou for label, iou in zip(occurring, ious)}
    assert metrics["iou"] == pytest.approx(expected, abs=1e-3) and len(occurring) > 6
    assert metrics["miou"] == pytest.approx(ious.mean(), abs=1e-3)
    assert metrics["pixel_accuracy"] == pytest.approx((truth == prediction).mean(), abs=1e-3)
    losses = torch.cat(losses)
    assert metrics["loss"] == pytest.approx(losses[losses > 0].mean().item(), rel=1e-4)  # void has 0
    assert metrics["background"] == pytest.approx({"pixel_accuracy": share, "miou": share / len(np.unique(truth))})


def test_each_image_is_scored_by_itself_and_the_best_median_and_worst_are_shown(finished):
    """Oracle of an image's score: scikit-learn."""
    data, run, drawn = finished
    model, val = checkpoint.load(run.best), make_loaders(data, 3, size=SIZE)[1]
    predictions, expected = [], []
    for index in range(len(val.split)):
        mask = val.split.mask(index)
        predictions.append(inference.predict_index(model, val, index, mask.shape))
        truth, prediction = (labels[mask != util.VOID] for labels in (mask, predictions[-1]))
        expected.append(jaccard_score(truth, prediction, labels=np.union1d(truth, prediction), average=None).mean())
    assert engine.evaluate(model, val, CRITERION).image_ious.tolist() == pytest.approx(expected, abs=1e-12)
    assert engine.evaluate(model, val, CRITERION, full_resolution=False).image_ious is None
    names = list(val.split.ids)  # all are shown, as there are fewer than five
    for rank, index in zip(("worst", "median", "best"), np.argsort(expected)[[0, len(names) // 2, -1]]):
        names[index] += f", {rank}"
    names = [f"{name}\nmean IoU {iou:.2f}" for name, iou in zip(names, expected)]
    assert [sample[0] for sample in drawn] == names
    assert all(np.array_equal(sample[3], prediction) for sample, prediction in zip(drawn, predictions, strict=True))
    pictures = re.findall('image/png;base64,(iVBOR[^"]+)"', run.report.read_text(encoding="utf-8"))
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))) for picture in pictures]
    assert all(any(np.array_equal(picture, each) for picture in pictures) for each in predictions)


@DEVICES
def test_bfloat16_is_used_where_it_is_fast_but_not_for_final_metrics_and_the_loss(tiny, monkeypatch, device):
    """Oracle: the network in bfloat16 throughout, on the CPU; autocast differs from it in batch norm and sums only."""
    monkeypatch.setattr(distributed, "has_bfloat16", lambda device: True)
    torch.manual_seed(0)
    network, val = TinyNet(21).eval(), make_loaders(tiny, 4, size=SIZE, device=device)[1]
    images, masks, _ = (tensor.cpu() for tensor in next(val.batches()))
    plain = copy.deepcopy(network)
    network.to(device)
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    final, fast = (engine.evaluate(network, val, CRITERION, full).loss for full in (True, False))
    with torch.no_grad():
        exact = CRITERION(plain(images), masks).item()
        rough = CRITERION(plain.bfloat16()(images.bfloat16()).float(), masks).item()
    assert final == pytest.approx(exact, rel=1e-6)
    factor = 1 if device == "cpu" else 5  # kernels of a GPU round at other places
    assert abs(rough - exact) / 4 / factor < abs(fast - exact) < 2 * factor * abs(rough - exact)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs the settings of torch 2.9")
@DEVICES
def test_final_metrics_do_without_tf32(tiny, device):
    """On GPUs since Ampere, it is cuDNN's default. Settings can still be read, as torch.compile does."""
    network, val = TinyNet(21).to(device), make_loaders(tiny, 4, size=SIZE, device=device)[1]
    cudnn, seen = torch.backends.cudnn, []
    network.register_forward_hook(lambda *_: seen.append((cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)))
    torch.set_float32_matmul_precision("high")  # as scripts do
    cudnn.allow_tf32 = True
    engine.evaluate(network, val, CRITERION)
    torch.set_float32_matmul_precision("highest")
    assert seen == [(False, True)]


@pytest.mark.parametrize("class_weights", [None, torch.linspace(1, 2, 21), torch.arange(21.0)])
def test_a_batch_without_labelled_pixels_moves_no_weight(tiny, class_weights):
    images, masks, _ = next(make_loaders(tiny, 2, size=SIZE)[0].batches(1))
    criterion = CrossEntropyLoss(class_weights, ignore_index=util.VOID)
    model = TinyNet(21)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)

    def moved(masks):
        before = [parameter.clone() for parameter in model.parameters()]
        loss, weight, norm, _ = engine.training_step(model, images, masks, criterion, optimizer)
        assert loss.isfinite() and (weight == 0) == (norm == 0)
        return [not torch.equal(*pair) for pair in zip(before, model.parameters())]

    assert not any(moved(torch.full_like(masks, util.VOID)))
    assert all(moved(masks))


@pytest.mark.parametrize("is_labelled", [True, False])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("num_classes", [2, 11, 21])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_loss_and_gradients_of_a_batch_equal_those_of_plain_pytorch(
    float32, memory_format, num_classes, is_weighted, is_labelled
):
    """Oracle: the network and the loss in float64. A transposed convolution with a bias, as in three experiments."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.ConvTranspose2d(8, 8, 2, stride=2), torch.nn.ReLU()
    network = torch.nn.Sequential(*layers, torch.nn.Conv2d(8, num_classes, 1))
    plain = copy.deepcopy(network).double()
    network.to(memory_format=memory_format)
    images = torch.randn(3, 3, 24, 32).contiguous(memory_format=memory_format)
    masks = torch.randint(num_classes, (3, 24, 32))
    masks[:, :5] = masks[0] = util.VOID
    if not is_labelled:
        masks[:] = util.VOID
    class_weights = torch.linspace(0.2, 3, num_classes) if is_weighted else None

    criterion = CrossEntropyLoss(class_weights, ignore_index=util.VOID)
    loss, weight = engine.batch_loss(criterion, inference.forward(network, images)["out"], masks)
    engine.backward(network, loss, weight)
    each_weight = (torch.ones(num_classes) if class_weights is None else class_weights).double()
    expected_weight = each_weight[masks[masks != util.VOID]].sum().item()
    logits = plain(images.double())
    expected = functional.cross_entropy(logits, masks, each_weight, ignore_index=util.VOID, reduction="sum")
    (expected / (expected_weight or 1)).backward()

    assert weight.item() == pytest.approx(expected_weight, rel=1e-6)
    assert loss.item() == pytest.approx(expected.item() / expected_weight, rel=1e-6) if is_labelled else loss.isfinite()
    gradients, expected_gradients = ([each.grad.double() for each in net.parameters()] for net in (network, plain))
    # sums of 1,900 float32 numbers of about the gradients' size, which differ in order
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"weight": torch.linspace(0.2, 3, 21)}, {"label_smoothing": 0.1}])
def test_training_equals_a_plain_loop(tiny, float32, options):
    """The optimizer holds a part of the network: gradients of the others must not add up, and count in the norm."""
    criterion, class_weights = CrossEntropyLoss(ignore_index=255, **options), options.get("weight", torch.ones(21))
    norms, expected_norms = [], []
    train, network = make_loaders(tiny, 2, size=SIZE)[0], TinyNet(21, norm=False)  # without dropout
    plain = copy.deepcopy(network)
    optimizer, plain_optimizer = (torch.optim.SGD(each.classifier.parameters(), lr=0.1) for each in (network, plain))

    def step(*args, **options):
        loss, weight, norm, logits = engine.training_step(*args, **options)
        norms.append(norm.item())
        return loss, weight, norm, logits

    for epoch in (1, 2):
        scores, rates = engine.train_epoch(network, train, epoch, criterion, optimizer, step)
        losses, weights, matrix = [], [], np.zeros((21, 21))
        for images, masks, _ in train.batches(epoch):
            plain.zero_grad()
            logits = plain(images)
            loss = functional.cross_entropy(logits, masks, ignore_index=255, **options)
            loss.backward()
            plain_optimizer.step()
            expected_norms.append(math.sqrt(sum(each.grad.square().sum() for each in plain.parameters())))
            losses.append(loss.item())
            weights.append(class_weights[masks[masks != 255]].sum())
            truth, prediction = (each[:, ::4, ::4].flatten() for each in (masks, logits.argmax(1)))
            matrix += confusion_matrix(truth[truth != 255], prediction[truth != 255], labels=range(21))
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
    assert scores.loss == pytest.approx(np.average(losses, weights=weights), rel=1e-4)
    assert np.abs(scores.matrix.numpy() - matrix).sum() <= 2 < matrix.sum()  # logits may be equal but for rounding
    assert rates == [[0.1]] * len(train)


@DEVICES
def test_the_network_learns_with_the_loss_in_eval_mode_on_val(tiny, tmp_path, device):
    class Recorder(CrossEntropyLoss):
        def forward(self, logits, masks):
            modes.add((self.training, logits.requires_grad))
            return super().forward(logits, masks)

    modes = set()
    run = fit(tiny, tmp_path, f"--epochs 20 --device {device}", lr=3e-2, criterion=Recorder(ignore_index=util.VOID))
    assert run.history[-1]["train_loss"] < 0.5 * run.history[0]["train_loss"]
    assert run.metrics["val"]["miou"] > 1.5 * run.metrics["val"]["background"]["miou"]
    assert modes == {(True, True), (False, False)}


def test_the_same_seed_gives_the_same_run_compiled_or_not(finished, tmp_path, monkeypatch):
    # the same operations; generated code rounds differently and takes long to compile
    compile = mock.Mock(wraps=functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", compile)
    data, run, _ = finished
    assert results(train_nine_epochs(data, tmp_path, "--compile").out) == results(run.out)
    assert compile.called


@DEVICES
@pytest.mark.parametrize(
    ("stop", "done", "message"),
    [(KeyboardInterrupt, 2, "stopped after epoch 2; kept "), (SystemExit, 0, "there is nothing to keep")],
)
def test_a_stopped_run_keeps_its_files_and_resumes_to_identical_results(
    tiny, tmp_path, capsys, stop, done, message, device
):
    def change(epoch, step, *batch):
        if (epoch, step) == (done + 1, 1):
            raise stop
        return batch

    cosine, out = functools.partial(lr_scheduler.CosineAnnealingLR, T_max=4), tmp_path / "stopped"
    flags = f"--epochs 4 --device {device}"
    with pytest.raises(stop):
        fit(tiny, out, f"{flags} --resume", scheduler=cosine, change=change)
    output = capsys.readouterr().out
    assert "nothing to resume: starting" in output and message in output
    assert (": the same command continues\n" in output) == (done == 2)  # which has --resume already
    assert (len(list(out.glob("*.pt"))), len(list(out.glob("plots/*.png")))) == ((2, 1) if done else (0, 0))
    resumed, following = fit(tiny, out, f"{flags} --resume", scheduler=cosine), torch.rand(3)
    assert (f"continuing {resumed.last} after epoch 2" in capsys.readouterr().out) == (done == 2)
    complete = fit(tiny, tmp_path / "complete", flags, scheduler=cosine)
    assert torch.equal(torch.rand(3), following)  # what follows in a script does not depend on --resume either
    if device == "cpu":
        assert results(resumed.out) == results(complete.out)
    else:  # some sums have no fixed order: 1e-6 on average if gradients change as much as bfloat16 rounds them,
        # and 1e-3, 5e-4 and 8e-5 without the state of the optimizer, of the scheduler and with other random numbers
        states = [torch.load(run.last, weights_only=True, map_location="cpu")["model"] for run in (resumed, complete)]
        first, second = (torch.cat([value.flatten() for value in state.values()]) for state in states)
        assert (first - second).abs().mean() < 1e-5


@pytest.mark.parametrize(
    ("options", "line", "factor"),
    [
        ({}, "constant learning rate; stopping early after 2 epochs without progress on val", 1),
        ({"patience": None}, "constant learning rate; no early stopping", 1),
        ({"scheduler_interval": "epoch"}, "the scheduler is stepped once per epoch; no early stopping", 1 / 2),
        ({"scheduler_interval": "batch"}, "the scheduler is stepped once per batch; no early stopping", 1 / 4),
    ],
)
def test_early_stopping_is_for_runs_without_a_scheduler(tiny, tmp_path, capsys, options, line, factor):
    """The learning rate is halved after each of an epoch's two batches, after each epoch, or never."""
    if "scheduler_interval" in options:
        options = options | {"patience": 1, "scheduler": functools.partial(lr_scheduler.ExponentialLR, gamma=0.5)}
    run = train_nine_epochs(tiny, tmp_path, **options)
    output = capsys.readouterr().out.splitlines()
    assert line in output
    assert (len(run.history) < 9) == (not options) == ("no progress on val for 2 epochs: stopping early" in output)
    rates = [row["learning_rate"] for row in run.history]
    assert rates == pytest.approx([0.1 * factor**epoch for epoch in range(len(rates))])


def rows(*values):
    names = ("val_miou", "val_loss", "train_loss")
    return [dict(zip(names, row), epoch=epoch) for epoch, row in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (rows((0.3, 3, 3), (0.2, 4, 2), (0.2, 4, 1)), 2),  # neither is better
        (rows((0.3, 3, 3), (0.2, 2, 2), (0.2, 4, 1)), 1),  # the loss is
        (rows((0.03, 3, 3), (0.02, 4, 2), (0.02, 4, 1)), 0),  # still at the baseline, and learning
        (rows((0.03, 3, 1), (0.02, 4, 2), (0.02, 4, 2)), 2),  # at the baseline, but not learning
    ],
)
def test_progress_is_a_better_metric_or_loss_and_below_the_baseline_any_lower_loss(history, expected):
    assert engine.epochs_without_progress(history, baseline_miou=0.035) == expected


def test_the_best_epoch_of_a_tie_has_the_lower_val_loss():
    run = Run(Path(), "train", 0)
    run.history = rows((0.1, 3, 1), (0.3, 2, 1), (0.3, 1.5, 1), (0.3, 1.7, 1), (0.2, 1, 1))
    assert run.best_row["epoch"] == 3


@pytest.mark.parametrize("name", ["classes", "mean", "std"])
def test_a_model_is_not_used_on_data_with_other_classes_or_another_normalisation(tiny, name):
    loader = make_loaders(tiny, 2, size=SIZE)[1]
    model = checkpoint.TrainedModel(TinyNet(21), loader.classes, (SIZE, SIZE), loader.mean, loader.std)
    setattr(model, name, getattr(model, name)[::-1])
    message = "classes of .*Tiny or their order" if name == "classes" else "mean or std"
    for function, *args in ((engine.evaluate, CRITERION), (inference.predict_index, 0, (9, 9))):
        with pytest.raises(UserError, match=message):
            function(model, loader, *args)


def test_the_log_warns_of_results_below_the_baseline_and_of_a_missing_test_split(tmp_path, capsys):
    data = make_tiny(tmp_path / "Tiny", (("train", 4), ("val", 3)))
    run = fit(data, tmp_path, "--epochs 1", lr=1e-9)
    assert run.metrics["test"] is None and run.metrics["val"]["miou"] is not None
    output = capsys.readouterr().out
    assert "there is no test split: the results are on val" in output
    assert "all-background baseline on val: pixel accuracy" in output
    assert "not above the all-background baseline" in output and "warning: on val" in output


@pytest.mark.parametrize(
    ("factors", "message"),
    [((math.nan, 1), "the loss is nan"), ((math.inf, 1), "the loss is inf"), ((1, math.inf), "the gradient is inf")],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_keeps_the_best(
    tiny, tmp_path, capsys, factors, message
):
    steps = iter(range(1, 11))

    def step(*args, **options):
        loss, weight, norm, logits = engine.training_step(*args, **options)
        loss_factor, norm_factor = factors if next(steps) == 8 else (1, 1)
        return loss * loss_factor, weight, norm * norm_factor, logits

    with pytest.raises(UserError) as error:
        fit(tiny, tmp_path, "--epochs 3 --batch-size 1", training_step=step)
    train = make_loaders(tiny, 1, size=SIZE)[0]
    _, _, (index,) = list(train.batches(2))[2]
    expected = f"{message} in epoch 2, batch 3 of 5 (images {train.split.ids[index]})"
    expected += ": lower the learning rate and start again if"
    assert str(error.value).startswith(expected)
    states = [torch.load(tmp_path / f"{name}_train.pt", weights_only=True) for name in ("best", "last")]
    assert [state["epoch"] for state in states] == [1, 1]
    output = capsys.readouterr().out
    assert f"kept {tmp_path / 'best_train.pt'} and {tmp_path / 'last_train.pt'}\n" in output  # no advice to resume


@pytest.mark.parametrize(
    ("doc", "title"), [("U-Net: a network.\n", "U-Net"), ("A 1.5x wider net.", "A 1.5x wider net"), ("A\nb", "A")]
)
def test_flags_have_the_documented_defaults_and_a_title_is_the_begin_of_the_docstring(monkeypatch, doc, title):
    monkeypatch.setattr("sys.argv", ["train.py"])
    expected = {"script": SCRIPT, "experiment": "train", "data": "data/VOCdevkit/VOC2007", "out": Path(".")}
    expected |= {"epochs": 7, "batch_size": 4, "seed": 0, "device": cli.parse_device("auto")}
    expected |= {"resume": False, "overwrite": False, "limit": None, "compile": False}
    expected |= {"defaults": {"epochs": 7, "batch_size": 4}, "title": title}
    assert vars(cli.arguments(str(SCRIPT), doc, epochs=7, batch_size=4)) == expected


def test_a_script_has_flags_of_its_own_of_the_type_of_their_default():
    own = {"max_lr": 0.1, "steps": 3, "mode": "a", "flip": True, "mixup": False}
    options = {"epochs": 7, "batch_size": 4, **own}
    args = cli.arguments("cells", "A try", **options, argv=[])
    assert own.items() <= vars(args).items() and args.defaults == options
    flags = "--max-lr 1e-4 --steps 5 --mode b --no-flip --mixup".split()
    expected = {"max_lr": 1e-4, "steps": 5, "mode": "b", "flip": False, "mixup": True, "experiment": "cells"}
    assert expected.items() <= vars(cli.arguments("cells", "A try", **options, argv=flags)).items()
    for flags in (["--max-lr", "high"], ["--steps", "1.5"], ["--lr", "1"]):
        with pytest.raises(UserError, match=flags[0]):
            cli.arguments("cells", "A try", **options, argv=flags)


@pytest.mark.parametrize(
    ("num_classes", "size", "shape"),
    [(60, (32, 24), (500, 700)), (5, (7, 9), (61, 83)), (21, (14, 14), (60, 9000)), (21, (64, 40), (9000, 60))],
)
@pytest.mark.parametrize("ties", [False, True])
def test_prediction_in_strips_equals_that_of_the_whole_upsampled_logits(num_classes, size, shape, ties):
    logits = torch.randn(num_classes, *size, generator=torch.Generator().manual_seed(0))
    logits += torch.linspace(-2, 2, num_classes).view(-1, 1, 1)  # some classes are nowhere the largest
    logits = logits.round() if ties else logits
    expected = functional.interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0].argmax(0)
    mask = inference.predict_image(torch.nn.Identity(), logits[None], shape)
    assert torch.equal(torch.from_numpy(mask), expected.byte())
    strips = list(inference.predict_strips(logits, shape))
    assert len(strips) == -(-num_classes * shape[0] * shape[1] // inference.STRIP_SIZE)
    assert max(prediction.numel() for _, prediction in strips) * num_classes < 1.1 * inference.STRIP_SIZE


def test_plots_are_drawn_once_a_minute_and_at_the_end(tiny, tmp_path, monkeypatch):
    """A clock of our own: an epoch takes 25 s, drawing 10 s."""
    now, drawn = [0.0], {"curves": [], "predictions": []}

    def change(epoch, step, *batch):
        now[0] += 12.5
        return batch

    def curves(path, title, history, *args):
        drawn["curves"].append(len(history))
        now[0] += 10

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(plotting, "curves", curves)
    monkeypatch.setattr(plotting, "predictions", lambda *args: drawn["predictions"].append(drawn["curves"][-1]))
    fit(tiny, tmp_path, "--epochs 11", change=change, patience=None)
    assert drawn["curves"] == drawn["predictions"] == [3, 6, 9, 11]


def test_a_plot_that_fails_during_the_run_does_not_end_it(tiny, tmp_path, monkeypatch, capsys):
    draw = mock.Mock(side_effect=[ValueError("no such font"), None])
    monkeypatch.setattr(plotting, "curves", draw)
    monkeypatch.setattr(report, "DRAWING_INTERVAL", 0)
    fit(tiny, tmp_path, "--epochs 3")
    output = capsys.readouterr().out
    assert "warning: the plots are not updated any more (no such font)" in output and draw.call_count == 2


@pytest.mark.parametrize(("is_terminal", "counts"), [(True, "12345"), (False, "3")])
def test_a_bar_shows_count_and_loss_and_without_a_terminal_only_every_30_s(tiny, monkeypatch, is_terminal, counts):
    """A clock of our own: a batch takes 12 s."""
    model, train, now, losses, stderr = TinyNet(21), make_loaders(tiny, 1, size=SIZE)[0], [0.0], [], io.StringIO()
    stderr.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def step(*args, **options):
        now[0] += 12
        result = engine.training_step(*args, **options)
        losses.append(f"loss {result[0].item():.4f}")
        return result

    engine.train_epoch(model, train, 7, CRITERION, torch.optim.SGD(model.parameters(), lr=0.1), step)
    lines = [line for line in stderr.getvalue().split("\r") if line.strip()]
    shown = [re.fullmatch(r"epoch 7: .* (\d)/5 .*, (loss .*)\]", line).groups() for line in lines]
    assert shown == [(count, losses[0]) for count in counts]  # the loss is brought up to date every ten batches
