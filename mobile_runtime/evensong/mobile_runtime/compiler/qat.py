"""Quantisation-aware training: fine-tune a model in torch under the arithmetic that the engine will use.

The frozen graph that :class:`PostTrainingInt8` would make is run as a torch module. While training, weights and
activations are rounded to their grids with straight-through gradients (Jacob et al., CVPR 2018; Bengio et al. 2013);
in evaluation mode every integer operation is computed exactly, so that the result is bit for bit what the engine gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from evensong.mobile_runtime.compiler import torch_ops
from evensong.mobile_runtime.compiler.calibrate import Calibrator, PostTrainingInt8
from evensong.mobile_runtime.compiler.export import trace
from evensong.mobile_runtime.compiler.ir import Data, Graph, Node, Value
from evensong.mobile_runtime.compiler.layout import arrange
from evensong.mobile_runtime.compiler.lowering import lower
from evensong.mobile_runtime.compiler.passes import remove_dead, simplify
from evensong.mobile_runtime.compiler.quantize import quantize_frozen, quantize_weights
from evensong.mobile_runtime.compiler.weights import Weights
from evensong.mobile_runtime.errors import UnsupportedOperation
from evensong.wire.program import Region

_WEIGHTED = ("LINEAR", "CONV2D")


class QuantizationAwareTraining(nn.Module):
    """``model`` under int8 arithmetic, ready for any torch training loop; then
    ``compile(model, x, trainable="none", quantize=qat)``.

    Batch norms are folded into the layers before them first, with the statistics that ``model`` has: start from a
    trained model. The ranges of activations stay those of the calibration. ``model`` itself is not changed.

    Args:
        model: any module that ``compile`` takes, with the weights to start from.
        example_inputs: one tensor ``[n, ...]`` for each input.
        settings: how activations are calibrated; its bias correction is left out, since training does better.

    Raises:
        UnsupportedOperation: an operation that the runtime does not have, or that cannot be trained through here.
    """

    def __init__(
        self, model: nn.Module, example_inputs: torch.Tensor | Sequence[torch.Tensor], settings: PostTrainingInt8
    ) -> None:
        super().__init__()
        examples = [example_inputs] if isinstance(example_inputs, torch.Tensor) else list(example_inputs)
        self.settings = replace(settings, bias_correction=False)
        self._graph, self._calibrator = _quantized_graph(model, examples, self.settings)
        check_supported(self._graph)
        self.weights = nn.ParameterDict()
        for node in self._graph.nodes:
            for value in _trained(node):
                self.weights[_key(value)] = nn.Parameter(torch.from_numpy(value.content.copy()))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The model's output ``[n, ...]`` in float32."""
        graph, count = self._graph, len(inputs[0])
        contents: dict[Value, torch.Tensor] = dict(zip(graph.inputs.values(), inputs, strict=True))
        table = _TRAINED if self.training else _EXACT

        def content(value: Value) -> torch.Tensor:
            found = contents.get(value.root)
            if found is None:
                found = contents[value.root] = torch.from_numpy(np.array(value.root.data))
            return found.reshape(_shape(value, count))

        for node in graph.nodes:
            shape = _shape(node.outputs[0], count)
            run = table.get(node.op)
            if run is not None:
                parameters = [self.weights[_key(value)] for value in _trained(node)]
                result = run(node, [content(value) for value in node.inputs], parameters, shape)
            elif node.op in _WEIGHTED:
                trained = [self.weights[_key(value)] for value in _trained(node)]
                operands = trained or [content(value) for value in node.inputs[1:]]
                result = torch_ops.TABLE[node.op](node, [content(node.inputs[0]), *operands], shape)
            else:
                result = torch_ops.TABLE[node.op](node, [content(value) for value in node.inputs], shape)
            made = torch_ops.result_of(node).root
            contents[made] = result.reshape(_shape(made, count))
        return content(graph.outputs["output"])

    def calibrator(self, inputs: Sequence[Value]) -> Calibrator:
        """For ``compile``: the ranges found at the start, and the weights as they are now."""
        del inputs  # ranges are known by how a value is computed
        return self._calibrator.with_weights(self.trained_weights())

    def trained_weights(self) -> dict[str, Data]:
        """Weights and biases in the engine's layout, by the name of the tensor that they replace."""
        return {name.replace("/", "."): value.detach().numpy().copy() for name, value in self.weights.items()}


