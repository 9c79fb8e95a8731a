"""The frame that tensors and updates share: magic, version, length and checksum before a body.

====== ===== ==========================================
offset bytes what, little-endian
====== ===== ==========================================
0      4     magic
4      2     format version
6      2     zero
8      8     bytes of the whole, header included
16     4     CRC32C of the body
20           body
====== ===== ==========================================
"""

from __future__ import annotations

import struct

from evensong.wire.chunks import crc32c
from evensong.wire.errors import CorruptError, WireError

_HEADER = struct.Struct("<4sHHQI")
HEADER_BYTES = _HEADER.size


def seal(buffer: bytearray, magic: bytes, version: int) -> bytes:
    """Writes the header over the first 20 bytes of ``buffer``, whose body is complete."""
    checksum = crc32c(memoryview(buffer)[HEADER_BYTES:])
    _HEADER.pack_into(buffer, 0, magic, version, 0, len(buffer), checksum)
    return bytes(buffer)


def open_frame(data: bytes | memoryview, magic: bytes, version: int, what: str) -> memoryview:
    """The body of ``data``, after every field of the header and the checksum held. Copies nothing."""
    view = memoryview(data)
    if len(view) < HEADER_BYTES:
        raise CorruptError(f"{what} is truncated", expected=f"at least {HEADER_BYTES} bytes", got=len(view))
    came, came_version, zero, size, checksum = _HEADER.unpack_from(view)
    if came != magic:
        raise CorruptError(f"this is not {what}", expected=f"magic {magic!r}", got=came)
    if came_version != version:
        raise WireError(
            f"{what} has a format that this version of evensong does not read",
            expected=f"format {version}",
            got=came_version,
            fix="Run the same version of evensong on both sides.",
        )
    if zero:
        raise CorruptError(f"the header of {what} has bytes set that must be zero", got=zero)
    if size != len(view):
        raise CorruptError(f"the length of {what} is wrong", expected=f"{size} bytes", got=len(view))
    body = view[HEADER_BYTES:]
    actual = crc32c(body)
    if actual != checksum:
        raise CorruptError(
            f"{what} is damaged", expected=f"CRC32C {checksum:08x}", got=f"{actual:08x}", fix="Send or fetch it again."
        )
    return body
