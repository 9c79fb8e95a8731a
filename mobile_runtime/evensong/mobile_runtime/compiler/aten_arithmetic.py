"""ATen calls of two operands, element by element, with broadcasting; and masks that no example changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.compiler.aten_pointwise import Number, scale, unary
from evensong.mobile_runtime.compiler.builder import Builder, require
from evensong.mobile_runtime.compiler.ir import Value, constant
from evensong.mobile_runtime.compiler.layout import PROBE_BATCH, View, canonical
from evensong.mobile_runtime.compiler.weights import FAR
from evensong.wire.program import Activation, Region

Floats = npt.NDArray[np.float32]

_POWERS = (-2, -1, -0.5, 0.5, 1, 1.5, 2, 3, 4)


def add(b: Builder, x: Any, y: Any, *, alpha: Number = 1) -> View:
    """``x + alpha y``."""
    if isinstance(y, Number):
        return scale(b, x, 1.0, float(alpha * y))
    if isinstance(x, Number):
        return scale(b, y, float(alpha), float(x))
    return binary(b, "ADD", x, y if alpha == 1 else scale(b, y, float(alpha), 0.0))


def sub(b: Builder, x: Any, y: Any, *, alpha: Number = 1) -> View:
    """``x - alpha y``."""
    if isinstance(x, Number) or isinstance(y, Number) or alpha != 1:
        return add(b, x, y, alpha=-alpha)
    if x.value.batched or not y.value.batched:
        return binary(b, "SUB", x, y)
    return binary(b, "ADD", scale(b, y, -1.0, 0.0), x)


def rsub(b: Builder, x: Any, y: Any, alpha: Number = 1) -> View:
    """``y - alpha x``."""
    return sub(b, y, x, alpha=alpha)


def mul(b: Builder, x: Any, y: Any) -> View:
    """``x * y``."""
    if isinstance(y, Number):
        return scale(b, x, float(y), 0.0)
    if isinstance(x, Number):
        return scale(b, y, float(x), 0.0)
    return binary(b, "MUL", x, y)


def div(b: Builder, x: View, y: Any) -> View:
    """``x / y``."""
    if isinstance(y, Number):
        return scale(b, x, 1.0 / y, 0.0)
    return mul(b, x, unary(b, y, Activation.RECIPROCAL))


def neg(b: Builder, x: View) -> View:
    """``-x``."""
    return scale(b, x, -1.0, 0.0)


def power(b: Builder, x: View, exponent: Any) -> View:
    """``x ** exponent`` for the exponents of :data:`_POWERS`."""
    require(exponent in _POWERS, "a power", expected=f"an exponent of {_POWERS}", got=exponent)
    if exponent < 0:
        return unary(b, power(b, x, -exponent), Activation.RECIPROCAL)
    result = unary(b, x, Activation.SQRT) if exponent % 1 else None
    for _ in range(int(exponent)):
        result = x if result is None else mul(b, result, x)
    if result is None:
        raise AssertionError(exponent)
    return result


def maximum(b: Builder, x: View, y: View) -> View:
    """The larger of both."""
    return binary(b, "MAXIMUM", x, y)


def minimum(b: Builder, x: View, y: View) -> View:
    """The smaller of both."""
    return binary(b, "MINIMUM", x, y)


def clamp(b: Builder, x: View, low: Number | None = None, high: Number | None = None) -> View:
    """``x`` within two numbers; with bounds (0, none) and (0, 6) what can be fused into the layer before."""
    if low == 0 and high in (None, 6):
        return unary(b, x, Activation.RELU if high is None else Activation.RELU6)
    for op, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        if bound is not None:
            x = binary(b, op, x, _scalar(bound))
    return x


def clamp_max(b: Builder, x: View, high: Number) -> View:
    """The smaller of ``x`` and a number."""
    return clamp(b, x, None, high)


def hardtanh(b: Builder, x: View, low: Number = -1, high: Number = 1) -> View:
    """``x`` within two numbers."""
    return clamp(b, x, low, high)


def leaky_relu(b: Builder, x: View, negative_slope: Number = 0.01) -> View:
    """``slope x + (1 - slope) relu(x)``."""
    slope = float(negative_slope)
    positive = scale(b, unary(b, x, Activation.RELU), 1 - slope, 0.0)
    return binary(b, "ADD", positive, scale(b, x, slope, 0.0))


def sign(b: Builder, x: View) -> View:
    """-1, 0 or 1; it has no gradient."""
    return scale(b, binary(b, "STEP", x, _scalar(0.0), at_equal=0.5), 2.0, -1.0)


def absolute(b: Builder, x: View) -> View:
    """``x sign(x)``, so that the gradient at zero is zero."""
    return mul(b, x, sign(b, x))


def elu(b: Builder, x: View, alpha: Number = 1, factor: Number = 1, input_scale: Number = 1) -> View:
    """``relu(x) + alpha (exp(min(x, 0)) - 1)``."""
    require((factor, input_scale) == (1, 1), "an ELU with scales")
    left = unary(b, binary(b, "MINIMUM", x, _scalar(0.0)), Activation.EXP)
    return binary(b, "ADD", unary(b, x, Activation.RELU), scale(b, left, float(alpha), -float(alpha)))


def prelu(b: Builder, x: View, slope: View) -> View:
    """``relu(x) + slope min(x, 0)``, one slope or one for each channel."""
    shape = (slope.shape[0], *(1,) * (len(x.shape) - 2))
    along_channels = canonical(slope.value.reshaped(shape), shape)
    negative = mul(b, binary(b, "MINIMUM", x, _scalar(0.0)), along_channels)
    return binary(b, "ADD", unary(b, x, Activation.RELU), negative)


def where(b: Builder, condition: View, x: Any, y: Any) -> View:
    """``x`` where a mask that no example changes is set, else ``y``."""
    mask = _mask(condition)
    return binary(b, "ADD", _masked(b, x, mask), _masked(b, y, 1 - mask))


def masked_fill(b: Builder, x: View, condition: View, value: Any) -> View:
    """``x`` but for ``value`` where a mask that no example changes is set."""
    return where(b, condition, value, x)


def expand(b: Builder, x: View, *sizes: Any, **options: Any) -> View:
    """Repeats axes of size one."""
    x = padded(x, len(b.shape))
    axes = [axis for axis in x.order if x.shape[axis] == 1 and b.shape[axis] != 1]
    if not x.value.batched and PROBE_BATCH in [b.shape[axis] for axis in axes]:
        x = for_each_example(b, x, next(axis for axis in axes if b.shape[axis] == PROBE_BATCH))
        axes = [axis for axis in axes if x.shape[axis] == 1]
    if not axes:
        return x
    require(x.value.batched, "an expansion of something that every example shares", fix="Leave it to broadcasting.")
    return spread(b, x, b.shape, axes, x.order)


def filled_like(value: float) -> Callable[..., View]:
    """``zeros_like`` and ``ones_like``."""
    return lambda b, x, **options: canonical(constant(np.full(b.shape, value, np.float32)), b.shape)


def for_each_example(b: Builder, x: View, axis: int) -> View:
    """What every example shares (a class token) once for each of them, along ``axis``, which has size one."""
    order = (axis, *(a for a in x.order if a != axis))
    row = b.arrange(x, order)
    zeros = Value(row.dims, batched=True, name=b.place)
    b.graph.add("FILL", [], [zeros], b.place, value=0.0)
    shape = tuple(PROBE_BATCH if a == axis else size for a, size in enumerate(x.shape))
    return View(b.emit("ADD", [zeros, row], row.dims), shape, order)


def shared_row(view: View, axis: int) -> View:
    """A constant that was made with the batch's size along ``axis``, with size one there."""
    if view.value.batched or view.shape[axis] != PROBE_BATCH:
        return view
    content = _author(view)
    row = content.take([0], axis)
    require(bool((content == row).all()), "a constant that differs from example to example")
    return canonical(constant(row, view.value.name), row.shape)


