"""From planned graphs to an :class:`Artifact`. Everything is ordered by first use: the same model gives the same
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from evensong.mobile_runtime.compiler.ir import Graph, Value
from evensong.mobile_runtime.compiler.planner import Plan
from evensong.mobile_runtime.compiler.weights import Weights
from evensong.wire.artifact import align
from evensong.wire.program import OPS, Artifact, Op, Port, Program, Region, Tensor, Variable
from evensong.wire.workspace import workspace_bytes


def emit(planned: Sequence[tuple[Graph, Plan, int]], weights: Weights, manifest: dict[str, object]) -> Artifact:
    """Packs programs ``(graph, plan, max_batch)`` with their persistent regions; adds ``places`` to the manifest."""
    persistent = _Persistent(weights)
    programs = tuple(_program(graph, plan, batch, persistent) for graph, plan, batch in planned)
    places = {graph.name: [node.place for node in graph.nodes] for graph, _, _ in planned}
    variables = tuple(
        Variable(
            value.name,
            value.dtype,
            value.dims,
            tuple(weights.order[value].index(axis) for axis in range(len(value.dims))),
            persistent.offset(value),
            weights.flags[value],
        )
        for value in weights.variables
    )
    return Artifact(
        {**manifest, "places": places},
        variables,
        programs,
        bytes(persistent.content[Region.CONST]),
        bytes(persistent.content[Region.STATE]),
        persistent.slot_bytes,
    )


class _Persistent:
    """CONST, STATE and SLOTS while they fill up; equal constants are stored once."""

    def __init__(self, weights: Weights) -> None:
        self.content = {Region.CONST: bytearray(), Region.STATE: bytearray()}
        self.slot_bytes = 0
        self._offsets: dict[Value, int] = {}
        self._constants: dict[bytes, int] = {}
        for value in weights.variables:
            self.offset(value)

    def offset(self, value: Value) -> int:
        """The offset of a root value, which gets one at its first use."""
        if value not in self._offsets:
            self._offsets[value] = self._place(value)
        return self._offsets[value]

    def _place(self, value: Value) -> int:
        if value.region == Region.SLOTS:
            start = self.slot_bytes
            self.slot_bytes += align(value.elements * value.dtype.itemsize)
            return start
        if value.data is None:
            raise AssertionError(f"{value.name} has no content")
        data = value.data.astype(value.dtype.numpy).tobytes()
        if value.region == Region.CONST and data in self._constants:
            return self._constants[data]
        section = self.content[value.region]
        start = len(section)
        section += data + bytes(align(len(data)) - len(data))
        if value.region == Region.CONST:
            self._constants[data] = start
        return start


def _program(graph: Graph, plan: Plan, batch: int, persistent: _Persistent) -> Program:
    ports = {value.root: index for side in (graph.inputs, graph.outputs) for index, value in enumerate(side.values())}
    index: dict[tuple[Value, tuple[int, ...]], int] = {}
    tensors: list[Tensor] = []

    def tensor(value: Value) -> int:
        key = (value.root, value.dims)
        if key not in index:
            index[key] = len(tensors)
            root = value.root
            dims = (value.dims[0] * batch, *value.dims[1:]) if value.batched else value.dims
            if root.region == Region.ARENA:
                offset = plan.offsets[root]
            elif root.region in (Region.INPUT, Region.OUTPUT):
                offset = ports[root]
            else:
                offset = persistent.offset(root)
            tensors.append(Tensor(root.dtype, root.region, dims, offset, value.batched, root.scale, root.zero_point))
        return index[key]

    inputs = tuple(Port(name, tensor(value)) for name, value in graph.inputs.items())
    outputs = tuple(Port(name, tensor(value)) for name, value in graph.outputs.items())
    ops = tuple(
        Op(
            node.op,
            tuple(tensor(value) for value in node.inputs),
            tuple(tensor(value) for value in node.outputs),
            tuple(
                float(node.attrs[name]) if kind == "f" else int(node.attrs[name])
                for name, _, kind in (attr.partition(":") for attr in OPS[node.op].attrs)
            ),
        )
        for node in graph.nodes
    )
    return Program(
        graph.name, batch, plan.arena_bytes, workspace_bytes(ops, tensors), inputs, outputs, tuple(tensors), ops
    )
