"""Blobs in parts: checksums, splitting, and the receiver's check of every part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from evensong.v1 import common_pb2

ALREADY_THERE: Final = "already there"


def sha256(data: bytes | memoryview) -> bytes:
    """The 32 raw bytes of the content address."""
    raise NotImplementedError


def crc32c(data: bytes | bytearray | memoryview) -> int:
    raise NotImplementedError


def split(data: bytes | memoryview, chunk_bytes: int, start: int = 0) -> Iterator[common_pb2.BlobChunk]:
    """The chunks of ``data`` from byte ``start`` on. An empty blob has no chunk."""
    raise NotImplementedError


def check_chunk(
    chunk: common_pb2.BlobChunk, received_bytes: int, total_bytes: int, max_chunk_bytes: int
) -> bytes | Literal["already there"]:
    """The bytes to append at ``received_bytes``, or :data:`ALREADY_THERE` for a chunk that came before; else CorruptError."""
    raise NotImplementedError
