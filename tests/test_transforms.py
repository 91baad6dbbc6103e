"""Augmentation: image and mask are transformed together, and outside the image are only void and the mean colour."""

import math

import pytest
import torch
from torch.nn import functional
from torchvision.transforms.v2 import functional as v2

import util
import voc
from seg.transforms import Augmentation, adjust_colours

SIZE, CELL = 128, 16
ALL = {"flip": 0.5, "degrees": 40, "scale": (0.4, 1.6)}
COLOUR = {"brightness": 0.3, "contrast": 0.4, "saturation": 1.5}
FILL = torch.tensor([10.0, 100.0, 50.0]).view(3, 1, 1)


def augment(images, masks, **options):
    """Augment a batch with params from a fixed seed."""
    augmentation = Augmentation(**options)
    return augmentation(images, masks, augmentation.draw(len(images), torch.Generator().manual_seed(0)), FILL)


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
    # edge of the image, the colour outside is mixed in, which lowers blue.
    distance = torch.maximum((column % CELL - 7.5).abs(), (row % CELL - 7.5).abs())
    inner = labelled & (images[:, 2] == 255) & (distance < 6.6)
    assert inner.sum() > 0.5 * labelled.sum()
    assert torch.equal(masks[inner].int(), cell_index(row, column)[inner])
    assert (augment(*coordinates(64), flip=0.5, scale=(0.3, 1.0))[1] != util.VOID).all()  # crops inside the image


def test_a_flip_mirrors_image_and_mask_of_half_of_the_images():
    images, masks = coordinates(400)
    for probability, expected in ((0.0, 0), (0.5, 200), (1.0, 400)):
        results = augment(images, masks, flip=probability)
        flipped = results[0][:, 0, 0, 0] > results[0][:, 0, 0, -1]
        assert abs(flipped.sum() - expected) <= (50 if probability == 0.5 else 0)  # five standard deviations
        for original, result in zip((images, masks), results):
            assert torch.equal(result[flipped], v2.horizontal_flip(original)[flipped])
            assert torch.equal(result[~flipped], original[~flipped])


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


def test_rotation_of_a_rectangle_does_not_shear():
    """A rotation by 90 degrees of an image twice as wide as high: pixels that were in a row are in a column."""
    height, width = 32, 64
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = ((row - 15.5).square() + (column - 31.5).square() < 100).to(torch.uint8)[None]  # a circle in the middle
    images, params = mask[:, None].repeat(1, 3, 1, 1), torch.tensor([[[0.0, -1, 0], [1, 0, 0], [1, 1, 1]]])
    _, rotated = Augmentation()(images, mask, params, FILL)
    assert (rotated != mask)[rotated != util.VOID].float().mean() < 0.02  # but for rounding at its edge


@pytest.mark.parametrize("colour", [{}, {"contrast": 0.5, "saturation": 0.5}])  # which leave white as it is
def test_points_outside_the_image_are_void_and_filled(colour):
    images = torch.full((16, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    masks = torch.full((16, SIZE, SIZE), 3, dtype=torch.uint8)
    images, masks = augment(images, masks, **ALL, **colour)
    assert set(masks.unique().tolist()) == {3, util.VOID}  # interpolation would give values in between
    # No bilinear weight reaches further across the edge than two pixels.
    outside, inside = (functional.avg_pool2d((masks == label).float(), 5, 1, 2) == 1 for label in (util.VOID, 3))
    colours = images.movedim(1, -1)
    assert colours[outside].unique(dim=0).tolist() == [FILL.flatten().tolist()]
    assert (colours[inside] == 255).all()


def test_params_depend_on_the_generator_only_and_colour_changes_no_other():
    """A run of the same seed gives the same batches, with colour or without."""

    def draw(seed, **colour):
        return Augmentation(**ALL, **colour).draw(50, torch.Generator().manual_seed(seed))

    coloured, plain = draw(0, **COLOUR), draw(0)
    assert torch.equal(coloured, draw(0, **COLOUR)) and (coloured != draw(1, **COLOUR)).all()
    assert torch.equal(coloured[:, :2], plain[:, :2]) and (plain[:, 2] == 1).all() and (coloured[:, 2] != 1).all()


def test_factors_are_distributed_over_their_ranges():
    factors = Augmentation(**COLOUR).draw(2000, torch.Generator().manual_seed(0))[:, 2]
    for found, expected in ((factors.amin(0), [0.7, 0.6, 0.0]), (factors.amax(0), [1.3, 1.4, 2.5])):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.02)
    assert factors.T.corrcoef().fill_diagonal_(0).abs().max() < 0.1


def photos(count, low=0, high=256):
    return torch.randint(low, high, (count, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


SINGLE = [[factor if index == other else 1.0 for other in range(3)] for index in range(3) for factor in (0, 0.4, 4)]
MIXED = [[0.5, 1.2, 1.9], [1.6, 0.3, 0.2], [1.1, 1.5, 1.4], [0.9, 0.8, 0.0]]  # which clip no value in 100 .. 130


@pytest.mark.parametrize(("factors", "low", "high"), [(SINGLE, 0, 256), (MIXED, 100, 130)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_colour_operations_are_those_of_torchvision(factors, low, high, order):
    """But for torchvision's weight of red, 0.2989, which makes white 0.03 darker and is here 0.299."""
    images = photos(len(factors), low, high)
    functions = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation)
    for image, own, result in zip(images, factors, adjust_colours(images, torch.tensor(factors))):
        expected = image.double() / 255
        for index in order:
            expected = functions[index](expected, own[index])
        torch.testing.assert_close(result.double(), 255 * expected, rtol=0, atol=0.1)


def test_augmented_photos_have_the_drawn_colours_and_masks_their_labels():
    images, masks = photos(4), torch.arange(600).remainder(21).to(torch.uint8).view(1, 20, 30).repeat(4, 1, 1)
    augmentation = Augmentation(**COLOUR)
    params = augmentation.draw(4, torch.Generator().manual_seed(2))
    before = images.clone()
    coloured, same_masks = augmentation(images, masks, params, FILL)
    expected = adjust_colours(images, params[:, 2])
    assert (coloured - expected).abs().max() <= 0.5001 and (coloured - images.float()).abs().max() > 20
    assert torch.equal(same_masks, masks) and torch.equal(images, before)


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
