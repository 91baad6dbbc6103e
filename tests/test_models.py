"""The networks: the layers that the assignment asks for, any size of image, and a gradient for every parameter."""

import pytest
import torch
from torch import nn

from basic_fcn import FCN


def test_the_baseline_is_the_assignments():
    """Kind, channels, kernel, stride and paddings as in the assignment's table, then ReLU and batch norm."""
    layers = list(FCN(21).layers)
    down, up = (3, 32, 64, 128, 256, 512), (512, 512, 256, 128, 64, 32)
    expected = [(nn.Conv2d, a, b, (0, 0)) for a, b in zip(down, down[1:])]
    expected += [(nn.ConvTranspose2d, a, b, (1, 1)) for a, b in zip(up, up[1:])]
    assert len(layers) == 3 * len(expected)
    for (kind, inputs, outputs, output_padding), conv, relu, norm in zip(
        expected, layers[::3], layers[1::3], layers[2::3]
    ):
        assert type(conv) is kind and (conv.in_channels, conv.out_channels) == (inputs, outputs)
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (2, 2), (1, 1))
        assert conv.output_padding == output_padding
        assert type(relu) is nn.ReLU and type(norm) is nn.BatchNorm2d and norm.num_features == outputs
    classifier = FCN(21).classifier
    assert (classifier.in_channels, classifier.out_channels, classifier.kernel_size) == (32, 21, (1, 1))


@pytest.mark.parametrize("shape", [(2, 3, 224, 224), (1, 3, 65, 97), (2, 3, 1, 33)])
def test_logits_have_the_size_of_the_image(shape):
    logits = FCN(7).eval()(torch.randn(shape))
    assert logits.shape == (shape[0], 7, *shape[2:])


def test_the_output_is_logits_not_probabilities():
    torch.manual_seed(0)
    logits = FCN(5).eval()(torch.randn(1, 3, 64, 64))
    assert logits.min() < 0 and not torch.allclose(logits.sum(1), torch.ones(1, 64, 64))


def test_every_parameter_gets_a_finite_gradient():
    torch.manual_seed(0)
    model = FCN(5)
    masks = torch.randint(5, (2, 64, 64))
    nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), masks).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
