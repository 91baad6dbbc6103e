"""Tiles of large photos: what is cut joins to what was there, and windows predict what a plain reference does."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from conftest import contents, make_photo, run_main, save_model, see_images, use_tiny_net, write_pair, write_split
from PIL import Image
from tiny_net import TinyNet

import predict
import train
import util
import voc
from basic_fcn import FCN
from seg import checkpoint, imaging, signals, tiles

SHAPES = {"small": (20, 27), "equal": (32, 64), "low": (20, 131), "narrow": (67, 50), "sub/odd": (75, 131)}
SIZE = (32, 64)


@pytest.fixture
def large(tmp_path):
    """A data set of photos smaller than, as large as and larger than SIZE; the last has a void corner."""
    root, rng = tmp_path / "Large", np.random.default_rng(0)
    for name, shape in SHAPES.items():
        (root / "JPEGImages" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "SegmentationClass" / name).parent.mkdir(parents=True, exist_ok=True)
        mask = rng.choice([0, 1, 2, util.VOID], shape).astype(np.uint8)
        mask[40:, 60:] = util.VOID
        write_pair(root, name, rng.integers(0, 256, (*shape, 3), np.uint8), mask)
    write_split(root, "train", [*SHAPES][2:])
    write_split(root, "val", [*SHAPES][:2])
    (root / "classes.txt").write_text("background\ncar\ndog\n")
    return root


def cut(folder, *flags):
    return run_main(folder, voc, f"--data Large --out Tiles --tiles 64x32 --overlap 9 {' '.join(flags)}")


def joined(split, name, shape, values):
    """``values(index)``, [H, W, ...], of a photo's tiles, at their positions in an array that is void elsewhere."""
    result = np.full((shape[0] + 64, shape[1] + 64, *values(0).shape[2:]), util.VOID, np.uint8)
    for index, tile in enumerate(split.ids):
        if found := re.fullmatch(rf"{name}_y(\d+)_x(\d+)", tile):
            window = tuple(slice(int(start), int(start) + side) for start, side in zip(found.groups(), SIZE))
            is_new = (values(index) != util.VOID) & (result[window] == util.VOID)
            result[window][is_new] = values(index)[is_new]
    return result


@pytest.mark.parametrize("name", SHAPES)
def test_tiles_join_to_the_photo_and_its_mask(large, tmp_path, name, capsys):
    assert cut(tmp_path) == 0
    split_name = "train" if name in [*SHAPES][2:] else "val"
    before, after = (voc.Split(tmp_path / folder, split_name) for folder in ("Large", "Tiles"))
    index, (height, width) = before.ids.index(name), SHAPES[name]
    mask = joined(after, name, SHAPES[name], after.mask)
    assert (mask[:height, :width] == before.mask(index)).all() and (mask[height:] == util.VOID).all()
    photo, was = joined(after, name, SHAPES[name], lambda index: np.array(after.photo(index))), before.photo(index)
    assert name != "small" or (photo[height:32, :width] == 0).all()  # as ``predict`` pads
    labelled = np.array(before.mask(index)) != util.VOID
    assert (photo[:height, :width][labelled] == np.array(was)[labelled]).all()
    assert all(after.photo(index).size == (64, 32) and (after.mask(index) != util.VOID).any() for index in range(2))
    assert after.classes == before.classes and not any("y40_x67" in tile for tile in after.ids)  # all void
    text = rf"{split_name}: {len(before)} photos, {len(after)} tiles of 64x32\n(val.*\n)?Tiles: [\d.e-]+ GB\n$"
    assert re.search(text, capsys.readouterr().out)


def test_positions_cover_a_side_with_at_least_the_overlap():
    for length, side, overlap in itertools.product(range(1, 90), (8, 32), (0, 3, 7)):
        found = tiles.starts(length, side, overlap)
        assert found[0] == 0 and found[-1] == max(0, length - side)
        assert all(0 < second - first <= side - overlap for first, second in itertools.pairwise(found))


def test_a_cut_that_was_stopped_leaves_nothing_and_a_second_replaces_nothing(large, tmp_path, monkeypatch, capsys):
    before, calls = {*tmp_path.rglob("*")}, itertools.count()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(signals, "check", lambda: next(calls) < 7 or exec("raise KeyboardInterrupt"))
        cut(tmp_path)
    assert next(calls) > 7 and {*tmp_path.rglob("*")} == before
    assert cut(tmp_path) == 0
    whole = contents(tmp_path / "Tiles")
    capsys.readouterr()
    assert cut(tmp_path) == 2 and contents(tmp_path / "Tiles") == whole
    assert capsys.readouterr().err == "error: Tiles: exists already: choose another --out\n"
    for flags in ("--tiles 64", "--tiles 64 --out X --overlap 64"):
        assert run_main(tmp_path, voc, f"--data Large {flags}") == 2
        assert "--tiles needs --out DIR, and an --overlap (default: 64) smaller than a tile" in capsys.readouterr().err


def test_photos_are_written_as_jpeg_if_asked(large, tmp_path):
    assert cut(tmp_path, "--jpeg") == 0
    paths = list((tmp_path / "Tiles" / "JPEGImages").rglob("*.*"))
    assert {path.suffix for path in paths} == {".jpg"} and imaging.open_image(paths[0]).format == "JPEG"


def trained(network, size, tile_size=None):
    return checkpoint.TrainedModel(network, voc.CLASSES, size, imaging.MEAN, imaging.STD, tile_size).eval()


