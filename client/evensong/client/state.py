"""What a device remembers across crashes: who it is, what it asked, what it is working on, and which models it serves.

Every change is one transaction. A request that changes something at the coordinator is written here with its
``request_id`` before it is sent, and goes in the same transaction as the effects of its answer: after a crash the very
same request is sent again, and the coordinator answers as it did the first time.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from evensong.client.database import Database
from evensong.client.errors import StateError

_MIGRATIONS = (
    """
    CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE requests (name TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE work (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        assignment BLOB NOT NULL,
        stage TEXT NOT NULL,
        deadline_unix_ms INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        request_id BLOB NOT NULL,
        begin_request_id BLOB NOT NULL,
        "update" BLOB,
        upload_id TEXT NOT NULL,
        weight REAL NOT NULL,
        metrics BLOB NOT NULL,
        reason INTEGER NOT NULL,
        message TEXT NOT NULL
    );
    CREATE TABLE served (
        task_id TEXT PRIMARY KEY,
        bundle BLOB NOT NULL,
        version BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE personal (task_id TEXT PRIMARY KEY, tensors BLOB NOT NULL);
    CREATE TABLE overlays (
        task_id TEXT PRIMARY KEY,
        version_sha256 BLOB NOT NULL,
        tensors BLOB NOT NULL,
        recipe TEXT NOT NULL
    );
    """,
    """
    CREATE TABLE residuals (task_id TEXT PRIMARY KEY, tensors BLOB NOT NULL);
    """,
    """
    ALTER TABLE work ADD COLUMN within INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE cohorts (
        task_id TEXT NOT NULL,
        work INTEGER NOT NULL,
        round INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        spent INTEGER NOT NULL,
        PRIMARY KEY (task_id, work)
    ) WITHOUT ROWID;
    """,
)


class Stage(enum.StrEnum):
    """Where the one piece of work stands. From every stage but ASSIGNED, only a call is left to make."""

    ASSIGNED = "assigned"  #: to be trained or evaluated; nothing was computed yet
    SEALED = "sealed"  #: the update is stored; begin, chunks and commit follow
    UPLOADED = "uploaded"  #: the coordinator has every byte; commit follows
    MEASURED = "measured"  #: the metrics of an evaluation are stored; Report follows
    GIVEN_UP = "given up"  #: Abort follows


@dataclass(frozen=True)
class Work:
    """One assignment and how far it got. ``deadline_unix_ms`` is the lease's end, as this device accepts it."""

    assignment: bytes
    stage: Stage
    deadline_unix_ms: int
    attempts: int = 0
    request_id: bytes = b""  #: of the call that ends the work: CommitUpload, Report or Abort
    begin_request_id: bytes = b""
    update: bytes | None = None
    upload_id: str = ""
    weight: float = 0.0
    within: bool = False  #: the delta's norm was at most the clip norm
    metrics: bytes = b""  #: serialised Metrics
    reason: int = 0  #: an AbortReason
    message: str = ""


@dataclass(frozen=True)
class Cohort:
    """The last cohort that the device joined for a task's training or evaluation. ``spent``: its update may be in a
    sum."""

    round: int
    attempt: int
    spent: bool


@dataclass(frozen=True)
class ServedRow:
    """A model for ``predict``: two serialised SignedBlobs."""

    task_id: str
    bundle: bytes
    version: bytes


class State:
    """The device's database. ``folder`` None keeps it in memory, for a simulator that never restarts the device."""

    def __init__(self, folder: Path | None) -> None:
        self._lock_file = _lock(folder) if folder else None
        self._database = Database(folder / "state.sqlite" if folder else None, _MIGRATIONS)
        self.boots = int(self.fact("boots") or b"0") + 1
        self.set_facts(boots=str(self.boots).encode())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Joins several changes into one."""
        with self._database.transaction():
            yield

    def close(self) -> None:
        self._database.close()
        if self._lock_file:
            self._lock_file.close()

    # facts: small values under a name

    def fact(self, name: str) -> bytes | None:
        return self._bytes("SELECT value FROM facts WHERE name = ?", name)

    def set_facts(self, **facts: bytes) -> None:
        with self._database.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))

    # requests that were sent, or are about to be, and have no answer yet

    def request(self, name: str) -> bytes | None:
        return self._bytes("SELECT body FROM requests WHERE name = ?", name)

    def set_request(self, name: str, body: bytes) -> None:
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO requests VALUES (?, ?)", (name, body))

    def clear_request(self, name: str) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM requests WHERE name = ?", (name,))

    # the one piece of work

    def work(self) -> Work | None:
        rows = self._database.rows(f"SELECT {_WORK_COLUMNS} FROM work")
        if not rows:
            return None
        values: dict[str, Any] = dict(zip(_WORK_FIELDS, rows[0], strict=True))
        return Work(**{**values, "stage": Stage(values["stage"]), "within": bool(values["within"])})

    def set_work(self, work: Work) -> None:
        marks = ", ".join("?" for _ in _WORK_FIELDS)
        with self._database.transaction() as connection:
            connection.execute(
                f"INSERT OR REPLACE INTO work (only, {_WORK_COLUMNS}) VALUES (1, {marks})",
                [getattr(work, name) for name in _WORK_FIELDS],
            )

    def set_upload(self, work: Work, stage: Stage, *, begin_request_id: bytes, upload_id: str) -> Work:
        """How far the upload is; the update itself, which may be large, is not written again."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE work SET stage = ?, begin_request_id = ?, upload_id = ?", (stage, begin_request_id, upload_id)
            )
        return replace(work, stage=stage, begin_request_id=begin_request_id, upload_id=upload_id)

    def clear_work(self) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM work")

    # secure rounds: what must never happen twice

    def cohort(self, task_id: str, work: int) -> Cohort | None:
        rows = self._database.rows(
            "SELECT round, attempt, spent FROM cohorts WHERE task_id = ? AND work = ?", (task_id, work)
        )
        return Cohort(rows[0][0], rows[0][1], bool(rows[0][2])) if rows else None

    def set_cohort(self, task_id: str, work: int, cohort: Cohort) -> None:
        row = (task_id, work, cohort.round, cohort.attempt, cohort.spent)
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO cohorts VALUES (?, ?, ?, ?, ?)", row)

    # models for predict

    def served(self) -> list[ServedRow]:
        rows = self._database.rows("SELECT task_id, bundle, version FROM served ORDER BY task_id")
        return [ServedRow(*row) for row in rows]

    def set_served(self, row: ServedRow, *, replaces: Collection[str] = ()) -> None:
        """``replaces``: tasks that are not served any more, with their overlays."""
        with self._database.transaction() as connection:
            for task_id in replaces:
                connection.execute("DELETE FROM served WHERE task_id = ?", (task_id,))
                connection.execute("DELETE FROM overlays WHERE task_id = ?", (task_id,))
            connection.execute("INSERT OR REPLACE INTO served VALUES (?, ?, ?)", (row.task_id, row.bundle, row.version))

    # what is this device's own: personal tensors (for every version), overlays (for one version), and residuals (what
    # sparse updates left out, for the next one)

    def residual(self, task_id: str) -> bytes | None:
        return self._bytes("SELECT tensors FROM residuals WHERE task_id = ?", task_id)

    def set_residual(self, task_id: str, tensors: bytes) -> None:
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO residuals VALUES (?, ?)", (task_id, tensors))

    def personal(self, task_id: str) -> bytes | None:
        return self._bytes("SELECT tensors FROM personal WHERE task_id = ?", task_id)

    def set_personal(self, task_id: str, tensors: bytes) -> None:
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO personal VALUES (?, ?)", (task_id, tensors))

    def overlay(self, task_id: str, version_sha256: bytes) -> bytes | None:
        """The personalised tensors, if they were adapted from this very version."""
        return self._bytes(
            "SELECT tensors FROM overlays WHERE task_id = ? AND version_sha256 = ?", task_id, version_sha256
        )

    def recipe(self, task_id: str) -> str | None:
        """How the task was last personalised here (JSON), for whatever version."""
        rows = self._database.rows("SELECT recipe FROM overlays WHERE task_id = ?", (task_id,))
        return str(rows[0][0]) if rows else None

    def set_overlay(self, task_id: str, version_sha256: bytes, tensors: bytes, recipe: str) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO overlays VALUES (?, ?, ?, ?)", (task_id, version_sha256, tensors, recipe)
            )

    def _bytes(self, query: str, *parameters: object) -> bytes | None:
        """The one value that ``query`` finds, if any."""
        rows = self._database.rows(query, parameters)
        return bytes(rows[0][0]) if rows else None


_WORK_FIELDS = tuple(field.name for field in fields(Work))
_WORK_COLUMNS = ", ".join(f'"{name}"' for name in _WORK_FIELDS)


def _lock(folder: Path) -> Any:
    """An exclusive lock that the system releases when the process ends, however it ends."""
    import fcntl
    import os

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip()[:20] or "unknown"
        file.close()
        raise StateError(
            f"{folder} is used by another process",
            got=f"process {holder}",
            fix="Stop it, or give this device a state directory of its own.",
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
