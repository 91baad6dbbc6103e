"""Whatever is broken in a data set or a checkpoint: it is read, or a UserError of one line says what is wrong."""

import shutil

import pytest
import torch
from conftest import make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_net import TinyNet

import engine
import voc
from util import UserError

pytestmark = pytest.mark.usefixtures("models_of_the_tests")

# The same examples each time; those that write files take as long as the disk does.
SETTINGS = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=10_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def damages(draw):
    """A function that breaks bytes: cuts them off, drops or replaces a part, or gives something else altogether."""
    kind = draw(st.sampled_from(["cut", "drop", "replace", "other"]))
    share, length = draw(st.floats(0, 1)), draw(st.integers(1, 40))
    new = draw(st.binary(max_size=40))

    def damage(content):
        place = int(share * len(content))
        return {
            "cut": content[:place],
            "drop": content[:place] + content[place + length :],
            "replace": content[:place] + new + content[place + len(new) :],
            "other": new,
        }[kind]

    return damage


def read_or_refused(work):
    """What ``work()`` gives; None where it raises a UserError as it should be."""
    try:
        return work()
    except UserError as error:
        assert "\n" not in str(error) and ": " in str(error)
        return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = make_tiny(tmp_path_factory.mktemp("whole") / "Tiny", splits=(("train", 2), ("val", 1)))
    (root / "classes.txt").write_text("\n".join(voc.CLASSES))
    return root


FILES = [
    "classes.txt",
    "ImageSets/Segmentation/train.txt",
    "ImageSets/Segmentation/val.txt",
    "JPEGImages/000000.jpg",
    "JPEGImages/000002.jpg",
    "SegmentationClass/000000.png",
    "SegmentationClass/000002.png",
]


@SETTINGS
@given(st.dictionaries(st.sampled_from(FILES), st.none() | damages(), min_size=1, max_size=2))
def test_a_broken_data_set(whole, tmp_path, faults):
    root = tmp_path / "Tiny"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    for path, damage in faults.items():
        if damage is None:
            (root / path).unlink()
        else:
            (root / path).write_bytes(damage((root / path).read_bytes()))
    loaders = read_or_refused(lambda: voc.loaders(root, 2, 16))
    for loader in loaders[:2] if loaders else ():
        for images, masks in loader.batches():
            labels = set(masks.unique().tolist())
            assert images.isfinite().all() and labels <= {*range(len(loader.classes)), voc.VOID}


@pytest.fixture(scope="module")
def checkpoint():
    """What engine.load needs of a checkpoint."""
    torch.manual_seed(0)
    model = TinyNet(3)
    return {
        "module": "tiny_net",
        "class": "TinyNet",
        "arguments": model.arguments,
        "model": model.state_dict(),
        "classes": ["a", "b", "c"],
        "size": 16,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
    }


def load_and_use(path):
    """Load a checkpoint, where that is not refused, and predict with it."""
    model = read_or_refused(lambda: checkpoint.load(path))
    if model is not None:
        images = torch.zeros(1, 3, min(model.size, 64), min(model.size, 64), dtype=torch.uint8)
        logits = model(voc.normalise(images, "cpu", model.mean, model.std))
        assert logits.shape[1] == len(model.classes)


@SETTINGS
@given(damages())
def test_broken_bytes_of_a_checkpoint(checkpoint, tmp_path, damage):
    path = tmp_path / "a.pt"
    torch.save(checkpoint, path)
    path.write_bytes(damage(path.read_bytes()))
    load_and_use(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(torch.ones(2)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@SETTINGS
@given(st.data())
def test_other_values_in_a_checkpoint(checkpoint, tmp_path, data):
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(checkpoint)), VALUES, min_size=1, max_size=2))
    torch.save(checkpoint | changes, tmp_path / "a.pt")
    load_and_use(tmp_path / "a.pt")
