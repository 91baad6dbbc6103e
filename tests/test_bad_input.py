"""Bad input of every kind: exit code 2 within 10 seconds, and one line that names what is wrong."""

import io
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import Malicious, make_tiny, run_main, write_pair, write_split
from PIL import Image

import checkpoint
import compare
import download
import predict
import train
import util
import voc

pytestmark = pytest.mark.usefixtures("tiny_net")

LISTS, PHOTOS, MASKS = "Tiny/ImageSets/Segmentation", "Tiny/JPEGImages", "Tiny/SegmentationClass"
FIRST = "000000"  # of train
PHOTO, MASK = f"{PHOTOS}/{FIRST}.jpg", f"{MASKS}/{FIRST}.png"


def png_header(width, height):
    """A PNG that states its size and is truncated where its pixels begin."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    lengths = (struct.pack(">I", len(chunk) - 4) for chunk in chunks)
    checksums = (struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(b"".join(parts) for parts in zip(lengths, chunks, checksums))


def write(path, content):
    """A fault: the content of a file, or what a function makes of it."""

    def spoil(folder):
        target = folder / path
        target.write_bytes(content(target.read_bytes()) if callable(content) else content)

    return spoil


def truncate(content):
    return content[: len(content) // 2]


def remove(path):
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def folder_at(path):
    """A fault: a folder in the place of a file."""

    def spoil(folder):
        (folder / path).unlink(missing_ok=True)
        (folder / path).mkdir()

    return spoil


def mask(array):
    return lambda folder: Image.fromarray(array).save(folder / MASK)


def all_void(split):
    def spoil(folder):
        for name in (folder / LISTS / f"{split}.txt").read_text().split():
            path = folder / MASKS / f"{name}.png"
            with Image.open(path) as image:
                void = Image.new("L", image.size, util.VOID)
            void.save(path)

    return spoil


def saved(value):
    """The content of a file written by torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def changed(**values):
    """A function that changes some entries of a checkpoint's content, or removes those whose value is None."""

    def change(content):
        state = torch.load(io.BytesIO(content), weights_only=True) | values
        return saved({name: value for name, value in state.items() if value is not None})

    return change


