"""ATen calls that multiply matrices: with weights (linear layers), of two computed tensors, and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evensong.mobile_runtime.compiler.aten_arithmetic import binary
from evensong.mobile_runtime.compiler.aten_layers import addmm, dropout, linear
from evensong.mobile_runtime.compiler.aten_pointwise import scale as scaled
from evensong.mobile_runtime.compiler.aten_pointwise import softmax
from evensong.mobile_runtime.compiler.builder import Builder, require
from evensong.mobile_runtime.compiler.ir import constant
from evensong.mobile_runtime.compiler.layout import View, canonical
from evensong.mobile_runtime.compiler.weights import FAR
from evensong.wire.program import DType, Region


def matmul(b: Builder, x: View, y: View) -> View:
    """``x [..., M, K] @ y [..., K, N]``; one of them may be a matrix that no example changes."""
    if len(y.shape) == 2 and not y.value.batched:
        return linear(b, x, transposed(y))
    if len(x.shape) == 2 and not x.value.batched and len(y.shape) > 2:
        flipped = b.shape
        b.shape = (*flipped[:-2], flipped[-1], flipped[-2])
        result = linear(b, transposed(y), x)  # (x y)^T = y^T x^T
        b.shape = flipped
        return transposed(result)
    require(
        len(x.shape) == len(y.shape) > 2 and x.shape[:-2] == y.shape[:-2] and x.value.batched and y.value.batched,
        "a matrix product of two computed tensors that do not have the same leading axes, the batch among them",
        expected="x [..., M, K] and y [..., K, N]",
        got=f"{x.shape} and {y.shape}",
    )
    return _product(b, x, y)


def einsum(b: Builder, equation: str, operands: Sequence[View], path: Sequence[int] | None = None) -> View:
    """Of two operands, where it is a matrix product over one letter that both have and the result has not."""
    inputs, _, result = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    batch = [letter for letter in left if letter in right and letter in result]
    summed = [letter for letter in left if letter in right and letter not in result]
    rows, columns = ([letter for letter in name if letter not in batch + summed] for name in (left, right))
    made = [*batch, *rows, *columns]
    x, y = (*operands, *operands)[:2]
    require(
        len(operands) == 2
        and len(summed) == 1
        and sorted(made) == sorted(result)
        and left.isalpha()
        and right.isalpha(),
        "an einsum that is no matrix product of two operands",
        got=equation,
    )
    require(len(columns) == 1 and (len(rows) == 1 or not y.value.batched), "an einsum of this form", got=equation)
    x = _permuted(x, [left.index(letter) for letter in (*batch, *rows, *summed)])
    y = _permuted(y, [right.index(letter) for letter in (*batch, *summed, *columns)])
    b.shape = (*x.shape[:-1], y.shape[-1])
    return _permuted(matmul(b, x, y), [made.index(letter) for letter in result])


def attention(
    b: Builder,
    q: View,
    k: View,
    v: View,
    attn_mask: View | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> View:
    """``scaled_dot_product_attention``: q [N, heads, T, D] (or without heads), k and v [N, heads, S, D].

    One operation that keeps no scores, if there is no dropout and no mask but the causal one.
    """
    rank = len(q.shape)
    fits = rank in (3, 4) and all(view.value.batched and view.batch_axis == 0 for view in (q, k, v))
    require(fits, "attention over something but [batch, heads, steps, size]", got=[view.shape for view in (q, k, v)])
    require(q.shape[:-2] == k.shape[:-2] == v.shape[:-2], "attention with grouped queries, or with different batches")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if attn_mask is not None and _is_causal(attn_mask, q.shape[-2], k.shape[-2]):
        attn_mask, is_causal = None, True
    if attn_mask is None and not dropout_p:
        return _fused(b, q, k, v, is_causal, factor)
    scores = _product(b, scaled(b, q, factor, 0.0), transposed(k))
    if is_causal:
        hidden = np.triu(np.full(scores.shape[-2:], -FAR, np.float32), 1)
        scores = binary(b, "ADD", scores, canonical(constant(hidden, "causal mask"), hidden.shape))
    elif attn_mask is not None:
        scores = binary(b, "ADD", scores, _additive(attn_mask))
    weights = softmax(b, scores, -1)
    return _product(b, dropout(b, weights, dropout_p, True), v)


def transposed(view: View) -> View:
    """The last two of the author's axes swapped; no byte moves."""
    last = len(view.shape) - 1
    return _permuted(view, [*range(last - 1), last, last - 1])


