"""The operations of an inference graph in torch, differentiable: what quantisation-aware training runs.

Tensors are as the engine has them: channels-last, ``[N, H, W, C]``. Each function takes the node, the operands and the
result's shape ``[n * rows, ...]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from evensong.mobile_runtime.compiler.ir import Node, Value
from evensong.mobile_runtime.twin import KERNELS
from evensong.mobile_runtime.twin_call import Call, Clock
from evensong.wire.program import Activation, Interpolation, Region, Tensor

Tensors = Sequence[torch.Tensor]
Shape = tuple[int, ...]
TorchOp = Callable[[Node, Tensors, Shape], torch.Tensor]


def linear(node: Node, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """LINEAR without its activation."""
    del node
    return F.linear(x.reshape(-1, w.shape[1]), w, b)


def conv2d(
    node: Node, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, shape: Shape, padding: float = 0.0
) -> torch.Tensor:
    """CONV2D without its activation; ``padding`` is what lies around the image."""
    attrs = {name: int(value) for name, value in node.attrs.items() if name not in ("lo", "hi")}
    stride, dilation = (attrs["stride_h"], attrs["stride_w"]), (attrs["dilation_h"], attrs["dilation_w"])
    around = _around(x.shape, shape, tuple(w.shape[1:3]), stride, dilation, (attrs["pad_top"], attrs["pad_left"]))
    image = F.pad(x.permute(0, 3, 1, 2), around, value=padding)
    return F.conv2d(image, w.permute(0, 3, 1, 2), b, stride, 0, dilation, attrs["groups"]).permute(0, 2, 3, 1)


def max_pool2d(node: Node, x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """MAX_POOL2D's first result; padding never wins."""
    kernel, stride, around = _pooling(node, x.shape, shape)
    image = F.pad(x.permute(0, 3, 1, 2), around, value=-math.inf)
    return F.max_pool2d(image, kernel, stride).permute(0, 2, 3, 1)


