"""Augmentation: photo and mask move together, only void and the mean colour come in, and every draw is anew."""

import math

import numpy as np
import pytest
import torch
from conftest import make_tiny, write_pair, write_split
from torchvision.transforms.v2 import functional as v2

import voc
from transforms import Augmentation

SIZE, CELL = 128, 16
CLASSES = (SIZE // CELL) ** 2
EVERYTHING = {"flip": 0.5, "degrees": 40, "scale": (0.4, 1.6)}


def augmented(photos, masks, **kind):
    """The batch augmented with draws from a fixed seed."""
    augmentation = Augmentation(**kind)
    return augmentation(photos, masks, augmentation.draw(len(photos), torch.Generator().manual_seed(0)))


def chart(number):
    """Photos whose red and green are a pixel's own column and row, with full blue, and masks that number the cells."""
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    photo = torch.stack((column, row, torch.full_like(row, 255)))
    mask = (row // CELL) * (SIZE // CELL) + column // CELL
    return photo.to(torch.uint8).repeat(number, 1, 1, 1), mask.to(torch.uint8).repeat(number, 1, 1)


@pytest.mark.parametrize("kind", [{"flip": 1.0}, {"degrees": 40}, {"scale": (0.4, 1)}, {"scale": (1, 1.6)}, EVERYTHING])
def test_every_pixel_of_a_photo_keeps_its_label(kind):
    photos, masks = augmented(*chart(32), **kind)
    labelled = masks != voc.VOID
    assert labelled.flatten(1).sum(1).min() > SIZE**2 / 5
    column, row = photos[:, 0].int(), photos[:, 1].int()  # where each pixel says that it comes from
    cell = (row // CELL) * (SIZE // CELL) + column // CELL
    # Rounding a bilinear value and choosing the nearest pixel may differ by one pixel at a cell's edge; at the edge of
    # the photo the mean colour is mixed in, which takes off blue.
    inner = labelled & (photos[:, 2] == 255) & ((column % CELL - 7.5).abs() < 6.6) & ((row % CELL - 7.5).abs() < 6.6)
    assert inner.sum() > 0.5 * labelled.sum()
    assert torch.equal(masks[inner].int(), cell[inner])


def test_flip_is_a_mirror_image():
    photos, masks = chart(4)
    flipped = augmented(photos, masks, flip=1.0)
    assert torch.equal(flipped[0], v2.horizontal_flip(photos)) and torch.equal(flipped[1], v2.horizontal_flip(masks))


def test_half_of_the_images_are_flipped():
    photos, _ = augmented(*chart(400), flip=0.5)
    flipped = (photos[:, 0, 0, 0] > photos[:, 0, 0, -1]).sum().item()
    assert abs(flipped - 200) < 50  # five standard deviations of 400 throws of a coin


def test_without_any_change_nothing_is_lost():
    photos = torch.randint(256, (2, 3, 33, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(21, (2, 33, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    same = augmented(photos, masks)
    assert torch.equal(same[0], photos) and torch.equal(same[1], masks)


def maps(photos):
    """Rotation in degrees, side of the crop and centre of each augmented chart, read from its middle."""
    half, step = SIZE // 2, 10
    middle = photos[:, :2, half, half].float()
    right, below = photos[:, :2, half, half + step].float() - middle, photos[:, :2, half + step, half].float() - middle
    angle = torch.rad2deg(torch.atan2(right[:, 1], right[:, 0]))
    return angle, (right.norm(dim=1) + below.norm(dim=1)) / (2 * step), middle


def test_rotation_and_scale_fill_their_ranges_and_stay_in_them():
    angle, side, _ = maps(augmented(*chart(200), degrees=20)[0])
    assert angle.abs().max() < 20 + 5 and angle.min() < -15 and angle.max() > 15  # a pixel in ten is 5 degrees
    assert (side - 1).abs().max() < 0.15
    angle, side, middle = maps(augmented(*chart(200), scale=(0.4, 0.8))[0])
    assert angle.abs().max() == 0
    assert 0.4 - 0.1 <= side.min() < 0.5 and 0.7 < side.max() <= 0.8 + 0.1  # a pixel in ten is a tenth
    assert side.median() == pytest.approx(math.sqrt(0.4 * 0.8), abs=0.1)
    assert (middle.amin(0) < 0.4 * SIZE).all() and (middle.amax(0) > 0.6 * SIZE).all()


def test_a_crop_within_the_image_shows_nothing_from_outside():
    assert (augmented(*chart(64), flip=0.5, scale=(0.3, 1.0))[1] != voc.VOID).all()


def test_outside_is_void_and_the_mean_colour():
    photos = torch.full((16, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    masks = torch.full((16, SIZE, SIZE), 3, dtype=torch.uint8)
    photos, masks = augmented(photos, masks, **EVERYTHING)
    assert set(masks.unique().tolist()) == {3, voc.VOID}
    # Two pixels away from an edge, no bilinear weight reaches across it.
    void = torch.nn.functional.avg_pool2d((masks == voc.VOID).float(), 5, 1, 2) == 1
    colours = photos.movedim(1, -1)[void].unique(dim=0)
    assert colours.tolist() == [[round(255 * value) for value in voc.MEAN]]
    assert (photos.movedim(1, -1)[torch.nn.functional.avg_pool2d((masks == 3).float(), 5, 1, 2) == 1] == 255).all()


def test_masks_hold_only_the_classes_and_void():
    _, masks = chart(16)
    _, found = augmented(*chart(16), **EVERYTHING)
    assert set(found.unique().tolist()) <= set(masks.unique().tolist()) | {voc.VOID}
    only = torch.where(masks % 2 == 0, 2, 200).to(torch.uint8)  # between 2 and 200, interpolation would find others
    assert set(augmented(chart(16)[0], only, **EVERYTHING)[1].unique().tolist()) == {2, 200, voc.VOID}


def test_images_of_a_batch_epochs_and_seeds_differ_and_a_seed_repeats(tiny):
    def epoch(seed, number):
        train, _, _ = voc.loaders(tiny, size=32, batch_size=5, augment=Augmentation(**EVERYTHING), seed=seed)
        images, masks = next(train.batches(number))
        return images, masks

    first = epoch(0, 1)
    assert all(torch.equal(one, other) for one, other in zip(first, epoch(0, 1)))
    for other in (epoch(0, 2), epoch(1, 1)):
        assert not torch.equal(first[0].sort(0).values, other[0].sort(0).values)
    photos, _ = augmented(*chart(8), **EVERYTHING)
    assert len(photos.flatten(1).unique(dim=0)) == 8


def test_three_times_the_set_is_each_image_once_as_it_is_and_twice_augmented(tmp_path):
    root, rng = tmp_path / "Marked", np.random.default_rng(0)
    for number in range(7):  # each photo of another class, so that a mask tells which image it comes from
        photo = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        write_pair(root, str(number), photo, np.full((32, 32), number, np.uint8))
    for split in ("train", "val"):
        write_split(root, split, map(str, range(7)))
    plain, _, _ = voc.loaders(root, size=32, batch_size=4)
    augment = Augmentation(**EVERYTHING, unchanged=1, augmented=2)
    triple, _, _ = voc.loaders(root, size=32, batch_size=4, augment=augment)
    originals = torch.cat([images for images, _ in plain.batches(1)])
    images, masks = (torch.cat(parts) for parts in zip(*triple.batches(1)))
    assert len(triple) == len(list(triple.batches(1))) == 6 and len(images) == len(masks) == 21
    # the same normalisation, bit for bit, or no image would be found again
    found = [(images == original).flatten(1).all(1).nonzero().tolist() for original in originals]
    assert all(len(places) == 1 for places in found)
    assert sorted(place for places in found for (place,) in places) != list(range(7))  # mixed, not in a block
    assert masks.flatten(1).amin(1).bincount().tolist() == [3] * 7
    assert len(images.flatten(1).unique(dim=0)) == 21


def test_train_and_val_share_their_normalisation(tmp_path):
    root = make_tiny(tmp_path / "Tiny", (("train", 3), ("val", 3)))
    (root / "ImageSets/Segmentation/train.txt").write_text((root / "ImageSets/Segmentation/val.txt").read_text())
    train, val, _ = voc.loaders(root, size=32, batch_size=1, augment=Augmentation())
    in_train, in_val = (torch.cat([images for images, _ in loader.batches(1)]) for loader in (train, val))
    assert torch.equal(in_train.flatten(1).sort(0).values, in_val.flatten(1).sort(0).values)
