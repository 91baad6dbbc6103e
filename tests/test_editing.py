"""Edits of a script: every block of docs/EDITING.md trains, resumes and loads again, and mistakes are found."""

import ast
import functools
import importlib.util
import os
import re
import runpy
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, TESTS, make_loaders, make_tiny, run_main, save_model, skip_drawing
from nbclient import NotebookClient
from PIL import Image
from tiny_net import TinyNet
from torchvision.models.resnet import BasicBlock, ResNet

import basic_fcn
import compare
import predict
import resnet_fcn
import resnet_unet
import util
import voc
from seg import checkpoint, engine, provenance, sanity

FLAGS = "--data Tiny --epochs 2 --batch-size 2 --device cpu"
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "EDITING.md").read_text(encoding="utf-8"), re.S)
FIT = "    engine.fit("


def block(text):
    """The block of docs/EDITING.md that contains a text."""
    (found,) = [block for block in BLOCKS if text in block]
    return found


def edit(script, changes):
    """Apply changes to the code of a script as docs/EDITING.md describes."""
    lines = ""  # that go before the next assignment
    for statement in ast.parse(changes).body:
        code = ast.get_source_segment(changes, statement)
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.Import | ast.ImportFrom):
            script = script.replace("def main():", f"{code}\n\n\ndef main():")
        elif code.startswith("engine.fit(..., "):
            script = script.replace("scheduler=scheduler", f"scheduler=scheduler, {code[len('engine.fit(..., ') : -1]}")
        else:
            lines += "    " + code.replace("\n", "\n    ") + "\n"
            target = ast.unparse(statement.targets[0]) if isinstance(statement, ast.Assign) else None
            nodes = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Assign)]
            if old := [node for node in nodes if ast.unparse(node.targets[0]) == target]:
                old = f"    {ast.get_source_segment(script, old[0])}\n"
                assert old in script
                script, lines = script.replace(old, lines), ""
    return script.replace(FIT, lines + FIT)


@functools.cache
def mobilenet():
    """Stands for ImageNet's weights."""
    with torch.random.fork_rng():
        return torchvision.models.mobilenet_v3_small().state_dict()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with data, in which scripts and networks are looked up; the networks are small, plots are not drawn."""
    make_tiny(tmp_path / "Tiny")
    for path in (TESTS / "tiny_net.py", ROOT / "resnet_fcn.py", ROOT / "resnet_unet.py"):
        shutil.copy(path, tmp_path)
    for module in (checkpoint, provenance):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    skip_drawing(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(basic_fcn, "FCN", TinyNet)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **options: mobilenet())
    for module in (resnet_fcn, resnet_unet):  # with half of a ResNet-18's blocks
        monkeypatch.setattr(module, "resnet18", lambda weights, **options: ResNet(BasicBlock, [1, 1, 1, 1], **options))
    loaders, small = voc.loaders, {224: 32, (192, 256): (18, 24), 320: 32, (352, 480): 64}
    monkeypatch.setattr(voc, "loaders", lambda args, size, **options: loaders(args, small.get(size, size), **options))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def run(project, changes, flags="", base=None, old="", new="", name="train-mine"):
    """Edit a copy of a script, replace ``old`` in it, and run it; return its exit code."""
    # a new network needs an optimizer that takes all parameters, as in train_5_a.py
    base = base or ("train_5_a" if "\nmodel = " in changes else "train")
    script = edit((ROOT / f"{base}.py").read_text(encoding="utf-8"), changes)
    assert old in script
    (project / f"{name}.py").write_text(script.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, project / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    pretrained = "--no-pretrained" if "pretrained=True" in script else ""
    return run_main(project, sys.modules[name], f"{FLAGS} {pretrained} {flags}")


class Stop(Exception):
    """Stands for whatever stops a run."""


def stop(patch, count):
    """Stop a run at the end of an epoch, the last of so many, before it is recorded."""
    train_epoch, epochs = engine.train_epoch, []

    def train_epochs(*args, **options):
        epochs.append(train_epoch(*args, **options))
        if len(epochs) == count:
            raise Stop
        return epochs[-1]

    patch.setattr(engine, "train_epoch", train_epochs)


def assert_same_training(first, second):
    """That two checkpoints hold the same training state, bit by bit."""
    assert first["epoch"] == second["epoch"]
    for part in ("model", "criterion", "optimizer"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    assert first["scheduler"] == second["scheduler"]


def last(project, out="", name="train-mine"):
    return torch.load(project / out / f"last_{name}.pt", weights_only=True)


def net(forward="return self.layer(images)", arguments='{"num_classes": num_classes}', extra="pass"):
    """A network that is its layer, with changes; for train_5_a.py."""
    return f"""
class Net(torch.nn.Module):
    def __init__(self, num_classes, value=0):
        super().__init__()
        self.arguments = {arguments}
        self.layer = torch.nn.Conv2d(3, num_classes, 1)
        {extra}

    def forward(self, images):
        {forward}

model = Net(len(train.classes))
"""


def loss(forward, extra="pass"):
    return f"""
