"""Time and memory of a photo with predict.py, with ONNX Runtime and in the page, and the steps of predict.py in ms.

    npm install --no-save --prefix . onnxruntime-web@1
    python benchmarks/inference.py best_train.pt best_train_5_a.pt

Times are medians of PHOTOS photos after a first one, from the JPEG to the mask; predict.py also writes mask and
overlay, and the page shows them. Memory is the most that a process, in the page that of its tab, held beyond what it
held before the first photo; each value has a process of its own. Needs Linux, Playwright and Chromium.
"""

import functools
import http.server
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import onnxruntime
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compare
import export
import predict
from seg import cli, files, imaging, inference, report, toy

PHOTOS = 7
STEPS = {"decode": (imaging, "open_photo"), "resize": (imaging, "resize"), "network": (inference, "forward")}
STEPS |= {"network to mask": (inference, "predict_image"), "draw overlay": (predict, "overlay")}
STEPS |= {"encode {0.mode}": (predict, "encode"), "write": (files, "write")}  # mode P is the mask's, RGB the overlay's


def timed(step, function, times, *args, **options):
    """Call a function and append its milliseconds to an entry of ``times``."""
    start = time.perf_counter()
    result = function(*args, **options)
    times.setdefault(step.format(*args), []).append(1000 * (time.perf_counter() - start))
    return result


def watch(photos, *_, times, process="self"):
    """Yield photos; add to ``times`` the milliseconds that each took, and at the end the process's memory in MB."""
    status, times["photo"] = Path(f"/proc/{process}/status"), []
    Path(f"/proc/{process}/clear_refs").write_text("5")  # forgets the peak
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    for photo in photos:
        start = time.perf_counter()
        yield photo
        times["photo"].append(1000 * (time.perf_counter() - start))
    times["memory"] = (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 1000


def with_predict(checkpoint, folder, photos, times):
    for step, (module, name) in STEPS.items():
        setattr(module, name, functools.partial(timed, step, getattr(module, name), times))
    report.progress, report.log = functools.partial(watch, times=times), mock.Mock()
    sys.argv = ["predict.py", str(checkpoint), *photos, "--out", f"{photos[0]}_{folder.name}"]
    predict.main()
    return times


def with_onnxruntime(checkpoint, folder, photos, times):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    for photo in watch(photos, times=times):
        session.run(["mask"], {"photo": np.asarray(imaging.open_photo(photo))})
    return times


def in_page(checkpoint, folder, photos, times):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.func.log_message = mock.Mock()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}")
        page.wait_for_function("document.querySelector('#status').innerText === 'Ready.'")
        processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        tab = max((process["type"] == "renderer", process["cpuTime"], process["id"]) for process in processes)[-1]
        for photo in watch(photos, times=times, process=tab):
            page.set_input_files("#file", photo)
            page.wait_for_selector("#save:enabled")
    return times


def make_photos(folder, size):
    """Write an image of the toy set, enlarged and with a camera's noise, as JPEG, several times; return the paths."""
    scene = np.asarray(Image.fromarray(toy.render_image(2007, "000001")[0]).resize(size))
    pixels = scene + np.random.default_rng(0).normal(0, 4, scene.shape)
    paths = [f"{folder}/{size[0]}_{index}.jpg" for index in range(PHOTOS + 1)]
    for path in paths:
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    checkpoints, rows, steps = parser.parse_args().checkpoints, [], []
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "onnxruntime", "pillow")]
    print(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {', '.join(versions)}, n = {PHOTOS}\n")
    with tempfile.TemporaryDirectory() as folder:
        photos = {size: make_photos(folder, size) for size in ((480, 360), (4000, 3000))}
        for number, checkpoint in enumerate(checkpoints):
            page = Path(folder, f"page{number}")
            command = [sys.executable, export.__file__, checkpoint, "--page", page]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (page / "node_modules").symlink_to(files.ROOT / "node_modules")
            for function in (with_predict, with_onnxruntime, in_page):
                rows.append({"checkpoint": checkpoint.name, "with": function.__name__.split("_")[1]})
                for (width, height), paths in photos.items():
                    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                        times = pool.submit(function, checkpoint, page, paths, {}).result()
                    memory, medians = times.pop("memory"), {name: median(ms[-PHOTOS:]) for name, ms in times.items()}
                    cells = f"{medians.pop('photo'):.0f} ms", f"{memory:.0f} MB"
                    rows[-1] |= dict(zip((f"{width}x{height}", f"memory, {width}x{height}"), cells))
                    if medians:
                        row = {"checkpoint": checkpoint.name, "photo": f"{width}x{height}"}
                        steps.append(row | {name: f"{ms:.1f}" for name, ms in medians.items()})
    print(compare.markdown_table(rows), compare.markdown_table(steps), sep="\n\n")


if __name__ == "__main__":
    cli.run(main)
