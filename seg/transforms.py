"""Random flips, rotations, scaled crops and colours of batches of photos together with their masks."""

import math

import torch
from torch.nn import functional

from util import VOID


class Augmentation:
    """Change the colours of each image of a batch at random, then flip, rotate and crop it by one affine map.

    Photo (bilinearly) and mask (nearest) are sampled at the same points; outside are ``fill`` and void.

    Args:
        flip: probability of a horizontal flip.
        degrees: rotation by an angle from -degrees .. degrees, uniformly distributed.
        scale: smallest and largest side of the crop relative to the image's side, logarithmically distributed: halving
            is as likely as doubling. A crop lies anywhere inside the image, or the image anywhere inside a larger crop.
        brightness, contrast, saturation: as in torchvision's ColorJitter, x stands for a factor from max(0, 1 - x) ..
            1 + x: of all values, of their distance from the photo's mean grey value, and from a pixel's own grey value.
        unchanged, augmented: how many times an epoch shows each image as it is, and with new random parameters.
    """

    def __init__(
        self, flip=0, degrees=0, scale=(1, 1), brightness=0, contrast=0, saturation=0, unchanged=0, augmented=1
    ):
        self.flip, self.degrees, self.scale = flip, degrees, scale
        self.colour = (brightness, contrast, saturation)
        self.unchanged, self.augmented = unchanged, augmented

    def draw(self, count, generator):
        """Draw random parameters, float32 [count, 3, 3].

        Two rows are an affine map from output to input coordinates in -1..1, the third holds the factors of colours.
        """
        flip, angle, scale, x, y = torch.rand(5, count, generator=generator)
        sign = torch.where(flip < self.flip, -1.0, 1.0)
        angle = math.radians(self.degrees) * (2 * angle - 1)
        scale = self.scale[0] * (self.scale[1] / self.scale[0]) ** scale
        margin = (1 - scale).abs()
        x, y = margin * (2 * x - 1), margin * (2 * y - 1)
        cos, sin = scale * angle.cos(), scale * angle.sin()
        factors = torch.ones(3, count)
        if any(self.colour):
            lowest, highest = torch.tensor([(max(0.0, 1 - x), 1 + x) for x in self.colour]).T[..., None]
            factors = lowest + (highest - lowest) * torch.rand(3, count, generator=generator)
        return torch.stack((sign * cos, -sin, x, sign * sin, cos, y, *factors), 1).view(count, 3, 3)

    def __call__(self, images, masks, params, fill):
        """Augment images, uint8 [B, 3, H, W], and masks, uint8 [B, H, W], with params [B, 3, 3] from ``draw``.

        ``fill``, float32 [3, 1, 1] in 0..255, is the colour of the photo's borders. Returns new tensors alike.
        """
        height, width = masks.shape[1:]
        # Both sides run from -1 to 1: on a rectangle, a rotation would shear without these factors.
        aspect_ratios = params.new_tensor([[1, height / width, 1], [width / height, 1, 1]])
        grid = functional.affine_grid(params[:, :2] * aspect_ratios, images.shape, align_corners=False)
        if any(self.colour):  # before the border is added, whose colour stays
            images = adjust_colours(images, params[:, 2])
        # grid_sample fills with 0, which is made to mean fill and void by subtracting them beforehand
        images = functional.grid_sample(images - fill, grid, "bilinear", "zeros", align_corners=False) + fill
        masks = functional.grid_sample(masks[:, None] - float(VOID), grid, "nearest", "zeros", align_corners=False)
        return images.round().to(torch.uint8), (masks[:, 0] + VOID).to(torch.uint8)


def adjust_colours(images, factors):
    """Multiply brightness, contrast and saturation of images [B, 3, H, W] in 0..255 by factors [B, 3]: new, float32.

    As torchvision's functions one after the other, in any order, but values are clipped once, and nothing is rounded.
    """
    brightness, contrast, saturation = factors[..., None, None, None].unbind(1)
    images = images.float()
    red, green, blue = images.split(1, dim=1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    mean = grey.mean((2, 3), keepdim=True)
    images = torch.lerp(grey, images, saturation)
    return (brightness * torch.lerp(mean, images, contrast)).clamp_(0, 255)
