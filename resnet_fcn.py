"""A frozen ImageNet ResNet-18 and a decoder of transposed convolutions."""

from torch import nn
from torch.nn import functional
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d


class ResNetFCN(nn.Module):
    """torchvision's ResNet-18 without pooling and classifier, frozen, then four transposed convolutions.

    Features at 1/32 of the image's size are upsampled four times by a factor of two, each time by a transposed
    convolution, ReLU and batch norm; a 1x1 classifier gives logits at 1/2, which are upsampled bilinearly.
    The backbone's parameters take no gradient, and its batch norm is FrozenBatchNorm2d, which is constant in training
    mode too. Images are expected in ImageNet's normalisation, see ``imaging.normalise``.

    Args:
        num_classes: channels of the logits.
        weights: a member of torchvision's ResNet18_Weights, which are downloaded once; None draws them at random.
    """

    def __init__(self, num_classes, weights=None):
        super().__init__()
        self.arguments = {"num_classes": num_classes}  # the checkpoint holds the backbone: no weights to download

        resnet = resnet18(weights=weights, norm_layer=FrozenBatchNorm2d)
        self.backbone = nn.Sequential(*list(resnet.children())[:-2]).requires_grad_(False)

        layers = []
        for inputs, outputs in ((512, 256), (256, 128), (128, 64), (64, 32)):
            layers += [nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)]
            layers += [nn.ReLU(inplace=True), nn.BatchNorm2d(outputs)]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(32, num_classes, kernel_size=1))

    def forward(self, images):
        """Map images, float32 [B, 3, H, W] of any size, to logits [B, num_classes, H, W]."""
        logits = self.decoder(self.backbone(images))
        return functional.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
