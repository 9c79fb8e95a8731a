"""SQLite as the device uses it: explicit transactions, numbered migrations, and typed errors for disks that fail."""

from __future__ import annotations

import errno
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from evensong.client.errors import StateError, StorageFullError

MEMORY = ":memory:"
_BUSY_S = 30.0


class Database:
    """One connection that any thread may use, one transaction at a time.

    ``migrations[i]`` is a script that leads from ``user_version`` i to i + 1. Raises :class:`StateError` where the file
    is not a database, is damaged, or was written by a newer evensong.
    """

    def __init__(self, path: Path | None, migrations: Sequence[str]) -> None:
        self._name = str(path) if path else "the database in memory"
        self._lock = threading.RLock()
        self._depth = 0
        with self._typed_errors():
            self.connection = sqlite3.connect(
                path or MEMORY, isolation_level=None, check_same_thread=False, timeout=_BUSY_S
            )
            self._write_ahead()
            self.connection.execute("PRAGMA synchronous = FULL")
            self.connection.execute("PRAGMA secure_delete = ON")  # what the user deletes is gone from the file too
            self._migrate(migrations)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; inside another transaction it joins that one."""
        with self._lock, self._typed_errors():
            if self._depth:
                yield self.connection
                return
            self.connection.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def rows(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a reading query."""
        with self._lock, self._typed_errors():
            return self.connection.execute(query, parameters).fetchall()

    def close(self) -> None:
        with self._lock:
            self.connection.close()

    def _write_ahead(self) -> None:
        """SQLite waits for no one when it changes a file's journal mode, not even for who does the same: so we do."""
        patience = time.monotonic() + _BUSY_S
        while True:
            try:
                self.connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > patience:
                    raise
            time.sleep(0.01)

    def _migrate(self, migrations: Sequence[str]) -> None:
        version: int = self.connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(migrations):
            raise StateError(
                f"{self._name} was written by a newer evensong",
                expected=f"schema {len(migrations)} or older",
                got=version,
                fix="Update evensong on this device.",
            )
        for number in range(version, len(migrations)):
            with self.transaction() as connection:
                if connection.execute("PRAGMA user_version").fetchone()[0] > number:
                    continue  # another process that opens the same file was faster
                for statement in migrations[number].split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number + 1}")

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            self._raise_typed(error)
        except OSError as error:
            raise_if_full(error, self._name)
            raise

    def _raise_typed(self, error: sqlite3.DatabaseError) -> NoReturn:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR):
            raise StorageFullError(
                f"{self._name} cannot be written", got=error, fix="Free some disk space and try again."
            ) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StateError(f"{self._name} is held by another process", got=error, fix="Try again.") from error
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise error
        raise StateError(
            f"{self._name} cannot be read",
            got=error,
            fix="If it is damaged, move it away: `evensong device reset` starts afresh.",
        ) from error


def raise_if_full(error: OSError, what: str) -> None:
    """StorageFullError for the errors of a full or read-only disk; returns for all others."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise StorageFullError(f"{what} cannot be written", got=error.strerror, fix="Free some disk space.") from error