class Loss(torch.nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__(ignore_index=util.VOID)
        {extra}

    def forward(self, logits, masks):
        {forward}

criterion = Loss()
"""


def scheduler(call):
    return f"scheduler = torch.optim.lr_scheduler.{call}\n"


AUX_NET = net(
    'return {"out": self.layer(images), "aux": self.aux(images), "levels": [1]}',
    extra="self.aux = torch.nn.Conv2d(3, num_classes, 1)",
)
LEARNED = loss(
    """loss = super().forward(logits * self.scale, masks)
        if self.training:
            self.mean.lerp_(loss.detach(), 0.1)
        return loss / self.mean""",
    extra='self.scale = torch.nn.Parameter(torch.ones(())); self.register_buffer("mean", torch.ones(()))',
)
LEARNED += "optimizer = torch.optim.Adam([*model.parameters(), *criterion.parameters()], lr=1e-3)"
VIEWS = loss(
    "self.calls += 1; return super().forward(logits.view(*logits.shape[:2], -1), masks.view(len(masks), -1))",
    extra='self.register_buffer("calls", torch.zeros(()))',
)
WARM_UP = """SequentialLR(optimizer, [
    torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=1),
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs - 1)], [1])"""
RANDOM_SIZE = """from torch.nn.functional import interpolate

def training_step(network, images, masks, criterion, optimizer, **position):
    side = 32 * int(torch.randint(5, 10, ()))
    images = interpolate(images, (side, side), mode="bilinear")
    masks = interpolate(masks[:, None].float(), (side, side), mode="nearest-exact")[:, 0].long()
    return *engine.training_step(network, images, masks, criterion, optimizer), masks

engine.fit(..., training_step=training_step)
"""
FROZEN_AT_FIRST = """def training_step(network, images, masks, criterion, optimizer, epoch, **position):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.requires_grad_(epoch > 1)
    return engine.training_step(network, images, masks, criterion, optimizer)

engine.fit(..., training_step=training_step)
"""
EDITS = {
    "polynomial": block("PolynomialLR"),
    "cosine after warm-up": scheduler(WARM_UP),
    "cyclic cosine": scheduler("CosineAnnealingLR(optimizer, T_max=1)"),
    "schedule of NumPy": "from numpy import cos\n" + scheduler("LambdaLR(optimizer, lambda epoch: cos(epoch / 4))"),
    "one cycle": block("OneCycleLR"),
    "one cycle longer than the run": block("OneCycleLR").replace("args.epochs", "100"),
    "plateau": block("ReduceLROnPlateau("),
    "clipping": block("clip_grad_norm_"),
    "accumulation": block("loss / accumulated"),
    "auxiliary loss": AUX_NET + block("aux_loss"),
    "fine-tuning": block("model.backbone.requires_grad_(True)"),
    "frozen at first": block("model.backbone.requires_grad_(True)") + FROZEN_AT_FIRST,
    "other weights": block("fitting"),
    "random size": RANDOM_SIZE,
    "TensorBoard": block("SummaryWriter"),
    "own flag": block("lr=args.lr"),
    "label smoothing": "criterion = torch.nn.CrossEntropyLoss(ignore_index=util.VOID, label_smoothing=0.1)\n",
    "focal": block("focal_loss"),
    "Dice": block("DiceLoss("),
    "learned loss": LEARNED,
    "loss that calls view and counts": VIEWS,
    "network": block("MyNet("),
    "torchvision network": block("LRASPP("),
    "pretrained encoder": block("MobileNetFCN("),
    "averaged weights": "",
    "more varied photos": block("brightness="),
    "v2 augmentation": block("v2.Compose"),
    "albumentations": block("Albumentations("),
    "input": block("size=(192, 256)"),
    "data set": block("Pets(voc") + block("random_split"),
    "fold": block("fold = 0"),
}
BASES = {
    "fine-tuning": "train_5_b",
    "frozen at first": "train_5_b",
    "other weights": "train_5_b",
    "averaged weights": "train_6",
}
CELL_FLAGS = block("argv=flags")
CELL = f"""import torch, util, voc
from seg import cli, engine
from custom_fcn import CustomFCN

{CELL_FLAGS}
util.seed_everything(args.seed)
train, val, test = voc.loaders(args, size=224)
model = CustomFCN(len(train.classes)).to(args.device)
criterion = torch.nn.CrossEntropyLoss(ignore_index=util.VOID)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine.fit(args, model, train, val, test, criterion=criterion, optimizer=optimizer, scheduler=None)
"""


def write_pets(root):
    """Write the images of train and val as torchvision's OxfordIIITPet: 1 is an object, 2 background, 3 void."""
    folder, split = root / "oxford-iiit-pet", voc.Split(root, "train", ids=[f"{index:06d}" for index in range(9)])
    shutil.copytree(root / "JPEGImages", folder / "images")
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    for index, name in enumerate(split.ids):
        mask = split.mask(index)
        mask[:] = np.select([mask == 0, mask == util.VOID], [2, 3], 1)
        Image.fromarray(mask).save(folder / "annotations" / "trimaps" / f"{name}.png")
    (folder / "annotations" / "trainval.txt").write_text("".join(f"{name} 1 1 1\n" for name in split.ids))


