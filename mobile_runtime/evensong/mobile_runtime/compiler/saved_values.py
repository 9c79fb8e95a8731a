"""What the forward pass keeps for the backward pass, in fewer bytes."""

from __future__ import annotations

from evensong.mobile_runtime.compiler.ir import Graph, Node, Value
from evensong.mobile_runtime.compiler.planner import peak
from evensong.mobile_runtime.verify_rules import LOSSES
from evensong.wire.program import Activation, DType, Region


def keep_masks(graph: Graph, batch: int) -> None:
    """Where the backward pass asks a ReLU's result only which elements passed, it is kept as one bit an element.

    That is so wherever the weights behind it are frozen (training biases alone, say). Writing the bits costs a pass
    over the result, so it is done only if steps of ``batch`` examples then need less memory.
    """
    nodes = graph.nodes
    before = peak(graph, batch)
    loss = next(at for at, node in enumerate(nodes) if node.op in LOSSES)
    readers = Graph("backward", nodes[loss + 1 :]).readers()
    changed: list[Node] = []
    masks: dict[Value, Value] = {}
    for at, node in enumerate(nodes):
        saved = node.inputs[1].root if node.op == "UNARY_GRAD" else None
        changed.append(node if saved not in masks else _masked(node, masks[saved]))
        for value in (result.root for result in node.outputs if at < loss):
            found = readers.get(value)
            if found and value.region == Region.ARENA and all(_asks_for_mask(reader, value) for reader in found):
                masks[value] = _mask_of(value)
                kind = found[0].attrs["kind"]
                source = value.reshaped(_rows(value))
                changed.append(Node("ACTIVATION_MASK", [source], [masks[value]], {"kind": kind}, node.place))
    graph.nodes = changed
    if peak(graph, batch) >= before:
        graph.nodes = nodes


def _asks_for_mask(reader: Node, value: Value) -> bool:
    asks = reader.op == "UNARY_GRAD" and reader.inputs[1].root is value and reader.inputs[0].root is not value
    return asks and reader.attrs["kind"] in (Activation.RELU, Activation.RELU6)


def _mask_of(value: Value) -> Value:
    rows, columns = _rows(value)
    return Value((rows, -(-columns // 8)), DType.U8, batched=value.batched, name=f"mask of {value.name}")


def _masked(node: Node, mask: Value) -> Node:
    dy, dx = node.inputs[0], node.outputs[0]
    return Node("MASK_GRAD", [dy.reshaped(_rows(dy)), mask], [dx.reshaped(_rows(dx))], {}, node.place)


def _rows(value: Value) -> tuple[int, int]:
    """One row a leading place (for a batched value, at least one an example), as long as can be."""
    rows = value.root.dims[0] if value.batched else 1
    return rows, value.elements // rows
