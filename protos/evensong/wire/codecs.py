"""Model updates to bytes and back: float32, or stochastic b-bit integers with a grid per tensor or per block.

A *group* is what shares a grid: a whole tensor, or ``block_size`` successive values of one (the last block of a tensor
may be shorter). Value ``x`` of a group travels as a code of ``b`` bits and comes back as ``lower + code * step``.
Rounding is stochastic, so that the update is unbiased: ``E[decode(encode(x))] = x``. This is QSGD's quantiser (Alistarh
et al., *QSGD: communication-efficient SGD via gradient quantization and encoding*, NeurIPS 2017) on the better of two
grids:

- *min-max*: ``lower = min``, ``step = (max - min) / (2^b - 1)``: the finest grid, best for dense updates;
- *zero-aligned* (b > 1, min < 0 < max): a little coarser, but 0 is a grid point and zeros travel without noise: best
  for sparse updates (embeddings, dead units).

The encoder takes for each group the one whose variance, ``step^2 * sum of f (1 - f)`` over the fractions ``f`` between
grid points, is smaller. The error of a value is below one step, whatever the choice.

``step`` is rounded up to 24 - b significant bits. So ``code * step`` is exact in float32, decoding has one rounding
(fused multiply-add or not), and every language gets the same bits.

The body after the frame (:mod:`evensong.wire.frame`, magic ``EVUP``, version 1), little-endian:

- ``u8`` b, 0 for float32; three zero bytes; ``u32`` block size, 0 for one grid a tensor;
- ``u32`` CRC32C of the layout's table (count, names, shapes: as in :mod:`evensong.wire.tensors`);
- float32: all values, tensor after tensor;
- integers: ``f32`` lower of each group, ``f32`` step of each group, then each tensor's codes, padded with zero codes to
  a multiple of eight, as one stream of bits: code ``i`` takes bits ``i * b`` to ``i * b + b - 1``, bit ``k`` being bit
  ``k % 8`` (from the least significant) of byte ``k // 8``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from evensong.v1 import task_pb2
from evensong.wire.chunks import crc32c
from evensong.wire.errors import CorruptError, UpdateError
from evensong.wire.frame import HEADER_BYTES, open_frame, seal
from evensong.wire.quantizer import min_max_grid, pack, position, unpack, zero_aligned_grid
from evensong.wire.tensors import FloatArray, Layout, check_tensors, layout_size, layout_table, split_tensors

MAGIC = b"EVUP"
VERSION = 1
MAX_BITS = 16
MAX_BLOCK = 1 << 24
MAX_MAGNITUDE = 2.0**126  #: of a value to quantise: leaves room for the grid's ends in float32

#: ``random_words(n)`` gives the next ``n`` uniform 32-bit words.
RandomWords = Callable[[int], npt.NDArray[np.uint32]]

_FIXED_BYTES = HEADER_BYTES + 12
_PIECE = 1 << 16  # values worked on at once: they stay in the cache, and NumPy's calls are few


@dataclass(frozen=True)
class UpdateCodec:
    """How an update travels.

    ``bits``: 1 to 16, or None for float32. ``block_size``: values that share a grid, a multiple of 8; 0 for one grid a
    tensor.
    """

    bits: int | None = 8
    block_size: int = 0

    is_fixed: ClassVar[bool] = True  #: every update of a layout has the same length

    def __post_init__(self) -> None:
        if self.bits is None:
            if self.block_size:
                raise UpdateError("float32 updates have no blocks", expected="block_size 0", got=self.block_size)
            return
        if not 1 <= self.bits <= MAX_BITS:
            raise UpdateError("bits is out of range", expected=f"1 to {MAX_BITS}, or None for float32", got=self.bits)
        if not 0 <= self.block_size <= MAX_BLOCK or self.block_size % 8:
            raise UpdateError(
                "block_size is out of range", expected=f"0, or a multiple of 8 up to {MAX_BLOCK}", got=self.block_size
            )

    @classmethod
    def from_plan(cls, plan: task_pb2.UpdatePlan) -> UpdateCodec:
        """The codec of a task; :class:`UpdateError` if the plan names none or is out of range."""
        if plan.codec == task_pb2.CODEC_FLOAT32 and not plan.bits:
            return cls(None, plan.block_size)
        if plan.codec == task_pb2.CODEC_QUANTIZED:
            return cls(plan.bits, plan.block_size)
        raise UpdateError(
            "the update plan has no codec that this version knows",
            expected="CODEC_FLOAT32 (with bits 0) or CODEC_QUANTIZED",
            got=f"{plan.codec} with {plan.bits} bits",
        )

    def to_plan(self) -> task_pb2.UpdatePlan:
        """A plan with only ``codec``, ``bits`` and ``block_size`` set."""
        if self.bits is None:
            return task_pb2.UpdatePlan(codec=task_pb2.CODEC_FLOAT32)
        return task_pb2.UpdatePlan(codec=task_pb2.CODEC_QUANTIZED, bits=self.bits, block_size=self.block_size)

    def encoded_bytes(self, layout: Layout) -> int:
        """The exact length of every update of ``layout``."""
        if self.bits is None:
            return _FIXED_BYTES + 4 * layout_size(layout)
        codes = sum(-(-spec.size // 8) * self.bits for spec in layout)
        return _FIXED_BYTES + 8 * self._groups(layout) + codes

    # --------------------------------------------------------------------------------------------------------- encoding

    def encode(self, delta: Mapping[str, npt.ArrayLike], layout: Layout, rng: np.random.Generator) -> bytes:
        """The update's bytes; ``delta`` has exactly the tensors of ``layout``, finite, at most 2^126 in magnitude.

        Raises :class:`UpdateError` otherwise. float32 takes nothing from ``rng``, integers one 32-bit word a value.
        """
        return self.encode_with(delta, layout, lambda count: rng.integers(0, 1 << 32, count, dtype=np.uint32))

    def encode_with(self, delta: Mapping[str, npt.ArrayLike], layout: Layout, random_words: RandomWords) -> bytes:
        """As :meth:`encode`, with the words given, so that another language can make the same bytes.

        Value ``i`` of the layout takes word ``i``: its code is ``floor((x - lower) / step + word * 2^-32)`` in float64,
        at most ``2^b - 1``; where step is 0 the code is 0.
        """
        tensors = check_tensors(delta, layout)
        values = np.concatenate([tensors[spec.name].reshape(-1) for spec in layout])
        buffer = bytearray(self.encoded_bytes(layout))
        buffer[HEADER_BYTES : HEADER_BYTES + 12] = self._header(layout)
        if self.bits is None:
            np.frombuffer(buffer, "<f4", offset=_FIXED_BYTES)[:] = values
        else:
            self._encode_integers(values, layout, random_words, np.frombuffer(buffer, np.uint8, offset=_FIXED_BYTES))
        return seal(buffer, MAGIC, VERSION)

    def _encode_integers(
        self, values: FloatArray, layout: Layout, random_words: RandomWords, body: npt.NDArray[np.uint8]
    ) -> None:
        assert self.bits is not None
        if values.size and max(-float(values.min()), float(values.max())) > MAX_MAGNITUDE:
            raise UpdateError("the update is too large to quantise", expected=f"magnitudes up to {MAX_MAGNITUDE:g}")
        groups = self._groups(layout)
        lower, step = self._choose_grids(values, layout)
        body[: 4 * groups].view("<f4")[:] = lower
        body[4 * groups : 8 * groups].view("<f4")[:] = step
        codes_body = body[8 * groups :]
        top = (1 << self.bits) - 1
        for piece in self._pieces(layout):
            grid = piece.groups
            places = position(piece.of(values), lower[grid], step[grid])
            uniform = random_words(piece.count).reshape(piece.rows, piece.columns) * 2.0**-32
            codes = np.minimum(np.floor(places + uniform), top).astype(np.uint16).reshape(-1)
            packed = pack(codes, self.bits)
            codes_body[piece.first_byte : piece.first_byte + packed.size] = packed

    def _choose_grids(self, values: FloatArray, layout: Layout) -> tuple[FloatArray, FloatArray]:
        """``lower`` and ``step`` of every group, by the smaller variance of the two grids."""
        assert self.bits is not None
        groups = self._groups(layout)
        least, most = np.full(groups, np.inf), np.full(groups, -np.inf)
        for piece in self._pieces(layout):
            part = piece.of(values)
            least[piece.groups] = np.minimum(least[piece.groups], part.min(axis=1))
            most[piece.groups] = np.maximum(most[piece.groups], part.max(axis=1))
        grids = [min_max_grid(least, most, self.bits)]
        if self.bits == 1:
            return grids[0]
        grids.append(zero_aligned_grid(least, most, self.bits))
        variances = np.zeros((2, groups))
        for piece in self._pieces(layout):
            part = piece.of(values)
            for variance, (lower, step) in zip(variances, grids, strict=True):
                fraction = position(part, lower[piece.groups], step[piece.groups])
                fraction -= np.floor(fraction)
                spread = (fraction * (1.0 - fraction)).sum(axis=1)
                variance[piece.groups] += spread * step[piece.groups].astype(np.float64) ** 2
        aligned = variances[1] < variances[0]
        return np.where(aligned, grids[1][0], grids[0][0]), np.where(aligned, grids[1][1], grids[0][1])

    # --------------------------------------------------------------------------------------------------------- decoding

    def decode(self, data: bytes | memoryview, layout: Layout) -> dict[str, FloatArray]:
        """The update as fresh float32 arrays in the author's shapes.

        Raises :class:`CorruptError` for damaged bytes and :class:`UpdateError` for an update of another layout or
        codec, or one that is not finite.
        """
        body = self._open(data, layout)
        values = np.empty(layout_size(layout), np.float32)
        for place, part in self._parts(body, layout):
            values[place] = part
        return split_tensors(values, layout)

    def accumulate(
        self, data: bytes | memoryview, layout: Layout, weight: float, into: npt.NDArray[np.float64]
    ) -> None:
        """Adds ``weight * update`` to ``into``, flat float64 [``layout_size(layout)``], piece by piece in the cache.

        Raises what :meth:`decode` raises, and :class:`UpdateError` for a weight that is not finite and above 0;
        everything is checked before anything is added.
        """
        check_accumulation(layout, weight, into)
        body = self._open(data, layout)
        weighted = np.empty(_PIECE)
        for place, part in self._parts(body, layout):
            target, buffer = into[place], weighted[: part.size]
            np.multiply(part, weight, out=buffer, dtype=np.float64)
            np.add(target, buffer, out=target)

    def _open(self, data: bytes | memoryview, layout: Layout) -> npt.NDArray[np.uint8]:
        """What follows the codec's header, after every check that an update can fail."""
        body = open_frame(data, MAGIC, VERSION, "an update")
        expected = self.encoded_bytes(layout)
        if len(data) >= _FIXED_BYTES and body[:12] != self._header(layout):
            self._refuse_header(body, layout)
        if len(data) != expected:
            raise UpdateError(
                "an update has the wrong length for its layout", expected=f"{expected} bytes", got=len(data)
            )
        payload = np.frombuffer(body, np.uint8, offset=12)
        if self.bits is None:
            values = payload.view("<f4")
            if not all(np.isfinite(values[at : at + _PIECE]).all() for at in range(0, values.size, _PIECE)):
                raise UpdateError(
                    "an update is not finite", expected="no NaN or infinity", fix="Clip it, or train with less."
                )
        else:
            self._check_grids(payload, layout)
            self._check_padding(payload, layout)
        return payload

    def _check_grids(self, payload: npt.NDArray[np.uint8], layout: Layout) -> None:
        assert self.bits is not None
        lower, step = self._grids(payload, layout)
        with np.errstate(over="ignore", invalid="ignore"):
            span = step * np.float32((1 << self.bits) - 1)
            good = np.isfinite(lower) & (step >= 0) & np.isfinite(span) & np.isfinite(lower + span)
        if not good.all():
            group = int(np.argmin(good))
            raise UpdateError(
                f"grid {group} of an update is not finite or has a negative step",
                expected="finite grid points",
                got=f"lower {lower[group]}, step {step[group]}",
            )

    def _check_padding(self, payload: npt.NDArray[np.uint8], layout: Layout) -> None:
        """The codes that fill a tensor up to a multiple of eight must be zero."""
        assert self.bits is not None
        end = 8 * self._groups(layout)
        for spec in layout:
            end += -(-spec.size // 8) * self.bits
            if spec.size % 8:
                last = int.from_bytes(payload[end - self.bits : end].tobytes(), "little")
                if last >> (spec.size % 8 * self.bits):
                    raise UpdateError(
                        f"the codes of tensor {spec.name!r} have a value too many", expected="zero padding"
                    )

    def _parts(self, payload: npt.NDArray[np.uint8], layout: Layout) -> Iterator[tuple[slice, FloatArray]]:
        """Decoded values piece by piece, each with its place; a part is only valid until the next one."""
        if self.bits is None:
            values = payload.view("<f4")
            for start in range(0, values.size, _PIECE):
                place = slice(start, min(start + _PIECE, values.size))
                yield place, values[place]
            return
        lower, step = self._grids(payload, layout)
        codes_body = payload[8 * self._groups(layout) :]
        buffer = np.empty(_PIECE, np.float32)
        for piece in self._pieces(layout):
            part = buffer[: piece.count]
            packed = codes_body[piece.first_byte : piece.first_byte + -(-piece.count // 8) * self.bits]
            np.copyto(part, unpack(packed, self.bits)[: piece.count])
            rows = part.reshape(piece.rows, piece.columns)
            rows *= step[piece.groups, None]
            rows += lower[piece.groups, None]
            yield slice(piece.first_value, piece.first_value + piece.count), part

    # ----------------------------------------------------------------------------------------------------------- places

    def _header(self, layout: Layout) -> bytes:
        head = bytes([self.bits or 0, 0, 0, 0]) + self.block_size.to_bytes(4, "little")
        return head + crc32c(layout_table(layout)).to_bytes(4, "little")

    def _refuse_header(self, body: memoryview, layout: Layout) -> None:
        """Says which part of the codec's header differs."""
        bits, block_size = body[0], int.from_bytes(body[4:8], "little")
        if (bits or None, block_size) != (self.bits, self.block_size):
            raise UpdateError(
                "an update was encoded by another codec than its task's",
                expected=str(self),
                got=f"bits={bits or None}, block_size={block_size}",
            )
        if any(body[1:4]):
            raise CorruptError("the header of an update has bytes set that must be zero")
        raise UpdateError(
            "an update belongs to another layout",
            expected=f"CRC32C {crc32c(layout_table(layout)):08x} of the layout's table",
            got=f"{int.from_bytes(body[8:12], 'little'):08x}",
            fix="Send only the tensors of the task, in their order.",
        )

    def _groups(self, layout: Layout) -> int:
        return sum(-(-spec.size // self.block_size) for spec in layout) if self.block_size else len(layout)

    def _grids(self, payload: npt.NDArray[np.uint8], layout: Layout) -> tuple[FloatArray, FloatArray]:
        groups = self._groups(layout)
        grids = payload[: 8 * groups].view("<f4").astype(np.float32)
        return grids[:groups], grids[groups:]

    def _pieces(self, layout: Layout) -> Iterator[_Piece]:
        """Cuts every tensor into pieces of at most ``_PIECE`` values: some whole groups, or a part of one group."""
        assert self.bits is not None
        first_value = first_group = first_byte = 0
        for spec in layout:
            width = self.block_size or spec.size
            start = 0
            while start < spec.size:
                left = spec.size - start
                if width <= min(_PIECE, left):
                    rows, columns = min(left, _PIECE) // width, width
                else:
                    rows, columns = 1, min(left, _PIECE, width - start % width)
                yield _Piece(
                    first_value + start,
                    rows,
                    columns,
                    first_group + start // width,
                    first_byte + start // 8 * self.bits,
                )
                start += rows * columns
            first_value += spec.size
            first_group += -(-spec.size // width)
            first_byte += -(-spec.size // 8) * self.bits


@dataclass(frozen=True, slots=True)
class _Piece:
    """``rows`` groups (or a part of one) of ``columns`` values each."""

    first_value: int  # in the layout
    rows: int
    columns: int
    first_group: int
    first_byte: int  # of its codes

    @property
    def count(self) -> int:
        return self.rows * self.columns

    @property
    def groups(self) -> slice:
        return slice(self.first_group, self.first_group + self.rows)

    def of(self, values: FloatArray) -> FloatArray:
        """float32 [rows, columns]."""
        return values[self.first_value : self.first_value + self.count].reshape(self.rows, self.columns)


def check_accumulation(layout: Layout, weight: float, into: npt.NDArray[np.float64]) -> None:
    """What every codec's ``accumulate`` asks of its arguments."""
    if not (math.isfinite(weight) and weight > 0):
        raise UpdateError("an update has a bad weight", expected="a finite number above 0", got=weight)
    if into.shape != (layout_size(layout),) or into.dtype != np.float64:
        raise ValueError(f"into must be float64 [{layout_size(layout)}], got {into.dtype} {into.shape}")


# ------------------------------------------------------------------------------------------------------------- clipping


def clip_to_norm(delta: Mapping[str, npt.ArrayLike], clip_norm: float) -> tuple[dict[str, FloatArray], float]:
    """The delta scaled down to an L2 norm over all tensors of at most ``clip_norm``, and the norm that it had.

    ``clip_norm`` 0 does not clip. A delta that is not finite raises :class:`UpdateError`: it must never leave a device.
    """
    if not (math.isfinite(clip_norm) and clip_norm >= 0):
        raise ValueError(f"clip_norm must be finite and not negative, got {clip_norm}")
    tensors = {name: np.asarray(values, np.float32) for name, values in delta.items()}
    squares = 0.0
    for name, values in tensors.items():
        wide = values.reshape(-1).astype(np.float64)
        square = float(np.dot(wide, wide))
        if not math.isfinite(square):
            raise UpdateError(f"the update of {name!r} is not finite", fix="Train with a smaller learning rate.")
        squares += square
    norm = math.sqrt(squares)
    if not clip_norm or norm <= clip_norm:
        return tensors, norm
    # one part in 2^20 lower, so that rounding to float32 never leaves the norm above the bound
    factor = clip_norm / norm * (1 - 2.0**-20)
    clipped = {name: np.multiply(values, factor, dtype=np.float64) for name, values in tensors.items()}
    return {name: values.astype(np.float32) for name, values in clipped.items()}, norm
