"""Unsigned fields of equal width, packed into 64-bit lanes: what masks are added to and sums are read from.

A lane holds ``64 // width`` fields, the lowest field in the lowest bits; bits that are left over at its top are zero.
As long as no field's sum outgrows its width, no field carries into the next, so adding lanes modulo 2^64 adds every
field.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evensong.secagg.errors import ParameterError, ProtocolError
from evensong.wire.errors import UpdateError

WIDTHS = (8, 10, 12, 16, 21, 32)

Lanes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Fields:
    """``count`` fields of ``width`` bits."""

    count: int
    width: int

    def __post_init__(self) -> None:
        if self.width not in WIDTHS or not 0 <= self.count < 1 << 40:
            raise ParameterError("fields cannot be", expected=f"a count, and a width of {WIDTHS}", got=self)

    @classmethod
    def for_sum(cls, count: int, largest_sum: int) -> Fields:
        """The narrowest fields that hold ``largest_sum``; :class:`ParameterError` if none do."""
        return cls(count, width_for(largest_sum))

    @property
    def per_lane(self) -> int:
        return 64 // self.width

    @property
    def lanes(self) -> int:
        return -(-self.count // self.per_lane)

    @property
    def nbytes(self) -> int:
        return 8 * self.lanes

    def pack(self, values: npt.NDArray[np.unsignedinteger]) -> Lanes:
        """Unsigned integers [count] to uint64 [lanes]; :class:`UpdateError` for a value that outgrows its field."""
        if values.shape != (self.count,) or values.dtype.kind != "u":
            raise ValueError(f"fields must be unsigned [{self.count}], got {values.dtype} {values.shape}")
        if values.size and int(values.max()) >> self.width:
            raise UpdateError(
                "a value outgrows its field", expected=f"at most {self.width} bits", got=int(values.max())
            )
        lanes = np.zeros(self.lanes, "<u8")
        if self._is_native:
            lanes.view(f"<u{self.width // 8}")[: self.count] = values
            return lanes
        for place in range(self.per_lane):
            part = values[place :: self.per_lane].astype(np.uint64)
            part <<= np.uint64(place * self.width)
            lanes[: part.size] |= part  # the last lane may lack the higher fields
        return lanes

    def unpack(self, lanes: Lanes) -> npt.NDArray[np.uint64]:
        """uint64 [lanes] to uint64 [count]; :class:`ProtocolError` for another length, or bits between fields."""
        if lanes.shape != (self.lanes,) or lanes.dtype != np.uint64:
            raise ProtocolError(
                "a vector has the wrong length", expected=f"{self.lanes} lanes", got=f"{lanes.dtype} {lanes.shape}"
            )
        self._check_unused(lanes)
        if self._is_native:
            narrow = np.ascontiguousarray(lanes, "<u8").view(f"<u{self.width // 8}")
            return narrow[: self.count].astype(np.uint64)
        values = np.empty((self.lanes, self.per_lane), np.uint64)
        for place in range(self.per_lane):
            np.right_shift(lanes, np.uint64(place * self.width), out=values[:, place])
        values &= np.uint64((1 << self.width) - 1)
        return values.reshape(-1)[: self.count]

    @property
    def _is_native(self) -> bool:
        """Whether a field is a machine word, and packing a copy."""
        return self.width in (8, 16, 32)

    def _check_unused(self, lanes: Lanes) -> None:
        spare = self.per_lane * self.width
        dirty = spare < 64 and bool((lanes >> np.uint64(spare)).any())
        if self.count % self.per_lane:
            used = self.count % self.per_lane * self.width
            dirty = dirty or bool(lanes[-1] >> np.uint64(used))
        if dirty:
            raise ProtocolError("a vector has bits set that no field owns", expected="zero")


def width_for(largest_sum: int) -> int:
    """The least of :data:`WIDTHS` whose fields hold ``largest_sum``."""
    for width in WIDTHS:
        if largest_sum >> width == 0:
            return width
    raise ParameterError(
        "the largest sum outgrows every field",
        expected=f"at most {(1 << WIDTHS[-1]) - 1}",
        got=largest_sum,
        fix="Take fewer bits, or a smaller cohort.",
    )
