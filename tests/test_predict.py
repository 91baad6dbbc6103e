"""Predictions on any photo: sizes, rotation, colour modes, files that are no photos, and masks that read back."""

import csv
import json
import os
import signal
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import make_loaders, make_photo, run_main, save_model, see_images, use_tiny_net, write_pair, write_split
from PIL import Image
from sklearn.metrics import jaccard_score
from torch.nn import functional

import predict
import train
from basic_fcn import FCN
from seg import checkpoint, imaging, plotting, voc_layout
from seg.voc_layout import CLASSES
from util import VOID, UserError


@pytest.fixture
def best(tmp_path):
    """The path of an untrained baseline that predicts many classes in a photo of large coloured areas."""
    torch.manual_seed(0)
    model = FCN(21)
    torch.nn.init.normal_(model.classifier.weight)
    return save_model(tmp_path / "best.pt", see_images(model), CLASSES, (64, 64))


def save_photos(folder, *paths):
    """Write photos of different heights: 20, 21, ..."""
    for index, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        make_photo(20 + index, 30).save(folder / path)


def run_predict(folder, *arguments):
    """Run predict.py in a folder; return its exit code."""
    return run_main(folder, predict, " ".join(map(str, ("best.pt", "--device", "cpu", *arguments))))


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def masks(folder):
    """The heights of the masks by name."""
    paths = (folder / "predictions").glob("*_mask.png")
    return {path.name.removesuffix("_mask.png"): len(read(path)) for path in paths}


def table(folder):
    with open(folder / "predictions" / "predictions.csv", newline="", encoding="utf-8") as file:
        return {row["photo"]: row for row in csv.DictReader(file)}


def test_mask_is_the_upsampled_prediction_at_the_size_of_the_photo(tiny, best, tmp_path, capsys):
    assert run_predict(tmp_path, tiny / "JPEGImages", "--masks-only") == 0
    output = capsys.readouterr().out.splitlines()
    assert len([line for line in output if "masks are computed at 64x64 and upsampled" in line]) == 1
    loader, model = make_loaders(tiny, 1, 64)[1], checkpoint.load(best)
    for images, _, (index,) in loader.batches():
        name, shape = loader.split.ids[index], loader.split.mask(index).shape
        with torch.inference_mode():
            expected = functional.interpolate(model(images), shape, mode="bilinear").argmax(1)[0]
        path = tmp_path / "predictions" / f"{name}_mask.png"
        mask = voc_layout.read_mask(path, 21, tiny)  # it can be used as a mask of a data set
        assert np.array_equal(mask, expected)
        with Image.open(path) as image:
            assert image.getpalette() == imaging.PALETTE.ravel().tolist()
        counts = np.bincount(mask.ravel(), minlength=21)
        largest = f": {CLASSES[counts.argmax()]} {counts.max() / mask.size:.1%}"
        assert any(f"{name}.jpg{largest}" in line for line in output)
        row = table(tmp_path)[str(tiny / "JPEGImages" / f"{name}.jpg")]
        assert [float(row[name]) for name in CLASSES] == pytest.approx(counts / mask.size, abs=1e-6)
        assert row["mask"] == f"{name}_mask.png"
    assert not list((tmp_path / "predictions").glob("*_overlay.jpg"))


