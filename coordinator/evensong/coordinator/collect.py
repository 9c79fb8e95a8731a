"""Step 5 of a round: an update comes in by chunks, is checked, made durable and journalled, and counts exactly once."""

from __future__ import annotations

import hmac
import math
from dataclasses import dataclass

from sqlalchemy import Row, bindparam, delete, func, insert, select, update

from evensong.coordinator import events, requests, rounds, tables
from evensong.coordinator.admit import Call, Pacing
from evensong.coordinator.assign import Holder, check_lease
from evensong.coordinator.commit import commit_evaluation
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.coordinator.errors import RefusalError
from evensong.coordinator.rounds import LeaseState, Trigger
from evensong.coordinator.secure import SecureRounds
from evensong.coordinator.spool import Admitted, SpooledUpload
from evensong.coordinator.sums import Sums
from evensong.v1 import common_pb2, device_pb2, operator_pb2, task_pb2
from evensong.wire.chunks import ALREADY_THERE, check_chunk
from evensong.wire.errors import CorruptError, WireError

#: Above any count of examples on one device; keeps sums inside 64 bits.
MAX_EXAMPLES = 1 << 40


# -------------------------------------------------------------------------------------------------------------- begin


def begin_upload(
    context: Context, pacing: Pacing, call: Call, request: device_pb2.BeginUploadRequest
) -> device_pb2.BeginUploadResponse:
    """Opens the upload of this lease's update, or finds it again: either way the answer tells how much has arrived."""
    key = call.key(request.request_id)
    claimed = request.update
    with context.database.transaction() as tx:
        stored = requests.recall(tx, key)
        holder = _check_uploader(context, tx, call, request.lease)
        _check_announcement(holder, claimed)
        sha256 = claimed.sha256.hex()
        row = tx.execute(
            select(tables.uploads).where(
                tables.uploads.c.lease_id == holder.lease.lease_id, tables.uploads.c.sha256 == sha256
            )
        ).one_or_none()
        size = claimed.size_bytes if row is None else row.size_bytes
        upload_id = row.upload_id if row is not None else _open_upload(context, tx, call, holder, sha256, size)
        if stored is None:
            requests.remember(tx, key, device_pb2.BeginUploadResponse(upload_id=upload_id), context.now())
        context.fault("begin.before_commit")
    context.fault("begin.after_commit")
    context.spool.admit(upload_id, _admitted(holder, sha256, size))
    return device_pb2.BeginUploadResponse(
        retry=pacing.soon(),
        upload_id=upload_id,
        received_bytes=context.spool.upload(upload_id).received,
        chunk_bytes=context.settings.chunk_bytes,
    )


def _check_uploader(context: Context, tx: Transaction, call: Call, lease: common_pb2.Lease) -> Holder:
    """Updates come from training, and masked vectors from evaluation too."""
    holder = check_lease(context, tx, call.device.device_id, lease)
    if holder.round.work != device_pb2.WORK_TRAIN and holder.plan.secure is None:
        raise RefusalError(common_pb2.REFUSAL_REASON_INVALID_REQUEST, "the lease is for other work")
    return holder


def _check_announcement(holder: Holder, announced: common_pb2.BlobRef) -> None:
    if len(announced.sha256) != 32:
        raise RefusalError(
            common_pb2.REFUSAL_REASON_INVALID_REQUEST,
            "update.sha256 is malformed",
            expected="32 bytes",
            got=f"{len(announced.sha256)} bytes",
        )
    most, is_fixed = holder.plan.upload_bytes(holder.round.work), holder.plan.has_fixed_uploads
    if not (announced.size_bytes == most or (not is_fixed and 0 < announced.size_bytes < most)):
        raise RefusalError(
            common_pb2.REFUSAL_REASON_INVALID_UPDATE,
            "the update has the wrong length for its task",
            expected=f"{'' if is_fixed else 'at most '}{most} bytes",
            got=announced.size_bytes,
            fix="Encode it with the bundle's layout and codec.",
        )


