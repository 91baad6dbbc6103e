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

MODELS = [FCN, CustomFCN, ResNetFCN, UNet, ResNetUNet, AveragedResNetUNet]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(1, 3, 65, 97), (2, 3, 1, 33)])
def test_logits_have_the_size_of_the_image(model, shape):
    logits = model(7).eval()(torch.randn(shape))
    assert logits.shape == (shape[0], 7, *shape[2:]) and logits.dtype == torch.float32


@pytest.mark.parametrize("model", MODELS)
def test_the_output_is_logits_and_not_probabilities(model):
    logits = model(5).eval()(torch.randn(1, 3, 64, 64))
    assert logits.min() < 0 and not torch.allclose(logits.sum(1), torch.ones(1, 64, 64))
    assert not torch.allclose(logits.exp().sum(1), torch.ones(1, 64, 64))  # log-probabilities


@pytest.mark.parametrize("model", MODELS)
def test_every_trainable_parameter_gets_a_gradient_and_a_frozen_one_none(model):
    model = model(5)
    masks = torch.randint(5, (2, 64, 64))
    functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), masks).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (FCN, {}),
        (CustomFCN, {"skips": False, "residual": False, "context": False}),
        (ResNetFCN, {}),
        (UNet, {"width": 8}),
        (ResNetUNet, {"widths": (16, 12, 8, 4)}),
        (AveragedResNetUNet, {"widths": (16, 12, 8, 4), "decay": 0.5}),
    ],
)
def test_a_model_is_rebuilt_from_its_arguments(model, options):
    first = model(5, **options)
    second = model(**first.arguments)
    second.load_state_dict(first.state_dict())
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(first.eval()(images), second.eval()(images))


def test_the_baseline_has_the_layers_of_the_assignment():
    """Type, channels, kernel, stride and paddings as in the assignment's table, then ReLU and batch norm."""
    model = FCN(21)
    layers = list(model.layers)
    down, up = (3, 32, 64, 128, 256, 512), (512, 512, 256, 128, 64, 32)
    expected = [(nn.Conv2d, *channels, (0, 0)) for channels in zip(down, down[1:])]
    expected += [(nn.ConvTranspose2d, *channels, (1, 1)) for channels in zip(up, up[1:])]
    convolutions = layers[::3]
    found = [(type(conv), conv.in_channels, conv.out_channels, conv.output_padding) for conv in convolutions]
    assert found == expected
    for conv, relu, norm in zip(convolutions, layers[1::3], layers[2::3], strict=True):
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (2, 2), (1, 1))
        assert type(relu) is nn.ReLU and type(norm) is nn.BatchNorm2d and norm.num_features == conv.out_channels
    classifier = model.classifier
    assert (classifier.in_channels, classifier.out_channels, classifier.kernel_size) == (32, 21, (1, 1))


def test_the_custom_network_takes_no_more_multiply_adds_than_the_baseline():
    def multiply_adds(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.randn(1, 3, 224, 224))
        return counter.get_total_flops() // 2

    assert multiply_adds(CustomFCN(21)) <= multiply_adds(FCN(21))


@pytest.fixture
def weights(monkeypatch):
    """The ImageNet weights, read as torchvision reads them."""
    if not (SHARED / "torch" / "hub" / "checkpoints").is_dir():
        pytest.skip(f"needs the weights of ResNet-18 in {SHARED / 'torch'}")
    monkeypatch.setenv("TORCH_HOME", str(SHARED / "torch"))
    return ResNet18_Weights.IMAGENET1K_V1


def test_the_frozen_backbone_has_the_pretrained_weights(weights):
    """Its features are those of torchvision's network in eval mode before pooling: nothing is initialised again."""
    pretrained = nn.Sequential(*list(resnet18(weights=weights).eval().children())[:-2])
    images = torch.randn(2, 3, 96, 64)
    features = ResNetFCN(21, weights).train().backbone(images)
    assert features.shape == (2, 512, 3, 2)
    torch.testing.assert_close(features, pretrained(images))


