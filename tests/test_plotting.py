"""Plots show the given numbers and images: read back from the figure, and pixel by pixel from the file."""

import itertools
import math
import os
import subprocess
import sys
import warnings

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ROOT
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from seg import imaging, plotting, voc_layout
from util import VOID, Scores

CLASSES = ("a", "b", "c")


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, as Matplotlib objects."""
    figures, save = [], Figure.savefig

    def savefig(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def texts(artists):
    return [artist.get_text() for artist in artists]


def labels(figure):
    return texts(figure.legends[0].get_texts())


def history(scale=1, epochs=3):
    """A made-up history whose losses fall from ``scale`` and twice that, and whose other metrics rise."""
    rows = []
    for k in range(1, epochs + 1):
        row = {"epoch": k, "train_loss": scale / k, "val_loss": 2 * scale / k}
        row |= dict.fromkeys(("train_miou", "val_miou", "train_pixel_accuracy", "val_pixel_accuracy"), 0.1 * k)
        rows.append(row | {"batch_learning_rates": [[0.1 / k, 2 / k]]})
    return rows


BASELINE = Scores(math.nan, torch.tensor([[7, 0], [3, 0]]), ("background", "thing"))


def test_curves_show_every_column_and_mark_the_best_epoch(tmp_path, figures):
    rows = history()
    rows[1]["batch_learning_rates"] = [[0.05, 1.0], [0.02, 0.5]]  # two batches in the second epoch
    for weighted in (False, True):
        plotting.curves(tmp_path / "a.png", "title", rows, 2, BASELINE, weighted)
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    assert list(panels) == ["loss", "pixel accuracy", "mean IoU", "learning rate"]
    names = {"loss": "loss", "pixel accuracy": "pixel_accuracy", "mean IoU": "miou"}
    lines = {title: {line.get_label(): line for line in panels[title].lines} for title in names}
    for title, name in names.items():
        for split in ("train", "val"):
            assert list(lines[title][split].get_ydata()) == [row[f"{split}_{name}"] for row in rows]
        assert lines[title]["best epoch: 2"].get_xdata()[0] == 2
    baselines = [lines[title]["all-background baseline on val"].get_ydata()[0] for title in list(names)[1:]]
    assert baselines == pytest.approx([0.7, 0.35])
    groups = [patch.get_data() for patch in panels["learning rate"].patches]
    assert np.allclose([group.values for group in groups], [[0.1, 0.05, 0.02, 0.1 / 3], [2, 1, 0.5, 2 / 3]])
    assert groups[0].edges.tolist() == [0, 1, 1.5, 2, 3]
    assert figures[1].axes[0].get_title() == "loss, weighted by class"


@pytest.mark.parametrize(
    ("count", "last"),
    [(1, ""), (2, " 2"), (8, " 8"), (9, "s 8 to 9"), (14, "s 8 to 14"), (21, "s 8 to 21"), (60, "s 8 to 60")],
)
def test_the_legend_covers_no_panel_however_many_parameter_groups_there_are(tmp_path, figures, count, last):
    for number in (1, count):
        rows = [row | {"batch_learning_rates": [[0.1 * 0.8**k for k in range(number)]]} for row in history()]
        plotting.curves(tmp_path / "a.png", "title", rows, 2, BASELINE, False)
    one, many = figures
    assert len(many.axes[3].patches) == count and many.axes[3].get_legend() is None
    for before, axis in zip(one.axes, many.axes):  # a tick's label may have another width
        assert axis.get_window_extent().size == pytest.approx(before.get_window_extent().size, abs=20)
        assert not many.legends[0].get_window_extent().overlaps(axis.get_tightbbox())
    names = [name.removeprefix("parameter group") for name in labels(many) if name.startswith("parameter group")]
    assert len(labels(many)) == 4 + len(names) and len(names) == (min(count, 8) if last else 0)
    assert last in (names or [""])


@pytest.mark.parametrize(
    ("losses", "scale"), [([2, 1, 0.5], "linear"), ([2, 900, 0.5], "log"), ([-1, -2, -3], "linear")]
)
def test_curves_show_losses_with_a_spike_and_below_zero(tmp_path, figures, losses, scale):
    rows = [row | {"train_loss": loss, "val_loss": loss} for row, loss in zip(history(), losses)]
    plotting.curves(tmp_path / "a.png", "title", rows, 2, BASELINE, False)
    plotting.histories(tmp_path / "a.png", "title", {"a": [rows]}, {"a": "Loss"}, ("baseline", 0.05))
    for figure in figures:
        bottom, top = figure.axes[0].get_ylim()
        assert figure.axes[0].get_yscale() == scale and all(bottom < loss < top for loss in losses)


def test_a_small_group_of_a_schedule_that_ends_near_zero_stays_visible():
    rates = [[1e-5, 1e-2], [5e-6, 5e-3], [1e-11, 1e-8], [0.0, 0.0]]
    axis = Figure().subplots()
    plotting._plot_learning_rates(axis, [{"epoch": 1, "batch_learning_rates": rates}])
    low, high = axis.get_ylim()
    assert axis.get_yscale() == "log" and low == pytest.approx(1e-7) and high > 1e-2


def test_bars_show_the_iou_and_mark_an_absent_class(tmp_path, figures):
    # class 0: 6 / (6 + 2 + 1), class 1: 1 / (1 + 1 + 2), class 2 in neither ground truth nor prediction
    matrix = torch.tensor([[6, 2, 0], [1, 1, 0], [0, 0, 0]])
    scores = {"val": Scores(1.0, matrix, CLASSES), "test": Scores(1.0, torch.eye(3), CLASSES)}
    plotting.class_iou(tmp_path / "a.png", "title", CLASSES, scores)
    axis = figures[0].axes[0]
    val, test = axis.containers
    assert [bar.get_width() for bar in val] == pytest.approx([6 / 9, 1 / 4, 0])
    assert [bar.get_width() for bar in test] == [1, 1, 1]
    assert texts(axis.texts) == ["0.67", "0.25", "absent", "1.00", "1.00", "1.00"]
    assert texts(axis.get_yticklabels()) == list(CLASSES) and axis.get_xlim() == (0, 1)
    assert labels(figures[0]) == [f"val: mean IoU {(6 / 9 + 1 / 4) / 2:.4f}", "test: mean IoU 1.0000"]
    plotting.class_iou(tmp_path / "a.png", "title", CLASSES, {f"model {index}": scores["val"] for index in range(7)})
    bars = [container[0] for container in figures[1].axes[0].containers]
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == 7  # the seven experiments look different


def test_confusion_matrix_is_in_percent_of_the_ground_truth_and_marks_absent_classes(tmp_path, figures):
    plotting.confusion(tmp_path / "a.png", "title", CLASSES, torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]]))
    axis = figures[0].axes[0]
    shares = axis.images[0].get_array()
    assert shares[:2].tolist() == [[0.8, 0.2, 0.0], [0.25, 0.75, 0.0]] and shares.mask[2].all()
    assert texts(axis.texts) == ["80", "20", "25", "75"] and axis.patch.get_hatch()  # seen where there is no value
    assert axis.get_xlabel().startswith("prediction") and axis.get_ylabel() == "ground truth"
    assert texts(axis.get_yticklabels()) == ["a", "b", "c (no pixels)"]
    assert texts(axis.get_xticklabels()) == ["a", "b", "c"]


def test_predictions_have_voc_colours_a_column_per_model_and_a_legend_of_the_classes_shown(tmp_path, figures):
    photo = np.full((30, 40, 3), (10, 200, 30), np.uint8)
    truth, first, second = np.zeros((3, 30, 40), np.uint8)
    truth[:, 20:], truth[:, :4], first[:15], second[15:] = 15, VOID, 3, 12
    samples = [("000007", photo, truth, first, second), ("000009", photo, truth, second, first)]
    plotting.predictions(tmp_path / "a.png", "title", voc_layout.CLASSES, samples, ["first", "second"])
    assert labels(figures[0]) == ["background", "bird", "dog", "person", "void"]
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes[:5]] == ["000007", "ground truth", "first", "second", "000009"]
    images = [image for _, image, *masks in samples for image in (image, *(imaging.PALETTE[mask] for mask in masks))]
    assert np.array_equal([axis.images[0].get_array() for axis in axes], images)
    # in the file, the colours are neither blended nor rescaled
    pixels = (matplotlib.image.imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    colours = {(10, 200, 30), *map(tuple, imaging.PALETTE[[0, 3, 12, 15, 255]].tolist())}
    assert colours <= set(map(tuple, pixels.tolist()))


def test_predictions_of_one_model_show_its_wrong_pixels_and_leave_out_void(tmp_path, figures):
    photo = np.full((30, 40, 3), (0, 60, 90), np.uint8)
    truth, prediction = np.zeros((2, 30, 40), np.uint8)
    truth[:, :10], prediction[5:25, 5:20] = VOID, 7
    name = "000007\nworst, IoU 0.31"
    plotting.predictions(tmp_path / "a.png", "title", voc_layout.CLASSES, [(name, photo, truth, prediction)])
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == [name, "ground truth", "prediction", "wrong pixels"]
    assert labels(figures[0]) == ["background", "car", "void", "wrong pixels"]
    expected = np.full((30, 40, 3), 150 + 0.4 * 50, np.uint8)
    expected[5:25, 10:20] = 0xD5, 0x5E, 0x00
    expected[:, :10] = imaging.PALETTE[VOID]
    assert np.array_equal(axes[3].images[0].get_array(), expected)


@pytest.mark.parametrize("num_models", [1, 3, 8])
def test_pictures_of_any_shape_have_one_width_and_do_not_overlap(tmp_path, figures, num_models):
    shapes = ((30, 40), (40, 30), (20, 80), (60, 60), (48, 27))
    name = "a_photo_with_a_name_as_long_as_those_of_Cityscapes\nbest"
    masks = [np.zeros(shape, np.uint8) for shape in shapes]
    samples = [(name, mask[..., None].repeat(3, 2), *[mask] * (1 + num_models)) for mask in masks]
    models = [f"model {index}" for index in range(num_models)]
    plotting.predictions(tmp_path / "a.png", "title", voc_layout.CLASSES, samples, models)
    count = 2 + num_models + (num_models == 1)
    boxes = [axis.get_window_extent() for axis in figures[0].axes]
    assert len(boxes) == len(shapes) * count
    for index, box in enumerate(boxes):
        height, width = shapes[index // count]
        assert box.width / box.height == pytest.approx(width / height)  # nothing is distorted
        assert box.width == pytest.approx(boxes[0].width) and box.width > 1.6 * figures[0].dpi
    boxes = [axis.get_tightbbox() for axis in figures[0].axes]  # with their titles
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


def test_samples_are_next_to_their_masks(tmp_path, figures):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    masks = rng.choice([0, 15, VOID], (16, 8, 8))
    plotting.samples(tmp_path / "a.png", "title", voc_layout.CLASSES, images, masks)
    shown = [axis.images[0].get_array() for axis in figures[0].axes]
    assert np.array_equal(shown[::2], images) and np.array_equal(shown[1::2], imaging.PALETTE[masks])
    assert labels(figures[0]) == ["background", "person", "void"]


def test_histories_show_every_epoch_of_every_run_and_name_the_losses(tmp_path, figures):
    runs = {"small": [history(epochs=1)], "large: an idea": [history(3), history(4, epochs=5)]}
    losses = {"small": "Loss", "large: an idea": "Loss, weighted by class"}
    plotting.histories(tmp_path / "a.png", "title", runs, losses, ("all-background baseline", 0.05))
    axes = figures[0].axes
    assert [len(axis.lines) for axis in axes] == [2, 3, 4, 5]  # train and val of each run, and the baseline
    assert [axis.get_title() for axis in axes[::2]] == list(losses.values())
    assert [axis.get_ylabel() for axis in axes[::2]] == ["small", "large\nan idea"]
    assert axes[3].lines[3].get_ydata() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    for axis in axes:
        bottom, top = axis.get_ylim()
        assert all(bottom <= value <= top for line in axis.lines for value in line.get_ydata())
    assert axes[1].get_ylim() == axes[3].get_ylim() and axes[0].lines[0].get_marker() == "."
    assert labels(figures[0]) == ["train", "val", "all-background baseline"]


def test_comparison_shows_means_deviations_and_seeds(tmp_path, figures):
    scores = {"train: baseline": [0.2, 0.3, 0.4], "train_4_a: an idea": [0.5]}
    plotting.comparison(tmp_path / "a.png", "title", scores, ("all-background baseline", 0.05))
    axis = figures[0].axes[0]
    assert texts(axis.get_yticklabels()) == ["train\nbaseline", "train_4_a\nan idea"]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0.3, 0.5])
    assert texts(axis.texts) == ["0.3000", "0.5000"]
    dots = [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "o"]
    assert dots == [[0.2, 0.3, 0.4], [0.5]]
    whiskers = axis.collections[0].get_segments()[0]
    assert whiskers[:, 0].tolist() == pytest.approx([0.2, 0.4])  # the standard deviation is 0.1
    assert labels(figures[0]).count("one seed") == 1


def test_heat_map_shows_percent_and_hatches_absent_classes(tmp_path, figures):
    ious = np.array([[0.5, np.nan, 0.123], [0.25, np.nan, 0]])
    plotting.classes_by_experiment(tmp_path / "a.png", "title", ["train: baseline", "mine"], CLASSES, ious)
    axis = figures[0].axes[0]
    assert texts(axis.texts) == ["50", "12", "25", "0"] and axis.images[0].get_array().mask[:, 1].all()
    assert texts(axis.get_yticklabels()) == ["train\nbaseline", "mine"] and axis.patch.get_hatch()


@pytest.mark.parametrize("num_classes", [2, 21, 60])
def test_plots_of_many_classes_are_bounded_and_say_what_they_leave_out(tmp_path, figures, num_classes):
    classes = tuple(f"a class with the long name {label}" for label in range(num_classes))
    matrix = torch.diag(torch.arange(1, num_classes + 1))  # the last classes are the most frequent
    shown = [f"a class wit…{name[-12:]}" for name in classes[-40:]]
    plotting.confusion(tmp_path / "confusion.png", "title", classes, matrix)
    plotting.class_iou(tmp_path / "iou.png", "title", classes, {"val": Scores(1.0, matrix, classes)})
    plotting.classes_by_experiment(tmp_path / "classes.png", "title", ["a", "b"], classes, np.eye(2, num_classes))
    for name in ("confusion", "iou", "classes"):
        assert max(matplotlib.image.imread(tmp_path / f"{name}.png").shape) < 2300
    for figure in figures:
        axis = figure.axes[0]
        found = [text for text in (*axis.get_xticklabels(), *axis.get_yticklabels()) if "class" in text.get_text()]
        upright = [text.get_window_extent() for text in found if not text.get_rotation()]
        assert not any(first.overlaps(second) for first, second in itertools.combinations(upright, 2))
        if num_classes > 40:
            assert "the 40 " in figure.get_suptitle() and f"of {num_classes} classes" in figure.get_suptitle()
    for figure in figures[:2]:
        assert texts(figure.axes[0].get_yticklabels()) == shown


def draw_all(folder):
    """Draw plots of text, lines and photos into the current folder."""
    mask = np.eye(30, dtype=np.uint8)
    samples = [("a", mask[..., None].repeat(3, 2), mask, mask)]
    plotting.curves(folder / "curves.png", "title", history(), 2, BASELINE, False)
    plotting.confusion(folder / "confusion.png", "title", CLASSES, torch.eye(3, dtype=torch.int64))
    plotting.predictions(folder / "predictions.png", "title", CLASSES, samples)
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_plots_do_not_depend_on_what_the_user_has_set(tmp_path):
    """A matplotlibrc in the current folder, and the backend of a notebook, which is not installed here."""
    settings = "text.usetex: True", "image.origin: lower", "figure.dpi: 30", "savefig.transparent: True"
    settings += "axes.facecolor: black", "font.family: Comic", "image.cmap: jet", "lines.linewidth: 9"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "matplotlibrc").write_text("\n".join(settings))
    code = "import pathlib, seg.plotting, matplotlib, test_plotting\ntest_plotting.draw_all(pathlib.Path())\n"
    code += "assert matplotlib.rcParams['axes.facecolor'] == 'black'"  # the user's own plots keep their settings
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "MPLBACKEND": "module://nowhere"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "foreign", env=env, check=True)
    expected = draw_all(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "foreign").glob("*.png")} == expected and expected


def make_font(path, name, letters):
    """Write a font that has some letters, all of them squares."""
    builder, pen = FontBuilder(1000), TTGlyphPen(None)
    for step, point in zip([pen.moveTo, *[pen.lineTo] * 3], [(0, 0), (0, 700), (700, 700), (700, 0)]):
        step(point)
    pen.closePath()
    glyphs = dict.fromkeys([".notdef", *(f"u{ord(letter):X}" for letter in letters)], pen.glyph())
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):X}" for letter in letters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(path)


def test_a_class_is_drawn_with_a_font_that_has_its_letters_or_by_its_number(tmp_path, figures, monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if font.name == "DejaVu Sans"])
    fonts = {"A font that is gone": "\u6c7d\u8f66", "Thai": "\u0e23\u0e16", "Hindi": "\u0938\u0921"}
    for name, letters in (fonts | {"LastResort": "\u6c7d\u8f66"}).items():
        make_font(tmp_path / f"{name}.ttf", name, letters)
        fontManager.addfont(tmp_path / f"{name}.ttf")
    (tmp_path / "A font that is gone.ttf").unlink()
    monkeypatch.setattr(plotting, "_fonts", plotting._fonts.__wrapped__)
    classes = ("$\u00fc$\u03a9$", "\u0e23\u0e16 x", "\u0938\u0921\u0e23", "\u6c7d\u8f66", "class\u200d")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Matplotlib's, of a letter that the font lacks
        plotting.overlay_legend(tmp_path / "a.png", classes)
        plotting.confusion(tmp_path / "a.png", classes[1], classes, torch.eye(5, dtype=torch.int64))
    shown = ["\\$\u00fc\\$\u03a9\\$", *classes[1:3], "class 3", classes[4]]  # no formula between the dollars
    assert labels(figures[0]) == texts(figures[1].axes[0].get_yticklabels()) == shown
