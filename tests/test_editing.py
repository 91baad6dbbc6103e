"""Edits of a script: every block of docs/EDITING.md trains, resumes and loads again, and mistakes are refused."""

import ast
import importlib.util
import json
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, TESTS, make_loaders, make_tiny, run_main, skip_drawing
from tiny_net import TinyNet
from torchvision.models.resnet import BasicBlock, ResNet

import basic_fcn
import predict
import resnet_fcn
import resnet_unet
import util
import voc
from seg import checkpoint, engine, sanity

FLAGS = "--data Tiny --epochs 4 --batch-size 2 --device cpu"
PRETRAINED = ("train_5_b", "train_6")
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "EDITING.md").read_text(encoding="utf-8"), re.S)


def block(text):
    """The block of docs/EDITING.md that contains a text."""
    (found,) = [block for block in BLOCKS if text in block]
    return found


def edit(script, changes):
    """Apply changes to the code of a script as docs/EDITING.md describes; each has to find its place."""
    for statement in ast.parse(changes).body:
        before = script
        code = ast.get_source_segment(changes, statement)
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.ImportFrom):
            script = script.replace("def main():", f"{code}\n\n\ndef main():")
        elif code.startswith("engine.fit(..., "):
            keyword = code.removeprefix("engine.fit(..., ").removesuffix(")")
            script = script.replace("patience=", f"{keyword}, patience=")
        elif isinstance(statement, ast.Assign):
            target = ast.get_source_segment(changes, statement.targets[0])
            old = [
                node
                for node in ast.walk(ast.parse(script))
                if isinstance(node, ast.Assign) and ast.get_source_segment(script, node.targets[0]) == target
            ]
            new = "    " + code.replace("\n", "\n    ")
            if old:
                script = script.replace("    " + ast.get_source_segment(script, old[0]), new)
            else:
                script = script.replace("    augment = ", f"{new}\n    augment = ")
        else:
            script = script.replace("    weight = ", f"    {code}\n    weight = ", 1)
        assert script != before, code
    return script


def small_resnet(weights=None, norm_layer=None):
    """A ResNet-18 with half of its blocks."""
    assert weights is None
    return ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with data, in which scripts and networks are looked up; the networks are small, plots are not drawn."""
    make_tiny(tmp_path / "Tiny")
    for path in (TESTS / "tiny_net.py", ROOT / "custom_fcn.py", ROOT / "resnet_fcn.py", ROOT / "resnet_unet.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    monkeypatch.setattr(basic_fcn, "FCN", TinyNet)
    skip_drawing(monkeypatch)
    for module in (resnet_fcn, resnet_unet):
        monkeypatch.setattr(module, "resnet18", small_resnet)
    loaders = voc.loaders
    small = {224: 32, (192, 256): (18, 24), 320: 32, (352, 480): 64}
    monkeypatch.setattr(
        voc, "loaders", lambda *args, size, **options: loaders(*args, size=small.get(size, size), **options)
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None)]:
        if name.startswith("train") and sys.modules[name].__file__.startswith(str(tmp_path)):
            del sys.modules[name]


def run(project, changes, flags="", name="train-mine", base="train", old="", new=""):
    """Edit a copy of a script and run it; return its exit code."""
    script = edit((ROOT / f"{base}.py").read_text(encoding="utf-8"), changes)
    assert old in script
    (project / f"{name}.py").write_text(script.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, project / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    pretrained = " --no-pretrained" if base in PRETRAINED else ""
    return run_main(project, sys.modules[name], FLAGS + pretrained + f" {flags}")


AUX_NET = """
class AuxNet(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.arguments = {"num_classes": num_classes}
        self.layers = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.classifier, self.aux = torch.nn.Conv2d(8, num_classes, 1), torch.nn.Conv2d(8, num_classes, 1)

    def forward(self, images):
        features = self.layers(images).relu()
        return {"out": self.classifier(features), "aux": self.aux(features), "levels": [1], "none": None}

model = AuxNet(len(train.classes))
"""
ODD_NET = '''
import numpy
class OddNet(torch.nn.Module):
    """Names that checkpoints use too, NumPy and item() in the constructor, a buffer that is not saved."""
    def __init__(self, classes, size, mean=0.5):
        super().__init__()
        self.arguments = {"classes": classes, "size": size, "mean": mean}
        self.classes, self.size, self.mean = classes, size, mean
        self.width = int(torch.linspace(1, 8, 8)[-1].item()) + int(numpy.arange(3)[0])
        self.register_buffer("offset", torch.full((1,), 0.1), persistent=False)
        self.layers = torch.nn.Conv2d(3, self.width, size, padding=size // 2)
        self.classifier = torch.nn.Conv2d(self.width, classes, 1)

    def encode(self, images):
        return self.layers(images + self.offset * self.mean).relu()

    def forward(self, images):
        return self.classifier(self.encode(images)).view(len(images), self.classes, *images.shape[2:])

model = OddNet(len(train.classes), size=3)
'''.replace("import numpy\n", "from numpy import arange\n").replace("numpy.arange", "arange")
FLOAT_WEIGHT = """
class HalfLoss(torch.nn.Module):
    def __init__(self, class_weights):
        super().__init__()
        self.weight = 0.5
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits, masks):
        loss = torch.nn.functional.cross_entropy(logits, masks, self.class_weights, ignore_index=util.VOID)
        return self.weight * loss

criterion = HalfLoss(voc.class_weights(train.split))
"""
LEARNED = """
class LearnedLoss(torch.nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__(ignore_index=util.VOID)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.ones(()))

    def forward(self, logits, masks):
        loss = super().forward(logits * self.scale, masks)
        if loss.requires_grad:
            self.mean.lerp_(loss.detach(), 0.1)
        return loss / self.mean

criterion = LearnedLoss()
optimizer = torch.optim.Adam([*model.parameters(), *criterion.parameters()], lr=1e-3)
"""
VIEWS = """
class ViewLoss(torch.nn.NLLLoss):
    def forward(self, logits, masks):
        shares = logits.softmax(1).view(*logits.shape[:2], -1).mean(2)
        return super().forward(logits.log_softmax(1), masks) + shares.square().sum(1).mean()

