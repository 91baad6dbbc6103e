"""Predictions on any photo: sizes, rotation, colour modes, files that are no photos, and masks that read back."""

import csv
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_loaders, run_main, write_pair, write_split
from PIL import Image
from torch.nn import functional

import predict
import voc
from basic_fcn import FCN
from seg import checkpoint, imaging
from util import Scores, UserError, baseline_name


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
    loader, model = make_loaders(tiny, 1, 64)[1], checkpoint.load(best)
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
        shape = (1, 1, 3) if name == "pixel" else (50, 70, 3)
        assert read(tmp_path / "predictions" / f"{name}_overlay.png").shape == shape


def test_overlay_keeps_size_and_background_blends_objects_and_draws_contours():
    photo, mask = np.full((600, 80, 3), (10, 200, 30), np.uint8), np.zeros((600, 80), np.uint8)
    mask[:, 40:], mask[300:, 60:] = 15, 7
    result = np.asarray(predict.overlay(Image.fromarray(photo), mask, voc.CLASSES))
    colours = imaging.distinct_colours()
    assert result.shape == photo.shape and (result[:, :40] == photo[:, :40]).all()
    for label, part in ((15, result[5:295, 45:75]), (7, result[305:, 65:])):
        assert (part == photo[0, 0] // 2 + colours[label] // 2).all()
    assert (result[:, 40] == colours[15]).all()  # to the background, also where strips of rows meet
    assert (result[301:, 59] == colours[15]).all() and (result[301:, 60] == colours[7]).all()
    assert (result[299, 61:] == colours[15]).all() and (result[300, 61:] == colours[7]).all()


def test_overlay_colours_differ_for_255_classes_and_strongly_for_neighbours():
    colours = imaging.distinct_colours().astype(int)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 1000 * np.eye(255)
    assert colours.shape == (255, 3) and distance.min() > 10 and distance[:21, :21].min() > 50
    assert np.abs(colours.max(1) - colours.min(1)).min() > 15  # no greys, which a photo is full of
    others = np.stack((imaging.PALETTE[255], imaging.WRONG)).astype(int)
    assert np.linalg.norm(colours[:21, None] - others, axis=2).min() > 50


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
    results = {f"{name}_{kind}.png" for name in ("a", "ü c") for kind in ("mask", "overlay")}
    assert written == results | {"predictions.csv", "legend.png"}


def save_photos(folder, *paths):
    """Write photos of different sizes."""
    for index, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        make_photo(20 + index, 30).save(folder / path)


def masks(folder):
    """The heights of the masks by name."""
    paths = (folder / "predictions").glob("*_mask.png")
    return {path.name.removesuffix("_mask.png"): len(read(path)) for path in paths}


@pytest.mark.parametrize("reverse", [False, True])
def test_photos_of_the_same_name_are_kept_apart_in_any_order(best, tmp_path, reverse):
    photos = ["a/x_2.jpg", "a/x.jpg", "b/x.jpg", "b/x.png", "c/Y.jpg", "d/y.jpg"]
    save_photos(tmp_path, *photos)
    order = photos[::-1] if reverse else photos
    assert run_predict(tmp_path, *order, "./b/x.png", "--masks-only") == 0  # one of them in two spellings
    expected = {"x_2": 20, "a_x": 21, "b_x.jpg": 22, "b_x.png": 23, "c_Y": 24, "d_y": 25}
    assert masks(tmp_path) == expected


def test_names_that_a_folder_makes_equal_are_kept_apart():
    photos = [Path(path) for path in ("/p/a/x.jpg", "/p/b/x.jpg", "/p/c/a_x.jpg", "/q/a/x.jpg")]
    assert predict.output_names(photos) == ["p_a_x.jpg", "b_x", "c_a_x", "q_a_x.jpg"]
    assert predict.output_names([Path("/a/u\u0308.jpg"), Path("/b/\u00fc.jpg")]) == ["a_u\u0308", "b_\u00fc"]
    with pytest.raises(UserError, match="rename one of them"):
        predict.output_names([Path("/a/b_c/x.jpg"), Path("/a/b/c_x.jpg"), Path("/a_b/c_x.jpg"), Path("/a_b/c/x.jpg")])


def test_a_folder_gives_the_photos_of_all_formats_and_says_what_it_skips(best, tmp_path, capsys):
    folder = tmp_path / "photos"
    save_photos(folder, "a.webp", "b.BMP", "c.tif", "d.gif", ".hidden.jpg", "a_mask.png", "a_overlay.png", "sub/f.jpg")
    (folder / "notes.txt").write_text("no photo")
    assert run_predict(tmp_path, folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(masks(tmp_path)) == set("abcd")
    assert [line for line in lines if "skipped" in line] == [lines[0]]
    assert lines[0].startswith("skipped 5: ") and lines[0].endswith("--recursive takes subfolders")
    assert run_predict(tmp_path, folder, "--recursive", "--overwrite", "--masks-only") == 0
    assert set(masks(tmp_path)) == set("abcdf") and "skipped 4: " in capsys.readouterr().out


def test_its_own_results_are_never_its_input(best, tmp_path, capsys):
    save_photos(tmp_path, "predictions/x.jpg")
    for _ in range(2):
        assert run_predict(tmp_path, "predictions", "--overwrite") == 0
        assert set(masks(tmp_path)) == {"x"}
    capsys.readouterr()
    assert run_predict(tmp_path, "predictions/x_mask.png") == 2
    assert "predictions/x_mask.png: holds no photo" in capsys.readouterr().err


def test_earlier_results_are_replaced_only_with_overwrite(best, tmp_path, capsys, monkeypatch):
    save_photos(tmp_path, "x.jpg", "y.jpg")
    assert run_predict(tmp_path, "y.jpg") == 0
    with monkeypatch.context() as patch:
        patch.setattr(predict, "segment", None)  # must not be called
        assert run_predict(tmp_path, "x.jpg", "y.jpg") == 2
    error = capsys.readouterr().err
    assert f"error: {Path('predictions', 'y_mask.png')}: exists already (and 1 more): replace" in error
    assert error.count("\n") == 1 and "--overwrite" in error and set(masks(tmp_path)) == {"y"}
    assert run_predict(tmp_path, "x.jpg", "y.jpg", "--overwrite") == 0
    assert set(masks(tmp_path)) == {"x", "y"}


def test_csv_holds_the_share_of_each_class(best, tmp_path, capsys):
    save_photos(tmp_path, "x.jpg", "b/x.jpg")
    assert run_predict(tmp_path, "x.jpg", "b", "--masks-only") == 0
    written = {path.name for path in (tmp_path / "predictions").iterdir()}
    assert written == {f"{tmp_path.name}_x_mask.png", "b_x_mask.png", "predictions.csv"}
    with open(tmp_path / "predictions" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["photo"] for row in rows] == ["x.jpg", str(Path("b", "x.jpg"))]
    for row in rows:
        mask = read(tmp_path / "predictions" / row["mask"])
        shares = [float(row[name]) for name in voc.CLASSES]
        assert shares == pytest.approx(np.bincount(mask.ravel(), minlength=21) / mask.size, abs=1e-6)
    assert capsys.readouterr().out.count("masks are computed at 64x64 and upsampled") == 1


def test_legend_names_the_predicted_classes_in_the_colours_of_the_overlays(best, tmp_path):
    save_photos(tmp_path, "x.jpg")
    assert run_predict(tmp_path, "x.jpg") == 0
    labels = np.unique(read(tmp_path / "predictions" / "x_mask.png"))
    legend = read(tmp_path / "predictions" / "legend.png")
    swatches = {tuple(colour) for colour in legend[:, 20].tolist()} - {(255, 255, 255), (0, 0, 0)}
    assert swatches == {tuple(colour) for colour in imaging.distinct_colours()[labels[labels > 0]].tolist()}


def test_legend_shows_umlauts():
    widths = {predict.draw_legend([name], [0]).width for name in ("Stra\N{LATIN SMALL LETTER SHARP S}e", "Strae")}
    drawn = [np.asarray(predict.draw_legend(["x", name], [1])) for name in ("\u00fc", "\u00f6", "\u0142", "\u03a9")]
    assert len(widths) == 2 and len({image.tobytes() for image in drawn}) == 4  # not one box for all of them


@pytest.mark.parametrize("name", ["background", "Background", "_background_"])
def test_background_is_not_painted_however_it_is_written(name):
    photo, mask = Image.new("RGB", (4, 4), (10, 20, 30)), np.zeros((4, 4), np.uint8)
    assert (np.asarray(predict.overlay(photo, mask, [name, "car"])) == (10, 20, 30)).all()
    assert predict.draw_legend([name, "car"], [0]).getpixel((20, 15)) == (255, 255, 255)
    matrix = torch.tensor([[1, 0], [5, 0]])
    assert Scores(0, matrix, (name, "car")).baseline.matrix[:, 0].sum() == matrix.sum()
    assert baseline_name((name, "car")) == "all-background baseline"


def test_size_replaces_that_of_the_training(tiny, best, tmp_path, capsys):
    photo = tiny / "JPEGImages" / "000000.jpg"
    assert run_predict(tmp_path, photo, "--size", "96x32") == 0
    assert "masks are computed at 96x32" in capsys.readouterr().out
    model = checkpoint.load(best)
    expected = [predict.segment(model, imaging.open_photo(photo)) for model.size in ((64, 64), (32, 96))]
    mask = read(tmp_path / "predictions" / "000000_mask.png")
    assert np.array_equal(mask, expected[1]) and not np.array_equal(mask, expected[0])


@pytest.mark.filterwarnings("ignore:Image size")  # as in imaging.py; pytest resets the filters
def test_a_photo_of_over_89_million_pixels_is_accepted(best, tmp_path, monkeypatch):
    monkeypatch.setattr(predict.engine, "predict_mask", lambda logits, shape: torch.zeros(shape, dtype=torch.uint8))
    Image.new("L", (9500, 9500)).save(tmp_path / "large.png")
    assert run_predict(tmp_path, "large.png", "--masks-only") == 0
    assert masks(tmp_path) == {"large": 9500}


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("content", [FCN(21), FCN(21).state_dict(), torch.jit.script(torch.nn.Identity())])
def test_a_foreign_checkpoint_is_refused_without_advice_to_disable_weights_only(tmp_path, capsys, content):
    save = torch.jit.save if isinstance(content, torch.jit.ScriptModule) else torch.save
    save(content, tmp_path / "best.pt")
    save_photos(tmp_path, "x.jpg")
    assert run_predict(tmp_path, "x.jpg") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: best.pt: ") and error.endswith(": pass a best_*.pt\n") and error.count("\n") == 1
    assert "project" in error and "eights" not in error and "torch.load" not in error


def test_swapped_arguments_are_named(best, tmp_path, capsys):
    save_photos(tmp_path, "x.jpg")
    assert run_main(tmp_path, predict, "x.jpg best.pt") == 2
    assert capsys.readouterr().err.startswith("error: x.jpg: is not a checkpoint: pass the best_*.pt first")
    assert run_main(tmp_path, predict, ". best.pt") == 2
    assert capsys.readouterr().err.startswith("error: .: is not a checkpoint: pass the best_*.pt first")


def test_photos_named_like_results_are_taken_and_those_of_other_predictions_are_not(best, tmp_path):
    save_photos(tmp_path, "photos/x.jpg", "photos/hair_mask.png", "photos/legend.png", "photos/old/y.jpg")
    assert run_predict(tmp_path, "photos/x.jpg", "photos/old", "--out", "photos/old") == 0
    assert run_predict(tmp_path, "photos", "--recursive") == 0
    assert set(masks(tmp_path)) == {"x", "hair_mask", "legend", "y"}
    assert run_predict(tmp_path, "photos/old/legend.png", "--out", "other") == 2


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_links_in_a_circle_give_each_photo_once_and_one_to_a_missing_photo_is_named(best, tmp_path, capsys):
    save_photos(tmp_path, "photos/x.jpg", "photos/sub/y.jpg")
    for folder in ("photos", "photos/sub"):
        (tmp_path / folder / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "lost.jpg").symlink_to("none.jpg")
    (tmp_path / "photos" / "own.jpg").symlink_to("own.jpg")
    assert run_predict(tmp_path, "photos", "--recursive") == 2
    assert set(masks(tmp_path)) == {"x", "y"}
    lost, own = capsys.readouterr().err.splitlines()
    assert lost.startswith(f"error: {Path('photos', 'lost.jpg')}: no such file")
    assert own.startswith(f"error: {Path('photos', 'own.jpg')}: cannot be read as an image (")


def test_a_file_that_pillow_gives_up_on_with_any_error_is_named(best, tmp_path, capsys):
    save_photos(tmp_path, "photos/a.dds", "photos/b.jpg")
    content = bytearray((tmp_path / "photos" / "a.dds").read_bytes())
    content[80:84] = bytes(4)  # no pixel format: NotImplementedError
    (tmp_path / "photos" / "a.dds").write_bytes(content)
    assert run_predict(tmp_path, "photos") == 2
    assert f"error: {Path('photos', 'a.dds')}: cannot be read as an image (" in capsys.readouterr().err
    assert set(masks(tmp_path)) == {"b"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems refuse such names")
def test_names_may_hold_any_bytes_and_letters_that_the_terminal_lacks(best, tmp_path, monkeypatch):
    save_photos(tmp_path, "photos/ünï 写真.jpg", os.fsdecode(b"photos/caf\xe9.jpg"))
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run_predict(tmp_path, "photos") == 0
    assert "ünï \\u5199\\u771f.jpg" in terminal.buffer.getvalue().decode("cp1252")
    table = (tmp_path / "predictions" / "predictions.csv").read_text(encoding="utf-8")
    assert "photos/ünï 写真.jpg" in table and "photos/caf\\udce9.jpg" in table and len(masks(tmp_path)) == 2


def test_a_folder_that_cannot_be_read_is_named(best, tmp_path, capsys, monkeypatch):
    save_photos(tmp_path, "photos/x.jpg", "photos/closed/y.jpg")
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert run_predict(tmp_path, "photos", "--recursive") == 2
    assert "photos/closed: cannot be read (Permission denied): change its permissions\n" in capsys.readouterr().err


def test_what_is_done_is_kept_after_ctrl_c_and_the_rest_goes_into_the_same_folder(best, tmp_path, capsys, monkeypatch):
    save_photos(tmp_path, "x.jpg", "y.jpg", "z.jpg")
    out, segment = tmp_path / "predictions", predict.segment

    def interrupted(model, photo, device):
        if (out / "x_overlay.png").exists():
            raise KeyboardInterrupt
        return segment(model, photo, device)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "segment", interrupted)
        assert run_predict(tmp_path, "x.jpg", "y.jpg", "z.jpg") == 130
    assert (out / "legend.png").exists() and (out / "predictions.csv").read_text().count("_mask.png") == 1
    assert "masks and overlays of 1 of 3 photos are in predictions" in capsys.readouterr().out
    assert run_predict(tmp_path, "y.jpg", "z.jpg") == 0
    assert set(masks(tmp_path)) == set("xyz") and (out / "predictions.csv").read_text().count("_mask.png") == 2
    assert run_predict(tmp_path, "x.jpg", "--masks-only", "--overwrite") == 0
    assert {path.name for path in out.glob("*_overlay.png")} == {"y_overlay.png", "z_overlay.png"}  # none of x is left


def test_a_name_that_is_too_long_for_its_results_is_refused_before_anything_is_predicted(best, tmp_path, capsys):
    save_photos(tmp_path, "x.jpg", f"{'n' * 240}.jpg")
    assert run_predict(tmp_path, "x.jpg", f"{'n' * 240}.jpg") == 2
    assert "nnn.jpg: is too long a name for its results (over 220 bytes): rename it" in capsys.readouterr().err
    assert not (tmp_path / "predictions").exists()
