"""The training loop on a tiny data set at 32x32: the best epoch, metrics, checkpoints, resuming and messages."""

import ast
import base64
import copy
import functools
import io
import json
import math
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, make_loaders, make_tiny, write_pair, write_split
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from tiny_net import TinyNet
from torch.nn import CrossEntropyLoss, functional

import util
import voc
from seg import checkpoint, cli, distributed, engine, files, imaging, inference, plotting, report
from util import UserError

draw_curves = plotting.curves  # which the fixture tiny_net replaces

pytestmark = pytest.mark.usefixtures("tiny_net")

SIZE = 32
SCRIPT = ROOT / "train.py"
CRITERION = CrossEntropyLoss(ignore_index=util.VOID)


def fit(data, out, *, criterion=CRITERION, scheduler=None, patience=9, lr=1e-3, change=None, **flags):
    """Run an experiment as a script would; return its metrics. ``change(epoch, step, *batch)`` changes a batch."""
    defaults = {"script": SCRIPT, "experiment": "train", "data": str(data), "epochs": 2, "batch_size": 3, "seed": 0}
    defaults |= {"device": torch.device("cpu"), "out": out, "resume": False, "limit": None, "compile": False}
    defaults |= {"overwrite": False, "idea": "an idea", "defaults": {"epochs": 2, "batch_size": 3}}
    args = Namespace(**defaults | flags)
    args.code = files.read_code(args.script)
    util.seed_everything(args.seed)
    train, val, test = voc.loaders(args, size=SIZE)
    if change:
        batches = train.batches
        train.batches = lambda epoch=0: (change(epoch, step, *batch) for step, batch in enumerate(batches(epoch)))
    model = TinyNet(len(train.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = scheduler and scheduler(optimizer)
    engine.fit(
        args, model, train, val, test, criterion=criterion, optimizer=optimizer, scheduler=scheduler, patience=patience
    )
    return json.loads((out / "results" / f"train_seed{args.seed}.json").read_text())


def history(out):
    return (out / "results" / "train_seed0.csv").read_text().splitlines()


def assert_same_weights(*checkpoints):
    first, second = (torch.load(path, weights_only=True)["model"] for path in checkpoints)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def mislabel(epoch, step, images, masks, indices):
    """From epoch 3 on, let all masks show tvmonitor, which is in no image of val."""
    return images, masks if epoch < 3 else torch.full_like(masks, 20), indices


RUN = {"epochs": 9, "patience": 2, "lr": 0.1, "change": mislabel}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose last epoch is not its best: its data, its folder and its metrics."""
    folder = tmp_path_factory.mktemp("finished")
    data = make_tiny(folder / "Tiny")
    return data, folder / "out", fit(data, folder / "out", **RUN)


def test_what_follows_a_run_in_a_script_does_not_depend_on_resuming(tiny, tmp_path):
    fit(tiny, tmp_path, epochs=1)
    after_training = torch.rand(3)
    fit(tiny, tmp_path, epochs=1, resume=True)
    assert torch.equal(torch.rand(3), after_training)
    util.seed_everything(0)  # or networks made afterwards would start like the first
    assert not torch.equal(torch.rand(3), after_training)


def test_multiply_adds_of_attention_are_counted():
    class Attention(torch.nn.Module):
        size = (4, 6)

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
            self.embed = torch.nn.Conv2d(3, 8, 1)

        def forward(self, images):
            tokens = self.layer(self.embed(images.mul_(2)).flatten(2).mT)
            return functional.scaled_dot_product_attention(tokens, tokens, tokens)

    tokens = 4 * 6
    # embedding, query, key, value and output, the two linear layers, and products of all pairs of tokens in both
    expected = tokens * (3 * 8 + 4 * 8 * 8 + 2 * 8 * 32) + 2 * 2 * tokens * tokens * 8
    assert report._multiply_adds(Attention().eval(), torch.device("cpu")) == expected


def test_a_run_writes_the_documented_files_and_metrics(finished):
    _, out, metrics = finished
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    plots = {f"plots/train_{name}.png" for name in ("curves", "iou", "confusion", "predictions")}
    results = {"results/train_seed0.csv", "results/train_seed0.json", "plots/train_report.html"}
    assert written == {"best_train.pt", "last_train.pt", ".train.lock"} | results | plots
    head = ["experiment", "idea", "dataset", "seed", "device", "epochs", "best_epoch", "loss", "parameters"]
    tail = ["multiply_adds", "seconds", "epoch_seconds", "flags", "defaults", "versions", "val", "test"]
    tail += ["size", "data_sha256", "code"]
    assert list(metrics) == head + tail
    assert len(metrics["epoch_seconds"]) == metrics["epochs"]
    assert sum(metrics["epoch_seconds"]) == pytest.approx(metrics["seconds"], abs=1e-3)
    # 3x3 from 3 to 16 channels, then 1x1 from 16 to 21, at each pixel
    assert metrics["multiply_adds"] == SIZE**2 * (9 * 3 * 16 + 16 * 21)
    assert metrics["flags"] == {"epochs": 9, "batch_size": 3, "limit": None}
    assert (metrics["experiment"], metrics["dataset"], metrics["seed"]) == ("train", "Tiny", 0)
    for split in ("val", "test"):
        assert list(metrics[split]) == ["loss", "pixel_accuracy", "miou", "iou", "background", "assignment_iou"]
        assert list(metrics[split]["iou"]) == list(voc.CLASSES)


def test_the_program_of_metrics_md_scores_a_checkpoint(finished, tmp_path, monkeypatch, capsys):
    data, out, metrics = finished
    (tmp_path / "MyData").symlink_to(data)
    shutil.copy(out / "best_train.pt", tmp_path)
    monkeypatch.chdir(tmp_path)
    document = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    exec(re.search("```python\n(.*?)```", document, re.DOTALL)[1], {})
    assert ast.literal_eval(capsys.readouterr().out) == metrics["test"]


def test_a_checkpoint_records_its_provenance(finished):
    _, out, metrics = finished
    state = torch.load(out / "best_train.pt", weights_only=True)
    code = {name: (ROOT / name).read_text() for name in ("train.py", "basic_fcn.py")}
    assert state["code"] == metrics["code"] == code and [*state["code"]] == [*code]
    assert (state["experiment"], state["seed"], state["dataset"]) == ("train", 0, "Tiny")
    assert state["flags"]["batch_size"] == 3 and state["classes"] == list(voc.CLASSES)
    assert (state["size"], state["mean"], state["std"]) == ([SIZE, SIZE], list(imaging.MEAN), list(imaging.STD))
    assert state["versions"]["torch"] == torch.__version__
    assert state["epoch"] == metrics["best_epoch"]
    assert state["val_miou"] == float(history(out)[state["epoch"]].split(",")[-1])


def test_the_best_epoch_is_reported_and_the_run_stops_after_its_patience(finished):
    data, out, metrics = finished
    mious = [float(row.split(",")[-1]) for row in history(out)[1:]]
    assert metrics["best_epoch"] == 1 + int(np.argmax(mious))
    losses = [float(row.split(",")[history(out)[0].split(",").index("val_loss")]) for row in history(out)[1:]]
    assert metrics["epochs"] == len(mious) == max(metrics["best_epoch"], 1 + int(np.argmin(losses))) + 2 < 9
    best, last = (checkpoint.load(out / name) for name in ("best_train.pt", "last_train.pt"))
    assert best.classes == voc.CLASSES and not best.training
    best.train()  # evaluate has to leave this mode, for dropout and batch norm
    for split, loader in zip(("val", "test"), make_loaders(data, 3, size=SIZE)[1:]):
        best_scores, last_scores = (engine.evaluate(model, loader, CRITERION).as_dict() for model in (best, last))
        assert best_scores == metrics[split] != last_scores
    assert metrics["val"]["miou"] != metrics["test"]["miou"]
    weights = checkpoint.load(out / "best_train.pt").state_dict()
    torch.testing.assert_close(best.state_dict(), weights, rtol=0, atol=0)


def test_metrics_equal_those_of_a_plain_loop_at_full_resolution(finished):
    """The oracle evaluates image by image, with PIL and NumPy."""
    data, out, metrics = finished
    model = checkpoint.load(out / "best_train.pt")
    intersection, union, num_correct, counts = np.zeros(21), np.zeros(21), 0, np.zeros(21)
    log_likelihoods = []
    for name in voc.Split(data, "test").ids:
        photo = Image.open(data / "JPEGImages" / f"{name}.jpg").convert("RGB")
        mask = Image.open(data / "SegmentationClass" / f"{name}.png")
        small = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) / 255
        image = ((small - imaging.MEAN) / imaging.STD).astype(np.float32).transpose(2, 0, 1)[None]
        with torch.no_grad():
            logits = model(torch.tensor(image))
        truth = np.asarray(mask)
        upsampled = functional.interpolate(logits, truth.shape, mode="bilinear", align_corners=False)
        prediction = upsampled[0].argmax(0).numpy()
        labelled = truth != 255
        for c in range(21):
            intersection[c] += (labelled & (truth == c) & (prediction == c)).sum()
            union[c] += (labelled & ((truth == c) | (prediction == c))).sum()
            counts[c] += (truth == c).sum()
        num_correct += (truth == prediction)[labelled].sum()
        log_probabilities = torch.log_softmax(logits[0].double(), 0).numpy()
        small_mask = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.NEAREST))
        log_likelihoods += [log_probabilities[c, y, x] for (y, x), c in np.ndenumerate(small_mask) if c != 255]
    expected = {voc.CLASSES[c]: intersection[c] / union[c] if union[c] else None for c in range(21)}
    miou = np.mean([value for value in expected.values() if value is not None])
    metrics = metrics["test"]
    # a single image is rounded differently from a batch, which may change one pixel of about 7,000
    assert metrics["iou"] == pytest.approx(expected, abs=1e-3)
    assert metrics["miou"] == pytest.approx(miou, abs=1e-3)
    assert metrics["pixel_accuracy"] == pytest.approx(num_correct / counts.sum(), abs=1e-3)
    assert metrics["loss"] == pytest.approx(-np.mean(log_likelihoods), rel=1e-4)  # float32 sums
    share = counts[0] / counts.sum()
    baseline = {"pixel_accuracy": share, "miou": share / np.count_nonzero(counts)}
    assert metrics["background"] == pytest.approx(baseline, rel=1e-12)


@pytest.mark.parametrize("available", [True, False])
def test_bfloat16_is_used_where_it_is_fast(available, monkeypatch):
    """Oracle: the network in bfloat16 throughout, from which autocast differs in batch norm and sums only."""
    monkeypatch.setattr(distributed, "has_bfloat16", lambda device: available)
    torch.manual_seed(0)
    network, images = TinyNet(21).eval(), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        fast, full = (inference.forward(network, images, full_precision=value)["out"] for value in (False, True))
        exact = network(images)
        rough = copy.deepcopy(network).bfloat16()(images.bfloat16()).float()
    assert fast.dtype == full.dtype == torch.float32
    assert torch.equal(full, exact)
    if available:
        error = (rough - exact).abs().mean()
        assert error / 4 < (fast - exact).abs().mean() < 2 * error
    else:
        assert torch.equal(fast, exact)


def test_final_metrics_are_in_float32_and_so_are_the_logits_that_a_loss_gets(tiny, monkeypatch):
    def criterion(logits, masks):
        assert logits.dtype == torch.float32
        return functional.cross_entropy(logits, masks, ignore_index=util.VOID)

    torch.manual_seed(0)
    model, val = TinyNet(21), make_loaders(tiny, 2, size=SIZE)[1]
    scores = {}
    for available in (True, False):
        monkeypatch.setattr(distributed, "has_bfloat16", lambda device, available=available: available)
        scores[available] = [engine.evaluate(model, val, criterion, full) for full in (True, False)]
    (final, fast), (float32_final, float32_fast) = scores[True], scores[False]
    assert final.loss == float32_final.loss and torch.equal(final.matrix, float32_final.matrix)
    assert fast.loss != float32_fast.loss and fast.loss == pytest.approx(float32_fast.loss, rel=1e-2)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux, which lists the CPU's instructions")
def test_bfloat16_on_cpus_that_have_its_instructions():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert distributed.has_bfloat16(torch.device("cpu")) == ("avx512_bf16" in flags)


@pytest.mark.parametrize("class_weights", [None, torch.linspace(0.2, 3, 21)])
def test_the_mean_loss_over_batches_equals_the_mean_over_all_pixels(finished, class_weights, float32):
    data, out, _ = finished
    model = checkpoint.load(out / "best_train.pt")
    val = make_loaders(data, 4, size=SIZE)[1]
    images, masks, indices = next(val.batches())
    masks[0, :20], masks[1] = util.VOID, util.VOID  # the weights of the batches differ, one may be 0
    criterion = CrossEntropyLoss(class_weights, ignore_index=util.VOID)
    losses = []
    for size in (1, 3, 4):
        val.batches = functools.partial(zip, *(tensor.split(size) for tensor in (images, masks, indices)))
        losses.append(engine.evaluate(model, val, criterion, full_resolution=False).loss)
    with torch.no_grad():
        expected = functional.cross_entropy(model(images), masks, class_weights, ignore_index=255).item()
    assert losses == pytest.approx([expected] * 3, rel=1e-5)  # float32 means


@pytest.mark.parametrize(
    "options", [{}, {"weight": torch.tensor([1.0, 3.0, 0.5])}, {"label_smoothing": 0.1}, {"reduction": "sum"}]
)
def test_the_loss_of_a_batch_is_that_of_the_criterion(options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 6, 5, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    masks = torch.randint(0, 3, (4, 6, 5), generator=generator)
    masks[0, :4], masks[2] = util.VOID, util.VOID
    criterion = CrossEntropyLoss(ignore_index=util.VOID, **options)
    loss, weight = engine.batch_loss(criterion, logits, masks)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = criterion(logits, masks)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    class_weights = options.get("weight", torch.ones(3))
    assert weight == pytest.approx(sum(class_weights[label].item() for label in masks[masks != util.VOID]))


@pytest.mark.parametrize("class_weights", [None, torch.linspace(1, 2, 21), torch.arange(21.0)])
def test_a_batch_without_labelled_pixels_moves_no_weight(tiny, class_weights):
    images, masks, _ = next(make_loaders(tiny, 2, size=SIZE)[0].batches(1))
    criterion = CrossEntropyLoss(class_weights, ignore_index=util.VOID)
    model = TinyNet(21)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)

    def moved(masks):
        before = [parameter.clone() for parameter in model.parameters()]
        loss, weight, norm, _ = engine.training_step(model, images, masks, criterion, optimizer, 0, 1)
        assert loss.isfinite() and (weight == 0) == (norm == 0)
        return [not torch.equal(*pair) for pair in zip(before, model.parameters())]

    assert not any(moved(torch.full_like(masks, util.VOID)))
    assert all(moved(masks))


@pytest.mark.parametrize("compile", [False, True])
def test_the_same_seed_gives_the_same_run_compiled_or_not(finished, tmp_path, monkeypatch, capsys, compile):
    # the same operations; generated code rounds differently and takes long to compile
    torch_compile = Mock(wraps=functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", torch_compile)
    data, out, metrics = finished
    again = fit(data, tmp_path, **RUN, compile=compile)
    times = {"seconds": 0, "epoch_seconds": 0}
    assert again | times == metrics | times
    assert history(tmp_path) == history(out)
    assert_same_weights(tmp_path / "last_train.pt", out / "last_train.pt")
    assert torch_compile.called == compile
    assert "no progress on val for 2 epochs" in capsys.readouterr().out


def cosine(optimizer, epochs=4):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)


class Stop(Exception):
    """Stands for whatever stops a run: Ctrl-C, an error."""


def stop_in_epoch(last):
    def change(epoch, step, *batch):
        if (epoch, step) == (last, 1):
            raise Stop
        return batch

    return change


def test_a_stopped_run_keeps_its_files_and_resumes_to_identical_results(tiny, tmp_path, capsys):
    fit(tiny, tmp_path / "complete", epochs=4, scheduler=cosine)
    out = tmp_path / "stopped"
    with pytest.raises(Stop):
        fit(tiny, out, epochs=4, scheduler=cosine, resume=True, change=stop_in_epoch(3))
    output = capsys.readouterr().out
    assert "stopped after epoch 2" in output and "best_train.pt" in output and "--resume" in output
    assert len(history(out)) == 3 and len(list((out / "plots").glob("train_*.png"))) == 4
    fit(tiny, out, epochs=4, scheduler=cosine, resume=True)
    assert history(out) == history(tmp_path / "complete")
    for name in ("best_train.pt", "last_train.pt"):
        assert_same_weights(out / name, tmp_path / "complete" / name)


def test_a_run_stopped_in_its_first_epoch_keeps_nothing_and_says_so(tiny, tmp_path, capsys):
    with pytest.raises(Stop):
        fit(tiny, tmp_path, change=stop_in_epoch(1))
    assert "nothing to keep" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.pt"))


def test_a_run_resumes_with_more_epochs_unless_its_schedule_depends_on_them(tiny, tmp_path):
    fit(tiny, tmp_path / "resumed", epochs=1)
    fit(tiny, tmp_path / "resumed", epochs=3, resume=True)
    fit(tiny, tmp_path / "complete", epochs=3)
    assert history(tmp_path / "resumed") == history(tmp_path / "complete")
    fit(tiny, tmp_path / "cosine", epochs=4, scheduler=cosine)
    with pytest.raises(UserError, match="epochs 4, not 5"):
        fit(tiny, tmp_path / "cosine", epochs=5, scheduler=functools.partial(cosine, epochs=5), resume=True)


CODE = SCRIPT.read_text()


@pytest.mark.parametrize(
    ("changed", "first_change"),
    [
        (CODE.replace('"""', '# A copy\n"""My ', 1).replace("= None\n", "= None  # later\n"), None),
        (CODE.replace("None", "1"), "-    augment = None"),
        (CODE.replace("    weight = None\n", ""), "-    weight = None"),
        (CODE.replace("    weight = None\n", "    weight = None\n    print(weight)\n"), "+    print(weight)"),
    ],
)
def test_a_run_resumes_with_other_comments_but_not_with_other_code(tiny, tmp_path, changed, first_change):
    script = tmp_path / "train.py"
    script.write_text(CODE)
    fit(tiny, tmp_path, epochs=1, script=script)
    script.write_text(changed)
    if first_change is None:
        fit(tiny, tmp_path, epochs=2, script=script, resume=True)
        assert len(history(tmp_path)) == 3
    else:
        with pytest.raises(UserError, match=re.escape(f"train.py has changed since ({first_change!r})")):
            fit(tiny, tmp_path, epochs=2, script=script, resume=True)


