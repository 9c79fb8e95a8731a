"""From a ``torch.nn.Module`` to a traced graph: ``torch.export``, without decomposition, once a mode.

The batch is traced at PROBE_BATCH examples, whatever the example inputs have.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.export.graph_signature import InputKind

from evensong.mobile_runtime.compiler.attention_module import readable_attention
from evensong.mobile_runtime.compiler.layout import PROBE_BATCH
from evensong.mobile_runtime.errors import CompileError


@dataclass(frozen=True)
class Trace:
    """One mode of a model as a graph of ATen calls."""

    nodes: tuple[torch.fx.Node, ...]
    inputs: tuple[str, ...]  #: placeholders of the model's inputs, in order
    persistent: dict[str, str]  #: placeholder -> name in the state dict (parameters, buffers, lifted constants)
    constants: dict[str, torch.Tensor]  #: content of persistent tensors that the state dict does not hold
    output: torch.fx.Node


def trace(model: nn.Module, example_inputs: Sequence[torch.Tensor], *, training: bool) -> Trace:
    """Exports ``model`` in one mode and puts every submodule's mode back.

    Raises :class:`CompileError` when the model cannot be exported (data-dependent control flow, a fixed batch size,
    more than one output).
    """
    probes = tuple(_probe(example, index) for index, example in enumerate(example_inputs))
    with _mode(model, training), readable_attention(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_flat_weights")  # of recurrent layers: torch puts them back
        try:
            exported = torch.export.export(model, probes, strict=False)
        except CompileError:
            raise
        except Exception as error:
            raise CompileError(
                "torch.export cannot trace the model",
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
                fix="Remove control flow that depends on data, and any fixed batch size, from forward().",
            ) from error
    inputs, persistent, constants = [], {}, {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(spec.arg.name)
            continue
        if spec.target is None:
            raise CompileError("the model takes something that is not a tensor", got=spec.kind.name)
        persistent[spec.arg.name] = spec.target
        if spec.kind in (InputKind.CONSTANT_TENSOR, InputKind.BUFFER) and spec.target in exported.constants:
            constants[spec.target] = exported.constants[spec.target]
    nodes = tuple(exported.graph.nodes)
    return Trace(nodes, tuple(inputs), persistent, constants, _single_output(nodes[-1]))


def module_path(node: torch.fx.Node) -> str:
    """The place of a traced call in the author's model, such as ``body.2 (Conv2d)``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "model"
    path, kind = stack[-1]
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return f"{path or 'model'} ({name.rpartition('.')[2]})"


def source_line(node: torch.fx.Node) -> str:
    """The author's line that made a call, or an empty string."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _probe(example: torch.Tensor, index: int) -> torch.Tensor:
    if example.dim() < 1 or example.shape[0] < 1:
        raise CompileError(
            f"example input {index} is not a batch",
            expected="a tensor or array [n, ...] with n >= 1",
            got=tuple(example.shape),
        )
    return example[:1].expand(PROBE_BATCH, *example.shape[1:]).contiguous()


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _single_output(node: torch.fx.Node) -> torch.fx.Node:
    results = node.args[0]
    found = results if isinstance(results, (tuple, list)) else (results,)
    if len(found) != 1 or not isinstance(found[0], torch.fx.Node):
        raise CompileError("the model must return one tensor", got=f"{len(found)} results")
    return found[0]
