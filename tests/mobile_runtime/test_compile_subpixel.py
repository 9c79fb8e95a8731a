"""Transposed convolutions in int8: as ordinary convolutions over the small image, with the same results."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from compile_harness import ENGINES

from evensong.mobile_runtime import load
from evensong.mobile_runtime.compiler import PostTrainingInt8, compile
from evensong.mobile_runtime.compiler.interpret import Interpreter
from evensong.mobile_runtime.compiler.ir import Graph, Value, constant
from evensong.mobile_runtime.compiler.subpixel import as_subpixel_convolutions
from evensong.wire.program import Activation

pytestmark = pytest.mark.torch


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_both_forms_give_the_same_image(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    kernel, stride = (draw(1, 5), draw(1, 5)), (draw(1, 3), draw(1, 3))
    image, pad = (draw(1, 4), draw(1, 4)), (draw(0, kernel[0] - 1), draw(0, kernel[1] - 1))
    size = [
        max(1, (image[a] - 1) * stride[a] + kernel[a] - pad[a] - draw(0, kernel[a] - 1) + draw(0, stride[a] - 1))
        for a in (0, 1)
    ]
    depthwise = data.draw(st.booleans())
    inputs = draw(1, 4)
    outputs = inputs if depthwise else draw(1, 4)
    rng = np.random.default_rng(draw(0, 1 << 30))
    weight = rng.normal(size=(inputs, *kernel, 1 if depthwise else outputs)).astype(np.float32)
    graph = Graph("predict")
    x = graph.inputs["x"] = Value((1, *image, inputs), batched=True)
    y = Value((1, *size, outputs), batched=True)
    geometry = {"stride_h": stride[0], "stride_w": stride[1], "pad_top": pad[0], "pad_left": pad[1]}
    attrs = {**geometry, "dilation_h": 1, "dilation_w": 1, "groups": inputs if depthwise else 1}
    graph.add("CONV2D_GRAD_INPUT", [x, constant(weight)], [y], **attrs)
    for op in ["ADD", "UNARY"][: draw(0, 2)]:
        before, y = y, y.like()
        if op == "ADD":
            graph.add("ADD", [before, constant(rng.normal(size=outputs).astype(np.float32))], [y])
        else:
            graph.add("UNARY", [before], [y], kind=Activation.RELU)
    graph.outputs["output"] = y
    examples = {x: rng.normal(size=(3, *image, inputs))}
    expected = _run(graph, examples)
    frozen = as_subpixel_convolutions(graph, list(graph.nodes))
    assert frozen == graph.nodes and {node.op for node in frozen} <= {"CONV2D", "TRANSPOSE", "SLICE"}
    np.testing.assert_allclose(_run(graph, examples), expected, atol=1e-5)


def _run(graph: Graph, examples: dict[Value, np.ndarray]) -> np.ndarray:
    run = Interpreter(examples)
    for node in graph.nodes:
        run.run(node)
    return run.content(graph.outputs["output"])


def test_a_decoder_runs_in_integers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6),
        nn.Conv2d(6, 2, 1),
    )
    x = torch.randn(64, 2, 8, 6)
    artifact = compile(model, x[:1], trainable="none", quantize=PostTrainingInt8(x, activations="minmax"))
    operations = {op.name for op in artifact.artifact.program("predict").ops}
    assert operations <= {"QUANTIZE", "QCONV2D", "TRANSPOSE", "SLICE", "DEQUANTIZE"}
    with torch.no_grad():
        expected = model(x).numpy()
    sessions = [load(artifact, engine=engine) for engine in ENGINES]
    results = [session.predict(x.numpy()) for session in sessions]
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    assert np.abs(results[0] - expected).mean() < 0.03 * np.abs(expected).max()
