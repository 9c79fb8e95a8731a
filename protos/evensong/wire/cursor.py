"""A bounds-checked reader over untrusted little-endian bytes."""

from __future__ import annotations

import struct
from typing import Any

from evensong.wire.errors import CorruptError


class Cursor:
    """Reads forward through ``data``; running past the end raises :class:`CorruptError` that names the place."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data = memoryview(data)
        self._what = what
        self.offset = 0

    @property
    def remaining(self) -> int:
        return len(self._data) - self.offset

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes, without a copy."""
        if count < 0 or count > self.remaining:
            raise CorruptError(
                f"{self._what} is truncated at byte {self.offset}",
                expected=f"{count} more bytes",
                got=self.remaining,
                fix="Fetch or build it again.",
            )
        part = self._data[self.offset : self.offset + count]
        self.offset += count
        return part

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Values of a :mod:`struct` layout, always little-endian."""
        layout = "<" + layout
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "little")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def i32(self) -> int:
        return int.from_bytes(self.take(4), "little", signed=True)

    def f32(self) -> float:
        value: float = struct.unpack("<f", self.take(4))[0]
        return value

    def name(self) -> str:
        """A u16 length and that many bytes of UTF-8, 1 to 255 of them."""
        length = self.u16()
        if not 1 <= length <= 255:
            raise CorruptError(f"a name in {self._what} has a bad length", expected="1 to 255 bytes", got=length)
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError as error:
            raise CorruptError(f"a name in {self._what} is not UTF-8", got=str(error)) from None

    def end(self) -> None:
        """Refuses left-over bytes."""
        if self.remaining:
            raise CorruptError(f"{self._what} has {self.remaining} bytes too many after byte {self.offset}")


def pack_name(name: str) -> bytes:
    """The bytes that :meth:`Cursor.name` reads."""
    data = name.encode()
    if not 1 <= len(data) <= 255:
        raise CorruptError("a name must have 1 to 255 bytes of UTF-8", got=name)
    return len(data).to_bytes(2, "little") + data
