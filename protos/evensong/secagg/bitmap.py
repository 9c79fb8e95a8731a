"""Sets of members as bitmaps: one bit a place, least significant bit of the first byte first.

That is the little-endian encoding of the number with those bits, so a set is an ``int`` here: ``a & b`` intersects,
``a & ~b`` is empty for a subset, and ``bit_count()`` counts; all fast for thousands of members.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from evensong.secagg.errors import ProtocolError


def from_places(places: Iterable[int]) -> int:
    """The set of these places."""
    chosen = np.fromiter(places, np.int64)
    if not len(chosen):
        return 0
    bits = np.zeros(int(chosen.max()) + 1, np.uint8)
    bits[chosen] = 1
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def places(members: int, count: int) -> list[int]:
    """The places of a set among ``count`` members, ascending."""
    return list(np.flatnonzero(flags(members, count)).tolist())


def flags(members: int, count: int) -> npt.NDArray[np.bool_]:
    """One bool a place."""
    packed = np.frombuffer(encode(members, count), np.uint8)
    return np.unpackbits(packed, count=count, bitorder="little").view(np.bool_)


def encode(members: int, count: int) -> bytes:
    """The ceil(count / 8) bytes of a set among ``count`` members."""
    return members.to_bytes((count + 7) // 8, "little")


def decode(data: bytes, count: int, what: str) -> int:
    """The set; :class:`ProtocolError` about ``what`` if the length is wrong or a bit beyond the last member is set."""
    if len(data) != (count + 7) // 8:
        raise ProtocolError(
            f"{what}: the bitmap has a wrong length", expected=f"{(count + 7) // 8} bytes", got=len(data)
        )
    members = int.from_bytes(data, "little")
    if members >> count:
        raise ProtocolError(f"{what}: the bitmap names members that do not exist", expected=f"{count} members")
    return members