# --------------------------------------------------------------------------------------------------------------- graph


def _quantized_graph(
    model: nn.Module, examples: list[torch.Tensor], settings: PostTrainingInt8
) -> tuple[Graph, Calibrator]:
    traced = trace(model, examples, training=False)
    weights = Weights(model, [], traced)
    forward = lower(traced, weights, "predict")
    graph, view = forward.graph, forward.output
    graph.outputs["output"] = arrange(graph, view, range(len(view.shape)), "output")
    simplify(graph, lambda value: False)
    calibrator = settings.calibrator(list(graph.inputs.values()))
    quantize_frozen(graph, calibrator, set())
    remove_dead(graph)
    return graph, calibrator


def check_supported(graph: Graph) -> None:
    """Raises :class:`UnsupportedOperation` for an operation that has no torch form here."""
    for node in graph.nodes:
        if node.op not in _TRAINED and node.op not in torch_ops.TABLE:
            raise UnsupportedOperation(
                f"quantisation-aware training cannot go through {node.op} ({node.place})",
                expected=sorted({*_TRAINED, *torch_ops.TABLE}),
                got=node.op,
                fix="Train the model in float32 and quantise it afterwards: PostTrainingInt8.",
            )


def _trained(node: Node) -> list[Value]:
    """The weight and the bias of a layer that the module trains."""
    layer = node.source or node
    if layer.op not in _WEIGHTED or any(value.root.region != Region.CONST for value in layer.inputs[1:]):
        return []
    return layer.inputs[1:]


def _key(value: Value) -> str:
    return value.root.name.replace(".", "/")  # torch allows no dot in a parameter's name


def _shape(value: Value, count: int) -> tuple[int, ...]:
    return (value.dims[0] * count, *value.dims[1:]) if value.batched else value.dims


# ------------------------------------------------------------------------------------------------------------ training
# int8 values are float32 tensors of the reals that they stand for.

Tensors = Sequence[torch.Tensor]
Run = Callable[[Node, Tensors, Tensors, tuple[int, ...]], torch.Tensor]


def _on_grid(real: torch.Tensor, y: Value, lo: float = -128, hi: float = 127) -> torch.Tensor:
    """``real`` rounded to ``y``'s grid and clamped; the gradient passes where nothing was clamped."""
    clamped = real.clamp((lo - y.zero_point) * y.scale, (hi - y.zero_point) * y.scale)
    return clamped + (torch.round(clamped / y.scale) * y.scale - clamped).detach()


def _weight_on_grid(node: Node, parameters: Tensors) -> torch.Tensor:
    x, y = node.inputs[0], node.outputs[0]
    weight = parameters[0]
    stored, _, multiplier = quantize_weights(*_float64(parameters), x, y)
    scale = multiplier.astype(np.float64) * y.scale / x.scale
    rounded = stored * scale.reshape((-1,) + (1,) * (stored.ndim - 1))
    return weight + (torch.from_numpy(rounded.astype(np.float32)) - weight).detach()