# --------------------------------------------------------------------------------------------------------- broadcasting


def binary(b: Builder, op: str, x: View, y: View, **attrs: float) -> View:
    """Element-wise with broadcasting: the fuller operand goes first, the other may be a row of it."""
    if op not in ("SUB", "STEP") and _fullness(y) > _fullness(x):
        x, y = y, x
    rank = max(len(x.shape), len(y.shape))
    x, y = padded(b.real(x), rank), padded(b.real(y), rank)
    if x.batch_axis is not None:
        y = shared_row(y, x.batch_axis)
    shape = tuple(map(max, x.shape, y.shape))
    if x.shape != shape and y.shape != shape and x.value.batched:
        x = spread(b, x, shape, [axis for axis in x.order if x.shape[axis] != shape[axis]], x.order)
    require(x.shape == shape, "broadcasting of both operands", expected=f"one operand of shape {shape}", got=x.shape)
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
        require(y.batch_axis == x.batch_axis, "broadcasting along the batch axis")
        wide = spread(b, y, shape, [axis for axis in x.order if y.shape[axis] == 1 and x.shape[axis] != 1], x.order)
        left, right = b.arrange(x, wide.order), wide.value
        order = wide.order
    return View(b.emit(op, [left, right], left.dims, **attrs), shape, order)


