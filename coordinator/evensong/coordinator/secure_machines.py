"""The state machines of secure rounds: built from the stored messages, kept while the round lives.

A machine is a function of its messages, so this is a cache as :mod:`sums` is one: whoever fails to store what a
machine has taken forgets the machine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.message import DecodeError
from sqlalchemy import Row, select

from evensong.coordinator import tables
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.coordinator.plan import parse_plan
from evensong.secagg.errors import ProtocolError
from evensong.secagg.primitives import Primitives
from evensong.secagg.server import ServerMachine
from evensong.secagg.session import Policy, Session
from evensong.secagg.states import ServerStage
from evensong.v1 import secagg_pb2

#: What a member sends in each stage.
MESSAGES: dict[ServerStage, type[Any]] = {
    ServerStage.ADVERTISE: secagg_pb2.SecureAdvertise,
    ServerStage.SHARES: secagg_pb2.SecureShares,
    ServerStage.MASKED: secagg_pb2.SecureMasked,
    ServerStage.COMMIT: secagg_pb2.SecureCommit,
    ServerStage.UNMASK: secagg_pb2.SecureUnmask,
}


class Machines:
    """One machine a round, that of its newest attempt."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._locks: dict[int, threading.RLock] = {}
        self._primitives = Primitives()  # remembers certificates from round to round
        self._machines: dict[int, tuple[int, ServerMachine]] = {}

    @contextmanager
    def open(self, round_id: int) -> Iterator[ServerMachine]:
        """The round's machine, for one thread at a time. Whoever changes it stores that :meth:`storing`."""
        with self._lock:
            lock = self._locks.setdefault(round_id, threading.RLock())
        with lock:
            with self._context.database.read() as tx:
                attempt = newest_attempt(tx, round_id)
                held = self._machines.get(round_id)
                machine = held[1] if held and held[0] == attempt.attempt else self._build(tx, attempt)
            self._machines[round_id] = attempt.attempt, machine
            yield machine

    @contextmanager
    def storing(self, round_id: int) -> Iterator[None]:
        """Around what stores a change of the machine, while it is open: if that fails, the machine is built anew."""
        try:
            yield
        except BaseException:
            self._machines.pop(round_id, None)
            raise

    def drop(self, round_id: int) -> None:
        """Frees what a round that is over held."""
        with self._lock:
            self._machines.pop(round_id, None)
            self._locks.pop(round_id, None)

    def _build(self, tx: Transaction, attempt: Row[tuple[object, ...]]) -> ServerMachine:
        context = self._context
        session, policy = _session_of(tx, attempt)
        machine = ServerMachine(
            session,
            policy,
            signer=context.signer,
            authority_public_key=context.authority_public_key,
            excluded=frozenset(attempt.excluded.split()),
            primitives=self._primitives,
        )
        messages = tx.execute(
            select(tables.secure_messages, tables.uploads.c.sha256)
            .outerjoin(tables.uploads, tables.uploads.c.upload_id == tables.secure_messages.c.upload_id)
            .where(
                tables.secure_messages.c.round_id == attempt.round_id,
                tables.secure_messages.c.attempt == attempt.attempt,
            )
            .order_by(tables.secure_messages.c.entry)
        )
        for row in messages:
            stage = ServerStage(row.stage)
            while machine.stage != stage:
                machine.close()
            machine.receive(
                row.device_id,
                _parse(stage, row.payload),
                vector_sha256=bytes.fromhex(row.sha256) if row.sha256 else None,
                now_unix_ms=row.accepted_ms,
            )
        while machine.stage != ServerStage(attempt.stage):
            machine.close()
        return machine


def _parse(stage: ServerStage, payload: bytes) -> Any:
    try:
        return MESSAGES[stage].FromString(payload)
    except DecodeError:
        raise ProtocolError(f"a stored message of stage {stage.value} is damaged") from None


def newest_attempt(tx: Transaction, round_id: int) -> Row[tuple[object, ...]]:
    """The row of a secure round's last attempt."""
    return tx.execute(
        select(tables.secure_attempts)
        .where(tables.secure_attempts.c.round_id == round_id)
        .order_by(tables.secure_attempts.c.attempt.desc())
        .limit(1)
    ).one()


def _session_of(tx: Transaction, attempt: Row[tuple[object, ...]]) -> tuple[Session, Policy]:
    """What everything in this attempt is bound to."""
    row = tx.execute(
        select(
            tables.rounds,
            tables.tasks.c.population,
            tables.tasks.c.bundle_sha256,
            tables.bundles.c.payload,
            tables.versions.c.manifest_sha256,
        )
        .join(tables.tasks, tables.tasks.c.task_id == tables.rounds.c.task_id)
        .join(tables.bundles, tables.bundles.c.sha256 == tables.tasks.c.bundle_sha256)
        .join(
            tables.versions,
            (tables.versions.c.task_id == tables.rounds.c.task_id)
            & (tables.versions.c.number == tables.rounds.c.version),
        )
        .where(tables.rounds.c.round_id == attempt.round_id)
    ).one()
    session = Session(
        bundle_sha256=bytes.fromhex(row.bundle_sha256),
        manifest_sha256=bytes.fromhex(row.manifest_sha256),
        task_id=row.task_id,
        work=row.work,
        round=row.number,
        attempt=attempt.attempt,
        population=row.population,
    )
    return session, Policy.from_plan(parse_plan(row.payload).bundle.secure)
