"""The states of a round and the one table of what leads from one to the next.

A training round collects updates, adds them up, and commits a version; an evaluation round collects metrics of a
version. Both are rows of the table ``rounds``, told apart by ``work``. Nothing but :func:`open_round` and
:func:`move` writes a state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import Row, insert, select, update

from evensong.coordinator import events, tables
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.coordinator.plan import Plan
from evensong.secagg.states import ServerStage
from evensong.v1 import common_pb2, device_pb2, operator_pb2
from evensong.wire.errors import EvensongError


class State(StrEnum):
    COLLECTING = "collecting"  #: training: leases are given, updates accepted
    AGGREGATING = "aggregating"  #: the set of updates is fixed, the next version (or a secure evaluation) is computed
    EVALUATING = "evaluating"  #: evaluation: leases are given, metrics accepted
    COMMITTED = "committed"  #: the version or its metrics are stored
    ABANDONED = "abandoned"  #: nothing came of it


class Trigger(StrEnum):
    GOAL = "goal"  #: as many reports as wanted
    DEADLINE = "deadline"  #: the time is up and there are enough reports
    TOO_FEW = "too few"  #: the time is up and there are not
    STEPPED = "stepped"  #: the new version is computed
    FAILED = "failed"  #: it could not be computed: the task has failed
    UNMASKED = "unmasked"  #: secure: every mask of the sum can be removed
    NO_SUM = "no sum"  #: secure: the protocol came to none, or to one that does not check
    STOPPED = "stopped"  #: an operator stopped the task
    PROMOTED = "promoted"  #: an operator let training go on from another version


TRANSITIONS: dict[tuple[State, Trigger], State] = {
    (State.COLLECTING, Trigger.GOAL): State.AGGREGATING,
    (State.COLLECTING, Trigger.DEADLINE): State.AGGREGATING,
    (State.COLLECTING, Trigger.UNMASKED): State.AGGREGATING,
    (State.COLLECTING, Trigger.TOO_FEW): State.ABANDONED,
    (State.COLLECTING, Trigger.NO_SUM): State.ABANDONED,
    (State.COLLECTING, Trigger.STOPPED): State.ABANDONED,
    (State.COLLECTING, Trigger.PROMOTED): State.ABANDONED,
    (State.AGGREGATING, Trigger.STEPPED): State.COMMITTED,
    (State.AGGREGATING, Trigger.FAILED): State.ABANDONED,
    (State.AGGREGATING, Trigger.NO_SUM): State.ABANDONED,
    (State.AGGREGATING, Trigger.STOPPED): State.ABANDONED,
    (State.AGGREGATING, Trigger.PROMOTED): State.ABANDONED,
    (State.EVALUATING, Trigger.GOAL): State.COMMITTED,
    (State.EVALUATING, Trigger.DEADLINE): State.COMMITTED,
    (State.EVALUATING, Trigger.UNMASKED): State.AGGREGATING,
    (State.EVALUATING, Trigger.TOO_FEW): State.ABANDONED,
    (State.EVALUATING, Trigger.NO_SUM): State.ABANDONED,
    (State.EVALUATING, Trigger.STOPPED): State.ABANDONED,
}

#: In these a round gives leases and accepts reports.
OPEN = (State.COLLECTING, State.EVALUATING)
#: In these it still has something to do.
LIVE = (*OPEN, State.AGGREGATING)


class LeaseState(StrEnum):
    ACTIVE = "active"  #: until it expires, of which no row tells
    REPORTED = "reported"
    ABORTED = "aborted"  #: given back; the device is asked again when its conditions are right
    DECLINED = "declined"  #: given back for good: the device cannot do this round's work
    SUPERSEDED = "superseded"  #: the same device holds a newer one
    CLOSED = "closed"  #: the round ended first


class IllegalTransitionError(EvensongError):
    """A program error: the state of a round and what happened to it do not fit."""


def open_round(
    context: Context, tx: Transaction, task_id: str, plan: Plan, work: device_pb2.Work, number: int, version: int
) -> None:
    """A new round of ``work`` that starts from (or evaluates) ``version``."""
    training = work == device_pb2.WORK_TRAIN
    now = context.now()
    round_id = tx.execute(
        insert(tables.rounds)
        .values(
            task_id=task_id,
            work=work,
            number=number,
            version=version,
            state=State.COLLECTING if training else State.EVALUATING,
            places=0 if training and plan.is_sampled else plan.places(work),  # until its devices are drawn
            goal=plan.goal(work),
            minimum=plan.minimum(work),
            opened_ms=now,
            # An evaluation that nobody can do must not keep its task from ending.
            deadline_ms=None if training else now + plan.deadline_ms,
        )
        .returning(tables.rounds.c.round_id)
    ).scalar_one()
    if plan.secure is not None:
        tx.execute(insert(tables.secure_attempts).values(round_id=round_id, attempt=1, stage=ServerStage.ADVERTISE))
    if training:
        tx.execute(update(tables.tasks).where(tables.tasks.c.task_id == task_id).values(round=number))
        events.append(context, tx, task_id, operator_pb2.EVENT_KIND_ROUND_STARTED, round=number, version=version)
    tx.after_commit(context.work.beat)
    tx.after_commit(context.due.beat)


def move(context: Context, tx: Transaction, round: Row[tuple[object, ...]], trigger: Trigger) -> State:
    """Takes ``round`` (a row of ``rounds`` read in this transaction) along one line of the table."""
    before = State(round.state)
    after = TRANSITIONS.get((before, trigger))
    if after is None:
        raise IllegalTransitionError(f"round {round.round_id} is {before}: {trigger} cannot happen to it")
    values: dict[str, object] = {"state": after}
    if before in OPEN:
        values |= {"closed_by": trigger}
        tx.execute(
            update(tables.leases)
            .where(tables.leases.c.round_id == round.round_id, tables.leases.c.state == LeaseState.ACTIVE)
            .values(state=LeaseState.CLOSED)
        )
        tx.after_commit(lambda: context.spool.dismiss(round_id=round.round_id))
        tx.after_commit(context.secure.beat)  # members of a cohort hear of its end
    elif after is State.ABANDONED:
        values |= {"closed_by": trigger}
    if after not in LIVE:
        values |= {"closed_ms": context.now()}
    changed = tx.execute(
        update(tables.rounds)
        .where(tables.rounds.c.round_id == round.round_id, tables.rounds.c.state == before)
        .values(**values)
    ).rowcount
    if changed != 1:
        raise IllegalTransitionError(f"round {round.round_id} is no longer {before}")
    work = device_pb2.Work.Name(round.work).removeprefix("WORK_").lower()
    tx.after_commit(lambda: context.telemetry.rounds.labels(work, after.value).inc())
    if after not in LIVE:
        seconds = (context.now() - round.opened_ms) / 1000
        tx.after_commit(lambda: context.ended.append(round.round_id))
        tx.after_commit(lambda: context.telemetry.round_seconds.labels(work).observe(seconds))
    tx.after_commit(context.due.beat)
    return after


def read_round(tx: Transaction, round_id: int) -> Row[tuple[object, ...]] | None:
    """The row of one round."""
    return tx.execute(select(tables.rounds).where(tables.rounds.c.round_id == round_id)).one_or_none()


def read_live(tx: Transaction, task_id: str) -> Sequence[Row[tuple[object, ...]]]:
    """The rounds of a task that still have something to do."""
    return tx.execute(
        select(tables.rounds)
        .where(tables.rounds.c.task_id == task_id, tables.rounds.c.state.in_(LIVE))
        .order_by(tables.rounds.c.round_id)
    ).all()


def read_journal(tx: Transaction, round_id: int) -> tuple[Sequence[Row[tuple[object, ...]]], common_pb2.Metrics]:
    """The journal of a round, in order, and the sum of its metrics (exactly rounded, so that no order matters)."""
    rows = tx.execute(
        select(tables.journal).where(tables.journal.c.round_id == round_id).order_by(tables.journal.c.entry)
    ).all()
    metrics = common_pb2.Metrics(
        examples=sum(row.examples for row in rows),
        loss_sum=math.fsum(row.loss_sum for row in rows),
        correct=sum(row.correct for row in rows),
    )
    return rows, metrics
