"""Runs nodes of a graph on the NumPy twin's kernels, at compile time, to see what values a model has on examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from evensong.mobile_runtime.compiler.ir import Data, Node, Value
from evensong.mobile_runtime.twin import KERNELS
from evensong.mobile_runtime.twin_call import Call, Clock
from evensong.wire.program import DType, Region, Tensor


class Interpreter:
    """The contents of values, by root, for some examples at once. float32 nodes run in float64."""

    def __init__(self, ports: Mapping[Value, Data]) -> None:
        self._examples = len(next(iter(ports.values())))
        self.contents: dict[Value, Data] = dict(ports)

    def knows(self, node: Node) -> bool:
        """Whether all operands have a content."""
        return all(value.root in self.contents or value.root.data is not None for value in node.inputs)

    def content(self, value: Value) -> Data:
        """``[n * rows, ...]`` if ``value`` is batched."""
        data = self.contents.get(value.root)
        if data is None:
            data = value.root.data
        if data is None:
            raise AssertionError(f"{value.name} has no content")
        return data.reshape(self.shape(value))

    def shape(self, value: Value) -> tuple[int, ...]:
        return (value.dims[0] * self._examples, *value.dims[1:]) if value.batched else value.dims

    def compute(self, node: Node, *operands: Data, **attrs: int | float) -> list[Data]:
        """The results of ``node``, on other ``operands`` if given, with some attributes replaced.

        Nothing is cut or flipped at random, so that what is measured is the same for every program of a model.
        """
        if node.op == "CROP2D":
            attrs = {"random": 0, **attrs}
        kernel: Callable[..., Any] = KERNELS[node.op]
        call = Call(
            tuple(map(self.shape, node.outputs)),
            tuple(map(self._tensor, node.inputs)),
            tuple(map(self._tensor, node.outputs)),
            Clock(0.0, 1, 0),
        )
        given = operands or [
            self.content(v).astype(np.float64) if _is_wide(node, v) else self.content(v) for v in node.inputs
        ]
        results = kernel(call, *given, **{**node.attrs, **attrs})
        return list(results) if isinstance(results, tuple) else [results]

    def run(self, node: Node) -> list[Value]:
        """Computes ``node`` and keeps what it gives; returns the root values that are known now."""
        for value, result in zip(node.outputs, self.compute(node), strict=False):
            self.contents[value.root] = np.asarray(result).reshape(self.shape(value.root))
        return [value.root for value in node.outputs]

    def _tensor(self, value: Value) -> Tensor:
        return Tensor(value.dtype, Region.ARENA, self.shape(value), 0, value.batched, value.scale, value.zero_point)


def _is_wide(node: Node, value: Value) -> bool:
    """Integer operations have float32 steps of their own."""
    return value.dtype == DType.F32 and not any(v.dtype == DType.I8 for v in (*node.inputs, *node.outputs))
