"""ATen calls that only say where elements are: reshape, permute, slice, join. Most of them cost nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from evensong.mobile_runtime.compiler.aten_arithmetic import for_each_example, shared_row
from evensong.mobile_runtime.compiler.builder import NHWC, Builder, require
from evensong.mobile_runtime.compiler.ir import Value
from evensong.mobile_runtime.compiler.layout import View, reshaped, squeezed
from evensong.wire.program import DType


def same(b: Builder, x: View, *args: Any, **kwargs: Any) -> View:
    """Calls that change nothing here: clone, contiguous, detach, a conversion to the same dtype."""
    return x


def convert(b: Builder, x: View, dtype: Any, *args: Any, **kwargs: Any) -> View:
    """``x.to(dtype)``: integers to float32, or where the runtime's dtype stays."""
    if str(dtype) == "torch.float32":
        return b.real(x)
    kept = {"torch.int64": DType.I32, "torch.int32": DType.I32, "torch.uint8": DType.U8}.get(str(dtype))
    require(kept == x.value.dtype, f"conversion of {x.value.dtype.name} to {dtype}", expected="float32")
    return x


def reshape(b: Builder, x: View, *args: Any) -> View:
    """Every call whose result is the same elements under another shape."""
    return reshaped(b.graph, x, b.shape, b.place)


def permute(b: Builder, x: View, dims: Sequence[int]) -> View:
    """Reorders the author's axes; no byte moves."""
    axes = [x.axis(dim) for dim in dims]
    return View(x.value, b.shape, tuple(axes.index(axis) for axis in x.order))


def transpose(b: Builder, x: View, first: int = 0, second: int = 1) -> View:
    """Swaps two of the author's axes."""
    axes = list(range(len(x.shape)))
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    return permute(b, x, axes)


def movedim(b: Builder, x: View, source: int, destination: int) -> View:
    """Moves one of the author's axes to another place."""
    axes = [axis for axis in range(len(x.shape)) if axis != x.axis(source)]
    axes.insert(x.axis(destination), x.axis(source))
    return permute(b, x, axes)


def cat(b: Builder, views: Sequence[View], dim: int = 0) -> View:
    """Joins along one axis that is not the batch."""
    first = next((view for view in views if view.value.batched), views[0])
    axis = b.example_axis(first, dim, "concatenation")
    if first.batch_axis is not None:
        views = [_batched(b, view, first.batch_axis) for view in views]
    operands = [b.arrange(view, first.order) for view in views]
    result = View(operands[0], b.shape, first.order)
    if len(operands) == 1:
        return result
    dims = result.dims(first.order)
    value = Value(dims, operands[0].dtype, batched=first.value.batched, name=b.place)
    b.graph.add("CONCAT", operands, [value], b.place, axis=first.order.index(axis))
    return View(value, b.shape, first.order)


def _batched(b: Builder, view: View, axis: int) -> View:
    return view if view.value.batched else for_each_example(b, shared_row(view, axis), axis)


def stack(b: Builder, views: Sequence[View], dim: int = 0) -> View:
    """Joins along a new axis that is not the batch's place."""
    axis = dim % len(b.shape)
    widened = (*views[0].shape[:axis], 1, *views[0].shape[axis:])
    return cat(b, [reshaped(b.graph, view, widened, b.place) for view in views], axis)