criterion = ViewLoss(ignore_index=util.VOID)
"""
WRAPPER = """
class Wrapper(torch.optim.Optimizer):
    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner

    def step(self):
        self.inner.step()

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)

optimizer = Wrapper(torch.optim.Adam(model.parameters(), lr=1e-3))
"""
LATE_BUFFERS = """
class LateNet(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.arguments = {"num_classes": num_classes}
        self.layer = torch.nn.Conv2d(3, num_classes, 1)
        self.register_buffer("grid", None, persistent=False)

    def forward(self, images):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, images.shape[3])
            self.register_buffer("step", torch.full((1,), 0.5), persistent=False)
        return self.layer(images + self.grid * self.step)

model = LateNet(len(train.classes))
"""
DEPTH = """
class DepthNet(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.arguments = {"num_classes": num_classes}
        self.layer, self.block = torch.nn.Conv3d(1, 3, 1), torch.nn.Conv2d(3, 3, 1)
        self.classifier = torch.nn.Conv2d(3, num_classes, 1)

    def forward(self, images):
        features = self.layer(images[:, None]).mean(2)
        if self.training and torch.rand(()) < 0.5:
            return self.classifier(features)
        return self.classifier(features + self.block(features))

model = DepthNet(len(train.classes))
"""
EDITS = {
    "polynomial": ("train", block("PolynomialLR")),
    "cosine after warm-up": (
        "train",
        "scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [torch.optim.lr_scheduler.LinearLR(optimizer, "
        "total_iters=1), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs - 1)], [1])",
    ),
    "cosine that ends at 0": (
        "train",
        "scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs - 1)",
    ),
    "schedule of NumPy": (
        "train",
        "import numpy\nscheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: numpy.cos(epoch / 4) "
        "if epoch else 1.0)",
    ),
    "optimizer in another one": ("train", WRAPPER + block("PolynomialLR")),
    "buffers made in the first forward pass": ("train_5_a", LATE_BUFFERS),
    "3D convolution and a layer that is left out at random": ("train_5_a", DEPTH),
    "one cycle": ("train", block("OneCycleLR")),
    "plateau": ("train", block("ReduceLROnPlateau(")),
    "clipping": ("train", block("clip_grad_norm_")),
    "accumulation": ("train", block("loss / accumulated")),
    "auxiliary loss": ("train_5_a", AUX_NET + block("aux_loss")),
    "fine-tuning": ("train_5_b", block("model.backbone.requires_grad_(True)")),
    "label smoothing": ("train", block("label_smoothing")),
    "focal": ("train", block("FocalLoss(")),
    "Dice": ("train", block("DiceLoss(")),
    "float weight": ("train", FLOAT_WEIGHT),
    "learned": ("train", LEARNED),
    "tensor learning rate": ("train", "optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-3))"),
    "views and NLLLoss": ("train", VIEWS),
    "network": ("train_5_a", block("MyNet(")),
    "odd network": ("train_5_a", ODD_NET),
    "torchvision network": ("train_5_a", block("LRASPP(")),
    "averaged weights": ("train_6", ""),
    "more varied photos": ("train_4_b", block("brightness=")),
    "v2 augmentation": ("train", block("v2.Compose")),
    "rectangle": ("train", block("size=(192, 256)")),
}


def test_every_block_of_the_document_is_run():
    assert [text for text in BLOCKS if not any(text in changes for _, changes in EDITS.values())] == []
    # the step with clipping has the most lines that are not a network
    assert all(text.count("\n") <= 13 for text in BLOCKS)


class Stop(Exception):
    """Stands for whatever stops a run."""


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_trains_and_resumes_to_the_same_result(project, monkeypatch, name):
    base, changes = EDITS[name]
    assert run(project, changes, "--out complete", base=base) == 0
    train_epoch = engine.train_epoch

    def stop_in_epoch_3(network, loader, epoch, *args):
        result = train_epoch(network, loader, epoch, *args)
        if epoch == 3:
            raise Stop
        return result

    monkeypatch.setattr(engine, "train_epoch", stop_in_epoch_3)
    with pytest.raises(Stop):
        run(project, changes, "--out stopped", base=base)
    monkeypatch.setattr(engine, "train_epoch", train_epoch)
    assert run(project, changes, "--out stopped --resume", base=base) == 0

    stem = "train-mine" + ("_no_pretrained" if base in PRETRAINED else "")
    histories = [(project / out / "results" / f"{stem}_seed0.csv").read_text() for out in ("complete", "stopped")]
    assert histories[0] == histories[1] and histories[0].count("\n") == 5
    states = [torch.load(project / out / f"last_{stem}.pt", weights_only=True) for out in ("complete", "stopped")]
    for part in ("model", "criterion", "optimizer"):
        torch.testing.assert_close(states[1][part], states[0][part], rtol=0, atol=0)
    assert states[1]["scheduler"] == states[0]["scheduler"]
    losses = history(project, "complete", "train_loss", stem)
    assert losses[-1] < losses[0]
    model = checkpoint.load(project / "complete" / f"best_{stem}.pt")
    mask = predict.segment(model, voc.Split(project / "Tiny", "val").photo(0))
    assert mask.shape == voc.Split(project / "Tiny", "val").mask(0).shape
    assert model.size == {"rectangle": (18, 24), "averaged weights": (64, 64)}.get(name, (32, 32))


def history(project, out, column, name="train-mine"):
    rows = (project / out / "results" / f"{name}_seed0.csv").read_text().splitlines()
    index = rows[0].split(",").index(column)
    return [float(row.split(",")[index]) for row in rows[1:]]


def test_one_cycle_is_stepped_once_per_batch(project):
    assert run(project, block("OneCycleLR"), "--out out") == 0
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=12)
    expected = []
    for _ in range(12):  # 4 epochs of 3 batches
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert history(project, "out", "learning_rate") == pytest.approx(expected[::3], rel=1e-9)


def wrapped_optimizer(model):
    scope = {"torch": torch, "model": model}
    exec(WRAPPER, scope)
    return scope["optimizer"]


def test_state_of_an_optimizer_in_another_one_may_be_saved_in_any_place():
    model = torch.nn.Linear(2, 2)
    optimizer = wrapped_optimizer(model)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    optimizer.state_dict = lambda: {"mine": [optimizer.inner.state_dict()]}
    assert checkpoint.unsaved(optimizer) == []
    optimizer.state_dict = lambda: {"state": {}}
    assert len(checkpoint.unsaved(optimizer)) == 6  # of two parameters, Adam's two means and the number of steps


def test_an_optimizer_in_another_one_keeps_its_groups():
    optimizer = wrapped_optimizer(torch.nn.Linear(2, 2))
    checkpoint.load_optimizer(optimizer, optimizer.state_dict())
    assert optimizer.param_groups[0] is optimizer.inner.param_groups[0]  # whose learning rate a scheduler changes


@pytest.mark.parametrize(("mode", "column"), [("max", "val_miou"), ("min", "val_loss")])
def test_plateau_lowers_the_learning_rate_when_its_metric_stalls(project, mode, column):
    changes = f'scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "{mode}", patience=0, threshold=0)'
    assert run(project, changes, "--epochs 12 --out out", old='lr": 5e-4', new='lr": 0.5') == 0
    values, rates = history(project, "out", column), history(project, "out", "learning_rate")
    best, expected = None, [0.5]
    for value in values[:-1]:
        stalled = best is not None and (value <= best if mode == "max" else value >= best)
        best = value if not stalled else best
        expected.append(expected[-1] * (0.1 if stalled and expected[-1] > 1e-8 else 1))
    assert rates == pytest.approx(expected) and rates[-1] < rates[0]


@pytest.mark.parametrize("count", [4, 3])
def test_accumulated_gradients_are_those_of_one_large_batch(tiny, project, float32, count):
    criterion = torch.nn.CrossEntropyLoss(ignore_index=util.VOID)
    namespace = {"engine": engine}
    exec(block("loss / accumulated").split("engine.fit(")[0], namespace)
    images, masks = (part[:count] for part in next(make_loaders(tiny, 4, size=32)[1].batches())[:2])
    masks[masks == util.VOID] = 0  # every image then weighs the same
    weights = []
    for step, size in ((engine.training_step, count), (namespace["training_step"], 1)):
        torch.manual_seed(0)
        model = basic_fcn.FCN(21, norm=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for index in range(count // size):
            batch = slice(index * size, (index + 1) * size)
            step(model, images[batch], masks[batch], criterion, optimizer, index=index, count=count // size)
        weights.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*weights)


def test_fine_tuning_changes_the_backbone_and_the_script_as_shipped_does_not(project):
    backbones = {}
    for name, changes in (("frozen", ""), ("tuned", block("model.backbone"))):
        assert run(project, changes, f"--out {name}", base="train_5_b") == 0
        for kind in ("best", "last"):
            state = torch.load(project / name / f"{kind}_train-mine_no_pretrained.pt", weights_only=True)["model"]
            backbones[name, kind] = {key: value for key, value in state.items() if key.startswith("backbone")}
    util.seed_everything(0)
    initial = resnet_fcn.ResNetFCN(21).state_dict()
    expected = {key: value for key, value in initial.items() if key.startswith("backbone")}
    for kind in ("best", "last"):
        torch.testing.assert_close(backbones["frozen", kind], expected, rtol=0, atol=0)
    frozen, tuned = backbones["frozen", "last"], backbones["tuned", "last"]
    changed = [key for key in tuned if not torch.equal(tuned[key], frozen[key])]
    assert changed and all("weight" in key for key in changed)  # statistics of batch norm stay


def test_v2_augmentation_depends_only_on_seed_and_epoch(tiny):
    namespace = {"util": util}
    exec(block("v2.Compose"), namespace)
    train, val, _ = make_loaders(tiny, 3, size=32, augment=namespace["augment"])
    first, second, other = (torch.cat([images for images, _, _ in train.batches(epoch)]) for epoch in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    for images, masks, indices in train.batches(1):
        assert masks.unique().tolist() != [255] and (images - train.normalise(train.images[indices])).abs().max() > 0.1
    assert torch.equal(next(val.batches())[0][0], val.normalise(val.images[:1])[0])


NESTED_NET = """
def network(num_classes):
    class Nested(torch.nn.Sequential):
        pass
    nested = Nested(torch.nn.Conv2d(3, num_classes, 1))
    nested.arguments = {}
    return nested

model = network(len(train.classes))
"""


def net(forward="return self.layer(images)", arguments='{"num_classes": num_classes}', extra="pass"):
    """A network that is its layer, with changes."""
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


CROSS_ENTROPY = "return torch.nn.functional.cross_entropy(logits, masks, ignore_index=util.VOID)"


def criterion(forward, extra="pass"):
    return f"""
class Loss(torch.nn.Module):
    def __init__(self, **options):
        super().__init__(**options)
        {extra}

    def forward(self, logits, masks):
        {forward}

criterion = Loss()
"""


def scheduler(call, interval=""):
    return f"scheduler = torch.optim.lr_scheduler.{call}\n" + (interval and f"engine.fit(..., {interval})\n")


WARM_UP = """    torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=500),
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
], milestones=[500])
"""
V2 = "from torchvision.transforms import v2\nfrom torchvision import tv_tensors\naugment = "
STEP = "\nengine.fit(..., training_step=lambda *args, **position: engine.training_step(*args, **position)[0])"
MISTAKES = {
    "no arguments": (net(arguments="None"), "Net cannot be rebuilt .* self.arguments"),
    "missing argument": (net(arguments="{}"), "Net cannot be rebuilt .*num_classes.* self.arguments has to hold"),
    "argument of another type": (
        net(arguments='{"num_classes": num_classes, "value": print}'),
        "Net cannot be rebuilt",
    ),
    "other value": (
        net(
            extra='self.layer.weight.requires_grad_(False); self.register_buffer("b", torch.rand(9), False)',
            forward="return self.layer(images) * self.b[0]",
        ),
        "rebuilt, it computes other logits",
    ),
    "buffer of another shape": (
        net(
            extra='self.register_buffer("mean", torch.zeros(1))',
            forward="self.mean = images.mean((2, 3)) if self.training else self.mean; return self.layer(images)",
        ),
        "cannot be rebuilt .*size mismatch for mean",
    ),
    "counter": (
        net(extra="self.steps = 0", forward="self.steps += self.training; return self.layer(images) * self.steps"),
        "rebuilt, it computes other logits.*in a parameter or buffer",
    ),
    "dropout in eval mode": (
        net("return torch.nn.functional.dropout(self.layer(images), 0.5)"),
        "other logits each time in eval mode: dropout needs training=self.training",
    ),
    "argument that is missing": (
        net(
            "return self.layer(images) * self.value", extra="self.value = value; self.layer.weight.data *= 1e-6"
        ).replace("Net(len(train.classes))", "Net(len(train.classes), value=1.1)"),
        "rebuilt, it computes other logits",
    ),
    "argument that is missing before zeros": (
        net(
            "return self.layer(images * self.value)", extra="self.value = value; self.layer.weight.data.zero_()"
        ).replace("Net(len(train.classes))", "Net(len(train.classes), value=1.1)")
        + "scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / 4)\n",
        "rebuilt, it computes other logits",
    ),
    "other weights in eval mode": (
        net(
            """return self.layer(images)

    def train(self, mode=True):
        if mode != self.training:
            self.layer.weight.data *= 2.0 if mode else 0.5
        return super().train(mode)"""
        ),
        "Net changes layer.weight in eval mode: keep the weights of each mode in a module of its own",
    ),
    "eval mode": (net() + "model.layer.eval()", "layer of the network is in eval mode"),
    "eval mode of all": (net() + "model.eval()", "the network is in eval mode: call its train"),
    "train without self": (
        net().replace(
            "    def forward", "    def train(self, mode=True):\n        super().train(mode)\n\n    def forward"
        ),
        r"train\(\) of the network has to return self",
    ),
    "sum": ('criterion = torch.nn.CrossEntropyLoss(ignore_index=util.VOID, reduction="sum")', "leave out reduction"),
    "lazy layer": (net(extra="self.layer = torch.nn.LazyConv2d(num_classes, 1)"), "the network has lazy layers"),
    "compiled": (net().replace("model = Net(len(train.classes))", "model = torch.compile(Net(21))"), "pass --compile"),
    "class of a loss": ("criterion = torch.nn.CrossEntropyLoss", "class CrossEntropyLoss, not an instance"),
    "class in a function": (NESTED_NET, "Nested cannot be rebuilt .*: define the class at the top level of a file"),
    "wrong number of classes": (
        net(extra="self.layer = torch.nn.Conv2d(3, 10, 1)"),
        r"logits have shape \[1, 10, 32, 32\]",
    ),
    "a tuple": (net("return self.layer(images), None"), "has to return logits, or a dict with logits as out"),
    "no logits": (net("return self.layer(images).mean()"), r"logits have shape \[\]"),
    "error in the network": (
        net("return self.layer(images[:, :2])"),
        "the network Net fails .train-mine.py, line [0-9]+: Runt",
    ),
    "pooled batch norm": (  # the last of batches of two has one image
        net(
            "return self.layer(images) * self.norm(images.mean((2, 3), keepdim=True)).mean(1, keepdim=True)",
            extra="self.norm = torch.nn.BatchNorm2d(3)",
        ),
        "the training step fails .train-mine.py, line .*Expected more than 1 value per channel",
    ),
    "unused parameter": (net(extra="self.unused = torch.nn.Linear(2, 2)"), "2 parameters that get no gradient .unused"),
    "frozen parameter": (
        net(extra="self.layer.weight.requires_grad_(False)"),
        "1 parameters that get no gradient .layer",
    ),
    "optimizer of another network": (
        "optimizer = torch.optim.Adam(FCN(2).parameters())",
        "holds [0-9] parameters of neither the network nor the criterion",
    ),
    "one cycle per epoch": (
        block("OneCycleLR").split("engine.fit")[0],
        'total_steps 12, .* pass scheduler_interval="batch"',
    ),
    "cosine per batch": (
        scheduler("CosineAnnealingLR(optimizer, args.epochs)", 'scheduler_interval="batch"'),
        r"T_max 4, but is stepped 12 times, once per batch: .*len\(train\)",
    ),
    "cosine without a step": (
        scheduler("SequentialLR(optimizer, [") + WARM_UP.replace("500", "3").replace("optimizer, 4", "optimizer, 0"),
        "T_max 0, but is stepped 1 times",
    ),
    "cosine too long": (
        scheduler("CosineAnnealingLR(optimizer, 100)"),
        "T_max 100, but is stepped 4 times.*args.epochs",
    ),
    "warm-up and cosine": (
        EDITS["cosine after warm-up"][1].replace("epochs - 1", "epochs"),
        "T_max 4, but is stepped 3 times",
    ),
    "warm-up longer than the run": (
        scheduler("SequentialLR(optimizer, [") + WARM_UP,
        'a CosineAnnealingLR, begins after step 500 of 4, once per epoch: .*"batch"',
    ),
    "chained": (
        "scheduler = torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.ConstantLR(optimizer), "
        "torch.optim.lr_scheduler.PolynomialLR(optimizer, 7)])",
        "total_iters 7, but",
    ),
    "plateau per batch": (
        scheduler("ReduceLROnPlateau(optimizer)", 'scheduler_interval="batch"'),
        "ReduceLROnPlateau is stepped after each",
    ),
    "unknown interval": ('engine.fit(..., scheduler_interval="step")', "scheduler_interval='step'"),
    "another optimizer": (
        "scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 1), 1)",
        "for another optimizer",
    ),
    "loss per pixel": (
        'criterion = torch.nn.CrossEntropyLoss(ignore_index=util.VOID, reduction="none")',
        r"shape \[1, 32, 32\]: take the",
    ),
    "void not ignored": ("criterion = torch.nn.CrossEntropyLoss()", "pass ignore_index=util.VOID"),
    "loss as a float": (criterion("return logits.mean().item()"), "the criterion returns a float"),
    "error in the loss": (
        criterion("return torch.nn.functional.one_hot(masks, 21).sum()"),
        "the criterion .* fails .train-mine.py, line",
    ),
    "loss without void": (
        criterion("return torch.nn.functional.cross_entropy(logits, masks)"),
        "the criterion .masks hold util.VOID for void. fails .*Target 255",
    ),
    "frozen network in the loss": (
        criterion(CROSS_ENTROPY, "self.perceptual = torch.nn.BatchNorm2d(3).eval()"),
        "perceptual of the criterion is in eval mode, .*override train.. in the criterion",
    ),
    "loss without gradient": (criterion("return logits.detach().mean()"), "the training step fails"),
    "result of the step": (STEP, "training_step has to return"),
    "own schedule": (
        """
