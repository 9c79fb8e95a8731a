"""ATen calls of one operand, element by element, and softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evensong.mobile_runtime.compiler.builder import Builder
from evensong.mobile_runtime.compiler.layout import View, last
from evensong.wire.program import Activation

Number = int | float


def unary(b: Builder, x: View, kind: Activation) -> View:
    """One function of each element."""
    x = b.real(x)
    return View(b.emit("UNARY", [x.value], x.value.dims, kind=kind), x.shape, x.order)


def _unary(kind: Activation) -> Callable[[Builder, View], View]:
    return lambda b, x: unary(b, x, kind)


def gelu(b: Builder, x: View, *, approximate: str = "none") -> View:
    """GELU, exact or by tanh."""
    return unary(b, x, Activation.GELU_TANH if approximate == "tanh" else Activation.GELU)


def hardsigmoid(b: Builder, x: View) -> View:
    """``relu6(x + 3) / 6``."""
    return scale(b, unary(b, scale(b, x, 1.0, 3.0), Activation.RELU6), 1 / 6, 0.0)


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


_FUNCTIONS = {
    "relu": Activation.RELU,
    "relu6": Activation.RELU6,
    "hardswish": Activation.HARDSWISH,
    "sigmoid": Activation.SIGMOID,
    "tanh": Activation.TANH,
    "silu": Activation.SILU,
    "exp": Activation.EXP,
    "log": Activation.LOG,
    "sqrt": Activation.SQRT,
    "reciprocal": Activation.RECIPROCAL,
}

TABLE: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}.default": _unary(kind) for name, kind in _FUNCTIONS.items()},
    **{f"aten.{name}_.default": _unary(kind) for name, kind in _FUNCTIONS.items()},
    "aten.gelu.default": gelu,
    "aten.hardsigmoid.default": hardsigmoid,
    "aten.softmax.int": softmax,
    "aten.log_softmax.int": log_softmax,
}
