"""Who may take part in a round: what the accountant assumes about sampling, made true at check-in."""

from __future__ import annotations

from sqlalchemy import Row, and_, select, update

from evensong.coordinator import tables
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.coordinator.plan import Plan
from evensong.coordinator.privacy import ledger
from evensong.v1 import device_pb2


def may_take_part(
    context: Context, tx: Transaction, device_id: str, round: Row[tuple[object, ...]], plan: Plan
) -> bool:
    """Whether the privacy plan lets the device into this training round. Evaluations change no version: all may."""
    if round.work != device_pb2.WORK_TRAIN or not plan.bundle.HasField("privacy"):
        return True
    if plan.is_sampled:
        return _is_drawn(context, tx, device_id, round, plan)
    limits = plan.bundle.privacy
    if not limits.max_participations and not limits.min_separation:
        return True
    entries = _releases_with(tx, device_id, round.task_id)
    if limits.max_participations and len(entries) >= limits.max_participations:
        return False
    return not entries or ledger.count_after(tx, round.task_id, entries[-1]) + 1 >= limits.min_separation


def start_sampled_round(context: Context, tx: Transaction, round: Row[tuple[object, ...]], plan: Plan) -> int | None:
    """Draws the devices of a round that is open but not started; how many, or None while too few are enrolled.

    Every device that is enrolled now is drawn independently with probability goal / population; the round then waits
    for all that were drawn, and its deadline runs. Whoever was drawn and does not come counts as a zero update.
    """
    enrolled = (
        tx.execute(
            select(tables.devices.c.device_id).where(
                tables.devices.c.population == plan.bundle.population, tables.devices.c.revoked.is_(False)
            )
        )
        .scalars()
        .all()
    )
    if len(enrolled) < plan.bundle.privacy.population:
        return None
    chance = _probability(plan)
    drawn = sum(context.noise_key.chooses(round.task_id, round.number, device_id, chance) for device_id in enrolled)
    tx.execute(
        update(tables.rounds)
        .where(tables.rounds.c.round_id == round.round_id)
        .values(places=drawn, goal=drawn, minimum=1, deadline_ms=context.now() + plan.deadline_ms)
    )
    tx.after_commit(context.work.beat)
    tx.after_commit(context.due.beat)
    return drawn


def _is_drawn(context: Context, tx: Transaction, device_id: str, round: Row[tuple[object, ...]], plan: Plan) -> bool:
    if round.deadline_ms is None:
        return False  # not started
    enrolled_ms = tx.execute(
        select(tables.devices.c.enrolled_ms).where(tables.devices.c.device_id == device_id)
    ).scalar_one()
    was_there = enrolled_ms <= round.deadline_ms - plan.deadline_ms
    return was_there and context.noise_key.chooses(round.task_id, round.number, device_id, _probability(plan))


def _probability(plan: Plan) -> float:
    return plan.policy.goal_reports / plan.bundle.privacy.population


def _releases_with(tx: Transaction, device_id: str, task_id: str) -> list[int]:
    """The ledger's entries of the task whose sums have an update of this device, in order."""
    entry, journal, rounds = tables.privacy_ledger, tables.journal, tables.rounds
    found = tx.execute(
        select(entry.c.entry)
        .join(rounds, and_(rounds.c.task_id == entry.c.task_id, rounds.c.number == entry.c.round))
        .join(journal, journal.c.round_id == rounds.c.round_id)
        .where(
            entry.c.task_id == task_id,
            rounds.c.work == device_pb2.WORK_TRAIN,
            journal.c.device_id == device_id,
        )
        .order_by(entry.c.entry)
    )
    return list(found.scalars())