def test_the_code_of_a_run_is_what_its_script_imports_directly_or_not(tmp_path):
    texts = {
        "my.run.py": "import math, losses\nfrom nets import Net\nimport util\n",
        "nets.py": "import blocks\n",
        "blocks.py": "import nets\n",
        "losses.py": "scale = (1\n",  # being edited
        "util.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    code = files.read_code(tmp_path / "my.run.py")
    assert code == {name: texts[name] for name in ("my.run.py", "losses.py", "nets.py", "blocks.py")}
    assert list(code)[0] == "my.run.py"
    assert checkpoint.code_change(code, code) is None
    assert checkpoint.code_change(code, code | {"losses.py": "scale = 1\n"}) == (
        "losses.py has changed since ('-scale = (1')"
    )
    other = {name: text for name, text in code.items() if name != "blocks.py"}
    assert checkpoint.code_change(code, other) == "blocks.py has changed since ('-import nets')"


def test_a_model_is_not_scored_on_data_with_other_classes(tiny):
    loader = voc.Loader(voc.Split(tiny, "val"), 32, 2)
    model = checkpoint.TrainedModel(TinyNet(21), loader.classes[::-1], (32, 32), loader.mean, loader.std)
    with pytest.raises(UserError, match="the classes of .*Tiny or their order differ from the model's .tvmon"):
        engine.evaluate(model, loader, CrossEntropyLoss(ignore_index=util.VOID))
    model.classes = loader.classes
    engine.evaluate(model, loader, CrossEntropyLoss(ignore_index=util.VOID))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_model_is_not_used_with_another_normalisation(tiny, name):
    loader = voc.Loader(voc.Split(tiny, "val"), 32, 2)
    model = checkpoint.TrainedModel(TinyNet(21), loader.classes, (32, 32), loader.mean, loader.std)
    for use in (engine.evaluate, lambda *args: inference.predict_index(*args[:2], 0, (9, 9))):
        setattr(loader, name, (0.5, 0.5, 0.5))
        with pytest.raises(UserError, match="set loader.mean, loader.std = model.mean, model.std"):
            use(model, loader, CRITERION)
        setattr(loader, name, list(getattr(model, name)))
        use(model, loader, CRITERION)


def test_a_loss_is_in_eval_mode_when_val_is_evaluated(tiny, tmp_path):
    class Counting(CrossEntropyLoss):
        def forward(self, logits, masks):
            modes.append((self.training, logits.requires_grad))
            return super().forward(logits, masks)

    modes = []
    fit(tiny, tmp_path, criterion=Counting(ignore_index=util.VOID))
    modes = modes[2:]  # after the checks before the first epoch
    assert {*modes} == {(True, True), (False, False)} and modes[0] == (True, True)


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


class Scaled(CrossEntropyLoss):
    """Multiplies the loss of training step n by ``factor(n)``, or with ``gradient_only`` its gradient by one more."""

    def __init__(self, factor, gradient_only=False):
        super().__init__(ignore_index=util.VOID)
        self.step, self.factor, self.gradient_only = 0, factor, gradient_only

    def forward(self, logits, masks):
        loss = super().forward(logits, masks)
        if not logits.requires_grad:
            return loss
        self.step += 1
        factor = self.factor(self.step)
        return loss + (loss - loss.detach()) * factor if self.gradient_only else loss * factor


@pytest.mark.parametrize(
    ("criterion", "batch", "problem"),
    [
        (Scaled(lambda step: math.nan if step == 3 else 1), 1, "the loss is nan"),
        (Scaled(lambda step: math.inf if step == 4 else 1), 2, "the loss is inf"),
        (Scaled(lambda step: 3e38 if step == 4 else 1, gradient_only=True), 2, "the gradient is inf"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_keeps_the_best(
    tiny, tmp_path, criterion, batch, problem
):
    with pytest.raises(UserError, match=f"{problem} in epoch 2, batch {batch} of 2.*did not grow") as error:
        fit(tiny, tmp_path, epochs=3, criterion=criterion)
    train = make_loaders(tiny, 3, size=SIZE)[0]
    _, _, indices = list(train.batches(2))[batch - 1]
    assert f"(images {', '.join(train.split.ids[index] for index in indices)})" in str(error.value)
    for name in ("best", "last"):
        state = torch.load(tmp_path / f"{name}_train.pt", weights_only=True)
        assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())


def test_a_loss_that_grew_before_it_overflowed_suggests_a_lower_learning_rate(tiny, tmp_path):
    message = "the (loss|gradient) is inf in epoch 1, batch [45] of 5.* grew from .*: lower the learning rate"
    with pytest.raises(UserError, match=message):
        fit(tiny, tmp_path, batch_size=1, criterion=Scaled(lambda step: 1e5**step))


def test_flags_have_the_documented_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    expected = {"script": SCRIPT, "experiment": "train", "data": "data/VOCdevkit/VOC2007", "out": Path(".")}
    expected |= {"epochs": 7, "batch_size": 16, "seed": 0, "device": cli.parse_device("auto")}
    expected |= {"resume": False, "overwrite": False, "limit": None, "compile": False}
    expected |= {"defaults": {"epochs": 7, "batch_size": 16}, "idea": "an experiment"}
    expected |= {"code": files.read_code(SCRIPT)}
    assert vars(cli.arguments(str(SCRIPT), "An experiment.", epochs=7)) == expected


@pytest.mark.parametrize(
    ("docstring", "idea"),
    [
        ("Cosine annealing: the baseline with a decaying rate.\n\n    python x.py", "cosine annealing"),
        ("U-Net: a contracting path.", "U-Net"),
        ("\nA wider network\nthan before.", "a wider network"),
        ("A 1.5x wider network.", "a 1.5x wider network"),
        (None, ""),
        ("Word " * 20, "word" + " Word" * 10 + " ..."),
    ],
)
def test_titles_name_the_idea_from_the_docstring(docstring, idea):
    assert cli.idea(docstring) == idea


@pytest.mark.parametrize(
    ("num_classes", "size", "shape"),
    [(60, (32, 24), (500, 700)), (5, (7, 9), (61, 83)), (21, (14, 14), (60, 9000)), (21, (64, 40), (9000, 60))],
)
@pytest.mark.parametrize("ties", [False, True])
def test_prediction_in_strips_equals_that_of_the_whole_upsampled_logits(num_classes, size, shape, ties):
    logits = torch.randn(num_classes, *size, generator=torch.Generator().manual_seed(0))
    logits = logits.round() if ties else logits
    expected = functional.interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(inference.predict_mask(logits, shape), expected.byte())
    strips = list(inference.predict_strips(logits, shape))
    assert len(strips) == -(-num_classes * shape[0] * shape[1] // inference.STRIP_SIZE)
    assert max(prediction.numel() for _, prediction in strips) * num_classes < 1.1 * inference.STRIP_SIZE


def report_of(folder, size=(60, 50), predict=None, **flags):
    """A Report on a train and a val image of ``size``, and a history of one epoch."""
    for split in ("train", "val"):
        write_pair(folder, split, np.zeros((*size, 3), np.uint8), np.ones(size, np.uint8))
        write_split(folder, split, [split])
    train, val, _ = make_loaders(folder, 1, size=SIZE)
    scores = util.Scores(1.0, torch.eye(21, dtype=torch.int64), val.classes)
    args = Namespace(idea="an idea", epochs=9, limit=None, device=torch.device("cpu"), **flags)
    made = report.Report(files.RunFiles(folder, "train", 0), args, CRITERION, train, val, None, predict)
    return made, [report.history_row(1, [[0.1]], scores, scores) | {"seconds": 1.0}], scores


def test_plots_take_large_photos_downscaled_and_show_their_progress(tmp_path, monkeypatch):
    drawn, shapes, bars = [], [], []
    monkeypatch.setattr(plotting, "predictions", lambda path, title, classes, samples: drawn.extend(samples))
    monkeypatch.setattr(report, "progress", lambda items, *args, **names: bars.append(args) or items)

    def predict(model, loader, index, shape):
        shapes.append(shape)
        return np.zeros(shape, np.uint8)

    report, history, scores = report_of(tmp_path, (1500, 900), predict)
    report._draw_all(None, history, 1, {"val": scores})
    assert [array.shape[:2] for array in drawn[0][1:]] == [(640, 384)] * 3 and shapes == [(640, 384)]
    assert bars == [(1, "drawing predictions", "photo")]


def test_best_median_and_worst_image_are_shown_with_their_iou(finished, monkeypatch):
    data, out, _ = finished
    model, val = checkpoint.load(out / "best_train.pt"), make_loaders(data, 3, size=SIZE)[1]
    drawn = []
    monkeypatch.setattr(plotting, "predictions", lambda path, title, classes, samples: drawn.extend(samples))
    report, *_ = report_of(out.parent / "shown", predict=inference.predict_index)
    report.val, ids = val, val.split.ids
    ious = torch.linspace(0.1, 0.9, len(ids)).double()
    ious[0] = torch.nan  # an image without a labelled pixel has no IoU
    report._draw_predictions(model, 1, ious)
    names = dict(enumerate(ids))  # all are shown, as there are fewer than five
    for rank, index in (("best", len(ids) - 1), ("median", 1 + (len(ids) - 1) // 2), ("worst", 1)):
        names[index] += f"\n{rank}, mean IoU {ious[index]:.2f}"
    assert [sample[0] for sample in drawn] == list(names.values())


def test_images_are_chosen_evenly_spaced_and_by_their_iou(tmp_path):
    report, *_ = report_of(tmp_path)
    report.val = Mock(split=range(1000))
    ious = torch.arange(1000).flip(0).double()
    chosen = report._choose_images(13, ious)
    assert {index: ranks for index, ranks in chosen.items() if ranks} == {0: ["best"], 499: ["median"], 999: ["worst"]}
    evenly_spaced = sorted(chosen.keys() - {499})
    assert (len(evenly_spaced), evenly_spaced[0], evenly_spaced[-1]) == (13, 0, 999)
    assert set(np.diff(evenly_spaced)) <= {83, 84}


def test_the_html_report_of_a_run_shows_what_its_model_predicts(finished):
    data, out, _ = finished
    model, val = checkpoint.load(out / "best_train.pt"), make_loaders(data, 3, size=SIZE)[1]
    scores = engine.evaluate(model, val, CRITERION)
    text = (out / "plots" / "train_report.html").read_text(encoding="utf-8")
    for index, name in enumerate(val.split.ids):
        assert re.search(rf"<h3>{name}(, \w+)*, mean IoU {scores.image_ious[index]:.4f}</h3>", text)
        article = text.split(f"<h3>{name}")[1].split("</article>")[0]
        image = re.search('<figcaption>prediction</figcaption><img[^>]*base64,([^"]+)"', article)[1]
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))
        assert np.array_equal(mask, inference.predict_index(model, val, index, mask.shape))


def test_evaluation_scores_each_image_by_itself(finished):
    """A single image has the IoU of a split that consists of it."""
    data, out, _ = finished
    model = checkpoint.load(out / "best_train.pt")
    val = make_loaders(data, 3, size=SIZE)[1]
    scores = engine.evaluate(model, val, CRITERION)
    expected = []
    for index in range(len(val.split)):
        mask = val.split.mask(index)
        prediction = inference.predict_index(model, val, index, mask.shape)
        labels = sorted((set(np.unique(mask)) | set(np.unique(prediction[mask != util.VOID]))) - {util.VOID})
        ious = jaccard_score(mask[mask != util.VOID], prediction[mask != util.VOID], labels=labels, average=None)
        expected.append(ious.mean())
    assert scores.image_ious.tolist() == pytest.approx(expected, abs=1e-12)
    assert np.std(expected) > 0.01
    assert engine.evaluate(model, val, CRITERION, full_resolution=False).image_ious is None


def test_metrics_on_train_are_those_of_the_logits_that_were_trained_on(tiny):
    train = make_loaders(tiny, 2, size=SIZE)[0]
    model = TinyNet(21, norm=False)  # without dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    scores, rates = engine.train_epoch(model, train, 1, CRITERION, optimizer)
    expected = torch.zeros(21, 21, dtype=torch.int64)
    for images, masks, _ in train.batches(1):
        prediction = model(images).argmax(1)[:, ::4, ::4].numpy().ravel()
        truth = masks[:, ::4, ::4].numpy().ravel()
        labelled = truth != util.VOID
        expected += torch.from_numpy(confusion_matrix(truth[labelled], prediction[labelled], labels=range(21)))
    assert torch.equal(scores.matrix, expected) and expected.sum() > 0
    assert rates == [[0.0]] * len(train)


def test_curves_are_there_and_complete_from_the_first_epoch_on(tiny, tmp_path, monkeypatch):
    """A viewer that looks at any moment, here in each later epoch, finds a complete picture that changes."""
    monkeypatch.setattr(plotting, "curves", draw_curves)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: figure.canvas.print_figure(file, **options))
    monkeypatch.setattr(report, "INTERVALS", {"curves": 0, "predictions": math.inf})
    monkeypatch.setattr(report, "DRAWING_SHARE", math.inf)
    train_epoch, seen = engine.train_epoch, []

    def look_during_epoch(network, loader, epoch, *args):
        if epoch > 1:
            path = tmp_path / "plots" / "train_curves.png"
            Image.open(path).load()
            seen.append(path.read_bytes())
        return train_epoch(network, loader, epoch, *args)

    monkeypatch.setattr(engine, "train_epoch", look_during_epoch)
    fit(tiny, tmp_path, epochs=3)
    assert len(set(seen)) == 2


def test_drawing_during_a_run_keeps_to_its_share_of_the_time(tmp_path, monkeypatch):
    """A clock of our own: epochs of 7 s, curves that take 1 s and predictions that take 3 s."""
    now, drawn = [0.0], []

    def draw(name, seconds):
        drawn.append((name, now[0]))
        now[0] += seconds

    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(checkpoint, "load", lambda *args: None)
    made, history, _ = report_of(tmp_path)
    monkeypatch.setattr(report, "_draw_curves", lambda *args: draw("curves", 1))
    monkeypatch.setattr(report, "_draw_predictions", lambda *args: draw("predictions", 3))
    for epoch in range(1, 601):
        now[0] += 7
        report._draw_during_run(history, best_epoch=1 + epoch // 51)
    times = {name: [time for other, time in drawn if other == name] for name in ("curves", "predictions")}
    assert times["curves"][0] == 7
    assert times["predictions"][0] >= 200  # expected to take 2 s
    assert min(np.diff(times["curves"])) >= 20 and min(np.diff(times["predictions"])) >= 60
    assert 0.009 * now[0] < len(times["curves"]) <= 0.01 * now[0] + 1
    assert len(times["predictions"]) == 12  # once per better epoch


def test_a_plot_that_fails_during_the_run_does_not_end_it(tiny, tmp_path, monkeypatch, capsys):
    draw = Mock(side_effect=[ValueError("no such font"), None])
    monkeypatch.setattr(report.Report, "_draw_curves", draw)
    fit(tiny, tmp_path, epochs=1)
    output = capsys.readouterr().out
    assert "warning: the plots are not updated any more (no such font)" in output and draw.call_count == 2


def test_progress_prints_lines_where_there_is_no_terminal(monkeypatch, capsys):
    """Items that take 12 s each: a line whenever 30 s have passed without one."""
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(report, "_last_line", 0.0)
    for index in report.progress(range(10), 10, "epoch 3", status=lambda: f"loss {now[0]}"):
        now[0] += 12
        if index == 4:
            report.log("another line")
    lines = ["epoch 3: 3/10  loss 36.0", "another line", "epoch 3: 8/10  loss 96.0"]
    assert capsys.readouterr().out.splitlines() == lines


def test_the_progress_bar_of_an_epoch_shows_the_running_loss(tiny, monkeypatch):
    bars = []
    monkeypatch.setattr(report, "progress", lambda items, *args, status: bars.append(status) or items)
    train = make_loaders(tiny, 2, size=SIZE)[0]
    model = TinyNet(21)
    scores, _ = engine.train_epoch(model, train, 1, CRITERION, torch.optim.SGD(model.parameters(), lr=0.1))
    assert bars[0]() == f"loss {scores.loss:.4f}"  # after the last batch: that of the epoch


def test_evaluation_counts_strips_like_whole_masks(finished, monkeypatch):
    data, out, _ = finished
    model, loader = checkpoint.load(out / "best_train.pt"), make_loaders(data, 3, size=SIZE)[1]
    generator = torch.Generator().manual_seed(0)
    model.network.classifier.weight.data.normal_(generator=generator)  # predicts many classes
    expected = engine.evaluate(model, loader, CRITERION).matrix
    monkeypatch.setattr(engine, "STRIP_SIZE", 21 * 60 * 20)  # 20 columns
    matrix = engine.evaluate(model, loader, CRITERION).matrix
    assert (expected.sum(0) > 0).sum() > 3 and matrix.sum() == expected.sum()
    # in such small strips, interpolate takes another path and may round the last digit differently
    assert (matrix - expected).abs().sum() < 1e-3 * expected.sum()


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_class_that_is_left_out_of_a_strip_is_nowhere_the_largest(rows):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, rows, 4, generator=generator) + torch.linspace(-3, 3, 30).view(-1, 1, 1)
    labels = inference._possible_classes(logits)
    means = [weight * logits[:, :-1] + (1 - weight) * logits[:, 1:] for weight in torch.linspace(0, 1, 33)]
    winners = torch.cat([logits, *means], 1).argmax(0).unique()
    assert set(winners.tolist()) <= set(labels.tolist()) and len(labels) < 30
