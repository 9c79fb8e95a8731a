"""What the codecs share that see an update as one flat vector: the frame, its header and its checks.

The body after the frame (:mod:`evensong.wire.frame`, magic ``EVUP``, version 1) begins as every update's does:
``u8`` bits, ``u8`` kind (0 for :class:`~evensong.wire.codecs.UpdateCodec`), two zero bytes, ``u32`` zero, ``u32``
CRC32C of the layout's table. What follows is the codec's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from evensong.v1 import task_pb2
from evensong.wire.chunks import crc32c
from evensong.wire.codecs import MAGIC, MAX_MAGNITUDE, VERSION, RandomWords, check_accumulation
from evensong.wire.errors import UpdateError
from evensong.wire.frame import HEADER_BYTES, open_frame, seal
from evensong.wire.tensors import FloatArray, Layout, check_tensors, layout_size, layout_table, split_tensors

FIXED_BYTES = HEADER_BYTES + 12

_PIECE = 1 << 16


class FlatCodec(ABC):
    """Base of :class:`~evensong.wire.rotated.RotatedCodec` and :class:`~evensong.wire.top_k.TopKCodec`."""

    #: Whether every update of a layout has the same length.
    is_fixed: ClassVar[bool]

    @abstractmethod
    def to_plan(self) -> task_pb2.UpdatePlan:
        """A plan with only the codec's own fields set."""

    @abstractmethod
    def encoded_bytes(self, layout: Layout) -> int:
        """The length of every update of ``layout``, or the most that one can have."""

    @abstractmethod
    def _kind_and_bits(self) -> tuple[int, int]: ...

    @abstractmethod
    def _encode_values(self, values: FloatArray, random_words: RandomWords) -> bytes:
        """What follows the header; ``values`` are finite, at most 2^126 in magnitude."""

    @abstractmethod
    def _decode_values(self, payload: memoryview, size: int) -> FloatArray:
        """The ``size`` values, finite and fresh, of a payload that may be hostile."""

    # ----------------------------------------------------------------------------------------- as UpdateCodec has them

    def encode(self, delta: Mapping[str, npt.ArrayLike], layout: Layout, rng: np.random.Generator) -> bytes:
        """The update's bytes; ``delta`` has exactly the tensors of ``layout``, finite, at most 2^126 in magnitude.

        Raises :class:`UpdateError` otherwise.
        """
        return self.encode_with(delta, layout, lambda count: rng.integers(0, 1 << 32, count, dtype=np.uint32))

    def encode_with(self, delta: Mapping[str, npt.ArrayLike], layout: Layout, random_words: RandomWords) -> bytes:
        """As :meth:`encode`, with the random words given, so that another language can make the same bytes."""
        tensors = check_tensors(delta, layout)
        values = np.concatenate([tensors[spec.name].reshape(-1) for spec in layout])
        if max(-float(values.min()), float(values.max())) > MAX_MAGNITUDE:
            raise UpdateError("the update is too large to encode", expected=f"magnitudes up to {MAX_MAGNITUDE:g}")
        payload = self._encode_values(values, random_words)
        return seal(bytearray(bytes(HEADER_BYTES) + self._header(layout) + payload), MAGIC, VERSION)

    def decode(self, data: bytes | memoryview, layout: Layout) -> dict[str, FloatArray]:
        """The update as fresh float32 arrays in the author's shapes.

        Raises :class:`CorruptError` for damaged bytes and :class:`UpdateError` for an update of another layout or
        codec, or one that is not finite.
        """
        return split_tensors(self._open(data, layout), layout)

    def accumulate(
        self, data: bytes | memoryview, layout: Layout, weight: float, into: npt.NDArray[np.float64]
    ) -> None:
        """Adds ``weight * update`` to ``into``, flat float64 [``layout_size(layout)``].

        Raises what :meth:`decode` raises, and :class:`UpdateError` for a weight that is not finite and above 0;
        everything is checked before anything is added.
        """
        check_accumulation(layout, weight, into)
        values = self._open(data, layout)
        for start in range(0, values.size, _PIECE):
            part = values[start : start + _PIECE].astype(np.float64)
            part *= weight
            into[start : start + _PIECE] += part

    # ------------------------------------------------------------------------------------------------------ the header

    def _header(self, layout: Layout) -> bytes:
        kind, bits = self._kind_and_bits()
        return bytes([bits, kind, 0, 0, 0, 0, 0, 0]) + crc32c(layout_table(layout)).to_bytes(4, "little")

    def _open(self, data: bytes | memoryview, layout: Layout) -> FloatArray:
        """The values, after every check that an update can fail."""
        body = open_frame(data, MAGIC, VERSION, "an update")
        header = self._header(layout)
        if body[:8] != header[:8]:
            raise UpdateError(
                "an update was encoded by another codec than its task's", expected=str(self), got=body[:8].hex()
            )
        if body[8:12] != header[8:]:
            raise UpdateError(
                "an update belongs to another layout",
                expected=f"CRC32C {crc32c(layout_table(layout)):08x} of the layout's table",
                got=f"{int.from_bytes(body[8:12], 'little'):08x}",
                fix="Send only the tensors of the task, in their order.",
            )
        most = self.encoded_bytes(layout)
        if len(data) > most or (self.is_fixed and len(data) < most):
            raise UpdateError(
                "an update has the wrong length for its layout",
                expected=f"{'' if self.is_fixed else 'at most '}{most} bytes",
                got=len(data),
            )
        return self._decode_values(body[12:], layout_size(layout))
