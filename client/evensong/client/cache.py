"""Blobs by their SHA-256: artifacts and parameters, downloaded once, verified at every use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from evensong.client.database import raise_if_full
from evensong.wire.errors import CorruptError


class Cache(Protocol):
    """Whole blobs, and the beginnings of blobs whose download was cut."""

    def get(self, sha256: bytes) -> bytes | None:
        """The blob, verified now; a damaged one is discarded and counts as missing."""
        ...

    def has(self, sha256: bytes) -> bool:
        """Whether the blob is there, as far as can be told without reading it."""
        ...

    def received(self, sha256: bytes) -> int:
        """Bytes of an unfinished download."""
        ...

    def append(self, sha256: bytes, offset: int, data: bytes) -> None:
        """Goes on with a download; an ``offset`` that is not :meth:`received` changes nothing."""
        ...

    def finish(self, sha256: bytes) -> bytes:
        """Verifies the download and makes it a blob; on a mismatch it is discarded and :class:`CorruptError` raised."""
        ...

    def trim(self, keep: Collection[bytes]) -> None:
        """Discards the least recently used blobs beyond the size limit, but none of ``keep``."""
        ...


class FolderCache:
    """One file a blob in ``folder``, named by its hash; ``.part`` marks a download. Holds about ``max_bytes``."""

    def __init__(self, folder: Path, max_bytes: int = 512 << 20) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, sha256: bytes) -> bytes | None:
        path = self._path(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).digest() != sha256:
            path.unlink(missing_ok=True)
            return None
        os.utime(path)  # now the most recently used
        return data

    def has(self, sha256: bytes) -> bool:
        return self._path(sha256).exists()

    def received(self, sha256: bytes) -> int:
        part = self._part(sha256)
        return part.stat().st_size if part.exists() else 0

    def append(self, sha256: bytes, offset: int, data: bytes) -> None:
        try:
            with self._part(sha256).open("ab") as file:
                if file.tell() == offset:
                    file.write(data)
        except OSError as error:
            raise_if_full(error, str(self.folder))
            raise

    def finish(self, sha256: bytes) -> bytes:
        part = self._part(sha256)
        data = part.read_bytes() if part.exists() else b""
        try:
            _check(data, sha256)
        except CorruptError:
            part.unlink(missing_ok=True)
            raise
        part.touch()  # an empty blob has no part yet
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(self._path(sha256))
        return data

    def trim(self, keep: Collection[bytes]) -> None:
        kept = {sha256.hex() for sha256 in keep}
        files = sorted(((path.stat(), path) for path in self.folder.iterdir()), key=lambda item: item[0].st_mtime_ns)
        total = sum(status.st_size for status, _ in files)
        for status, path in files:
            if total > self.max_bytes and path.stem not in kept:
                path.unlink(missing_ok=True)
                total -= status.st_size

    def _path(self, sha256: bytes) -> Path:
        return self.folder / sha256.hex()

    def _part(self, sha256: bytes) -> Path:
        return self.folder / f"{sha256.hex()}.part"


class MemoryCache:
    """The same in memory. Simulated devices may share one: an address has one content."""

    def __init__(self, max_bytes: int = 512 << 20) -> None:
        self.max_bytes = max_bytes
        self._blobs: dict[bytes, bytes] = {}  # the least recently used first
        self._parts: dict[bytes, bytearray] = {}

    def get(self, sha256: bytes) -> bytes | None:
        data = self._blobs.pop(sha256, None)
        if data is not None:
            self._blobs[sha256] = data
        return data

    def has(self, sha256: bytes) -> bool:
        return sha256 in self._blobs

    def received(self, sha256: bytes) -> int:
        return len(self._parts.get(sha256, b""))

    def append(self, sha256: bytes, offset: int, data: bytes) -> None:
        if sha256 not in self._blobs and self.received(sha256) == offset:
            self._parts.setdefault(sha256, bytearray()).extend(data)

    def finish(self, sha256: bytes) -> bytes:
        if sha256 in self._blobs:
            return self._blobs[sha256]  # another device that shares this cache was faster
        data = bytes(self._parts.pop(sha256, b""))
        _check(data, sha256)
        self._blobs[sha256] = data
        return data

    def trim(self, keep: Collection[bytes]) -> None:
        total = sum(map(len, self._blobs.values()))
        for sha256 in [sha256 for sha256 in self._blobs if sha256 not in keep]:
            if total <= self.max_bytes:
                return
            total -= len(self._blobs.pop(sha256))


def _check(data: bytes, sha256: bytes) -> None:
    actual = hashlib.sha256(data).digest()
    if actual != sha256:
        raise CorruptError(
            "a downloaded blob has the wrong content",
            expected=f"SHA-256 {sha256.hex()}",
            got=actual.hex(),
            fix="Fetch it again.",
        )
