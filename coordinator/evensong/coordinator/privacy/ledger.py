"""The privacy ledger: what each task has spent, release by release, in the transaction that spends it."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Row, func, insert, select

from evensong.coordinator import tables
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.coordinator.errors import TaskError
from evensong.coordinator.privacy.accounting import Accounting
from evensong.secagg.noise import DISTRIBUTED
from evensong.v1 import operator_pb2, task_pb2

#: A sum of floating-point costs may exceed the target that it was computed for by so much.
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Release:
    """What one release adds to the ledger; ``devices`` are those in its sum."""

    clip_norm: float
    devices: int
    epsilon: float  #: spent by the task, this release included
    next_epsilon: float  #: with one more
    tag: bytes  #: names its noise


@dataclass(frozen=True)
class Standing:
    """What a task has released so far; ``tags`` of its newest releases, the newest first."""

    releases: int
    tags: tuple[bytes, ...]


def check_budget(bundle: task_pb2.TaskBundle) -> None:
    """:class:`TaskError` if a task with a privacy plan could not release anything; needs dp-accounting."""
    if not bundle.HasField("privacy"):
        return
    first = Accounting.of(bundle).epsilon(1)
    if first > bundle.privacy.epsilon * _ROUNDING:
        raise TaskError(
            "the first round alone would overspend the privacy budget",
            expected=f"epsilon {bundle.privacy.epsilon:g} at most",
            got=f"{first:.4g} with noise_multiplier {bundle.privacy.noise_multiplier:g}",
            fix="Take more noise; `evensong privacy plan` says how much.",
        )


def standing(tx: Transaction, task_id: str, tags: int) -> Standing:
    """Read before the next release is computed."""
    ledger = tables.privacy_ledger
    newest = tx.execute(
        select(ledger.c.noise_tag)
        .where(ledger.c.task_id == task_id, ledger.c.noise_tag != "")
        .order_by(ledger.c.entry.desc())
        .limit(tags)
    ).scalars()
    return Standing(count_after(tx, task_id, 0), tuple(bytes.fromhex(tag) for tag in newest))


def count_after(tx: Transaction, task_id: str, entry: int) -> int:
    """The task's releases after this entry."""
    ledger = tables.privacy_ledger
    count = select(func.count()).where(ledger.c.task_id == task_id, ledger.c.entry > entry)
    return int(tx.execute(count).scalar_one())


def price(bundle: task_pb2.TaskBundle, before: Standing, clip_norm: float, devices: int, tag: bytes) -> Release:
    """What one more release costs. Takes its time: not inside a transaction."""
    accounting, releases = Accounting.of(bundle), before.releases + 1
    return Release(clip_norm, devices, accounting.epsilon(releases), accounting.epsilon(releases + 1), tag)


def record(
    context: Context,
    tx: Transaction,
    task: Row[tuple[object, ...]],
    bundle: task_pb2.TaskBundle,
    round: int,
    version: int,
    release: Release,
) -> None:
    """Writes a release down, in the transaction that commits its version (0: none)."""
    plan, accounting = bundle.privacy, Accounting.of(bundle)
    tx.execute(
        insert(tables.privacy_ledger).values(
            task_id=task.task_id,
            population=task.population,
            round=round,
            version=version,
            mechanism=plan.mechanism,
            noise_multiplier=plan.noise_multiplier,
            clip_norm=release.clip_norm,
            devices=release.devices,
            sampling=plan.sampling,
            sampling_probability=accounting.sampling_probability,
            epsilon=release.epsilon,
            next_epsilon=release.next_epsilon,
            delta=plan.delta,
            noise_tag=release.tag.hex(),
            created_ms=context.now(),
        )
    )


def record_unused(
    context: Context,
    tx: Transaction,
    task: Row[tuple[object, ...]],
    bundle: task_pb2.TaskBundle,
    round: Row[tuple[object, ...]],
    clip_norm: float,
) -> None:
    """A round that ends without a version after its sum was unmasked: the coordinator has seen it, so it is spent.

    Only noise of devices is spent that way. The coordinator's own is drawn from the sum and shown to nobody else.
    """
    if bundle.HasField("privacy") and bundle.privacy.mechanism in DISTRIBUTED:
        release = price(bundle, standing(tx, task.task_id, 0), clip_norm, round.reports, b"")
        record(context, tx, task, bundle, round.number, 0, release)


def is_spent(tx: Transaction, task_id: str, bundle: task_pb2.TaskBundle) -> str:
    """Why no more may be released, or an empty text."""
    if not bundle.HasField("privacy"):
        return ""
    ledger = tables.privacy_ledger
    last = tx.execute(
        select(ledger).where(ledger.c.task_id == task_id).order_by(ledger.c.entry.desc()).limit(1)
    ).one_or_none()
    if last is None or last.next_epsilon <= bundle.privacy.epsilon * _ROUNDING:
        return ""
    return (
        f"the privacy budget is spent: epsilon {last.epsilon:.4g} of {bundle.privacy.epsilon:.4g} at delta "
        f"{last.delta:g}, and one more round would make it {last.next_epsilon:.4g}"
    )


def read(tx: Transaction, *, task_id: str = "", population: str = "") -> list[operator_pb2.PrivacyLedgerEntry]:
    """All entries of a task, or of a population, in order."""
    ledger = tables.privacy_ledger
    mine = ledger.c.task_id == task_id if task_id else ledger.c.population == population
    return [
        operator_pb2.PrivacyLedgerEntry(
            entry=row.entry,
            task_id=row.task_id,
            population=row.population,
            round=row.round,
            version=row.version,
            mechanism=row.mechanism,
            noise_multiplier=row.noise_multiplier,
            clip_norm=row.clip_norm,
            devices=row.devices,
            sampling=row.sampling,
            sampling_probability=row.sampling_probability,
            epsilon=row.epsilon,
            delta=row.delta,
            created_unix_ms=row.created_ms,
        )
        for row in tx.execute(select(ledger).where(mine).order_by(ledger.c.entry))
    ]