class Poly:
    def step(self):
        pass

scheduler = Poly()
""",
        "Poly has no state_dict and load_state_dict",
    ),
    "other batches than the flag says": (
        "train, val, test = voc.loaders(args, size=32)",
        "train has batches of 3, not of 2: pass args.batch_size .* batch_size=3 in cli.arguments",
    ),
    "filled with background": (f"{V2}v2.RandomRotation((30, 40))", "gives masks a new label, 0: keep labels, and fill"),
    "scaled masks": (
        f"{V2}v2.ToDtype({{tv_tensors.Image: torch.uint8, tv_tensors.Mask: torch.float32}}, scale=True)",
        r"masks of torch.float32 \[64, 32, 32\], not torch.uint8",
    ),
    "normalised twice": (f"{V2}v2.ToDtype(torch.float32, scale=True)", "images of torch.float32 .*normalises after"),
    "another size": (f"{V2}v2.RandomCrop(16)", r"images of torch.uint8 \[64, 3, 16, 16\], not .*keep size"),
    "error in the augmentation": (f"{V2}v2.RandomCrop(300)", "the augmentation fails .*([Cc]rop)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_before_the_first_epoch_in_one_line(project, monkeypatch, capsys, name):
    changes, message = MISTAKES[name]
    monkeypatch.setattr(engine, "train_epoch", None)
    assert run(project, changes, base="train_5_a" if "model = " in changes else "train") == 2
    output, errors = capsys.readouterr()
    assert errors.count("\n") == 1 and re.match(f"error: .*train-mine.py: .*{message}", errors), errors
    assert not list(project.glob("*.pt")) and "epoch" not in output


def test_a_script_without_main_guard_is_refused(project, monkeypatch, capsys):
    """A checkpoint of its network could not be loaded: importing the script would start a run."""
    guard = 'if __name__ == "__main__":\n    cli.run(main)'
    monkeypatch.setattr(sys, "argv", ["train_mine.py", *f"{FLAGS} --data {project / 'Tiny'}".split()])
    assert run(project, block("MyNet("), base="train_5_a", name="train_mine") == 0
    script = (project / "train_mine.py").read_text(encoding="utf-8")
    (project / "train_mine.py").write_text(script.replace(guard, "cli.run(main)"), encoding="utf-8")
    del sys.modules["train_mine"]
    main = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location("__main__", project / "train_mine.py")
    )
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main.__loader__.exec_module(main)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'put its cli.run(main) below if __name__ == "__main__"' in error


def test_trainable_parameters_that_no_optimizer_holds_are_a_warning(project, capsys):
    changes = "optimizer = torch.optim.Adam(model.classifier.parameters())"
    assert run(project, changes, "--epochs 1") == 0
    problem = "4 trainable parameters are not in the optimizer, and change only if training_step does it"
    assert f"warning: {problem}: layers.0.weight, layers.0" in capsys.readouterr().out


@pytest.mark.parametrize(("probability", "warned"), [("1e-9", True), ("1e-9, self.training", False)])
def test_random_numbers_in_eval_mode_are_a_warning(project, capsys, probability, warned):
    """Even if they happen not to change the logits."""
    changes = net(f"return torch.nn.functional.dropout(self.layer(images), {probability})")
    assert run(project, changes, "--epochs 1", base="train_5_a") == 0
    assert ("warning: the network Net draws random numbers in eval mode" in capsys.readouterr().out) == warned


def test_a_trainable_loss_that_no_optimizer_holds_is_a_warning(project, capsys):
    forward = CROSS_ENTROPY.replace("(logits", "(logits * self.scale")
    changes = criterion(forward, "self.scale = torch.nn.Parameter(torch.ones(()))")
    assert run(project, changes, "--epochs 1") == 0
    problem = "1 trainable parameters are not in the optimizer, and change only if training_step does it"
    assert f"warning: {problem}: criterion.scale" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("forward", "warned"),
    [
        ("return super().forward(logits, masks.masked_fill(masks == util.VOID, 0))", True),
        ("masks[masks == util.VOID] = 0; return super().forward(logits, masks)", True),
        ("return super().forward(logits, masks)", False),
    ],
)
def test_a_loss_that_trains_on_void_is_a_warning(project, capsys, forward, warned):
    changes = criterion(forward).replace("torch.nn.Module", "torch.nn.CrossEntropyLoss")
    assert run(project, changes.replace("Loss()", "Loss(ignore_index=util.VOID)"), "--epochs 1") == 0
    warning = "warning: the criterion has a gradient at void pixels: unless that is intended, leave out those"
    assert (warning in capsys.readouterr().out) == warned


RATE = """
def training_step(network, images, masks, criterion, optimizer, index, count):
    optimizer.param_groups[0]["lr"] = 1e-3 / (index + 1)
    return engine.training_step(network, images, masks, criterion, optimizer, index, count)

