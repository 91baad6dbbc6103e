"""Wrong flags, paths, lists, images and checkpoints: exit code 2, and one line that names what is wrong."""

import io
import shutil

import numpy as np
import pytest
import torch
from conftest import make_tiny, run_main, write_pair, write_split
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
CONVERT = "python voc.py --data Tiny --from-colours colours.txt"


def write(path, content):
    """A fault: the content of a file, or what a function makes of it."""

    def spoil(folder):
        target = folder / path
        target.write_bytes(content(target.read_bytes()) if callable(content) else content)

    return spoil


def truncate(content):
    return content[: len(content) // 2]


def moved(source, target="gone"):
    return lambda folder: shutil.move(folder / source, folder / target)


def copied(source, target):
    return lambda folder: shutil.copy(folder / source, folder / target)


def mask(array, name=FIRST):
    """A fault: the mask becomes an array, as a greyscale image or in RGB."""
    return lambda folder: Image.fromarray(array).save(folder / MASKS / f"{name}.png")


def all_masks(split, change):
    """A fault: the masks of a split become what ``change`` makes of their arrays, as greyscale images."""

    def spoil(folder):
        for name in (folder / LISTS / f"{split}.txt").read_text().split():
            with Image.open(folder / MASKS / f"{name}.png") as image:
                array = np.array(image)
            mask(change(array), name)(folder)

    return spoil


def all_void(array):
    return np.full_like(array, util.VOID)


def binary(array):
    """Objects saved as 255, as many tools do."""
    return np.where(array, 255, 0).astype(np.uint8)


def thin(array, others=0):
    """A person in a row that is left out at 32 rows, and nothing but ``others``."""
    kept = (np.arange(32) + 0.5) * len(array) // 32
    array = np.full_like(array, others)
    array[min({*range(len(array))} - {*kept.astype(int)})] = 15
    return array


def jpeg_mask(folder):
    """A fault: a JPEG with the name of a PNG."""
    with Image.open(folder / MASK) as image:
        Image.fromarray(np.array(image) % 5).save(folder / MASK, "jpeg")


def float_photo(folder):
    """A fault: the photo becomes a TIFF with 32 bits per pixel."""
    (folder / PHOTO).unlink()
    Image.fromarray(np.zeros((40, 40), np.float32)).save(folder / PHOTOS / f"{FIRST}.tif")


def rotated_photo(folder):
    """A fault: the photo has an EXIF orientation that was ignored when its mask was drawn."""
    with Image.open(folder / PHOTO) as image:
        exif = image.getexif()
        exif[ExifTags.Base.Orientation] = 6
        image.resize((30, 20)).save(folder / PHOTO, exif=exif)
    Image.new("L", (30, 20)).save(folder / MASK)


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("from seg import checkpoint; checkpoint.ran = True",))


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


