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
from PIL import ExifTags, Image

import compare
import download
import predict
import train
import util
import voc
from seg import checkpoint

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


def photo(array):
    """A fault: the photo becomes a TIFF of the array."""
    return both(lambda folder: Image.fromarray(array).save(folder / PHOTOS / f"{FIRST}.tif"), remove(PHOTO))


def jpeg_mask(folder):
    """A fault: a JPEG with the name of a PNG."""
    with Image.open(folder / MASK) as image:
        Image.fromarray(np.array(image) % 5).save(folder / MASK, "jpeg")


def all_masks(split, change):
    """A fault: the masks of a split become what ``change`` makes of their arrays, as greyscale images."""

    def spoil(folder):
        for name in (folder / LISTS / f"{split}.txt").read_text().split():
            path = folder / MASKS / f"{name}.png"
            with Image.open(path) as image:
                array = np.array(image)
            Image.fromarray(change(array)).save(path)

    return spoil


def all_void(array):
    return np.full_like(array, util.VOID)


def binary(array):
    """Objects saved as 255, as many tools do."""
    return np.where(array, 255, 0).astype(np.uint8)


def rotated_photo(folder):
    """A fault: the photo gets an EXIF orientation after the mask was drawn."""
    with Image.open(folder / PHOTO) as image:
        exif = image.getexif()
        exif[ExifTags.Base.Orientation] = 6
        image.resize((30, 20)).save(folder / PHOTO, exif=exif)
    Image.new("L", (30, 20)).save(folder / MASK)


def copied(source, target):
    return lambda folder: shutil.copy(folder / source, folder / target)


def both(*faults):
    return lambda folder: [fault(folder) for fault in faults]


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