engine.fit(..., training_step=training_step)
"""
COUNTER = criterion("self.calls += 1; " + CROSS_ENTROPY, "self.calls = 0")
EXTRA_STATE = """
    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state
"""
CONSTANT_NORM = """
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self
"""
LAYER_ONLY = "optimizer = torch.optim.Adam(model.layer.parameters())"
FROZEN = net("return self.layer(self.norm(images))", extra="self.norm = torch.nn.BatchNorm2d(3).requires_grad_(False)")


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ("StepLR(optimizer, 5)", True),
        ("StepLR(optimizer, 4)", False),
        ("MultiStepLR(optimizer, [300, 400])", True),
        ("CosineAnnealingWarmRestarts(optimizer, 500)", True),
        ("LinearLR(optimizer, total_iters=60)", True),
        ("CyclicLR(optimizer, 1e-4, 1e-3, step_size_up=200, cycle_momentum=False)", True),
    ],
)
def test_a_schedule_that_counts_more_steps_than_the_run_has_is_a_warning(project, capsys, changes, warned):
    assert run(project, scheduler(changes), "--epochs 4") == 0
    warning = re.search('warning: .*, but is stepped 4 times, once per epoch: .*"batch"', capsys.readouterr().out)
    assert bool(warning) == warned


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_an_augmentation_is_tried_on_labels_that_the_data_may_have(tiny, num_classes):
    class Remapping:
        def draw(self, count, generator):
            return torch.zeros(count)

        def __call__(self, images, masks, params):
            table = torch.arange(num_classes, dtype=torch.uint8)
            return images, torch.where(masks == util.VOID, masks, table[masks.long() % util.VOID])

    train = make_loaders(tiny, 2, size=32, augment=Remapping())[0]
    train.classes = train.classes[:num_classes]
    assert sanity._check_augmentation(train) == []


OWN_RANDOM = """
class Darker(torch.nn.Module):
    generator = torch.Generator()

    def forward(self, image, mask):
        return image // (1 + torch.randint(9, (), generator=self.generator).to(torch.uint8)), mask

