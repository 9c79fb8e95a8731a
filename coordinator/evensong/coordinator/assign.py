"""Step 2 of a round: who works on what, until when. A lease is a place in a round, held by one device."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Row, and_, bindparam, case, func, insert, or_, select, update

from evensong.coordinator import requests, tables
from evensong.coordinator.admit import Call, Pacing, unfit
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.coordinator.errors import RefusalError
from evensong.coordinator.plan import Plan, parse_plan
from evensong.coordinator.privacy.participation import may_take_part
from evensong.coordinator.rounds import OPEN, LeaseState
from evensong.secagg.states import ServerStage
from evensong.v1 import common_pb2, device_pb2, operator_pb2, task_pb2


@dataclass(frozen=True)
class NoWork:
    """Nothing now; ``fits`` tells whether there may be something for this device later."""

    fits: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assigned:
    """An assignment, and the round that it is a place in (None when a stored answer is given again)."""

    response: device_pb2.CheckInResponse
    round_id: int | None


def assign(context: Context, pacing: Pacing, call: Call, request: device_pb2.CheckInRequest) -> Assigned | NoWork:
    """A lease for the device that checks in, if a round has a place for it.

    A device has one lease: it gets its own place again under a new fencing token if it comes back without having
    reported. Training goes before evaluation, so that evaluations use the devices that the open round does not need;
    but a secure evaluation, which takes a moment of many devices, goes before training.
    """
    key = call.key(request.request_id)
    # A look first: many held check-ins wake for few places, and only one at a time may write.
    with context.database.read() as tx:
        if (stored := requests.recall(tx, key)) is not None:
            return Assigned(device_pb2.CheckInResponse.FromString(stored), None)
        if isinstance(chosen := _choose(context, tx, call, request), NoWork):
            return chosen
    with context.database.transaction() as tx:
        if (stored := requests.recall(tx, key)) is not None:
            return Assigned(device_pb2.CheckInResponse.FromString(stored), None)
        if isinstance(chosen := _choose(context, tx, call, request), NoWork):
            return chosen
        assignment = _lease(context, tx, call.device.device_id, chosen)
        response = device_pb2.CheckInResponse(retry=pacing.soon(), assignment=assignment)
        requests.remember(tx, key, response, context.now())
        context.fault("assign.before_commit")
    context.fault("assign.after_commit")
    return Assigned(response, chosen.round_id)


def _choose(
    context: Context, tx: Transaction, call: Call, request: device_pb2.CheckInRequest
) -> Row[tuple[object, ...]] | NoWork:
    device_id, now = call.device.device_id, context.now()
    # A secure evaluation, then training, then other evaluations; of each what has waited longest.
    candidates = tx.execute(
        _ROUNDS_WITH_BUNDLES.where(
            tables.tasks.c.population == call.device.population,
            tables.tasks.c.state == operator_pb2.TASK_STATE_RUNNING,
            tables.rounds.c.state.in_(OPEN),
            or_(tables.rounds.c.deadline_ms.is_(None), tables.rounds.c.deadline_ms > now),
            or_(tables.secure_attempts.c.stage.is_(None), tables.secure_attempts.c.stage == ServerStage.ADVERTISE),
        ).order_by(
            case(
                (
                    and_(tables.rounds.c.work == device_pb2.WORK_EVALUATE, tables.secure_attempts.c.stage.is_not(None)),
                    0,
                ),
                else_=tables.rounds.c.work,
            ),
            tables.rounds.c.round_id,
        )
    ).all()
    own = tx.execute(
        select(tables.leases.c.round_id, tables.leases.c.state)
        .where(tables.leases.c.device_id == device_id)
        .where(tables.leases.c.round_id.in_([round.round_id for round in candidates]))
    ).all()
    holds = {row.round_id for row in own if row.state == LeaseState.ACTIVE}
    done = {row.round_id for row in own if row.state in (LeaseState.REPORTED, LeaseState.DECLINED)}
    reasons = []
    fits = not candidates
    for round in sorted(candidates, key=lambda round: round.round_id not in holds):
        if problem := unfit(parse_plan(round.bundle), round.work, request):
            reasons.append(problem)
            continue
        fits = True
        if round.round_id in done or _free_places(tx, round, now, device_id) <= 0:
            continue
        if may_take_part(context, tx, device_id, round, parse_plan(round.bundle)):
            return round
    return NoWork(fits, tuple(dict.fromkeys(reasons)))


def _free_places(tx: Transaction, round: Row[tuple[object, ...]], now: int, device_id: str) -> int:
    """Places that neither a report nor another device's live lease takes."""
    held = tx.execute(
        select(func.count())
        .select_from(tables.leases)
        .where(
            tables.leases.c.round_id == round.round_id,
            tables.leases.c.state == LeaseState.ACTIVE,
            tables.leases.c.expires_ms > now,
            tables.leases.c.device_id != device_id,
        )
    ).scalar_one()
    return int(round.places - round.reports - held)