def not_finite(content):
    state = torch.load(io.BytesIO(content), weights_only=True)
    next(tensor for tensor in state["model"].values() if tensor.is_floating_point()).fill_(float("nan"))
    return saved(state)


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
    (voc, "--data Tiny --from-colours none.txt", "none.txt: cannot be read"),
    (voc, "--data Tiny --from-colours afile", "afile: holds the line"),
    (voc, "--data none --check", "none: no data in VOC layout"),
    (predict, "", "checkpoint"),
    (predict, "none.pt Tiny/JPEGImages", "none.pt: no such file"),
    (predict, "Tiny Tiny/JPEGImages", "Tiny"),
    (predict, "best_train.pt none.jpg", "none.jpg"),
    (predict, "best_train.pt Tiny", "Tiny: holds no photo"),
    (predict, "best_train.pt afile", "afile"),
    (predict, "best_train.pt Tiny/JPEGImages --out afile", "afile"),
    (predict, "best_train.pt Tiny/JPEGImages --device gpu", "--device"),
    (predict, "best_train.pt Tiny/JPEGImages --size 225", "--size: '225' is neither N nor WIDTHxHEIGHT in mult"),
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
    (remove(f"{LISTS}/val.txt"), "val.txt: no such split (there are: test, train)"),
    (write(f"{LISTS}/train.txt", b""), "train.txt"),
    (write(f"{LISTS}/train.txt", b" \n\n"), "train.txt"),
    (write(f"{LISTS}/val.txt", b""), "val.txt: the split is empty"),
    (write(f"{LISTS}/test.txt", b""), "test.txt"),
    (write(f"{LISTS}/train.txt", b"\xff\xfe\x00\x01"), "train.txt"),
    (folder_at(f"{LISTS}/train.txt"), "train.txt: cannot be read as UTF-8 text ([Errno 21] Is"),
    (write(f"{LISTS}/train.txt", b"000000\n000001\n000000\n"), "lists an id more than once (000000)"),
    (write(f"{LISTS}/train.txt", b"../../secret\n"), "lists an invalid id ('../../secret')"),
    (write(f"{LISTS}/train.txt", b"/etc/passwd\n"), "lists an invalid id ('/etc/passwd')"),
    (write(f"{LISTS}/train.txt", b"a\x00b\n"), r"lists an invalid id ('a\x00b')"),
    (write(f"{LISTS}/train.txt", b"a\x1bb\n"), r"a\x1bb"),
    (write(f"{LISTS}/train.txt", b"a" * 400), "aaaa.jpg"),
    (write(f"{LISTS}/train.txt", "füchse und 'hunde'\n".encode()), "füchse und 'hunde'.jpg"),
    (write(f"{LISTS}/train.txt", b"none.jpg\n"), "none.jpg: no such file"),
    (write(f"{LISTS}/train.txt", "größe\n".encode("latin-1")), "train.txt: cannot be read as UTF-8 text"),
    (write(f"{LISTS}/train.txt", "000000\n".encode("utf-16")), "save it as UTF-8"),
    (copied(PHOTO, f"{PHOTOS}/{FIRST}.JPEG"), f"is not the only file with its id (also {FIRST}.JPEG): keep one"),
    (copied(MASK, f"{MASKS}/{FIRST}.PNG"), f"is not the only file with its id (also {FIRST}.PNG): keep one"),
    (rotated_photo, f"{FIRST}.png: fits its photo only without the photo's EXIF orientation (30x20, but upright 20x3"),
    (remove(PHOTOS), "JPEGImages/000000.jpg: no such file: add it (photos: JPEG, PNG"),
    (remove(MASKS), "SegmentationClass/000000.png: no such file"),
    (
        both(copied(PHOTO, f"{MASKS}/{FIRST}.jpg"), remove(MASK)),
        f"{FIRST}.png: no such file: add it (photos: JPEG, PNG, WebP, BMP or TIFF; masks: PNG)",
    ),
    (photo(np.zeros((40, 40), np.float32)), f"{FIRST}.tif: is an image in mode F, with 32 bits per pixel"),
    (photo(np.zeros((40, 40), np.int32)), f"{FIRST}.tif: is an image in mode I, with 32 bits per pixel"),
    (remove(PHOTO), f"{FIRST}.jpg: no such file"),
    (write(PHOTO, truncate), f"{FIRST}.jpg: cannot be read as an image"),
    (write(PHOTO, b""), f"{FIRST}.jpg"),
    (write(PHOTO, b"<html>404</html>"), f"{FIRST}.jpg"),
    (write(PHOTO, png_header(60000, 60000)), f"{FIRST}.jpg: cannot be read as an image (Image size"),
    (write(PHOTO, png_header(0, 5)), f"{FIRST}.jpg"),
    (folder_at(PHOTO), f"{FIRST}.jpg"),
    (remove(MASK), f"{FIRST}.png: no such file"),
    (write(MASK, truncate), f"{FIRST}.png"),
    (write(MASK, b""), f"{FIRST}.png"),
    (write(MASK, png_header(60000, 60000)), f"{FIRST}.png: cannot be read as an image (Image size"),
    (mask(np.zeros((40, 40, 3), np.uint8)), f"{FIRST}.png: is an image in mode RGB,"),
    (mask(np.zeros((40, 40, 3), np.uint8)), "python voc.py --data Tiny --from-colours colours.txt converts"),
    (mask(np.zeros((40, 40, 4), np.uint8)), "python voc.py --data Tiny --from-colours colours.txt converts"),
    (mask(np.zeros((40, 40), np.uint16)), f"{FIRST}.png"),
    (jpeg_mask, f"{FIRST}.png: is JPEG, not PNG, in spite of its name: export the mask as PNG"),
    (mask(np.full((40, 40), len(voc.CLASSES), np.uint8)), f"{FIRST}.png: holds the value 21,"),
    (mask(np.full((40, 40), 128, np.uint8)), "python voc.py --data Tiny --from-colours colours.txt converts"),
    (mask(np.zeros((7, 9), np.uint8)), f"{FIRST}.png: is 9x7, but its photo is"),
    (remove(MASK), "python voc.py --data Tiny --check lists all faults"),
    (all_masks("train", all_void), "no mask of the split train has a labelled pixel"),
    (all_masks("val", all_void), "no mask of the split val has a labelled pixel"),
    (all_masks("train", binary), "show only background (value 0) and void: 255 is void, and an object needs the value"),
    (both(all_masks("train", np.ones_like), write("Tiny/classes.txt", b"a\nb\n")), "show only b (value 1)"),
    (write("Tiny/classes.txt", b"sky\nroad\n\ncar\n"), "classes.txt: line 3 ('') is empty, a comment or a repetition"),
    (
        write("Tiny/classes.txt", b"sky\nroad\nsky\ncar\n"),
        "classes.txt: line 3 ('sky') is empty, a comment or a repetition",
    ),
    (write("Tiny/classes.txt", b"# id name\nsky\nroad\n"), "classes.txt: line 1 ('# id name') is empty, a comment"),
    (write("Tiny/classes.txt", "Größe\nsky\n".encode("latin-1")), "classes.txt: cannot be read as UTF-8 text"),
    (write("Tiny/classes.txt", b"one\n"), "classes.txt: needs 2 to 255 different class names, one per line; it has 1"),
    (write("Tiny/classes.txt", b"same\nsame\n"), "classes.txt"),
    (write("Tiny/classes.txt", b"\n".join(b"%d" % label for label in range(256))), "classes.txt"),
    (write("Tiny/classes.txt", b"\xff\xfe\x00\x01"), "classes.txt"),
    (write("Tiny/classes.txt", b"a\nb\n"), "classes.txt"),
    (folder_at("Tiny/classes.txt"), "classes.txt"),
]
# contents of colours.txt, and the message of voc.py --from-colours
COLOURS = [
    (b"0 0 0 sky\n", "colours.txt: needs 2 to 255 classes"),
    (b"0 0 0 sky\n0,0,256,road\n", "colours.txt: holds the line '0,0,256,road'"),
    (b"0 0 0 sky\n\nroad\n", "colours.txt: holds the line 'road'"),
    (b"0 0 0 sky\n0 0 0 road\n", "colours.txt: repeats a colour or a name (0 0 0 road)"),
    (b"0 0 0 sky\n0 0 1 sky\n", "colours.txt: repeats a colour or a name (0 0 1 sky)"),
    (b"\xff\xfe", "colours.txt: cannot be read as UTF-8 text"),
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
    (not_finite, "best_train.pt: holds weights that are not finite"),
]
RESUMED = [
    (changed(history=None), "not written by this project"),
    (changed(optimizer={}), "does not fit the model or optimizer"),
    (changed(optimizer=None), "'optimizer'"),
    (changed(model={}), "does not fit the model or optimizer"),
    (changed(flags=5), "does not fit the model or optimizer"),
    (changed(code={"train.py": "print()"}), "train.py has changed since ('-print()')"),
    (changed(code=None), "was written by an earlier version"),
    (changed(data_sha256="others"), "other image ids or masks"),
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
CASES += [(write("colours.txt", text), voc, "--data Tiny --from-colours colours.txt", part) for text, part in COLOURS]
CASES += [(write("best_train.pt", content), predict, PREDICT, message) for content, message in CHECKPOINT + LOADED]
CASES += [(write("last_train.pt", content), train, RESUME, message) for content, message in CHECKPOINT + RESUMED]
CASES += [(None, train, f"{RESUME} {flags}", message) for flags, message in OTHER_FLAGS]
CASES += [(remove("best_train.pt"), train, RESUME, "best_train.pt: is missing")]
CASES += [(all_masks(split, np.ones_like), train, RESUME, "other image ids or masks") for split in ("val", "test")]


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


def test_check_lists_every_fault_in_one_run(tmp_path, capsys):
    root = make_tiny(tmp_path / "Tiny", (("train", 30), ("val", 12), ("test", 2)))
    assert run_main(tmp_path, voc, "--data Tiny --check") == 0
    assert "Tiny: no faults in 30 train images, 12 val images, 2 test images" in capsys.readouterr().out

    for index in range(25):
        (root / "JPEGImages" / f"{index:06d}.jpg").write_bytes(b"")
    faults = {  # of images of val, each with a part of its message
        rotated_photo: "fits its photo only without the photo's EXIF",
        mask(np.zeros((40, 40, 3), np.uint8)): "is an image in mode RGB",
        mask(np.full((40, 40), 99, np.uint8)): "holds the value 99",
        mask(np.zeros((7, 9), np.uint8)): "is 9x7, but its photo is",
        remove(MASK): "no such file",
        remove(PHOTO): "no such file",
        write(MASK, truncate): "cannot be read as an image",
    }
    expected = [(f"{index:06d}.jpg", "cannot be read as an image") for index in range(25)]
    for index, (spoil, text) in enumerate(faults.items(), start=30):
        one = make_tiny(tmp_path / f"one{index}" / "Tiny", (("val", 1),))
        spoil(one.parent)
        for path in (one / "JPEGImages", one / "SegmentationClass"):
            for suffix in ("jpg", "png"):
                source, target = path / f"{FIRST}.{suffix}", root / path.name / f"{index:06d}.{suffix}"
                target.unlink(missing_ok=True)
                if source.exists():
                    shutil.copy(source, target)
        expected.append((f"{index:06d}.", text))
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("")
    expected += [("test.txt", "the split is empty")]

    assert run_main(tmp_path, voc, "--data Tiny --check") == 2
    output, error = capsys.readouterr()
    lines = output.splitlines()
    for name, text in expected:
        assert sum(name in line and text in line for line in lines) == 1, (name, text, output)
    assert len(lines) == len(expected) and error == f"error: Tiny: {len(expected)} faults, listed above\n"


@pytest.mark.parametrize("classes", ["", "\n".join(map(str, range(300)))])
def test_a_wrong_number_of_classes_is_not_blamed_on_the_masks(tiny, capsys, classes):
    (tiny / "classes.txt").write_text(classes)
    assert run_main(tiny.parent, voc, "--data Tiny --check") == 2
    output, error = capsys.readouterr()
    assert output.startswith("Tiny/classes.txt: needs 2 to 255 different class names") and output.count("\n") == 1
    assert error == "error: Tiny: 1 fault, listed above\n"


def test_what_all_masks_show_is_said_only_if_all_are_valid(tiny, capsys):
    for path in sorted((tiny / "SegmentationClass").iterdir())[:5]:  # train
        Image.new("L", (40, 40), 99).save(path)
    Image.new("L", (40, 40)).save(tiny / "SegmentationClass" / f"{FIRST}.png")
    assert run_main(tiny.parent, voc, "--data Tiny --check") == 2
    output, error = capsys.readouterr()
    assert output.count("holds the value 99") == 4
    assert "5 faults" in error and "show only" not in output and "warning" not in output
