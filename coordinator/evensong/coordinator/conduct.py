"""Moves rounds when it is time: deadlines, leases that expire, server steps, and what a crash left half done.

One loop for all tasks. It sleeps until the next moment that matters or until something changes, and asks the
database what is due: after a restart there is nothing to restore.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from sqlalchemy import delete, func, select

from evensong.coordinator import requests, rounds, tables
from evensong.coordinator.admit import Registry
from evensong.coordinator.commit import abandon_round, commit_evaluation, commit_version, end_task, read_task
from evensong.coordinator.context import Context
from evensong.coordinator.errors import StorageError
from evensong.coordinator.privacy.participation import start_sampled_round
from evensong.coordinator.rounds import LIVE, OPEN, LeaseState, State, Trigger
from evensong.coordinator.secure import SecureRounds
from evensong.coordinator.secure_sums import UnsoundSumError, secure_sum
from evensong.coordinator.step import compute_next_version
from evensong.coordinator.strategies import Optimizers
from evensong.coordinator.sums import Sums
from evensong.coordinator.traffic import Traffic
from evensong.v1 import common_pb2, device_pb2, operator_pb2
from evensong.wire.errors import EvensongError

#: Housekeeping: last-seen times are written, old answers dropped.
HOUSEKEEPING_MS = 60_000
#: After a failure of the database or the disk.
RETRY_MS = 1_000


class Conductor:
    """The background task of the coordinator."""

    def __init__(
        self,
        context: Context,
        registry: Registry,
        sums: Sums,
        secure: SecureRounds,
        traffic: Traffic,
        optimizers: Optimizers,
    ) -> None:
        self._context = context
        self._registry = registry
        self._sums = sums
        self._secure = secure
        self._traffic = traffic
        self._optimizers = optimizers
        self._steps: dict[int, asyncio.Task[None]] = {}
        self._housekeeping_ms = 0
        self._expiry_ms: int | None = None

    def recover(self) -> None:
        """At start, before any call: deletes the files of uploads and the messages that no living round waits for."""
        with self._context.database.read() as tx:
            wanted = tx.execute(
                select(tables.uploads.c.upload_id)
                .join(tables.rounds, tables.rounds.c.round_id == tables.uploads.c.round_id)
                .where(tables.rounds.c.state.in_(LIVE))
            ).scalars()
            self._context.spool.keep_only(set(wanted))
        with self._context.database.transaction() as tx:
            living = select(tables.rounds.c.round_id).where(tables.rounds.c.state.in_(LIVE))
            tx.execute(delete(tables.secure_messages).where(tables.secure_messages.c.round_id.not_in(living)))

    async def run(self) -> None:
        """Until cancelled. A failing disk is logged and tried again; it stops nothing."""
        context = self._context
        while True:
            changed = context.due.next()
            try:
                wait_ms, aggregating = await context.run_blocking(self._advance)
                for round_id in aggregating:
                    if round_id not in self._steps:
                        self._steps[round_id] = asyncio.ensure_future(self._step(round_id))
            except StorageError as error:
                context.log.error("the conductor waits for the storage", error=str(error))
                wait_ms = RETRY_MS
            await first_of(changed, context.clock.sleep(wait_ms / 1000))

    async def finish(self) -> None:
        """Waits for server steps that are under way."""
        await asyncio.gather(*self._steps.values(), return_exceptions=True)

    # ------------------------------------------------------------------------------------------------- what time brings

    def _advance(self) -> tuple[int, list[int]]:
        """Closes what is due; milliseconds until the next moment that matters, and the rounds to aggregate."""
        context, now = self._context, self._context.now()
        self._clear_ended()
        if now >= self._housekeeping_ms:
            self._keep_house(now)
        if self._expiry_ms is not None and now >= self._expiry_ms:
            context.work.beat()  # a place became free, of which no row tells
        with context.database.read() as tx:
            live = tx.execute(
                select(tables.rounds).where(tables.rounds.c.state.in_(LIVE)).order_by(tables.rounds.c.round_id)
            ).all()
            self._expiry_ms = tx.execute(
                select(func.min(tables.leases.c.expires_ms))
                .join(tables.rounds, tables.rounds.c.round_id == tables.leases.c.round_id)
                .where(
                    tables.rounds.c.state.in_(OPEN),
                    tables.leases.c.state == LeaseState.ACTIVE,
                    tables.leases.c.expires_ms > now,
                )
            ).scalar_one()
        moments = [self._housekeeping_ms]
        if (moment := self._secure.advance()) is not None:
            moments.append(moment)
        if self._expiry_ms is not None:
            moments.append(self._expiry_ms)
        for round in live:
            if round.state == State.COLLECTING and round.deadline_ms is None and round.places == 0:
                self._draw(round.round_id)
            if round.state in OPEN and round.deadline_ms is not None:
                moments.append(round.deadline_ms)
                if now >= round.deadline_ms:
                    self._close_at_deadline(round.round_id)
        aggregating = [round.round_id for round in live if round.state == State.AGGREGATING]
        return max(0, min(moments) - now), aggregating

    def _draw(self, round_id: int) -> None:
        """Starts a round that draws its devices, once the population is as large as its plan says."""
        context = self._context
        with context.database.transaction() as tx:
            round = rounds.read_round(tx, round_id)
            if round is None or round.state != State.COLLECTING or round.deadline_ms is not None:
                return
            _, plan = read_task(tx, round.task_id)
            if start_sampled_round(context, tx, round, plan) == 0:
                abandon_round(context, tx, round, Trigger.TOO_FEW, "no device was drawn")

    def _close_at_deadline(self, round_id: int) -> None:
        context = self._context
        with context.database.transaction() as tx:
            round = rounds.read_round(tx, round_id)
            if round is None or round.state not in OPEN:
                return
            enough = round.reports >= round.minimum
            if not enough:
                abandon_round(context, tx, round, Trigger.TOO_FEW)
                context.fault("abandon.before_commit")
            elif round.state == State.EVALUATING:
                commit_evaluation(context, tx, round_id, Trigger.DEADLINE)
            else:
                rounds.move(context, tx, round, Trigger.DEADLINE)
        if not enough:
            context.fault("abandon.after_commit")

    def _clear_ended(self) -> None:
        """Frees the memory and the files of rounds that ended."""
        context = self._context
        while context.ended:
            round_id = context.ended[0]
            self._sums.drop(round_id)
            self._secure.machines.drop(round_id)
            self._traffic.take(round_id)
            with context.database.transaction() as tx:
                uploads = tables.uploads
                gone = tx.execute(
                    delete(uploads).where(uploads.c.round_id == round_id).returning(uploads.c.upload_id)
                ).scalars()
                discarded = list(gone)
                # Shares of secrets are kept no longer than they are needed.
                tx.execute(delete(tables.secure_messages).where(tables.secure_messages.c.round_id == round_id))
            context.spool.discard(discarded)
            context.ended.popleft()

    def _keep_house(self, now: int) -> None:
        with self._context.database.transaction() as tx:
            self._registry.flush(tx)
            requests.forget_before(tx, now - self._context.settings.request_memory_ms)
        self._housekeeping_ms = now + HOUSEKEEPING_MS

    # ------------------------------------------------------------------------------------------------ the server step

    async def _step(self, round_id: int) -> None:
        context = self._context
        try:
            await context.run_blocking(self._compute_and_commit, round_id)
        except StorageError as error:
            context.log.error("the server step waits for the storage", error=str(error))
            await context.clock.sleep(RETRY_MS / 1000)
        except Exception as error:
            # What a strategy raises is not ours to know; the same input would fail again.
            traceback = not isinstance(error, EvensongError)
            context.log.error("the server step failed", round_id=round_id, error=str(error), exc_info=traceback)
            await context.run_blocking(self._fail, round_id, error)
        finally:
            del self._steps[round_id]
            context.due.beat()

    def _compute_and_commit(self, round_id: int) -> None:
        context = self._context
        with context.database.read() as tx:
            round = rounds.read_round(tx, round_id)
        if round is None or round.state != State.AGGREGATING:
            return
        try:
            if round.work == device_pb2.WORK_EVALUATE:
                metrics = secure_sum(context, self._secure.machines, round).metrics
                self._commit_secure_evaluation(round_id, metrics)
                return
            computed = compute_next_version(context, self._sums, self._secure.machines, self._optimizers, round)
        except UnsoundSumError as error:
            self._abandon_unsound(round_id, error)
            return
        context.fault("commit.after_blobs")
        if commit_version(context, round_id, computed, self._traffic.take(round_id)):
            context.log.info("version committed", task=round.task_id, round=round.number, reports=computed.reports)

    def _commit_secure_evaluation(self, round_id: int, metrics: common_pb2.Metrics) -> None:
        context = self._context
        with context.database.transaction() as tx:
            round = rounds.read_round(tx, round_id)
            if round is not None and round.state == State.AGGREGATING:
                commit_evaluation(context, tx, round_id, Trigger.STEPPED, metrics)

    def _abandon_unsound(self, round_id: int, error: UnsoundSumError) -> None:
        """A member of the cohort broke the sum: nothing of it is used, and devices train anew."""
        context = self._context
        context.log.error("a secure sum does not check", round_id=round_id, error=str(error))
        with context.database.transaction() as tx:
            round = rounds.read_round(tx, round_id)
            if round is not None and round.state == State.AGGREGATING:
                abandon_round(context, tx, round, Trigger.NO_SUM, str(error))

    def _fail(self, round_id: int, error: Exception) -> None:
        context = self._context
        with context.database.transaction() as tx:
            round = rounds.read_round(tx, round_id)
            if round is None or round.state != State.AGGREGATING:
                return
            message = str(error) if isinstance(error, EvensongError) else f"{type(error).__name__}: {error}"
            task, _ = read_task(tx, round.task_id)
            for other in rounds.read_live(tx, round.task_id):
                trigger = Trigger.FAILED if other.round_id == round_id else Trigger.STOPPED
                abandon_round(context, tx, other, trigger, message, reopen=False)
            end_task(context, tx, task, operator_pb2.TASK_STATE_FAILED, message)


async def first_of(future: asyncio.Future[None], *others: Coroutine[None, None, None]) -> None:
    """Returns when one of them is done; ``future`` is shared and left alone, the others are cancelled."""
    tasks = [asyncio.ensure_future(other) for other in others]
    try:
        await asyncio.wait([future, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
