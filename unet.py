"""A U-Net (Ronneberger, Fischer and Brox, 2015)."""

import torch
from torch import nn


def double_convolution(inputs, outputs):
    """Two padded 3x3 convolutions, each followed by batch norm and ReLU."""
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, kernel_size=3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A contracting path of four halvings, an expanding path of four doublings, and a skip between equal sizes.

    It departs from the paper: convolutions are padded, so that logits have the size of the image and skips are not
    cropped; sides that 16 does not divide are rounded up when they are halved, and cropped when they are doubled; batch
    norm follows each 3x3 convolution and replaces its bias; the first level has 32 channels by default, not 64, so that
    an epoch takes minutes on two CPU cores; no dropout, no extra weight on pixels between touching objects.

    Args:
        num_classes: channels of the logits.
        width: channels of the first level; each level below has twice as many.
    """

    def __init__(self, num_classes, width=32):
        super().__init__()
        self.arguments = {"num_classes": num_classes, "width": width}

        widths = [width * 2**level for level in range(5)]
        self.contracting = nn.ModuleList(map(double_convolution, [3, *widths], widths))
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        upwards = widths[::-1]
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(inputs, outputs, kernel_size=2, stride=2)
            for inputs, outputs in zip(upwards, upwards[1:])
        )
        self.expanding = nn.ModuleList(map(double_convolution, upwards, upwards[1:]))
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, images):
        """Map images, float32 [B, 3, H, W] of any size, to logits [B, num_classes, H, W]."""
        features, skips = images, []
        for convolution in self.contracting:
            features = convolution(self.pool(features) if skips else features)
            skips.append(features)
        for upsample, convolution, skip in zip(self.upsample, self.expanding, skips[-2::-1]):
            height, width = skip.shape[-2:]  # an odd side was rounded up, and comes back one pixel too long
            features = convolution(torch.cat((skip, upsample(features)[..., :height, :width]), dim=1))
        return self.classifier(features)
