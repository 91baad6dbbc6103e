"""The notebook is committed without outputs and runs from top to bottom with whatever models exist."""

import base64
import io

import nbformat
import pytest
import torch
from conftest import ROOT, make_loaders, make_tiny, save_model
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

import util
from basic_fcn import FCN
from custom_fcn import CustomFCN
from seg import checkpoint, engine
from seg.voc_layout import CLASSES

NOTEBOOK = ROOT / "SegmentationVisualization.ipynb"


def run_notebook(folder, last="", **settings):
    """Run the notebook on the models below a folder; return what it printed and its pictures.

    ``settings`` replace those of the first cell, and ``last`` is the code of one more at the end.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source += f"\nmodels = ['{folder}/' + pattern for pattern in models]"
    settings.setdefault("out", f"{folder}/plots")
    first.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    pictures = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
    return "".join(output.get("text", "") for output in outputs), pictures


def write_model(path, model, label, data, seed, classes=CLASSES, size=32, limit=None):
    """Write the checkpoint of a model that predicts one class everywhere."""
    model.classifier.bias.data[label] = 100
    experiment = path.stem.removeprefix("best_")
    flags = {"data": str(data), "limit": limit}
    save_model(path, model, classes, (size, size), experiment=experiment, seed=seed, flags=flags)


def test_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_notebook_shows_the_models_of_all_usual_places_on_the_data_of_each(tiny, tmp_path, kernel):
    other = make_tiny(tmp_path / "Other", (("train", 2), ("val", 3)))
    classes = ("sky", *CLASSES[1:])
    (other / "classes.txt").write_text("\n".join(classes))
    paths = ["best_train.pt", "demo/best_train.pt", "seed1/best_train_4_a.pt", "comparison/seed0/best_train_5_a.pt"]
    networks, sizes = [FCN(21), FCN(21), FCN(21), CustomFCN(21)], (32, 32, 32, 48)
    for label, (path, network, size) in enumerate(zip(paths, networks, sizes)):
        write_model(tmp_path / path, network, label, tiny, 2, size=size)
    write_model(tmp_path / "best_train_mine.pt", FCN(21), 1, other, 7, classes, limit=2)
    write_model(tmp_path / "best_gone.pt", FCN(21), 0, tmp_path / "gone", 0)
    text, pictures = run_notebook(tmp_path)
    assert f"left out: {tmp_path / 'gone'}: no such folder" in text
    names = [f"{tmp_path}/train", f"{tmp_path}/demo/train", "train_4_a, seed 2", "train_5_a, seed 2"]
    assert f"Tiny, val, in {tiny}: 4 models: {'; '.join(names)}" in text
    assert f"Other, val, first 2 images, in {other}: 1 models: train_mine, seed 7" in text
    criterion = torch.nn.CrossEntropyLoss(ignore_index=util.VOID)
    for path, name, size in zip(paths, names, sizes):
        loader = make_loaders(tiny, 4, size=size)[1]
        scores = engine.evaluate(checkpoint.load(tmp_path / path), loader, criterion)
        assert f"{name} {scores.miou:.4f} {scores.pixel_accuracy:.4f}" in " ".join(text.split())
    assert len(pictures) == 4  # predictions and IoU on each of the two data sets
    assert pictures[0].height > pictures[1].height  # 4 photos with 6 pictures each, 3 with 3


def test_notebook_takes_other_data_and_leaves_out_models_of_other_classes(tiny, tmp_path, kernel):
    write_model(tmp_path / "best_train.pt", FCN(21), 0, "no longer there", 0)
    write_model(tmp_path / "demo" / "best_train.pt", FCN(2), 0, tiny, 0, ("background", "lesion"))
    shown = "print('shown', *[name for name, *_ in samples])\nimport matplotlib.pyplot as plt\nplt.plot([0, 1]);"
    text, pictures = run_notebook(tmp_path, shown, data=str(tiny), split="train", limit=4, photos=2)
    assert "shown 000000 000003\n" in text  # evenly spaced
    assert f"left out: {tmp_path}/demo/best_train.pt: was trained on other classes than those of {tiny}" in text
    assert f"Tiny, train, first 4 images, in {tiny}: 1 models: train, seed 0" in text
    assert len(pictures) == 3  # predictions, IoU, and the user's own plot, inline


def test_notebook_without_any_model_says_so(tmp_path, kernel):
    with pytest.raises(CellExecutionError, match="no model can be shown: train one"):
        run_notebook(tmp_path)