# the script, its flags, and parts of its message
FLAGS = [
    (train, "--epochs 0", "--epochs", "'0' is not an integer from 1"),
    (train, "--epochs two", "--epochs", "'two' is not an integer"),
    (train, "--batch-size -4", "--batch-size"),
    (train, "--seed -1", "--seed"),
    (train, "--limit 1.5", "--limit"),
    (train, "--device gpu", "--device", "auto, cpu, cuda"),
    (train, "--device cuda:99", "--device", "use --device cpu"),
    (train, "--unknown", "--unknown"),
    (train, "--no-pretrained", "--no-pretrained"),  # has no pretrained weights
    (train, "--resume --overwrite", "--overwrite", "not allowed with"),
    (train, "--out afile --data Tiny", "afile/plots", "cannot be written"),
    (train, "--data none", "none: no such folder: docs/DATA.md", "python download.py", "--tar", "--toy"),
    (train, "--data .", "use --data Tiny"),
    (train, f"--data {PHOTOS}", "use --data Tiny"),
    (compare, "--seeds x", "--seeds"),
    (download, "--year 1999", "--year"),
    (download, "--tar none.tar", "none.tar"),
    (download, "--tar afile", "afile", "MD5"),
    (download, "--mirror ftp://a", "--mirror"),
    (voc, "--data Tiny --split none", "none.txt: no such split", "test, train, val"),
    (voc, "--data Tiny --from-colours none.txt", "none.txt: cannot be read"),
    (voc, "--data none --check", "none: no such folder"),
    (predict, "", "checkpoint"),
    (predict, "none.pt Tiny/JPEGImages", "none.pt: no such file"),
    (predict, "best_train.pt", "pass either photos, to segment them, or --data DIR"),
    (predict, "best_train.pt --split val", "pass either photos, to segment them, or --data DIR"),
    (predict, "best_train.pt --data Tiny x.jpg", "pass either photos, to segment them, or --data DIR"),
    (predict, "Tiny Tiny/JPEGImages", "Tiny"),
    (predict, "best_train.pt none.jpg", "none.jpg: no such file"),
    (predict, "best_train.pt Tiny", "Tiny: holds no photo"),
    (predict, "best_train.pt afile", "afile: cannot be read as an image"),
    (predict, "best_train.pt Tiny/JPEGImages --out afile", "afile"),
    (predict, "best_train.pt Tiny/JPEGImages --size 225", "--size", "225", "32"),
]
# faults of the data set, with which train.py then starts
DATA = [
    (moved(LISTS), "Tiny: no data in VOC layout", 'docs/DATA.md, "Split lists"'),
    (moved(f"{LISTS}/val.txt"), "val.txt: no such split", "test, train", 'docs/DATA.md, "Split lists"'),
    (write(f"{LISTS}/train.txt", b""), "train.txt: the split is empty"),
    (write(f"{LISTS}/train.txt", b"000000\n000001\n000000\n"), "train.txt: lists an id more than once (000000"),
    (write(f"{LISTS}/train.txt", b"../../secret\n"), "train.txt: lists an invalid id ('../../secret')"),
    (write(f"{LISTS}/train.txt", "größe\n".encode("latin-1")), "train.txt: ", "UTF-8"),
    (write(f"{LISTS}/train.txt", b"none.jpg\n"), "none.jpg: no such file"),
    (moved(PHOTOS), "JPEGImages", "no such"),
    (moved(MASKS), "SegmentationClass", "no such"),
    (moved(PHOTO), f"{FIRST}.jpg: no such file", "python voc.py --data Tiny --check lists all faults"),
    (copied(PHOTO, f"{PHOTOS}/{FIRST}.JPEG"), f"{FIRST}.", "is not the only file with its id"),
    (moved(PHOTO, f"{PHOTOS}/{FIRST}.heic"), f"{PHOTOS}/{FIRST}.", "JPEG"),
    (float_photo, f"{FIRST}.tif: is an image in mode F"),
    (write(PHOTO, truncate), f"{FIRST}.jpg: cannot be read as an image"),
    (write(PHOTO, b"<html>404</html>"), f"{FIRST}.jpg: cannot be read as an image"),
    (rotated_photo, f"{FIRST}.png: fits its photo only without the photo's EXIF orientation (30x20, but upright 20x30"),
    (moved(MASK), f"{FIRST}.png: no such file"),
    (
        moved(MASK, f"{MASKS}/{FIRST}.npy"),
        f"{MASK}: no such file (but there is SegmentationClass/{FIRST}.npy): put it there as PNG",
    ),
    (moved(MASK, f"{MASKS}/{FIRST}_mask.png"), f"{MASK}: no such file (but there is SegmentationClass/{FIRST}_m"),
    (moved(MASKS, f"{MASKS}PNG"), f"{MASK}: no such file (but there is SegmentationClassPNG/{FIRST}.png)"),
    (jpeg_mask, f"{FIRST}.png: is JPEG, not PNG"),
    (write(MASK, truncate), f"{FIRST}.png: cannot be read as an image"),
    (mask(np.zeros((40, 40, 3), np.uint8)), f"{FIRST}.png: is an image in mode RGB", CONVERT),
    (mask(np.full((40, 40), 21, np.uint8)), f"{FIRST}.png: holds the value 21", CONVERT),
    (write("Tiny/classes.txt", b"a\nb\n"), f"{FIRST}.png: holds the value", "nor void (255)", "classes.txt"),
    (mask(np.zeros((7, 9), np.uint8)), f"{FIRST}.png: is 9x7, but its photo is"),
    (all_masks("train", all_void), "no mask of the split train has a labelled pixel"),
    (all_masks("val", all_void), "no mask of the split val has a labelled pixel"),
    (all_masks("train", binary), "show only background (value 0) and void"),
    (all_masks("train", thin), "at 32x32, nothing is left of person in the masks of train: raise size"),
    (all_masks("val", lambda array: thin(array, util.VOID)), "at 32x32, nothing is left of person in the masks of val"),
    (write("Tiny/classes.txt", b"sky\nroad\n\ncar\n"), "classes.txt: line 3"),
    (write("Tiny/classes.txt", b"sky\nroad\nsky\ncar\n"), "classes.txt: line 3", "sky"),
    (write("Tiny/classes.txt", b"# id name\nsky\nroad\n"), "classes.txt: line 1"),
    (write("Tiny/classes.txt", b"__ignore__\n_background_\ncar\n"), "classes.txt: line 1"),  # labelme's list of labels
    (write("Tiny/classes.txt", b"Pixel Value, Class\n0, sky\n1, car\n"), "classes.txt: line 2", "numbered"),
    (mask(np.full((40, 50), 300, np.uint16)), f"{FIRST}.png: holds the value 300, which is neither a class (0 .. 20)"),
    (write("Tiny/classes.txt", b"one\n"), "classes.txt: needs 2 to 255 different class names"),
]
# contents of colours.txt, and parts of the message of voc.py --from-colours
COLOURS = [
    (b"0 0 0 sky\n", "colours.txt: needs 2 to 255 different class names"),
    (b"0 0 0 sky\n# a comment\n1 1 1 #road\n", "colours.txt: line 3 ('#road') is empty, a comment"),
    (b"0 0 0 sky\n1 1 1 sky\n", "colours.txt: line 2 ('sky')", "a repetition"),
    (b"sky:0,0,0::\nroad:1,256,1::\n", "colours.txt: holds the line 'road:1,256,1::'"),
    (b"0 0 0 sky\nroad\n", "colours.txt: ", "'road'"),
    (b"0 0 0 sky\n0 0 0 road\n", "colours.txt: ", "0 0 0 road"),
]
# contents of a checkpoint, with which predict.py or train.py --resume then starts
CHECKPOINT = [
    (truncate, "not a readable checkpoint"),
    (b"text", "not a readable checkpoint"),
    (saved(Malicious()), "not a readable checkpoint"),
    (saved([1, 2]), "not written by this project"),
]
LOADED = [
    (changed(size=None), "not written by this project"),
    (changed(module="os"), "not at the top level of os.py"),
    (changed(module="../util"), "not at the top level"),
    (changed(module="conftest", **{"class": "make_tiny"}), "make_tiny", "not at the top level of conftest.py"),
    (changed(arguments={"num_classes": 5}), "does not fit TinyNet of tiny_net.py"),
    (changed(arguments={"other": 5}), "does not fit TinyNet of tiny_net.py", "'other'", "restore tiny_net.py"),
]
RESUMED = [
    (changed(history=None), "not written by this project"),
    (changed(optimizer=None), "does not fit the model or optimizer", "'optimizer'"),
]

