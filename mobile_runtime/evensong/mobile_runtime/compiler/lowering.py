"""From a traced graph to engine operations: walks the ATen calls and looks each up in the tables of ``aten_*.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from evensong.mobile_runtime.compiler import (
    aten_arithmetic,
    aten_input,
    aten_layers,
    aten_norms,
    aten_pointwise,
    aten_products,
    aten_recurrent,
    aten_shapes,
    aten_windows,
)
from evensong.mobile_runtime.compiler.builder import Builder
from evensong.mobile_runtime.compiler.export import Trace, module_path, source_line
from evensong.mobile_runtime.compiler.ir import Graph, Value, constant
from evensong.mobile_runtime.compiler.layout import PROBE_BATCH, View, canonical
from evensong.mobile_runtime.compiler.weights import Weights, as_array
from evensong.mobile_runtime.errors import CompileError, UnsupportedOperation
from evensong.wire.program import DType, Region

Lowering = Callable[..., Any]

#: How each ATen call becomes engine operations. The arguments are those of the ATen schema, with views for tensors.
TABLE: Mapping[str, Lowering] = {
    **aten_products.TABLE,
    **aten_layers.TABLE,
    **aten_norms.TABLE,
    **aten_recurrent.TABLE,
    **aten_windows.TABLE,
    **aten_pointwise.TABLE,
    **aten_arithmetic.TABLE,
    **aten_shapes.TABLE,
    **aten_input.TABLE,
}

#: What a message tells: without variants, conversions and calls that torch makes for itself.
SUPPORTED = sorted(
    {call for call in (name.split(".")[1] for name in TABLE if "." in name) if call.strip("_") == call}
    - {"alias", "detach", "lift_fresh_copy", "to", "rsub", "mm", "t"}
)

_INPUT_DTYPES = {torch.float32: DType.F32, torch.int64: DType.I32, torch.int32: DType.I32, torch.uint8: DType.U8}


@dataclass
class Forward:
    """A lowered forward pass: the graph with its input ports, and the model's result."""

    graph: Graph
    output: View


def lower(trace: Trace, weights: Weights, name: str) -> Forward:
    """The forward pass of ``trace`` as engine operations.

    Raises :class:`UnsupportedOperation` naming the call, its module and its source line.
    """
    graph = Graph(name)
    builder = Builder(graph, weights)
    known: dict[torch.fx.Node, Any] = {}
    needed = _ancestors(trace.output)
    for node in trace.nodes:
        if node.op == "placeholder":
            if node.name in trace.persistent:
                known[node] = Persistent(trace.persistent[node.name])
            else:
                known[node] = _input(graph, node)
        elif node.op == "call_function" and node in needed:
            folded = _folded(node, known, weights)
            known[node] = _call(builder, node, known, weights) if folded is None else folded
        elif node.op == "get_attr":
            raise UnsupportedOperation(f"the traced graph holds a {node.op} node ({node.target})")
    result = _resolve(known[trace.output], weights)
    if not isinstance(result, View) or result.value.dtype != DType.F32:
        raise CompileError("the model's result is not a float32 tensor")
    if not result.value.batched:
        raise CompileError("the model's result does not depend on its input")
    return Forward(graph, result)


@dataclass(frozen=True)
class Persistent:
    """A reference to a parameter or buffer; resolved when an operation takes it."""

    name: str


def _input(graph: Graph, node: torch.fx.Node) -> View:
    sample = node.meta["val"]
    dtype = _INPUT_DTYPES.get(sample.dtype)
    if dtype is None:
        raise CompileError(
            f"input {node.name!r} has an unsupported dtype", expected="float32, int64 or uint8", got=str(sample.dtype)
        )
    shape = tuple(int(size) for size in sample.shape)
    value = Value((shape[0] // PROBE_BATCH, *shape[1:]), dtype, Region.INPUT, batched=True, name=node.name)
    graph.inputs[node.name] = value
    return canonical(value, shape)


def _call(builder: Builder, node: torch.fx.Node, known: dict[torch.fx.Node, Any], weights: Weights) -> Any:
    target = getattr(node.target, "__name__", "") if not hasattr(node.target, "_schema") else str(node.target)
    lowering = TABLE.get(target)
    builder.place = module_path(node)
    if lowering is None:
        raise UnsupportedOperation(
            f"the runtime has no {target} ({_where(node)})",
            expected="calls among " + ", ".join(SUPPORTED),
            got=target,
            fix="Write this part of forward() with supported operations, or keep it outside the model.",
        )
    sample = node.meta.get("val")
    builder.shape = tuple(int(size) for size in sample.shape) if isinstance(sample, torch.Tensor) else ()
    builder.floating = not isinstance(sample, torch.Tensor) or sample.dtype.is_floating_point
    args = torch.fx.map_arg(node.args, lambda n: _resolve(known[n], weights))
    kwargs = torch.fx.map_arg(node.kwargs, lambda n: _resolve(known[n], weights))
    try:
        return lowering(builder, *args, **kwargs)
    except UnsupportedOperation as error:
        raise UnsupportedOperation(
            f"{target} is used in a way that the runtime does not have ({_where(node)}): {error.what}",
            expected=error.expected,
            got=error.got,
            fix=error.fix,
        ) from None


def _folded(node: torch.fx.Node, known: dict[torch.fx.Node, Any], weights: Weights) -> Any:
    """The result of a call that no example and no trained weight changes: computed here, once. Else None."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None  # random numbers are no constant
    tensors = {}
    for source in node.all_input_nodes:
        value = known[source]
        if isinstance(value, Persistent) and weights.first_name(value.name) not in weights.trainable:
            value = weights.tensor(value.name)
        if isinstance(value, (View, Persistent)) or (isinstance(value, list) and not _all_tensors(value)):
            return None
        tensors[source] = value
    with torch.no_grad():
        result = node.target(  # type: ignore[operator]  # a call_function node's target is callable
            *torch.fx.map_arg(node.args, tensors.__getitem__), **torch.fx.map_arg(node.kwargs, tensors.__getitem__)
        )
    return list(result) if isinstance(result, tuple) else result


def _all_tensors(values: list[Any]) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values)


def _resolve(known: Any, weights: Weights) -> Any:
    if isinstance(known, Persistent):
        return weights.view(known.name)
    if isinstance(known, torch.Tensor):
        data = as_array(known, "a constant computed in forward()", is_mask=True)
        return canonical(constant(data, "constant"), data.shape)
    return known


def _ancestors(node: torch.fx.Node) -> set[torch.fx.Node]:
    """``node`` and everything that it is computed from."""
    found: set[torch.fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending += current.all_input_nodes
    return found


def _where(node: torch.fx.Node) -> str:
    line = source_line(node)
    return f"in {module_path(node)}" + (f", at `{line}`" if line else "")
