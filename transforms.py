"""Random flips, rotations and scaled crops of whole batches of photos together with their masks."""

import functools
import math

import torch
from torch.nn import functional

from voc import MEAN, VOID


class Augmentation:
    """Flip, rotate and crop each image of a batch at random, by one affine map and one resampling.

    Photo and mask are sampled at the same places, the photo bilinearly, the mask at the nearest pixel. What comes in
    from outside is void in the mask and, in the photo, the mean colour that the loader takes off. One resampling of the
    batch is faster than torchvision's v2 transforms, which take each image by itself and resample it twice;
    ``python benchmarks/augmentation.py`` prints the ratio.

    Args:
        flip: probability of a mirror image, left to right.
        degrees: rotation by an angle drawn evenly from -degrees .. degrees.
        scale: smallest and largest side of the crop, as shares of the image's; drawn evenly in logarithm, so that
            halving is as likely as doubling. A crop lies anywhere within the image; one of more than 1 has the image
            anywhere within it.
        plain: how many times an epoch shows each image as it is.
        augmented: how many times an epoch shows each image augmented, each time drawn anew.
    """

    def __init__(self, flip=0.0, degrees=0.0, scale=(1.0, 1.0), plain=0, augmented=1):
        self.flip, self.degrees, self.scale = flip, degrees, scale
        self.plain, self.augmented = plain, augmented

    def draw(self, number, generator):
        """Draw affine maps, float32 [number, 2, 3], from places in the result to places in the image, in -1..1."""
        mirror, turn, zoom, across, down = torch.rand(5, number, generator=generator)
        angle = (2 * turn - 1) * math.radians(self.degrees)
        side = self.scale[0] * (self.scale[1] / self.scale[0]) ** zoom
        sign = torch.where(mirror < self.flip, -1.0, 1.0)
        cosine, sine, room = side * angle.cos(), side * angle.sin(), (1 - side).abs()
        rows = (sign * cosine, -sine, room * (2 * across - 1), sign * sine, cosine, room * (2 * down - 1))
        return torch.stack(rows, 1).view(number, 2, 3)

    def __call__(self, images, masks, maps):
        """Augment a batch.

        Args:
            images: uint8 [B, 3, S, S].
            masks: uint8 [B, S, S], class indices and VOID.
            maps: float32 [B, 2, 3], from ``draw``, on the same device.

        Returns:
            images and masks, new tensors of the same shapes and type.
        """
        grid = functional.affine_grid(maps, images.shape, align_corners=False)
        # Outside, grid_sample finds zeros: as differences from them, zeros are the mean colour and void.
        mean = _mean(images.device)
        photos = functional.grid_sample(images - mean, grid, "bilinear", "zeros", align_corners=False) + mean
        labels = functional.grid_sample(masks[:, None] - float(VOID), grid, "nearest", "zeros", align_corners=False)
        return photos.round().to(torch.uint8), (labels[:, 0] + VOID).to(torch.uint8)


@functools.cache
def _mean(device):
    return 255 * torch.tensor(MEAN, device=device).view(3, 1, 1)
