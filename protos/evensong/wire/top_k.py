"""Sparse updates: the largest values and where they are. What is left out is not lost, it waits on the device.

Without *error feedback* top-k is biased: small values would never arrive. So a device adds what it left out to its next
delta (Stich et al., *Sparsified SGD with memory*, NeurIPS 2018); :func:`residual_of` is what to keep.

The body after the header (:mod:`evensong.wire.flat_codec`, kind 2, bits 8, or 0 for float32):

- ``f32``: the step of the 8-bit values, 0 for float32;
- ``u8`` 1 if what follows is coded (:mod:`evensong.wire.deflate`), three zero bytes;
- the places of the ``k`` values in ascending order, as gaps: of each the number of values left out since the one
  before, in groups of 7 bits from the least significant, all but the last with the top bit set;
- the values: ``f32``, or signed bytes that count steps.

``k`` is ``ceil(keep_fraction * d)`` of the ``d`` values of a layout. A step is the largest magnitude over 127, rounded
up to 17 significant bits, so that decoding is exact in float32; values are rounded to the nearest step, half to even.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from evensong.v1 import task_pb2
from evensong.wire.codecs import RandomWords
from evensong.wire.deflate import deflate_if_smaller, inflate
from evensong.wire.errors import CorruptError, UpdateError
from evensong.wire.flat_codec import FIXED_BYTES, FlatCodec
from evensong.wire.quantizer import round_up
from evensong.wire.tensors import FloatArray, Layout, check_tensors, layout_size

KIND = 2

_HEAD = struct.Struct("<fB3x")
_LONGEST_GAP = 5  # bytes
_MAX_STEP = 2.0**120  # 127 of them are finite


@dataclass(frozen=True)
class TopKCodec(FlatCodec):
    """``keep_fraction``: above 0, at most 1, of all values together. ``bits``: 8, or None for float32."""

    keep_fraction: float = 0.01
    bits: int | None = 8

    is_fixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.keep_fraction <= 1:
            raise UpdateError("keep_fraction is out of range", expected="above 0, at most 1", got=self.keep_fraction)
        if self.bits not in (None, 8):
            raise UpdateError("bits is out of range", expected="8, or None for float32", got=self.bits)

    def to_plan(self) -> task_pb2.UpdatePlan:
        """A plan with only ``codec``, ``bits`` and ``keep_fraction`` set."""
        return task_pb2.UpdatePlan(codec=task_pb2.CODEC_TOP_K, bits=self.bits or 0, keep_fraction=self.keep_fraction)

    def kept(self, size: int) -> int:
        """How many of ``size`` values travel."""
        return min(size, math.ceil(self.keep_fraction * size))

    def encoded_bytes(self, layout: Layout) -> int:
        """The most that an update of ``layout`` can have."""
        return FIXED_BYTES + _HEAD.size + self._most_bytes(layout_size(layout))

    def _kind_and_bits(self) -> tuple[int, int]:
        return KIND, self.bits or 0

    def _most_bytes(self, size: int) -> int:
        """Of gaps and values, not coded. A gap takes a second byte from 128 on, a third from 16,384 on, and so on."""
        kept = self.kept(size)
        return kept + min((_LONGEST_GAP - 1) * kept, size // 127) + kept * (1 if self.bits else 4)

    # --------------------------------------------------------------------------------------------------------- encoding

    def _encode_values(self, values: FloatArray, random_words: RandomWords) -> bytes:
        """Takes no random words: error feedback makes up for rounding too."""
        places = _largest(values, self.kept(values.size))
        kept = values[places]
        step = 0.0
        packed: bytes = kept.astype("<f4").tobytes()
        if self.bits:
            step = float(round_up(np.abs(kept).max(keepdims=True).astype(np.float64) / 127, 17)[0])
            packed = np.rint(kept / np.float64(step or 1.0)).astype(np.int8).tobytes()
        is_coded, coded = deflate_if_smaller(_pack_gaps(np.diff(places, prepend=-1) - 1) + packed)
        return _HEAD.pack(step, is_coded) + coded

    def _decode_values(self, payload: memoryview, size: int) -> FloatArray:
        if len(payload) < _HEAD.size:
            raise CorruptError("an update is truncated", expected=f"at least {_HEAD.size} bytes", got=len(payload))
        step, is_coded = _HEAD.unpack_from(payload)
        if is_coded > 1 or any(payload[5:8]) or not 0 <= step <= _MAX_STEP or (step and not self.bits):
            raise UpdateError("the head of a sparse update is malformed", got=bytes(payload[: _HEAD.size]).hex())
        content = bytes(payload[_HEAD.size :])
        if is_coded:
            content = inflate(content, self._most_bytes(size))
        kept = self.kept(size)
        split = len(content) - kept * (1 if self.bits else 4)
        if split < 0:
            raise CorruptError("a sparse update has too few values", expected=kept)
        places = _unpack_gaps(np.frombuffer(content, np.uint8, split), kept, size)
        values = np.zeros(size, np.float32)
        if self.bits:
            values[places] = np.frombuffer(content, np.int8, offset=split) * np.float32(step)
        else:
            values[places] = np.frombuffer(content, "<f4", offset=split)
            if not np.isfinite(values).all():
                raise UpdateError("an update is not finite", expected="no NaN or infinity")
        return values


def residual_of(
    delta: Mapping[str, npt.ArrayLike], update: bytes, codec: TopKCodec, layout: Layout
) -> dict[str, FloatArray]:
    """What ``update`` leaves of ``delta``: to be added to the next one."""
    tensors, sent = check_tensors(delta, layout), codec.decode(update, layout)
    return {spec.name: tensors[spec.name] - sent[spec.name] for spec in layout}


def _largest(values: FloatArray, count: int) -> npt.NDArray[np.int64]:
    """Places of the ``count`` values of largest magnitude, ascending; of equal ones the first."""
    magnitudes = np.abs(values)
    threshold = np.partition(magnitudes, values.size - count)[values.size - count]
    above = np.flatnonzero(magnitudes > threshold)
    equal = np.flatnonzero(magnitudes == threshold)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def _pack_gaps(gaps: npt.NDArray[np.int64]) -> bytes:
    groups = np.empty((gaps.size, _LONGEST_GAP), np.uint8)
    for index in range(_LONGEST_GAP):
        more = gaps >> 7 * (index + 1) > 0
        groups[:, index] = gaps >> 7 * index & 127 | more << 7
    used = np.ones((gaps.size, _LONGEST_GAP), bool)
    used[:, 1:] = groups[:, :-1] >= 128
    return groups[used].tobytes()


def _unpack_gaps(packed: npt.NDArray[np.uint8], count: int, size: int) -> npt.NDArray[np.int64]:
    """The places, checked: ``count`` of them, ascending, below ``size``."""
    ends = np.flatnonzero(packed < 128)
    lengths = np.diff(ends, prepend=-1)
    if ends.size != count or (packed.size and ends[-1] != packed.size - 1) or lengths.max(initial=1) > _LONGEST_GAP:
        raise CorruptError("the places of a sparse update are malformed", expected=f"{count} gaps")
    starts = ends - lengths + 1
    index = np.arange(packed.size) - np.repeat(starts, lengths)
    gaps = np.add.reduceat((packed & 127).astype(np.int64) << 7 * index, starts)
    places: npt.NDArray[np.int64] = np.cumsum(gaps + 1) - 1  # below 2^35 * 2^31: no overflow
    if places[-1] >= size:
        raise CorruptError("a place of a sparse update lies outside of its layout", expected=f"below {size}")
    return places
