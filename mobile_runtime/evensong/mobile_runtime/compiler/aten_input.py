"""Calls between raw data and the first layer: text, categories, intervals, images. Those of the namespace ``evensong``
are made by :mod:`evensong.mobile_runtime.preprocessing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from evensong.mobile_runtime.compiler.builder import NHWC, Builder, require
from evensong.mobile_runtime.compiler.layout import View, canonical
from evensong.wire.program import DType, Interpolation


def tokenize(b: Builder, text: View, width: int, lower: bool, strip: bool, split: int, ngrams: int, salt: int) -> View:
    """uint8 [..., bytes] -> hashes [..., width]."""
    require(text.value.dtype == DType.U8, "text that is not bytes", expected="uint8", got=text.value.dtype.name)
    require(len(text.shape) > 1, "a text across the examples of a batch", expected="[n, bytes]")
    operand = b.arrange(text, range(len(text.shape)))
    how = {"lower": lower, "strip": strip, "split": split, "ngrams": ngrams, "salt": salt}
    hashes = b.emit_as(DType.I32, "TOKENIZE", [operand], (*operand.dims[:-1], width), **how)
    return canonical(hashes, b.shape)


def lookup(b: Builder, x: View, table: View | None, first: int, bins: int, salt: int) -> View:
    """Integers -> ids of the same shape."""
    _check_integers(x)
    operands = [x.value] if table is None else [x.value, table.value]
    ids = b.emit_as(DType.I32, "LOOKUP", operands, x.value.dims, first=first, bins=bins, salt=salt)
    return View(ids, x.shape, x.order)


def one_hot(b: Builder, ids: View, columns: int, first: int, count: bool) -> View:
    """Integers [..., n] -> float32 [..., columns]."""
    _check_integers(ids)
    b.example_axis(ids, -1, "an encoding of categories")
    operand = b.arrange(ids, range(len(ids.shape)))
    return canonical(b.emit("ONE_HOT", [operand], (*operand.dims[:-1], columns), first=first, count=count), b.shape)


def bucketize(b: Builder, x: View, boundaries: View, *, out_int32: bool = False, right: bool = False) -> View:
    """``torch.bucketize``."""
    require(not boundaries.value.batched, "boundaries that are computed from the examples")
    require(x.value.dtype == DType.F32, "intervals of integers", fix="Convert to float32 first: x.float().")
    buckets = b.emit_as(DType.I32, "BUCKETIZE", [x.value, boundaries.value], x.value.dims, right=right)
    return View(buckets, x.shape, x.order)


def upsample_nearest(b: Builder, x: View, size: Any, scales: Sequence[float] | None = None) -> View:
    """``torch.nn.functional.interpolate(mode="nearest")``."""
    return _resize(b, x, scales, Interpolation.NEAREST)


def upsample_nearest_exact(b: Builder, x: View, size: Any, scales: Sequence[float] | None = None) -> View:
    """``torch.nn.functional.interpolate(mode="nearest-exact")``."""
    return _resize(b, x, scales, Interpolation.NEAREST_EXACT)


def upsample_bilinear(
    b: Builder, x: View, size: Any, align_corners: bool, scales: Sequence[float] | None = None
) -> View:
    """``torch.nn.functional.interpolate(mode="bilinear")``."""
    require(not align_corners, "resizing with align_corners")
    return _resize(b, x, scales, Interpolation.BILINEAR)


def crop2d(
    b: Builder, x: View, height: int, width: int, random: bool, pad_h: int, pad_w: int, flip_h: bool, flip_v: bool
) -> View:
    """Images [N, C, H, W] -> windows [N, C, height, width]."""
    operand = b.arrange(x, NHWC)
    stream = b.stream() if random else 0
    how = {"random": random, "pad_h": pad_h, "pad_w": pad_w, "flip_h": flip_h, "flip_v": flip_v, "stream": stream}
    windows = b.emit_as(operand.dtype, "CROP2D", [operand], (operand.dims[0], height, width, x.shape[1]), **how)
    return View(windows, b.shape, NHWC)


def _resize(b: Builder, x: View, scales: Sequence[float] | None, mode: Interpolation) -> View:
    sizes = zip(scales or (), x.shape[2:], b.shape[2:], strict=False)
    even = all(scale * before == after for scale, before, after in sizes)
    require(even, "resizing by a factor that does not give whole pixels", fix="Give the size instead of the factor.")
    operand = b.arrange(x, NHWC)
    return View(b.emit("RESIZE2D", [operand], (operand.dims[0], *b.shape[2:], x.shape[1]), mode=mode), b.shape, NHWC)


def _check_integers(x: View) -> None:
    require(x.value.dtype == DType.I32, "a lookup of what is no integer of 32 bits", got=x.value.dtype.name)


TABLE: dict[str, Callable[..., Any]] = {
    "evensong.tokenize.default": tokenize,
    "evensong.lookup.default": lookup,
    "evensong.one_hot.default": one_hot,
    "evensong.crop2d.default": crop2d,
    "aten.bucketize.Tensor": bucketize,
    "aten.upsample_nearest2d.vec": upsample_nearest,
    "aten._upsample_nearest_exact2d.vec": upsample_nearest_exact,
    "aten.upsample_bilinear2d.vec": upsample_bilinear,
}
