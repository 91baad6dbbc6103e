"""An ImageNet ResNet-18 that is never trained, and a decoder of transposed convolutions that is."""

import torch
from torch import nn
from torch.nn import functional
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d


class ResNetFCN(nn.Module):
    """torchvision's ResNet-18 without pooling and classifier, frozen, then four transposed convolutions.

    Features of 1/32 of the image's sides are doubled four times, each time by a transposed convolution followed by
    ReLU and batch norm; a 1x1 classifier gives logits at 1/2, which are upsampled bilinearly.

    The backbone has no parameter that takes a gradient, it runs without a graph, and its batch norm is
    FrozenBatchNorm2d (four constant buffers, the same in every mode): nothing in it can drift.

    Args:
        num_classes: channels of the logits.
        weights: a member of torchvision's ResNet18_Weights, which torchvision downloads once; None leaves the backbone
            as it is drawn at random.

    Raises:
        OSError, RuntimeError: torchvision cannot download or read the weights.
    """

    def __init__(self, num_classes, weights=None):
        super().__init__()
        self.arguments = {"num_classes": num_classes}  # a checkpoint holds the backbone too: it needs no weights

        backbone = resnet18(weights=weights, norm_layer=FrozenBatchNorm2d)
        self.backbone = nn.Sequential(*list(backbone.children())[:-2]).requires_grad_(False)

        layers = []
        for inputs, outputs in ((512, 256), (256, 128), (128, 64), (64, 32)):
            layers += [nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)]
            layers += [nn.ReLU(inplace=True), nn.BatchNorm2d(outputs)]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(32, num_classes, kernel_size=1))

    def encode(self, images):
        """The backbone's features of images, float32 [B, 3, H, W] of any size, normalised with ImageNet's mean and
        standard deviation: [B, 512, H/32, W/32], rounded up. The same images always give the same."""
        with torch.no_grad():
            return self.backbone(images)

    def decode(self, features, shape):
        """Map features from ``encode`` to logits [B, num_classes, H, W], ``shape`` being (H, W)."""
        return functional.interpolate(self.decoder(features), shape, mode="bilinear", align_corners=False)

    def forward(self, images):
        """Map images, as ``encode`` takes them, to logits [B, num_classes, H, W]."""
        return self.decode(self.encode(images), images.shape[-2:])
