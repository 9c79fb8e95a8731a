"""Blobs by content: verified at every use, discarded when damaged, trimmed when too many."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from evensong.client import FolderCache, MemoryCache, StorageFullError
from evensong.client.cache import Cache
from evensong.wire.errors import CorruptError


def put(cache: Cache, data: bytes) -> bytes:
    sha256 = hashlib.sha256(data).digest()
    if data:
        cache.append(sha256, 0, data)
    cache.finish(sha256)
    return sha256


@pytest.fixture(params=["folder", "memory"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    return FolderCache(tmp_path / "cache", 100) if request.param == "folder" else MemoryCache(100)


def test_a_blob_grows_in_parts_and_counts_only_when_whole(cache: Cache) -> None:
    sha256 = hashlib.sha256(b"one two").digest()
    cache.append(sha256, 0, b"one ")
    assert cache.received(sha256) == 4 and cache.get(sha256) is None and not cache.has(sha256)
    cache.append(sha256, 2, b"xxx")  # not where it goes on: nothing changes
    cache.append(sha256, 4, b"two")
    assert cache.finish(sha256) == b"one two" == cache.get(sha256)
    assert cache.has(sha256) and cache.received(sha256) == 0
    assert cache.get(put(cache, b"")) == b""


def test_a_download_with_other_content_is_discarded(cache: Cache) -> None:
    sha256 = hashlib.sha256(b"right").digest()
    cache.append(sha256, 0, b"wrong")
    with pytest.raises(CorruptError, match="wrong content"):
        cache.finish(sha256)
    assert cache.received(sha256) == 0 and cache.get(sha256) is None


def test_the_least_recently_used_go_first_and_what_is_in_use_stays(cache: Cache) -> None:
    blobs = [put(cache, bytes([number]) * 40) for number in range(4)]
    if isinstance(cache, FolderCache):  # the file system's clock may be too coarse for four writes
        for age, sha256 in enumerate(blobs):
            os.utime(cache.folder / sha256.hex(), (age, age))
    cache.get(blobs[1])
    cache.trim(keep={blobs[0]})
    assert [cache.has(sha256) for sha256 in blobs] == [True, True, False, False]
    cache.trim(keep=set(blobs))
    assert cache.has(blobs[0]) and cache.has(blobs[1])


@pytest.mark.parametrize("damage", [b"", b"x", b"other bytes of the same"])
def test_a_file_that_was_damaged_counts_as_missing(tmp_path: Path, damage: bytes) -> None:
    cache = FolderCache(tmp_path)
    sha256 = put(cache, b"the bytes as they arrived")
    (tmp_path / sha256.hex()).write_bytes(damage)
    assert cache.get(sha256) is None and not cache.has(sha256)


def test_a_full_disk_is_a_typed_error(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path)
    sha256 = hashlib.sha256(b"data").digest()
    (tmp_path / f"{sha256.hex()}.part").symlink_to("/dev/full")  # every write to it fails with ENOSPC
    with pytest.raises(StorageFullError):
        cache.append(sha256, 0, b"data")


def test_devices_that_share_a_cache_may_download_the_same_blob_at_once() -> None:
    cache = MemoryCache()
    sha256 = hashlib.sha256(b"abcdef").digest()
    cache.append(sha256, 0, b"abc")
    cache.append(sha256, 0, b"ab")  # a second device, behind the first
    cache.append(sha256, 3, b"def")
    assert cache.finish(sha256) == b"abcdef"
    cache.append(sha256, 2, b"cdef")
    assert cache.finish(sha256) == b"abcdef"
