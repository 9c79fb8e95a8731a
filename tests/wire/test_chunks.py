"""Blobs in parts: whatever is lost, repeated or damaged, the receiver ends with the blob or says where to go on."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evensong.v1 import common_pb2
from evensong.wire import ALREADY_THERE, CorruptError, check_chunk, crc32c, split


def chunk(offset: int, data: bytes) -> common_pb2.BlobChunk:
    return common_pb2.BlobChunk(offset=offset, data=data, crc32c=crc32c(data))


@given(st.binary(max_size=300), st.integers(1, 64), st.data())
def test_the_parts_give_the_blob_from_any_start(blob: bytes, chunk_bytes: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(blob)))
    received = bytearray(blob[:start])
    for part in split(blob, chunk_bytes, start):
        new = check_chunk(part, len(received), len(blob), chunk_bytes)
        assert new != ALREADY_THERE
        received += new
    assert received == blob


@given(st.binary(min_size=1, max_size=300), st.integers(1, 64), st.randoms())
def test_a_disorderly_sender_ends_with_the_blob(blob: bytes, chunk_bytes: int, random: Random) -> None:
    """Chunks arrive in any order and repeatedly; those out of order are refused and change nothing."""
    parts = list(split(blob, chunk_bytes))
    received = bytearray()
    while len(received) < len(blob):
        part = random.choice(parts)
        if part.offset > len(received):
            with pytest.raises(CorruptError, match=f"Go on from byte {len(received)}"):
                check_chunk(part, len(received), len(blob), chunk_bytes)
            continue
        new = check_chunk(part, len(received), len(blob), chunk_bytes)
        assert (new == ALREADY_THERE) == (part.offset < len(received))
        received += b"" if new == ALREADY_THERE else new
    assert received == blob


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (chunk(4, b""), "length"),
        (chunk(4, b"123456789"), "length"),
        (chunk(5, b"12"), "out of order"),
        (chunk(3, b"12"), "out of order"),
        (chunk(8, b"123"), "beyond"),
        (chunk((1 << 64) - 1, b"1"), "beyond"),
        (common_pb2.BlobChunk(offset=4, data=b"12", crc32c=crc32c(b"13")), "damaged"),
        (common_pb2.BlobChunk(offset=0, data=b"12", crc32c=0), "damaged"),
    ],
    ids=["empty", "large", "gap", "overlap", "end", "overflow", "damaged", "damaged repetition"],
)
def test_bad_chunks_are_refused(bad: common_pb2.BlobChunk, message: str) -> None:
    with pytest.raises(CorruptError, match=message):
        check_chunk(bad, received_bytes=4, total_bytes=10, max_chunk_bytes=8)


@given(st.binary(max_size=1000))
def test_the_checksum_is_the_same_for_every_kind_of_buffer(data: bytes) -> None:
    assert crc32c(data) == crc32c(bytearray(data)) == crc32c(memoryview(data))


def test_the_checksum_of_a_long_view_goes_across_its_slices() -> None:
    data = bytes(range(256)) * 1000
    assert crc32c(memoryview(data)) == crc32c(data)


def test_an_impossible_split_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_bytes"):
        next(split(b"123", 0))
    with pytest.raises(ValueError, match="start"):
        next(split(b"123", 1, 4))
