"""Step 8 of a round: a version, its lineage, metrics and event, and the rounds that follow, in one transaction."""

from __future__ import annotations

import hashlib

from sqlalchemy import Row, insert, select, update

from evensong.coordinator import events, rounds, tables
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.coordinator.plan import Plan, parse_plan
from evensong.coordinator.privacy import ledger
from evensong.coordinator.rounds import LIVE, Trigger
from evensong.coordinator.step import NextVersion
from evensong.v1 import common_pb2, device_pb2, operator_pb2, task_pb2
from evensong.wire.signing import sign_blob


def commit_version(context: Context, round_id: int, computed: NextVersion, bytes_down: int) -> bool:
    """Commits what a training round came to, and opens what follows. False if the round was ended in the meantime."""
    with context.database.transaction() as tx:
        round = rounds.read_round(tx, round_id)
        if round is None or round.state != rounds.State.AGGREGATING:
            return False
        task, plan = read_task(tx, round.task_id)
        number = task.latest_version + 1
        insert_version(
            context,
            tx,
            task_pb2.VersionManifest(
                task_id=task.task_id,
                bundle_sha256=bytes.fromhex(task.bundle_sha256),
                number=number,
                parent=round.version,
                parameters=common_pb2.BlobRef(
                    sha256=bytes.fromhex(computed.parameters_sha256), size_bytes=computed.parameters_bytes
                ),
                clip_norm=computed.clip_norm,
                delta=computed.delta,
                parent_parameters_sha256=computed.parent_parameters_sha256,
            ),
            computed,
            round.number,
        )
        if computed.release is not None:
            ledger.record(context, tx, task, plan.bundle, round.number, number, computed.release)
        tx.execute(
            update(tables.tasks)
            .where(tables.tasks.c.task_id == task.task_id)
            .values(latest_version=number, serving_version=number)
        )
        tx.execute(update(tables.rounds).where(tables.rounds.c.round_id == round_id).values(bytes_down=bytes_down))
        rounds.move(context, tx, round, Trigger.STEPPED)
        events.append(
            context,
            tx,
            task.task_id,
            operator_pb2.EVENT_KIND_VERSION_COMMITTED,
            round=round.number,
            version=number,
            reports=computed.reports,
            metrics=computed.metrics,
            bytes_up=round.bytes_up,
            bytes_down=bytes_down,
        )
        goes_on = number < plan.policy.rounds and not ledger.is_spent(tx, task.task_id, plan.bundle)
        if plan.evaluates(number) or (plan.policy.evaluate_every and not goes_on):
            rounds.open_round(context, tx, task.task_id, plan, device_pb2.WORK_EVALUATE, round.number, number)
        if goes_on:
            rounds.open_round(context, tx, task.task_id, plan, device_pb2.WORK_TRAIN, round.number + 1, number)
        else:
            end_if_done(context, tx, task.task_id)
        context.fault("commit.before_commit")
    context.fault("commit.after_commit")
    return True


def insert_version(
    context: Context, tx: Transaction, manifest: task_pb2.VersionManifest, computed: NextVersion, round: int
) -> None:
    """Signs the manifest and stores the version."""
    payload = manifest.SerializeToString(deterministic=True)
    signed = sign_blob("version", payload, context.signer)
    tx.execute(
        insert(tables.versions).values(
            task_id=manifest.task_id,
            number=manifest.number,
            parent=manifest.parent,
            round=round,
            payload=payload,
            signature=signed.signature,
            public_key=signed.public_key,
            manifest_sha256=hashlib.sha256(payload).hexdigest(),
            parameters_sha256=computed.parameters_sha256,
            parameters_bytes=computed.parameters_bytes,
            delta_sha256=manifest.delta.sha256.hex() if manifest.HasField("delta") else None,
            strategy_state_sha256=computed.strategy_state_sha256,
            reports=computed.reports,
            total_weight=computed.total_weight,
            training_examples=computed.metrics.examples,
            training_loss_sum=computed.metrics.loss_sum,
            training_correct=computed.metrics.correct,
            created_ms=context.now(),
        )
    )


