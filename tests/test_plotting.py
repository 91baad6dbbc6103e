"""Plots show the given numbers and images: read back from the figure, and pixel by pixel from the file."""

import math

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image

import imaging
import plotting
import util
import voc
from util import Scores

CLASSES = ("a", "b", "c")


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, as Matplotlib objects."""
    figures, save = [], plotting._save
    monkeypatch.setattr(plotting, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def labels(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_curves_show_every_column_and_mark_the_best_epoch(tmp_path, figures):
    columns = {"epoch": (1, 2, 3), "train_pixel_accuracy": (0.6, 0.7, 0.95), "val_pixel_accuracy": (0.7, 0.8, 0.9)}
    columns |= {"train_loss": (3, 1.5, 1), "val_loss": (2, 1, 0.5), "train_miou": (0.2, 0.4, 0.6)}
    columns["val_miou"] = (0.1, 0.3, 0.2)
    columns["batch_learning_rates"] = ([[0.1, 2.0]], [[0.05, 1.0], [0.02, 0.5]], [[0, 0]])
    history = [dict(zip(columns, row)) for row in zip(*columns.values())]
    baseline = Scores(math.nan, torch.tensor([[7, 0], [3, 0]]), ("background", "thing"))
    plotting.curves(tmp_path / "a.png", "title", history, 2, ("all-background baseline", baseline), False)
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    assert list(panels) == ["loss", "pixel accuracy", "mean IoU", "learning rate"]
    for title, name in (("loss", "loss"), ("pixel accuracy", "pixel_accuracy"), ("mean IoU", "miou")):
        lines = {line.get_label(): line for line in panels[title].lines}
        for split in ("train", "val"):
            assert tuple(lines[split].get_ydata()) == columns[f"{split}_{name}"]
        assert lines["best epoch: 2"].get_xdata()[0] == 2
        left, right = panels[title].get_xlim()
        assert left <= 0 and right > 3
    levels = {"pixel accuracy": 0.7, "mean IoU": 0.35}
    for title, level in levels.items():
        lines = {line.get_label(): line for line in panels[title].lines}
        assert lines["all-background baseline on val"].get_ydata()[0] == pytest.approx(level)
    groups = [patch.get_data() for patch in panels["learning rate"].patches]
    assert [group.values.tolist() for group in groups] == [[0.1, 0.05, 0.02, 0], [2, 1, 0.5, 0]]
    assert groups[0].edges.tolist() == [0, 1, 1.5, 2, 3]  # two batches in the second epoch
    plotting.curves(tmp_path / "a.png", "title", history, 2, ("all-background baseline", baseline), True)
    assert figures[1].axes[0].get_title() == "loss, weighted by class"


def test_bars_show_the_iou_and_mark_an_absent_class(tmp_path, figures):
    # class 0: 6 / (6 + 2 + 1), class 1: 1 / (1 + 1 + 2), class 2 in neither ground truth nor prediction
    matrix = torch.tensor([[6, 2, 0], [1, 1, 0], [0, 0, 0]])
    scores = {"val": Scores(1.0, matrix, CLASSES), "test": Scores(1.0, torch.eye(3), CLASSES)}
    plotting.class_iou(tmp_path / "a.png", "title", CLASSES, scores)
    axis = figures[0].axes[0]
    val, test = axis.containers
    assert [bar.get_height() for bar in val][:2] == pytest.approx([6 / 9, 1 / 4])
    assert [bar.get_height() for bar in test] == [1, 1, 1]
    assert [text.get_text().strip() for text in axis.texts] == ["absent"]


def test_bars_of_a_model_without_any_correct_pixel_have_an_axis_above_zero(tmp_path, figures):
    matrix = torch.tensor([[0, 0, 0], [0, 0, 5], [0, 3, 0]])
    plotting.class_iou(tmp_path / "a.png", "title", CLASSES, {"val": Scores(1.0, matrix, CLASSES)})
    bottom, top = figures[0].axes[0].get_ylim()
    assert bottom == 0 < top


def test_bars_of_seven_models_differ_in_colour_and_hatch(tmp_path, figures):
    matrices = [torch.tensor([[6, errors], [1, 3]]) for errors in range(7)]
    scores = {f"model {index}": Scores(1.0, matrix, ("a", "b")) for index, matrix in enumerate(matrices)}
    plotting.class_iou(tmp_path / "a.png", "title", ("a", "b"), scores)
    bars = figures[0].axes[0].containers
    assert [group[0].get_height() for group in bars] == pytest.approx([6 / (7 + errors) for errors in range(7)])
    assert len({group[0].get_facecolor() for group in bars}) == len({group[0].get_hatch() for group in bars}) == 7
    expected = [f"model {index}: mean IoU {util.mean_iou(matrix):.4f}" for index, matrix in enumerate(matrices)]
    assert labels(figures[0].legends[0]) == expected


def test_confusion_matrix_is_in_percent_of_the_ground_truth(tmp_path, figures):
    plotting.confusion(tmp_path / "a.png", "title", CLASSES, torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]]))
    axis = figures[0].axes[0]
    shares = axis.images[0].get_array()
    assert shares[:2].tolist() == [[0.8, 0.2, 0.0], [0.25, 0.75, 0.0]] and shares.mask[2].all()
    assert [text.get_text() for text in axis.texts] == ["80", "20", "25", "75"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("prediction", "ground truth")


def test_predictions_have_voc_colours_a_column_per_model_and_a_legend_of_the_classes_shown(tmp_path, figures):
    photo = np.full((30, 40, 3), (10, 200, 30), np.uint8)
    truth, first, second = np.zeros((3, 30, 40), np.uint8)
    truth[:, 20:], truth[:, :4], first[:15], second[15:] = 15, util.VOID, 3, 12
    samples = [("000007", photo, truth, first, second), ("000009", photo, truth, second, first)]
    plotting.predictions(tmp_path / "a.png", "title", voc.CLASSES, samples, ["first", "second"])
    assert labels(figures[0].legends[0]) == ["background", "bird", "dog", "person", "void"]
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes[:4]] == ["photo", "ground truth", "first", "second"]
    images = [image for _, image, *masks in samples for image in (image, *(imaging.PALETTE[mask] for mask in masks))]
    assert np.array_equal([axis.images[0].get_array() for axis in axes], images)
    # in the file, the colours are neither blended nor rescaled
    pixels = (matplotlib.image.imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    colours = {(10, 200, 30), *map(tuple, imaging.PALETTE[[0, 3, 12, 15, 255]].tolist())}
    assert colours <= set(map(tuple, pixels.tolist()))


def test_samples_are_next_to_their_masks(tmp_path, figures):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    masks = rng.choice([0, 15, util.VOID], (16, 8, 8))
    plotting.samples(tmp_path / "a.png", "title", voc.CLASSES, images, masks)
    shown = [axis.images[0].get_array() for axis in figures[0].axes]
    assert np.array_equal(shown[::2], images) and np.array_equal(shown[1::2], imaging.PALETTE[masks])
    assert labels(figures[0].legends[0]) == ["background", "person", "void"]


def test_histories_show_every_epoch_of_every_run(tmp_path, figures):
    def history(scale):
        return [
            {"epoch": k, "train_loss": scale / k, "val_loss": 2 * scale / k, "val_miou": 0.1 * scale * k}
            for k in (1, 2)
        ]

    runs = {"small": [history(1)], "large": [history(3), history(4)]}
    plotting.histories(tmp_path / "a.png", "title", runs, ("all-background baseline", 0.05))
    axes = figures[0].axes
    assert [len(axis.lines) for axis in axes] == [2, 4, 2, 3]  # losses of both, then mean IoU with the baseline
    assert [axis.get_title() for axis in axes[:2]] == ["small", "large"]
    for axis in axes:
        bottom, top = axis.get_ylim()
        assert all(bottom <= value <= top for line in axis.lines for value in line.get_ydata())
    assert axes[3].get_ylim()[0] == 0
    assert axes[3].lines[1].get_ydata().tolist() == pytest.approx([0.4, 0.8])


@pytest.mark.parametrize("num_classes", [2, 21, 60, 254])
def test_plots_of_many_classes_are_bounded_and_say_what_they_leave_out(tmp_path, figures, num_classes):
    classes = tuple(f"a class with the long name {label}" for label in range(num_classes))
    matrix = torch.diag(torch.arange(1, num_classes + 1))  # the last classes are the most frequent
    shown = min(40, num_classes)
    plotting.confusion(tmp_path / "confusion.png", "title", classes, matrix)
    plotting.class_iou(tmp_path / "iou.png", "title", classes, {"val": Scores(1.0, matrix, classes)})
    plotting.classes_by_experiment(tmp_path / "classes.png", "title", ["a", "b"], classes, np.eye(2, num_classes))
    masks = np.repeat(np.arange(num_classes), np.arange(1, num_classes + 1)).astype(np.uint8)[None]
    sample = ("name", np.zeros((*masks.shape, 3), np.uint8), masks, masks)
    plotting.predictions(tmp_path / "predictions.png", "title", classes, [sample])
    for name in ("confusion", "iou", "classes", "predictions"):
        assert max(matplotlib.image.imread(tmp_path / f"{name}.png").shape) < 3300
    confusion, iou, _, predictions = figures
    assert len(confusion.axes[0].texts) == len(iou.axes[0].containers[0]) == shown
    legend = predictions.legends[0]
    frame = legend.get_window_extent()
    assert frame.y0 >= 0 and frame.y1 <= predictions.bbox.height
    assert max(len(label) for label in labels(legend)) <= 24
    if num_classes > 40:
        assert f"the 40 most frequent of {num_classes} classes" in confusion.axes[0].get_title()
        assert f"the 40 most frequent of {num_classes} classes" in iou.get_suptitle()
    if num_classes > 2:
        assert labels(legend)[-1] == f"and {num_classes - len(labels(legend)) + 1} more"


def test_plots_show_the_most_frequent_classes(tmp_path, figures):
    classes = tuple(map(str, range(60)))
    matrix = torch.diag(torch.arange(60) + 1)
    plotting.confusion(tmp_path / "a.png", "title", classes, matrix)
    plotting.class_iou(tmp_path / "b.png", "title", classes, {"val": Scores(1.0, matrix, classes)})
    for figure in figures:
        assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == list(map(str, range(20, 60)))


def test_thumbnail_bounds_photo_and_mask_and_mixes_no_classes():
    mask = np.zeros((900, 1500), np.uint8)
    mask[:, 700:], mask[500:] = 200, 255
    photo, small = plotting.thumbnail(Image.fromarray(imaging.PALETTE[mask]), mask)
    assert photo.shape == (384, 640, 3) and small.shape == (384, 640)
    assert np.unique(small).tolist() == [0, 200, 255] and not photo[10, 10].any() and not small[10, 10]
    mask = mask[:30, :40]
    assert np.array_equal(plotting.thumbnail(Image.fromarray(imaging.PALETTE[mask]), mask)[1], mask)
