"""Bad input of every kind: exit code 2 within 10 seconds, and one line that names the culprit."""

import os
import shutil
import struct
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import Evil, call, make_tiny, write_pair
from PIL import Image

import compare
import download
import engine
import predict
import train
import train_5_a
import voc

LISTS, PHOTOS, MASKS = "ImageSets/Segmentation", "JPEGImages", "SegmentationClass"
FIRST = "000000"  # of train
SECONDS = 10


def header_of_png(width, height):
    """A PNG that tells its size, and breaks off where its pixels begin."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    lengths = (struct.pack(">I", len(chunk) - 4) for chunk in chunks)
    checks = (struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(b"".join(parts) for parts in zip(lengths, chunks, checks))


def write(path, content):
    """A fault: a file of a data set, or what it says of itself, is replaced."""

    def spoil(root):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content(target.read_bytes()) if callable(content) else content)

    return spoil


def remove(path):
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def folder_at(path):
    def spoil(root):
        (root / path).unlink(missing_ok=True)
        (root / path).mkdir()

    return spoil


def mask(array):
    return lambda root: Image.fromarray(array).save(root / MASKS / f"{FIRST}.png")


def void(split):
    def spoil(root):
        for name in (root / LISTS / f"{split}.txt").read_text().split():
            with Image.open(root / PHOTOS / f"{name}.jpg") as photo:
                write_pair(root, name, np.asarray(photo), np.full((photo.height, photo.width), voc.VOID, np.uint8))

    return spoil


def half(content):
    return content[: len(content) // 2]


def change(**values):
    """A fault: a checkpoint's entries are replaced, or with None taken out."""

    def spoil(path):
        state = torch.load(path, weights_only=True) | values
        torch.save({name: value for name, value in state.items() if value is not None}, path)

    return spoil


def as_if_of_5_a(path):
    for kind in ("best", "last"):
        path.with_name(f"{kind}_train.pt").rename(path.with_name(f"{kind}_train_5_a.pt"))