def test_every_block_of_the_document_is_run():
    assert [text for text in BLOCKS if not any(text in changes for changes in (*EDITS.values(), CELL))] == []
    assert all(text.count("\n") <= 14 for text in BLOCKS)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # OxfordIIITPet leaves files open
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_trains_and_resumes_to_the_same_result(project, monkeypatch, name):
    """With and without the sanity check, uninterrupted and resumed."""
    write_pets(project / "Tiny")
    save_model(project / "best_train_5_b.pt", resnet_fcn.ResNetFCN(5, None), voc.CLASSES[:5], (32, 32))
    changes, base = EDITS[name], BASES.get(name)
    stem = f"train-mine{'_no_pretrained' if base else ''}"
    assert run(project, changes, "--out complete", base) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sanity, "check", lambda *args, **options: [])
        assert run(project, changes, "--out unchecked", base) == 0
        stop(patch, 2)
        with pytest.raises(Stop):
            run(project, changes, "--out stopped", base)
    first = last(project, "stopped", stem)
    assert run(project, changes, "--out stopped --resume", base) == 0
    complete, csv = last(project, "complete", stem), Path("results", f"{stem}_seed0.csv")
    for out in ("unchecked", "stopped"):
        assert_same_training(last(project, out, stem), complete)
        assert (project / out / csv).read_bytes() == (project / "complete" / csv).read_bytes()
    assert first["epoch"] == 1 and any((first["model"][key] != complete["model"][key]).any() for key in first["model"])
    model, split = checkpoint.load(project / "complete" / f"best_{stem}.pt"), voc.Split(project / "Tiny", "val")
    assert predict.segment(model, split.photo(0)).shape == split.mask(0).shape
    assert model.size == {"input": (18, 24), "averaged weights": (64, 64)}.get(name, (32, 32))
    assert (name == "input") == (model.mean == model.std == (0.5, 0.5, 0.5))


COUNTING = """
def training_step(*args, **position):
    training_step.calls.append([position[name] for name in ("index", "count", "epoch", "epochs")])
    return engine.training_step(*args)

training_step.calls = []
engine.fit(..., training_step=training_step)
"""


def test_a_training_step_is_called_once_per_batch(project):
    assert run(project, COUNTING) == 0
    expected = [[index, 3, epoch, 2] for epoch in (1, 2) for index in range(3)]
    assert sys.modules["train-mine"].training_step.calls == expected


@pytest.mark.parametrize(("mode", "column"), [("max", "val_miou"), ("min", "val_loss")])
def test_plateau_is_stepped_with_its_metric_after_each_epoch(project, monkeypatch, mode, column):
    values = []
    monkeypatch.setattr(torch.optim.lr_scheduler.ReduceLROnPlateau, "step", lambda self, value: values.append(value))
    assert run(project, scheduler(f'ReduceLROnPlateau(optimizer, "{mode}")')) == 0
    assert values == [row[column] for row in last(project)["history"]] and len(values) == 2


def step_of(text):
    """The training step of a block, or engine's for no text."""
    namespace = {"engine": engine, "torch": torch, "training_step": engine.training_step}
    exec(block(text).partition("engine.fit(")[0] if text else "", namespace)
    return namespace["training_step"]


ACCUMULATION, CLIPPING = "loss / accumulated", "clip_grad_norm_"


