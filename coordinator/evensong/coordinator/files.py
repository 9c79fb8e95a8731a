"""Writing files so that a power cut leaves either all of them or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evensong.coordinator.errors import StorageError


def write_private(path: Path, data: bytes) -> None:
    """Creates ``path`` with mode 0600, durable before it is visible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)


def write_all(descriptor: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """All of ``data``, at ``offset`` or at the file's position; a short write is continued."""
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset = None if offset is None else offset + written


def sync_folder(folder: Path) -> None:
    """A new name in ``folder`` survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def typed_errors(doing: str) -> Iterator[None]:
    """An :class:`OSError` (no space, no permission, a broken disk) becomes :class:`StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{doing} failed", got=error, fix="Check the disk's space, limits and health.") from error
