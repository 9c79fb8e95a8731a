"""Bias correction: rounding weights and inputs moves the mean of a layer's result, channel by channel, and a bias can
take that back (Nagel et al., *Data-free quantization through weight equalization and bias correction*, ICCV 2019;
here the means are measured on calibration examples).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.compiler.interpret import Interpreter
from evensong.mobile_runtime.compiler.ir import Data, Node, Value, constant
from evensong.wire.program import Activation

EXAMPLES = 32  #: calibration examples that the means are taken over
MOST_BIAS = (1 << 30) - 1

Means = npt.NDArray[np.float64]


def correct_biases(float_nodes: Sequence[Node], nodes: Sequence[Node], ports: Mapping[Value, Data]) -> None:
    """Edits the biases of the quantised layers among ``nodes``, in order: each sees its inputs as they now are.

    ``float_nodes`` are the same part of the graph before it was quantised.
    """
    wanted = _float_means(float_nodes, ports)
    run = Interpreter(ports)
    for node in nodes:
        if not run.knows(node):
            continue
        if node.source is not None and node.source.outputs[0].root in wanted:
            _correct(run, node, wanted[node.source.outputs[0].root])
        run.run(node)


def _float_means(nodes: Sequence[Node], ports: Mapping[Value, Data]) -> dict[Value, Means]:
    """The mean of each channel of each layer's result, before its activation."""
    run = Interpreter(ports)
    means: dict[Value, Means] = {}
    for node in nodes:
        if node.op in ("LINEAR", "CONV2D"):
            means[node.outputs[0].root] = _channel_means(run.compute(node, activation=Activation.NONE)[0])
        run.run(node)
    return means


def _correct(run: Interpreter, node: Node, wanted: Means) -> None:
    layer, (x, w, bias, multiplier) = node.source, node.inputs
    if layer is None:
        raise AssertionError(f"{node.op} without its float32 layer")
    step = multiplier.content.astype(np.float64) * node.outputs[0].scale  # of one unit of the sum, by channel
    weight = w.content.astype(np.float64) * (step / x.scale).reshape((-1,) + (1,) * (w.content.ndim - 1))
    reals = (run.content(x).astype(np.float64) - x.zero_point) * x.scale
    folded = bias.content + float(x.zero_point) * w.content.reshape(len(step), -1).sum(axis=1, dtype=np.float64)
    given = run.compute(layer, reals, weight, folded * step, activation=Activation.NONE)[0]
    moved = bias.content - np.rint((_channel_means(given) - wanted) / step)
    node.inputs[2] = constant(np.clip(moved, -MOST_BIAS, MOST_BIAS).astype(np.int32), bias.name)


def _channel_means(result: Data) -> Means:
    channels = result.shape[-1]
    means: Means = result.astype(np.float64).reshape(-1, channels).mean(axis=0)
    return means
