"""The toy set: VOC's numbers, void where it belongs, and the same masks everywhere."""

import hashlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

import toy
import voc


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """The whole toy set, rendered once."""
    root = tmp_path_factory.mktemp("toy") / "Toy"
    toy.render(root)
    return root


@pytest.fixture(scope="session")
def masks(rendered):
    return {
        name: [split.mask(i) for i in range(len(split))] for name in toy.SPLITS for split in [voc.Split(rendered, name)]
    }


def test_it_has_vocs_numbers(rendered, masks):
    assert {name: len(parts) for name, parts in masks.items()} == {"train": 209, "val": 213, "test": 210}
    ids = [name for split in toy.SPLITS for name in voc.Split(rendered, split).ids]
    assert len(set(ids)) == len(ids) == 632
    shapes = {mask.shape for parts in masks.values() for mask in parts}
    assert len(shapes) > 4 and all(max(shape) in (480, 500) for shape in shapes)


def test_it_has_vocs_imbalance(masks):
    for parts in masks.values():
        counts = sum(np.bincount(mask.ravel(), minlength=256) for mask in parts)
        shares = counts[:21] / counts[:21].sum()
        assert 0.69 < shares[0] < 0.77  # VOC2007 has 0.72 to 0.74
        assert 0.03 < counts[255] / counts.sum() < 0.07  # 0.05 there
        assert shares[1:].argmax() + 1 == voc.CLASSES.index("person") and shares[15] > 2 * np.sort(shares[1:])[-2]
        assert all(sum((mask == label).any() for mask in parts) >= 4 for label in range(21))


def test_every_image_shows_one_to_five_objects(masks):
    numbers = [len(set(np.unique(mask).tolist()) - {0, 255}) for parts in masks.values() for mask in parts]
    assert min(numbers) >= 1 and max(numbers) in (4, 5)


def test_two_classes_never_touch_without_void_between(masks):
    for mask in masks["val"]:
        for first, second in ((mask[:-1], mask[1:]), (mask[:, :-1], mask[:, 1:])):
            assert ((first == second) | (first == 255) | (second == 255)).all()


def test_void_is_where_a_window_shows_more_than_one_object():
    instances = np.kron(np.random.default_rng(0).integers(0, 3, (5, 4)), np.ones((7, 9))).astype(np.uint8)
    reach = toy.BORDER
    expected = np.zeros(instances.shape, bool)
    for row, column in np.ndindex(instances.shape):
        window = instances[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
        expected[row, column] = len(np.unique(window)) > 1
    assert np.array_equal(toy._border(instances), expected)


def test_each_class_has_its_own_silhouette_and_texture():
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    shapes = {name: toy._inside(toy.SILHOUETTES[name], x, y) for name in voc.CLASSES[1:]}
    noise = np.random.default_rng(0).random(x.shape)
    surfaces = {name: np.broadcast_to(toy.TEXTURES[name](4 * x, 4 * y, noise), x.shape) for name in voc.CLASSES[1:]}
    for name in voc.CLASSES[1:]:
        assert 0.05 < shapes[name].mean() < 0.95 and surfaces[name].std() > 0.1
        for other in voc.CLASSES[1:]:
            if other != name:
                overlap = (shapes[name] & shapes[other]).sum() / (shapes[name] | shapes[other]).sum()
                assert overlap < 0.9 and np.abs(surfaces[name] * 1.0 - surfaces[other]).mean() > 0.05, (name, other)


def test_a_silhouette_agrees_with_pillows_rasteriser():
    """An independent rasteriser fills the same polygons and ellipses, up to the pixels on their outlines."""
    side = 400
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    for name, parts in toy.SILHOUETTES.items():
        image = Image.new("1", (side, side))
        draw, colour = ImageDraw.Draw(image), 1
        for part in parts:
            if isinstance(part, str):
                colour = int(part == "add")
            elif len(part) == 4:
                box = (part[0] - part[2], part[1] - part[3], part[0] + part[2], part[1] + part[3])
                draw.ellipse([(value + 1) / 2 * side for value in box], fill=colour)
            else:
                draw.polygon([(value + 1) / 2 * side for value in part], fill=colour)
        differing = (np.array(image) != toy._inside(parts, x, y)).mean()
        assert differing < 0.02, name  # outlines of at most 5,000 pixels, one pixel wide, of which half may differ


def test_one_seed_gives_the_same_masks_on_every_machine():
    """The digest was taken once; it holds on any platform, since geometry uses exactly rounded arithmetic only."""
    digest = hashlib.sha256()
    for name in ("000001", "000209", "000422", "000632"):
        digest.update(toy.render_image(2007, name)[1].tobytes())
    assert digest.hexdigest() == "b92f12bf8834fe610188ddf9c8048528169ac37b3b7eb83996f60aa6538a8d2b"


def test_another_seed_gives_another_set():
    assert not np.array_equal(toy.render_image(2007, "000001")[1], toy.render_image(2008, "000001")[1])


def test_a_stopped_rendering_never_looks_finished(tmp_path, monkeypatch):
    def stop(seed, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "render_image", stop)
    with pytest.raises(KeyboardInterrupt):
        toy.render(tmp_path / "Toy")
    assert not (tmp_path / "Toy").exists()
