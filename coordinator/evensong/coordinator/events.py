"""The history of a task, as operators watch it: numbered from 1 without gaps, written with the change that it tells."""

from __future__ import annotations

from sqlalchemy import bindparam, insert, select, update

from evensong.coordinator import tables
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.v1 import common_pb2, operator_pb2

_NEXT_SEQUENCE = (
    update(tables.tasks)
    .where(tables.tasks.c.task_id == bindparam("task"))
    .values(last_sequence=tables.tasks.c.last_sequence + 1)
    .returning(tables.tasks.c.last_sequence)
)
_APPEND = insert(tables.events)


def append(
    context: Context,
    tx: Transaction,
    task_id: str,
    kind: operator_pb2.EventKind,
    *,
    round: int = 0,
    version: int = 0,
    reports: int = 0,
    metrics: common_pb2.Metrics | None = None,
    bytes_up: int = 0,
    bytes_down: int = 0,
    message: str = "",
) -> None:
    """Adds one event to the task's history; watchers hear of it after the commit."""
    sequence = tx.execute(_NEXT_SEQUENCE, {"task": task_id}).scalar_one()
    event = operator_pb2.TaskEvent(
        sequence=sequence,
        time_unix_ms=context.now(),
        kind=kind,
        round=round,
        version=version,
        reports=reports,
        metrics=metrics,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        message=message,
    )
    tx.execute(_APPEND, {"task_id": task_id, "sequence": sequence, "payload": event.SerializeToString()})
    tx.after_commit(context.news.beat)


def after(tx: Transaction, task_id: str, sequence: int, limit: int = 500) -> list[operator_pb2.TaskEvent]:
    """Events with a higher sequence number, in order."""
    rows = tx.execute(
        select(tables.events.c.payload)
        .where(tables.events.c.task_id == task_id, tables.events.c.sequence > sequence)
        .order_by(tables.events.c.sequence)
        .limit(limit)
    )
    return [operator_pb2.TaskEvent.FromString(row.payload) for row in rows]
