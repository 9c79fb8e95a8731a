"""The compiler's graph: one flat list of engine operations over values whose place in memory is not decided yet.

Operations are those of :data:`evensong.wire.program.OPS` from the start; passes rewrite the list, and the planner
gives every value an offset. A batched value's ``dims[0]`` counts the rows of ONE example: the graph does not know
the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from evensong.wire.program import OPS, DType, Region

Data = npt.NDArray[np.generic]


@dataclass(eq=False)
class Value:
    """One tensor, compared by identity.

    ``base`` makes it another shape of the same bytes (a reshape costs nothing). ``data`` is the content of a CONST
    value and the initial content of a STATE value, in the engine's layout.
    """

    dims: tuple[int, ...]
    dtype: DType = DType.F32
    region: Region = Region.ARENA
    batched: bool = False
    name: str = ""
    data: Data | None = None
    base: Value | None = None
    scale: float = 0.0
    zero_point: int = 0
    #: Of a root, in int8 training: its place in the table of scales (of an activation) or of gradients.
    entry: int = -1
    #: Of a root, in int8 training: a gradient passes where ``bounds[0] < stored < bounds[1]``.
    bounds: tuple[int, int] | None = None

    @property
    def root(self) -> Value:
        """The value that owns the bytes."""
        value = self
        while value.base is not None:
            value = value.base
        return value

    @property
    def elements(self) -> int:
        """Elements of one example if batched, else of the whole."""
        return math.prod(self.dims)

    @property
    def content(self) -> Data:
        """``data`` of the root in this value's shape; only persistent values have it."""
        data = self.root.data
        if data is None:
            raise AssertionError(f"{self.name} has no content")
        return data.reshape(self.dims)

    def reshaped(self, dims: tuple[int, ...]) -> Value:
        """The same bytes under other dimensions (of one example, if batched)."""
        if dims == self.dims:
            return self
        if math.prod(dims) != self.elements:
            raise AssertionError(f"cannot view {self.dims} as {dims}")
        if self.base is not None and self.base.dims == dims:
            return self.base
        return Value(dims, self.dtype, self.region, self.batched, self.name, None, self, self.scale, self.zero_point)

    def like(self, dims: tuple[int, ...] | None = None, *, name: str = "") -> Value:
        """A fresh scratch value of the same kind."""
        return Value(self.dims if dims is None else dims, self.dtype, batched=self.batched, name=name or self.name)


@dataclass(eq=False)
class Node:
    """One kernel call. ``place`` is the module path in the author's model, for messages and reports; ``source`` is the
    float32 node that a quantised one stands for.
    """

    op: str
    inputs: list[Value]
    outputs: list[Value]
    attrs: dict[str, int | float] = field(default_factory=dict)
    place: str = ""
    source: Node | None = None

    def __post_init__(self) -> None:
        names = {attr.partition(":")[0] for attr in OPS[self.op].attrs}
        if names != set(self.attrs):
            raise AssertionError(f"{self.op} takes {sorted(names)}, got {sorted(self.attrs)}")


@dataclass(eq=False)
class Graph:
    """A program before planning: nodes in order of execution, and named ports."""

    name: str
    nodes: list[Node] = field(default_factory=list)
    inputs: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)

    def add(
        self,
        op: str,
        inputs: Iterable[Value],
        outputs: Iterable[Value],
        place: str = "",
        **attrs: int | float,
    ) -> Node:
        node = Node(op, list(inputs), list(outputs), attrs, place)
        self.nodes.append(node)
        return node

    def readers(self) -> dict[Value, list[Node]]:
        """For each root value, the nodes that read it, in order (a node that reads it twice stands twice)."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                found.setdefault(value.root, []).append(node)
        return found

    def producers(self) -> dict[Value, Node]:
        """For each root value that a node writes, that node."""
        return {value.root: node for node in self.nodes for value in node.outputs}

    def reached(self, sources: Iterable[Value]) -> set[Value]:
        """The root values of ``sources`` and all that is computed from them."""
        found = {value.root for value in sources}
        for node in self.nodes:
            if any(value.root in found for value in node.inputs):
                found |= {value.root for value in node.outputs}
        return found

    def replace(self, old: Value, new: Value) -> None:
        """Every reader of ``old``'s bytes reads ``new``'s instead, each under the shape it had."""
        root = old.root
        for node in self.nodes:
            node.inputs = [new.reshaped(v.dims) if v.root is root else v for v in node.inputs]
        for name, value in self.outputs.items():
            if value.root is root:
                self.outputs[name] = new.reshaped(value.dims)


def nbytes(value: Value, batch: int) -> int:
    """Bytes of ``value`` when a batch has ``batch`` examples."""
    return value.elements * value.dtype.itemsize * (batch if value.batched else 1)


def constant(data: Data, name: str = "") -> Value:
    """A CONST value with the given content; float32, int8 or int32."""
    dtype = {"f": DType.F32, "i1": DType.I8, "i4": DType.I32}[
        data.dtype.kind if data.dtype.kind == "f" else data.dtype.str[1:]
    ]
    content = np.ascontiguousarray(data, dtype=np.dtype(dtype.numpy))
    return Value(tuple(content.shape), dtype, Region.CONST, name=name, data=content)