def _lease(context: Context, tx: Transaction, device_id: str, round: Row[tuple[object, ...]]) -> device_pb2.Assignment:
    now, settings, plan = context.now(), context.settings, parse_plan(round.bundle)
    deadline = round.deadline_ms
    if deadline is None:
        deadline = now + plan.deadline_ms
        tx.execute(update(tables.rounds).where(tables.rounds.c.round_id == round.round_id).values(deadline_ms=deadline))
        if plan.secure is not None:  # by then whoever trains must have come to the protocol
            tx.execute(
                update(tables.secure_attempts)
                .where(tables.secure_attempts.c.round_id == round.round_id)
                .values(deadline_ms=now + plan.policy.deadline_ms)
            )
    # A member of a cohort is waited for by others: its lease lasts as long as the protocol may.
    short = settings.lease_ms and plan.secure is None
    expires = min(deadline, now + settings.lease_ms) if short else deadline
    superseded = tx.execute(
        update(tables.leases)
        .where(tables.leases.c.device_id == device_id, tables.leases.c.state == LeaseState.ACTIVE)
        .values(state=LeaseState.SUPERSEDED)
    ).rowcount
    if superseded:
        tx.after_commit(context.work.beat)
        tx.after_commit(lambda: context.spool.dismiss(device_id=device_id))
    token = tx.execute(
        update(tables.devices)
        .where(tables.devices.c.device_id == device_id)
        .values(fencing_token=tables.devices.c.fencing_token + 1, last_seen_ms=now)
        .returning(tables.devices.c.fencing_token)
    ).scalar_one()
    lease_id = context.new_id()
    tx.execute(
        insert(tables.leases).values(
            lease_id=lease_id,
            round_id=round.round_id,
            device_id=device_id,
            fencing_token=token,
            expires_ms=expires,
            state=LeaseState.ACTIVE,
        )
    )
    if round.deadline_ms is None or settings.lease_ms:
        tx.after_commit(context.due.beat)  # the conductor learns of a new moment
    row = read_signed(tx, round.task_id, round.version)
    return device_pb2.Assignment(
        lease=common_pb2.Lease(lease_id=lease_id, fencing_token=token, expires_unix_ms=expires),
        work=round.work,
        task_id=round.task_id,
        round=round.number,
        bundle=row[0],
        version=row[1],
    )


def read_signed(tx: Transaction, task_id: str, version: int) -> tuple[task_pb2.SignedBlob, task_pb2.SignedBlob]:
    """The signed bundle and manifest of a version."""
    bundle = tx.execute(
        select(tables.bundles)
        .join(tables.tasks, tables.tasks.c.bundle_sha256 == tables.bundles.c.sha256)
        .where(tables.tasks.c.task_id == task_id)
    ).one()
    manifest = tx.execute(
        select(tables.versions).where(tables.versions.c.task_id == task_id, tables.versions.c.number == version)
    ).one()
    return (
        task_pb2.SignedBlob(payload=bundle.payload, signature=bundle.signature, public_key=bundle.public_key),
        task_pb2.SignedBlob(payload=manifest.payload, signature=manifest.signature, public_key=manifest.public_key),
    )


def serving(context: Context, population: str) -> list[device_pb2.Serving]:
    """What devices of the population predict with: of tasks that share a name, the newest."""
    with context.database.read() as tx:
        newest = (
            select(tables.tasks.c.name, func.max(tables.tasks.c.created_ms).label("created_ms"))
            .where(tables.tasks.c.population == population, tables.tasks.c.state != operator_pb2.TASK_STATE_FAILED)
            .group_by(tables.tasks.c.name)
            .subquery()
        )
        rows = tx.execute(
            select(tables.tasks)
            .join(
                newest,
                and_(tables.tasks.c.name == newest.c.name, tables.tasks.c.created_ms == newest.c.created_ms),
            )
            .where(tables.tasks.c.population == population)
            .order_by(tables.tasks.c.created_ms, tables.tasks.c.task_id)
        ).all()
        answer = []
        for row in rows:
            bundle, version = read_signed(tx, row.task_id, row.serving_version)
            answer.append(device_pb2.Serving(task_id=row.task_id, bundle=bundle, version=version))
        return answer


# ------------------------------------------------------------------------------------------------------ holding a lease


