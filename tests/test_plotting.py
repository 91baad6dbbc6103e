"""Plots show the given numbers and images: read back from the figure, and pixel by pixel from the file."""

import itertools
import math

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import util
import voc
from seg import imaging, plotting
from util import Scores

CLASSES = ("a", "b", "c")


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, as Matplotlib objects."""
    figures, save = [], plotting._save
    monkeypatch.setattr(plotting, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def texts(artists):
    return [artist.get_text() for artist in artists]


def labels(legend):
    return texts(legend.get_texts())


def test_curves_show_every_column_and_mark_the_best_epoch(tmp_path, figures):
    columns = {"epoch": (1, 2, 3), "train_pixel_accuracy": (0.6, 0.7, 0.95), "val_pixel_accuracy": (0.7, 0.8, 0.9)}
    columns |= {"train_loss": (3, 1.5, 1), "val_loss": (2, 1, 0.5), "train_miou": (0.2, 0.4, 0.6)}
    columns["val_miou"] = (0.1, 0.3, 0.2)
    columns["batch_learning_rates"] = ([[0.1, 2.0]], [[0.05, 1.0], [0.02, 0.5]], [[0, 0]])
    history = [dict(zip(columns, row)) for row in zip(*columns.values())]
    baseline = Scores(math.nan, torch.tensor([[7, 0], [3, 0]]), ("background", "thing"))
    plotting.curves(tmp_path / "a.png", "title", history, 2, baseline, False)
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
    plotting.curves(tmp_path / "a.png", "title", history, 2, baseline, True)
    assert figures[1].axes[0].get_title() == "loss, weighted by class"


def test_dollar_signs_in_names_are_no_formulas(tmp_path, figures):
    names = ("$\\foo$", "$5 & $10", "c")
    scores = {"val": Scores(1.0, torch.eye(3).long(), names)}
    plotting.class_iou(tmp_path / "a.png", "price of $x$ and $\\y$", names, scores)  # \\foo would be an error
    plotting.confusion(tmp_path / "b.png", "$\\y$", names, torch.eye(3).long())
    shown = [text for figure in figures for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(shown) >= 6 and not any(text.get_parse_math() for text in shown)


def test_a_spike_of_the_loss_does_not_flatten_the_other_epochs(tmp_path, figures):
    row = {f"{split}_{name}": 0.5 for split in ("train", "val") for name in ("loss", "miou", "pixel_accuracy")}
    history = [row | {"epoch": epoch, "batch_learning_rates": [[0.1]]} for epoch in (1, 2, 3)]
    baseline = Scores(math.nan, torch.eye(2).long(), ("a", "b"))
    for loss in (0.4, 900):
        history[1]["val_loss"] = loss
        plotting.curves(tmp_path / "a.png", "title", history, 2, baseline, False)
    assert [figure.axes[0].get_yscale() for figure in figures] == ["linear", "log"]


def test_long_names_stay_different():
    names = [f"train_mine_{loss}_loss, seed 0" for loss in ("dice", "focal")] + ["a" * 30]
    shown = plotting._shortened(names)
    assert [text.replace("\n", " ") for text in shown[:2]] == names[:2] and shown[2] == f"{'a' * 11}…{'a' * 12}"


def test_a_negative_loss_is_in_sight(tmp_path, figures):
    others = {f"{split}_{name}": 0.5 for split in ("train", "val") for name in ("miou", "pixel_accuracy")}
    others["batch_learning_rates"] = [[0.1]]
    rows = [row | others | {"train_loss": -row["train_loss"]} for row in history(1)]
    plotting.curves(tmp_path / "a.png", "title", rows, 2, Scores(math.nan, torch.eye(2).long(), ("a", "b")), False)
    plotting.histories(tmp_path / "a.png", "title", {"a": [rows]}, {"a": "Loss"}, ("baseline", 0.05))
    assert len(figures) == 2
    for figure in figures:
        bottom, top = figure.axes[0].get_ylim()
        values = [value for line in figure.axes[0].lines[:2] for value in line.get_ydata()]
        assert len(values) == 4 and all(bottom < value < top for value in values)


def test_a_small_group_of_a_schedule_that_ends_near_zero_stays_visible():
    rates = [[1e-5, 1e-2], [5e-6, 5e-3], [1e-11, 1e-8], [0.0, 0.0]]
    axis = plotting._figure(5, 5).subplots()
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
    assert [bar.get_height() for bar in val] == pytest.approx([6 / 9, 1 / 4, 0])
    assert [bar.get_height() for bar in test] == [1, 1, 1]
    assert [text.get_text() for text in axis.texts] == ["0.67", "0.25", "absent", "1.00", "1.00", "1.00"]
    for bar, text in zip([*val, *test], axis.texts):
        bar_box, text_box = bar.get_window_extent(), text.get_window_extent()
        assert text_box.y0 > bar_box.y1 and bar_box.x0 < text_box.x0 < text_box.x1 < bar_box.x1
    assert labels(figures[0].legends[0]) == [f"val: mean IoU {(6 / 9 + 1 / 4) / 2:.4f}", "test: mean IoU 1.0000"]


@pytest.mark.parametrize(("num_classes", "num_models"), [(1, 1), (2, 8), (21, 3), (21, 12)])
def test_bars_of_any_number_of_models_are_comparable_and_covered_by_nothing(tmp_path, figures, num_classes, num_models):
    classes = tuple(f"class {label}" for label in range(num_classes))
    matrices = [torch.eye(num_classes).long() * 6 + errors for errors in range(num_models)]
    scores = {f"model {index}": Scores(1.0, matrix, classes) for index, matrix in enumerate(matrices)}
    plotting.class_iou(tmp_path / "a.png", "title", classes, scores)
    figure = figures[0]
    assert all(axis.get_ylim() == (0, 1) for axis in figure.axes)
    groups = [[bar for axis in figure.axes for bar in axis.containers[index]] for index in range(num_models)]
    for bars, matrix in zip(groups, matrices):
        assert [bar.get_height() for bar in bars] == pytest.approx(util.iou(matrix).tolist())
    assert len({(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in groups}) == num_models
    patches = figure.legends[0].get_patches()
    assert [patch.get_hatch() for patch in patches] == [bars[0].get_hatch() for bars in groups]
    assert [name for axis in figure.axes for name in texts(axis.get_xticklabels())] == list(classes)
    assert figure.get_figwidth() <= 10
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width and legend.y0 >= 0
    assert all(axis.get_tightbbox().y0 >= legend.y1 for axis in figure.axes)


def test_confusion_matrix_is_in_percent_of_the_ground_truth_and_marks_absent_classes(tmp_path, figures):
    plotting.confusion(tmp_path / "a.png", "title", CLASSES, torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]]))
    axis = figures[0].axes[0]
    shares = axis.images[0].get_array()
    assert shares[:2].tolist() == [[0.8, 0.2, 0.0], [0.25, 0.75, 0.0]] and shares.mask[2].all()
    assert texts(axis.texts) == ["80", "20", "25", "75"]
    assert axis.get_xlabel().startswith("prediction") and axis.get_ylabel() == "ground truth"
    assert texts(axis.get_yticklabels()) == ["a", "b", "c (no pixels)"]
    assert texts(axis.get_xticklabels()) == ["a", "b", "c"]
    # the row of the absent class is hatched: light, with lines
    box = axis.get_window_extent()
    pixels = matplotlib.image.imread(tmp_path / "a.png")[::-1, :, :3]
    row = pixels[int(box.y0) + 4 : int(box.y0 + box.height / 3) - 4, int(box.x0) + 4 : int(box.x1) - 4]
    assert row.min() > 0.6 and row.std() > 0.03


def test_confusion_matrix_of_many_classes_shows_those_that_are_only_predicted(tmp_path, figures):
    matrix = torch.zeros(60, 60, dtype=torch.int64)
    matrix[3, 59] = 5  # all of class 3 is predicted as 59
    plotting.confusion(tmp_path / "a.png", "title", [f"class {index}" for index in range(60)], matrix)
    rows, columns = (texts(get()) for get in (figures[0].axes[0].get_yticklabels, figures[0].axes[0].get_xticklabels))
    assert "class 3" in rows and "class 59 (no pixels)" in rows and "class 59" in columns and len(rows) == 40


def test_confusion_matrix_of_21_classes_is_readable_in_print(tmp_path, figures):
    plotting.confusion(tmp_path / "a.png", "title", voc.CLASSES, torch.eye(21).long())
    figure = figures[0]
    assert figure.get_figwidth() < 10 and min(text.get_fontsize() for text in figure.axes[0].texts) >= 8
    cell = figure.axes[0].get_window_extent().width / 21
    assert texts(figure.axes[0].texts) == ["100"] * 21
    assert all(text.get_window_extent().width < 0.9 * cell for text in figure.axes[0].texts)
    frame = figure.get_tightbbox()  # in inches: nothing is cut off
    assert frame.x0 >= 0 and frame.y0 >= 0
    assert frame.x1 <= figure.get_figwidth() and frame.y1 <= figure.get_figheight()


def test_predictions_have_voc_colours_a_column_per_model_and_a_legend_of_the_classes_shown(tmp_path, figures):
    photo = np.full((30, 40, 3), (10, 200, 30), np.uint8)
    truth, first, second = np.zeros((3, 30, 40), np.uint8)
    truth[:, 20:], truth[:, :4], first[:15], second[15:] = 15, util.VOID, 3, 12
    samples = [("000007", photo, truth, first, second), ("000009", photo, truth, second, first)]
    plotting.predictions(tmp_path / "a.png", "title", voc.CLASSES, samples, ["first", "second"])
    assert labels(figures[0].legends[0]) == ["background", "bird", "dog", "person", "void"]
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes[:5]] == ["000007", "ground truth", "first", "second", "000009"]
    images = [image for _, image, *masks in samples for image in (image, *(imaging.PALETTE[mask] for mask in masks))]
    assert np.array_equal([axis.images[0].get_array() for axis in axes], images)
    # in the file, the colours are neither blended nor rescaled
    pixels = (matplotlib.image.imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    colours = {(10, 200, 30), *map(tuple, imaging.PALETTE[[0, 3, 12, 15, 255]].tolist())}
    assert colours <= set(map(tuple, pixels.tolist()))


def test_classes_without_a_background_have_colours_that_differ_clearly(tmp_path, figures):
    """VOC's palette has black and two dark reds among the first 11 colours."""
    classes = [f"class {index}" for index in range(11)]
    mask = np.resize(np.array([*range(11), util.VOID], np.uint8), (24, 24))
    plotting.predictions(tmp_path / "a.png", "title", classes, [("a", np.zeros((24, 24, 3), np.uint8), mask, mask)])
    colours = np.vstack((imaging.distinct_colours()[:11], imaging.PALETTE[util.VOID :]))
    shown = figures[0].axes[1].images[0].get_array()
    assert np.array_equal(shown, colours[np.minimum(mask, 11)])
    handles = figures[0].legends[0].get_patches()[:12]
    assert np.allclose([handle.get_facecolor()[:3] for handle in handles], colours / 255)


