"""The exported ONNX file and the web page predict what predict.py does, for any network, photo and classes."""

import functools
import http.server
import json
import logging
import re
import sys
import threading
from unittest import mock

import numpy as np
import onnx.parser
import onnxruntime
import pytest
import torch
from conftest import NEEDS_CUDA, ROOT, TESTS, make_photo, run_main, save_model, see_images
from PIL import Image
from torch import nn

import export
import predict
from basic_fcn import FCN
from custom_fcn import CustomFCN
from resnet_fcn import ResNetFCN
from seg import checkpoint, imaging, onnx_graph
from unet import UNet

RUNTIME = ROOT / "node_modules" / "onnxruntime-web"
SHAPES = (113, 200), (311, 97), (1, 1)  # of photos


class SmallLogits(nn.Module):
    """A user's network: a dict whose logits are smaller than the image."""

    def __init__(self, num_classes):
        super().__init__()
        self.arguments = {"num_classes": num_classes}
        self.layer = nn.Conv2d(3, num_classes, kernel_size=3, stride=4)

    def forward(self, images):
        return {"out": self.layer(images), "aux": images.mean()}


class DataDependent(SmallLogits):
    def forward(self, images):
        return self.layer(-images if images.mean() > 0 else images)


def save(path, network, num_classes, size):
    """Write a checkpoint of an untrained network that predicts many classes."""
    torch.manual_seed(0)
    names = [f"class {label} ä" for label in range(num_classes)]
    return save_model(path, see_images(network), names, size, dataset="Some", epoch=3, val_miou=0.25)


def run_export(folder, *arguments):
    """Run export.py in a folder; return its exit code."""
    try:
        return run_main(folder, export, " ".join(map(str, arguments)))
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with the checkpoint of SmallLogits, 3 classes, for rectangular images of 36x52, and its export."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "ROOT", TESTS)
        save(folder / "best.pt", SmallLogits(3), 3, (36, 52))
        assert run_export(folder, "best.pt") == 0
        yield folder


def classes(path, photo):
    """The mask of a photo, by the ONNX file at ``path``."""
    session = onnxruntime.InferenceSession(path)
    (mask,) = session.run(["mask"], {"photo": np.asarray(photo)})
    assert mask.dtype == np.uint8
    return mask


NETWORKS = [
    (FCN, 2, (64, 64)),
    (CustomFCN, 11, (96, 64)),
    (ResNetFCN, 21, (65, 47)),
    (functools.partial(UNet, width=4), 255, (33, 50)),
    (SmallLogits, 3, (36, 52)),
    pytest.param(lambda num_classes: CustomFCN(num_classes).cuda(), 11, (96, 64), marks=NEEDS_CUDA, id="from-cuda"),
]


@pytest.mark.parametrize(("network", "num_classes", "size"), NETWORKS)
def test_file_predicts_what_predict_does(network, num_classes, size, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "ROOT", TESTS if network is SmallLogits else ROOT)
    path = save(tmp_path / "best.pt", network(num_classes), num_classes, size)
    assert run_export(tmp_path, "best.pt") == 0
    assert "% of a photo's pixels get the class" in capsys.readouterr().out
    model, predicted = checkpoint.load(path), set()
    for shape in SHAPES:
        photo = make_photo(*shape)
        expected = predict.segment(model, photo)
        mask = classes(tmp_path / "best.onnx", photo)
        assert mask.shape == shape and (mask == expected).mean() >= 0.995
        predicted |= set(np.unique(expected))
    assert len(predicted) > 1


@pytest.mark.parametrize("shape", [(360, 480), (1500, 2000), (224, 224), (311, 97), (1, 1)])
def test_photos_are_resized_as_by_pillow_within_rounding(shape):
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    header = '<ir_version: 9, opset_import: ["": 18]>'
    resizing = onnx.parser.parse_model(header + onnx_graph.START % (96, 224)).SerializeToString()
    (result,) = onnxruntime.InferenceSession(resizing).run(None, {"photo": photo})
    error = result.transpose(1, 2, 0) - imaging.resize(Image.fromarray(photo), (96, 224)).astype(int)
    assert np.abs(error).max() <= 1 and (error != 0).mean() < 0.03


@pytest.mark.parametrize("document", ["README.md", "docs/EXPORT.md"])
def test_the_documented_program_runs(document, small, monkeypatch, capsys):
    text = (ROOT / document).read_text(encoding="utf-8")
    (program,) = (block for block in re.findall("```python\n(.*?)```", text, re.DOTALL) if "onnxruntime" in block)
    monkeypatch.chdir(small)
    photo = make_photo(90, 70)
    photo.save("photo.jpg", format="png")
    names = {}
    exec(re.sub("best_train(_5_b)?", "best", program), names)
    expected = predict.segment(checkpoint.load("best.pt"), photo)
    assert (names["mask"] == expected).mean() >= 0.995
    if document == "docs/EXPORT.md":
        assert np.array_equal(Image.open("photo_mask.png"), names["mask"]) and "class 1 ä: " in capsys.readouterr().out