# What is wrong, the program that meets it, and what its line has to say.
FLAGS = [
    (train, "--epochs 0", "--epochs"),
    (train, "--epochs two", "--epochs"),
    (train, "--epochs -1", "--epochs"),
    (train, "--epochs 1e3", "--epochs"),
    (train, "--epochs", "--epochs"),
    (train, "--batch-size 0", "--batch-size"),
    (train, "--batch-size -4", "--batch-size"),
    (train, "--batch-size all", "--batch-size"),
    (train, "--seed -1", "--seed"),
    (train, "--seed 4294967296", "--seed"),
    (train, "--seed 0x10", "--seed"),
    (train, "--limit 0", "--limit"),
    (train, "--limit 1.5", "--limit"),
    (train, "--device gpu", "--device"),
    (train, "--device cuda:99", "--device"),
    (train, "--device cpu:1", "--device"),
    (train, "--device cuda:x", "--device"),
    (train, "--unknown", "--unknown"),
    (train, "stray", "stray"),
    (train, "--no-pretrained", "--no-pretrained"),  # has no pretrained weights to do without
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
    (predict, "none.pt Tiny/JPEGImages", "none.pt"),
    (predict, "Tiny Tiny/JPEGImages", "Tiny"),
    (predict, "afile Tiny/JPEGImages", "afile"),
    (predict, "best_train.pt none.jpg", "none.jpg"),
    (predict, "best_train.pt Tiny", "Tiny: holds no photo"),
    (predict, "best_train.pt afile", "afile"),
    (predict, "best_train.pt Tiny/JPEGImages --out afile", "afile"),
    (predict, "best_train.pt Tiny/JPEGImages --device gpu", "--device"),
]
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
    (write(f"{LISTS}/train.txt", b"../../secret\n"), "../../secret', which names"),
    (write(f"{LISTS}/train.txt", b"/etc/passwd\n"), "/etc/passwd', which names"),
    (write(f"{LISTS}/train.txt", b"a\x00b\n"), r"a\x00b"),
    (write(f"{LISTS}/train.txt", b"a\x1bb\n"), r"a\x1bb"),
    (write(f"{LISTS}/train.txt", b"a" * 400), "aaaa.jpg"),
    (write(f"{LISTS}/train.txt", "füchse und 'hunde'\n".encode()), "füchse und 'hunde'.jpg"),
    (write(f"{LISTS}/train.txt", b"000000  1\n"), "000000  1.jpg"),
    (remove(PHOTOS), f"{FIRST}.jpg"),
    (remove(MASKS), f"{FIRST}.png"),
    (remove(f"{PHOTOS}/{FIRST}.jpg"), f"{FIRST}.jpg: no such file"),
    (write(f"{PHOTOS}/{FIRST}.jpg", half), f"{FIRST}.jpg: cannot be read as a picture"),
    (write(f"{PHOTOS}/{FIRST}.jpg", b""), f"{FIRST}.jpg"),
    (write(f"{PHOTOS}/{FIRST}.jpg", b"<html>404</html>"), f"{FIRST}.jpg"),
    (
        write(f"{PHOTOS}/{FIRST}.jpg", header_of_png(60000, 60000)),
        f"{FIRST}.jpg: cannot be read as a picture (Image size",
    ),
    (
        write(f"{PHOTOS}/{FIRST}.jpg", header_of_png(12000, 9000)),
        f"{FIRST}.jpg: its 12000x9000 pixels are too many",
    ),
    (write(f"{PHOTOS}/{FIRST}.jpg", header_of_png(0, 5)), f"{FIRST}.jpg"),
    (folder_at(f"{PHOTOS}/{FIRST}.jpg"), f"{FIRST}.jpg"),
    (remove(f"{MASKS}/{FIRST}.png"), f"{FIRST}.png: no such file"),
    (write(f"{MASKS}/{FIRST}.png", half), f"{FIRST}.png"),
    (write(f"{MASKS}/{FIRST}.png", b""), f"{FIRST}.png"),
    (
        write(f"{MASKS}/{FIRST}.png", header_of_png(60000, 60000)),
        f"{FIRST}.png: cannot be read as a picture (Image size",
    ),
    (mask(np.zeros((40, 40, 3), np.uint8)), f"{FIRST}.png: is a picture in mode RGB,"),
    (mask(np.zeros((40, 40, 4), np.uint8)), f"{FIRST}.png"),
    (mask(np.zeros((40, 40), np.uint16)), f"{FIRST}.png"),
    (mask(np.full((40, 40), len(voc.CLASSES), np.uint8)), f"{FIRST}.png: holds the value 21,"),
    (mask(np.zeros((7, 9), np.uint8)), f"{FIRST}.png: is 9x7, but its photo is"),
    (void("train"), "no mask of the split train labels any pixel"),
    (void("val"), "no mask of the split val labels any pixel"),
    (write("classes.txt", b"one\n"), "classes.txt: needs 2 to 255 different class names, one a line; it has 1"),
    (write("classes.txt", b"same\nsame\n"), "classes.txt"),
    (write("classes.txt", b"\n".join(b"%d" % number for number in range(256))), "classes.txt"),
    (write("classes.txt", b"\xff\xfe\x00\x01"), "classes.txt"),
    (write("classes.txt", b"a\nb\n"), "classes.txt"),
    (folder_at("classes.txt"), "classes.txt"),
]
LEVELS = [
    ("none", "no data in none"),
    ("", "use --data Tiny"),
    (".", "use --data Tiny"),
    (f"Tiny/{PHOTOS}", "use --data Tiny"),
    (f"Tiny/{LISTS}", "use --data Tiny"),
    (f"Tiny/{PHOTOS}/{FIRST}.jpg", "use --data Tiny"),
]
RUNS = [
    (lambda path: path.write_bytes(half(path.read_bytes())), "", "no readable checkpoint"),
    (lambda path: path.write_bytes(b""), "", "no readable checkpoint"),
    (lambda path: path.write_text("text"), "", "no readable checkpoint"),
    (lambda path: torch.save(Evil(), path), "", "no readable checkpoint"),
    (lambda path: torch.save([1], path), "", "not written by this project"),
    (change(history=None), "", "not written by this project"),
    (change(random=None), "", "'random'"),
    (change(random={"python": 3}), "", "another model"),
    (change(optimizer={}), "", "another model"),
    (change(optimizer=None), "", "'optimizer'"),
    (change(model={}), "", "another model"),
    (change(flags=5), "", "another model"),
    (change(seconds="long"), "", "another model"),
    (change(script="print()"), "", "its script had 'print()'"),
    (change(dataset="Other"), "", "dataset Other"),
    (change(classes=["a", "b"]), "", "classes"),
    (lambda path: None, "--seed 1", "seed 0, not 1"),
    (lambda path: None, "--limit 1", "limit 2, not 1"),
    (lambda path: None, "--batch-size 1", "batch_size 2, not 1"),
    (lambda path: None, "--epochs 1", "2 epochs, more than 1"),
    (lambda path: path.with_name("best_train.pt").unlink(), "", "best_train.pt: is gone"),
]


