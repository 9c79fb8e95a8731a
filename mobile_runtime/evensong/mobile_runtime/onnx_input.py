"""ONNX forms of what stands between raw data and the first layer. Text and lookups by hash have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from evensong.wire.program import Interpolation, Op

if TYPE_CHECKING:
    from evensong.mobile_runtime.onnx_export import Exporter

Attributes = Mapping[str, Any]


def _cast(g: Exporter, op: Op, a: Attributes) -> None:
    g.write(op.outputs[0], _to(g, g.read(op.inputs[0]), "FLOAT"))


def _one_hot(g: Exporter, op: Op, a: Attributes) -> None:
    width, columns = (g.program.tensors[index].dims[-1] for index in (op.inputs[0], op.outputs[0]))
    ids = g.constant(a["first"] + np.arange(columns), np.int32)
    found = _to(g, g.node("Equal", g.read(op.inputs[0], [-1, width, 1]), ids), "FLOAT")
    kind = "ReduceSum" if a["count"] else "ReduceMax"
    g.write(op.outputs[0], g.node(kind, found, g.constant([1], np.int64), keepdims=0))


def _bucketize(g: Exporter, op: Op, a: Attributes) -> None:
    x, boundaries = g.read(op.inputs[0], [-1, 1]), g.read(op.inputs[1])
    below = _to(g, g.node("LessOrEqual" if a["right"] else "Less", boundaries, x), "INT32")
    g.write(op.outputs[0], g.node("ReduceSum", below, g.constant([1], np.int64), keepdims=0))


_RESIZE = {
    Interpolation.NEAREST: {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    Interpolation.NEAREST_EXACT: {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
    Interpolation.BILINEAR: {"mode": "linear"},
}


def _resize2d(g: Exporter, op: Op, a: Attributes) -> None:
    image = g.node("Transpose", _to(g, g.read(op.inputs[0]), "FLOAT"), perm=[0, 3, 1, 2])
    size = g.constant(g.program.tensors[op.outputs[0]].dims[1:3], np.int64)
    size = g.node("Concat", g.node("Shape", image, start=0, end=2), size, axis=0)  # ONNX Runtime takes no axes here
    resized = g.node("Resize", image, "", "", size, **_RESIZE[Interpolation(a["mode"])])
    g.write(op.outputs[0], g.node("Transpose", resized, perm=[0, 2, 3, 1]))


def _crop2d(g: Exporter, op: Op, a: Attributes) -> None:
    """Outside training: the middle, or more than the image with zeros around it."""
    image, window = (g.program.tensors[index].dims[1:3] for index in (op.inputs[0], op.outputs[0]))
    value = g.read(op.inputs[0])
    starts = [(whole - part) // 2 for whole, part in zip(image, window, strict=True)]
    ends = [start + part for start, part in zip(starts, window, strict=True)]
    before = [max(0, -start) for start in starts]
    after = [max(0, end - whole) for end, whole in zip(ends, image, strict=True)]
    value = g.node("Pad", value, g.constant([*before, *after], np.int64), "", g.constant([1, 2], np.int64))
    bounds = [[place + pad for place, pad in zip(side, before, strict=True)] for side in (starts, ends)]
    g.write(op.outputs[0], g.node("Slice", value, *(g.constant(side, np.int64) for side in (*bounds, [1, 2]))))


def _byte_table(g: Exporter, op: Op, a: Attributes) -> None:
    channels = g.program.tensors[op.inputs[1]].dims[0]
    rows = g.constant(256 * np.arange(channels), np.int32)
    place = g.node("Add", _to(g, g.read(op.inputs[0], [-1, channels]), "INT32"), rows)
    g.write(op.outputs[0], g.node("Gather", g.read(op.inputs[1], [256 * channels]), place, axis=0))


def _to(g: Exporter, value: str, dtype: str) -> str:
    from onnx import TensorProto

    return g.node("Cast", value, to=getattr(TensorProto, dtype))


RULES: Mapping[str, Callable[[Exporter, Op, Attributes], None]] = {
    "CAST": _cast,
    "ONE_HOT": _one_hot,
    "BUCKETIZE": _bucketize,
    "RESIZE2D": _resize2d,
    "CROP2D": _crop2d,
    "QLUT_U8": _byte_table,
}
