"""Reading folders in VOC layout: what comes out of a good one, and what is said about a bad one."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny, write_pair, write_split
from PIL import Image

import util
import voc
from util import UserError


def test_palette_is_that_of_the_published_masks(sample):
    with Image.open(next((sample / "SegmentationClass").glob("*.png"))) as image:
        published = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    assert np.array_equal(voc.PALETTE, published)


def test_class_colours_of_voc():
    colours = dict(zip(voc.CLASSES, voc.PALETTE[:21].tolist()))
    assert colours["background"] == [0, 0, 0] and colours["aeroplane"] == [128, 0, 0]
    assert colours["person"] == [192, 128, 128] and colours["tvmonitor"] == [0, 64, 128]
    assert voc.PALETTE[voc.VOID].tolist() == [224, 224, 192]


def test_class_counts_agree_with_numpy_on_the_real_masks(sample):
    split = voc.Split(sample, "train_masks")
    pixels, images = voc.class_counts(split)
    masks = [np.array(Image.open(sample / "SegmentationClass" / f"{name}.png")) for name in split.ids]
    assert len(masks) == 209
    assert pixels.tolist() == [sum(int((mask == c).sum()) for mask in masks) for c in range(21)]
    assert images.tolist() == [sum(bool((mask == c).any()) for mask in masks) for c in range(21)]


def test_class_counts_leave_void_out(tiny):
    split = voc.Split(tiny, "val")
    pixels, _ = voc.class_counts(split)
    masks = [np.array(Image.open(tiny / "SegmentationClass" / f"{name}.png")) for name in split.ids]
    assert pixels.sum() == sum((mask != 255).sum() for mask in masks) < sum(mask.size for mask in masks)


# Counted on the real masks, outside this project: predicting background everywhere, at the masks' own sizes and, in
# the assignment's way, at 224x224 with void as background.
@pytest.mark.parametrize(
    ("split", "official", "assignment"),
    [("train_masks", (0.7230, 0.0344), (0.7357, 0.0350)), ("val_masks", (0.7376, 0.0351), (0.7507, 0.0357))],
)
def test_all_background_scores_of_voc2007(sample, split, official, assignment):
    split = voc.Split(sample, split)
    matrix, accuracies, ious = 0, [], []
    for index in range(len(split)):
        truth = split.mask(index)
        matrix += util.confusion_matrix(torch.tensor(truth), torch.zeros(truth.shape), 21)
        small = np.array(Image.fromarray(truth).resize((224, 224), Image.Resampling.NEAREST))
        accuracies.append(np.isin(small, (0, 255)).mean())
        ious.append(util.assignment_iou(torch.tensor(small)[None], torch.zeros(1, 224, 224), 21).item())
    # The figures are given with four digits; half a unit of the last is what rounding may hide.
    assert (util.pixel_accuracy(matrix), util.mean_iou(matrix)) == pytest.approx(official, abs=5e-5)
    assert (np.mean(accuracies), np.mean(ious)) == pytest.approx(assignment, abs=5e-5)


def test_loaders_give_every_image_once_normalised_with_void_kept(tiny):
    train, val, test = voc.loaders(tiny, size=32, batch_size=2)
    assert (len(train.split), len(val.split), len(test.split)) == (5, 4, 3)
    for loader in (train, val, test):
        images, masks = (torch.cat(parts) for parts in zip(*loader.batches()))
        assert images.shape == (len(loader.split), 3, 32, 32) and images.dtype == torch.float32
        assert masks.shape == (len(loader.split), 32, 32) and masks.dtype == torch.int64
        assert set(masks.unique().tolist()) <= {0, 1, 2, 3, 15, 255} and (masks == 255).any()
    # val comes in the order of its list: compare with torchvision-free arithmetic on the same files
    for index, (image, mask) in enumerate(zip(images, masks)):
        photo = Image.open(tiny / "JPEGImages" / f"{test.split.ids[index]}.jpg").resize(
            (32, 32), Image.Resampling.BILINEAR
        )
        expected = (np.asarray(photo) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=1e-5)  # float32 against float64
        truth = Image.open(tiny / "SegmentationClass" / f"{test.split.ids[index]}.png").resize(
            (32, 32), Image.Resampling.NEAREST
        )
        assert np.array_equal(mask, np.asarray(truth))


def test_train_is_shuffled_anew_each_epoch_and_the_same_for_one_seed(tmp_path):
    root = make_tiny(tmp_path / "Tiny", (("train", 12), ("val", 2)))

    def epoch(seed, number):
        train, _, _ = voc.loaders(root, size=8, batch_size=5, seed=seed)
        return torch.cat([images for images, _ in train.batches(number)])

    first = epoch(0, 1)
    assert torch.equal(first, epoch(0, 1))
    for other in (epoch(0, 2), epoch(1, 1)):
        assert not torch.equal(first, other)
        # the same images in another order
        assert torch.equal(first.flatten(1).sum(1).sort().values, other.flatten(1).sum(1).sort().values)


def test_batches_are_even(tmp_path):
    root = make_tiny(tmp_path / "Tiny", (("train", 9), ("val", 2)))
    train, _, _ = voc.loaders(root, size=8, batch_size=4)
    assert [len(masks) for _, masks in train.batches()] == [3, 3, 3] and len(train) == 3


def test_only_train_is_augmented_images_and_masks_together_and_anew_each_epoch(tiny):
    calls = []

    class Mirror:
        def draw(self, number, generator):
            return torch.rand(number, generator=generator)

        def __call__(self, images, masks, draws):
            assert images.dtype == masks.dtype == torch.uint8 and len(images) == len(draws)
            calls.append(draws.tolist())
            return images.flip(-1), masks.flip(-1)

    plain = voc.loaders(tiny, size=16, batch_size=8)
    flipped = voc.loaders(tiny, size=16, batch_size=8, augment=Mirror())
    for loader, other, changed in zip(plain, flipped, (True, False, False)):
        (images, masks), (other_images, other_masks) = next(loader.batches(3)), next(other.batches(3))
        assert torch.equal(images.flip(-1) if changed else images, other_images)
        assert torch.equal(masks.flip(-1) if changed else masks, other_masks)
    assert len(calls) == 1
    next(flipped[0].batches(4))
    assert calls[0] != calls[1]


def test_limit_and_missing_test(tiny):
    (tiny / "ImageSets" / "Segmentation" / "test.txt").unlink()
    train, val, test = voc.loaders(tiny, size=8, batch_size=2, limit=2)
    assert (train.split.ids, val.split.ids, test) == (["000000", "000001"], ["000005", "000006"], None)


def test_own_classes_greyscale_masks_and_png_photos(tiny):
    (tiny / "classes.txt").write_text("sky\nroad\n\ntree\ncar\n")
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 4, (20, 30)).astype(np.uint8)
    Image.fromarray(mask).save(tiny / "SegmentationClass" / "grey.png")
    Image.fromarray(rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)).save(tiny / "JPEGImages" / "grey.png")
    write_split(tiny, "own", ["grey"])
    split = voc.Split(tiny, "own")
    assert split.classes == ("sky", "road", "tree", "car")
    assert np.array_equal(split.mask(0), mask) and split.photo(0).size == (30, 20)


def test_photos_of_16_bit_grey_keep_their_greys(tiny):
    grey = np.arange(0, 65536, 64, np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(tiny / "JPEGImages" / "deep.png")
    write_split(tiny, "own", ["deep"])
    photo = np.asarray(voc.Split(tiny, "own").photo(0))
    assert np.array_equal(photo, np.stack([grey // 256] * 3, -1))


def test_a_folder_one_level_off_is_told_the_right_one(tiny):
    for wrong in (tiny.parent, tiny / "JPEGImages"):
        with pytest.raises(UserError, match=f"use --data {tiny}$"):
            voc.loaders(wrong, size=8, batch_size=2)


def test_the_frequencies_of_a_split_are_printed_by_one_command(tiny):
    shutil.rmtree(tiny / "JPEGImages")  # masks are enough
    command = [sys.executable, ROOT / "voc.py", "--data", tiny, "--split", "train"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pixels, images = voc.class_counts(voc.Split(tiny, "train"))
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert list(rows) == list(voc.CLASSES)
    assert rows["person"] == [f"{pixels[15] / pixels.sum():.4f}", str(pixels[15]), str(images[15])]


def test_voc2012_is_read_alike(tmp_path):
    root = make_tiny(tmp_path / "VOC2012", (("train", 2), ("val", 1), ("trainval", 1)))
    mask = np.full((10, 12), 20, np.uint8)
    write_pair(root, "2007_000033", np.zeros((10, 12, 3), np.uint8), mask)
    write_split(root, "val", ["2007_000033"])
    _, val, test = voc.loaders(root, size=8, batch_size=2)
    assert test is None and next(val.batches())[1].unique().tolist() == [20]


def test_class_weights_of_the_real_masks_agree_with_the_formula(sample):
    split = voc.Split(sample, "train_masks")
    masks = [np.array(Image.open(sample / "SegmentationClass" / f"{name}.png")).ravel() for name in split.ids]
    labels = np.concatenate(masks)
    labels = labels[labels != 255]
    expected = [1 / np.log(1.02 + np.mean(labels == c)) for c in range(21)]
    weights = voc.class_weights(split)
    assert weights.dtype == torch.float32 and weights.shape == (21,)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)  # float32
    assert weights.argmin() == 0


def test_the_weight_of_a_class_that_train_lacks_is_finite(tiny):
    weights = voc.class_weights(voc.Split(tiny, "train"))
    assert weights.isfinite().all() and weights[7] == weights.max() == pytest.approx(1 / np.log(1.02))


def decoded(root, monkeypatch, **options):
    """The data of the training loader, and how many pictures were opened for it."""
    opened, open_picture = [], voc.open_picture
    with monkeypatch.context() as patch:
        patch.setattr(voc, "open_picture", lambda path: (opened.append(path), open_picture(path))[1])
        data = voc.Loader(voc.Split(root, "train", **options), 16, 2).data
    return data, len(opened)


def repaint(path, colour):
    """Another picture of the same size in bytes and pixels under the same name, with the same time of change."""
    before = path.stat()
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB") if path.suffix == ".jpg" else image)
    changed = Image.fromarray(np.full_like(pixels, colour))
    if path.suffix == ".png":
        changed.putpalette(voc.PALETTE.tobytes())
    changed.save(path)
    with open(path, "ab") as file:  # decoders ignore what comes after the end
        file.write(b"\0" * (before.st_size - path.stat().st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def test_a_second_start_decodes_nothing_and_gives_the_same(tiny, monkeypatch):
    first, opened = decoded(tiny, monkeypatch)
    again, reopened = decoded(tiny, monkeypatch)
    assert (opened, reopened) == (10, 0) and torch.equal(first, again)
    images, masks = (
        torch.tensor(np.stack(parts)) for parts in zip(*map(voc.Split(tiny, "train").pair, range(5), [16] * 5))
    )
    assert torch.equal(first[..., :3], images) and torch.equal(first[..., 3], masks)
    again.zero_()  # belongs to the process: the file stays as it is
    assert torch.equal(first, decoded(tiny, monkeypatch)[0])


def change_photo(root, monkeypatch):
    repaint(root / "JPEGImages" / "000003.jpg", 7)


def change_mask(root, monkeypatch):
    repaint(root / "SegmentationClass" / "000003.png", 2)


def change_order(root, monkeypatch):
    write_split(root, "train", [f"{number:06d}" for number in (1, 0, 2, 3, 4)])


def change_photo_kind(root, monkeypatch):
    photo = root / "JPEGImages" / "000003.jpg"
    with Image.open(photo) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photo.with_suffix(".png"))
    photo.unlink()


@pytest.mark.parametrize("change", [change_photo, change_mask, change_order, change_photo_kind])
def test_changed_files_are_decoded_again(tiny, monkeypatch, change):
    before, _ = decoded(tiny, monkeypatch)
    change(tiny, monkeypatch)
    after, opened = decoded(tiny, monkeypatch)
    assert opened == 10 and not torch.equal(before, after)
    assert len(list((tiny / ".cache").iterdir())) == 1  # the stale one is gone


def test_classes_that_no_longer_fit_are_noticed_although_no_mask_changed(tiny, monkeypatch):
    decoded(tiny, monkeypatch)
    (tiny / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(UserError, match="which is neither a class"):
        decoded(tiny, monkeypatch)


def test_another_limit_and_another_size_have_files_of_their_own(tiny, monkeypatch):
    whole, _ = decoded(tiny, monkeypatch)
    part, opened = decoded(tiny, monkeypatch, limit=2)
    assert opened == 4 and torch.equal(part, whole[:2])
    assert voc.Loader(voc.Split(tiny, "train"), 8, 2).images.shape == (5, 3, 8, 8)
    assert decoded(tiny, monkeypatch)[1] == decoded(tiny, monkeypatch, limit=2)[1] == 0


def test_a_torn_file_is_made_again(tiny, monkeypatch):
    before, _ = decoded(tiny, monkeypatch)
    (path,) = (tiny / ".cache").iterdir()
    os.truncate(path, path.stat().st_size - 1)
    after, opened = decoded(tiny, monkeypatch)
    assert opened == 10 and torch.equal(before, after)


def test_where_nothing_can_be_written_all_is_kept_in_memory(tiny, monkeypatch):
    expected, _ = decoded(tiny, monkeypatch)
    shutil.rmtree(tiny / ".cache")
    (tiny / ".cache").touch()  # no folder can be made here, not even by root
    assert torch.equal(decoded(tiny, monkeypatch)[0], expected)
    (tiny / ".cache").unlink()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert torch.equal(decoded(tiny, monkeypatch)[0], expected)
    assert list((tiny / ".cache").iterdir()) == []


def test_a_fault_in_the_data_leaves_no_file_behind(tiny, monkeypatch):
    (tiny / "JPEGImages" / "000003.jpg").write_bytes(b"torn")
    with pytest.raises(UserError, match="000003.jpg"):
        decoded(tiny, monkeypatch)
    assert list((tiny / ".cache").iterdir()) == []


def test_processes_that_start_together_all_get_the_whole_data(tmp_path):
    root = make_tiny(tmp_path / "Tiny", (("train", 60), ("val", 1)))
    code = "import sys, voc; print(voc.Loader(voc.Split(sys.argv[1], 'train'), 64, 2).data.long().sum().item())"
    line = [sys.executable, "-c", code, root]
    processes = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    sums = {process.communicate()[0] for process in processes}
    split = voc.Split(root, "train")
    assert sums == {f"{sum(int(pixels.sum(dtype=int)) for pixels in split.pixels(64))}\n"}
    assert [path.suffix for path in (root / ".cache").iterdir()] == [".npy"]
