"""Artifacts, parameters and strategy states by content address, in any place that fsspec knows."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from types import TracebackType

import fsspec
from fsspec.implementations.local import LocalFileSystem

from evensong.coordinator import files
from evensong.coordinator.errors import StorageError


class BlobStore:
    """``url``: a folder, or ``s3://bucket/prefix``, ``memory://name`` and the like. ``staging``: a local folder
    for parts.

    A blob is written under a temporary name and appears whole or not at all: by rename in a folder, by the one PUT
    of an object store elsewhere. Blobs are never changed, so equal content is stored once.
    """

    def __init__(self, url: str, staging: Path, *, durable: bool = True) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._staging = staging
        self.durable = durable
        with files.typed_errors("opening the blob folder"):
            self._fs.makedirs(self._root, exist_ok=True)
            staging.mkdir(parents=True, exist_ok=True)
            for leftover in staging.iterdir():
                leftover.unlink()

    def put(self, data: bytes) -> str:
        """Stores ``data``; its SHA-256 in hex."""
        with self.writer() as writer:
            writer.write(data)
            return writer.finish()

    def writer(self) -> BlobWriter:
        """For a blob that comes in parts."""
        return BlobWriter(self, self._staging / secrets.token_hex(8))

    def size(self, sha256: str) -> int | None:
        """Bytes of the blob, None if it is not here."""
        with files.typed_errors("looking for a blob"):
            try:
                return int(self._fs.info(self._path(sha256))["size"])
            except FileNotFoundError:
                return None

    def read(self, sha256: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes from ``offset`` on. A whole blob that does not have its hash any more raises :class:`StorageError`."""
        with files.typed_errors("reading a blob"), self._fs.open(self._path(sha256), "rb", block_size=1 << 20) as file:
            file.seek(offset)
            data: bytes = file.read(-1 if length is None else length)
        if offset == 0 and length is None and hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(f"blob {sha256} is damaged", fix="Restore it from a backup.")
        return data

    def publish(self, staged: Path, sha256: str) -> None:
        """Makes a staged file, already durable, visible under its content address."""
        path = self._path(sha256)
        if self._local:
            target = Path(path)
            target.parent.mkdir(exist_ok=True)
            staged.replace(target)
            if self.durable:
                files.sync_folder(target.parent)
                files.sync_folder(target.parent.parent)
        else:
            self._fs.put_file(str(staged), path)
            staged.unlink()

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"


class BlobWriter:
    """Takes a blob part by part; left without :meth:`finish`, nothing remains."""

    def __init__(self, store: BlobStore, staged: Path) -> None:
        self._store = store
        self._staged = staged
        self._hash = hashlib.sha256()
        self.size = 0
        with files.typed_errors("creating a blob"):
            self._descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def __enter__(self) -> BlobWriter:
        return self

    def write(self, data: bytes) -> None:
        with files.typed_errors("writing a blob"):
            files.write_all(self._descriptor, data)
        self._hash.update(data)
        self.size += len(data)

    def finish(self) -> str:
        """The blob is durable and visible; its SHA-256 in hex."""
        with files.typed_errors("writing a blob"):
            if self._store.durable:
                os.fsync(self._descriptor)
            self._store.publish(self._staged, self._hash.hexdigest())
        return self._hash.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        self._staged.unlink(missing_ok=True)
