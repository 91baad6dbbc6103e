"""The networks: their layers, any size of image, gradients, and what is frozen."""

import pytest
import torch
from conftest import SHARED
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet18_Weights, resnet18

from basic_fcn import FCN
from custom_fcn import CustomFCN
from resnet_fcn import ResNetFCN
from resnet_unet import AveragedResNetUNet, ResNetUNet
from unet import UNet

SMALL = {"widths": (16, 12, 8, 4)}
OPTIONS = {UNet: {"width": 8}, ResNetUNet: SMALL}
NETWORKS = FCN, CustomFCN, ResNetFCN, UNet, ResNetUNet, AveragedResNetUNet


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 3, 65, 97), (2, 3, 1, 33)])
def test_the_output_is_logits_of_the_images_size(network, shape):
    logits = network(7).eval()(torch.randn(shape))
    assert logits.shape == (shape[0], 7, *shape[2:]) and logits.dtype == torch.float32
    for sums in (logits.sum(1), logits.exp().sum(1)):  # neither probabilities nor their logarithms
        assert not torch.allclose(sums, torch.ones_like(sums))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_trainable_parameter_gets_a_gradient_and_a_frozen_one_none(network):
    model = network(5)
    functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.randint(5, (2, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.any()), name


def test_the_baseline_has_the_layers_of_the_assignment():
    """Type, channels, kernel, stride and paddings as in the assignment's table, then ReLU and batch norm."""
    model = FCN(21)
    down, up = (3, 32, 64, 128, 256, 512), (512, 512, 256, 128, 64, 32)
    expected = [(nn.Conv2d, *channels, (0, 0)) for channels in zip(down, down[1:])]
    expected += [(nn.ConvTranspose2d, *channels, (1, 1)) for channels in zip(up, up[1:])]
    convolutions, relus, norms = (list(model.layers)[start::3] for start in range(3))
    assert [(type(conv), conv.in_channels, conv.out_channels, conv.output_padding) for conv in convolutions] == expected
    for conv, relu, norm in zip(convolutions, relus, norms, strict=True):
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (2, 2), (1, 1))
        assert type(relu) is nn.ReLU and type(norm) is nn.BatchNorm2d and norm.num_features == conv.out_channels
    classifier = model.classifier
    assert (classifier.in_channels, classifier.out_channels, classifier.kernel_size) == (32, 21, (1, 1))


def test_the_custom_network_takes_no_more_operations_than_the_baseline():
    flops = []
    for network in (CustomFCN, FCN):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(21).eval()(torch.randn(1, 3, 224, 224))
        flops.append(counter.get_total_flops())
    assert flops[0] <= flops[1]


def test_the_pretrained_weights_are_not_initialised_again(monkeypatch):
    """The features of both backbones, and of the average's, are those of torchvision's network before pooling."""
    if not (SHARED / "torch" / "hub" / "checkpoints").is_dir():
        pytest.skip(f"needs the weights of ResNet-18 in {SHARED / 'torch'}")
    monkeypatch.setenv("TORCH_HOME", str(SHARED / "torch"))
    weights, images = ResNet18_Weights.IMAGENET1K_V1, torch.randn(2, 3, 96, 64)
    expected = nn.Sequential(*list(resnet18(weights=weights).eval().children())[:-2])(images)
    averaged = AveragedResNetUNet(21, weights).eval()
    fine_tuned = [nn.Sequential(*network.backbone) for network in (averaged.network, averaged.average.module)]
    for backbone in (ResNetFCN(21, weights).train().backbone, *fine_tuned):  # the frozen one in training mode, too
        torch.testing.assert_close(backbone(images), expected)


@pytest.mark.parametrize("network", [ResNetFCN, ResNetUNet])
def test_training_changes_every_layer_but_those_of_the_frozen_backbone(network):
    """The optimizer is given all parameters, and weight decay moves a parameter even if its gradient is 0."""
    model = network(5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.startswith("backbone") and name.endswith("running_mean") for name in before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits = model(5 + 3 * torch.randn(2, 3, 64, 64))
        functional.cross_entropy(logits, torch.randint(5, (2, 64, 64))).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (network is ResNetFCN and name.startswith("backbone")), name


def test_the_decoder_is_four_transposed_convolutions_each_with_relu_and_batch_norm():
    layers = list(ResNetFCN(5).decoder)
    assert [type(layer) for layer in layers] == [nn.ConvTranspose2d, nn.ReLU, nn.BatchNorm2d] * 4 + [nn.Conv2d]


def test_the_unet_has_the_layers_of_the_paper():
    """23 convolutions, four times max pooling, and channels doubled at each halving."""
    model = UNet(5, width=8)
    assert sum(isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) for layer in model.modules()) == 23
    assert [stage[0].out_channels for stage in model.contracting] == [8, 16, 32, 64, 128]
    shapes = []
    model.pool.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[-2:])))
    model.eval()(torch.randn(1, 3, 64, 48))
    assert shapes == [(32, 24), (16, 12), (8, 6), (4, 3)]


@pytest.mark.parametrize("network", [UNet, ResNetUNet])
@pytest.mark.parametrize("level", range(4))
def test_there_is_a_skip_connection_at_every_level(network, level):
    """With the upsampled features cut at a level, the logits depend on this level and those above, on none below."""
    model = network(5, **OPTIONS[network])
    if network is UNet:
        encoder = model.contracting
        for parameter in model.upsample[3 - level].parameters():
            nn.init.zeros_(parameter)
    else:
        encoder, first = model.backbone, model.decoder[3 - level][0]
        nn.init.zeros_(first.weight[:, : first.in_channels - (64, 64, 128, 256)[level]])
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    has_gradient = [any(parameter.grad.any() for parameter in stage.parameters()) for stage in encoder]
    assert has_gradient == [index <= level for index in range(5)]


def test_the_average_is_exponential_over_parameters_and_batch_norm():
    decay, kept = 0.2, (0.0, 2 / 11, 0.2, 0.2)  # after the first step, the average is the weights; 3 / 12 is above 0.2
    model = AveragedResNetUNet(5, decay=decay, **SMALL).train()
    optimizer = torch.optim.SGD(model.network.parameters(), lr=0.1)
    optimizer.register_step_post_hook(model.update)
    expected = {name: tensor.double() for name, tensor in model.network.state_dict().items()}
    for share in kept:
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.randint(5, (2, 32, 32))).backward()
        optimizer.step()
        state = {name: tensor.double() for name, tensor in model.network.state_dict().items()}
        expected = {name: share * value + (1 - share) * state[name] for name, value in expected.items()}
    for name, tensor in model.average.module.state_dict().items():
        if "num_batches" not in name:  # integers, which batch norm does not use
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-6, msg=name)
            assert not torch.equal(tensor, model.network.state_dict()[name]), name


def test_the_average_is_used_in_eval_mode_and_the_weights_in_training():
    model = AveragedResNetUNet(5, **SMALL)
    images = torch.randn(2, 3, 32, 32)
    nn.init.constant_(model.network.classifier.bias, 100.0)
    assert model.train()(images).min() > 50 and model.eval()(images).max() < 50
    model.update()  # the first takes the weights over
    torch.testing.assert_close(model(images), model.network(images))
