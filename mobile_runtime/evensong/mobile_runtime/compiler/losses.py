"""The loss at the end of the evaluate and train programs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from evensong.mobile_runtime.compiler.ir import Graph, Value
from evensong.mobile_runtime.compiler.layout import View, arrange
from evensong.mobile_runtime.errors import CompileError
from evensong.wire.program import DType, Region

if TYPE_CHECKING:
    from torch import nn

LOSSES = ("cross_entropy", "mse", "bce")
_OPS = {"cross_entropy": "CROSS_ENTROPY", "mse": "MSE", "bce": "BCE_WITH_LOGITS"}


def loss_name(loss: str | nn.Module) -> str:
    """``"cross_entropy"``, ``"mse"`` or ``"bce"`` of a name or of the ``torch.nn`` loss that it stands for.

    Raises :class:`CompileError` for another loss, and for options that the runtime does not have.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise CompileError("unknown loss", expected=" or ".join(LOSSES), got=loss)
        return loss
    kind = type(loss).__name__
    names = {"CrossEntropyLoss": "cross_entropy", "MSELoss": "mse", "BCEWithLogitsLoss": "bce"}
    if kind not in names:
        raise CompileError("unknown loss", expected=" or ".join(names), got=kind)
    defaults: dict[str, Any] = {
        "reduction": "mean",
        "weight": None,
        "pos_weight": None,
        "label_smoothing": 0.0,
        "ignore_index": -100,
    }
    for option, default in defaults.items():
        given = getattr(loss, option, default)
        if given is not default and given != default:
            raise CompileError(f"{kind}({option}=...) is not supported", expected=default, got=given)
    return names[kind]


def add_loss(graph: Graph, output: View, loss: str, *, gradient: bool) -> dict[Value, Value]:
    """Adds the port ``target``, the loss operation and the ports ``loss`` and ``correct``.

    Returns the gradient of the model's output, by the value that has it; empty without ``gradient``.
    """
    rank = len(output.shape)
    if output.batch_axis != 0:
        raise CompileError("the model's result must have the batch first")
    if loss == "cross_entropy":
        if rank < 2:
            raise CompileError("cross entropy needs a score per class", expected="a result [n, classes]", got="[n]")
        order = (0, *range(2, rank), 1)
        scores = arrange(graph, output, order, "loss")
        rows = scores.dims[:-1]
        target = Value(rows, DType.I32, Region.INPUT, batched=True, name="target")
        operand = target.reshaped((math.prod(rows),))
    else:
        scores = arrange(graph, output, range(rank), "loss")
        target = operand = Value(scores.dims, DType.F32, Region.INPUT, batched=True, name="target")
    value = Value((1,), DType.F32, Region.OUTPUT, name="loss")
    correct = Value((1,), DType.I32, Region.OUTPUT, name="correct")
    outputs = [value, correct]
    if gradient:
        outputs.append(scores.like(name="gradient of the loss"))
    graph.add(_OPS[loss], [scores, operand], outputs, "loss")
    graph.inputs["target"] = target
    graph.outputs.update(loss=value, correct=correct)
    return {scores: outputs[2]} if gradient else {}