def test_predictions_of_one_model_show_its_wrong_pixels_and_leave_out_void(tmp_path, figures):
    photo = np.full((30, 40, 3), (0, 60, 90), np.uint8)
    truth, prediction = np.zeros((2, 30, 40), np.uint8)
    truth[:, :10], prediction[5:25, 5:20] = util.VOID, 7
    name = "000007\nworst, IoU 0.31"
    plotting.predictions(tmp_path / "a.png", "title", voc.CLASSES, [(name, photo, truth, prediction)])
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == [name, "ground truth", "prediction", "wrong pixels"]
    assert labels(figures[0].legends[0]) == ["background", "car", "void", "wrong pixels"]
    expected = np.full((30, 40, 3), 150 + 0.4 * 50, np.uint8)
    expected[5:25, 10:20] = 0xD5, 0x5E, 0x00
    expected[:, :10] = imaging.PALETTE[util.VOID]
    assert np.array_equal(axes[3].images[0].get_array(), expected)


@pytest.mark.parametrize("num_models", [1, 3, 4, 9])
def test_predictions_of_photos_of_any_shape_leave_no_gaps(tmp_path, figures, num_models):
    shapes = ((30, 40), (40, 30), (20, 80), (60, 60), (48, 27))
    samples = []
    for index, shape in enumerate(shapes):
        masks = np.full((1 + num_models, *shape), index, np.uint8)
        name = f"photo {index} with a name as long as those of Cityscapes\nbest"
        samples.append((name, np.zeros((*shape, 3), np.uint8), *masks))
    models = [f"model {index}" for index in range(num_models)]
    plotting.predictions(tmp_path / "a.png", "title", voc.CLASSES, samples, models)
    figure = figures[0]
    pictures = 2 + num_models + (num_models == 1)
    assert len(figure.axes) == len(shapes) * pictures
    width, height = figure.get_size_inches()
    assert width <= 10.1
    boxes = [axis.get_position() for axis in figure.axes]  # after drawing: of the pictures themselves
    for index, box in enumerate(boxes):
        rows, columns = shapes[index // pictures]
        assert box.width * width / (box.height * height) == pytest.approx(columns / rows)  # nothing is distorted
        assert box.width * width == pytest.approx(boxes[0].width * width) and box.width * width > 1.8
    headings = [axis.title.get_window_extent() for axis in figure.axes]
    assert all(heading.x0 >= 0 and heading.x1 <= figure.bbox.width for heading in headings)
    assert all(heading.width < box.width * figure.bbox.width for heading, box in zip(headings, boxes))
    for above, below in zip(range(len(boxes)), range(1, len(boxes))):
        if boxes[below].x0 <= boxes[above].x0:  # begins a new line, which follows with room for its heading only
            gap = (boxes[above].y0 - boxes[below].y1) * height
            assert 0.2 < gap < 0.5
            assert max(heading.y1 for heading in headings[below : below + 1]) < boxes[above].y0 * figure.bbox.height
        else:
            assert (boxes[below].x0 - boxes[above].x1) * width == pytest.approx(0.06)
    assert figure.legends[0].get_window_extent().y0 > max(heading.y1 for heading in headings)


def test_samples_are_next_to_their_masks(tmp_path, figures):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    masks = rng.choice([0, 15, util.VOID], (16, 8, 8))
    plotting.samples(tmp_path / "a.png", "title", voc.CLASSES, images, masks)
    shown = [axis.images[0].get_array() for axis in figures[0].axes]
    assert np.array_equal(shown[::2], images) and np.array_equal(shown[1::2], imaging.PALETTE[masks])
    assert labels(figures[0].legends[0]) == ["background", "person", "void"]


def history(scale, epochs=2):
    """A made-up history whose losses fall from ``scale`` and twice that, and whose mean IoU rises with it."""
    rows = [{"epoch": k, "train_loss": scale / k, "val_loss": 2 * scale / k} for k in range(1, epochs + 1)]
    return [row | {"val_miou": 0.1 * scale * row["epoch"]} for row in rows]


def test_histories_show_every_epoch_of_every_run(tmp_path, figures):
    runs = {"small": [history(1)], "large: an idea": [history(3), history(4)]}
    losses = dict.fromkeys(runs, "CrossEntropyLoss")
    plotting.histories(tmp_path / "a.png", "title", runs, losses, ("all-background baseline", 0.05))
    axes = figures[0].axes
    assert [len(axis.lines) for axis in axes] == [2, 2, 4, 3]  # losses, then mean IoU with the baseline, of each
    assert [axis.get_title() for axis in axes[::2]] == ["small", "large\nan idea"]
    for axis in axes:
        bottom, top = axis.get_ylim()
        assert all(bottom <= value <= top for line in axis.lines for value in line.get_ydata())
    assert axes[3].get_ylim()[0] == 0
    assert axes[3].lines[1].get_ydata().tolist() == pytest.approx([0.4, 0.8])
    assert axes[0].get_ylim() == axes[2].get_ylim() and axes[1].get_ylim() == axes[3].get_ylim()
    assert labels(figures[0].legends[0]) == ["train", "val", "all-background baseline"]


def test_histories_of_different_losses_share_no_axis_and_name_their_loss(tmp_path, figures):
    names = ["first", "second", "weighted", "unknown", "unknown too", "third"]
    losses = dict.fromkeys(names, "CrossEntropyLoss") | {"weighted": "CrossEntropyLoss, weighted by class"}
    losses |= {"unknown": None, "unknown too": None}
    runs = {name: [history(scale)] for name, scale in zip(names, (1, 2, 300, 5, 600, 4))}
    plotting.histories(tmp_path / "a.png", "title", runs, losses, ("baseline", 0.05))
    panels, mious = figures[0].axes[::2], figures[0].axes[1::2]
    limits = dict(zip(names, (axis.get_ylim() for axis in panels)))
    assert limits["first"] == limits["second"] == limits["third"] and len(set(limits.values())) == 4
    assert limits["first"][1] < 10 < 300 < limits["weighted"][1]
    assert [axis.get_title().split("\n")[1:] for axis in panels[:4]] == [
        ["CrossEntropyLoss"], ["CrossEntropyLoss"], ["CrossEntropyLoss,", "weighted by class"], ["unknown loss"]
    ]  # fmt: skip
    shown = [any(label.get_visible() and label.get_text() for label in axis.get_yticklabels()) for axis in panels]
    assert shown == [True, False, True, True, True, True]  # two lines of three panels
    assert len({axis.get_ylim() for axis in mious}) == 1


def test_histories_of_a_single_epoch_and_of_many_experiments_are_visible(tmp_path, figures):
    runs = {f"train_{index}": [history(1, epochs=1)] * 2 for index in range(12)}
    plotting.histories(tmp_path / "a.png", "title", runs, dict.fromkeys(runs), ("baseline", 0.05))
    figure = figures[0]
    assert len(figure.axes) == 24 and figure.get_figwidth() < 11
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))
    assert figure.axes[0].lines[0].get_marker() == "."
    low, high = figure.axes[0].get_xlim()
    assert [epoch for epoch in figure.axes[0].get_xticks() if low <= epoch <= high] == [1]


