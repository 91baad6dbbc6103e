"""The pictures hold what they claim to show: read back pixel by pixel, or by asking the drawing itself."""

import math

import matplotlib.image
import numpy as np
import pytest
import torch

import plotting
import util
import voc
from util import Scores

HISTORY = [
    {
        "epoch": k,
        "learning_rate": 0.1 / k,
        "train_loss": 3 / k,
        "val_loss": 2 / k,
        "val_pixel_accuracy": 0.7,
        "val_miou": iou,
    }
    for k, iou in enumerate((0.1, 0.3, 0.2), start=1)
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, kept for questions."""
    figures = []
    finish = plotting._finish
    monkeypatch.setattr(plotting, "_finish", lambda figure, path: (figures.append(figure), finish(figure, path)))
    return figures


def test_curves_show_every_column_and_mark_the_best_epoch(tmp_path, drawn):
    background = Scores(math.nan, torch.tensor([[7, 0], [3, 0]]), ("background", "thing"))
    plotting.curves(tmp_path / "a.png", "title", HISTORY, 2, ("background", background))
    panels = {axis.get_title(): axis for axis in drawn[0].axes}
    assert list(panels) == ["loss", "pixel accuracy", "mean IoU", "learning rate"]
    lines = {line.get_label(): line for line in panels["loss"].lines}
    assert lines["train"].get_ydata().tolist() == [3, 1.5, 1] and lines["val"].get_ydata().tolist() == [2, 1, 2 / 3]
    assert panels["learning rate"].lines[0].get_ydata().tolist() == [0.1, 0.05, 0.1 / 3]
    lines = {line.get_label(): line for line in panels["mean IoU"].lines}
    assert lines["best epoch: 2"].get_xdata()[0] == 2 and lines["val"].get_ydata().tolist() == [0.1, 0.3, 0.2]
    assert lines["background everywhere"].get_ydata()[0] == pytest.approx(0.35)


def test_bars_are_the_iou_and_an_absent_class_is_named(tmp_path, drawn):
    # class 0: 6 / (6 + 2 + 1), class 1: 1 / (1 + 1 + 2), class 2 in neither truth nor prediction
    matrix = torch.tensor([[6, 2, 0], [1, 1, 0], [0, 0, 0]])
    scores = {"val": Scores(1.0, matrix, ("a", "b", "c")), "test": Scores(1.0, torch.eye(3), ("a", "b", "c"))}
    plotting.class_iou(tmp_path / "a.png", "title", ("a", "b", "c"), scores)
    axis = drawn[0].axes[0]
    val, test = axis.containers
    assert [bar.get_height() for bar in val][:2] == pytest.approx([6 / 9, 1 / 4])
    assert [bar.get_height() for bar in test] == [1, 1, 1]
    assert [text.get_text().strip() for text in axis.texts] == ["absent"]


def test_bars_of_a_model_that_finds_nothing(tmp_path, drawn):
    classes = ("a", "b", "c")
    nothing = torch.tensor([[0, 0, 0], [0, 0, 5], [0, 3, 0]])  # the first class absent, the others never found
    scores = {name: Scores(1.0, nothing, classes) for name in ("val", "test")}
    plotting.class_iou(tmp_path / "a.png", "title", classes, scores)
    bottom, top = drawn[0].axes[0].get_ylim()
    assert bottom == 0 < top


def test_seven_models_have_bars_of_seven_looks(tmp_path, drawn):
    matrices = [torch.tensor([[6, number], [1, 3]]) for number in range(7)]
    scores = {f"model {number}": Scores(1.0, matrix, ("a", "b")) for number, matrix in enumerate(matrices)}
    plotting.class_iou(tmp_path / "a.png", "title", ("a", "b"), scores)
    bars = drawn[0].axes[0].containers
    assert [group[0].get_height() for group in bars] == pytest.approx([6 / (7 + number) for number in range(7)])
    assert len({group[0].get_facecolor() for group in bars}) == len({group[0].get_hatch() for group in bars}) == 7
    expected = [f"model {number}: mean IoU {util.mean_iou(matrix):.4f}" for number, matrix in enumerate(matrices)]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == expected


def test_the_confusion_matrix_is_shown_as_shares_of_the_true_class(tmp_path, drawn):
    plotting.confusion(tmp_path / "a.png", "title", ("a", "b", "c"), torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]]))
    axis = drawn[0].axes[0]
    shares = axis.images[0].get_array()
    assert shares[:2].tolist() == [[0.8, 0.2, 0.0], [0.25, 0.75, 0.0]] and shares.mask[2].all()
    assert [text.get_text() for text in axis.texts] == ["80", "20", "25", "75"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("prediction", "truth")


def test_predictions_are_in_vocs_colours_with_a_legend_of_the_classes_shown(tmp_path, drawn):
    photo = np.full((30, 40, 3), (10, 200, 30), np.uint8)
    truth, prediction = np.zeros((30, 40), np.uint8), np.zeros((30, 40), np.int64)
    truth[:, 20:], truth[:, :4], prediction[:15] = 15, voc.VOID, 3
    plotting.predictions(tmp_path / "a.png", "title", voc.CLASSES, [("000007", photo, truth, prediction)])
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["background", "bird", "person", "void"]
    shown = [axis.images[0].get_array() for axis in drawn[0].axes]
    for array, expected in zip(shown, (photo, voc.PALETTE[truth], voc.PALETTE[prediction])):
        assert np.array_equal(array, expected)
    # and in the file the colours are what they were, not blended or rescaled
    picture = (matplotlib.image.imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    assert {(10, 200, 30), *map(tuple, voc.PALETTE[[0, 3, 15, 255]].tolist())} <= set(map(tuple, picture.tolist()))


def test_predictions_of_several_models_have_a_headed_column_each(tmp_path, drawn):
    photo, truth = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), np.uint8)
    rows = [(name, photo, truth, np.full_like(truth, 1), np.full_like(truth, 2)) for name in ("x", "y")]
    plotting.predictions(tmp_path / "a.png", "title", ("a", "b", "c"), rows, ["first", "second"])
    axes = drawn[0].axes
    assert [axis.get_title() for axis in axes[:4]] == ["photo", "truth", "first", "second"]
    assert [axis.images[0].get_array()[0, 0].tolist() for axis in axes[4:]] == [
        [0, 0, 0],
        *voc.PALETTE[[0, 1, 2]].tolist(),
    ]


def test_samples_stand_beside_their_masks(tmp_path, drawn):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    masks = rng.choice([0, 15, voc.VOID], (16, 8, 8))
    plotting.samples(tmp_path / "a.png", "title", voc.CLASSES, images, masks)
    shown = [axis.images[0].get_array() for axis in drawn[0].axes]
    assert all(np.array_equal(picture, image) for picture, image in zip(shown[::2], images))
    assert all(np.array_equal(picture, voc.PALETTE[mask]) for picture, mask in zip(shown[1::2], masks))
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["background", "person", "void"]


def test_every_epoch_of_every_run_lies_within_its_panel(tmp_path, drawn):
    def history(scale):
        return [
            {"epoch": k, "train_loss": scale / k, "val_loss": 2 * scale / k, "val_miou": 0.1 * scale * k}
            for k in (1, 2)
        ]

    runs = {"small": [history(1)], "large": [history(3), history(4)]}
    plotting.histories(tmp_path / "a.png", "title", runs, ("background", 0.05))
    axes = drawn[0].axes
    assert [len(axis.lines) for axis in axes] == [2, 4, 2, 3]  # loss, loss, mean IoU and the line to beat
    assert [axis.get_title() for axis in axes[:2]] == ["small", "large"]
    for axis in axes:
        bottom, top = axis.get_ylim()
        assert all(bottom <= value <= top for line in axis.lines for value in line.get_ydata())
    assert axes[3].get_ylim()[0] == 0
    assert axes[3].lines[1].get_ydata().tolist() == pytest.approx([0.4, 0.8])