def _open_upload(context: Context, tx: Transaction, call: Call, holder: Holder, sha256: str, size: int) -> str:
    """A new upload. Those that the device left under older leases are dropped first."""
    mine = tx.execute(
        select(
            tables.uploads.c.upload_id,
            tables.uploads.c.lease_id,
            func.coalesce(tables.journal.c.entry, tables.secure_messages.c.entry).label("accepted"),
        )
        .outerjoin(tables.journal, tables.journal.c.upload_id == tables.uploads.c.upload_id)
        .outerjoin(tables.secure_messages, tables.secure_messages.c.upload_id == tables.uploads.c.upload_id)
        .where(tables.uploads.c.device_id == call.device.device_id)
    ).all()
    unfinished = [row for row in mine if row.accepted is None]
    stale = [row.upload_id for row in unfinished if row.lease_id != holder.lease.lease_id]
    if stale:
        tx.execute(delete(tables.uploads).where(tables.uploads.c.upload_id.in_(stale)))
        tx.after_commit(lambda: context.spool.discard(stale))
    if len(unfinished) - len(stale) >= context.settings.open_uploads_per_device:
        raise RefusalError(
            common_pb2.REFUSAL_REASON_QUOTA,
            "the device has too many open uploads",
            expected=f"at most {context.settings.open_uploads_per_device}",
            fix="Finish one, or give the lease back.",
        )
    upload_id = context.new_id()
    tx.execute(
        insert(tables.uploads).values(
            upload_id=upload_id,
            lease_id=holder.lease.lease_id,
            round_id=holder.round.round_id,
            device_id=call.device.device_id,
            sha256=sha256,
            size_bytes=size,
        )
    )
    return upload_id


def _admitted(holder: Holder, sha256: str, size: int) -> Admitted:
    lease = holder.lease
    return Admitted(
        lease.device_id,
        holder.round.round_id,
        lease.lease_id,
        lease.fencing_token,
        min(lease.expires_ms, holder.round.deadline_ms or lease.expires_ms),
        sha256,
        size,
        holder.plan,
    )


# -------------------------------------------------------------------------------------------------------------- chunk


def upload_chunk(
    context: Context, pacing: Pacing, call: Call, request: device_pb2.UploadChunkRequest
) -> device_pb2.UploadChunkResponse:
    """Appends one chunk. One that came before is acknowledged again; one that leaves a gap is refused."""
    admitted = _find_upload(context, call, request.upload_id, request.lease)
    file = context.spool.upload(request.upload_id)
    with file.lock:
        try:
            data = check_chunk(request.chunk, file.received, admitted.size_bytes, context.settings.chunk_bytes)
        except CorruptError as error:
            raise RefusalError(common_pb2.REFUSAL_REASON_BAD_CHUNK, str(error), received_bytes=file.received) from None
        if data != ALREADY_THERE:
            context.fault("chunk.before_write")
            file.append(data)
            context.fault("chunk.after_write")
            context.telemetry.bytes_in.inc(len(data))
        return device_pb2.UploadChunkResponse(retry=pacing.soon(), received_bytes=file.received)


def _find_upload(context: Context, call: Call, upload_id: str, lease: common_pb2.Lease) -> Admitted:
    """The upload, if the device still holds its lease: from memory, or from the database after a restart or a
    change."""
    admitted = context.spool.admitted(upload_id)
    if (
        admitted is not None
        and admitted.device_id == call.device.device_id
        and (admitted.lease_id, admitted.fencing_token) == (lease.lease_id, lease.fencing_token)
        and context.now() < admitted.expires_ms
    ):
        return admitted
    with context.database.read() as tx:
        holder = _check_uploader(context, tx, call, lease)
        upload = _read_upload(tx, upload_id, holder)
        admitted = _admitted(holder, upload.sha256, upload.size_bytes)
    context.spool.admit(upload_id, admitted)
    return admitted


def _read_upload(tx: Transaction, upload_id: str, holder: Holder) -> Row[tuple[object, ...]]:
    row = tx.execute(
        select(tables.uploads).where(
            tables.uploads.c.upload_id == upload_id, tables.uploads.c.lease_id == holder.lease.lease_id
        )
    ).one_or_none()
    if row is None:
        raise RefusalError(
            common_pb2.REFUSAL_REASON_NOT_FOUND, "there is no such upload", got=upload_id[:40], fix="Begin it again."
        )
    return row


# ------------------------------------------------------------------------------------------------------------- commit


