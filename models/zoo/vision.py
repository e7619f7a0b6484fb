"""Well-known image classifiers, from the graphs that the `onnx` package ships as test data.

Those graphs are the published architectures, but "light": most weights are a constant fill, and the
batch is fixed at one. Here every weight becomes seeded random numbers of its shape, scaled so that
activations neither vanish nor explode, and the batch becomes variable. Accuracy therefore means
nothing; the arithmetic, the memory and the number of bytes are those of the real model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

ARCHITECTURES: Final = {
    "resnet50": "ResNet-50, 224×224×3 images",
    "densenet121": "DenseNet-121, 224×224×3 images",
    "squeezenet": "SqueezeNet, 224×224×3 images",
    "shufflenet": "ShuffleNet, 224×224×3 images",
    "inception_v1": "Inception v1, 224×224×3 images",
    "inception_v2": "Inception v2, 224×224×3 images",
}
INPUT: Final = "image"
OUTPUT: Final = "probabilities"
_IR_VERSION: Final = 9
_SEED: Final = 11
# BatchNormalization's inputs after the data: scale, bias, mean, variance.
_NORM_VALUES: Final = ((0.5, 0.05), (0.0, 0.05), (0.0, 0.05), (1.0, 0.0))
# The factor of a Caffe "Scale" layer after it: the product is about one.
_SCALE_VALUES: Final = (2.0, 0.1)

Weights = npt.NDArray[np.float32]


def write(name: str, directory: Path) -> Path:
    """Write architecture `name` with random weights and a variable batch; return the file.

    `image` FP32 [-1, 3, 224, 224] to `probabilities` FP32 [-1, 1000] (or [-1, 1000, 1, 1]).
    """
    source = Path(onnx.__file__).parent / "backend/test/data/light" / f"light_{name}.onnx"
    model = onnx.load(source)
    _fill_weights(model.graph)
    _free_batch(model.graph)
    _end_with_softmax(model.graph)
    _rename(model.graph)
    model.ir_version = _IR_VERSION
    path = directory / "model.onnx"
    onnx.save(model, path)
    return path


def _fill_weights(graph: Any) -> None:
    """Replace fills and stored weights by initializers of random numbers."""
    rng = np.random.default_rng(_SEED)
    stored = {i.name: i for i in graph.initializer}
    fills = {n.output[0]: n for n in graph.node if n.op_type == "ConstantOfShape"}
    shapes = {
        name: tuple(int(d) for d in numpy_helper.to_array(stored[node.input[0]]))
        for name, node in fills.items()
    }
    shapes |= {
        name: tuple(i.dims) for name, i in stored.items() if i.data_type == onnx.TensorProto.FLOAT
    }
    norms = {
        name: _NORM_VALUES[role]
        for node in graph.node
        if node.op_type == "BatchNormalization"
        for role, name in enumerate(node.input[1:5])
    }
    sizes = {fills[name].input[0] for name in fills}
    centred = norms | dict.fromkeys(_factors(graph), _SCALE_VALUES)
    kept = [i for name, i in stored.items() if name not in shapes and name not in sizes]
    kept += [
        numpy_helper.from_array(_random(rng, shape, centred.get(name)), name)
        for name, shape in shapes.items()
    ]
    nodes = [n for n in graph.node if n.op_type != "ConstantOfShape"]
    used = {name for node in nodes for name in node.input}
    names = {i.name for i in kept}
    data = [i for i in graph.input if i.name not in stored and i.name in used]
    for field, values in (
        (graph.initializer, [i for i in kept if i.name in used]),
        (graph.node, nodes),
        (graph.input, [i for i in data if i.name not in names]),
    ):
        values = [type(v).FromString(v.SerializeToString()) for v in values]
        del field[:]
        field.extend(values)


def _factors(graph: Any) -> set[str]:
    """What a Mul multiplies by, looking through Unsqueeze."""
    unsqueezed = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Unsqueeze"}
    return {
        unsqueezed.get(name, name) for n in graph.node if n.op_type == "Mul" for name in n.input
    }


def _random(
    rng: np.random.Generator, shape: tuple[int, ...], norm: tuple[float, float] | None
) -> Weights:
    if norm is not None:
        centre, spread = norm
    elif len(shape) < 2:
        centre, spread = 0.0, 0.01
    else:
        # He et al. 2015: what keeps the variance through a ReLU.
        centre, spread = 0.0, math.sqrt(2.0 / math.prod(shape[1:]))
    return (centre + spread * rng.standard_normal(shape)).astype(np.float32)


def _free_batch(graph: Any) -> None:
    """Make the first dimension of input, outputs and activations variable."""
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "rows"
    weights = {i.name for i in graph.initializer}
    targets = {
        n.input[1] for n in graph.node if n.op_type == "Reshape" and n.input[0] not in weights
    }
    for initializer in graph.initializer:
        if initializer.name in targets:
            shape = numpy_helper.to_array(initializer).copy()
            shape[0] = -1
            initializer.CopyFrom(numpy_helper.from_array(shape, initializer.name))
    del graph.value_info[:]


def _end_with_softmax(graph: Any) -> None:
    """Of all these graphs, DenseNet's alone ends with scores."""
    scores = graph.output[0].name
    if graph.node[-1].op_type != "Softmax":
        graph.output[0].name = f"{scores}_softmax"
        graph.node.append(helper.make_node("Softmax", [scores], [graph.output[0].name], axis=1))


def _rename(graph: Any) -> None:
    names = {graph.input[0].name: INPUT, graph.output[0].name: OUTPUT}
    graph.input[0].name, graph.output[0].name = INPUT, OUTPUT
    for node in graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
