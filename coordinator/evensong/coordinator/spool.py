"""Updates on their way in: one file an upload, hashed as it grows, kept until the version that counts it is committed.

Chunks are not fsynced one by one: :meth:`SpooledUpload.make_durable` does that once, before the update is
journalled. After a restart the file's length says where the device goes on, and its bytes are hashed again.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evensong.coordinator import files
from evensong.coordinator.plan import Plan


class FolderSync:
    """Makes new names in a folder durable: one fsync serves all files that were created before it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._changes = 1  # files of an earlier process count as new
        self._synced = 0

    def changed(self) -> None:
        with self._counting:
            self._changes += 1

    def sync(self) -> None:
        """Returns once every name that was there at the call is durable."""
        wanted = self._changes
        with self._lock:
            if self._synced < wanted:
                covered = self._changes
                files.sync_folder(self._folder)
                self._synced = covered


class SpooledUpload:
    """One growing file. Every method holds ``lock`` while it works; a caller may hold it across several."""

    def __init__(self, path: Path, folder: FolderSync) -> None:
        self.path = path
        self._folder = folder
        self.lock = threading.RLock()
        self._hash = hashlib.sha256()
        self.received = 0
        #: bytes from before a restart: the power may have been cut, so they are trusted only after their hash.
        self.resumed = False
        if path.exists():
            self._read_again()

    def append(self, data: bytes) -> None:
        """Adds ``data`` at the end, or raises StorageError and leaves the upload as it was."""
        with self.lock, files.typed_errors("writing an update"):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                if self.received == 0:
                    self._folder.changed()
                files.write_all(descriptor, data, self.received)
            finally:
                os.close(descriptor)
            self._hash.update(data)
            self.received += len(data)

    def sha256(self) -> str:
        """Of all bytes so far, in hex."""
        with self.lock:
            return self._hash.hexdigest()

    def read_into(self, buffer: bytearray) -> None:
        """Fills ``buffer`` from the start: the memory of one update serves them all."""
        with self.lock, files.typed_errors("reading an update"), self.path.open("rb", buffering=0) as file:
            view, start = memoryview(buffer), 0
            while start < len(buffer) and (count := file.readinto(view[start:])):
                start += count

    def make_durable(self) -> None:
        """The bytes and the file's name survive a power cut."""
        with self.lock, files.typed_errors("writing an update"):
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._folder.sync()

    def restart(self) -> None:
        """Forgets all bytes: the device sends them again."""
        with self.lock, files.typed_errors("emptying an update"):
            self.path.unlink(missing_ok=True)
            self._hash = hashlib.sha256()
            self.received = 0
            self.resumed = False

    def _read_again(self) -> None:
        with files.typed_errors("reading an update"), self.path.open("rb") as file:
            while part := file.read(1 << 20):
                self._hash.update(part)
                self.received += len(part)
        self.resumed = self.received > 0


@dataclass(frozen=True)
class Admitted:
    """What was checked when an upload began, so that a chunk costs no look into the database."""

    device_id: str
    round_id: int
    lease_id: str
    fencing_token: int
    expires_ms: int
    sha256: str
    size_bytes: int
    plan: Plan


class Spool:
    """All uploads that are open or wait to be counted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = FolderSync(folder)
        self._lock = threading.Lock()
        self._open: dict[str, SpooledUpload] = {}
        self._admitted: dict[str, Admitted] = {}
        with files.typed_errors("opening the upload folder"):
            folder.mkdir(parents=True, exist_ok=True)

    def upload(self, upload_id: str) -> SpooledUpload:
        """The upload of that id, from disk if this process has not seen it yet."""
        with self._lock:
            if upload_id not in self._open:
                self._open[upload_id] = SpooledUpload(self._folder / upload_id, self._names)
            return self._open[upload_id]

    def admit(self, upload_id: str, admitted: Admitted) -> None:
        """Chunks of this upload are welcome until its lease expires or :meth:`dismiss`."""
        with self._lock:
            self._admitted[upload_id] = admitted

    def admitted(self, upload_id: str) -> Admitted | None:
        return self._admitted.get(upload_id)

    def dismiss(self, *, round_id: int | None = None, device_id: str | None = None) -> None:
        """The round is over, or the device's lease is: the next chunk is judged by the database."""
        with self._lock:
            for upload_id, admitted in list(self._admitted.items()):
                if admitted.round_id == round_id or admitted.device_id == device_id:
                    del self._admitted[upload_id]

    def read(self, upload_id: str) -> bytes:
        """A whole, durable update."""
        with files.typed_errors("reading an update"):
            return (self._folder / upload_id).read_bytes()

    def discard(self, upload_ids: Iterable[str]) -> None:
        """Deletes files that nothing will read again."""
        for upload_id in upload_ids:
            with self._lock:
                self._open.pop(upload_id, None)
                self._admitted.pop(upload_id, None)
            with files.typed_errors("deleting an update"):
                (self._folder / upload_id).unlink(missing_ok=True)

    def forget(self, upload_id: str) -> None:
        """Frees what is held in memory; the file stays until it is discarded."""
        with self._lock:
            self._open.pop(upload_id, None)
            self._admitted.pop(upload_id, None)

    def keep_only(self, upload_ids: set[str]) -> None:
        """At start: deletes what a crash left behind."""
        with files.typed_errors("sweeping the upload folder"):
            self.discard([path.name for path in self._folder.iterdir() if path.name not in upload_ids])
