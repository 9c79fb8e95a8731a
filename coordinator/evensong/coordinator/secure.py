"""Secure rounds, the coordinator's side of ``docs/secagg.md``: messages in, stages closed, one sum out.

The protocol itself is :class:`evensong.secagg.server.ServerMachine`. Here it meets the database: each accepted
message is stored in the transaction that may also close its stage, before it is answered, so that a coordinator that
was killed goes on with the very same machine.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from evensong.coordinator import events, requests, rounds, tables
from evensong.coordinator.admit import Call, Pacing
from evensong.coordinator.assign import find_lease, refuse_inactive
from evensong.coordinator.commit import abandon_round
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.coordinator.errors import RefusalError
from evensong.coordinator.plan import SECURE_ATTEMPTS, SECURE_STAGES, Plan, parse_plan
from evensong.coordinator.rounds import OPEN, LeaseState, Trigger
from evensong.coordinator.secure_machines import Machines, newest_attempt
from evensong.secagg.errors import ProtocolError, SecureError
from evensong.secagg.server import ServerMachine
from evensong.secagg.states import ServerStage
from evensong.v1 import common_pb2, device_pb2, operator_pb2, secagg_pb2
from evensong.wire.transport import DEVICE_SERVICE

SECURE = DEVICE_SERVICE + "Secure"

#: The steps of a request, and the stage that each belongs to.
_STAGE_OF_STEP = {
    "advertise": ServerStage.ADVERTISE,
    "shares": ServerStage.SHARES,
    "masked": ServerStage.MASKED,
    "commit": ServerStage.COMMIT,
    "unmask": ServerStage.UNMASK,
}
_ORDER = list(ServerStage)
_FIELD_OF_ANSWER = {
    secagg_pb2.SecureRoster: "roster",
    secagg_pb2.SecureDelivery: "delivery",
    secagg_pb2.SecureSurvivors: "survivors",
    secagg_pb2.SecureQuorum: "quorum",
}


@dataclass(frozen=True)
class Standing:
    """A live lease in a secure round whose sum is still wanted: rows of this transaction."""

    lease: Row[tuple[object, ...]]
    round: Row[tuple[object, ...]]
    attempt: Row[tuple[object, ...]]
    plan: Plan


class SecureRounds:
    """All secure rounds of one coordinator."""

    def __init__(self, context: Context, pacing: Pacing) -> None:
        self._context = context
        self._pacing = pacing
        self.machines = Machines(context)

    # ------------------------------------------------------------------------------------------ a step of one device

    def step(self, call: Call, request: secagg_pb2.SecureRequest) -> secagg_pb2.SecureResponse:
        """Takes the device's message, if it is new; the answer has no ``next`` while the stage is open."""
        device_id, step = call.device.device_id, request.WhichOneof("step")
        if step is None:
            raise RefusalError(common_pb2.REFUSAL_REASON_INVALID_REQUEST, "the request brings no step")
        with self._context.database.read() as tx:
            standing = self._standing(tx, device_id, request.lease)
        if isinstance(standing, secagg_pb2.SecureEnd):
            return self._respond(request.attempt, standing)
        if request.attempt != standing.attempt.attempt:
            return self._other_attempt(request.attempt, standing.attempt.attempt)
        with self.machines.open(standing.round.round_id) as machine:
            if request.attempt != machine.session.attempt:  # it ended a moment ago
                return self._other_attempt(request.attempt, machine.session.attempt)
            if step != "masked":
                message, now = getattr(request, step), self._context.now()
                if self._receive(machine, device_id, _STAGE_OF_STEP[step], message, now):
                    self._store(machine, standing, message, now)
            return self._answer(machine, device_id, standing, step)

    def accept_masked(
        self, call: Call, request: device_pb2.CommitUploadRequest, sha256: str, size: int
    ) -> device_pb2.CommitUploadResponse:
        """The signed end of a masked vector that is whole and durable: from here on it is part of the sum, if the
        attempt comes to one."""
        device_id, response = call.device.device_id, device_pb2.CommitUploadResponse(retry=self._pacing.soon())
        if request.weight or request.HasField("metrics") or request.within_clip_norm:
            raise RefusalError(
                common_pb2.REFUSAL_REASON_INVALID_UPDATE,
                "a secure sum takes neither weight nor metrics in the clear",
                fix="They travel inside the masked vector.",
            )
        with self._context.database.read() as tx:
            standing = self._standing(tx, device_id, request.lease)
        if isinstance(standing, secagg_pb2.SecureEnd) or standing.attempt.attempt != request.masked.attempt:
            raise RefusalError(common_pb2.REFUSAL_REASON_TOO_LATE, "the attempt that the vector was masked for is over")
        upload = _MaskedUpload(request.upload_id, size, call.key(request.request_id), response)
        now = self._context.now()
        with self.machines.open(standing.round.round_id) as machine:
            if self._receive(machine, device_id, ServerStage.MASKED, request.masked, now, bytes.fromhex(sha256)):
                self._store(machine, standing, request.masked, now, upload)
        return response

    def _receive(
        self,
        machine: ServerMachine,
        device_id: str,
        stage: ServerStage,
        message: Any,
        now: int,
        sha256: bytes | None = None,
    ) -> bool:
        """Whether the message is new. What the protocol does not allow is refused, and changes nothing."""
        late = _ORDER.index(machine.stage) > _ORDER.index(stage)
        try:
            return machine.receive(device_id, message, vector_sha256=sha256, now_unix_ms=now)
        except ProtocolError as error:
            reason = common_pb2.REFUSAL_REASON_TOO_LATE if late else common_pb2.REFUSAL_REASON_INVALID_REQUEST
            raise RefusalError(reason, str(error)) from None

    def _store(
        self,
        machine: ServerMachine,
        standing: Standing,
        message: Any,
        now: int,
        upload: _MaskedUpload | None = None,
    ) -> None:
        """One transaction: the message, and whatever it completes."""
        context, stage, lease = self._context, machine.stage, standing.lease
        claimed = common_pb2.Lease(lease_id=lease.lease_id, fencing_token=lease.fencing_token)
        with self.machines.storing(standing.round.round_id), context.database.transaction() as tx:
            current = self._standing(tx, lease.device_id, claimed)
            if isinstance(current, secagg_pb2.SecureEnd):
                raise RefusalError(common_pb2.REFUSAL_REASON_TOO_LATE, "the round ended meanwhile")
            tx.execute(
                insert(tables.secure_messages).values(
                    round_id=current.round.round_id,
                    attempt=current.attempt.attempt,
                    stage=stage,
                    device_id=lease.device_id,
                    payload=message.SerializeToString(),
                    upload_id=upload.upload_id if upload else None,
                    accepted_ms=now,
                )
            )
            if stage == ServerStage.ADVERTISE:
                self._hurry(tx, current, machine)
            if upload is not None:
                self._count_vector(tx, current, machine, upload)
            self._close_what_is_complete(tx, current.round, current.plan, machine)
            context.fault(f"secure.{stage}.before_commit")
        context.fault(f"secure.{stage}.after_commit")
        context.telemetry.secure_messages.labels(stage.value).inc()

    def _count_vector(self, tx: Transaction, standing: Standing, machine: ServerMachine, upload: _MaskedUpload) -> None:
        context, round = self._context, standing.round
        requests.remember(tx, upload.key, upload.response, context.now())
        tx.execute(
            update(tables.rounds)
            .where(tables.rounds.c.round_id == round.round_id)
            .values(bytes_up=tables.rounds.c.bytes_up + upload.size)
        )
        if round.work == device_pb2.WORK_TRAIN:
            events.append(
                context,
                tx,
                round.task_id,
                operator_pb2.EVENT_KIND_REPORT_ACCEPTED,
                round=round.number,
                version=round.version,
                reports=len(machine.arrived),
                bytes_up=upload.size,
            )

    # --------------------------------------------------------------------------------------------------- the answers

    def _answer(
        self, machine: ServerMachine, device_id: str, standing: Standing, step: str
    ) -> secagg_pb2.SecureResponse:
        attempt: int = standing.attempt.attempt
        if machine.stage == ServerStage.DONE:
            return self._respond(attempt, _end("DONE"))
        if machine.stage == ServerStage.ABORTED:
            with self._context.database.read() as tx:  # what followed was committed with the abort
                now = newest_attempt(tx, standing.round.round_id).attempt
            return self._respond(now, _end("AGAIN" if now > attempt else "ABORTED", machine.reason))
        try:
            answer = machine.answer(device_id, _STAGE_OF_STEP[step])
        except ProtocolError as error:
            raise RefusalError(common_pb2.REFUSAL_REASON_TOO_LATE, str(error)) from None
        return self._respond(attempt, answer)

    def _other_attempt(self, asked: int, current: int) -> secagg_pb2.SecureResponse:
        if asked > current:
            raise RefusalError(
                common_pb2.REFUSAL_REASON_INVALID_REQUEST, "there is no such attempt", expected=current, got=asked
            )
        return self._respond(current, _end("AGAIN", "the attempt was given up"))

    def _respond(self, attempt: int, message: Any | None) -> secagg_pb2.SecureResponse:
        response = secagg_pb2.SecureResponse(retry=self._pacing.soon(), attempt=attempt)
        if isinstance(message, secagg_pb2.SecureEnd):
            response.end.CopyFrom(message)
        elif message is not None:
            getattr(response, _FIELD_OF_ANSWER[type(message)]).CopyFrom(message)
        return response

    def _standing(self, tx: Transaction, device_id: str, claimed: common_pb2.Lease) -> Standing | secagg_pb2.SecureEnd:
        """Where the device stands, or how its round ended."""
        lease, round = find_lease(tx, device_id, claimed)
        plan = parse_plan(round.bundle)
        if plan.secure is None:
            raise RefusalError(common_pb2.REFUSAL_REASON_INVALID_REQUEST, "the task has no secure sums")
        if lease.state == LeaseState.REPORTED:
            return _end("DONE")
        if round.state not in OPEN:
            return _end("ABORTED", f"round {round.number} is over")
        refuse_inactive(self._context, lease)
        return Standing(lease, round, newest_attempt(tx, round.round_id), plan)

    # ------------------------------------------------------------------------------------------------ closing stages

    def advance(self) -> int | None:
        """Closes stages whose time is up, or that nobody else can come to. When to look again, in Unix milliseconds."""
        context, now = self._context, self._context.now()
        with context.database.read() as tx:
            live = tx.execute(
                select(tables.rounds.c.round_id, tables.secure_attempts.c.deadline_ms)
                .join(tables.secure_attempts, tables.secure_attempts.c.round_id == tables.rounds.c.round_id)
                .where(
                    tables.rounds.c.state.in_(OPEN),
                    tables.secure_attempts.c.stage.not_in((ServerStage.DONE, ServerStage.ABORTED)),
                    tables.secure_attempts.c.deadline_ms.is_not(None),
                )
            ).all()
        for row in live:
            try:
                self._advance(row.round_id, due=row.deadline_ms <= now)
            except SecureError as error:
                self._abandon_unreadable(row.round_id, error)
        later = [row.deadline_ms for row in live if row.deadline_ms > now]
        return min(later, default=None)

    def _advance(self, round_id: int, *, due: bool) -> None:
        context = self._context
        with self.machines.open(round_id) as machine:
            with context.database.read() as tx:
                round = _read(tx, round_id)
                if not due and not self._is_complete(tx, round, parse_plan(round.bundle), machine):
                    return
            with self.machines.storing(round_id), context.database.transaction() as tx:
                round = _read(tx, round_id)
                if round.state not in OPEN:
                    return
                plan = parse_plan(round.bundle)
                deadline = newest_attempt(tx, round_id).deadline_ms
                if due and deadline is not None and deadline <= context.now():
                    self._close(tx, round, plan, machine)
                self._close_what_is_complete(tx, round, plan, machine)
                context.fault("secure.close.before_commit")
            context.fault("secure.close.after_commit")

    def _abandon_unreadable(self, round_id: int, error: SecureError) -> None:
        """A machine that its stored messages do not make again (damage, or an upgrade in the middle of a round) must
        not hold up the other rounds."""
        context = self._context
        context.log.error("a secure round cannot be read back", round_id=round_id, error=str(error))
        with context.database.transaction() as tx:
            round = _read(tx, round_id)
            if round.state in OPEN:
                abandon_round(context, tx, round, Trigger.NO_SUM, "its stored messages cannot be read back")

    def _close_what_is_complete(
        self, tx: Transaction, round: Row[tuple[object, ...]], plan: Plan, machine: ServerMachine
    ) -> None:
        while machine.stage not in (ServerStage.DONE, ServerStage.ABORTED) and self._is_complete(
            tx, round, plan, machine
        ):
            self._close(tx, round, plan, machine)

    def _is_complete(self, tx: Transaction, round: Row[tuple[object, ...]], plan: Plan, machine: ServerMachine) -> bool:
        """Everyone who can still send in this stage has, or whoever has not is gone: no stage waits for nobody."""
        if machine.stage in (ServerStage.DONE, ServerStage.ABORTED):
            return False
        if machine.is_complete():
            return True
        # A cohort may still gather; in later stages nobody can join.
        gathering = machine.stage == ServerStage.ADVERTISE
        if gathering and (not machine.can_close() or len(machine.arrived) < round.goal):
            return False
        awaited = set(
            tx.execute(
                select(tables.leases.c.device_id).where(
                    tables.leases.c.round_id == round.round_id,
                    tables.leases.c.state == LeaseState.ACTIVE,
                    tables.leases.c.expires_ms > self._context.now(),
                )
            ).scalars()
        )
        return not (awaited - set(machine.arrived))

    def _close(self, tx: Transaction, round: Row[tuple[object, ...]], plan: Plan, machine: ServerMachine) -> None:
        """Ends the machine's stage, with everything that follows from it."""
        context, before = self._context, machine.stage
        attempt = newest_attempt(tx, round.round_id).attempt
        arrived = machine.arrived
        after = machine.close()
        deadline = None if after in (ServerStage.DONE, ServerStage.ABORTED) else context.now() + plan.stage_ms
        tx.execute(
            update(tables.secure_attempts)
            .where(tables.secure_attempts.c.round_id == round.round_id, tables.secure_attempts.c.attempt == attempt)
            .values(stage=after, deadline_ms=deadline)
        )
        if after == ServerStage.ABORTED:
            self._give_up(tx, round, plan, machine, attempt, before, arrived)
        elif after == ServerStage.DONE:
            self._finish(tx, round, attempt)
        elif before != ServerStage.COMMIT:  # who did not sign may still help to unmask
            self._leave_out(tx, round.round_id, before, arrived)
        tx.after_commit(context.secure.beat)
        tx.after_commit(context.due.beat)
        context.log.info(
            "secure stage closed",
            task=round.task_id,
            round=round.number,
            attempt=attempt,
            stage=before.value,
            devices=len(arrived),
            next=after.value,
            reason=machine.reason or None,
        )
        tx.after_commit(lambda: context.telemetry.secure_stages.labels(before.value, after.value).inc())

    def _leave_out(self, tx: Transaction, round_id: int, stage: ServerStage, remaining: Collection[str]) -> None:
        """Who missed a stage is told so when it comes, and may check in anew."""
        dropped = tx.execute(
            update(tables.leases)
            .where(
                tables.leases.c.round_id == round_id,
                tables.leases.c.state == LeaseState.ACTIVE,
                tables.leases.c.device_id.not_in(remaining),
            )
            .values(state=LeaseState.CLOSED)
        ).rowcount
        telemetry = self._context.telemetry
        tx.after_commit(lambda: telemetry.secure_dropped.labels(stage.value).inc(dropped))
        tx.after_commit(lambda: self._context.spool.dismiss(round_id=round_id))

    def _finish(self, tx: Transaction, round: Row[tuple[object, ...]], attempt: int) -> None:
        """The sum can be computed: its survivors are journalled, and their devices are done."""
        context, now = self._context, self._context.now()
        vectors = tx.execute(
            select(tables.secure_messages.c.device_id, tables.uploads.c.upload_id, tables.uploads.c.sha256)
            .join(tables.uploads, tables.uploads.c.upload_id == tables.secure_messages.c.upload_id)
            .where(
                tables.secure_messages.c.round_id == round.round_id,
                tables.secure_messages.c.attempt == attempt,
                tables.secure_messages.c.stage == ServerStage.MASKED,
            )
            .order_by(tables.secure_messages.c.entry)
        ).all()
        devices = [row.device_id for row in vectors]
        rows = [
            {
                "round_id": round.round_id,
                "device_id": row.device_id,
                "upload_id": row.upload_id,
                "update_sha256": row.sha256,
                "weight": 0.0,
                "examples": 0,
                "loss_sum": 0.0,
                "correct": 0,
                "accepted_ms": now,
            }
            for row in vectors
        ]
        tx.connection.execute(insert(tables.journal), rows)
        tx.execute(
            update(tables.leases)
            .where(tables.leases.c.round_id == round.round_id, tables.leases.c.device_id.in_(devices))
            .where(tables.leases.c.state == LeaseState.ACTIVE)
            .values(state=LeaseState.REPORTED)
        )
        tx.execute(
            update(tables.devices)
            .where(tables.devices.c.device_id.in_(devices))
            .values(accepted_reports=tables.devices.c.accepted_reports + 1, last_seen_ms=now)
        )
        tx.execute(update(tables.rounds).where(tables.rounds.c.round_id == round.round_id).values(reports=len(devices)))
        work = device_pb2.Work.Name(round.work).removeprefix("WORK_").lower()
        tx.after_commit(lambda: context.telemetry.accepted.labels(work).inc(len(devices)))
        rounds.move(context, tx, round, Trigger.UNMASKED)

    def _give_up(
        self,
        tx: Transaction,
        round: Row[tuple[object, ...]],
        plan: Plan,
        machine: ServerMachine,
        attempt: int,
        stage: ServerStage,
        arrived: Collection[str],
    ) -> None:
        """No sum from this attempt. Nothing was revealed, so the same updates may be masked anew: under new keys,
        without the devices that were blamed."""
        context = self._context
        context.telemetry.secure_aborts.labels(stage.value).inc()
        self._forget_vectors(tx, round.round_id)
        if machine.blamed:
            context.log.warning("devices blamed", round=round.number, devices=sorted(machine.blamed))
            tx.execute(
                update(tables.leases)
                .where(tables.leases.c.round_id == round.round_id, tables.leases.c.device_id.in_(machine.blamed))
                .where(tables.leases.c.state == LeaseState.ACTIVE)
                .values(state=LeaseState.DECLINED)
            )
        if not machine.may_repeat or stage == ServerStage.ADVERTISE or attempt >= SECURE_ATTEMPTS:
            why = f"no secure sum in {attempt} attempt(s): {machine.reason}"
            abandon_round(context, tx, round, Trigger.NO_SUM, why)
            return
        self._leave_out(tx, round.round_id, stage, arrived)  # whoever kept the others waiting keeps no place
        excluded = set(newest_attempt(tx, round.round_id).excluded.split()) | machine.blamed
        tx.execute(
            insert(tables.secure_attempts).values(
                round_id=round.round_id,
                attempt=attempt + 1,
                stage=ServerStage.ADVERTISE,
                deadline_ms=context.now() + plan.stage_ms,
                excluded=" ".join(sorted(excluded)),
            )
        )
        tx.after_commit(context.work.beat)

    def _forget_vectors(self, tx: Transaction, round_id: int) -> None:
        """Masked vectors of an attempt that is over are noise."""
        gone = list(
            tx.execute(
                delete(tables.uploads)
                .where(tables.uploads.c.round_id == round_id)
                .returning(tables.uploads.c.upload_id)
            ).scalars()
        )
        tx.after_commit(lambda: self._context.spool.discard(gone))

    def _hurry(self, tx: Transaction, standing: Standing, machine: ServerMachine) -> None:
        """Once there are as many as wanted, late devices are waited for no longer than a stage. An evaluation, which
        keeps devices from training, is content with any that can be a cohort, and waits for those a few stages."""
        now, stage_ms, deadline = self._context.now(), standing.plan.stage_ms, standing.attempt.deadline_ms
        training = standing.round.work == device_pb2.WORK_TRAIN
        enough = len(machine.arrived) >= standing.round.goal if training else machine.can_close()
        if training and not enough:
            return
        soon = now + (stage_ms if enough else SECURE_STAGES * stage_ms)
        if deadline is not None and deadline <= soon:
            return
        tx.execute(
            update(tables.secure_attempts)
            .where(
                tables.secure_attempts.c.round_id == standing.round.round_id,
                tables.secure_attempts.c.attempt == standing.attempt.attempt,
            )
            .values(deadline_ms=soon)
        )
        tx.after_commit(self._context.due.beat)


@dataclass(frozen=True)
class _MaskedUpload:
    """What of an upload is stored along with the message that ends it."""

    upload_id: str
    size: int
    key: requests.RequestKey
    response: device_pb2.CommitUploadResponse


def _end(outcome: str, message: str = "") -> secagg_pb2.SecureEnd:
    return secagg_pb2.SecureEnd(outcome=f"SECURE_OUTCOME_{outcome}", message=message)


def _read(tx: Transaction, round_id: int) -> Row[tuple[object, ...]]:
    """A round's row with its bundle."""
    return tx.execute(
        select(tables.rounds, tables.bundles.c.payload.label("bundle"))
        .join(tables.tasks, tables.tasks.c.task_id == tables.rounds.c.task_id)
        .join(tables.bundles, tables.bundles.c.sha256 == tables.tasks.c.bundle_sha256)
        .where(tables.rounds.c.round_id == round_id)
    ).one()
