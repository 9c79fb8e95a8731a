"""ATen calls that work element by element, with broadcasting, and softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evensong.mobile_runtime.compiler.builder import Builder, require
from evensong.mobile_runtime.compiler.ir import Value
from evensong.mobile_runtime.compiler.layout import View, last
from evensong.wire.program import Activation

Number = int | float


def _unary(kind: Activation) -> Callable[[Builder, View], View]:
    def lowering(b: Builder, x: View) -> View:
        x = b.real(x)
        return View(b.emit("UNARY", [x.value], x.value.dims, kind=kind), x.shape, x.order)

    return lowering


def gelu(b: Builder, x: View, *, approximate: str = "none") -> View:
    """GELU, exact or by tanh."""
    return _unary(Activation.GELU_TANH if approximate == "tanh" else Activation.GELU)(b, x)


def hardtanh(b: Builder, x: View, low: Number = -1, high: Number = 1) -> View:
    """``hardtanh(0, 6)``, which is ReLU6."""
    require((low, high) == (0, 6), "hardtanh with other bounds", expected="(0, 6)", got=(low, high))
    return _unary(Activation.RELU6)(b, x)


def hardsigmoid(b: Builder, x: View) -> View:
    """``relu6(x + 3) / 6``."""
    return scale(b, _unary(Activation.RELU6)(b, scale(b, x, 1.0, 3.0)), 1 / 6, 0.0)


def leaky_relu(b: Builder, x: View, negative_slope: Number = 0.01) -> View:
    """``slope x + (1 - slope) relu(x)``."""
    slope = float(negative_slope)
    positive = scale(b, _unary(Activation.RELU)(b, x), 1 - slope, 0.0)
    return _binary(b, "ADD", positive, scale(b, x, slope, 0.0))


def clamp(b: Builder, x: View, low: Number | None = None, high: Number | None = None) -> View:
    """``clamp(min=0)`` and ``clamp(0, 6)``."""
    require(low == 0 and high in (None, 6), "clamp with other bounds", expected="(0, None) or (0, 6)", got=(low, high))
    return _unary(Activation.RELU if high is None else Activation.RELU6)(b, x)


def add(b: Builder, x: Any, y: Any, *, alpha: Number = 1) -> View:
    """``x + alpha y``."""
    if isinstance(y, Number):
        return scale(b, x, 1.0, float(alpha * y))
    if isinstance(x, Number):
        return scale(b, y, float(alpha), float(x))
    return _binary(b, "ADD", x, y if alpha == 1 else scale(b, y, float(alpha), 0.0))


def sub(b: Builder, x: Any, y: Any, *, alpha: Number = 1) -> View:
    """``x - alpha y``."""
    if isinstance(x, Number) or isinstance(y, Number) or alpha != 1:
        return add(b, x, y, alpha=-alpha)
    if x.value.batched or not y.value.batched:
        return _binary(b, "SUB", x, y)
    return _binary(b, "ADD", scale(b, y, -1.0, 0.0), x)


def rsub(b: Builder, x: Any, y: Any, alpha: Number = 1) -> View:
    """``y - alpha x``."""
    return sub(b, y, x, alpha=alpha)


def mul(b: Builder, x: Any, y: Any) -> View:
    """``x * y``."""
    if isinstance(y, Number):
        return scale(b, x, float(y), 0.0)
    if isinstance(x, Number):
        return scale(b, y, float(x), 0.0)
    return _binary(b, "MUL", x, y)


def div(b: Builder, x: View, y: Any) -> View:
    """``x / number``."""
    require(isinstance(y, Number), "division by a tensor", fix="Divide by a number, or multiply by the inverse.")
    return scale(b, x, 1.0 / y, 0.0)


def neg(b: Builder, x: View) -> View:
    """``-x``."""
    return scale(b, x, -1.0, 0.0)


def power(b: Builder, x: View, exponent: Any) -> View:
    """``x ** 2``."""
    require(exponent == 2, "a power other than 2", got=exponent)
    return _binary(b, "MUL", x, x)


def scale(b: Builder, x: View, alpha: float, beta: float) -> View:
    """``alpha x + beta``."""
    x = b.real(x)
    if (alpha, beta) == (1.0, 0.0):
        return x
    return View(b.emit("SCALE", [x.value], x.value.dims, alpha=alpha, beta=beta), x.shape, x.order)


def softmax(b: Builder, x: View, dim: int, dtype: Any = None) -> View:
    """Softmax over one axis."""
    return _softmax(b, "SOFTMAX", x, dim)


def log_softmax(b: Builder, x: View, dim: int, dtype: Any = None) -> View:
    """Logarithm of softmax over one axis."""
    return _softmax(b, "LOG_SOFTMAX", x, dim)


def _softmax(b: Builder, op: str, x: View, dim: int) -> View:
    order = last(x, b.example_axis(x, dim, "softmax"))
    operand = b.arrange(x, order)
    return View(b.emit(op, [operand], operand.dims), x.shape, order)


def _binary(b: Builder, op: str, x: View, y: View) -> View:
    """Element-wise with broadcasting: the fuller operand goes first, the other may be a row of it."""
    if op != "SUB" and _fullness(y) > _fullness(x):
        x, y = y, x
    x, y = _padded(b.real(x), len(b.shape)), _padded(b.real(y), len(b.shape))
    require(
        x.shape == b.shape, "broadcasting of both operands", expected=f"one operand of shape {b.shape}", got=x.shape
    )
    if y.shape == x.shape and y.value.batched == x.value.batched:
        order = x.order
        left, right = b.arrange(x, order), b.arrange(y, order)
    elif not y.value.batched:
        # the axes that y varies over must be the innermost ones of x
        varies = [axis for axis in x.order if y.shape[axis] != 1]
        order = (*(axis for axis in x.order if axis not in varies), *varies)
        left = b.arrange(x, order)
        right = b.arrange(y, order).reshaped(tuple(y.shape[axis] for axis in varies) or (1,))
    else:
        return _per_example(b, op, x, y)
    return View(b.emit(op, [left, right], left.dims), b.shape, order)


def _per_example(b: Builder, op: str, x: View, y: View) -> View:
    """``y`` repeats along axes of every example (a squeeze-and-excitation gate, a mask): it is spread out first."""
    require(y.batch_axis == x.batch_axis, "broadcasting along the batch axis")
    axes = [axis for axis in x.order if y.shape[axis] == 1 and x.shape[axis] != 1]
    at = x.order.index(axes[0])
    order = (*(a for a in x.order[:at] if a not in axes), *axes, *(a for a in x.order[at:] if a not in axes))
    left, narrow = b.arrange(x, order), b.arrange(y, order)
    size, inner = 1, 1
    for axis in axes:
        size *= x.shape[axis]
    for axis in order[order.index(axes[-1]) + 1 :]:
        inner *= x.shape[axis]
    # REDUCE_MEAN_GRAD is the spreading kernel: it divides by the size, so the small operand is multiplied first
    scaled = b.emit("SCALE", [narrow], narrow.dims, alpha=float(size), beta=0.0)
    wide = b.emit("REDUCE_MEAN_GRAD", [scaled], left.dims, axis_size=size, inner_size=inner)
    return View(b.emit(op, [left, wide], left.dims), b.shape, order)


def _fullness(view: View) -> tuple[bool, int]:
    return view.value.batched, view.value.elements


def _padded(view: View, rank: int) -> View:
    """With leading axes of size one, so that both operands have the same axes."""
    missing = rank - len(view.shape)
    if not missing:
        return view
    require(not view.value.batched, "broadcasting that adds axes before the batch")
    shape = (1,) * missing + view.shape
    order = (*range(missing), *(axis + missing for axis in view.order))
    value: Value = view.value.reshaped(tuple(shape[axis] for axis in order))
    return View(value, shape, order)


_ACTIVATIONS = {
    "relu": Activation.RELU,
    "relu6": Activation.RELU6,
    "hardswish": Activation.HARDSWISH,
    "sigmoid": Activation.SIGMOID,
    "tanh": Activation.TANH,
    "silu": Activation.SILU,
}

TABLE: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}.default": _unary(kind) for name, kind in _ACTIVATIONS.items()},
    **{f"aten.{name}_.default": _unary(kind) for name, kind in _ACTIVATIONS.items()},
    "aten.gelu.default": gelu,
    "aten.hardsigmoid.default": hardsigmoid,
    "aten.hardtanh.default": hardtanh,
    "aten.hardtanh_.default": hardtanh,
    "aten.leaky_relu.default": leaky_relu,
    "aten.leaky_relu_.default": leaky_relu,
    "aten.clamp.default": clamp,
    "aten.clamp_min.default": clamp,
    "aten.add.Tensor": add,
    "aten.add.Scalar": add,
    "aten.add_.Tensor": add,
    "aten.sub.Tensor": sub,
    "aten.sub.Scalar": sub,
    "aten.sub_.Tensor": sub,
    "aten.rsub.Tensor": rsub,
    "aten.rsub.Scalar": rsub,
    "aten.mul.Tensor": mul,
    "aten.mul.Scalar": mul,
    "aten.mul_.Tensor": mul,
    "aten.div.Tensor": div,
    "aten.div.Scalar": div,
    "aten.div_.Tensor": div,
    "aten.neg.default": neg,
    "aten.pow.Tensor_Scalar": power,
    "aten.square.default": lambda b, x: power(b, x, 2),
    "aten.softmax.int": softmax,
    "aten.log_softmax.int": log_softmax,
}