def commit_upload(
    context: Context,
    pacing: Pacing,
    sums: Sums,
    secure: SecureRounds,
    call: Call,
    request: device_pb2.CommitUploadRequest,
) -> device_pb2.CommitUploadResponse:
    """Ends an upload: the update is checked, durable and journalled before the answer leaves.

    The file is fsynced first and the journal row committed second, so that a journalled update is always there to be
    counted. The running sum in memory is only a cache of the journal.
    """
    key = call.key(request.request_id)
    response = device_pb2.CommitUploadResponse(retry=pacing.soon())
    if context.spool.admitted(request.upload_id) is None:
        with context.database.read() as tx:
            if requests.recall(tx, key) is not None:
                return response
    admitted = _find_upload(context, call, request.upload_id, request.lease)
    masked = admitted.plan.secure is not None
    if not masked:
        check_weight(admitted.plan.bundle.update, request.weight)
        check_metrics(request.metrics)
    file = context.spool.upload(request.upload_id)
    with file.lock:
        _check_complete(file, admitted)
        context.fault("collect.before_fsync")
        if context.settings.durable:
            file.make_durable()
        context.fault("collect.after_fsync")
        if masked:
            response = secure.accept_masked(call, request, admitted.sha256, file.received)
            context.spool.forget(request.upload_id)
            return response
        try:
            with sums.adding(admitted.round_id, admitted.plan, file, request.weight) as running:
                entry = running.entry
                with context.database.transaction() as tx:
                    if requests.recall(tx, key) is None:
                        holder = check_lease(context, tx, call.device.device_id, request.lease, device_pb2.WORK_TRAIN)
                        upload = Accepted(
                            request.upload_id,
                            admitted.sha256,
                            file.received,
                            request.weight,
                            request.within_clip_norm,
                        )
                        entry = _accept(context, tx, holder, request.metrics, upload)
                        requests.remember(tx, key, response, context.now())
                    context.fault("collect.before_commit")
                running.entry = entry
        except WireError as error:
            raise RefusalError(common_pb2.REFUSAL_REASON_INVALID_UPDATE, str(error)) from None
        context.fault("collect.after_commit")
    context.spool.forget(request.upload_id)
    return response


def check_weight(plan: task_pb2.UpdatePlan, weight: float) -> None:
    """An update weighs what its task allows, and never nothing, less, or no number."""
    uniform = plan.weighting == task_pb2.WEIGHTING_UNIFORM
    if math.isfinite(weight) and (weight == 1.0 if uniform else 0.0 < weight <= plan.max_weight):
        return
    raise RefusalError(
        common_pb2.REFUSAL_REASON_INVALID_UPDATE,
        "the weight is out of bounds",
        expected="1" if uniform else f"above 0, at most {plan.max_weight:g}",
        got=weight,
    )


def check_metrics(metrics: common_pb2.Metrics) -> None:
    """Sums that can be sums over examples."""
    if not 0 < metrics.examples <= MAX_EXAMPLES or metrics.correct > metrics.examples:
        raise RefusalError(
            common_pb2.REFUSAL_REASON_INVALID_UPDATE,
            "the counts of the metrics are out of bounds",
            expected=f"0 < examples <= {MAX_EXAMPLES}, correct <= examples",
            got=f"examples {metrics.examples}, correct {metrics.correct}",
        )
    if not math.isfinite(metrics.loss_sum):
        raise RefusalError(
            common_pb2.REFUSAL_REASON_INVALID_UPDATE,
            "the loss is not finite",
            got=metrics.loss_sum,
            fix="Abort with ABORT_REASON_DIVERGED when training diverges.",
        )


def _check_complete(file: SpooledUpload, admitted: Admitted) -> None:
    if file.received != admitted.size_bytes:
        raise RefusalError(
            common_pb2.REFUSAL_REASON_BAD_CHUNK,
            "the upload is not complete",
            expected=f"{admitted.size_bytes} bytes",
            got=file.received,
            fix="Begin it again to learn where to go on.",
        )
    if hmac.compare_digest(file.sha256(), admitted.sha256):
        return
    if file.resumed:
        file.restart()
        raise RefusalError(
            common_pb2.REFUSAL_REASON_BAD_CHUNK,
            "the coordinator lost a part of the upload when it restarted",
            fix="Begin it again and send it from the start.",
        )
    raise RefusalError(
        common_pb2.REFUSAL_REASON_INVALID_UPDATE,
        "the update is not the one that was announced",
        expected=f"SHA-256 {admitted.sha256}",
        got=file.sha256(),
    )


# ---------------------------------------------------------------------------------------- reports and given-back work


def report(
    context: Context, pacing: Pacing, call: Call, request: device_pb2.ReportRequest
) -> device_pb2.ReportResponse:
    """Counts the metrics of one device's evaluation."""
    key = call.key(request.request_id)
    response = device_pb2.ReportResponse(retry=pacing.soon())
    with context.database.transaction() as tx:
        if requests.recall(tx, key) is not None:
            return response
        holder = check_lease(context, tx, call.device.device_id, request.lease, device_pb2.WORK_EVALUATE)
        if holder.plan.secure is not None:
            raise RefusalError(
                common_pb2.REFUSAL_REASON_INVALID_REQUEST,
                "metrics of this task are summed securely",
                fix="Send them in a masked vector.",
            )
        check_metrics(request.metrics)
        _accept(context, tx, holder, request.metrics)
        requests.remember(tx, key, response, context.now())
        context.fault("evaluate.before_commit")
    context.fault("evaluate.after_commit")
    return response


