"""However a data set is damaged: it is read, or a UserError of one line says what is wrong."""

import shutil

import pytest
from conftest import make_loaders, make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import util
import voc
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
    try:
        loaders = make_loaders(root, 2, size=32)[:2]
    except UserError as error:
        assert "\n" not in str(error) and ": " in str(error)
        return
    for loader in loaders:
        for images, masks, _ in loader.batches():
            labels = set(masks.unique().tolist())
            assert images.isfinite().all() and labels <= {*range(len(loader.classes)), util.VOID}