augment = Darker()
"""
BATCH_RANDOM = """
class Noise:
    def draw(self, count, generator):
        return torch.zeros(count)

    def __call__(self, images, masks, params):
        return images + torch.randint(9, images.shape).to(torch.uint8), masks

augment = Noise()
"""
PASTE = BATCH_RANDOM.replace("images + torch.randint(9, images.shape).to(torch.uint8), masks", "images, masks | 4")
SEPARATE = (
    f"{V2}v2.RandomHorizontalFlip()".replace("augment = ", "flip = ")
    + "\naugment = lambda image, mask: (flip(image), flip(mask))"
)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (OWN_RANDOM, "gives other results with the same seed"),
        (OWN_RANDOM.replace(", generator=self.generator", ""), None),
        (BATCH_RANDOM, None),
        (PASTE, "gives masks new labels: unless it pastes from other images"),
        (SEPARATE.replace("flip(mask)", "mask"), "seems to move masks differently than their images"),
        (SEPARATE, "seems to move masks differently than their images"),
        (f"{V2}v2.Compose([v2.RandomVerticalFlip(), v2.RandomHorizontalFlip()])", None),
        (f"{V2}v2.RandomRotation(45, fill={{tv_tensors.Mask: 255, 'others': 0}})", None),
    ],
)
def test_an_augmentation_that_is_not_what_it_seems_is_a_warning(project, capsys, changes, warning):
    assert run(project, changes, "--epochs 1") == 0
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: augment")]
    assert len(found) == bool(warning) and (not warning or warning in found[0])


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (RATE, "training_step changes the learning rate"),
        (COUNTER, "the criterion changes its calls, which"),
        (COUNTER.replace("    def forward", f"{EXTRA_STATE}\n    def forward"), None),
        (f"{FROZEN}{LAYER_ONLY}", "frozen batch norm still updates its running statistics (norm)"),
        (FROZEN.replace("    def forward", f"{CONSTANT_NORM}\n    def forward") + LAYER_ONLY, None),
        (FROZEN.replace("BatchNorm2d(3)", "BatchNorm2d(3, affine=False)"), None),
        (criterion("logits /= 2; " + CROSS_ENTROPY), None),  # in place
        (WRAPPER, None),
        (WRAPPER.split("    def state_dict")[0] + "optimizer" + WRAPPER.split("optimizer")[-1], "optimizer within the"),
    ],
)
def test_what_resuming_or_freezing_would_miss_is_a_warning(project, capsys, changes, warning):
    base = "train_5_a" if "model = Net" in changes else "train"
    assert run(project, changes, "--epochs 1", base=base) == 0
    output = capsys.readouterr().out
    found = [line for line in output.splitlines() if re.match("warning: .*(changes|frozen batch norm|optimizer)", line)]
    assert len(found) == bool(warning) and (not warning or warning in found[0])


def test_a_script_may_hold_the_groups_of_its_optimizer(project):
    """The checks before the first epoch leave them in place."""
    step = RATE.replace('optimizer.param_groups[0]["lr"]', 'Held.group["lr"]')
    changes = f"class Held:\n    group = None\n{step}\noptimizer = torch.optim.Adam(model.parameters(), lr=1e-2)\n"
    keep = "    Held.group = optimizer.param_groups[0]\n    scheduler ="
    for flags in ("--epochs 2", "--epochs 3 --resume"):
        assert run(project, changes, flags, old="    scheduler =", new=keep) == 0
    rates = [1e-2, 1e-3 / 3, 1e-3 / 3]  # before the first of three steps
    assert history(project, "", "learning_rate") == pytest.approx(rates)


def test_a_network_whose_imports_were_edited_since_its_training_loads_with_a_warning(project, capsys):
    """The network stands in a file of its own, which imports another one."""
    (project / "my_blocks.py").write_text("from torch import nn\n\nLayer = nn.Conv2d\n")
    network = net().replace("torch.nn.Conv2d", "my_blocks.Layer").replace("\nmodel = Net(len(train.classes))\n", "")
    (project / "my_net.py").write_text(f"import torch\nimport my_blocks\n{network}")
    changes = "from my_net import Net\nmodel = Net(len(train.classes)).to(args.device)"
    assert run(project, changes, "--epochs 1", base="train_5_a") == 0
    for edit, warned in (("# mine\n", False), ("size = 1\n", True)):
        with open(project / "my_blocks.py", "a") as file:
            file.write(edit)
        for name in ("my_net", "my_blocks"):
            sys.modules.pop(name)
        capsys.readouterr()
        checkpoint.load(project / "best_train-mine.pt")
        assert ("my_blocks.py has changed since ('+size = 1')" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("old", "new", "warned"),
    [("return self", "# mine\n        return self", False), ("epochs=", "epochs=1", False), ("ReLU", "GELU", True)],
)
def test_a_model_whose_network_was_edited_since_its_training_loads_with_a_warning(project, capsys, old, new, warned):
    assert run(project, block("MyNet("), "--epochs 1", base="train_5_a") == 0
    script = (project / "train-mine.py").read_text(encoding="utf-8")
    assert old in script
    (project / "train-mine.py").write_text(script.replace(old, new, 1), encoding="utf-8")
    del sys.modules["train-mine"]
    capsys.readouterr()
    for _ in range(2):
        checkpoint.load(project / "best_train-mine.pt")
        error = capsys.readouterr().err
        assert ("best_train-mine.pt: train-mine.py has changed since" in error) == warned


def test_a_network_in_a_script_with_a_dot_in_its_name_can_be_loaded(project):
    assert run(project, block("MyNet("), base="train_5_a", name="train.v2") == 0
    del sys.modules["train.v2"]
    assert checkpoint.load(project / "best_train.v2.pt").network.arguments == {"classes": 21, "width": 16}


def test_several_processes_need_a_gradient_for_every_trainable_parameter(monkeypatch):
    """DistributedDataParallel would fail in the second batch."""
    model = TinyNet(2)
    optimizer = torch.optim.SGD(model.classifier.parameters(), 0.1)
    used = {id(parameter) for parameter in model.parameters()} - {id(model.layers[0].bias)}
    assert len(sanity._check_parameters(model, None, optimizer, used)) == 1
    monkeypatch.setattr(sanity.processes, "world_size", lambda: 2)
    with pytest.raises(util.UserError, match="need a gradient for layers.0.bias: freeze"):
        sanity._check_parameters(model, None, optimizer, used)


def test_several_processes_do_not_train_parameters_of_the_loss(monkeypatch):
    """DistributedDataParallel would not average their gradients."""
    model, loss = TinyNet(2), torch.nn.PReLU()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], 0.1)
    used = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert sanity._check_parameters(model, loss, optimizer, used) == []
    monkeypatch.setattr(sanity.processes, "world_size", lambda: 2)
    with pytest.raises(util.UserError, match="criterion.weight: several processes"):
        sanity._check_parameters(model, loss, optimizer, used)


def test_without_patience_a_run_goes_to_its_end(project, capsys):
    assert run(project, "", old="patience=10", new="patience=None") == 0
    assert "all 4 epochs are run" in capsys.readouterr().out


def after_loaders(code):
    """The arguments with which ``run`` inserts a line after the loaders are made."""
    return {"old": "    model = ", "new": f"    {code}\n    model = "}


OWN_PIXELS = """
class OwnPixels(voc.Split):
    def resized(self, index, size):
        return super().resized(index, size)
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("test = voc.Loader(test.split, 48, 2)", "val and test differ in size"),
        ("val.classes = val.classes[::-1]", "train and val differ in classes or their order"),
        ("val = voc.Loader(val.split, 32, 2, device='meta')", "val is on the device meta: pass device=args.device"),
        ("train = voc.Loader(train.split, 32, 2, True, seed=7)", "train has seed 7, not 0: pass seed=args.seed"),
        ("args.limit = 2", "train is larger than --limit 2: pass limit=args.limit to voc.Split"),
        ("val.split.ids = val.split.ids[1:]", "the ids of val were changed after loading"),
        ("test.augment = lambda image, mask: (image, mask)", "test is augmented: leave out augment for val and test"),
        ("train.mean = (0.5, 0.5, 0.5)", "the loaders differ in mean or std"),
        ("val.normalise = lambda images: images / 255", "the loader has its own normalise, which predict.py would not"),
        ("val = voc.Loader(OwnPixels(args.data, 'val'), 32, 2)", "val has its own resized, which predict.py would"),
        ("val.masks[:] = util.VOID", "the masks of val were changed, .* in the method mask of a subclass of voc.Split"),
    ],
)
def test_loaders_that_would_give_misleading_results_are_refused(project, capsys, code, message):
    assert run(project, OWN_PIXELS, **after_loaders(code)) == 2
    assert re.match(f"error: train-mine.py: {message}", capsys.readouterr().err)


