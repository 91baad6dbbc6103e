"""A network of our own: a residual encoder, and a decoder with skip connections from the encoder."""

from torch import nn
from torch.nn import functional


def convolution(inputs, outputs, stride=1):
    """A padded 3x3 convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Block(nn.Module):
    """Two 3x3 convolutions, with a shortcut around them (He et al., 2016) if ``shortcut`` is true."""

    def __init__(self, channels, shortcut):
        super().__init__()
        self.shortcut = shortcut
        self.body = nn.Sequential(
            convolution(channels, channels),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features):
        result = self.body(features)
        return functional.relu(features + result if self.shortcut else result)


def upsample(features, shape):
    return functional.interpolate(features, shape, mode="bilinear", align_corners=False)


class CustomFCN(nn.Module):
    """Downsample by 32 in five steps, upsample the features to 1/2 in four, and the logits to full resolution.

    Args (benchmarks/ablation/ has an experiment without each part):
        num_classes: channels of the logits.
        skips: add the encoder's features at 1/2, 1/4, 1/8 and 1/16 of the image's size to the decoder's.
        residual: give each pair of convolutions in the encoder a shortcut.
        context: add the mean of the features over the whole image to the coarsest ones.
    """

    def __init__(self, num_classes, skips=True, residual=True, context=True):
        super().__init__()
        self.arguments = {"num_classes": num_classes, "skips": skips, "residual": residual, "context": context}

        encoder, decoder = (32, 64, 128, 192, 256), (64, 64, 64, 32, 32)
        self.encoder = nn.ModuleList([convolution(3, encoder[0], stride=2)])
        for inputs, outputs in zip(encoder, encoder[1:]):
            self.encoder.append(nn.Sequential(convolution(inputs, outputs, stride=2), Block(outputs, residual)))
        self.narrow = nn.Conv2d(encoder[-1], decoder[0], kernel_size=1)
        self.context = nn.Conv2d(encoder[-1], decoder[0], kernel_size=1) if context else None
        skip_convolutions = (nn.Conv2d(*channels, kernel_size=1) for channels in zip(encoder[-2::-1], decoder))
        self.skips = nn.ModuleList(skip_convolutions) if skips else None
        self.decoder = nn.ModuleList(convolution(*channels) for channels in zip(decoder, decoder[1:]))
        self.classifier = nn.Conv2d(decoder[-1], num_classes, kernel_size=1)

    def forward(self, images):
        """Map images, float32 [B, 3, H, W] of any size, to logits [B, num_classes, H, W]."""
        features, encoded = images, []
        for stage in self.encoder:
            features = stage(features)
            encoded.append(features)
        decoded = self.narrow(features)
        if self.context is not None:
            decoded = decoded + self.context(features.mean((2, 3), keepdim=True))
        for index, (stage, skip) in enumerate(zip(self.decoder, encoded[-2::-1])):
            decoded = upsample(decoded, skip.shape[-2:])
            if self.skips is not None:
                decoded = decoded + self.skips[index](skip)
            decoded = stage(decoded)
        return upsample(self.classifier(decoded), images.shape[-2:])
