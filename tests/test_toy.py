"""The toy set: VOC's split sizes and imbalance, and the same masks on every machine."""

import hashlib

import numpy as np

import voc
from seg import toy


def test_splits_share_no_image_and_have_the_imbalance_of_voc2007(tmp_path, monkeypatch):
    assert toy.SPLITS == {"train": 209, "val": 213, "test": 210}
    monkeypatch.setattr(toy, "SPLITS", dict.fromkeys(toy.SPLITS, 60))  # enough images for statistics
    # takes nearly half of the time, and does not change masks
    monkeypatch.setattr(toy, "_backdrop", lambda noise, width, height: np.zeros((height, width, 3), np.float32))
    toy.render(tmp_path / "Toy")
    voc.check(tmp_path / "Toy")
    splits = [voc.Split(tmp_path / "Toy", name) for name in toy.SPLITS]
    assert len({image_id for split in splits for image_id in split.ids}) == 3 * 60
    masks = [split.mask(index) for split in splits for index in range(60)]
    shapes = {mask.shape for mask in masks}
    assert len(shapes) > 4 and all(max(shape) in (480, 500) for shape in shapes)
    counts = sum(np.bincount(mask.ravel(), minlength=256) for mask in masks)
    shares = counts[:21] / counts[:21].sum()
    assert 0.69 < shares[0] < 0.77  # background has 0.72 to 0.74 in VOC2007
    assert 0.03 < counts[255] / counts.sum() < 0.07  # void has 0.05
    person = toy.CLASSES.index("person")
    assert shares[person] > 2 * np.delete(shares, [0, person]).max()
    assert all(sum((mask == label).any() for mask in masks) >= 4 for label in range(21))
    num_classes = [len(np.setdiff1d(mask, (0, 255))) for mask in masks]
    assert min(num_classes) >= 1 and 3 <= max(num_classes) <= 5


def test_masks_depend_on_the_seed_only_and_not_on_the_machine():
    """The digest was computed once. It holds on any platform, since geometry uses exactly rounded arithmetic only."""
    digest = hashlib.sha256()
    for name in ("000001", "000209", "000422", "000632"):
        digest.update(toy.render_image(2007, name)[1].tobytes())
    assert digest.hexdigest() == "b92f12bf8834fe610188ddf9c8048528169ac37b3b7eb83996f60aa6538a8d2b"
    assert not np.array_equal(toy.render_image(2007, "000001")[1], toy.render_image(2008, "000001")[1])