@pytest.mark.parametrize("count", [4, 3])
def test_accumulated_gradients_are_those_of_one_large_batch(tiny, float32, count):
    criterion = torch.nn.CrossEntropyLoss(ignore_index=util.VOID)
    images, masks = (part[:count] for part in next(make_loaders(tiny, 4, size=32)[1].batches())[:2])
    masks[masks == util.VOID] = 0  # every image then weighs the same
    weights = []
    for step, size in ((engine.training_step, count), (step_of(ACCUMULATION), 1)):
        torch.manual_seed(0)
        model = TinyNet(21, norm=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for index in range(count // size):
            batch = slice(index * size, (index + 1) * size)
            step(model, images[batch], masks[batch], criterion, optimizer, index=index, count=count // size)
        weights.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("text", ["", CLIPPING, ACCUMULATION])
def test_gradients_of_what_the_optimizer_does_not_hold_do_not_add_up(tiny, float32, text):
    """They would count in the norm, and clipping by it would shrink every step more than the one before."""
    criterion = torch.nn.CrossEntropyLoss(ignore_index=util.VOID)
    images, masks, _ = next(make_loaders(tiny, 2, size=32)[1].batches())
    torch.manual_seed(0)
    model = TinyNet(21, norm=False)
    model.classifier.weight.data *= 20  # so that gradients are clipped
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.01)
    for _ in range(3):
        before = model.classifier.weight.detach().clone()
        gradients = torch.autograd.grad(criterion(model(images), masks), list(model.parameters()))
        expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        norm = step_of(text)(model, images, masks, criterion, optimizer, index=0, count=1)[2]
        torch.testing.assert_close(norm, expected)
        scale = expected.clamp(max=1) / expected if text == CLIPPING else 1
        torch.testing.assert_close(model.classifier.weight.detach(), before - 0.01 * scale * gradients[2])


@pytest.mark.parametrize("text", ["v2.Compose", "Albumentations("])
def test_augmentation_of_a_library_depends_only_on_seed_and_epoch(tiny, text):
    namespace = {"util": util, "torch": torch}
    exec(block(text), namespace)
    augmented, plain = (make_loaders(tiny, 5, size=32, augment=each)[0] for each in (namespace["augment"], None))
    loaders = ((augmented, 1), (augmented, 1), (augmented, 2), (plain, 1))
    first, second, other, original = (next(loader.batches(epoch))[0] for loader, epoch in loaders)
    assert torch.equal(first, second) and not torch.equal(first, other) and (first - original).abs().max() > 0.1


def splits_of(*blocks, fold="0", **names):
    """The splits that the blocks pass to ``voc.loaders``."""
    loaders = mock.Mock(return_value=3 * [None])
    names |= {"voc": Namespace(**vars(voc) | {"loaders": loaders}), "torch": torch, "augment": None}
    exec("\n".join(blocks).replace("fold = 0", f"fold = {fold}"), names)
    return loaders.call_args.kwargs["splits"]


def test_a_wrapped_dataset_shows_the_images_of_its_pairs(tiny):
    write_pets(tiny)
    args = Namespace(data=tiny, limit=None, batch_size=9, seed=0, device="cpu")
    own = splits_of(block("Pets(voc"), block("random_split"), args=args)
    assert [(split.name, len(split), split.dataset) for split in own] == [("train", 8, "Tiny"), ("val", 1, "Tiny")]
    train, val, test = voc.loaders(args, size=32, splits=own)
    assert test is None and train.classes == ("background", "pet") and not (tiny / ".cache").exists()
    expected = voc.Loader(voc.Split(tiny, "all", ids=[f"{index:06d}" for index in range(9)]), 32, 9)
    for loader, part in zip((train, val), (split.pairs for split in own)):
        assert torch.equal(loader.images, expected.images[part.indices])
        masks = expected.masks[part.indices]
        assert torch.equal(loader.masks, masks.where((masks == 0) | (masks == util.VOID), torch.ones_like(masks)))
    assert len(voc.loaders(Namespace(**vars(args) | {"limit": 3}), size=32, splits=own)[0].masks) == 3


def test_each_image_is_in_val_of_one_fold_and_each_fold_has_a_cache_of_its_own(tiny):
    ids, shown = [f"{index:06d}" for index in range(9)], []
    everything = voc.Loader(voc.Split(tiny, "all", ids=ids), 16, 9).data
    for fold in range(5):
        train, val = splits_of(block("fold = 0"), fold=fold, args=Namespace(data=tiny))
        assert sorted(train.ids + val.ids) == ids
        for split in (train, val):
            assert torch.equal(voc.Loader(split, 16, 9).data, everything[[*map(int, split.ids)]])
        shown += val.ids
    assert sorted(shown) == ids and len(list((tiny / ".cache").iterdir())) == 1 + 5 * 2


def test_albumentations_moves_photo_and_mask_alike_and_fills_with_void():
    """The oracle is torch.rot90; a photo and its mask hold the same values."""
    namespace = {"util": util, "torch": torch}
    exec(block("Albumentations("), namespace)
    quarter = namespace["Affine"](rotate=(90, 90), fill_mask=util.VOID, p=1)
    mask = torch.arange(30 * 30, dtype=torch.uint8).reshape(30, 30) % 21
    photo, truth = namespace["Albumentations"]([quarter])(mask.repeat(3, 1, 1), mask)
    assert torch.equal(truth, mask.rot90()) and torch.equal(photo, truth.repeat(3, 1, 1))
    _, truth = namespace["Albumentations"]([namespace["rotate"]])(mask.repeat(3, 1, 1), mask)
    assert (truth == util.VOID).any()


SIZES = """
def training_step(network, images, masks, criterion, optimizer, epoch, **position):
    result = engine.training_step(network, images, masks, criterion, optimizer)
    return result if epoch == 1 else (*result[:3], result[3][..., :24, :24], *EXTRA)

engine.fit(..., training_step=training_step)
"""


def test_metrics_on_train_are_those_of_the_masks_that_a_step_returns(project, capsys):
    """The step predicts what it returns as masks, but for half of the pixels."""
    assert run(project, SIZES.replace(", *EXTRA", "")) == 2
    error = "training_step returned logits [2, 21, 24, 24], but the masks are [2, 32, 32]: return the masks that"
    output, errors = capsys.readouterr()
    assert_one_line(errors, re.escape(error))
    assert last(project)["epoch"] == 1
    masks = "result[3][..., :24, :24].max(1).indices.where(torch.arange(24) % 8 < 4, util.VOID - 250)"
    assert run(project, SIZES.replace("*EXTRA", masks), "--overwrite") == 0
    accuracies = [row["train_pixel_accuracy"] for row in last(project)["history"]]
    assert 0.5 <= accuracies[1] <= 0.6 and accuracies[1] != accuracies[0]


LOG = """
def log(row):
    log.rows.append(row)
    1 / (row["epoch"] - 3)

log.rows = []
engine.fit(..., after_epoch=log)
"""


def test_after_epoch_gets_the_row_of_an_epoch_once_its_checkpoint_is_written(project, capsys):
    with pytest.raises(ZeroDivisionError):  # a fault of the user's own
        run(project, LOG, "--epochs 4")
    rows, history = sys.modules["train-mine"].log.rows, last(project)["history"]
    assert [row.items() <= kept.items() for row, kept in zip(rows, history, strict=True)] == 3 * [True]
    assert history[0].keys() - rows[0].keys() == {"batch_learning_rates"} and rows[0]["seconds"] > 0
    assert "stopped after epoch 3; kept " in capsys.readouterr().out


def test_tensorboard_shows_the_rows(project):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(project, block("SummaryWriter")) == 0
    events = EventAccumulator(str(project / "tensorboard")).Reload()
    for name in ("val_miou", "learning_rate_2"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(row["epoch"], pytest.approx(row[name])) for row in last(project)["history"]]


PRETRAINED = """
class Pretrained(torch.nn.Conv2d):
    def __init__(self, num_classes, weights):
        super().__init__(3, num_classes, 1)
        self.arguments = {"num_classes": num_classes, "weights": weights}
        open("weights.pt").close()

open("weights.pt", "w").close()
model = Pretrained(len(train.classes), weights="imagenet")
"""


def test_a_network_that_loads_pretrained_weights_again_is_named(project, capsys):
    assert run(project, PRETRAINED, "--epochs 1") == 0
    assert "warning: self.arguments asks for weights: a download whenever" in capsys.readouterr().out
    Path("weights.pt").unlink()
    with pytest.raises(util.UserError) as error:
        checkpoint.load(project / "best_train-mine.pt")
    expected = "best_train-mine.pt: its network Pretrained could not load a file ([Errno 2] No such file or directory: "
    assert expected in str(error.value) and "let its constructor load none (docs/EDITING.md" in str(error.value)


NESTED_NET = "\nmodel = type('Nested', (torch.nn.Conv2d,), {'arguments': {}})(3, len(train.classes), 1)"
V2 = "from torchvision.transforms import v2\naugment = "
TIMES_VALUE, VALUE = "return self.layer(images * self.value)", "model = Net(len(train.classes), value=1.1)"
UNSAVED = 'self.register_buffer("b", torch.rand(1), persistent=False)'
PER_BATCH = scheduler("ReduceLROnPlateau(optimizer)") + 'engine.fit(..., scheduler_interval="batch")'
MERGED = """
class Merged(voc.Split):
    def __init__(self, name):
        super().__init__("Tiny", name)
        self.classes = ("background", "a", "b", "object")

    def mask(self, index):
        merged = super().mask(index).astype(int)  # NumPy's own type
        return numpy.where(merged == 15, 3, merged)

import numpy
train, val, test = voc.loaders(args, 32, splits=[Merged("train"), Merged("val")])
"""
MISTAKES = {
    "no arguments": (net(arguments="None"), "Net cannot be rebuilt .*: keep the keyword .* self.arguments"),
    "missing argument": (net(arguments="{}"), "Net cannot be rebuilt .*num_classes.* self.arguments has to hold"),
    "odd argument": (net(arguments='{"num_classes": print}'), "cannot be rebuilt .* has to hold numbers, strings"),
    "forgotten argument": (net(TIMES_VALUE, extra="self.value = value") + VALUE, "cannot be rebuilt .* other logits"),
    "unsaved buffer": (net("return self.layer(images) * self.b", extra=UNSAVED), "cannot be rebuilt .* other logits"),
    "class in a function": (NESTED_NET, "Nested cannot be rebuilt .*: its network Nested is not at the top level"),
    "compiled": (net() + "model = torch.compile(Net(21))", "leave out torch.compile, pass --compile"),
    "other classes": (net(extra="self.layer = torch.nn.Conv2d(3, 10, 1)"), r"shape \[2, 10, 32, 32\], not \[2, 21, 32"),
    "a tuple": (net("return self.layer(images), None"), "has to return logits, or a dict with logits as out"),
    "loss per pixel": (loss("return logits.mean(1)"), r"the criterion returns a tensor of shape \[2, 32, 32\]"),
    "loss as a float": (loss("return logits.mean().item()"), "the criterion returns a float"),
    "loss that is not finite": (loss("return logits.sum() / 0"), "the loss of a batch of val is (nan|-?inf) before"),
    "another size": (f"{V2}v2.RandomCrop(16)", r"images of torch.uint8 \[16, 3, 16, 16\], not .*keep size"),
    "interpolated": (f"{V2}lambda image, mask: (image, mask // 255 * 100)", "masks the label 100, which is no class"),
    "data loader": ("val = torch.utils.data.DataLoader(val.split)", "takes the loaders train, .* Dataset of your own"),
    "other order": ("train, val, test = voc.loaders(args, 32)[::-1]", "takes the loaders train, val and test in this"),
    "unknown interval": ('engine.fit(..., scheduler_interval="step")', "scheduler_interval is 'step'"),
    "value without a class": (MERGED.replace("15, 3", "15, 21"), "Merged.mask returns 21, which is neither"),
    "plateau per batch": (PER_BATCH, "scheduler_interval is 'batch': it has to be epoch"),
}


def assert_one_line(errors, message):
    assert errors.count("\n") == 1 and re.match(f"error: .*{message}", errors), errors


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_before_the_first_epoch_in_one_line(project, monkeypatch, capsys, name):
    changes, message = MISTAKES[name]
    monkeypatch.setattr(engine, "train_epoch", None)
    assert run(project, changes) == 2
    output, errors = capsys.readouterr()
    assert_one_line(errors, message)
    assert not list(project.glob("*.pt")) and "epoch" not in output


def test_what_a_training_step_returns_is_checked_after_the_first_one(project, capsys):
    assert run(project, COUNTING.replace("(*args)", "(*args)[0]")) == 2
    assert_one_line(capsys.readouterr().err, "training_step has to return loss, weight and norm")


@pytest.mark.parametrize(
    "network",
    [
        net("self.steps += self.training; return self.layer(images) * self.steps", extra="self.steps = 1"),
        net(TIMES_VALUE, extra="self.value = value; torch.nn.init.zeros_(self.layer.weight)") + VALUE,
    ],
)
def test_a_network_that_loses_its_state_only_in_training_is_found_at_the_first_checkpoint(project, capsys, network):
    assert run(project, network) == 2
    assert_one_line(capsys.readouterr().err, "Net cannot be rebuilt .* other logits.*in a parameter or buffer")
    assert last(project)["epoch"] == 1


def test_parameter_groups_that_a_step_adds_are_refused(project, capsys):
    """The history has a column for each, and a checkpoint could not be resumed."""
    added = 'if position["epoch"] == 2: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})'
    assert run(project, block("clip_grad_norm_").replace("optimizer.step()", f"optimizer.step()\n    {added}")) == 2
    assert_one_line(capsys.readouterr().err, "a step of epoch 2 added parameter groups: add them before engine.fit")
    assert last(project)["epoch"] == 1


CRASHES = {
    "loss": (loss("return super().forward(logits[:, 0], masks)"), "trying the criterion, with 255 for void"),
    "loss without void": ("criterion = torch.nn.CrossEntropyLoss()", "trying the criterion, with 255 for void"),
    "loss of a package": ("from my_package.losses import my_loss\ncriterion = my_loss", "trying the criterion, .*"),
    "network": (net("return self.layer(images[:, :2])"), "trying the network"),
    "augmentation": (f"{V2}v2.RandomCrop(300)", "trying the augmentation"),
    "training step": (COUNTING.replace("calls.append", "unknown"), "training epoch 1"),
}


@pytest.mark.parametrize("name", CRASHES)
def test_an_error_in_the_users_code_keeps_its_traceback(project, capsys, name):
    changes, doing = CRASHES[name]
    (project / "my_package").mkdir()
    (project / "my_package" / "losses.py").write_text("def my_loss(logits, masks):\n    return 1 / 0\n")
    with pytest.raises((RuntimeError, ValueError, IndexError, ZeroDivisionError, AttributeError)) as crash:
        run(project, changes)
    assert re.fullmatch(f"error while {doing}:\n", capsys.readouterr().err)
    places = {"loss of a package": "losses.py", "loss without void": "sanity.py", "augmentation": "data.py"}
    assert places.get(name, "train-mine.py") in [frame.path.name for frame in crash.traceback]


NORM = net("return self.layer(self.norm(images))", extra="self.norm = torch.nn.BatchNorm2d(3).requires_grad_(False)")
NORM += "optimizer = torch.optim.Adam(model.layer.parameters())"
CONSTANT = """
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward"""
POLY = "class Poly:\n    step = lambda self: None\n\nscheduler = Poly()"
AS_CLASS = "masks[masks == util.VOID] = 0; return super().forward(logits, masks)"
WARNINGS = {
    "left out": (
        "optimizer = torch.optim.Adam(model.classifier.parameters())",
        "4 of 6 trainable parameters are not in the optimizer: layers.0.weight, layers.0.bias, layers.2.weight, ...",
    ),
    "loss": (
        LEARNED.partition("optimizer = ")[0],
        "1 of 7 trainable parameters are not in the optimizer: criterion.scale",
    ),
    "no gradient": (
        net(extra="self.unused = torch.nn.Linear(2, 2)"),
        "the first step gave no gradient to unused.weight, unused.bias, which the optimizer holds",
    ),
    "zeroed": (block(CLIPPING).replace("optimizer.step()", "optimizer.step(); network.zero_grad()"), None),
    "frozen batch norm": (NORM, "frozen batch norm still updates its running statistics (norm)"),
    "constant batch norm": (NORM.replace("\n    def forward", CONSTANT, 1), None),
    "borders of a class": (f"{V2}v2.RandomRotation((30, 40))", "augment fills the borders of masks with the class 0"),
    "borders of void": (block("v2.Compose"), None),
    "void": (loss(AS_CLASS), "the loss depends on void pixels"),
    "merged classes": (MERGED, None),
    "schedule of batches": (block("OneCycleLR").partition("engine")[0], "the scheduler is for 3 steps, but takes 1: "),
    "own schedule": (POLY, "Poly has no state_dict: after --resume, it starts anew"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_may_be_meant_is_a_warning(project, capsys, name):
    changes, warning = WARNINGS[name]
    assert run(project, changes, "--epochs 1") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    found = [line for line in lines if not re.match("warning: (at 32x32, train has no pixel|on val|on test)", line)]
    assert len(found) == bool(warning), found
    assert warning is None or found[0].startswith(f"warning: {warning}")


def test_a_run_goes_on_after_an_edit_of_what_its_script_imports(project, capsys):
    """The network stands in a file of its own, which imports another one from a folder; a docstring may change."""
    blocks = project / "my_parts" / "blocks.py"
    blocks.parent.mkdir()
    blocks.write_text(before := '"""Blocks."""\nfrom torch import nn\n\nLayer = nn.Conv2d\n')
    network = net().replace("torch.nn.Conv2d", "Layer").partition("\nmodel = ")[0]
    (project / "my_net.py").write_text(f"import torch\nfrom my_parts.blocks import Layer\n{network}")
    (project / "unused.py").touch()
    changes = "from my_net import Net\nmodel = Net(len(train.classes))\nscheduler = None"
    assert run(project, changes, "--epochs 1") == 0
    for number, text in enumerate((before.replace("Blocks", "Layers"), after := before + "size = 1\n"), 2):
        blocks.write_text(text)
        for name in ("my_net", "my_parts.blocks"):
            del sys.modules[name]
        capsys.readouterr()
        assert run(project, changes, f"--epochs {number} --resume") == 0
        message = "warning: my_parts/blocks.py has changed ('size = 1') since epoch 2: the run goes on with it"
        assert (message in capsys.readouterr().out) == (text == after)
    constant = "torch.optim.lr_scheduler.ConstantLR(optimizer)"
    assert run(project, changes.replace("None", constant), "--epochs 3 --resume") == 2
    assert_one_line(
        capsys.readouterr().err, ".*last_train-mine.pt: its run had scheduler NoneType, not ConstantLR: .*--over"
    )
    assert run(project, changes, "--epochs 2 --resume") == 2
    assert_one_line(capsys.readouterr().err, ".*last_train-mine.pt: its run has 3 epochs, more than 2: raise --ep")
    (first, old), (third, new) = (version.values() for version in last(project)["code"])
    assert (first, old["my_parts/blocks.py"], third, new["my_parts/blocks.py"]) == (1, before, 3, after)
    assert list(new)[0] == "train-mine.py" and "unused.py" not in new


def test_a_run_is_not_continued_with_other_data_or_settings(project, capsys):
    cosine = scheduler("CosineAnnealingLR(optimizer, args.epochs)")
    cosine += block("lr=args.lr")
    assert run(project, cosine) == 0
    assert "lr 0.001, limit" in Path("plots/train-mine_report.html").read_text(encoding="utf-8")
    loaders = "train, val, test = voc.loaders(args, size="
    for flags, changes, message in (
        ("--seed 1", "", "had seed 0, not 1"),
        ("--batch-size 3", "", "had batch_size 2, not 3"),
        ("--limit 2", "", "had limit None, not 2"),
        ("--epochs 3", "", "had epochs 2, not 3"),
        ("--lr 1e-4", "", "had lr 0.001, not 0.0001"),
        ("", "scheduler = None", "had scheduler CosineAnnealingLR, not NoneType"),
        ("", "optimizer = torch.optim.SGD(model.parameters())", "had optimizer Adam, not SGD"),
        ("", f"{loaders}40)", r"had size \[32, 32\], not \[40, 40\]"),
        ("", f"{loaders}32, mean=[0.5, 0.5, 0.5])", r"had mean \[0.485, .*\], not \[0.5, 0.5, 0.5\]"),
        ("", "train.classes = val.classes = test.classes = train.classes[::-1]", r"had classes \['background', "),
        ("", "val.masks[:, 0] = 5", "had other image ids or masks"),
    ):
        assert run(project, cosine + changes, f"{flags} --resume") == 2
        assert_one_line(capsys.readouterr().err, f".*last_train-mine.pt: its run {message}.*: resume with")


def test_phases_are_runs_of_their_own(project, monkeypatch, capsys):
    script = (ROOT / "train.py").read_text(encoding="utf-8")
    fit = script[script.index(FIT) : script.index("\n\nif __name__")].rstrip()
    second = fit.replace("scheduler=scheduler", 'scheduler=scheduler, name="second"')
    assert run(project, "", "--epochs 1 --out twice --overwrite", old=fit, new=f"{fit}\n{fit}") == 2
    assert_one_line(capsys.readouterr().err, "engine.fit is called twice for train-mine: pass a name= of its own")
    phases = {"old": fit, "new": f"{fit}\n    model.layers.requires_grad_(False)\n{second}"}
    assert run(project, "", "--out complete", **phases) == 0
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop(patch, 4)  # in the second epoch of the second phase
        run(project, "", "--out stopped", **phases)
    assert run(project, "", "--out stopped --resume", **phases) == 0
    for name in ("train-mine", "second"):
        assert_same_training(last(project, "stopped", name), last(project, "complete", name))
        assert last(project, "stopped", name)["experiment"] == name


@pytest.mark.parametrize(("old", "new", "warned"), [('"""', '"""My ', False), ("ReLU", "GELU", True)])
def test_a_model_whose_network_was_edited_since_its_training_loads_with_a_warning(project, capsys, old, new, warned):
    assert run(project, block("MyNet("), "--epochs 1", name="train.v2") == 0
    script = project / "train.v2.py"
    script.write_text(script.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    del sys.modules["train.v2"]
    path = project / "best_train.v2.pt"
    code = checkpoint.read(path)["code"]
    for recorded in (code, code[0]["files"], None):  # earlier versions recorded one text, or none
        checkpoint.save(path, checkpoint.read(path) | {"code": recorded})
        capsys.readouterr()
        assert checkpoint.load(path).network.arguments == {"num_classes": 21, "width": 16}
        assert ("best_train.v2.pt: train.v2.py has changed (" in capsys.readouterr().err) == (warned and bool(recorded))


def test_a_script_without_main_guard_is_refused(project, monkeypatch, capsys):
    """A checkpoint of its network could not be loaded: importing the script would start a run."""
    script = edit((ROOT / "train_5_a.py").read_text(encoding="utf-8"), block("MyNet("))
    (project / "train_mine.py").write_text(script.replace('if __name__ == "__main__":\n    ', ""), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train_mine.py", *FLAGS.split()])
    with pytest.raises(SystemExit):
        runpy.run_path("train_mine.py", run_name="__main__")
    assert_one_line(capsys.readouterr().err, '.*put its cli.run.main. below if __name__ == "__main__"')


def test_a_run_whose_val_loss_is_not_finite_stops_and_keeps_the_epochs_before(project, monkeypatch, capsys):
    evaluate, losses = engine.evaluate, iter((1.0, float("nan")))
    monkeypatch.setattr(engine, "evaluate", lambda *args, **kw: replace(evaluate(*args, **kw), loss=next(losses)))
    assert run(project, "") == 2
    assert_one_line(capsys.readouterr().err, "the val loss is nan in epoch 2: start again with a lower learning rate")
    assert last(project)["epoch"] == 1


def test_a_loader_that_shuffles_is_not_evaluated(tiny):
    with pytest.raises(util.UserError, match="evaluate needs a loader without training=True"):
        engine.evaluate(torch.nn.Identity(), make_loaders(tiny, 2, size=32)[0], None)


SETUP = f"""
import sys; sys.path.append({str(TESTS)!r})
import pytest, conftest; conftest.skip_drawing(pytest.MonkeyPatch())
"""
NETWORK_IN_A_CELL = """
class Net(CustomFCN):
    pass
engine.fit(args, Net(21), train, val, test, criterion=criterion, optimizer=optimizer, scheduler=None)
"""
INTERRUPTED = """
import os, signal
fit = engine.fit
def interrupt(row):
    os.kill(os.getpid(), signal.SIGINT)
engine.fit = lambda *args, **options: fit(*args, **options, after_epoch=interrupt)
"""


def test_cells_of_a_notebook_train_again_are_interrupted_and_resume(tmp_path, kernel):
    out = tmp_path / "out"
    cell = CELL.replace("size=224", "size=32").replace('"64"', f'"4", "--out", {str(out)!r}')
    cell = cell.replace('"data/VOCdevkit/Toy"', repr(str(make_tiny(tmp_path / "Tiny"))))
    fit, resumed = cell[cell.index("engine.fit(") :], cell.replace("--overwrite", "--resume")
    sources = [SETUP, cell, fit, NETWORK_IN_A_CELL, INTERRUPTED + cell, f"engine.fit = fit\n{resumed}"]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, sources)])
    NotebookClient(notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [cell["outputs"] for cell in notebook.cells]
    errors = [[each["ename"] for each in cell if each["output_type"] == "error"] for cell in outputs]
    assert errors == [[], [], [], ["UserError"], ["KeyboardInterrupt"], []]
    assert outputs[3][-1]["evalue"].endswith(f"not at the top level of cells.py in {ROOT}: put it into a file there")
    texts = ["".join(each.get("text", "") for each in cell) for cell in outputs]
    assert "stopped after epoch 1; kept" in texts[4] and "continuing" in texts[5]
    results = [re.search("cells seed 0: val mean IoU .*", texts[index])[0] for index in (1, 2, 5)]
    assert results[2] == results[0] != results[1]  # the second cell went on with the weights of the first
    (run,) = compare.finished_runs(out)
    assert len(run.history) == 3 and run.metrics["title"] == "My try" and run.report.exists()
    assert checkpoint.load(run.best).network.arguments["num_classes"] == 21
