"""Steps 6 and 7 of a round: from the journal to the mean update, and from that to the next version's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sqlalchemy import Row, select

from evensong.coordinator import rounds, tables
from evensong.coordinator.context import Context
from evensong.coordinator.plan import Plan, parse_plan
from evensong.coordinator.privacy import ledger
from evensong.coordinator.privacy.ledger import Release
from evensong.coordinator.privacy.mechanism import release
from evensong.coordinator.secure_machines import Machines
from evensong.coordinator.secure_sums import secure_sum
from evensong.coordinator.strategies import Optimizers
from evensong.coordinator.sums import Sums
from evensong.v1 import common_pb2, task_pb2
from evensong.wire.codecs import RandomWords
from evensong.wire.download import download_words, encode_download
from evensong.wire.errors import UpdateError
from evensong.wire.tensors import FloatArray, decode_tensors, encode_tensors, layout_size, split_tensors


@dataclass(frozen=True)
class NextVersion:
    """What a training round comes to, stored as blobs but not yet committed."""

    parameters_sha256: str
    parameters_bytes: int
    strategy_state_sha256: str
    reports: int
    total_weight: float
    metrics: common_pb2.Metrics
    clip_norm: float = 0.0  #: of a round that trains from it; 0: the plan's
    release: Release | None = None  #: what it costs, under a privacy plan
    delta: common_pb2.BlobRef | None = None  #: the parameters against the parent's
    parent_parameters_sha256: bytes = b""  #: if there is a delta


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
        standing = ledger.standing(tx, round.task_id, plan.bundle.privacy.bands)
    context.fault("aggregate.before_mean")
    if plan.secure is not None:
        summed = secure_sum(context, machines, round)
        total, metrics = summed.total(), summed.metrics
    else:
        within = sum(entry.within_clip_norm for entry in entries)
        total = replace(sums.complete(round.round_id, plan), within=within)
    clip_norm = plan.clip_norm(task_pb2.VersionManifest.FromString(base.payload))
    released = release(
        plan.bundle,
        total,
        clip_norm=clip_norm,
        key=context.noise_key,
        task_id=round.task_id,
        round=round.number,
        earlier=standing.tags,
    )
    context.fault("step.before")
    before = decode_tensors(context.blobs.read(base.parameters_sha256), plan.layout)
    parameters, state = optimizers.create(plan.bundle.server).step(
        context.blobs.read(base.strategy_state_sha256),
        before,
        split_tensors(released.mean, plan.layout),
        round=round.number,
        total_weight=released.weight,
        reports=len(entries),
        metrics={
            "loss": metrics.loss_sum / metrics.examples,
            "accuracy": metrics.correct / metrics.examples,
        }
        if metrics.examples
        else {},
    )
    context.fault("step.after")
    words = download_words(bytes.fromhex(base.manifest_sha256), round.number)
    parameters, difference = _as_difference(before, parameters, plan, words)
    encoded = encode_tensors(parameters, plan.layout)
    return NextVersion(
        context.blobs.put(encoded),
        len(encoded),
        context.blobs.put(state),
        reports=len(entries),
        total_weight=released.weight,
        metrics=metrics,
        clip_norm=released.clip_norm,
        release=ledger.price(plan.bundle, standing, clip_norm, total.devices, released.tag)
        if plan.bundle.HasField("privacy")
        else None,
        delta=common_pb2.BlobRef(sha256=bytes.fromhex(context.blobs.put(difference)), size_bytes=len(difference))
        if difference
        else None,
        parent_parameters_sha256=bytes.fromhex(base.parameters_sha256) if difference else b"",
    )


def _as_difference(
    before: Mapping[str, FloatArray], after: dict[str, FloatArray], plan: Plan, words: RandomWords
) -> tuple[dict[str, FloatArray], bytes]:
    """The version as its parent plus a difference, and that; or as it is, if there is none, or it is no shorter."""
    bits = plan.bundle.update.download_bits
    if not bits:
        return after, b""
    try:
        parameters, difference = encode_download(before, after, plan.layout, bits, words)
    except UpdateError:  # a step beyond all bounds: devices fetch it whole
        return after, b""
    if len(difference) >= 4 * layout_size(plan.layout):
        return after, b""
    return parameters, difference