VALUES = {
    "--epochs": ("0", "two", "-1", "1e3", ""),
    "--batch-size": ("0", "-4", "all"),
    "--seed": ("-1", "4294967296", "0x10"),
    "--limit": ("0", "1.5"),
    "--device": ("gpu", "cuda:99", "cpu:1", "cuda:x"),
}
# the script, its flags, and a part of its message
FLAGS = [(train, f"{flag} {value}", flag) for flag, values in VALUES.items() for value in values]
FLAGS += [
    (train, "--unknown", "--unknown"),
    (train, "stray", "stray"),
    (train, "--no-pretrained", "--no-pretrained"),  # has no pretrained weights
    (train, "--out afile --data Tiny", "afile/plots"),
    (train, "--out afile/below --data Tiny", "afile/below/plots"),
    (compare, "--seeds", "--seeds"),
    (compare, "--seeds x", "--seeds"),
    (download, "--year 1999", "--year"),
    (download, "--tar none.tar", "none.tar"),
    (download, "--tar afile", "afile"),
    (download, "--mirror ftp", "--mirror"),
    (voc, "--data Tiny --split none", "none.txt"),
    (predict, "", "checkpoint"),
    (predict, "none.pt Tiny/JPEGImages", "none.pt: no such file"),
    (predict, "Tiny Tiny/JPEGImages", "Tiny"),
    (predict, "best_train.pt none.jpg", "none.jpg"),
    (predict, "best_train.pt Tiny", "Tiny: holds no photo"),
    (predict, "best_train.pt afile", "afile"),
    (predict, "best_train.pt Tiny/JPEGImages --out afile", "afile"),
    (predict, "best_train.pt Tiny/JPEGImages --device gpu", "--device"),
    (train, "--data none", "none: no data in VOC layout"),
    (train, "--data=", "use --data Tiny"),
    (train, "--data .", "use --data Tiny"),
    (train, f"--data {PHOTOS}", "use --data Tiny"),
    (train, f"--data {LISTS}", "use --data Tiny"),
    (train, f"--data {PHOTO}", "use --data Tiny"),
]
# faults of the data set, with which train.py then starts
DATA = [
    (remove(LISTS), "Tiny"),
    (remove(f"{LISTS}/train.txt"), "train.txt"),
    (remove(f"{LISTS}/val.txt"), "val.txt: no such split"),
    (write(f"{LISTS}/train.txt", b""), "train.txt"),
    (write(f"{LISTS}/train.txt", b" \n\n"), "train.txt"),
    (write(f"{LISTS}/val.txt", b""), "val.txt: the split is empty"),
    (write(f"{LISTS}/test.txt", b""), "test.txt"),
    (write(f"{LISTS}/train.txt", b"\xff\xfe\x00\x01"), "train.txt"),
    (folder_at(f"{LISTS}/train.txt"), "train.txt"),
    (write(f"{LISTS}/train.txt", b"000000\n000001\n000000\n"), "000000 2 times"),
    (write(f"{LISTS}/train.txt", b"../../secret\n"), "'../../secret' is not the name of a file in this folder"),
    (write(f"{LISTS}/train.txt", b"/etc/passwd\n"), "'/etc/passwd' is not the name of a file in this folder"),
    (write(f"{LISTS}/train.txt", b"a\x00b\n"), r"a\x00b"),
    (write(f"{LISTS}/train.txt", b"a\x1bb\n"), r"a\x1bb"),
    (write(f"{LISTS}/train.txt", b"a" * 400), "aaaa.jpg"),
    (write(f"{LISTS}/train.txt", "füchse und 'hunde'\n".encode()), "füchse und 'hunde'.jpg"),
    (write(f"{LISTS}/train.txt", b"000000  1\n"), "000000  1.jpg"),
    (remove(PHOTOS), f"{FIRST}.jpg"),
    (remove(MASKS), f"{FIRST}.png"),
    (remove(PHOTO), f"{FIRST}.jpg: no such file"),
    (write(PHOTO, truncate), f"{FIRST}.jpg: cannot be read as an image"),
    (write(PHOTO, b""), f"{FIRST}.jpg"),
    (write(PHOTO, b"<html>404</html>"), f"{FIRST}.jpg"),
    (write(PHOTO, png_header(60000, 60000)), f"{FIRST}.jpg: cannot be read as an image (Image size"),
    (write(PHOTO, png_header(12000, 9000)), f"{FIRST}.jpg: 12000x9000 pixels are too many"),
    (write(PHOTO, png_header(0, 5)), f"{FIRST}.jpg"),
    (folder_at(PHOTO), f"{FIRST}.jpg"),
    (remove(MASK), f"{FIRST}.png: no such file"),
    (write(MASK, truncate), f"{FIRST}.png"),
    (write(MASK, b""), f"{FIRST}.png"),
    (write(MASK, png_header(60000, 60000)), f"{FIRST}.png: cannot be read as an image (Image size"),
    (mask(np.zeros((40, 40, 3), np.uint8)), f"{FIRST}.png: is an image in mode RGB,"),
    (mask(np.zeros((40, 40, 4), np.uint8)), f"{FIRST}.png"),
    (mask(np.zeros((40, 40), np.uint16)), f"{FIRST}.png"),
    (mask(np.full((40, 40), len(voc.CLASSES), np.uint8)), f"{FIRST}.png: holds the value 21,"),
    (mask(np.zeros((7, 9), np.uint8)), f"{FIRST}.png: is 9x7, but its photo is"),
    (all_void("train"), "no mask of the split train has a labelled pixel"),
    (all_void("val"), "no mask of the split val has a labelled pixel"),
    (write("Tiny/classes.txt", b"one\n"), "classes.txt: needs 2 to 255 different class names, one per line; it has 1"),
    (write("Tiny/classes.txt", b"same\nsame\n"), "classes.txt"),
    (write("Tiny/classes.txt", b"\n".join(b"%d" % label for label in range(256))), "classes.txt"),
    (write("Tiny/classes.txt", b"\xff\xfe\x00\x01"), "classes.txt"),
    (write("Tiny/classes.txt", b"a\nb\n"), "classes.txt"),
    (folder_at("Tiny/classes.txt"), "classes.txt"),
]
# contents of a checkpoint, with which predict.py or train.py --resume then starts
CHECKPOINT = [
    (truncate, "not a readable checkpoint"),
    (b"", "not a readable checkpoint"),
    (b"text", "not a readable checkpoint"),
    (saved(Malicious()), "not a readable checkpoint"),
    (saved([1, 2]), "not written by this project"),
]
LOADED = [
    (changed(size=None), "not written by this project"),
    (changed(size=10**9), "does not fit"),
    (changed(module="os"), "is not in"),
    (changed(module="../util"), "is not in"),
    (changed(module="conftest", **{"class": "make_tiny"}), "is not in"),
    (changed(arguments={"num_classes": 5}), "does not fit"),
    (changed(arguments={"other": 5}), "does not fit"),
]
RESUMED = [
    (changed(history=None), "not written by this project"),
    (changed(optimizer={}), "another model"),
    (changed(optimizer=None), "'optimizer'"),
    (changed(model={}), "another model"),
    (changed(flags=5), "another model"),
    (changed(seconds="long"), "another model"),
    (changed(script="print()"), "print()"),
    (changed(network_script="print()"), "the file of the network (tiny_net.py) has changed"),
    (changed(images="others"), "images others"),
    (changed(dataset="Other"), "dataset Other"),
    (changed(classes=["a", "b"]), "classes"),
]
OTHER_FLAGS = [
    ("--seed 1", "seed 0, not 1"),
    ("--limit 1", "limit 2, not 1"),
    ("--batch-size 1", "batch_size 2, not 1"),
    ("--epochs 1", "2 epochs, more than 1"),
]