MERGED = """
class Merged(voc.Split):
    def mask(self, index):
        return (super().mask(index) // util.VOID * util.VOID)[::-1]
"""


BINARY = """
class Binary(voc.Split):
    def __init__(self, root, name):
        super().__init__(root, name)
        self.classes = ("background", "object")

    def mask(self, index):
        mask = super().mask(index)
        mask[(mask > 0) & (mask < util.VOID)] = 1
        return mask
"""


def test_classes_can_be_merged_in_a_subclass_of_split(project):
    loaders = (
        "voc.Loader(Binary(args.data, loader.split.name), 32, 2, loader.training) for loader in (train, val, test)"
    )
    assert run(project, BINARY, "--epochs 1", **after_loaders(f"train, val, test = ({loaders})")) == 0
    assert checkpoint.load(project / "best_train-mine.pt").classes == ("background", "object")


def test_a_subclass_of_split_that_leaves_values_without_a_class_is_refused(project, capsys):
    changes = BINARY.replace("(mask > 0)", "(mask > 1)").replace("] = 1", "] = 2")
    code = "train = voc.Loader(Binary(args.data, 'train'), 32, 2, True)"
    assert run(project, changes, **after_loaders(code)) == 2
    assert ".png: has the value 2 in the split, which has 2 classes: change it in" in capsys.readouterr().err