def window_sums(node: Node, x: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the windows of an average pooling, and the number of places that each counts ``[1, P, Q, 1]``."""
    kernel, stride, around = _pooling(node, x.shape, shape)
    places = kernel[0] * kernel[1]
    sums = F.avg_pool2d(F.pad(x.permute(0, 3, 1, 2), around), kernel, stride) * places
    if node.attrs["count_include_pad"]:
        return sums.permute(0, 2, 3, 1), torch.full((1, 1, 1, 1), float(places), dtype=x.dtype)
    ones = F.pad(torch.ones(1, 1, *x.shape[1:3], dtype=x.dtype), around)
    counts = torch.round(F.avg_pool2d(ones, kernel, stride) * places)
    return sums.permute(0, 2, 3, 1), counts.permute(0, 2, 3, 1)


def result_of(node: Node) -> Value:
    """The one result that inference reads, which a function gives: of a recurrent layer the states, not the gates."""
    return node.outputs[1 if node.op in ("GRU", "LSTM") else 0]


def activate(y: torch.Tensor, kind: float) -> torch.Tensor:
    """Any :class:`Activation`."""
    return _ACTIVATIONS[Activation(int(kind))](y)


# --------------------------------------------------------------------------------------------------------------- table


def _linear(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    x, w, *b = operands
    return activate(linear(node, x, w, b[0] if b else None), node.attrs["activation"])


def _conv2d(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    x, w, *b = operands
    return activate(conv2d(node, x, w, b[0] if b else None, shape), node.attrs["activation"])


def _avg_pool2d(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    sums, counts = window_sums(node, operands[0], shape)
    return sums / counts


def _batch_norm_eval(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    x, gamma, beta, mean, var = operands
    return (x - mean) * torch.rsqrt(var + node.attrs["eps"]) * gamma + beta


def _layer_norm(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    x, gamma, beta = operands
    rows = x.reshape(-1, gamma.numel())
    return F.layer_norm(rows, (gamma.numel(),), gamma.reshape(-1), beta.reshape(-1), float(node.attrs["eps"]))


def _conv2d_transposed(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    x, w = operands
    attrs = {name: int(value) for name, value in node.attrs.items()}
    stride, dilation = (attrs["stride_h"], attrs["stride_w"]), (attrs["dilation_h"], attrs["dilation_w"])
    padding = attrs["pad_top"], attrs["pad_left"]
    image, weight = x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2)
    full = F.conv_transpose2d(image, weight, None, stride, 0, 0, attrs["groups"], dilation)
    missing = [shape[2 - axis] + padding[1 - axis] - full.shape[3 - axis] for axis in (0, 1)]
    whole = F.pad(full, (0, missing[0], 0, missing[1]))  # negative where the result ends before the last window
    return whole[:, :, padding[0] :, padding[1] :].permute(0, 2, 3, 1)


def _group_norm(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    x, gamma, beta = operands
    groups = node.outputs[1].dims[1]
    return F.group_norm(x.permute(0, 2, 1), groups, gamma, beta, float(node.attrs["eps"])).permute(0, 2, 1)


def _rms_norm(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    x, gamma = operands
    rows = x.reshape(-1, gamma.numel())
    return F.rms_norm(rows, (gamma.numel(),), gamma.reshape(-1), float(node.attrs["eps"]))


def _step(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    a, b = operands
    rows, row = a.reshape(-1, b.numel()), b.reshape(1, -1)
    return (rows > row).to(a.dtype) + (rows == row).to(a.dtype) * node.attrs["at_equal"]


def _matmul(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    a, b = operands
    transpose = node.attrs["transpose"]
    return (a.mT if transpose == 1 else a) @ (b.mT if transpose == 2 else b)


def _attention(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    q, k, v = (operand.transpose(1, 2) for operand in operands)
    is_causal, scale = bool(node.attrs["causal"]), float(node.attrs["scale"])
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale).transpose(1, 2)


def _recurrent(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    gx, w, b = operands
    layer: Any = torch.gru if node.op == "GRU" else torch.lstm
    identity = torch.eye(len(w), dtype=gx.dtype)
    zeros = gx.new_zeros(1, gx.shape[0], w.shape[1])
    reverse = bool(node.attrs["reverse"])
    given = gx.flip(1) if reverse else gx
    state = zeros if node.op == "GRU" else (zeros, zeros)
    y = layer(given, state, [identity, w, torch.zeros_like(b), b], True, 1, 0.0, False, False, True)[0]
    return y.flip(1) if reverse else y  # type: ignore[no-any-return]  # torch.gru and torch.lstm have no one type


def _binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> TorchOp:
    def run(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
        a, b = operands
        return function(a.reshape(-1, b.numel()), b.reshape(1, -1))

    return run


def _reduce_mean(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    return operands[0].reshape(-1, int(node.attrs["axis_size"]), int(node.attrs["inner_size"])).mean(dim=1)


def _spread(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    axis, inner = int(node.attrs["axis_size"]), int(node.attrs["inner_size"])
    return (operands[0].reshape(-1, 1, inner) / axis).expand(-1, axis, inner)


def _transpose(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    return operands[0].permute([int(axis) for axis in node.attrs.values() if axis >= 0])


def _slice(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    axis, start = int(node.attrs["axis"]), int(node.attrs["start"])
    return operands[0].narrow(axis, start, shape[axis])


def _resize2d(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    mode = Interpolation(int(node.attrs["mode"])).name.lower().replace("_", "-")
    corners = False if mode == "bilinear" else None
    image = operands[0].float().permute(0, 3, 1, 2)
    return F.interpolate(image, shape[1:3], mode=mode, align_corners=corners).permute(0, 2, 3, 1)


def _without_gradient(node: Node, operands: Tensors, shape: Shape) -> torch.Tensor:
    """By the twin, for what has no gradient or stands before everything that is trained."""
    arrays = [operand.detach().numpy() for operand in operands]
    narrow = [a.astype(v.dtype.numpy) for a, v in zip(arrays, node.inputs, strict=True)]
    tensor = Tensor(node.outputs[0].dtype, Region.ARENA, shape, 0)
    call = Call((shape,), (), (tensor,), Clock(0.0, 1, 0))
    return torch.from_numpy(np.ascontiguousarray(KERNELS[node.op](call, *narrow, **node.attrs)))


#: Every float32 operation that inference graphs hold, and those that move elements of any dtype.
TABLE: Mapping[str, TorchOp] = {
    "LINEAR": _linear,
    "CONV2D": _conv2d,
    "MAX_POOL2D": lambda node, operands, shape: max_pool2d(node, operands[0], shape),
    "AVG_POOL2D": _avg_pool2d,
    "BATCH_NORM_EVAL": _batch_norm_eval,
    "LAYER_NORM": _layer_norm,
    "MATMUL": _matmul,
    "ATTENTION": _attention,
    "FILL": lambda node, operands, shape: torch.full(shape, float(node.attrs["value"])),
    "GROUP_NORM": _group_norm,
    "RMS_NORM": _rms_norm,
    "CONV2D_GRAD_INPUT": _conv2d_transposed,
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "UNARY": lambda node, operands, shape: activate(operands[0], node.attrs["kind"]),
    "ADD": _binary(torch.add),
    "SUB": _binary(torch.sub),
    "MUL": _binary(torch.mul),
    "MAXIMUM": _binary(torch.maximum),
    "MINIMUM": _binary(torch.minimum),
    "STEP": _step,
    "SCALE": lambda node, operands, shape: operands[0] * node.attrs["alpha"] + node.attrs["beta"],
    "REDUCE_MEAN": _reduce_mean,
    "REDUCE_MEAN_GRAD": _spread,
    "TRANSPOSE": _transpose,
    "CONCAT": lambda node, operands, shape: torch.cat(list(operands), dim=int(node.attrs["axis"])),
    "SLICE": _slice,
    "COPY": lambda node, operands, shape: operands[0],
    "EMBEDDING": lambda node, operands, shape: operands[1][operands[0].long()],
    "SOFTMAX": lambda node, operands, shape: torch.softmax(operands[0], dim=-1),
    "LOG_SOFTMAX": lambda node, operands, shape: torch.log_softmax(operands[0], dim=-1),
    "CAST": lambda node, operands, shape: operands[0].float(),
    "RESIZE2D": _resize2d,
    **dict.fromkeys(("CROP2D", "TOKENIZE", "LOOKUP", "ONE_HOT", "BUCKETIZE"), _without_gradient),
}

_ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.NONE: lambda y: y,
    Activation.RELU: F.relu,
    Activation.RELU6: F.relu6,
    Activation.HARDSWISH: F.hardswish,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda y: F.gelu(y, approximate="tanh"),
    Activation.SIGMOID: torch.sigmoid,
    Activation.TANH: torch.tanh,
    Activation.SILU: F.silu,
    Activation.EXP: torch.exp,
    Activation.LOG: torch.log,
    Activation.SQRT: torch.sqrt,
    Activation.RECIPROCAL: torch.reciprocal,
}


# ------------------------------------------------------------------------------------------------------------- helpers


def _pooling(node: Node, image: Sequence[int], shape: Shape) -> tuple[tuple[int, int], tuple[int, int], list[int]]:
    attrs = {name: int(value) for name, value in node.attrs.items() if name != "ratio"}
    kernel, stride = (attrs["kernel_h"], attrs["kernel_w"]), (attrs["stride_h"], attrs["stride_w"])
    return kernel, stride, _around(image, shape, kernel, stride, (1, 1), (attrs["pad_top"], attrs["pad_left"]))


def _around(
    image: Sequence[int],
    shape: Shape,
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    before: tuple[int, int],
) -> list[int]:
    """Padding left, right, top, bottom; right and bottom follow from the result's size, negative where input is cut."""
    padding: list[int] = []
    for axis in (1, 0):
        reach = (shape[1 + axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1
        padding += [before[axis], reach - image[1 + axis] - before[axis]]
    return padding