def train_two_steps(model):
    """Train a model on random images in training mode; return its state before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # given all parameters, and with weight decay, which moves a parameter even if its gradient is 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        images, masks = 5 + 3 * torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
        functional.cross_entropy(model(images), masks).backward()
        optimizer.step()
    return before


def test_training_changes_the_decoder_and_nothing_in_the_frozen_backbone():
    model = ResNetFCN(5)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    before = train_two_steps(model)
    assert any(name.startswith("backbone") and name.endswith("running_mean") for name in before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("backbone"), name


def test_the_backbone_can_be_fine_tuned():
    model = ResNetFCN(5)
    model.backbone.requires_grad_(True)
    before = train_two_steps(model)
    for name, parameter in model.backbone.named_parameters(prefix="backbone"):
        assert parameter.grad.any() and not torch.equal(parameter, before[name]), name


def test_the_decoder_is_four_transposed_convolutions_each_with_relu_and_batch_norm():
    layers = list(ResNetFCN(5).decoder)
    assert len(layers) == 13 and type(layers[-1]) is nn.Conv2d
    assert [type(layer) for layer in layers[:-1]] == [nn.ConvTranspose2d, nn.ReLU, nn.BatchNorm2d] * 4


def test_the_unet_has_the_layers_of_the_paper():
    """23 convolutions, four times max pooling, and channels doubled at each halving."""
    model = UNet(5, width=8)
    convolutions = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convolutions) == 23
    assert [stage[0].out_channels for stage in model.contracting] == [8, 16, 32, 64, 128]
    shapes = []
    model.pool.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[-2:])))
    model.eval()(torch.randn(1, 3, 64, 48))
    assert shapes == [(32, 24), (16, 12), (8, 6), (4, 3)]


@pytest.mark.parametrize("level", range(4))
def test_the_unet_has_a_skip_connection_at_every_level(level):
    """With the upsampling into a level cut, the logits depend on this level and those above, and on none below."""
    model = UNet(5, width=8)
    for parameter in model.upsample[3 - level].parameters():
        nn.init.zeros_(parameter)
    model(torch.randn(1, 3, 64, 64)).square().mean().backward()
    has_gradient = [convolution[0].weight.grad.any().item() for convolution in model.contracting]
    assert has_gradient == [index <= level for index in range(5)]


SMALL = {"widths": (16, 12, 8, 4)}


def test_the_fine_tuned_backbone_starts_from_the_pretrained_weights(weights):
    """In the network that is trained and in the average, and both in eval mode: nothing is initialised again."""
    pretrained = nn.Sequential(*list(resnet18(weights=weights).eval().children())[:-2])
    images = torch.randn(2, 3, 96, 64)
    model = AveragedResNetUNet(21, weights).eval()
    for network in (model.network, model.average.module):
        features = images
        for stage in network.backbone:
            features = stage(features)
        torch.testing.assert_close(features, pretrained(images))


def test_training_changes_every_layer_of_the_fine_tuned_network():
    model = ResNetUNet(5, **SMALL)
    before = train_two_steps(model)
    assert sum("running_mean" in name for name in before) == 20 + 8  # the batch norm of ResNet-18 and of the decoder
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("level", range(5))
def test_the_fine_tuned_network_has_a_skip_connection_at_every_level(level):
    """With the upsampled half of a decoder stage's input cut, the logits depend on the backbone down to its level."""
    model = ResNetUNet(5, **SMALL)
    if level < 4:
        first = model.decoder[3 - level][0]
        skip = (64, 64, 128, 256)[level]
        nn.init.zeros_(first.weight[:, : first.in_channels - skip])
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    gradients = [[parameter.grad.any().item() for parameter in stage.parameters()] for stage in model.backbone]
    assert [any(stage) for stage in gradients] == [index <= level for index in range(5)]


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