def commit_evaluation(
    context: Context, tx: Transaction, round_id: int, trigger: Trigger, metrics: common_pb2.Metrics | None = None
) -> None:
    """Adds the metrics of an evaluation that has its reports to the version: those of the journal, or of a secure sum.
    The last evaluation may end the task."""
    round = rounds.read_round(tx, round_id)
    assert round is not None
    if metrics is None:
        _, metrics = rounds.read_journal(tx, round_id)
    tx.execute(
        update(tables.versions)
        .where(tables.versions.c.task_id == round.task_id, tables.versions.c.number == round.version)
        .values(
            evaluation_examples=metrics.examples,
            evaluation_loss_sum=metrics.loss_sum,
            evaluation_correct=metrics.correct,
        )
    )
    rounds.move(context, tx, round, trigger)
    events.append(
        context,
        tx,
        round.task_id,
        operator_pb2.EVENT_KIND_VERSION_EVALUATED,
        round=round.number,
        version=round.version,
        reports=round.reports,
        metrics=metrics,
    )
    end_if_done(context, tx, round.task_id)


def abandon_round(
    context: Context,
    tx: Transaction,
    round: Row[tuple[object, ...]],
    trigger: Trigger,
    message: str = "",
    *,
    reopen: bool = True,
) -> None:
    """Ends a round without a result. Training is tried again under a new round number, an evaluation is given up."""
    rounds.move(context, tx, round, trigger)
    events.append(
        context,
        tx,
        round.task_id,
        operator_pb2.EVENT_KIND_ROUND_ABANDONED,
        round=round.number,
        version=round.version,
        reports=round.reports,
        message=message or (f"{round.reports} reports at the deadline, {round.minimum} needed"),
    )
    task, plan = read_task(tx, round.task_id)
    if round.work == device_pb2.WORK_TRAIN and round.state == rounds.State.AGGREGATING:
        ledger.record_unused(context, tx, task, plan.bundle, round, _clip_norm(tx, round, plan))
    if not reopen:
        return
    if round.work == device_pb2.WORK_TRAIN:
        number = task.round + 1
        if ledger.is_spent(tx, task.task_id, plan.bundle):
            end_if_done(context, tx, task.task_id)
        else:
            rounds.open_round(context, tx, task.task_id, plan, device_pb2.WORK_TRAIN, number, task.serving_version)
    else:
        end_if_done(context, tx, task.task_id)


def end_if_done(context: Context, tx: Transaction, task_id: str) -> None:
    """The task is complete once it has its versions, or its privacy budget is spent, and no round of it lives."""
    task, plan = read_task(tx, task_id)
    living = tx.execute(
        select(tables.rounds.c.round_id).where(tables.rounds.c.task_id == task_id, tables.rounds.c.state.in_(LIVE))
    ).first()
    if task.state != operator_pb2.TASK_STATE_RUNNING or living is not None:
        return
    if task.latest_version >= plan.policy.rounds:
        end_task(context, tx, task, operator_pb2.TASK_STATE_COMPLETE)
    elif spent := ledger.is_spent(tx, task_id, plan.bundle):
        end_task(context, tx, task, operator_pb2.TASK_STATE_COMPLETE, spent)


def _clip_norm(tx: Transaction, round: Row[tuple[object, ...]], plan: Plan) -> float:
    payload = tx.execute(
        select(tables.versions.c.payload).where(
            tables.versions.c.task_id == round.task_id, tables.versions.c.number == round.version
        )
    ).scalar_one()
    return plan.clip_norm(task_pb2.VersionManifest.FromString(payload))


def end_task(
    context: Context,
    tx: Transaction,
    task: Row[tuple[object, ...]],
    state: operator_pb2.TaskState,
    message: str = "",
) -> None:
    """The last event of a task's history, unless an operator promotes a version later."""
    tx.execute(update(tables.tasks).where(tables.tasks.c.task_id == task.task_id).values(state=state, message=message))
    events.append(
        context,
        tx,
        task.task_id,
        operator_pb2.EVENT_KIND_TASK_ENDED,
        round=task.round,
        version=task.serving_version,
        message=message or operator_pb2.TaskState.Name(state).removeprefix("TASK_STATE_").lower(),
    )


def read_task(tx: Transaction, task_id: str) -> tuple[Row[tuple[object, ...]], Plan]:
    """A task's row and its plan."""
    row = tx.execute(
        select(tables.tasks, tables.bundles.c.payload.label("bundle"))
        .join(tables.bundles, tables.bundles.c.sha256 == tables.tasks.c.bundle_sha256)
        .where(tables.tasks.c.task_id == task_id)
    ).one()
    return row, parse_plan(row.bundle)
