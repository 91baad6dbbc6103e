"""A model as an ONNX graph that holds everything between photo and mask: resizing, network, upsampling, argmax."""

import json

import torch

from seg import imaging, inference

# The start of the graph, for the size of the network's input as (height, width), in the order of ``imaging.resize``.
START = """start (uint8[H, W, 3] photo) => (uint8[3, h, w] image) {
    height = Constant <value_ints = [%d]> ()  width = Constant <value_ints = [%d]> ()
    planes = Transpose <perm = [2, 0, 1]> (photo)
    narrow = Resize <mode = "linear", antialias = 1, exclude_outside = 1, axes = [2]> (planes, , , width)
    image = Resize <mode = "linear", antialias = 1, exclude_outside = 1, axes = [1]> (narrow, , , height)
}"""
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
    """Maps a resized photo, uint8 [3, h, w], to the logits [C, h, w] of a TrainedModel, as ``predict.segment`` does."""

    def __init__(self, model):
        super().__init__()
        self.model, (self.scale, self.shift) = model, imaging.scale_and_shift("cpu", model.mean, model.std)

    def forward(self, image):
        return inference.forward(self.model, (image * self.scale - self.shift)[None], full_precision=True)["out"][0]


def convert(model, end, metadata):
    """Convert a TrainedModel on the CPU, with MASK or PROBABILITIES as its ``end``, to an onnx.ModelProto.

    Raises what PyTorch or the network's own code raises, after a line that explains it.
    """
    import onnx.parser  # only here: an optional package

    image = torch.zeros(3, *model.size, dtype=torch.uint8)
    try:
        program = torch.export.export(Graph(model), (image,), strict=False)
        program = torch.onnx.export(program, dynamo=True, output_names=["logits"], opset_version=18, verbose=False)
    except Exception:
        print("the network cannot be exported; an if that depends on its input's values has to become a torch.where")
        raise
    proto, start, end = program.model_proto, *map(onnx.parser.parse_graph, (START % model.size, end))
    proto.graph.input[0].CopyFrom(end.input[1])
    proto.graph.output[0].CopyFrom(end.output[0])
    nodes = [*start.node, *proto.graph.node, *end.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    for node in proto.graph.node:
        del node.metadata_props[:]  # they hold paths of source files
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in metadata.items()})
    return proto
