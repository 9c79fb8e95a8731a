"""The database: one transaction at a time writes, readers never wait, and every failure is one typed error.

SQLite runs in WAL mode with ``synchronous=FULL``: what was committed survives a power cut. Writers take turns on a
lock of this process (another process is kept out by the data directory's lock), so a transaction never fails for
being second.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from sqlalchemy import Connection, Executable, create_engine, event, exc
from sqlalchemy.engine import CursorResult
from sqlalchemy.pool import StaticPool

from evensong.coordinator.errors import StorageError

BUSY_TIMEOUT_MS = 5_000


class Transaction:
    """One open transaction. ``after_commit`` collects what happens once it is durable, and only then."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._after: list[Callable[[], None]] = []

    def execute(self, statement: Executable, values: Mapping[str, object] | None = None) -> CursorResult[Any]:
        """Runs ``statement``; ``values`` are for its bound parameters, so that a hot statement is built only once."""
        return self.connection.execute(statement, values)

    def after_commit(self, action: Callable[[], None]) -> None:
        if action not in self._after:
            self._after.append(action)

    def committed(self) -> None:
        for action in self._after:
            action()


class Database:
    """``durable=False`` gives up fsync: for simulations and tests of everything but durability."""

    def __init__(self, url: str, *, durable: bool = True) -> None:
        memory = url in ("sqlite://", "sqlite:///:memory:")
        pool: dict[str, Any] = {"poolclass": StaticPool} if memory else {"pool_size": 8, "max_overflow": 64}
        self._engine = create_engine(url, **pool)
        self._write_lock = threading.Lock()
        # One connection is all that a database in memory has: readers take turns with the writer.
        self._read_lock = self._write_lock if memory else None
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _sqlite_settings(durable))
            event.listen(self._engine, "begin", _begin_sqlite)

    def migrate(self) -> None:
        """Brings the schema up to date, and refuses a damaged SQLite file."""
        with self.transaction() as tx:
            if tx.connection.dialect.name == "sqlite":
                verdict = tx.connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                if verdict != "ok":
                    raise StorageError("the database is damaged", got=verdict, fix="Restore it from a backup.")
            config = alembic.config.Config()
            config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
            config.attributes["connection"] = tx.connection
            alembic.command.upgrade(config, "head")

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """All or nothing. Raises :class:`StorageError` when the database fails; then nothing was changed."""
        with self._write_lock, _typed_errors(), self._engine.begin() as connection:
            tx = Transaction(connection)
            yield tx
        tx.committed()

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A consistent snapshot."""
        if self._read_lock is not None:
            self._read_lock.acquire()
        try:
            with _typed_errors(), self._engine.connect() as connection:
                yield Transaction(connection.execution_options(read_only=True))
        finally:
            if self._read_lock is not None:
                self._read_lock.release()

    def close(self) -> None:
        self._engine.dispose()


def _sqlite_settings(durable: bool) -> Callable[[sqlite3.Connection, object], None]:
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        # The driver's own BEGIN comes too late for a snapshot; _begin_sqlite says it.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA foreign_keys=ON")

    return configure


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except exc.IntegrityError:
        raise
    except (exc.DBAPIError, exc.TimeoutError) as error:
        cause = getattr(error, "orig", None) or error
        raise StorageError(
            "the database cannot be used", got=cause, fix="Check the disk's space and health, and who holds the file."
        ) from error
