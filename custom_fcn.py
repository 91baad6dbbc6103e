"""A network of our own."""

import torch
from torch import nn
from torch.nn import functional


def convolution(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = convolution(channels, channels)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, features):
        return functional.relu(features + self.second(self.first(features)))


class CustomFCN(nn.Module):
    def __init__(self, num_classes, skips=True, residual=True, context=True, widths=(64, 128, 192, 256), width=64):
        super().__init__()
        self.skips = skips
        self.stem = convolution(3, 32, 2)
        self.stages = nn.ModuleList()
        for a, b in zip((32, *widths), widths):
            self.stages.append(nn.Sequential(convolution(a, b, 2), Residual(b) if residual else nn.Sequential(convolution(b, b), convolution(b, b))))
        self.laterals = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(widths[-1], width, 1)) if context else None
        self.smooth = nn.ModuleList(convolution(width, width) for _ in range(3))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images):
        features = self.stem(images)
        levels = []
        for stage in self.stages:
            features = stage(features)
            levels.append(features)
        x = self.laterals[3](features)
        if self.context is not None:
            x = x + self.context(features)
        for level, lateral, smooth in zip(levels[2::-1], self.laterals[2::-1], self.smooth):
            x = functional.interpolate(x, level.shape[-2:], mode="bilinear", align_corners=False)
            if self.skips:
                x = x + lateral(level)
            x = smooth(x)
        return functional.interpolate(self.classifier(x), images.shape[-2:], mode="bilinear", align_corners=False)
