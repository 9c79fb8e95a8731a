"""Running sums of the open rounds: O(model) memory, however many devices report.

A sum is a cache of the journal. Updates are added in the order of the journal, so that a coordinator that was
killed and builds the sum again gets the same bits.
"""

from __future__ import annotations

import threading

from sqlalchemy import select

from evensong.coordinator import tables
from evensong.coordinator.aggregate import Accumulator
from evensong.coordinator.context import Context
from evensong.coordinator.plan import Plan


class RunningSum:
    """One round's accumulator and how far in the journal it has come."""

    def __init__(self, plan: Plan) -> None:
        self.accumulator = Accumulator(plan.layout, plan.codec)
        self.entry = 0
        self.lock = threading.Lock()


class Sums:
    """The running sums of all rounds that collect."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._running: dict[int, RunningSum] = {}

    def catch_up(self, round_id: int, plan: Plan) -> None:
        """Adds what the journal has and the sum has not; returns at once where another thread is doing so.

        An entry that this call leaves out is added by the next one, at the latest by :meth:`complete`.
        """
        running = self._of(round_id, plan)
        if running.lock.acquire(blocking=False):
            try:
                self._add_new(round_id, running)
            finally:
                running.lock.release()

    def complete(self, round_id: int, plan: Plan) -> Accumulator:
        """The sum of every journalled update of a round that accepts no more."""
        running = self._of(round_id, plan)
        with running.lock:
            self._add_new(round_id, running)
            return running.accumulator

    def drop(self, round_id: int) -> None:
        """The round is over: frees its memory."""
        with self._lock:
            self._running.pop(round_id, None)

    def _of(self, round_id: int, plan: Plan) -> RunningSum:
        with self._lock:
            if round_id not in self._running:
                self._running[round_id] = RunningSum(plan)
            return self._running[round_id]

    def _add_new(self, round_id: int, running: RunningSum) -> None:
        with self._context.database.read() as tx:
            entries = tx.execute(
                select(tables.journal)
                .where(tables.journal.c.round_id == round_id, tables.journal.c.entry > running.entry)
                .order_by(tables.journal.c.entry)
            ).all()
        for entry in entries:
            running.accumulator.add(self._context.spool.read(entry.upload_id), entry.weight)
            running.entry = entry.entry
