"""The assignment's baseline: a fully convolutional network with five downsampling and five upsampling layers."""

from torch import nn
from torch.nn import functional


class FCN(nn.Module):
    """Five strided convolutions, five transposed ones, each followed by ReLU and batch norm, and a 1x1 classifier.

    Args:
        num_classes: channels of the logits.
    """

    def __init__(self, num_classes):
        super().__init__()
        self.arguments = {"num_classes": num_classes}  # a checkpoint rebuilds the model from these

        down, up = (3, 32, 64, 128, 256, 512), (512, 512, 256, 128, 64, 32)
        options = {"kernel_size": 3, "stride": 2, "padding": 1}
        layers = []
        for inputs, outputs in zip(down, down[1:]):
            layers += [nn.Conv2d(inputs, outputs, **options), nn.ReLU(inplace=True), nn.BatchNorm2d(outputs)]
        for inputs, outputs in zip(up, up[1:]):
            layers += [nn.ConvTranspose2d(inputs, outputs, output_padding=1, **options), nn.ReLU(inplace=True)]
            layers += [nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(up[-1], num_classes, kernel_size=1)

    def forward(self, images):
        """Map images, float32 [B, 3, H, W] of any size, to logits [B, num_classes, H, W]."""
        logits = self.classifier(self.layers(images))
        if logits.shape[-2:] != images.shape[-2:]:  # sides that 32 does not divide come back rounded up
            logits = functional.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return logits
