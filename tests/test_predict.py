"""Predictions on any photo: sizes, rotation, colour modes, files that are no photos, and masks that read back."""

import numpy as np
import pytest
import torch
from conftest import run_main, write_pair, write_split
from PIL import Image
from torch.nn import functional

import checkpoint
import imaging
import plotting
import predict
import voc
from basic_fcn import FCN


@pytest.fixture
def best(tmp_path):
    """The path of an untrained baseline that predicts many classes in a photo of large coloured areas."""
    torch.manual_seed(0)
    model = FCN(21)
    torch.nn.init.normal_(model.classifier.weight)
    for layer in model.layers[2::3]:
        layer.momentum = 1.0  # batch norm then takes its statistics from one batch
    model(2 * torch.randn(8, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3))
    state = {"classes": list(voc.CLASSES), "size": 64, "mean": list(imaging.MEAN), "std": list(imaging.STD)}
    state |= {"module": "basic_fcn", "class": "FCN", "arguments": model.arguments, "model": model.state_dict()}
    torch.save(state, tmp_path / "best.pt")
    return tmp_path / "best.pt"


def make_photo(height, width):
    """A photo of random large coloured areas."""
    areas = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(areas).resize((width, height))


def run_predict(folder, *arguments):
    """Run predict.py in a folder; return its exit code."""
    return run_main(folder, predict, " ".join(map(str, ("best.pt", "--device", "cpu", *arguments))))


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def test_mask_is_the_upsampled_prediction_at_the_size_of_the_photo(tiny, best, tmp_path, capsys):
    assert run_predict(tmp_path, tiny / "JPEGImages") == 0
    output = capsys.readouterr().out.splitlines()
    loader, model = voc.loaders(tiny, 1, 64)[1], checkpoint.load(best)
    for images, _, (index,) in loader.batches():
        name, shape = loader.split.ids[index], loader.split.mask(index).shape
        with torch.inference_mode():
            expected = functional.interpolate(model(images), shape, mode="bilinear").argmax(1)[0]
        mask = read(tmp_path / "predictions" / f"{name}_mask.png")
        assert np.array_equal(mask, expected)
        label, count = np.unique(mask, return_counts=True)
        largest = f": {voc.CLASSES[label[count.argmax()]]} {count.max() / mask.size:.1%}"
        assert any(f"{name}.jpg{largest}" in line for line in output)


def test_mask_can_be_used_as_a_mask_of_a_dataset(best, tmp_path):
    root = tmp_path / "Own"
    write_pair(root, "x", np.asarray(make_photo(37, 61)), np.zeros((37, 61), np.uint8))
    assert run_predict(tmp_path, root / "JPEGImages" / "x.jpg") == 0
    (tmp_path / "predictions" / "x_mask.png").replace(root / "SegmentationClass" / "x.png")
    write_split(root, "train", ["x"])
    assert voc.Split(root, "train").resized(0, (32, 32))[..., 3].max() < 21
    with Image.open(root / "SegmentationClass" / "x.png") as file:
        assert file.getpalette()[:768] == imaging.PALETTE.ravel().tolist()


def test_rotation_in_exif_is_applied(best, tmp_path):
    upright, exif = make_photo(40, 90), Image.Exif()
    exif[0x0112] = 6  # Orientation: to be rotated by 90 degrees clockwise for display
    upright.rotate(90, expand=True).save(tmp_path / "rotated.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert run_predict(tmp_path, "rotated.png", "upright.png") == 0
    masks = [read(tmp_path / "predictions" / f"{name}_mask.png") for name in ("rotated", "upright")]
    assert masks[0].shape == (40, 90) and np.array_equal(*masks) and len(np.unique(masks[0])) > 2


def test_every_colour_mode_and_size_is_accepted(best, tmp_path):
    photos = [("L", "png"), ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg")]
    for mode, suffix in photos:
        make_photo(50, 70).convert(mode).save(tmp_path / f"{mode}.{suffix}")
    make_photo(1, 1).save(tmp_path / "pixel.png")
    assert run_predict(tmp_path, tmp_path) == 0
    for name in ("pixel", *(mode for mode, _ in photos)):
        assert read(tmp_path / "predictions" / f"{name}_mask.png").shape == ((1, 1) if name == "pixel" else (50, 70))
        assert min(read(tmp_path / "predictions" / f"{name}_overlay.png").shape[:2]) > 300


def test_overlay_shows_the_photo_in_the_background_and_blends_objects(tmp_path):
    photo, mask = np.full((60, 80, 3), (10, 200, 30), np.uint8), np.zeros((60, 80), np.uint8)
    mask[:, 40:] = 15
    plotting.overlay(tmp_path / "a.png", "title", voc.CLASSES, photo, mask)
    colours = {tuple(colour) for colour in read(tmp_path / "a.png")[..., :3].reshape(-1, 3).tolist()}
    blend = tuple((0.4 * photo[0, 0] + 0.6 * imaging.PALETTE[15]).round().astype(int).tolist())
    assert {(10, 200, 30), blend} <= colours


def test_unreadable_photo_is_named_and_the_others_are_predicted(best, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    make_photo(20, 30).save(folder / "a.jpg")
    (folder / "b.jpg").write_bytes(b"no photo")
    make_photo(20, 30).save(folder / "ü c.PNG")
    (folder / "notes.txt").write_text("not a photo either")
    assert run_predict(tmp_path, folder) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"error: {folder / 'b.jpg'}: cannot be read" in error
    written = {path.name for path in (tmp_path / "predictions").iterdir()}
    assert written == {f"{name}_{kind}.png" for name in ("a", "ü c") for kind in ("mask", "overlay")}


def test_photos_of_the_same_name_do_not_overwrite_each_other(best, tmp_path):
    for folder, side in (("one", 20), ("two", 30)):
        (tmp_path / folder).mkdir()
        make_photo(side, side).save(tmp_path / folder / "x.jpg")
    assert run_predict(tmp_path, "one", "two", "one") == 0
    masks = (tmp_path / "predictions").glob("*_mask.png")
    assert sorted(len(read(path)) for path in masks) == [20, 30]