_WITH_BUNDLES = (
    select(tables.rounds, tables.bundles.c.payload.label("bundle"))
    .join(tables.tasks, tables.tasks.c.task_id == tables.rounds.c.task_id)
    .join(tables.bundles, tables.bundles.c.sha256 == tables.tasks.c.bundle_sha256)
)
_NEWEST_ATTEMPT = (
    select(func.max(tables.secure_attempts.c.attempt))
    .where(tables.secure_attempts.c.round_id == tables.rounds.c.round_id)
    .correlate(tables.rounds)
    .scalar_subquery()
)
#: A secure round with its newest attempt, another with none.
_ROUNDS_WITH_BUNDLES = _WITH_BUNDLES.outerjoin(
    tables.secure_attempts,
    and_(
        tables.secure_attempts.c.round_id == tables.rounds.c.round_id,
        tables.secure_attempts.c.attempt == _NEWEST_ATTEMPT,
    ),
)
_FIND_ROUND = _WITH_BUNDLES.where(tables.rounds.c.round_id == bindparam("round"))
_FIND_LEASE = select(tables.leases).where(
    tables.leases.c.lease_id == bindparam("lease"), tables.leases.c.device_id == bindparam("device")
)


@dataclass(frozen=True)
class Holder:
    """A lease that holds, and the round that it is a place in: rows of this transaction."""

    lease: Row[tuple[object, ...]]
    round: Row[tuple[object, ...]]
    plan: Plan


def check_lease(
    context: Context, tx: Transaction, device_id: str, claimed: common_pb2.Lease, work: device_pb2.Work | None = None
) -> Holder:
    """The lease that the device claims, if it holds; else :class:`RefusalError` tells why it does not.

    What ended the round comes before what ended the lease: it is what the device can learn something from.
    """
    lease, round = find_lease(tx, device_id, claimed)
    if work is not None and round.work != work:
        raise RefusalError(common_pb2.REFUSAL_REASON_INVALID_REQUEST, "the lease is for other work")
    _refuse_ended(context, lease, round)
    return Holder(lease, round, parse_plan(round.bundle))


def find_lease(
    tx: Transaction, device_id: str, claimed: common_pb2.Lease
) -> tuple[Row[tuple[object, ...]], Row[tuple[object, ...]]]:
    """The device's lease under that fencing token, and its round with the bundle, whatever became of them."""
    lease = tx.execute(_FIND_LEASE, {"lease": claimed.lease_id, "device": device_id}).one_or_none()
    if lease is None or lease.fencing_token != claimed.fencing_token:
        raise RefusalError(
            common_pb2.REFUSAL_REASON_LEASE_EXPIRED,
            "the device has no such lease" if lease is None else "the lease has another fencing token",
            expected=None if lease is None else lease.fencing_token,
            got=claimed.lease_id[:40] if lease is None else claimed.fencing_token,
            fix="Check in for new work.",
        )
    return lease, tx.execute(_FIND_ROUND, {"round": lease.round_id}).one()


def _refuse_ended(context: Context, lease: Row[tuple[object, ...]], round: Row[tuple[object, ...]]) -> None:
    if lease.state == LeaseState.REPORTED:
        raise RefusalError(common_pb2.REFUSAL_REASON_ALREADY_REPORTED, "the device already reported in this round")
    if round.state not in OPEN:
        reason, what = _WHY_CLOSED.get(
            round.closed_by, (common_pb2.REFUSAL_REASON_TOO_LATE, f"round {round.number} is over")
        )
        raise RefusalError(reason, what)
    now = context.now()
    if round.deadline_ms is not None and now >= round.deadline_ms:
        raise RefusalError(common_pb2.REFUSAL_REASON_TOO_LATE, f"the deadline of round {round.number} has passed")
    refuse_inactive(context, lease)


def refuse_inactive(context: Context, lease: Row[tuple[object, ...]]) -> None:
    """:class:`RefusalError` unless the lease is in force."""
    now = context.now()
    if lease.state != LeaseState.ACTIVE or now >= lease.expires_ms:
        raise RefusalError(
            common_pb2.REFUSAL_REASON_LEASE_EXPIRED,
            f"the lease is {lease.state}" if lease.state != LeaseState.ACTIVE else "the lease has expired",
            expected=f"a time before {lease.expires_ms}",
            got=now,
            fix="Check in for new work.",
        )


_WHY_CLOSED = {
    "unmasked": (common_pb2.REFUSAL_REASON_NOT_NEEDED, "the round has its sum"),
    "goal": (common_pb2.REFUSAL_REASON_NOT_NEEDED, "the round has all the reports that it wants"),
    "promoted": (common_pb2.REFUSAL_REASON_STALE, "training goes on from another version"),
    "stopped": (common_pb2.REFUSAL_REASON_TOO_LATE, "the task was stopped"),
}
