"""However a data set or a checkpoint is damaged: it is read, or a UserError of one line says what is wrong."""

import shutil

import pytest
import torch
from conftest import make_loaders, make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_net import TinyNet

import util
import voc
from seg import checkpoint, imaging
from util import UserError

# the same examples each time; writing files takes as long as the disk does
SETTINGS = settings(max_examples=100, derandomize=True, deadline=10_000, suppress_health_check=list(HealthCheck))


@st.composite
def damages(draw):
    """A function that replaces some bytes, up to all, by others; either may be none."""
    position, new = draw(st.floats(0, 1)), draw(st.binary(max_size=40))
    length = draw(st.integers(0, 40) | st.just(10**9))

    def damage(content):
        start = int(position * len(content))
        return content[:start] + new + content[start + length :]

    return damage


def read_or_refuse(read, *args):
    """What ``read`` returns; None if it raises a UserError of one line."""
    try:
        return read(*args)
    except UserError as error:
        assert "\n" not in str(error) and ": " in str(error)
        return None


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    root = make_tiny(tmp_path_factory.mktemp("intact") / "Tiny", splits=(("train", 2), ("val", 1)))
    (root / "classes.txt").write_text("\n".join(voc.CLASSES))
    return root


FILES = ["classes.txt", "ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"]
FILES += [f"JPEGImages/{name}.jpg" for name in ("000000", "000002")]
FILES += [f"SegmentationClass/{name}.png" for name in ("000000", "000002")]


@SETTINGS
@given(st.dictionaries(st.sampled_from(FILES), st.none() | damages(), min_size=1, max_size=2))
def test_a_damaged_data_set_is_read_or_refused(intact, tmp_path, faults):
    root = tmp_path / "Tiny"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(intact, root)
    for path, damage in faults.items():
        if damage is None:
            (root / path).unlink()
        else:
            (root / path).write_bytes(damage((root / path).read_bytes()))
    for loader in (read_or_refuse(lambda: make_loaders(root, 2, size=32)) or ())[:2]:
        for images, masks, _ in loader.batches():
            labels = set(masks.unique().tolist())
            assert images.isfinite().all() and labels <= {*range(len(loader.classes)), util.VOID}


MODEL = TinyNet(3)
CHECKPOINT = {
    "module": "tiny_net",
    "class": "TinyNet",
    "arguments": MODEL.arguments,
    "model": MODEL.state_dict(),
    "classes": ["a", "b", "c"],
    "size": 16,
    "mean": [0.5] * 3,
    "std": [0.2] * 3,
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(torch.ones(2)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
CHANGES = st.dictionaries(st.sampled_from(sorted(CHECKPOINT)), VALUES, min_size=1, max_size=2)


@pytest.mark.usefixtures("tiny_net")
@SETTINGS
@given(damages() | CHANGES)
def test_a_damaged_checkpoint_is_loaded_or_refused(tmp_path, fault):
    path = tmp_path / "a.pt"
    if isinstance(fault, dict):
        torch.save(CHECKPOINT | fault, path)
    else:
        torch.save(CHECKPOINT, path)
        path.write_bytes(fault(path.read_bytes()))
    model = read_or_refuse(checkpoint.load, path)
    if model is not None:
        images = torch.zeros(1, 3, *(min(side, 64) for side in model.size), dtype=torch.uint8)
        logits = read_or_refuse(model, imaging.normalise(images, "cpu", model.mean, model.std))
        assert logits is None or logits.shape[1] == len(model.classes)
