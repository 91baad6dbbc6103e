"""The notebook: committed without outputs, and running from top to bottom over whatever models there are."""

import sys

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

import engine
import voc
from basic_fcn import FCN
from custom_fcn import CustomFCN

NOTEBOOK = ROOT / "SegmentationVisualization.ipynb"


def checkpoint(path, model, size=32):
    """Write what ``engine.load`` needs of an untrained model."""
    about = {"classes": list(voc.CLASSES), "size": size, "mean": list(voc.MEAN), "std": list(voc.STD)}
    about |= {"module": type(model).__module__, "class": type(model).__name__, "arguments": model.arguments}
    torch.save(about | {"model": model.state_dict()}, path)


def execute(folder, data):
    """Run the notebook on a data set with the models in ``folder``; return it with its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert 'data = "data/VOCdevkit/VOC2007"' in settings.source and 'out = "plots"' in settings.source
    settings.source = settings.source.replace("data/VOCdevkit/VOC2007", str(data)).replace('"plots"', repr(str(folder)))
    settings.source += f"\nmodels = [{str(folder)!r} + '/' + model for model in models]"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    return notebook


@pytest.fixture(autouse=True)
def this_python(monkeypatch, tmp_path):
    """A kernel that runs the Python of these tests, whatever kernels the machine has."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    line = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    text = str({"argv": line, "display_name": "Python 3", "language": "python"}).replace("'", '"')
    (kernel / "kernel.json").write_text(text)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_it_shows_the_models_that_exist(tiny, tmp_path):
    torch.manual_seed(0)
    for name, model in (("train", FCN(21)), ("train_5_a", CustomFCN(21))):
        checkpoint(tmp_path / f"best_{name}.pt", model)
    notebook = execute(tmp_path, tiny)
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "2 models, 4 images of val" in text and "best_train_4_a.pt" in text.splitlines()[0]
    loader = voc.loaders(tiny, 4, size=32)[1]
    criterion = torch.nn.CrossEntropyLoss(ignore_index=voc.VOID)
    for name in ("train", "train_5_a"):
        scores = engine.evaluate(checkpoint.load(tmp_path / f"best_{name}.pt"), loader, criterion)
        assert f"{name:14} {scores.miou:8.4f}" in text
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in output.data for output in shown) == 2
    for picture in ("notebook_predictions.png", "notebook_iou.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width > 800


def test_without_any_model_it_says_so(tiny, tmp_path):
    with pytest.raises(CellExecutionError, match="none of the models is there"):
        execute(tmp_path, tiny)
