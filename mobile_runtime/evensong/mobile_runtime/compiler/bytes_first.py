"""Images arrive as bytes: they are moved while they are bytes, and an int8 body takes them without a float32 copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.compiler.interpret import Interpreter
from evensong.mobile_runtime.compiler.ir import Graph, Node, Value, constant
from evensong.mobile_runtime.twin_ops_int8 import to_int8
from evensong.wire.program import DType, Region

_MOVES = ("TRANSPOSE", "SLICE", "SLICE_GRAD", "COPY", "CROP2D")
_BY_ELEMENT = ("SCALE", "UNARY")
_BY_ROW: Mapping[str, Callable[..., npt.NDArray[np.float32]]] = {"ADD": np.add, "SUB": np.subtract, "MUL": np.multiply}
_MOST_ROWS = 64  #: of 256 bytes, in one table

Table = npt.NDArray[np.float32]


def move_bytes_first(graph: Graph) -> None:
    """Moves stand before the cast of bytes to float32 and the element-wise operations behind it: a quarter of the bytes
    is moved. A resize reads bytes itself.
    """
    while any(_swapped(graph, node) for node in list(graph.nodes)):
        pass


def _swapped(graph: Graph, move: Node) -> bool:
    before = graph.producers().get(move.inputs[0].root) if move.op in (*_MOVES, "RESIZE2D") else None
    if before is None or not _starts_from_bytes(graph, before):
        return False
    source = before.inputs[0].reshaped(move.inputs[0].dims)
    if move.op == "RESIZE2D":
        if before.op == "CAST":
            move.inputs[0] = source
        return before.op == "CAST"
    if (
        (_adds_zeros(move) and before.op != "CAST")
        or len(graph.readers()[before.outputs[0].root]) != 1
        or _is_output(graph, before)
    ):
        return False
    result = move.outputs[0]
    moved = Value(result.dims, source.dtype, batched=result.batched, name=result.name)
    graph.nodes.remove(before)
    move.inputs[0], move.outputs[0] = source, moved
    before.inputs[0], before.outputs[0] = moved, result
    graph.nodes.insert(graph.nodes.index(move) + 1, before)
    return True


def _adds_zeros(move: Node) -> bool:
    return move.op == "SLICE_GRAD" or (move.op == "CROP2D" and bool(move.attrs["pad_h"] or move.attrs["pad_w"]))


def _starts_from_bytes(graph: Graph, node: Node) -> bool:
    """Whether ``node`` casts bytes, or works element by element on what was cast."""
    while node.op in _BY_ELEMENT:
        found = graph.producers().get(node.inputs[0].root)
        if found is None:
            return False
        node = found
    return node.op == "CAST" and node.inputs[0].dtype == DType.U8


def _is_output(graph: Graph, node: Node) -> bool:
    return any(value.root is node.outputs[0].root for value in graph.outputs.values())


def fold_byte_tables(graph: Graph) -> None:
    """``QUANTIZE`` of what element-wise operations make of bytes becomes one table: exactly the int8 values of the same
    steps in float32.
    """
    producers = graph.producers()
    for node in [n for n in graph.nodes if n.op == "QUANTIZE"]:
        chain: list[Node] = []
        maker = producers.get(node.inputs[0].root)
        while maker is not None and (maker.op in _BY_ELEMENT or _takes_row(maker)):
            chain.insert(0, maker)
            maker = producers.get(maker.inputs[0].root)
        if maker is None or maker.op != "CAST" or maker.inputs[0].dtype != DType.U8:
            continue
        table = _table(chain)
        if table is None:
            continue
        result = node.outputs[0]
        stored = to_int8(table * (np.float32(1) / np.float32(result.scale)), result.zero_point)
        view = (result.elements // len(table), len(table))
        operands = [maker.inputs[0].reshaped(view), constant(stored, "table")]
        folded = Node("QLUT_U8", operands, [result.reshaped(view)], {}, node.place)
        graph.nodes[graph.nodes.index(node)] = folded


def _takes_row(node: Node) -> bool:
    return node.op in _BY_ROW and node.inputs[1].root.region == Region.CONST and node.inputs[1].elements <= _MOST_ROWS


def _table(chain: list[Node]) -> Table | None:
    """What the chain makes of each byte: ``[1, 256]``, or ``[C, 256]`` where it tells channels apart; None where their
    numbers differ.
    """
    table: Table = np.arange(256, dtype=np.float32)[None]
    for node in chain:
        if node.op in _BY_ELEMENT:
            table = _apply(node, table)
            continue
        row = node.inputs[1].content.reshape(-1, 1)
        if 1 not in (len(row), len(table)) and len(row) != len(table):
            return None
        table = _BY_ROW[node.op](table, row)
    return table


def _apply(node: Node, table: Table) -> Table:
    value = Value(table.shape)
    run = Interpreter({value: table})
    (result,) = run.compute(Node(node.op, [value], [value], node.attrs, node.place), table)
    return result.astype(np.float32)
