"""Which of the author's axes lies where: NCHW models on a channels-last engine without needless copies.

A :class:`View` pairs the author's shape with the engine's order of axes. Permuting costs nothing here: only the
order changes. A TRANSPOSE is made when an operation asks for an order that the bytes do not have, so edges cancel by
themselves. Axes of size one lie anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evensong.mobile_runtime.compiler.ir import Graph, Value, constant
from evensong.mobile_runtime.errors import CompileError, UnsupportedOperation
from evensong.wire.program import MAX_RANK, Region

#: The batch size of the traced graph: a prime that no real layer has by chance, so that a batch axis is told by its
#: size.
PROBE_BATCH = 31


class MixesExamplesError(CompileError):
    """The model computes across the examples of a batch, which a device with one example could not do."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} works across the examples of a batch",
            expected="every example computed by itself (batch norm in training excepted)",
            fix="Keep the batch in one axis: reduce, slice, join and reshape the other axes only.",
        )


@dataclass(frozen=True)
class View:
    """A value as its author sees it.

    ``shape`` is the author's shape in the traced graph (the batch is PROBE_BATCH). ``order[j]`` is the author's axis
    that is the engine's dimension ``j``; a batched value has the batch in ``order[0]``.
    """

    value: Value
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def batch_axis(self) -> int | None:
        """The author's axis that holds the batch."""
        return self.order[0] if self.value.batched else None

    def dims(self, order: Sequence[int]) -> tuple[int, ...]:
        """The engine's dimensions (of one example) under another order."""
        sizes = [self.shape[axis] for axis in order]
        if self.value.batched:
            sizes[0] //= PROBE_BATCH
        return tuple(sizes)

    def axis(self, author_axis: int) -> int:
        """The author's axis, counted from the front."""
        return author_axis % len(self.shape)


def canonical(value: Value, shape: Sequence[int]) -> View:
    """``value`` in the author's own order."""
    return View(value, tuple(shape), tuple(range(len(shape))))


def arrange(graph: Graph, view: View, order: Sequence[int], place: str) -> Value:
    """``view``'s value with its dimensions in ``order``; free unless axes larger than one really move."""
    order = tuple(order)
    dims = view.dims(order)
    if view.value.batched and order[0] != view.order[0]:
        raise MixesExamplesError(f"{place}: moving the batch axis")
    if _significant(view, view.order) == _significant(view, order):
        return view.value.reshaped(dims)
    source = view.value.reshaped(view.dims(view.order))
    if source.region == Region.CONST:
        data = source.content.transpose([view.order.index(axis) for axis in order])
        return constant(np.ascontiguousarray(data), view.value.name)
    kept = [axis for j, axis in enumerate(view.order) if view.shape[axis] != 1 or j == 0]
    moved = [axis for axis in order if axis in kept]
    result = Value(view.dims(moved), source.dtype, batched=source.batched, name=place)
    attrs = transpose_attrs([kept.index(axis) for axis in moved])
    graph.add("TRANSPOSE", [source.reshaped(view.dims(kept))], [result], place, **attrs)
    return result.reshaped(dims)


def transpose_attrs(perm: Sequence[int]) -> dict[str, int | float]:
    """TRANSPOSE's attributes for ``perm``."""
    if len(perm) > MAX_RANK:
        raise CompileError("a tensor has too many axes", expected=f"at most {MAX_RANK}", got=len(perm))
    return {f"perm{i}": perm[i] if i < len(perm) else -1 for i in range(MAX_RANK)}


def last(view: View, axis: int) -> tuple[int, ...]:
    """``view``'s order with the author's ``axis`` moved to the end."""
    return (*(a for a in view.order if a != axis), axis)


def squeezed(view: View, axes: Sequence[int]) -> View:
    """Without some axes of size one."""
    keep = [a for a in range(len(view.shape)) if a not in axes]
    order = tuple(keep.index(a) for a in view.order if a in keep)
    shape = tuple(view.shape[a] for a in keep)
    flat = View(view.value, shape, order)
    return View(view.value.reshaped(flat.dims(order)), shape, order)


def reshaped(graph: Graph, view: View, shape: Sequence[int], place: str) -> View:
    """``view`` under another of the author's shapes (row-major in the author's order, as ``torch.reshape``)."""
    shape = tuple(shape)
    if shape == view.shape:
        return view
    order = _regrouped(view, shape)
    if order is None:
        rank = range(len(view.shape))
        if view.value.batched and view.batch_axis != 0:
            raise UnsupportedOperation(
                f"{place}: a reshape while the batch is not the first axis",
                fix="Permute the batch to the front before reshaping.",
            )
        view = View(arrange(graph, view, rank, place), view.shape, tuple(rank))
        order = _regrouped(view, shape)
        if order is None:
            raise AssertionError(f"{place}: {view.shape} -> {shape}")
    if view.value.batched and (not order or shape[order[0]] % PROBE_BATCH):
        raise MixesExamplesError(f"{place}: reshaping {view.shape} to {shape}")
    target = View(view.value, shape, order)
    return View(view.value.reshaped(target.dims(order)), shape, order)


def _significant(view: View, order: Sequence[int]) -> list[int]:
    return [axis for j, axis in enumerate(order) if view.shape[axis] != 1 or (j == 0 and view.value.batched)]


def _regrouped(view: View, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order of ``shape``'s axes if the bytes stay where they are, else None."""
    groups = _groups(view.shape, shape)
    position = [axis for axis in view.order if view.shape[axis] != 1]
    order: list[int] = []
    while position:
        old, new = next(group for group in groups if position[0] in group[0])
        if position[: len(old)] != old:
            return None
        position = position[len(old) :]
        order += new
    return tuple(order + [axis for axis, size in enumerate(shape) if size == 1])


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest split of both shapes into runs of axes with equal products; axes of size one are left out."""
    left = [axis for axis, size in enumerate(old) if size != 1]
    right = [axis for axis, size in enumerate(new) if size != 1]
    if math.prod(old) != math.prod(new):
        raise AssertionError(f"{old} and {new} differ in size")
    groups: list[tuple[list[int], list[int]]] = []
    while left:
        a, b = [left.pop(0)], [right.pop(0)]
        size_a, size_b = old[a[0]], new[b[0]]
        while size_a != size_b:
            if size_a < size_b:
                a.append(left.pop(0))
                size_a *= old[a[-1]]
            else:
                b.append(right.pop(0))
                size_b *= new[b[-1]]
        groups.append((a, b))
    return groups