def test_metadata_are_complete_and_hold_no_path(small):
    proto = onnx.load(small / "best.onnx")
    onnx.checker.check_model(proto, full_check=True)
    metadata = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    expected = {"classes": ["class 0 ä", "class 1 ä", "class 2 ä"], "size": [36, 52], "background": None}
    assert metadata.items() >= (expected | {"dataset": "Some", "epoch": 3, "val_miou": 0.25}).items()
    assert metadata["palette"][1] == [128, 0, 0] and len(metadata["sha256"]) == 64
    assert [dim.dim_param or dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == ["H", "W", 3]
    assert str(ROOT).encode() not in (small / "best.onnx").read_bytes()


def test_probabilities_flag_gives_probabilities_at_the_size_of_the_network(small, capsys):
    assert run_export(small, "best.pt", "--probabilities", "--out", "p.onnx") == 0
    photo = make_photo(36, 52)
    (result,) = onnxruntime.InferenceSession(small / "p.onnx").run(["probabilities"], {"photo": np.asarray(photo)})
    assert result.shape == (3, 36, 52) and np.allclose(result.sum(0), 1, atol=1e-5)
    assert (result.argmax(0) == predict.segment(checkpoint.load(small / "best.pt"), photo)).mean() >= 0.995


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_file_is_reported_with_exit_code_1(small, monkeypatch, capsys):
    monkeypatch.setattr(onnx_graph, "MASK", onnx_graph.MASK.replace("Greater (upsampled", "Less (upsampled"))
    assert run_export(small, "best.pt", "--out", "wrong.onnx") == 1
    output = capsys.readouterr().out
    assert " 0.000% of a photo's pixels" in output and "less than 99.5%, and the exit code is 1" in output


@pytest.fixture
def converted(small, monkeypatch):
    """Exports without conversion: the file is that of ``small``."""
    monkeypatch.setattr(onnx_graph, "convert", lambda *arguments: onnx.load(small / "best.onnx"))


def test_page_says_what_comes_next_and_replaces_no_file(small, tmp_path, converted, capsys):
    assert run_export(tmp_path, small / "best.pt", "--page", "a/c") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("wrote ") and all(f"c/{name}" in lines[0] for name in export.PAGE_FILES)
    assert lines[-2] == "next: npm install --no-save --prefix a/c onnxruntime-web@1"
    assert lines[-1].startswith("then: python -m http.server --directory a/c")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "page.js").write_text("the user's")
    assert run_export(tmp_path, small / "best.pt", "--page", "b") == 2
    assert "page.js: exists already" in capsys.readouterr().err
    assert [file.read_text() for file in (tmp_path / "b").iterdir()] == ["the user's"]