def _fake_layer(node: Node, operands: Tensors, parameters: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    weight, bias = _weight_on_grid(node, parameters), parameters[1] if len(parameters) > 1 else None
    if node.op == "QLINEAR":
        real = torch_ops.linear(node, operands[0], weight, bias)
    else:
        real = torch_ops.conv2d(node, operands[0], weight, bias, shape)
    return _on_grid(real, node.outputs[0], node.attrs["lo"], node.attrs["hi"])


def _fake_add(node: Node, operands: Tensors, parameters: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    a, b = operands
    return _on_grid(a.reshape(-1) + b.reshape(-1), node.outputs[0], node.attrs["lo"], node.attrs["hi"])


def _fake_avg_pool(node: Node, operands: Tensors, parameters: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    sums, counts = torch_ops.window_sums(node, operands[0], shape)
    return _on_grid(sums / counts, node.outputs[0])


def _fake_table(node: Node, operands: Tensors, parameters: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    real = operands[0]
    if node.source is not None:
        real = torch_ops.TABLE[node.source.op](node.source, [real], shape)
    return _on_grid(real, node.outputs[0])


_TRAINED: Mapping[str, Run] = {
    "QUANTIZE": lambda node, operands, parameters, shape: _on_grid(operands[0], node.outputs[0]),
    "DEQUANTIZE": lambda node, operands, parameters, shape: operands[0],
    "QLINEAR": _fake_layer,
    "QCONV2D": _fake_layer,
    "QADD": _fake_add,
    "QMAX_POOL2D": lambda node, operands, parameters, shape: torch_ops.max_pool2d(node, operands[0], shape),
    "QAVG_POOL2D": _fake_avg_pool,
    "QLUT": _fake_table,
}

# --------------------------------------------------------------------------------------------------------------- exact
# int8 values are float32 tensors of the stored integers; docs/artifact.md has the formulas.


def _requantized(real: torch.Tensor, y: Value, lo: float = -128, hi: float = 127) -> torch.Tensor:
    """``clamp(rne(real) + zero_point, lo, hi)``."""
    return (torch.round(real) + y.zero_point).clamp(lo, hi)


def _exact_layer(node: Node, operands: Tensors, parameters: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    x, y = node.inputs[0], node.outputs[0]
    stored, offset, multiplier = (torch.from_numpy(a) for a in quantize_weights(*_float64(parameters), x, y))
    if node.op == "QLINEAR":
        sums = torch_ops.linear(node, operands[0].double(), stored.double(), None)
    else:
        sums = torch_ops.conv2d(node, operands[0].double(), stored.double(), None, shape, padding=x.zero_point)
    total = (torch.round(sums).to(torch.int64) + offset).to(torch.int32).to(torch.float32)
    return _requantized(total * multiplier, y, node.attrs["lo"], node.attrs["hi"])


def _exact_add(node: Node, operands: Tensors, parameters: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    scaled = [
        (operand.reshape(-1) - value.zero_point) * _float32(node.attrs[name])
        for operand, value, name in zip(operands, node.inputs, ("scale_a", "scale_b"), strict=True)
    ]
    return _requantized(scaled[0] + scaled[1], node.outputs[0], node.attrs["lo"], node.attrs["hi"])


def _exact_avg_pool(node: Node, operands: Tensors, parameters: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    sums, counts = torch_ops.window_sums(node, operands[0].double() - node.inputs[0].zero_point, shape)
    factor = torch.div(torch.tensor(node.attrs["ratio"], dtype=torch.float32), counts.float())
    return _requantized(torch.round(sums).float() * factor, node.outputs[0])


def _exact_table(node: Node, operands: Tensors, parameters: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    return operands[1].float()[operands[0].long() + 128]


def _exact_quantize(node: Node, operands: Tensors, parameters: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    y = node.outputs[0]
    return _requantized(operands[0] * _float32(np.float32(1) / np.float32(y.scale)), y)


def _exact_dequantize(node: Node, operands: Tensors, parameters: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    x = node.inputs[0]
    return (operands[0] - x.zero_point) * _float32(x.scale)


_EXACT: Mapping[str, Run] = {
    "QUANTIZE": _exact_quantize,
    "DEQUANTIZE": _exact_dequantize,
    "QLINEAR": _exact_layer,
    "QCONV2D": _exact_layer,
    "QADD": _exact_add,
    "QMAX_POOL2D": lambda node, operands, parameters, shape: torch_ops.max_pool2d(node, operands[0], shape),
    "QAVG_POOL2D": _exact_avg_pool,
    "QLUT": _exact_table,
}


def _float32(number: float | np.float32) -> float:
    """``number`` rounded to float32, for a product with a float32 tensor."""
    return float(np.float32(number))


def _float64(parameters: Tensors) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    weight = parameters[0].detach().numpy().astype(np.float64)
    bias = parameters[1].detach().numpy().astype(np.float64) if len(parameters) > 1 else np.zeros(len(weight))
    return weight, bias
