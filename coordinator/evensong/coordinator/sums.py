"""Running sums of the open rounds: O(model) memory, however many devices report.

A sum is a cache of the journal. Updates are added in the order of the journal, so that a coordinator that was
killed and builds the sum again gets the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import and_, select

from evensong.coordinator import tables
from evensong.coordinator.aggregate import Accumulator
from evensong.coordinator.context import Context
from evensong.coordinator.plan import Plan
from evensong.coordinator.privacy.mechanism import Total
from evensong.coordinator.spool import SpooledUpload
from evensong.v1 import task_pb2
from evensong.wire.errors import UpdateError


class RunningSum:
    """One round's accumulator and how far in the journal it has come."""

    def __init__(self, plan: Plan, clip_norm: float) -> None:
        assert plan.codec is not None  # a secure round has a sum of its own
        self.accumulator = Accumulator(plan.layout, plan.codec, clip_norm=clip_norm)
        self.buffer = bytearray(plan.update_bytes)
        self.entry = 0
        self.is_current = False
        self.lock = threading.Lock()


class Sums:
    """The running sums of all rounds that collect."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._running: dict[int, RunningSum] = {}

    @contextmanager
    def adding(self, round_id: int, plan: Plan, file: SpooledUpload, weight: float) -> Iterator[RunningSum]:
        """Adds an update that the body of the ``with`` then journals, setting ``entry`` once that is committed: one
        update at a time, so that the order of the sum is the order of the journal.

        Raises what the codec raises for a bad update; then the sum is as it was. If the body fails or journals nothing,
        the sum is forgotten and built from the journal when it is needed again.
        """
        with self._locked(round_id, plan) as running:
            before = running.entry
            file.read_into(running.buffer)
            running.accumulator.add(memoryview(running.buffer)[: file.received], weight)
            journalled = False
            try:
                yield running
                journalled = running.entry != before
            finally:
                if not journalled:  # the transaction may fail after the entry has its number
                    self.drop(round_id)

    def complete(self, round_id: int, plan: Plan) -> Total:
        """The sum of every journalled update of a round that accepts no more, of no update an error.

        Taken under the lock: a device that comes too late adds its update before the transaction refuses it.
        """
        with self._locked(round_id, plan) as running:
            accumulator = running.accumulator
            if not accumulator.count:
                raise UpdateError("there is no mean of no updates", fix="Wait for the round's first report.")
            return Total(accumulator.total(), accumulator.total_weight, accumulator.count)

    def drop(self, round_id: int) -> None:
        """Frees the memory of a round that is over."""
        with self._lock:
            self._running.pop(round_id, None)

    @contextmanager
    def _locked(self, round_id: int, plan: Plan) -> Iterator[RunningSum]:
        """The sum of all that is journalled so far."""
        while True:
            with self._lock:
                running = self._running.get(round_id) or RunningSum(plan, self._enforced_norm(round_id, plan))
                self._running[round_id] = running
            with running.lock:
                if self._running.get(round_id) is not running:
                    continue  # it was dropped while this thread waited
                if not running.is_current:
                    self._add_journalled(round_id, running)
                    running.is_current = True
                yield running
                return

    def _enforced_norm(self, round_id: int, plan: Plan) -> float:
        """What no update may exceed in the sum, whatever its device says; 0: nothing is promised about it."""
        if not plan.bundle.HasField("privacy"):
            return 0.0
        with self._context.database.read() as tx:
            payload = tx.execute(
                select(tables.versions.c.payload)
                .join(
                    tables.rounds,
                    and_(
                        tables.rounds.c.task_id == tables.versions.c.task_id,
                        tables.rounds.c.version == tables.versions.c.number,
                    ),
                )
                .where(tables.rounds.c.round_id == round_id)
            ).scalar_one()
        return plan.clip_norm(task_pb2.VersionManifest.FromString(payload))

    def _add_journalled(self, round_id: int, running: RunningSum) -> None:
        with self._context.database.read() as tx:
            entries = tx.execute(
                select(tables.journal)
                .where(tables.journal.c.round_id == round_id, tables.journal.c.entry > running.entry)
                .order_by(tables.journal.c.entry)
            ).all()
        for entry in entries:
            running.accumulator.add(self._context.spool.read(entry.upload_id), entry.weight)
            running.entry = entry.entry