def test_an_error_in_the_network_has_a_traceback_after_a_hint(small, tmp_path, capsys):
    save(tmp_path / "best.pt", DataDependent(3), 3, (36, 52))
    with pytest.raises(RuntimeError, match=r"(?s)test_export\.py.*if images.mean\(\) > 0"):
        run_export(tmp_path, "best.pt")
    assert "the network cannot be exported; an if that depends on its input's values" in capsys.readouterr().out
    assert not (tmp_path / "best.onnx").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "best.onnx: exists already: replace with --overwrite"),
        ("--out model.pt", "--out model.pt: choose a name that ends with .onnx"),
        ("--page x --out y.onnx", "leave out --out and --probabilities"),
        ("--out best.pt/x.onnx", "best.pt: cannot be written"),
    ],
)
def test_a_mistake_ends_with_one_line(flags, message, small, capsys):
    assert run_export(small, "best.pt", flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_missing_packages_are_named_with_the_command(small, tmp_path, converted, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert run_export(tmp_path, small / "best.pt", "--out", "x.onnx") == 2
    assert capsys.readouterr().err == "error: export.py needs more packages: pip install onnx onnxscript\n"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run_export(tmp_path, small / "best.pt", "--out", "new/folder/x.onnx") == 0
    assert (tmp_path / "new" / "folder" / "x.onnx").exists()
    assert "pip install onnxruntime" in capsys.readouterr().out


@pytest.fixture(scope="module")
def page_url(small):
    """The address of the exported page, on a local server."""
    if not RUNTIME.is_dir():
        pytest.skip("needs the npm package: npm install --no-save --prefix . onnxruntime-web@1")
    assert run_export(small, "best.pt", "--page", "page") == 0
    (small / "page" / "node_modules").mkdir()
    (small / "page" / "node_modules" / "onnxruntime-web").symlink_to(RUNTIME)

    class Handler(http.server.SimpleHTTPRequestHandler):
        log_message = mock.Mock()  # prints nothing

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=small / "page"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(browser, page_url):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(page_url)
    yield page
    page.close()


def choose(page, small, name, height, width):
    make_photo(height, width).save(small / name)
    page.set_input_files("#file", small / name)


def saved_mask(page, name):
    """Wait for a result and download it, as a PIL image."""
    page.wait_for_selector("#save:enabled")
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == name
    with Image.open(download.value.path()) as file:
        file.load()
    return file


def assert_empty(page):
    """Check that the page shows no photo, no shares and no camera, but its hint, and has nothing to save."""
    assert page.is_visible("#hint") and page.is_disabled("#save")
    assert not any(page.is_visible(f"#{name}") for name in ("view", "results", "live"))


def test_page_segments_a_photo_and_its_mask_is_that_of_predict(page, small):
    choose(page, small, "photo.png", 120, 161)
    image = saved_mask(page, "photo_mask.png")
    assert image.getpalette()[:768] == imaging.PALETTE.ravel().tolist()
    mask = np.array(image)
    assert (mask == predict.segment(checkpoint.load(small / "best.pt"), make_photo(120, 161))).mean() >= 0.995
    labels = np.argsort(-np.bincount(mask.ravel(), minlength=3))
    shares = [f"class {label} ä{(mask == label).mean():.1%}" for label in labels if (mask == label).any()]
    found = page.locator("#legend li").all_text_contents()
    assert [text.replace(" %", "%") for text in found] == shares
    page.fill("#opacity", "20")
    assert page.eval_on_selector("#overlay", "canvas => getComputedStyle(canvas).opacity") == "0.2"
    assert page.input_value("#file") == ""  # so that the same file can be chosen again


def test_page_refuses_what_is_no_photo_or_too_large_and_takes_the_next(page, small):
    page.set_input_files("#file", {"name": "notes.png", "mimeType": "image/png", "buffer": b"no photo"})
    page.wait_for_selector(".error")
    assert page.inner_text("#status").startswith("notes.png cannot be read as a photo: save it as JPEG or PNG (")
    assert_empty(page)
    Image.new("RGB", (70_000, 20), "white").save(small / "long.png")  # more than Chromium draws
    page.set_input_files("#file", small / "long.png")
    page.wait_for_function("document.querySelector('#status').innerText.includes('too large for this browser')")
    assert_empty(page)
    choose(page, small, "next.png", 90, 70)
    mask = np.array(saved_mask(page, "next_mask.png"))
    assert (mask == classes(small / "best.onnx", make_photo(90, 70))).mean() >= 0.995


def test_of_two_photos_that_are_chosen_while_the_model_is_loaded_the_later_one_is_shown(browser, page_url, small):
    page = browser.new_page()
    page.add_init_script("""const decode = createImageBitmap, later = () => new Promise((go) => setTimeout(go, 300));
        window.createImageBitmap = async (file) => (file.name === "older.png" && (await later()), decode(file));""")

    def load(route):
        choose(page, small, "older.png", 60, 50)
        choose(page, small, "newer.png", 40, 30)
        route.continue_()

    page.route("**/model.onnx", load)
    page.goto(page_url)
    saved_mask(page, "newer_mask.png")
    page.wait_for_timeout(500)
    assert page.inner_text("#status").startswith("30 × 40 pixels")
    page.close()


def test_camera_starts_stops_and_takes_a_photo(page, small):
    choose(page, small, "photo.png", 90, 70)
    page.wait_for_selector("#save:enabled")
    page.click("#camera")
    page.wait_for_selector("#live:visible")
    assert not page.is_visible("#results") and not page.is_visible("#view") and page.is_disabled("#save")
    page.click("#camera")
    page.wait_for_selector("#live", state="hidden")
    assert_empty(page)
    page.click("#camera")
    page.click("#shoot")
    saved_mask(page, "camera_mask.png")
    assert "pixels" in page.inner_text("#status") and not page.is_visible("#live")


@pytest.mark.parametrize(
    ("missing", "message"),
    [("onnxruntime-web", "onnxruntime-web cannot be loaded; run: npm"), ("model.onnx", "model.onnx is missing")],
)
def test_page_names_a_missing_file(browser, page_url, missing, message):
    page = browser.new_page()
    page.route(lambda url: missing in url, lambda route: route.fulfill(status=404))
    page.goto(page_url)
    page.wait_for_selector(".error")
    assert page.inner_text("#status").startswith(message)
    page.close()
