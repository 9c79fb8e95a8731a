"""Linear and convolution kernels of every instruction set against torch in double precision, with both gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from engines import assert_close, needs_native
from hypothesis import example, given, settings
from hypothesis import strategies as st
from one_op import Given, Wanted, instruction_sets, native_machine, run_one

from evensong.wire.program import Activation

torch = pytest.importorskip("torch")
F = torch.nn.functional

pytestmark = [needs_native, pytest.mark.torch]

Floats = npt.NDArray[np.float32]

_ACTIVATIONS = {Activation.NONE: lambda y: y, Activation.RELU: torch.relu, Activation.RELU6: F.relu6}


def draw_values(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def draw_gradient(seed: int, zeros: float, *shape: int) -> Floats:
    """Values of which a share is zero, as behind a ReLU or max pooling: kernels visit only the others then."""
    kept = np.random.default_rng(seed).random(shape, np.float32) >= zeros
    return draw_values(seed + 1, *shape) * kept


_zeros = st.sampled_from([0.0, 0.5, 0.9, 1.0])  #: share of a gradient


def check(op: str, inputs: list[Given | Floats], expected: list[tuple[Floats, bool]], **options: object) -> None:
    """``expected`` pairs a result with whether it is batched."""
    wanted = [Wanted(value.shape, np.float32, batched) for value, batched in expected]
    for isa in instruction_sets():
        results = run_one(op, inputs, wanted, machine=native_machine(isa), **options)  # type: ignore[arg-type]
        for position, (result, (right, _)) in enumerate(zip(results, expected, strict=True)):
            assert_close(result, right, what=f"result {position} of {op} on {isa}")


def to_numpy(tensor: object) -> Floats:
    values: Floats = tensor.detach().numpy().astype(np.float32)  # type: ignore[attr-defined]
    return values


# --------------------------------------------------------------------------------------------------------------- linear

_rows = st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 600]))
_width = st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 300]))


@settings(max_examples=60, deadline=None)
@given(
    rows=_rows,
    inputs=_width,
    outputs=_width,
    bias=st.booleans(),
    activation=st.sampled_from(list(_ACTIVATIONS)),
    zeros=_zeros,
    spare=st.integers(0, 3),
    seed=st.integers(0, 1 << 16),
)
@example(rows=20, inputs=784, outputs=200, bias=True, activation=Activation.RELU, zeros=0.5, spare=0, seed=0)
@example(rows=1, inputs=512, outputs=10, bias=True, activation=Activation.NONE, zeros=0.0, spare=31, seed=0)
@example(rows=70, inputs=300, outputs=600, bias=True, activation=Activation.NONE, zeros=0.5, spare=0, seed=0)
def test_linear(
    rows: int, inputs: int, outputs: int, bias: bool, activation: Activation, zeros: float, spare: int, seed: int
) -> None:
    x, w, b = draw_values(seed, rows, inputs), draw_values(seed + 1, outputs, inputs), draw_values(seed + 2, outputs)
    dy = draw_gradient(seed + 3, zeros, rows, outputs)
    tx, tw, tb = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, w, b))
    product = F.linear(tx, tw, tb if bias else None)
    product.backward(torch.tensor(dy, dtype=torch.float64))
    batch = {"batch": rows, "max_batch": rows + spare}  # fewer examples than the program was compiled for

    operands: list[Given | Floats] = [Given(x, batched=True), w, *([b] if bias else [])]
    check("LINEAR", operands, [(to_numpy(_ACTIVATIONS[activation](product)), True)], activation=activation, **batch)
    check("LINEAR_GRAD_INPUT", [Given(dy, batched=True), w], [(to_numpy(tx.grad), True)], **batch)
    gradients = [(to_numpy(tw.grad), False), *([(to_numpy(tb.grad), False)] if bias else [])]
    check("LINEAR_GRAD_WEIGHT", [Given(dy, batched=True), Given(x, batched=True)], gradients, **batch)


@pytest.mark.parametrize("rows", [1, 50])
def test_a_nan_survives_the_fused_activation(rows: int) -> None:
    x = np.ones((rows, 3), np.float32)
    x[0, 0] = np.nan
    for isa in instruction_sets():
        (y,) = run_one(
            "LINEAR", [x, np.ones((2, 3), np.float32)], [(rows, 2)], machine=native_machine(isa), activation=1
        )
        assert np.isnan(y[0]).all()


# ---------------------------------------------------------------------------------------------------------- convolution


@dataclass(frozen=True)
class Shape:
    """A convolution; each pair is (vertical, horizontal)."""

    images: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    group_inputs: int
    group_outputs: int


def _pair(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kernel, dilation, padding = draw(_pair(1, 5)), draw(_pair(1, 3)), draw(_pair(0, 5))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(draw(st.integers(max(1, r - 2 * p), 14)) for r, p in zip(reach, padding, strict=True))
    depthwise = draw(st.booleans()) and draw(st.booleans())
    groups = draw(st.integers(1, 20)) if depthwise else draw(st.sampled_from([1, 1, 2, 3]))
    group_inputs = 1 if depthwise else draw(st.integers(1, 18))
    group_outputs = draw(st.integers(1, 2)) if depthwise else draw(st.integers(1, 40))
    return Shape(
        draw(st.integers(1, 3)), size, kernel, draw(_pair(1, 4)), padding, dilation, groups, group_inputs, group_outputs
    )  # type: ignore[arg-type]


@settings(max_examples=120, deadline=None)
@given(
    shape=shapes(),
    bias=st.booleans(),
    activation=st.sampled_from(list(_ACTIVATIONS)),
    zeros=_zeros,
    spare=st.integers(0, 2),
    seed=st.integers(0, 1 << 16),
)
@example(Shape(2, (14, 14), (5, 5), (1, 1), (2, 2), (1, 1), 1, 32, 64), True, Activation.RELU, 0.9, 0, 0)
@example(Shape(2, (9, 13), (5, 4), (2, 3), (4, 4), (2, 1), 1, 19, 75), True, Activation.RELU, 0.9, 0, 0)
@example(Shape(1, (1, 128), (1, 9), (1, 2), (0, 0), (1, 1), 1, 9, 24), True, Activation.NONE, 0.0, 1, 0)
@example(Shape(2, (6, 6), (1, 1), (3, 3), (0, 0), (1, 1), 1, 33, 35), False, Activation.NONE, 0.0, 0, 0)
@example(Shape(1, (9, 9), (3, 3), (2, 2), (1, 1), (1, 1), 48, 1, 1), True, Activation.RELU6, 0.0, 0, 0)
@example(Shape(1, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1, 300, 4), False, Activation.NONE, 0.0, 0, 0)
# Images too large for one band of the workspace, and lines too wide for any.
@example(Shape(1, (30, 20), (3, 3), (1, 1), (1, 1), (1, 1), 1, 64, 48), True, Activation.RELU, 0.0, 0, 0)
@example(Shape(2, (33, 40), (3, 3), (2, 1), (2, 1), (2, 1), 1, 40, 20), True, Activation.RELU6, 0.0, 1, 0)
@example(Shape(1, (3, 200), (3, 3), (1, 1), (1, 1), (1, 1), 1, 64, 70), False, Activation.NONE, 0.0, 0, 0)
def test_convolution(shape: Shape, bias: bool, activation: Activation, zeros: float, spare: int, seed: int) -> None:
    s = shape
    inputs, outputs = s.groups * s.group_inputs, s.groups * s.group_outputs
    x = draw_values(seed, s.images, *s.size, inputs)
    w = draw_values(seed + 1, outputs, *s.kernel, s.group_inputs)
    b = draw_values(seed + 2, outputs)
    tx, tw, tb = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, w, b))
    nchw = F.conv2d(
        tx.permute(0, 3, 1, 2), tw.permute(0, 3, 1, 2), tb if bias else None, s.stride, s.padding, s.dilation, s.groups
    )
    y = nchw.permute(0, 2, 3, 1)
    dy = draw_gradient(seed + 3, zeros, *y.shape)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    options = {
        "stride_h": s.stride[0],
        "stride_w": s.stride[1],
        "pad_top": s.padding[0],
        "pad_left": s.padding[1],
        "dilation_h": s.dilation[0],
        "dilation_w": s.dilation[1],
        "groups": s.groups,
        "batch": s.images,
        "max_batch": s.images + spare,
    }
    operands: list[Given | Floats] = [Given(x, batched=True), w, *([b] if bias else [])]
    check("CONV2D", operands, [(to_numpy(_ACTIVATIONS[activation](y)), True)], activation=activation, **options)
    check("CONV2D_GRAD_INPUT", [Given(dy, batched=True), w], [(to_numpy(tx.grad), True)], **options)
    gradients = [(to_numpy(tw.grad), False), *([(to_numpy(tb.grad), False)] if bias else [])]
    check("CONV2D_GRAD_WEIGHT", [Given(dy, batched=True), Given(x, batched=True)], gradients, **options)