@pytest.mark.parametrize("shape", [(75, 131), (20, 27), (32, 64), (20, 131)])
@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
def test_windows_give_the_mask_of_a_plain_reference(shape, size):
    """All windows in memory, in float64, their logits averaged."""
    torch.manual_seed(0)
    network = see_images(FCN(21))
    torch.nn.init.normal_(network.classifier.weight)
    model, photo = trained(network, size, SIZE), make_photo(*shape)
    padded = np.zeros((200, 200, 3), np.uint8)
    padded[: shape[0], : shape[1]] = np.array(photo)
    total, weights = np.zeros((21, 200, 200)), np.zeros((200, 200))
    ramps = [[min(i + 0.5, side - i - 0.5, side / 4) / (side / 4) for i in range(side)] for side in SIZE]
    weight = np.outer(*ramps)
    for top, left in itertools.product(tiles.starts(shape[0], 32, 8), tiles.starts(shape[1], 64, 16)):
        window = imaging.resize(Image.fromarray(padded[top : top + 32, left : left + 64]), size)
        images = imaging.normalise(torch.tensor(window).permute(2, 0, 1)[None], "cpu")
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(model(images), SIZE, mode="bilinear", align_corners=False)[0]
        total[:, top : top + 32, left : left + 64] += weight * logits.double().numpy()
        weights[top : top + 32, left : left + 64] += weight
    mean = (total / np.where(weights, weights, 1))[:, : shape[0], : shape[1]]
    found = tiles.predict(model, photo)
    first, second = np.sort(mean, 0)[[-1, -2]]
    decided = first - second > 1e-4  # rounding may decide the others
    assert (found == mean.argmax(0))[decided].all() and decided.mean() > 0.99 and len(np.unique(found)) > 3


def test_a_network_without_a_receptive_field_gives_the_mask_of_the_whole_photo():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 16, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 21, 1)
    whole, photo = trained(torch.nn.Sequential(*layers), (96, 160)), make_photo(96, 160)
    mask = predict.segment(whole, photo)
    assert (tiles.predict(trained(whole.network, (32, 64)), photo) == mask).all() and len(np.unique(mask)) > 3


def test_a_model_that_was_trained_on_tiles_is_scored_on_whole_photos(large, tmp_path, monkeypatch, capsys):
    use_tiny_net(monkeypatch)
    assert cut(tmp_path) == 0
    assert run_main(tmp_path, train, "--data Tiles --epochs 1 --batch-size 4 --device cpu") == 0
    assert json.loads((tmp_path / "results" / "train_seed0.json").read_text())["tiles"] == [32, 64]
    text = "warning: at 32x32, tiles of 64x32 are resized: set size in the script to theirs\n"
    assert text in capsys.readouterr().out
    flags = "best_train.pt --device cpu --data Large --split train"
    assert run_main(tmp_path, predict, f"{flags} --out whole") == 0
    assert "warning: the model was trained on tiles: pass --tiles\n" in capsys.readouterr().out
    assert run_main(tmp_path, predict, f"{flags} --out tiles --tiles") == 0
    out = capsys.readouterr().out
    assert "masks are computed at 32x32 in windows of 64x32\n" in out and "warning" not in out
    model, split = checkpoint.load(tmp_path / "best_train.pt"), voc.Split(large, "train")
    matrices = [np.zeros((3, 3), int) for _ in split.ids]
    for index, matrix in enumerate(matrices):
        truth, found = split.mask(index), tiles.predict(model, split.photo(index))
        np.add.at(matrix, (truth[truth != util.VOID], found[truth != util.VOID]), 1)
    miou = util.mean_iou(torch.tensor(sum(matrices)))
    assert re.search(rf"mean IoU +{miou:.4f}\n", out)
    rows = (tmp_path / "tiles" / "train_scores.csv").read_text().splitlines()[1:]
    ious = sorted(f"{util.mean_iou(torch.tensor(matrix)):.4f}" for matrix in matrices)
    assert [row.rpartition(",")[2] for row in rows] == ious
    assert run_main(tmp_path, predict, "best_train.pt Large/JPEGImages/sub --device cpu --tiles --out masks") == 0
    index = split.ids.index("sub/odd")
    with Image.open(tmp_path / "masks" / "odd_mask.png") as mask:
        assert (np.array(mask) == tiles.predict(model, split.photo(index))).all()


def test_tiles_of_other_classes_are_not_scored(large):
    with pytest.raises(util.UserError, match="the classes of .*Large or their order differ from the model's"):
        tiles.evaluate(trained(TinyNet(21), (32, 32)), voc.Split(large, "val"))


def test_a_mask_of_another_size_is_neither_cut_nor_scored(large, tmp_path, capsys):
    imaging.palette_image(np.zeros((20, 28), np.uint8)).save(large / "SegmentationClass" / "small.png")
    assert cut(tmp_path) == 2
    assert "small.png: is 28x20, but its photo is 27x20" in capsys.readouterr().err
    model, split = trained(TinyNet(3), (32, 32)), voc.Split(large, "val")
    model.classes = split.classes
    with pytest.raises(util.UserError, match="small.png: is 28x20"):
        tiles.evaluate(model, split)


def test_whole_photos_are_named_if_a_model_was_not_trained_on_tiles(large, tmp_path, capsys, monkeypatch):
    use_tiny_net(monkeypatch)
    save_model(tmp_path / "best.pt", TinyNet(3), ("background", "car", "dog"), (32, 32))
    assert run_main(tmp_path, predict, "best.pt --device cpu --data Large --tiles") == 0
    assert "warning: the model was trained on whole photos: leave out --tiles\n" in capsys.readouterr().out
