"""A U-Net whose contracting path is an ImageNet ResNet-18, and the exponential moving average of its weights."""

import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18


def double_convolution(inputs, outputs):
    """Two padded 3x3 convolutions, each followed by batch norm and ReLU."""
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, kernel_size=3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class ResNetUNet(nn.Module):
    """torchvision's ResNet-18 without pooling and classifier, and a decoder with a skip connection at every level.

    The backbone halves the image five times. Its features at 1/32 are upsampled bilinearly four times by a factor of
    two; each time, two convolutions see them next to the backbone's features of that size. A 1x1 classifier gives
    logits at 1/2, which are upsampled bilinearly. Images are expected in ImageNet's normalisation, see
    ``imaging.normalise``.

    Args:
        num_classes: channels of the logits.
        weights: a member of torchvision's ResNet18_Weights, which are downloaded once; None draws them at random.
        widths: channels of the decoder at 1/16, 1/8, 1/4 and 1/2 of the image's size.
    """

    def __init__(self, num_classes, weights=None, widths=(128, 64, 48, 32)):
        super().__init__()
        self.arguments = {"num_classes": num_classes, "widths": list(widths)}  # the checkpoint holds the backbone

        resnet = resnet18(weights=weights)
        stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu)
        layer1 = nn.Sequential(resnet.maxpool, resnet.layer1)
        self.backbone = nn.ModuleList([stem, layer1, resnet.layer2, resnet.layer3, resnet.layer4])
        inputs = (512, *widths)
        self.decoder = nn.ModuleList(
            double_convolution(coarse + skip, outputs)
            for coarse, skip, outputs in zip(inputs, (256, 128, 64, 64), widths)
        )
        self.classifier = nn.Conv2d(widths[-1], num_classes, kernel_size=1)

    def forward(self, images):
        """Map images, float32 [B, 3, H, W] of any size, to logits [B, num_classes, H, W]."""
        features, encoded = images, []
        for stage in self.backbone:
            features = stage(features)
            encoded.append(features)
        for stage, skip in zip(self.decoder, encoded[-2::-1]):
            features = stage(torch.cat((upsample(features, skip.shape[-2:]), skip), dim=1))
        return upsample(self.classifier(features), images.shape[-2:])


def upsample(features, shape):
    return functional.interpolate(features, shape, mode="bilinear", align_corners=False)


class AveragedResNetUNet(nn.Module):
    """A ResNetUNet and the running average of its weights: the one is trained, the other used in eval mode.

    The average, also of the statistics of batch norm, is exponential: update n keeps ``decay`` of it, but at most
    (1 + n) / (10 + n), so that the first weights do not last. A script makes an update after each step:
    ``optimizer.register_step_post_hook(model.update)``. The checkpoint holds both, so that a resumed run goes on with
    the average that it had.
    """

    def __init__(self, num_classes, weights=None, decay=0.99, **options):
        super().__init__()
        self.network = ResNetUNet(num_classes, weights, **options)
        self.arguments = self.network.arguments | {"decay": decay}

        def move(averages, weights, count):
            kept = ((1 + count) / (10 + count)).clamp(max=decay)
            for average, weight in zip(averages, weights):
                average.copy_(torch.lerp(weight.float(), average.float(), kept))

        self.average = AveragedModel(self.network, multi_avg_fn=move, use_buffers=True).requires_grad_(False)

    def forward(self, images):
        """As ``ResNetUNet.forward``."""
        return self.network(images) if self.training else self.average(images)

    def update(self, *_):
        """Move the average towards the weights; the arguments, which a hook gets, are not used."""
        self.average.update_parameters(self.network)
