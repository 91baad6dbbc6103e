"""Small data sets in VOC layout, fast runs on them, and the real data if it lies beside the project."""

import json
import os
import shlex
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tiny_net import TinyNet

import train
import util
import voc
from seg import checkpoint, cli, distributed, files, imaging, plotting

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"
NEEDS_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])

# On small tensors, more threads are slower: here, and in the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job ignores Ctrl-C, and so would the processes that tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)


def use_float32(patch):
    """Train in float32 on every device, for comparisons that bfloat16 is too coarse for."""
    patch.setattr(distributed, "has_bfloat16", lambda device: False)


@pytest.fixture
def float32(monkeypatch):
    use_float32(monkeypatch)


def linked(folder, target):
    """Make ``target`` a folder with links to what a data set holds, so that nothing is written to the original."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    return target


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """The real VOC2007 masks with some of their photos."""
    folder = SHARED / "data" / "VOCdevkit" / "VOC2007-sample"
    if not folder.is_dir():
        pytest.skip(f"needs the real VOC2007 masks in {folder}")
    return linked(folder, tmp_path_factory.mktemp("real") / folder.name)


def write_split(root, split, ids):
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in ids))


def write_pair(root, name, photo, mask):
    """Write a photo, uint8 [H, W, 3], and its mask, uint8 [H, W], as a palette PNG."""
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
    imaging.palette_image(mask).save(root / "SegmentationClass" / f"{name}.png")


@pytest.fixture
def tiny(tmp_path):
    """A folder in VOC layout: 5 train, 4 val and 3 test images of 40 to 60 pixels, coloured by class, with void."""
    return make_tiny(tmp_path / "Tiny")


def make_tiny(root, splits=(("train", 5), ("val", 4), ("test", 3))):
    rng = np.random.default_rng(0)
    index = 0
    for split, count in splits:
        ids = []
        for _ in range(count):
            height, width = rng.integers(40, 61, 2)
            mask = np.zeros((height, width), np.uint8)
            mask[5:25, 8:30] = 1 + index % 3
            mask[22:35, 20:38] = 15
            mask[20:22] = util.VOID
            photo = np.clip(imaging.PALETTE[mask] + rng.integers(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)
            ids.append(f"{index:06d}")
            write_pair(root, ids[-1], photo, mask)
            index += 1
        write_split(root, split, ids)
    return root


def make_photo(height, width):
    """A photo of random large coloured areas."""
    areas = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(areas).resize((width, height))


def see_images(model):
    """Let the batch norm of an untrained model see images like those of ``make_photo``; return the model."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # batch norm then takes its statistics from one batch
    images = 2 * torch.randn(8, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    model.train()(images.to(next(model.parameters()).device))
    return model


def save_model(path, model, classes, size, **entries):
    """Write a checkpoint as of a trained model, with more ``entries``; return its path."""
    state = {"classes": list(classes), "size": list(size), "mean": list(imaging.MEAN), "std": list(imaging.STD)}
    state |= {"module": type(model).__module__, "class": type(model).__name__, "arguments": model.arguments}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state | {"model": model.state_dict()} | entries, path)
    return path


def make_loaders(root, batch_size, size, limit=None, seed=0, device="cpu", **options):
    """``voc.loaders`` without a command line."""
    args = Namespace(data=root, batch_size=batch_size, limit=limit, seed=seed, device=device)
    return voc.loaders(args, size=size, **options)


def run_main(folder, module, flags):
    """Run a script's main in a folder as a shell would, but in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("gc.freeze", int)  # it would keep the garbage of earlier tests
        patch.setattr(sys, "argv", [Path(module.__file__).name, *shlex.split(flags)])
        try:
            cli.run(module.main)
        except SystemExit as stop:
            return stop.code
    return 0


def contents(folder):
    """The files of a folder, but for the cache, with their bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts}


def results(folder):
    """What a run of train.py with seed 0 has left: CSV, metrics without times, and the weights of best and last."""
    metrics = json.loads((folder / "results/train_seed0.json").read_text()) | {"seconds": 0, "epoch_seconds": 0}
    models = [torch.load(folder / name, weights_only=True)["model"] for name in ("best_train.pt", "last_train.pt")]
    weights = [value.tolist() for model in models for value in model.values()]
    return (folder / "results/train_seed0.csv").read_text(), metrics, weights


def skip_drawing(patch):
    """Make runs fast: the plots of a run are saved as 100,000 random bytes, and not drawn."""
    patch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(os.urandom(100_000)))
    for name in ("curves", "class_iou", "confusion", "predictions", "samples"):
        draw = mock.create_autospec(getattr(plotting, name))
        draw.side_effect = lambda path, *_: files.write(path, os.urandom(100_000))
        patch.setattr(plotting, name, draw)


def use_tiny_net(patch):
    """Make runs fast: train.py trains TinyNet, which ``checkpoint.load`` finds here, at 32x32, and draws no plot."""
    loaders = voc.loaders
    patch.setattr(voc, "loaders", lambda args, size, **options: loaders(args, 32, **options))
    patch.setattr(train, "FCN", TinyNet)
    patch.setattr(checkpoint, "ROOT", TESTS)
    skip_drawing(patch)


@pytest.fixture(scope="module")
def tiny_net():
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_net(patch)
        yield


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A kernel that runs the same Python as the tests, whatever kernels the machine has."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    line = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": line, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


@pytest.fixture(scope="module")
def browser():
    """Chromium, from the system or from Playwright, with a camera that shows a made-up picture."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if not path and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs Chromium: python -m playwright install --with-deps chromium")
        camera = "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *camera])
        yield browser
        browser.close()