def test_masks_can_be_changed_in_a_subclass_of_split_and_train_in_memory(project):
    """Of val, the scores at the end are those of the changed masks, which show background only."""
    code = "val = voc.Loader(Merged(args.data, 'val'), 32, 2); train.masks[:, :4] = util.VOID"
    assert run(project, MERGED, "--epochs 1", **after_loaders(code)) == 0
    metrics = json.loads((project / "results" / "train-mine_seed0.json").read_text())
    assert metrics["val"]["background"]["pixel_accuracy"] == 1


@pytest.mark.parametrize("kind", ["numpy.array", "torch.tensor"])
def test_mean_and_std_may_be_arrays(project, kind):
    values = f"{kind}([0.485, 0.5, 0.3])"
    code = f"import numpy; train.mean = val.mean = test.mean = train.std = val.std = test.std = {values}"
    assert run(project, "", "--epochs 1", **after_loaders(code)) == 0
    model = checkpoint.load(project / "best_train-mine.pt")
    assert model.mean == model.std == pytest.approx((0.485, 0.5, 0.3))


def test_a_model_has_the_size_at_which_it_is_scored(project, capsys):
    code = "val, test = (voc.Loader(loader.split, (24, 40), 2) for loader in (val, test))"
    assert run(project, "", "--epochs 1", **after_loaders(code)) == 0
    output = capsys.readouterr().out
    assert "images at 32x32 and 40x24, 21 classes" in output and "val is evaluated at 40x24 after each" in output
    assert checkpoint.load(project / "best_train-mine.pt").size == (24, 40)