def spread(b: Builder, y: View, shape: tuple[int, ...], axes: Sequence[int], order: Sequence[int]) -> View:
    """``y`` of every example (a squeeze-and-excitation gate, a mean) repeated along ``axes``, in about that order."""
    at = order.index(axes[0])
    before, after = ([a for a in part if a not in axes] for part in (order[:at], order[at:]))
    chosen = (*before, *axes, *after)
    narrow = b.arrange(y, chosen)
    size = math.prod(shape[axis] for axis in axes)
    inner = math.prod(shape[axis] for axis in after)
    dims = View(narrow, shape, chosen).dims(chosen)
    # REDUCE_MEAN_GRAD is the spreading kernel: it divides by the size, so the small operand is multiplied first
    scaled = b.emit("SCALE", [narrow], narrow.dims, alpha=float(size), beta=0.0)
    return View(b.emit("REDUCE_MEAN_GRAD", [scaled], dims, axis_size=size, inner_size=inner), shape, chosen)


def padded(view: View, rank: int) -> View:
    """With leading axes of size one, so that both operands have the same axes."""
    missing = rank - len(view.shape)
    if not missing:
        return view
    require(not view.value.batched, "broadcasting that adds axes before the batch")
    shape = (1,) * missing + view.shape
    order = (*range(missing), *(axis + missing for axis in view.order))
    value: Value = view.value.reshaped(tuple(shape[axis] for axis in order))
    return View(value, shape, order)


def _fullness(view: View) -> tuple[bool, int]:
    return view.value.batched, view.value.elements


# ------------------------------------------------------------------------------------------------------------- helpers


def _scalar(number: Number) -> View:
    return canonical(constant(np.array([number], np.float32)), (1,))


def _mask(condition: View) -> Floats:
    """A constant mask as 0 and 1, in the author's order."""
    require(
        condition.value.root.region == Region.CONST, "a mask that is computed from the examples", expected="a constant"
    )
    return np.where(_author(condition) != 0, np.float32(1), np.float32(0))


def _masked(b: Builder, x: Any, factor: Floats) -> View:
    """``x`` times a mask of zeros and ones; infinite numbers become very large ones, so that the others stay zero."""
    if isinstance(x, View) and x.value.root.region != Region.CONST:
        return mul(b, x, canonical(constant(factor, "mask"), factor.shape))
    content = _author(x) if isinstance(x, View) else np.full(1, np.clip(x, -FAR, FAR), np.float32)
    product = content * factor
    return canonical(constant(product, "mask"), product.shape)


def _author(view: View) -> Floats:
    """The content of a constant in the author's order."""
    content = view.value.content.astype(np.float32).reshape([view.shape[axis] for axis in view.order])
    return content.transpose(np.argsort(view.order))


TABLE: dict[str, Callable[..., Any]] = {
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
    "aten.rsqrt.default": lambda b, x: power(b, x, -0.5),
    "aten.maximum.default": maximum,
    "aten.minimum.default": minimum,
    "aten.clamp.default": clamp,
    "aten.clamp_min.default": clamp,
    "aten.clamp_max.default": clamp_max,
    "aten.hardtanh.default": hardtanh,
    "aten.hardtanh_.default": hardtanh,
    "aten.leaky_relu.default": leaky_relu,
    "aten.leaky_relu_.default": leaky_relu,
    "aten.sign.default": sign,
    "aten.abs.default": absolute,
    "aten.elu.default": elu,
    "aten.elu_.default": elu,
    "aten.prelu.default": prelu,
    "aten.where.self": where,
    "aten.where.ScalarSelf": where,
    "aten.where.ScalarOther": where,
    "aten.masked_fill.Scalar": masked_fill,
    "aten.masked_fill.Tensor": masked_fill,
    "aten.masked_fill_.Scalar": masked_fill,
    "aten.zeros_like.default": filled_like(0.0),
    "aten.ones_like.default": filled_like(1.0),
    "aten.expand.default": expand,
    "aten.expand_as.default": expand,
}
