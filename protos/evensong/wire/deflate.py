"""Entropy coding: zlib (RFC 1950) with Huffman codes only, for bytes without repeats but unevenly distributed."""

from __future__ import annotations

import zlib

from evensong.wire.errors import CorruptError


def deflate_if_smaller(data: bytes) -> tuple[bool, bytes]:
    """Whether coding pays, and the shorter of the two."""
    coder = zlib.compressobj(level=9, strategy=zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(data) + coder.flush()
    return (True, coded) if len(coded) < len(data) else (False, data)


def inflate(data: bytes | memoryview, most: int) -> bytes:
    """At most ``most`` bytes, whatever ``data`` would unfold to; :class:`CorruptError` if it is more, or damaged."""
    decoder = zlib.decompressobj()
    try:
        inflated = decoder.decompress(data, most + 1)
    except zlib.error as error:
        raise CorruptError("coded bytes are damaged", got=error) from None
    if len(inflated) > most or not decoder.eof or decoder.unused_data:
        raise CorruptError("coded bytes have the wrong length", expected=f"one stream of at most {most} bytes")
    return inflated