def slice_(b: Builder, x: View, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> View:
    """``x[..., start:end, ...]``."""
    axis = x.axis(dim)
    first, stop, _ = slice(start, end).indices(x.shape[axis])
    if (first, stop) == (0, x.shape[axis]) and step == 1:
        return x
    require(step == 1, "slicing with a step", got=step)
    return _cut(b, x, b.example_axis(x, axis, "slicing"), first, stop)


def select(b: Builder, x: View, dim: int, index: int) -> View:
    """``x[..., index, ...]``, which drops the axis."""
    axis = b.example_axis(x, dim, "selecting")
    index %= x.shape[axis]
    return squeezed(_cut(b, x, axis, index, index + 1), [axis])


def split(b: Builder, x: View, size: int | Sequence[int], dim: int = 0) -> list[View]:
    """Pieces of ``size`` (or of the given sizes) along one axis."""
    axis = b.example_axis(x, dim, "splitting")
    total = x.shape[axis]
    sizes = [size] * (-(-total // size)) if isinstance(size, int) else list(size)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [_cut(b, x, axis, start, min(start + s, total)) for start, s in zip(starts, sizes, strict=True)]


def pad(b: Builder, x: View, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> View:
    """Zeros around the last axes: ``padding`` is (before, after) of the last axis, then of the one before it."""
    require(mode == "constant" and not value, "padding with something but zeros", got=mode if value is None else value)
    if len(x.shape) == 4:
        x = View(b.arrange(x, NHWC), x.shape, NHWC)  # where a convolution can take it in
    for index in range(len(padding) // 2):
        before, after = padding[2 * index : 2 * index + 2]
        axis = len(x.shape) - 1 - index
        if before < 0 or after < 0:
            x = _cut(b, x, axis, max(-before, 0), x.shape[axis] - max(-after, 0))
        if before > 0 or after > 0:
            x = _widened(b, x, b.example_axis(x, axis, "padding"), max(before, 0), max(after, 0))
    return x


def chunk(b: Builder, x: View, chunks: int, dim: int = 0) -> list[View]:
    """``chunks`` pieces along one axis."""
    return split(b, x, -(-x.shape[x.axis(dim)] // chunks), dim)


def item(b: Builder, results: Sequence[View | str], index: int) -> View:
    """One of several results; text says what is not available."""
    result = results[index]
    if isinstance(result, str):
        require(False, result)
        raise AssertionError
    return result


def _cut(b: Builder, x: View, axis: int, start: int, stop: int) -> View:
    if (start, stop) == (0, x.shape[axis]):
        return x
    shape = tuple(stop - start if a == axis else size for a, size in enumerate(x.shape))
    operand = b.arrange(x, x.order)
    result = View(operand, shape, x.order)
    value = Value(result.dims(x.order), operand.dtype, batched=operand.batched, name=b.place)
    b.graph.add("SLICE", [operand], [value], b.place, axis=x.order.index(axis), start=start)
    return View(value, shape, x.order)


def _widened(b: Builder, x: View, axis: int, before: int, after: int) -> View:
    shape = tuple(size + before + after if a == axis else size for a, size in enumerate(x.shape))
    operand = b.arrange(x, x.order)
    dims = View(operand, shape, x.order).dims(x.order)
    value = Value(dims, operand.dtype, batched=operand.batched, name=b.place)
    b.graph.add("SLICE_GRAD", [operand], [value], b.place, axis=x.order.index(axis), start=before)
    return View(value, shape, x.order)


_SAME = (
    "clone.default",
    "contiguous.default",
    "detach.default",
    "alias.default",
    "lift_fresh_copy.default",
    "detach_.default",
)
_RESHAPES = (
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "flatten.using_ints",
    "unflatten.int",
    "squeeze.dim",
    "squeeze.dims",
    "squeeze.default",
    "unsqueeze.default",
)

TABLE: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}": same for name in _SAME},
    **{f"aten.{name}": reshape for name in _RESHAPES},
    "aten.to.dtype": convert,
    "aten.permute.default": permute,
    "aten.transpose.int": transpose,
    "aten.movedim.int": movedim,
    "aten.t.default": transpose,
    "aten.cat.default": cat,
    "aten.stack.default": stack,
    "aten.slice.Tensor": slice_,
    "aten.select.int": select,
    "aten.split.Tensor": split,
    "aten.split_with_sizes.default": split,
    "aten.chunk.default": chunk,
    "aten.pad.default": pad,
    "aten.constant_pad_nd.default": lambda b, x, padding, value=0.0: pad(b, x, padding, "constant", value),
    operator.getitem.__name__: item,
}