# ------------------------------------------------------------------------------------------------------------- helpers


def _product(b: Builder, x: View, y: View) -> View:
    """``x [lead..., M, K] @ y [lead..., K, N]``; an operand that lies transposed in memory stays so."""
    rank = len(x.shape)
    rows, columns = rank - 2, rank - 1
    lead = [axis for axis in x.order if axis < rows]
    if x.batch_axis not in lead or y.batch_axis != x.batch_axis:
        b.example_axis(x, rows, "a matrix product")
        b.example_axis(x, columns, "a matrix product")
        require(False, "a matrix product of two computed tensors with the batch on different axes")
    right_lies = y.order.index(columns) < y.order.index(rows)
    left_lies = not right_lies and x.order.index(columns) < x.order.index(rows)
    left = b.arrange(x, [*lead, columns, rows] if left_lies else [*lead, rows, columns])
    right = b.arrange(y, [*lead, columns, rows] if right_lies else [*lead, rows, columns])
    shape = (*x.shape[:rows], x.shape[rows], y.shape[columns])
    dims = (*left.dims[: rank - 2], shape[rows], shape[columns])
    value = b.emit("MATMUL", [left, right], dims, transpose=1 if left_lies else 2 if right_lies else 0)
    return View(value, shape, (*lead, rows, columns))


def _fused(b: Builder, q: View, k: View, v: View, is_causal: bool, scale: float) -> View:
    order = (0, 2, 1, 3) if len(q.shape) == 4 else (0, 1, 2)
    operands = []
    for view in (q, k, v):
        operand = b.arrange(view, order)
        rows, steps, *heads, size = operand.dims
        operands.append(operand.reshaped((rows, steps, heads[0] if heads else 1, size)))
    dims = (*operands[0].dims[:3], operands[2].dims[3])
    value = b.emit("ATTENTION", operands, dims, causal=int(is_causal), scale=scale)
    result = View(value, (*q.shape[:-1], v.shape[-1]), order)
    return View(value.reshaped(result.dims(order)), result.shape, order)


def _is_causal(mask: View, queries: int, keys: int) -> bool:
    if mask.value.root.region != Region.CONST or math.prod(mask.shape) != queries * keys:
        return False
    content = mask.value.content.reshape(mask.shape[-2:])
    seen = np.tril(np.ones((queries, keys), bool))
    if content.shape != seen.shape or mask.order != tuple(range(len(mask.shape))):
        return False
    if mask.value.dtype == DType.I32:
        return bool(np.array_equal(content != 0, seen))
    added = content.astype(np.float32)
    return bool((added[seen] == 0).all() and (added[~seen] <= -FAR).all())


def _additive(mask: View) -> View:
    """A mask of truth values (where a query may look) as what is added to the scores."""
    if mask.value.dtype == DType.F32:
        return mask
    require(mask.value.root.region == Region.CONST, "an attention mask of truth values that is computed from examples")
    added = np.where(mask.value.content != 0, np.float32(0), np.float32(-FAR))
    return View(constant(added, "mask"), mask.shape, mask.order)


def _permuted(view: View, axes: Sequence[int]) -> View:
    places = list(axes)
    return View(view.value, tuple(view.shape[a] for a in places), tuple(places.index(a) for a in view.order))


TABLE: dict[str, Callable[..., Any]] = {
    "aten.linear.default": linear,
    "aten.addmm.default": addmm,
    "aten.matmul.default": matmul,
    "aten.mm.default": matmul,
    "aten.bmm.default": matmul,
    "aten.einsum.default": einsum,
    "aten.mT.default": lambda b, x: transposed(x),
    "aten.scaled_dot_product_attention.default": attention,
}
