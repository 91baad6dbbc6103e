"""Augmentation: image and mask are transformed together, and outside the image are only void and the mean colour."""

import math

import pytest
import torch
from torch.nn import functional
from torchvision.transforms.v2 import functional as v2

import imaging
import util
import voc
from transforms import Augmentation

SIZE, CELL = 128, 16
ALL = {"flip": 0.5, "degrees": 40, "scale": (0.4, 1.6)}


def augment(images, masks, **options):
    """Augment a batch with params from a fixed seed."""
    augmentation = Augmentation(**options)
    return augmentation(images, masks, augmentation.draw(len(images), torch.Generator().manual_seed(0)))


def cell_index(row, column):
    return (row // CELL) * (SIZE // CELL) + column // CELL


def coordinates(count):
    """Images whose red is a pixel's column, green its row and blue 255, and masks whose classes are square cells."""
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    image = torch.stack((column, row, torch.full_like(row, 255)))
    mask = cell_index(row, column)
    return image.to(torch.uint8).repeat(count, 1, 1, 1), mask.to(torch.uint8).repeat(count, 1, 1)


def test_every_pixel_keeps_its_label():
    images, masks = augment(*coordinates(32), **ALL)
    labelled = masks != util.VOID
    assert labelled.flatten(1).sum(1).min() > SIZE**2 / 5
    column, row = images[:, 0].int(), images[:, 1].int()  # where the pixel comes from
    # Rounding a bilinear value and choosing the nearest pixel may differ by one pixel at the edge of a cell. At the
    # edge of the image, the mean colour is mixed in, which lowers blue.
    distance = torch.maximum((column % CELL - 7.5).abs(), (row % CELL - 7.5).abs())
    inner = labelled & (images[:, 2] == 255) & (distance < 6.6)
    assert inner.sum() > 0.5 * labelled.sum()
    assert torch.equal(masks[inner].int(), cell_index(row, column)[inner])


def test_a_flip_mirrors_image_and_mask():
    images, masks = coordinates(4)
    flipped_images, flipped_masks = augment(images, masks, flip=1.0)
    assert torch.equal(flipped_images, v2.horizontal_flip(images))
    assert torch.equal(flipped_masks, v2.horizontal_flip(masks))


def test_half_of_the_images_are_flipped():
    images, _ = augment(*coordinates(400), flip=0.5)
    flipped = (images[:, 0, 0, 0] > images[:, 0, 0, -1]).sum().item()
    assert abs(flipped - 200) < 50  # five standard deviations of 400 coin tosses


def test_without_options_nothing_changes():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 33, 33), dtype=torch.uint8, generator=generator)
    masks = torch.randint(21, (2, 33, 33), dtype=torch.uint8, generator=generator)
    same_images, same_masks = augment(images, masks)
    assert torch.equal(same_images, images) and torch.equal(same_masks, masks)


def measure(images):
    """Rotation in degrees, side relative to the input, and centre of each augmented image of ``coordinates``."""
    half, step = SIZE // 2, 10
    centre = images[:, :2, half, half].float()
    right = images[:, :2, half, half + step].float() - centre
    below = images[:, :2, half + step, half].float() - centre
    angle = torch.rad2deg(torch.atan2(right[:, 1], right[:, 0]))
    return angle, (right.norm(dim=1) + below.norm(dim=1)) / (2 * step), centre


def test_rotation_and_scale_are_distributed_over_their_ranges():
    angle, side, _ = measure(augment(*coordinates(200), degrees=20)[0])
    assert angle.abs().max() < 20 + 5 and angle.min() < -15 and angle.max() > 15  # one pixel in ten is 5 degrees
    assert (side - 1).abs().max() < 0.15
    angle, side, centre = measure(augment(*coordinates(200), scale=(0.4, 0.8))[0])
    assert angle.abs().max() == 0
    assert 0.4 - 0.1 <= side.min() < 0.5 and 0.7 < side.max() <= 0.8 + 0.1  # one pixel in ten
    assert side.median() == pytest.approx(math.sqrt(0.4 * 0.8), abs=0.1)
    assert (centre.amin(0) < 0.4 * SIZE).all() and (centre.amax(0) > 0.6 * SIZE).all()


def test_flip_rotation_and_scale_together_do_not_shear():
    linear = Augmentation(**ALL).draw(100, torch.Generator().manual_seed(0))[:, :, :2]
    product = linear @ linear.mT
    torch.testing.assert_close(product, product[:, :1, :1] * torch.eye(2))  # a multiple of an orthogonal matrix


def test_rotation_of_a_rectangle_does_not_shear():
    """A rotation by 90 degrees of an image twice as wide as high: pixels that were in a row are in a column."""
    height, width = 32, 64
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = ((row - 15.5).square() + (column - 31.5).square() < 100).to(torch.uint8)[None]  # a circle in the middle
    images, params = mask[:, None].repeat(1, 3, 1, 1), torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    _, rotated = Augmentation()(images, mask, params)
    assert (rotated != mask)[rotated != util.VOID].float().mean() < 0.02  # but for rounding at its edge


def test_a_crop_smaller_than_the_image_lies_inside_it():
    assert (augment(*coordinates(64), flip=0.5, scale=(0.3, 1.0))[1] != util.VOID).all()


def test_points_outside_the_image_are_void_and_the_mean_colour():
    images = torch.full((16, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    masks = torch.full((16, SIZE, SIZE), 3, dtype=torch.uint8)
    images, masks = augment(images, masks, **ALL)
    assert set(masks.unique().tolist()) == {3, util.VOID}  # interpolation would give values in between
    # No bilinear weight reaches further across the edge than two pixels.
    outside, inside = (functional.avg_pool2d((masks == label).float(), 5, 1, 2) == 1 for label in (util.VOID, 3))
    colours = images.movedim(1, -1)
    assert colours[outside].unique(dim=0).tolist() == [[round(255 * value) for value in imaging.MEAN]]
    assert (colours[inside] == 255).all()


def test_params_depend_on_the_generator_only():
    first, same, other = (Augmentation(**ALL).draw(4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_an_epoch_shows_each_image_once_unchanged_and_twice_augmented(tiny):
    split = voc.Split(tiny, "train")
    augmentation = Augmentation(**ALL, unchanged=1, augmented=2)
    loader = voc.Loader(split, size=32, batch_size=4, training=True, augment=augmentation)
    images, _, indices = (torch.cat(parts) for parts in zip(*loader.batches(1)))
    assert len(loader) == len(list(loader.batches(1))) == 4
    assert indices.bincount().tolist() == [3] * 5
    assert len(images.flatten(1).unique(dim=0)) == 15
    ((originals, _, _),) = voc.Loader(split, size=32, batch_size=5).batches()
    unchanged = (images == originals[indices]).flatten(1).all(1)
    assert indices[unchanged].bincount().tolist() == [1] * 5
    assert not unchanged[:5].all()  # shuffled with the augmented ones


def test_augmented_images_are_normalised_like_those_of_val(tiny):
    split = voc.Split(tiny, "val")
    options = {"size": 32, "batch_size": len(split)}
    ((expected, _, _),) = voc.Loader(split, **options).batches()
    ((images, _, indices),) = voc.Loader(split, **options, training=True, augment=Augmentation()).batches()
    assert torch.equal(images, expected[indices])