RESUME = "--data Tiny --epochs 3 --limit 2 --batch-size 2 --device cpu --resume"
CASES = [(None, *case) for case in FLAGS]
CASES += [(spoil, train, "--data Tiny --epochs 1 --device cpu", *words) for spoil, *words in DATA]
for content, *words in COLOURS:
    CASES += [(write("colours.txt", content), voc, "--data Tiny --from-colours colours.txt", *words)]
for content, *words in CHECKPOINT + LOADED:
    CASES += [(write("best_train.pt", content), predict, f"best_train.pt {PHOTO}", "best_train.pt: ", *words)]
for content, *words in CHECKPOINT + RESUMED:
    CASES += [(write("last_train.pt", content), train, RESUME, "last_train.pt: ", *words)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_net):
    """A folder with the checkpoints of train.py; its first epoch is the best."""
    folder = tmp_path_factory.mktemp("run")
    make_tiny(folder / "Tiny")
    assert run_main(folder, train, "--data Tiny --epochs 2 --limit 2 --batch-size 2 --device cpu") == 0
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[-1][:40])
def test_bad_input_ends_with_one_line_that_names_it(finished, tiny, capsys, case):
    spoil, script, flags, *words = case
    folder = tiny.parent
    (folder / "afile").write_text("neither an image nor a checkpoint")
    for name in ("best_train.pt", "last_train.pt"):
        shutil.copy(finished / name, folder)
    if spoil:
        spoil(folder)
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}
    code = run_main(folder, script, flags)
    errors = capsys.readouterr().err.splitlines()
    assert (code, len(errors)) == (2, 1), errors
    assert errors[0].startswith("error: ") and [word for word in words if word not in errors[0]] == [], errors
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


def test_check_lists_all_faults_in_one_run(tmp_path, capsys):
    make_tiny(tmp_path / "Tiny", (("train", 4), ("val", 3), ("test", 2)))
    assert run_main(tmp_path, voc, "--data Tiny --check") == 0
    assert "Tiny: no faults in 4 train images, 3 val images, 2 test images" in capsys.readouterr().out
    faults = {
        "000000.jpg: cannot be read as an image": write(PHOTO, truncate),
        "000001.png: holds the value 99": mask(np.full((40, 40), 99, np.uint8), "000001"),
        "000002.png: is 9x7, but its photo is": mask(np.zeros((7, 9), np.uint8), "000002"),
        "000005.png: is an image in mode RGB": mask(np.zeros((40, 40, 3), np.uint8), "000005"),
        "test.txt: the split is empty": write(f"{LISTS}/test.txt", b""),
    }
    for spoil in faults.values():
        spoil(tmp_path)
    assert run_main(tmp_path, voc, "--data Tiny --check") == 2
    output, error = capsys.readouterr()
    assert [text for text in faults if output.count(text) != 1] == []
    assert len(output.splitlines()) == len(faults)
    assert error == f"error: Tiny: {len(faults)} faults, listed above\n"