def of_data(spoil):
    return lambda place: spoil(place / "Tiny")


def of_run(spoil):
    """Let a fault hit copies of the checkpoints, which lie there as links."""

    def on_copies(place):
        for path in place.glob("*.pt"):
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        spoil(place / "last_train.pt")

    return on_copies


def nothing(place):
    pass


KINDS = [(nothing, program, line, word) for program, line, word in FLAGS]
KINDS += [(of_data(spoil), train, "--data Tiny --epochs 1 --device cpu", word) for spoil, word in DATA]
KINDS += [(nothing, train, f"--data={given} --device cpu", word) for given, word in LEVELS]
RESUMED = "--data Tiny --epochs 3 --limit 2 --batch-size 2 --device cpu --resume"
KINDS += [(of_run(spoil), train, f"{RESUMED} {flags}", word) for spoil, flags, word in RUNS]
KINDS += [(of_run(as_if_of_5_a), train_5_a, RESUMED, "last_train_5_a.pt")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a data set and a run of train.py on it."""
    folder = tmp_path_factory.mktemp("finished")
    make_tiny(folder / "Tiny")
    call(folder, train, "--data Tiny --epochs 2 --limit 2 --batch-size 2 --device cpu")
    return folder


@pytest.mark.filterwarnings("ignore:Image size")  # as voc.py has it, which pytest undoes
@pytest.mark.parametrize(("spoil", "program", "line", "word"), KINDS)
def test_bad_input_is_named_in_one_line(finished, tiny, capsys, spoil, program, line, word):
    place = tiny.parent
    (place / "afile").write_text("neither a picture nor a checkpoint")
    for name in ("best_train.pt", "last_train.pt"):
        (place / name).symlink_to(finished / name)
    spoil(place)
    before = {path: path.read_bytes() for path in place.glob("*.pt")}
    capsys.readouterr()
    began = time.monotonic()
    code = call(place, program, line)
    took = time.monotonic() - began
    said = capsys.readouterr().err.splitlines()
    assert (code, len(said)) == (2, 1), said
    assert "error: " in said[0] and word in said[0]
    assert took < SECONDS
    assert {path: path.read_bytes() for path in place.glob("*.pt")} == before
    assert not hasattr(checkpoint, "ran")


def test_what_is_unusual_but_right_is_taken(tmp_path, capsys):
    """A single image of one pixel, a large one, names with spaces, quotes and other letters."""
    root = make_tiny(tmp_path / "with space", splits=(("train", 1), ("val", 1)))
    sizes = {"it's 1x1": (1, 1), 'ein "großes"': (3000, 5000)}
    for name, (height, width) in sizes.items():
        write_pair(root, name, np.zeros((height, width, 3), np.uint8), np.ones((height, width), np.uint8))
    for split, name in zip(("train", "val"), sizes):
        (root / LISTS / f"{split}.txt").write_text(name, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        flags = ["--data", str(root), "--epochs", "1", "--batch-size", "1", "--device", "cpu"]
        patch.setattr(sys, "argv", ["train.py", *flags])
        train.main()
    assert "train seed 0: val mean IoU" in capsys.readouterr().out
    assert os.path.exists(tmp_path / "plots" / "train_predictions.png")
