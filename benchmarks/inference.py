"""Time and memory of a photo with predict.py, with ONNX Runtime and in the page.

    npm install --no-save --prefix . onnxruntime-web@1
    python benchmarks/inference.py best_train.pt best_train_5_a.pt

Milliseconds from the JPEG to the mask: a command's time for several photos less that for one, divided by their number.
predict.py also writes mask and overlay, and the page shows them. Memory is the most that the process held, with PyTorch
or ONNX Runtime; of the page, that of its tab. Needs Linux, Playwright and /usr/bin/chromium.
"""

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compare
from seg import cli, toy

COUNTS = {(480, 360): 40, (4000, 3000): 8}  # photos by their size
ONNX = """import numpy as np, onnxruntime, sys
from PIL import Image, ImageOps
session = onnxruntime.InferenceSession(sys.argv[1])
for path in sys.argv[2:]:
    session.run(["mask"], {"photo": np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))})"""


def make_photos(folder, size):
    """Write an image of the toy set, enlarged and with a camera's noise, as JPEG, several times; return the paths."""
    scene = np.asarray(Image.fromarray(toy.render_image(2007, "000001")[0]).resize(size))
    pixels = (scene + np.random.default_rng(0).normal(0, 4, scene.shape)).clip(0, 255).astype(np.uint8)
    paths = [f"{folder}/{size[0]}_{index}.jpg" for index in range(COUNTS[size] + 1)]
    for path in paths:
        Image.fromarray(pixels).save(path, quality=90)
    return paths


def run(command):
    """The seconds of a command, and the most memory that it held, in MB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(IndexError, OSError):  # it has just ended
            memory = peak_memory(process.pid)
        time.sleep(0.002)
    if process.returncode:
        sys.exit(f"failed: {command[0]}")
    return time.perf_counter() - start, memory


def peak_memory(pid):
    """The most memory that a process has held so far, in MB."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1000


def in_page(folder, photos):
    """The seconds of the photos after the first, and the memory of the tab, in MB."""
    command, quiet = [sys.executable, "-m", "http.server", "8765", "--directory", folder], subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        page.goto("http://localhost:8765")
        page.wait_for_function("document.querySelector('#status').innerText === 'Ready.'")
        ends = []
        for photo in photos:
            page.set_input_files("#file", photo)
            page.wait_for_selector("#save:enabled")
            ends.append(time.perf_counter())
        processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        tab = max((process["type"] == "renderer", process["cpuTime"], process["id"]) for process in processes)[-1]
        memory = peak_memory(tab)
    server.terminate()
    return ends[-1] - ends[0], memory


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "onnxruntime", "pillow")]
    print(f"{os.cpu_count()} CPU cores, {', '.join(versions)}\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photos = {size: make_photos(folder, size) for size in COUNTS}
        for number, checkpoint in enumerate(parser.parse_args().checkpoints):
            page = Path(folder, f"page{number}")
            run([ROOT / "export.py", checkpoint, "--page", page])
            (page / "node_modules").symlink_to(ROOT / "node_modules")
            predict = [ROOT / "predict.py", checkpoint, "--out", f"{folder}/out", "--overwrite"]
            commands = {"`predict.py`": predict, "ONNX Runtime": ["-c", ONNX, page / "model.onnx"], "the page": None}
            for name, command in commands.items():
                rows.append({"network": checkpoint.stem.removeprefix("best_"), "with": name})
                for size, paths in photos.items():
                    seconds, memory = run([*command, *paths]) if command else in_page(page, paths)
                    seconds -= run([*command, paths[0]])[0] if command else 0
                    cells = f"{1000 * seconds / COUNTS[size]:.0f} ms", f"{memory:.0f} MB"
                    rows[-1] |= zip(("{}x{}".format(*size), "memory, {}x{}".format(*size)), cells)
    print(compare.markdown_table(rows))


if __name__ == "__main__":
    cli.run(main)