def abort(context: Context, pacing: Pacing, call: Call, request: device_pb2.AbortRequest) -> device_pb2.AbortResponse:
    """Frees the device's place. A device whose conditions changed is asked again in the same round, another is not."""
    key = call.key(request.request_id)
    again = request.reason == device_pb2.ABORT_REASON_CONDITIONS
    response = device_pb2.AbortResponse(retry=pacing.idle() if again else pacing.soon())
    with context.database.transaction() as tx:
        if requests.recall(tx, key) is not None:
            return response
        holder = check_lease(context, tx, call.device.device_id, request.lease)
        tx.execute(
            update(tables.leases)
            .where(tables.leases.c.lease_id == holder.lease.lease_id)
            .values(state=LeaseState.ABORTED if again else LeaseState.DECLINED)
        )
        requests.remember(tx, key, response, context.now())
        tx.after_commit(context.work.beat)
        tx.after_commit(context.due.beat)  # a cohort may wait for nobody else
        tx.after_commit(lambda: context.spool.dismiss(device_id=call.device.device_id))
    context.log.info(
        "lease given back",
        device=call.device.device_id,
        round=holder.round.number,
        reason=device_pb2.AbortReason.Name(request.reason) if request.reason in _ABORT_REASONS else request.reason,
    )
    return response


_ABORT_REASONS = frozenset(device_pb2.AbortReason.values())


_JOURNAL = insert(tables.journal).returning(tables.journal.c.entry)
_LEASE_REPORTED = (
    update(tables.leases).where(tables.leases.c.lease_id == bindparam("lease")).values(state=LeaseState.REPORTED)
)
_COUNT_REPORT = (
    update(tables.rounds)
    .where(tables.rounds.c.round_id == bindparam("round"))
    .values(reports=tables.rounds.c.reports + 1, bytes_up=tables.rounds.c.bytes_up + bindparam("size"))
    .returning(tables.rounds.c.reports)
)
_COUNT_FOR_DEVICE = (
    update(tables.devices)
    .where(tables.devices.c.device_id == bindparam("device"))
    .values(accepted_reports=tables.devices.c.accepted_reports + 1, last_seen_ms=bindparam("now"))
)


@dataclass(frozen=True)
class Accepted:
    """The update of a report."""

    upload_id: str
    sha256: str
    size_bytes: int
    weight: float
    within_clip_norm: bool = False


def _accept(
    context: Context,
    tx: Transaction,
    holder: Holder,
    metrics: common_pb2.Metrics,
    upload: Accepted | None = None,
) -> int:
    """The one place where a report comes to count: journal, lease, round and device change together.

    Returns the number of the journal's entry.
    """
    round, device_id, now = holder.round, holder.lease.device_id, context.now()
    sent = upload or Accepted("", "", 0, 0.0)
    row = {
        "round_id": round.round_id,
        "device_id": device_id,
        "upload_id": sent.upload_id or None,
        "update_sha256": sent.sha256,
        "weight": sent.weight,
        "examples": metrics.examples,
        "loss_sum": metrics.loss_sum,
        "correct": metrics.correct,
        "accepted_ms": now,
        "within_clip_norm": sent.within_clip_norm,
    }
    entry: int = tx.execute(_JOURNAL, row).scalar_one()
    tx.execute(_LEASE_REPORTED, {"lease": holder.lease.lease_id})
    reports = tx.execute(_COUNT_REPORT, {"round": round.round_id, "size": sent.size_bytes}).scalar_one()
    tx.execute(_COUNT_FOR_DEVICE, {"device": device_id, "now": now})
    if upload is not None:
        events.append(
            context,
            tx,
            round.task_id,
            operator_pb2.EVENT_KIND_REPORT_ACCEPTED,
            round=round.number,
            version=round.version,
            reports=reports,
            metrics=metrics,
            bytes_up=upload.size_bytes,
        )
    work = "evaluate" if upload is None else "train"
    tx.after_commit(lambda: context.telemetry.accepted.labels(work).inc())
    if reports >= round.goal and upload is not None:
        rounds.move(context, tx, round, Trigger.GOAL)
    elif reports >= round.goal:
        commit_evaluation(context, tx, round.round_id, Trigger.GOAL)
    return entry