def test_comparison_shows_means_deviations_and_seeds(tmp_path, figures):
    scores = {"train: baseline": [0.2, 0.3, 0.4], "train_4_a: an idea": [0.5], "failed": []}
    plotting.comparison(tmp_path / "a.png", "title", scores, ("all-background baseline", 0.05))
    axis = figures[0].axes[0]
    assert texts(axis.get_yticklabels()) == ["train\nbaseline", "train_4_a\nan idea"]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0.3, 0.5])
    assert texts(axis.texts) == ["0.3000", "0.5000"]
    dots = [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "o"]
    assert dots == [[0.2, 0.3, 0.4], [0.5]]
    whiskers = axis.collections[0].get_segments()[0]
    assert whiskers[:, 0].tolist() == pytest.approx([0.2, 0.4])  # the standard deviation is 0.1
    box = axis.get_window_extent()
    assert all(text.get_window_extent().x1 < box.x1 for text in axis.texts)
    assert labels(figures[0].legends[0]).count("one seed") == 1


def test_heat_map_shows_percent_and_hatches_absent_classes(tmp_path, figures):
    ious = np.array([[0.5, np.nan, 0.123], [0.25, np.nan, 0]])
    plotting.classes_by_experiment(tmp_path / "a.png", "title", ["train: baseline", "mine"], CLASSES, ious)
    axis = figures[0].axes[0]
    assert texts(axis.texts) == ["50", "12", "25", "0"] and axis.patch.get_hatch()
    assert texts(axis.get_yticklabels()) == ["train\nbaseline", "mine"]
    assert texts(axis.get_xticklabels()) == list(CLASSES)
    assert axis.images[0].get_array().mask[:, 1].all()