def test_results_of_lists_with_other_names_are_those_of_val_and_test(project):
    lists = project / "Tiny/ImageSets/Segmentation"
    shutil.copy(lists / "val.txt", lists / "fold0.txt")
    code = "val = voc.Loader(voc.Split(args.data, 'fold0'), 32, 2)"
    assert run(project, "", "--epochs 1", **after_loaders(code)) == 0
    metrics = json.loads((project / "results" / "train-mine_seed0.json").read_text())
    assert metrics["val"] and metrics["test"]


def test_training_in_two_phases_needs_a_name_for_each(project, capsys):
    script = (ROOT / "train.py").read_text(encoding="utf-8")
    end = "\n\nif __name__"
    call = script[script.index("    engine.fit(") : script.index(end)].rstrip()
    assert run(project, "", "--epochs 1 --out one", old=end, new=f"{call}\n\n{end}") == 2
    assert "engine.fit is called twice for train-mine: set args.experiment to a name" in capsys.readouterr().err
    for flags in ("--epochs 1", "--epochs 1 --resume"):
        new = f'    args.experiment = "second"\n{call}\n\n{end}'
        assert run(project, "", f"{flags} --out two", old=end, new=new) == 0
    assert (project / "two" / "best_second.pt").exists()


def test_loaders_in_another_order_are_refused(project, capsys):
    assert run(project, "", old="args, model, train, val, test", new="args, model, val, train, test") == 2
    error = capsys.readouterr().err
    assert error == "error: train-mine.py: engine.fit takes the loaders train, val and test in this order\n"


def test_a_run_whose_val_loss_is_not_finite_stops_and_keeps_the_epochs_before(project, monkeypatch, capsys):
    evaluate, epochs = engine.evaluate, []

    def diverge(*args, **options):
        scores = evaluate(*args, **options)
        epochs.append(scores)
        if len(epochs) == 3:
            scores.loss = float("nan")
        return scores

    monkeypatch.setattr(engine, "evaluate", diverge)
    assert run(project, "") == 2
    assert "the val loss is nan in epoch 3: lower the learning rate" in capsys.readouterr().err
    assert torch.load(project / "last_train-mine.pt", weights_only=True)["epoch"] == 2


def test_the_checks_leave_no_trace(project, monkeypatch):
    """A run trains as if they had not been made: weights, statistics of batch norm, optimizer, random numbers."""
    assert run(project, "", "--out with") == 0
    monkeypatch.setattr("seg.sanity.check", lambda *args, **states: [])
    assert run(project, "", "--out without") == 0
    states = [torch.load(project / out / "last_train-mine.pt", weights_only=True) for out in ("with", "without")]
    for part in ("model", "optimizer"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


def test_a_loader_that_shuffles_or_augments_is_not_evaluated(tiny):
    train, _, _ = make_loaders(tiny, 2, size=32)
    augmented = voc.Loader(train.split, 32, 2, augment=lambda image, mask: (image, mask))
    for loader in (train, augmented):
        with pytest.raises(util.UserError, match="evaluate needs a loader without training=True and augment"):
            engine.evaluate(torch.nn.Identity(), loader, None)


def row(epoch, miou, val_loss, train_loss):
    return {"epoch": epoch, "val_miou": miou, "val_loss": val_loss, "train_loss": train_loss}


def rows(*values):
    return [row(epoch, *value) for epoch, value in enumerate(values, 1)]


def test_a_tie_goes_to_the_lower_val_loss():
    assert engine.best_epoch(rows((0.1, 3, 1), (0.3, 2, 1), (0.3, 1.5, 1), (0.3, 1.7, 1), (0.2, 1, 1)))["epoch"] == 3


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


@pytest.mark.parametrize("call", ["None", "ReduceLROnPlateau(optimizer)", "CosineAnnealingLR(optimizer, args.epochs)"])
def test_only_an_annealed_run_goes_to_its_end(project, capsys, call):
    """With a learning rate of 0, nothing improves but by rounding; patience is 20."""
    changes = net() + "optimizer = torch.optim.SGD(model.parameters(), lr=0.0)\n" + scheduler(call)
    changes = changes.replace("torch.optim.lr_scheduler.None", "None")
    assert run(project, changes, "--epochs 60 --out out", base="train_5_a") == 0
    annealed = call.startswith("Cosine")
    assert (len(history(project, "out", "epoch")) == 60) == annealed
    assert ("all 60 epochs are run" in capsys.readouterr().out) == annealed