def test_every_colour_mode_orientation_and_size_is_accepted(best, tmp_path):
    photos = [("L", "png"), ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg")]
    for mode, suffix in photos:
        make_photo(50, 70).convert(mode).save(tmp_path / f"{mode}.{suffix}")
    make_photo(1, 1).save(tmp_path / "pixel.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be rotated by 90 degrees clockwise for display
    make_photo(70, 50).save(tmp_path / "rotated.jpg", exif=exif)
    assert run_predict(tmp_path, tmp_path) == 0
    for name in ("pixel", "rotated", *(mode for mode, _ in photos)):
        shape = (1, 1) if name == "pixel" else (50, 70)
        assert read(tmp_path / "predictions" / f"{name}_mask.png").shape == shape
        assert read(tmp_path / "predictions" / f"{name}_overlay.jpg").shape == (*shape, 3)
    drawn = predict.overlay(make_photo(50, 70), read(tmp_path / "predictions" / "RGBA_mask.png"), CLASSES)
    written = read(tmp_path / "predictions" / "RGBA_overlay.jpg")
    assert np.abs(written - np.asarray(drawn, int)).mean() < 10


@pytest.mark.parametrize("num_rows", [1024, 300, 150])  # 300: to an outline
def test_overlay_keeps_size_and_background_blends_objects_and_draws_contours(num_rows):
    photo, mask = np.full((600, 80, 3), (10, 200, 30), np.uint8), np.zeros((600, 80), np.uint8)
    mask[:, 40:], mask[300:, 60:] = 15, 7
    result = np.asarray(predict.overlay(Image.fromarray(photo), mask, CLASSES, num_rows))
    colours = imaging.DISTINCT_COLOURS
    assert result.shape == photo.shape and (result[:, :40] == photo[:, :40]).all()
    for label, part in ((15, result[5:295, 45:75]), (7, result[305:, 65:])):
        assert (part == photo[0, 0] // 2 + colours[label] // 2).all()
    assert (result[:, 40] == colours[15]).all()  # to the background
    assert (result[301:, 59] == colours[15]).all() and (result[301:, 60] == colours[7]).all()
    assert (result[299, 61:] == colours[15]).all() and (result[300, 61:] == colours[7]).all()
    result = np.asarray(predict.overlay(Image.fromarray(photo), mask, ["sky", *CLASSES[1:]]))  # none is the background
    assert (result[:, :40] == photo[0, 0] // 2 + colours[0] // 2).sum() == 3 * 600 * 39  # all but the contour


@pytest.mark.parametrize("name", ["background", "Background", "_background_"])
def test_background_is_not_painted_however_it_is_written(name, tmp_path):
    photo, mask = Image.new("RGB", (4, 4), (10, 20, 30)), np.zeros((4, 4), np.uint8)
    assert (np.asarray(predict.overlay(photo, mask, [name, "car"])) == (10, 20, 30)).all()
    plotting.overlay_legend(tmp_path / "legend.png", [name, "car"])
    legend, colours = read(tmp_path / "legend.png")[..., :3], imaging.DISTINCT_COLOURS[:2]
    assert [(legend == colour).all(2).any() for colour in colours] == [False, True]


def test_legend_shows_the_colours_of_the_overlays(tmp_path):
    tab20 = [colour for name in ("tab20", "tab20b", "tab20c") for colour in matplotlib.colormaps[name].colors]
    colours = imaging.DISTINCT_COLOURS[:59].tolist()
    assert sorted([*colours, [255, 127, 14]]) == sorted(np.multiply(tab20, 255).round().astype(int).tolist())
    plotting.overlay_legend(tmp_path / "legend.png", CLASSES)
    legend = read(tmp_path / "legend.png")[..., :3]
    tops = [np.flatnonzero((legend == colour).all(2).sum(1) > 20)[:1].tolist() for colour in colours[:21]]
    assert tops[0] == [] and all(tops[1:]) and tops == sorted(tops)  # white for the background, then from top to bottom


def test_unreadable_photo_is_named_and_the_others_are_predicted(best, tmp_path, capsys):
    save_photos(tmp_path, "photos/a.jpg", "photos/ü c.PNG")
    (tmp_path / "photos" / "b.jpg").write_bytes(b"no photo")
    (tmp_path / "photos" / "lost.jpg").symlink_to("none.jpg")
    (tmp_path / "photos" / "notes.txt").write_text("not a photo either")
    assert run_predict(tmp_path, "photos") == 2
    damaged, lost = capsys.readouterr().err.splitlines()
    assert damaged.startswith(f"error: {Path('photos', 'b.jpg')}: cannot be read")
    assert lost.startswith(f"error: {Path('photos', 'lost.jpg')}: no such file")
    written = {path.name for path in (tmp_path / "predictions").iterdir()}
    results = {f"{name}_{kind}" for name in ("a", "ü c") for kind in ("mask.png", "overlay.jpg")}
    assert written == results | {"predictions.csv", "legend.png"}


@pytest.mark.parametrize("reverse", [False, True])
def test_photos_of_the_same_name_are_kept_apart_by_their_folder(best, tmp_path, reverse):
    photos = ["a/x_2.jpg", "a/x.jpg", "b/x.jpg", "c/Y.jpg", "d/y.jpg"]
    save_photos(tmp_path, *photos)
    photos = photos[::-1] if reverse else photos
    assert run_predict(tmp_path, *photos, "./b/x.jpg", "--masks-only") == 0  # one of them twice
    assert masks(tmp_path) == {"x_2": 20, "a_x": 21, "b_x": 22, "c_Y": 23, "d_y": 24}


@pytest.mark.parametrize(
    "paths", [("a/x.jpg", "a/x.png"), ("a/b/x.jpg", "c/b/x.jpg"), ("a/x.jpg", "b/x.jpg", "a_x.jpg")]
)
def test_photos_that_their_folder_does_not_keep_apart_are_refused(paths):
    with pytest.raises(UserError, match=f"^{paths[-1]}: the results of another photo.*rename one of them"):
        predict.output_names([Path(path) for path in paths])


def test_a_folder_gives_its_photos_but_no_hidden_ones_and_none_of_the_output_folder(best, tmp_path, capsys):
    save_photos(tmp_path, "in/a.webp", "in/b.BMP", "in/c.tif", "in/.hidden.jpg", "in/sub/f.jpg", "in/.trash/g.jpg")
    (tmp_path / "in" / "notes.txt").write_text("no photo")
    assert run_predict(tmp_path, "in", "--out", "in/predictions", "--masks-only") == 0
    assert set(masks(tmp_path / "in")) == set("abc")
    for _ in range(2):  # the second time, with results in the folder that is searched
        assert run_predict(tmp_path, ".", "--recursive", "--overwrite", "--out", "in/predictions") == 0
        assert set(masks(tmp_path / "in")) == set("abcf")
    capsys.readouterr()
    assert run_predict(tmp_path, "in", "--out", "in") == 2
    assert capsys.readouterr().err.startswith("error: in: holds no photo outside --out: ")


def test_earlier_results_are_replaced_only_with_overwrite(best, tmp_path, capsys, monkeypatch):
    save_photos(tmp_path, "x.jpg", "y.jpg")
    assert run_predict(tmp_path, "y.jpg") == 0
    before = table(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(predict, "segment", None)  # must not be called
        assert run_predict(tmp_path, "x.jpg", "y.jpg") == 2
    error = capsys.readouterr().err
    assert f"error: {Path('predictions', 'y_mask.png')}: exists already (--resume skips it): " in error
    assert error.count("\n") == 1 and set(masks(tmp_path)) == {"y"}
    assert run_main(tmp_path, predict, "gone.pt y.jpg") == 2
    assert capsys.readouterr().err.startswith("error: gone.pt: no such file")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "y.jpg")
    assert run_predict(tmp_path, "x.jpg", "y.jpg", "--overwrite", "--masks-only") == 0
    assert set(masks(tmp_path)) == {"x", "y"} and not list(tmp_path.rglob("*_overlay.jpg"))  # none of another mask
    assert list(table(tmp_path)) == ["y.jpg", "x.jpg"] and table(tmp_path)["y.jpg"] != before["y.jpg"]
    assert run_predict(tmp_path, tmp_path / "x.jpg", "--overwrite") == 0  # the same photo by another path
    assert list(table(tmp_path)) == ["y.jpg", str(tmp_path / "x.jpg")]


@pytest.mark.parametrize("name", ["predictions.csv", "legend.png"])
def test_a_users_table_or_legend_is_not_replaced(best, tmp_path, capsys, monkeypatch, name):
    save_photos(tmp_path, "x.jpg")
    path = tmp_path / "predictions" / name
    path.parent.mkdir()
    path.write_text("photo,mask,cat\nx.jpg,x.png,1\n")
    with monkeypatch.context() as patch:
        patch.setattr(predict, "segment", None)  # must not be called
        assert run_predict(tmp_path, "x.jpg") == 2
    problem = {"predictions.csv": "is not a table of", "legend.png": "exists already"}[name]
    assert f"error: {Path('predictions', name)}: {problem}" in capsys.readouterr().err
    assert [file.name for file in path.parent.iterdir()] == [name] and path.read_text().startswith("photo,mask,cat\n")
    assert run_predict(tmp_path, "x.jpg", "--overwrite") == 0
    assert list(table(tmp_path)) == ["x.jpg"] and (tmp_path / "predictions" / "legend.png").read_bytes()[1:4] == b"PNG"


def test_what_is_done_is_kept_after_ctrl_c_and_the_rest_goes_into_the_same_folder(best, tmp_path, capsys, monkeypatch):
    save_photos(tmp_path, "x.jpg", "y.jpg", "z.jpg")
    segment, calls = predict.segment, []

    def interrupted(model, photo, device):
        if (tmp_path / "predictions" / "x_overlay.jpg").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return segment(model, photo, device)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "segment", interrupted)
        assert run_predict(tmp_path, "x.jpg", "y.jpg", "z.jpg") == 130
    assert list(table(tmp_path)) == ["x.jpg", "y.jpg"] and "masks of 2 of 3 photos are in" in capsys.readouterr().out
    monkeypatch.setattr(predict, "segment", lambda model, photo, device: calls.append(photo) or segment(model, photo))
    assert run_predict(tmp_path, "x.jpg", "y.jpg", "z.jpg", "--resume") == 0
    assert set(masks(tmp_path)) == set("xyz") and len(table(tmp_path)) == 3 and len(calls) == 1
    assert "masks of 3 of 3 photos are in predictions (2 of an earlier call)" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    save_photos(tmp_path / "other", "x.jpg")
    assert run_predict(tmp_path, "other/x.jpg", "--resume") == 2  # whose results would have the names of the first's
    assert f"{Path('predictions', 'x_mask.png')}: is of a photo at another path: replace" in capsys.readouterr().err


def test_size_replaces_that_of_the_training(tiny, best, tmp_path, capsys):
    photo = tiny / "JPEGImages" / "000000.jpg"
    assert run_predict(tmp_path, photo, "--size", "96x32") == 0
    assert "masks are computed at 96x32" in capsys.readouterr().out
    model = checkpoint.load(best)
    expected = [predict.segment(model, imaging.open_photo(photo)) for model.size in ((64, 64), (32, 96))]
    mask = read(tmp_path / "predictions" / "000000_mask.png")
    assert np.array_equal(mask, expected[1]) and not np.array_equal(mask, expected[0])


def test_the_scores_of_a_split_are_those_of_the_run(tiny, tmp_path, capsys, monkeypatch):
    use_tiny_net(monkeypatch)
    assert run_main(tmp_path, train, "--data Tiny --epochs 2 --batch-size 2 --device cpu --seed 0") == 0
    metrics = json.loads((tmp_path / "results" / "train_seed0.json").read_text())
    for split, flags in (("val", ""), ("test", "--split test")):
        capsys.readouterr()
        assert run_main(tmp_path, predict, f"best_train.pt --data Tiny --device cpu {flags}") == 0
        shown = dict(line.strip().rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.strip())
        expected, names = metrics[split], {"miou": "mean IoU", "pixel_accuracy": "pixel accuracy", "loss": "loss"}
        values = expected["iou"] | {name: expected[key] for key, name in names.items()}
        values = {name: "-" if value is None else f"{value:.4f}" for name, value in values.items()}
        assert values.items() <= shown.items()


@pytest.mark.parametrize(("flags", "size"), [("", (64, 64)), ("--size 96x32", (32, 96))])
def test_the_table_of_scores_has_the_worst_photo_first(tiny, best, tmp_path, capsys, flags, size):
    write_pair(tiny, "void", np.zeros((30, 40, 3), np.uint8), np.full((30, 40), VOID, np.uint8))
    ids = ["void", *(f"{index:06d}" for index in range(12))]
    write_split(tiny, "all", ids)
    assert run_predict(tmp_path, "--data Tiny --split all", flags) == 0
    model = checkpoint.load(best)
    model.size = size
    expected = []
    for name in ids[1:]:
        photo, mask = Path("Tiny", "JPEGImages", f"{name}.jpg"), Path("Tiny", "SegmentationClass", f"{name}.png")
        predicted, labels = predict.segment(model, imaging.open_photo(tmp_path / photo)), read(tmp_path / mask)
        predicted, labels = predicted[labels != VOID], labels[labels != VOID]
        iou = jaccard_score(labels, predicted, average="macro", labels=np.union1d(labels, predicted))
        expected.append((iou, str(photo), str(mask)))
    path = tmp_path / "predictions" / "all_scores.csv"
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["photo", "mask", "mean_iou"] and rows[-1][2] == "nan" and Path(rows[-1][0]).stem == "void"
    assert rows[:-1] == [[photo, mask, f"{iou:.4f}"] for iou, photo, mask in sorted(expected)]
    capsys.readouterr()
    assert run_predict(tmp_path, "--data Tiny --split all") == 2
    assert capsys.readouterr().err.startswith(f"error: {path.relative_to(tmp_path)}: exists already: replace with")
    (tiny / "classes.txt").write_text("\n".join(CLASSES[::-1]))
    assert run_predict(tmp_path, "--data Tiny --split all --overwrite") == 2
    assert capsys.readouterr().err.startswith("error: the classes of Tiny or their order differ from the model's")