@pytest.mark.parametrize("num_classes", [1, 2, 21, 60, 254])
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
        assert max(matplotlib.image.imread(tmp_path / f"{name}.png").shape) < 2300
    confusion, iou, heat_map, predictions = figures
    assert len(confusion.axes[0].texts) == sum(len(axis.containers[0]) for axis in iou.axes) == shown
    legend = predictions.legends[0]
    assert max(len(label) for label in labels(legend)) <= 24
    for figure in figures:
        frame = figure.get_tightbbox()  # in inches: nothing is cut off
        assert frame.x0 > -0.01 and frame.x1 <= figure.get_figwidth() + 0.01
        assert frame.y0 > -0.01 and frame.y1 <= figure.get_figheight() + 0.01
    if num_classes > 40:
        for figure in (confusion, iou):
            assert f"the 40 most frequent of {num_classes} classes" in figure.get_suptitle()
        assert f"the 40 best of {num_classes} classes" in heat_map.get_suptitle()
        assert labels(legend)[-2:] == [f"and {num_classes - 40} more", "wrong pixels"] and len(labels(legend)) == 42


def test_plots_show_the_most_frequent_classes(tmp_path, figures):
    classes = tuple(map(str, range(60)))
    matrix = torch.diag(torch.arange(60) + 1)
    plotting.confusion(tmp_path / "a.png", "title", classes, matrix)
    plotting.class_iou(tmp_path / "b.png", "title", classes, {"val": Scores(1.0, matrix, classes)})
    for figure in figures:
        shown = [name for axis in figure.axes for name in texts(axis.get_xticklabels())]
        assert shown == list(map(str, range(20, 60)))


def test_thumbnail_bounds_photo_and_mask_and_mixes_no_classes():
    mask = np.zeros((900, 1500), np.uint8)
    mask[:, 700:], mask[500:] = 200, 255
    photo, small = plotting.thumbnail(Image.fromarray(imaging.PALETTE[mask]), mask)
    assert photo.shape == (384, 640, 3) and small.shape == (384, 640)
    assert np.unique(small).tolist() == [0, 200, 255] and not photo[10, 10].any() and not small[10, 10]
    mask = mask[:30, :40]
    assert np.array_equal(plotting.thumbnail(Image.fromarray(imaging.PALETTE[mask]), mask)[1], mask)
