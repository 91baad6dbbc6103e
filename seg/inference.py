"""From images to logits and masks, the same in training, evaluation and prediction."""

import contextlib
import functools
import math
from collections.abc import Mapping

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from seg import checkpoint, distributed
from util import UserError

STRIP_SIZE = 1 << 22  # logits that are upsampled at a time: 16 MB, about one VOC image of 21 classes


class _SeparateBias(TorchFunctionMode):
    """Add the bias of transposed convolutions by itself: oneDNN takes longer for its gradient than for all others."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        bias = args[2] if function is functional.conv_transpose2d and len(args) > 2 else None
        if bias is None:
            return function(*args, **(kwargs or {}))
        outputs = function(*args[:2], None, *args[3:], **(kwargs or {}))
        return outputs.add_(bias.to(outputs.dtype)[:, None, None])


def forward(network, images, full_precision=False):
    """Apply a network to images [B, 3, H, W], in bfloat16 on devices that have it unless ``full_precision``.

    Returns a dict whose ``out`` are the logits, float32 [B, C, H, W]. A network may return smaller ones, which are
    upsampled bilinearly, or itself a dict with ``out`` and others, as those of torchvision do.
    """
    if full_precision:  # on GPUs since Ampere, cuDNN would round to the digits of TF32; in bfloat16, it never does
        torch.backends.cudnn.allow_tf32 = False
        if hasattr(torch.backends.cudnn, "fp32_precision"):  # since torch 2.9
            torch.backends.cudnn.fp32_precision = "ieee"
    bfloat16 = distributed.has_bfloat16(images.device) and not full_precision
    with contextlib.ExitStack() as contexts:
        if network.training and images.device.type == "cpu":
            contexts.enter_context(_SeparateBias())
        if bfloat16:
            contexts.enter_context(torch.autocast(images.device.type, torch.bfloat16))
        outputs = network(images)
    outputs = dict(outputs) if isinstance(outputs, Mapping) else {"out": outputs}
    if not isinstance(outputs.get("out"), torch.Tensor):
        raise UserError("the network has to return logits, or a dict with logits as out")
    return {name: _at_size(value, images.shape[2:]) for name, value in outputs.items()}


def _at_size(value, shape):
    """Logits [B, C, h, w] in float32 at ``shape``; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        return value
    logits, options = value.float(), {"mode": "bilinear", "align_corners": False}
    return logits if logits.shape[2:] == shape else functional.interpolate(logits, shape, **options)


def predict_strips(logits, shape):
    """Upsample logits bilinearly and take the argmax, strip by strip, so that memory stays bounded.

    The result is exactly that of a single ``interpolate``, which also interpolates horizontally first. Of equal logits,
    the first wins. ``logits`` are [C, h, w], contiguous, ``shape`` is (H, W) of the mask. Yields a slice of the mask's
    columns, from left to right, and the prediction for them, int64 [H, columns].
    """
    height, width = shape
    resize = functools.partial(functional.interpolate, mode="bilinear", align_corners=False)
    logits = logits[None].float()
    num_strips = min(width, math.ceil(logits.shape[1] * height * width / STRIP_SIZE))
    if num_strips == 1:
        yield slice(0, width), resize(logits, shape).max(1).indices[0]  # several times faster than argmax
        return
    start = 0
    for strip in resize(logits, (logits.shape[2], width)).tensor_split(num_strips, 3):
        stop = start + strip.shape[3]
        yield slice(start, stop), resize(strip, (height, stop - start)).max(1).indices[0]
        start = stop


@torch.inference_mode()
def predict_image(model, images, shape):
    """The prediction for one normalised image, float32 [1, 3, h, w], at ``shape`` [H, W]: uint8 array [H, W]."""
    mask = torch.empty(shape, dtype=torch.uint8, device=images.device)
    logits = forward(model, images, full_precision=True)["out"][0].contiguous()
    for columns, prediction in predict_strips(logits, shape):
        mask[:, columns] = prediction
    return mask.cpu().numpy()


def predict_index(model, loader, index, shape):
    """``predict_image`` for one image of a loader; see ``check_loader``."""
    check_loader(model, loader)
    return predict_image(model, loader.normalise(loader.images[index : index + 1]), shape)


def check_loader(model, loader):
    """Raise a UserError if a TrainedModel was trained with other classes or another normalisation than a loader's."""
    if not isinstance(model, checkpoint.TrainedModel):
        return
    check_classes(model, loader.split)
    if (*model.mean, *model.std) != (*loader.mean, *loader.std):
        problem = "the loader's mean or std differs from that with which the model was trained"
        raise UserError(f"{problem}: pass mean=model.mean, std=model.std to voc.Loader")


def check_classes(model, split):
    """Raise a UserError if a TrainedModel was trained with other classes than those of LabelledImages."""
    if model.classes != split.classes:
        problem = f"the classes of {split.root} or their order differ from the model's"
        raise UserError(f"{problem} ({', '.join(model.classes)}): score it on data with the same classes.txt")
