"""Small data sets in VOC layout, and the real files where they lie beside the project."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before torch is imported, here and in what the tests start: on tensors this small, threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import checkpoint  # noqa: E402
import cli  # noqa: E402
import voc  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# A shell's background job ignores Ctrl-C, and so would all that the tests start from there.
signal.signal(signal.SIGINT, signal.default_int_handler)


def linked(folder, place):
    """A folder that links to a data set's own folders, so that nothing is written beside the originals."""
    place.mkdir()
    for inner in folder.iterdir():
        (place / inner.name).symlink_to(inner)
    return place


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
    image = Image.fromarray(mask)
    image.putpalette(voc.PALETTE.tobytes())
    image.save(root / "SegmentationClass" / f"{name}.png")


@pytest.fixture
def tiny(tmp_path):
    """A folder in VOC layout: 5 train, 4 val and 3 test images of 40 to 60 pixels, coloured by class, with void."""
    return make_tiny(tmp_path / "Tiny")


def make_tiny(root, splits=(("train", 5), ("val", 4), ("test", 3))):
    rng = np.random.default_rng(0)
    number = 0
    for split, images in splits:
        ids = []
        for _ in range(images):
            height, width = rng.integers(40, 61, 2)
            mask = np.zeros((height, width), np.uint8)
            mask[5:25, 8:30] = 1 + number % 3
            mask[22:35, 20:38] = 15
            mask[20:22] = voc.VOID
            photo = np.clip(voc.PALETTE[mask] + rng.integers(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)
            ids.append(f"{number:06d}")
            write_pair(root, ids[-1], photo, mask)
            number += 1
        write_split(root, split, ids)
    return root


def call(folder, program, line):
    """Run a program's main in a folder, as a shell would, but in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [Path(program.__file__).name, *line.split()])
        try:
            cli.run(program.main)
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def models_of_the_tests():
    """Let engine.load find tiny_net.py, which lies beside this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "ROOT", Path(__file__).resolve().parent)
        yield


class Evil:
    """Runs code of its own where it is unpickled."""

    def __reduce__(self):
        return (exec, ("import checkpoint; checkpoint.ran = True",))
