"""Steps 6 and 7 of a round: from the journal to the mean update, and from that to the next version's parameters."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Row, select

from evensong.coordinator import rounds, tables
from evensong.coordinator.context import Context
from evensong.coordinator.plan import parse_plan
from evensong.coordinator.secure_machines import Machines
from evensong.coordinator.secure_sums import secure_sum
from evensong.coordinator.strategies import Optimizers
from evensong.coordinator.sums import Sums
from evensong.v1 import common_pb2
from evensong.wire.tensors import decode_tensors, encode_tensors


@dataclass(frozen=True)
class NextVersion:
    """What a training round comes to, stored as blobs but not yet committed."""

    parameters_sha256: str
    parameters_bytes: int
    strategy_state_sha256: str
    reports: int
    total_weight: float
    metrics: common_pb2.Metrics


def compute_next_version(
    context: Context, sums: Sums, machines: Machines, optimizers: Optimizers, round: Row[tuple[object, ...]]
) -> NextVersion:
    """The server step over a round that accepts no more. Deterministic: after a crash it gives the same bits again."""
    with context.database.read() as tx:
        base = tx.execute(
            select(tables.versions, tables.bundles.c.payload.label("bundle"))
            .join(tables.tasks, tables.tasks.c.task_id == tables.versions.c.task_id)
            .join(tables.bundles, tables.bundles.c.sha256 == tables.tasks.c.bundle_sha256)
            .where(tables.versions.c.task_id == round.task_id, tables.versions.c.number == round.version)
        ).one()
        entries, metrics = rounds.read_journal(tx, round.round_id)
    plan = parse_plan(base.bundle)
    context.fault("aggregate.before_mean")
    if plan.secure is not None:
        summed = secure_sum(context, machines, round)
        mean, metrics = summed.mean(plan.layout), summed.metrics
    else:
        mean = sums.complete(round.round_id, plan)
    context.fault("step.before")
    parameters, state = optimizers.create(plan.bundle.server).step(
        context.blobs.read(base.strategy_state_sha256),
        decode_tensors(context.blobs.read(base.parameters_sha256), plan.layout),
        mean.update,
        round=round.number,
        total_weight=mean.total_weight,
        reports=len(entries),
        metrics={
            "loss": metrics.loss_sum / metrics.examples,
            "accuracy": metrics.correct / metrics.examples,
        }
        if metrics.examples
        else {},
    )
    context.fault("step.after")
    encoded = encode_tensors(parameters, plan.layout)
    return NextVersion(
        context.blobs.put(encoded),
        len(encoded),
        context.blobs.put(state),
        reports=len(entries),
        total_weight=mean.total_weight,
        metrics=metrics,
    )
