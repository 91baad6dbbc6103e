"""A model as an ONNX graph that holds everything between photo and mask: resizing, network, upsampling, argmax."""

import json

import torch

from seg import imaging, inference

# The end of the graph. Classes are upsampled one after another: together they would take 4 bytes per class and pixel.
MASK = """end (float[C, h, w] logits, uint8[H, W, 3] photo) => (uint8[H, W] mask) {
    num_classes = Shape <end = 1> (logits)  photo_size = Shape <end = 2> (photo)
    lowest_logits = ConstantOfShape <value = float[1] {-3.4e38}> (photo_size)
    first_labels = ConstantOfShape <value = uint8[1] {0}> (photo_size)
    highest_logits, mask = Loop <body = step (int64 class_index, bool go_on, float[H, W] highest, uint8[H, W] labels) =>
                                             (bool go_on, float[H, W] new_highest, uint8[H, W] new_labels) {
        class_logits = Gather (logits, class_index)  class_label = Cast <to = 2> (class_index)
        upsampled = Resize <mode = "linear"> (class_logits, , , photo_size)
        is_higher = Greater (upsampled, highest)  new_labels = Where (is_higher, class_label, labels)
        new_highest = Max (upsampled, highest)
    }> (num_classes, , lowest_logits, first_labels)
}"""
PROBABILITIES = """end (float[C, h, w] logits, uint8[H, W, 3] photo) => (float[C, h, w] probabilities) {
    probabilities = Softmax <axis = 0> (logits) }"""


class Graph(torch.nn.Module):
    """Maps a photo, uint8 [H, W, 3], to the logits [C, h, w] of a TrainedModel, as ``predict.segment`` does."""

    def __init__(self, model):
        super().__init__()
        self.model, (self.scale, self.shift) = model, imaging.scale_and_shift("cpu", model.mean, model.std)

    def forward(self, photo):
        rows, columns = (resize_weights(*sides) for sides in zip(photo.shape, self.model.size))
        pixels = (torch.einsum("HWc,wW->cHw", photo.float(), columns) + 0.5).floor()  # Pillow, too, rounds in between
        images = ((torch.einsum("cHw,hH->chw", pixels, rows) + 0.5).floor() * self.scale - self.shift)[None]
        return inference.forward(self.model, images, full_precision=True)["out"][0]


def resize_weights(source, target):
    """Weights of Pillow's antialiased bilinear filter, a triangle, from exact integers: float32 [target, source]."""
    distance = ((2 * torch.arange(source) + 1) * target - (2 * torch.arange(target)[:, None] + 1) * source).abs()
    weights = (2 * torch.scalar_tensor(source, dtype=torch.int64).clamp(min=target) - distance).clamp(min=0)
    return weights.float() / weights.sum(1, keepdim=True)


def convert(model, end, metadata):
    """Convert a TrainedModel on the CPU, with MASK or PROBABILITIES as its ``end``, to an onnx.ModelProto.

    Raises what PyTorch or the network's own code raises, after a line that explains it.
    """
    import onnx.parser  # only here: an optional package

    photo, sides = torch.zeros(300, 400, 3, dtype=torch.uint8), dict(enumerate(torch.export.dims("H", "W")))
    try:
        program = torch.export.export(Graph(model), (photo,), dynamic_shapes=(sides,), strict=False)
        program = torch.onnx.export(program, dynamo=True, output_names=["logits"], opset_version=18, verbose=False)
    except Exception:
        print("the network cannot be exported; an if that depends on its input's values has to become a torch.where")
        raise
    proto, end = program.model_proto, onnx.parser.parse_graph(end)
    proto.graph.input[0].CopyFrom(end.input[1])
    proto.graph.output[0].CopyFrom(end.output[0])
    proto.graph.node.extend(end.node)
    for node in proto.graph.node:
        del node.metadata_props[:]  # they hold paths of source files
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in metadata.items()})
    return proto