RESUME = "--data Tiny --epochs 3 --limit 2 --batch-size 2 --device cpu --resume"
PREDICT = f"best_train.pt {PHOTO} --device cpu"
CASES = [(None, script, flags, message) for script, flags, message in FLAGS]
CASES += [(spoil, train, "--data Tiny --epochs 1 --device cpu", message) for spoil, message in DATA]
CASES += [(write("best_train.pt", content), predict, PREDICT, message) for content, message in CHECKPOINT + LOADED]
CASES += [(write("last_train.pt", content), train, RESUME, message) for content, message in CHECKPOINT + RESUMED]
CASES += [(None, train, f"{RESUME} {flags}", message) for flags, message in OTHER_FLAGS]
CASES += [(remove("best_train.pt"), train, RESUME, "best_train.pt: is missing")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_net):
    """A folder with the checkpoints of train.py."""
    folder = tmp_path_factory.mktemp("run")
    make_tiny(folder / "Tiny")
    assert run_main(folder, train, "--data Tiny --epochs 2 --limit 2 --batch-size 2 --device cpu") == 0
    return folder


@pytest.mark.filterwarnings("ignore:Image size")  # as in voc.py; pytest resets the filters
@pytest.mark.parametrize(("spoil", "script", "flags", "message"), CASES)
def test_bad_input_ends_with_one_line_that_names_it(finished, tiny, capsys, spoil, script, flags, message):
    folder = tiny.parent
    (folder / "afile").write_text("neither an image nor a checkpoint")
    for name in ("best_train.pt", "last_train.pt"):
        shutil.copy(finished / name, folder)
    if spoil:
        spoil(folder)
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}
    start = time.monotonic()
    code = run_main(folder, script, flags)
    assert time.monotonic() - start < 10
    errors = capsys.readouterr().err.splitlines()
    assert (code, len(errors)) == (2, 1), errors
    assert errors[0].startswith("error: ") and message in errors[0]
    assert {path: path.read_bytes() for path in folder.glob("*.pt")} == before
    assert not hasattr(checkpoint, "ran")


def test_unusual_but_valid_input_is_accepted(tmp_path, capsys):
    """An image of one pixel, a large one, names with spaces, quotes and umlauts."""
    root = tmp_path / "with spaces"
    sizes = {"it's 1x1": (1, 1), 'ein "großes"': (1500, 2000)}
    for split, (name, (height, width)) in zip(("train", "val"), sizes.items()):
        write_pair(root, name, np.zeros((height, width, 3), np.uint8), np.ones((height, width), np.uint8))
        write_split(root, split, [name])
    assert run_main(tmp_path, train, "--data 'with spaces' --epochs 1 --batch-size 1 --device cpu") == 0
    assert "train seed 0: val mean IoU" in capsys.readouterr().out
    assert (tmp_path / "plots" / "train_predictions.png").exists()
