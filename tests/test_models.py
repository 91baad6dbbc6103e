"""The networks: what each is made of, any size of image, a gradient for what is trained and none for what is not."""

import pytest
import torch
from conftest import SHARED
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet18_Weights, resnet18

import engine
import voc
from basic_fcn import FCN
from custom_fcn import CustomFCN
from resnet_fcn import ResNetFCN
from unet import UNet

MODELS = [FCN, CustomFCN, ResNetFCN, UNet]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def imagenet(monkeypatch):
    """torchvision's ResNet-18 with the weights beside the project."""
    if not (SHARED / "torch" / "hub" / "checkpoints").is_dir():
        pytest.skip(f"needs the weights of ResNet-18 in {SHARED / 'torch'}")
    monkeypatch.setenv("TORCH_HOME", str(SHARED / "torch"))
    return resnet18(weights=ResNet18_Weights.IMAGENET1K_V1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(2, 3, 224, 224), (1, 3, 65, 97), (2, 3, 1, 33), (1, 3, 31, 500)])
def test_logits_have_the_size_of_the_image(model, shape):
    logits = model(7).eval()(torch.randn(shape))
    assert logits.shape == (shape[0], 7, *shape[2:]) and logits.dtype == torch.float32


@pytest.mark.parametrize("model", MODELS)
def test_the_output_is_logits_not_probabilities(model):
    logits = model(5).eval()(torch.randn(1, 3, 64, 64))
    assert logits.min() < 0 and not torch.allclose(logits.sum(1), torch.ones(1, 64, 64))


@pytest.mark.parametrize("model", MODELS)
def test_every_trainable_parameter_gets_a_finite_gradient_and_a_frozen_one_none(model):
    model = model(5)
    masks = torch.randint(5, (2, 64, 64))
    nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), masks).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_rebuilt_from_its_arguments(model):
    first = model(5)
    second = model(**first.arguments)
    second.load_state_dict(first.state_dict())
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(first.eval()(images), second.eval()(images))


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


def multiply_adds(model, size=224):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.randn(1, 3, size, size))
    return counter.get_total_flops() // 2


def test_our_own_network_takes_no_more_multiply_adds_than_the_baseline():
    assert multiply_adds(CustomFCN(21)) <= multiply_adds(FCN(21))


def test_the_frozen_backbone_is_torchvisions(imagenet):
    """The same features as torchvision's network in eval mode gives before its pooling: nothing re-initialised."""
    model = ResNetFCN(21, ResNet18_Weights.IMAGENET1K_V1).train()
    images = torch.randn(2, 3, 96, 64)
    expected = nn.Sequential(*list(imagenet.eval().children())[:-2])(images)
    assert expected.shape == (2, 512, 3, 2)
    torch.testing.assert_close(model.backbone(images), expected)


def test_nothing_in_the_frozen_backbone_moves_whatever_is_set_to_train():
    model = ResNetFCN(5)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    decoder = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)  # even if all is handed over
    for part in (model, model.backbone, *model.backbone.modules()):
        part.train()
    for _ in range(2):
        optimizer.zero_grad()
        masks = torch.randint(5, (2, 64, 64))
        nn.functional.cross_entropy(model(5 + 3 * torch.randn(2, 3, 64, 64)), masks).backward()
        optimizer.step()
    after = model.backbone.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any("running_mean" in name for name in before)
    assert all(not torch.equal(decoder[name], tensor) for name, tensor in model.decoder.state_dict().items())


def test_the_frozen_part_runs_without_a_graph():
    model = ResNetFCN(5)
    seen = []
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    model(images).sum().backward()
    assert images.grad is None and seen[0].grad_fn is None and not seen[0].requires_grad


def test_the_decoder_is_four_transposed_convolutions_each_with_relu_and_batch_norm():
    layers = list(ResNetFCN(5).decoder)
    assert len(layers) == 13 and type(layers[-1]) is nn.Conv2d
    assert [type(layer) for layer in layers[:-1]] == [nn.ConvTranspose2d, nn.ReLU, nn.BatchNorm2d] * 4


def test_the_u_net_is_the_papers():
    """23 convolutions, four max poolings, channels doubled at each halving, and skips that reach the output."""
    model = UNet(5, width=8)
    convolutions = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convolutions) == 23
    assert max(layer.out_channels for layer in convolutions) == 8 * 16
    pools = []
    model.pool.register_forward_hook(lambda module, inputs, output: pools.append(tuple(output.shape[-2:])))
    model.eval()(torch.randn(1, 3, 64, 48))
    assert pools == [(32, 24), (16, 12), (8, 6), (4, 3)]


@pytest.mark.parametrize("level", range(4))
def test_the_u_net_has_a_skip_at_every_level(level):
    """With the way up into a level cut, the logits still depend on that level and those above, and on none below."""
    model = UNet(5, width=8)
    for parameter in model.upsample[3 - level].parameters():
        nn.init.zeros_(parameter)
    model(torch.randn(1, 3, 64, 64)).square().mean().backward()
    reached = [convolution[0].weight.grad.any().item() for convolution in model.contracting]
    assert reached == [number <= level for number in range(5)]


def test_a_frozen_backbone_sees_each_batch_once_however_often_it_is_scored(tiny):
    torch.manual_seed(0)
    model = ResNetFCN(21)
    seen = []
    model.backbone.register_forward_hook(lambda module, images, features: seen.append(len(features)))
    _, val, _ = voc.loaders(tiny, 3, 64)
    criterion = torch.nn.CrossEntropyLoss(ignore_index=voc.VOID)
    features = {}
    for _ in range(2):
        expected = engine.evaluate(model, val, criterion, full_resolution=False)
        kept = engine.evaluate(model, val, criterion, full_resolution=False, features=features)
        assert torch.equal(kept.matrix, expected.matrix) and kept.loss == expected.loss
        with torch.no_grad():  # the decoder goes on learning
            model.decoder[-1].bias.normal_()
    assert seen == [2, 2] * 3
