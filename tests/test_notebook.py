"""The notebook is committed without outputs and runs from top to bottom with whatever models exist."""

import json
import sys

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

import checkpoint
import engine
import imaging
import util
import voc
from basic_fcn import FCN
from custom_fcn import CustomFCN

NOTEBOOK = ROOT / "SegmentationVisualization.ipynb"


def run_notebook(folder, data):
    """Run the notebook on a dataset with the models in a folder; return what it printed and all outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for default, value in (("data/VOCdevkit/VOC2007", data), ("plots", folder), ("best_train", folder / "best_train")):
        assert f'"{default}' in settings.source
        settings.source = settings.source.replace(f'"{default}', f'"{value}')
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs), outputs


@pytest.fixture(autouse=True)
def kernel(monkeypatch, tmp_path):
    """A kernel that runs the same Python as the tests, whatever kernels the machine has."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    line = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": line, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


def test_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_notebook_shows_the_models_that_exist(tiny, tmp_path):
    for name, model, label in (("train", FCN(21), 0), ("train_5_a", CustomFCN(21), 15)):
        model.classifier.bias.data[label] = 100  # predicts this class everywhere
        state = {"classes": list(voc.CLASSES), "size": 32, "mean": list(imaging.MEAN), "std": list(imaging.STD)}
        state |= {"module": type(model).__module__, "class": type(model).__name__, "arguments": model.arguments}
        torch.save(state | {"model": model.state_dict()}, tmp_path / f"best_{name}.pt")
    text, outputs = run_notebook(tmp_path, tiny)
    assert "2 models, 4 images of val" in text and "best_train_4_a.pt" in text.splitlines()[0]
    loader = voc.loaders(tiny, 4, size=32)[1]
    criterion = torch.nn.CrossEntropyLoss(ignore_index=util.VOID)
    for name in ("train", "train_5_a"):
        scores = engine.evaluate(checkpoint.load(tmp_path / f"best_{name}.pt"), loader, criterion)
        assert f"{name} {scores.miou:.4f} {scores.pixel_accuracy:.4f}" in " ".join(text.split())
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    for name in ("predictions", "iou"):
        with Image.open(tmp_path / f"notebook_{name}.png") as plot:
            assert plot.width > 800


def test_notebook_without_any_model_says_so(tiny, tmp_path):
    with pytest.raises(CellExecutionError, match="none of the models exists"):
        run_notebook(tmp_path, tiny)
