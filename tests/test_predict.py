"""Predictions on anybody's photos: sizes, rotation, colour modes, files that are none, and masks that read back."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_split
from PIL import Image

import engine
import plotting
import predict
import util
import voc
from basic_fcn import FCN


@pytest.fixture
def checkpoint(tmp_path):
    """The path of a baseline that was not trained, but sees many classes in a photo of coarse colours."""
    torch.manual_seed(0)
    model = FCN(21)
    torch.nn.init.normal_(model.classifier.weight)
    for layer in model.layers[2::3]:
        layer.momentum = 1.0  # batch norm then takes its statistics from one batch
    model(2 * torch.randn(8, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3))
    about = {"classes": list(voc.CLASSES), "size": 64, "mean": list(voc.MEAN), "std": list(voc.STD)}
    about |= {"module": "basic_fcn", "class": "FCN", "arguments": model.arguments, "model": model.state_dict()}
    torch.save(about, tmp_path / "best.pt")
    return tmp_path / "best.pt"


def photo(height, width, seed=0):
    """A photo of coarse random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height))


def execute(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, flags)])
    predict.main()


def read(path):
    with Image.open(path) as image:
        return image.mode, np.array(image)


def test_a_mask_has_the_photos_size_and_is_what_evaluation_predicts(tiny, checkpoint, tmp_path, monkeypatch, capsys):
    execute(monkeypatch, checkpoint, tiny / "JPEGImages", "--out", tmp_path / "out", "--device", "cpu")
    loader = voc.loaders(tiny, 1, 64)[1]
    model = checkpoint.load(checkpoint)
    for index, (images, _) in enumerate(loader.batches()):
        name = loader.split.ids[index]
        mode, mask = read(tmp_path / "out" / f"{name}_mask.png")
        with torch.inference_mode():
            expected = engine.predict(model(images)[0], loader.split.mask(index).shape)
        assert mode == "P" and np.array_equal(mask, expected)
        line = next(line for line in capsys_lines(capsys) if f"{name}.jpg: " in line)
        label, count = np.unique(mask, return_counts=True)
        most = label[count.argmax()]
        assert f": {voc.CLASSES[most]} {count.max() / mask.size:.1%}" in line


def capsys_lines(capsys, cache=[]):  # noqa: B006 - what was printed can be read once
    cache += capsys.readouterr().out.splitlines()
    return cache


def test_masks_read_back_as_masks_of_a_data_set(checkpoint, tmp_path, monkeypatch):
    root = tmp_path / "Own"
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    photo(37, 61).save(root / "JPEGImages" / "x.jpg")
    execute(monkeypatch, checkpoint, root / "JPEGImages" / "x.jpg", "--out", tmp_path / "out")
    (tmp_path / "out" / "x_mask.png").rename(root / "SegmentationClass" / "x.png")
    write_split(root, "train", ["x"])
    image, mask = voc.Split(root, "train").pair(0, 32)
    assert image.shape == (32, 32, 3) and mask.max() < 21
    with Image.open(root / "SegmentationClass" / "x.png") as file:
        assert file.getpalette()[:768] == voc.PALETTE.ravel().tolist()


def test_rotation_in_exif_is_honoured(checkpoint, tmp_path, monkeypatch):
    upright = photo(40, 90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    execute(monkeypatch, checkpoint, tmp_path / "turned.png", tmp_path / "upright.png", "--out", tmp_path / "out")
    masks = [read(tmp_path / "out" / f"{name}_mask.png")[1] for name in ("turned", "upright")]
    assert masks[0].shape == (40, 90) and np.array_equal(*masks) and len(np.unique(masks[0])) > 2


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg")]
)
@pytest.mark.parametrize("size", [(50, 70), (1, 1)])
def test_every_mode_and_size_is_taken(checkpoint, tmp_path, monkeypatch, mode, suffix, size):
    photo(*size).convert(mode).save(tmp_path / f"x.{suffix}")
    execute(monkeypatch, checkpoint, tmp_path / f"x.{suffix}", "--out", tmp_path / "out")
    assert read(tmp_path / "out" / "x_mask.png")[1].shape == size
    mode, overlay = read(tmp_path / "out" / "x_overlay.png")
    assert min(overlay.shape[:2]) > 300


def test_the_overlay_shows_the_photo_where_background_is(tmp_path):
    picture = np.full((60, 80, 3), (10, 200, 30), np.uint8)
    labels = np.zeros((60, 80), np.uint8)
    labels[:, 40:] = 15
    plotting.overlay(tmp_path / "a.png", "title", voc.CLASSES, picture, labels)
    colours = {tuple(colour) for colour in read(tmp_path / "a.png")[1][..., :3].reshape(-1, 3).tolist()}
    blend = tuple((0.4 * picture[0, 0] + 0.6 * voc.PALETTE[15]).round().astype(int).tolist())
    assert {(10, 200, 30), blend} <= colours


def test_an_unreadable_file_is_named_and_the_rest_goes_on(checkpoint, tmp_path):
    folder = tmp_path / "my photos"
    folder.mkdir()
    photo(20, 30).save(folder / "a.jpg")
    (folder / "b.jpg").write_bytes(b"no photo")
    photo(20, 30).save(folder / "ü c.PNG")
    (folder / "notes.txt").write_text("left alone")
    line = [sys.executable, ROOT / "predict.py", checkpoint, folder, "--device", "cpu"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and f"error: {folder / 'b.jpg'}: cannot be read" in done.stderr
    written = {path.name for path in (tmp_path / "predictions").iterdir()}
    assert written == {f"{name}_{kind}.png" for name in ("a", "ü c") for kind in ("mask", "overlay")}


def test_photos_of_one_name_do_not_overwrite_each_other(checkpoint, tmp_path, monkeypatch):
    for folder, side in (("one", 20), ("two", 30)):
        (tmp_path / folder).mkdir()
        photo(side, side).save(tmp_path / folder / "x.jpg")
    execute(monkeypatch, checkpoint, tmp_path / "one", tmp_path / "two", tmp_path / "one", "--out", tmp_path / "out")
    masks = sorted((tmp_path / "out").glob("*_mask.png"))
    assert [read(path)[1].shape[0] for path in masks] == [30, 20] and len(masks) == 2


@pytest.mark.parametrize(("path", "word"), [("missing.jpg", "no such file or folder"), ("empty", "holds no photo")])
def test_a_path_without_photos_is_named(checkpoint, tmp_path, monkeypatch, path, word):
    (tmp_path / "empty").mkdir()
    with pytest.raises(util.UserError, match=f"{path}: {word}"):
        execute(monkeypatch, checkpoint, tmp_path / path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_real_photos(sample, checkpoint, tmp_path, monkeypatch):
    photos = sorted((sample / "JPEGImages").iterdir())[::6]
    execute(monkeypatch, checkpoint, *photos, "--out", tmp_path / "out")
    for path in photos:
        with Image.open(path) as image:
            assert read(tmp_path / "out" / f"{path.stem}_mask.png")[1].shape == (image.height, image.width)
