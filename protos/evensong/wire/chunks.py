"""Blobs in parts: checksums, splitting, and the receiver's check of every part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final, Literal

import google_crc32c

from evensong.v1 import common_pb2
from evensong.wire.errors import CorruptError

ALREADY_THERE: Final = "already there"

_SLICE = 1 << 16


def sha256(data: bytes | bytearray | memoryview) -> bytes:
    """The 32 raw bytes of the content address."""
    return hashlib.sha256(data).digest()


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4) as an unsigned 32-bit number."""
    if isinstance(data, bytes):
        return int(google_crc32c.value(data))
    view = memoryview(data).cast("B")
    checksum = 0
    for start in range(0, len(view), _SLICE):  # the library takes only bytes: copy slices that stay in the cache
        checksum = google_crc32c.extend(checksum, bytes(view[start : start + _SLICE]))
    return checksum


def split(data: bytes | memoryview, chunk_bytes: int, start: int = 0) -> Iterator[common_pb2.BlobChunk]:
    """The chunks of ``data`` from byte ``start`` on, each of ``chunk_bytes`` but the last. An empty rest gives none."""
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    if not 0 <= start <= len(data):
        raise ValueError(f"start must lie within the {len(data)} bytes of the blob, got {start}")
    for offset in range(start, len(data), chunk_bytes):
        part = bytes(data[offset : offset + chunk_bytes])
        yield common_pb2.BlobChunk(offset=offset, data=part, crc32c=crc32c(part))


def check_chunk(
    chunk: common_pb2.BlobChunk, received_bytes: int, total_bytes: int, max_chunk_bytes: int
) -> bytes | Literal["already there"]:
    """The bytes to append at ``received_bytes``, or :data:`ALREADY_THERE` for a chunk that came before.

    A chunk of a wrong length or checksum, after a gap, across the end of what was received, or beyond the blob raises
    :class:`CorruptError`; the sender goes on from ``received_bytes``.
    """
    data = chunk.data  # each access copies
    length, end = len(data), chunk.offset + len(data)
    go_on = f"Go on from byte {received_bytes}."
    if not 1 <= length <= max_chunk_bytes:
        raise CorruptError("a chunk has a bad length", expected=f"1 to {max_chunk_bytes} bytes", got=length, fix=go_on)
    if end > total_bytes:
        raise CorruptError("a chunk ends beyond its blob", expected=f"at most byte {total_bytes}", got=end, fix=go_on)
    checksum = crc32c(data)
    if checksum != chunk.crc32c:
        raise CorruptError(
            "a chunk is damaged", expected=f"CRC32C {chunk.crc32c:08x}", got=f"{checksum:08x}", fix="Send it again."
        )
    if end <= received_bytes:
        return ALREADY_THERE
    if chunk.offset != received_bytes:
        raise CorruptError("a chunk is out of order", expected=f"offset {received_bytes}", got=chunk.offset, fix=go_on)
    return data
