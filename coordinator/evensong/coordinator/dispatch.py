"""The device service without its transport: authenticates, decodes, handles, encodes.

gRPC and the simulator call the very same object with the very same bytes. It never raises on bad input: every
answer carries a retry window, and a refusal says why nothing changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from sqlalchemy import or_, select

from evensong.coordinator import admit, collect, tables
from evensong.coordinator.admit import Call, Pacing, Registry
from evensong.coordinator.assign import NoWork, assign, serving
from evensong.coordinator.context import Context
from evensong.coordinator.errors import RefusalError, StorageError
from evensong.coordinator.pulse import Pulse
from evensong.coordinator.secure import SECURE, SecureRounds
from evensong.coordinator.sums import Sums
from evensong.coordinator.traffic import Traffic
from evensong.v1 import common_pb2, device_pb2, secagg_pb2
from evensong.wire.chunks import crc32c
from evensong.wire.transport import DEVICE_SERVICE, Metadata

CHECK_IN = DEVICE_SERVICE + "CheckIn"
ENROL = DEVICE_SERVICE + "Enrol"
DOWNLOAD = DEVICE_SERVICE + "Download"


BEGIN_UPLOAD = DEVICE_SERVICE + "BeginUpload"
UPLOAD_CHUNK = DEVICE_SERVICE + "UploadChunk"
COMMIT_UPLOAD = DEVICE_SERVICE + "CommitUpload"
REPORT = DEVICE_SERVICE + "Report"
ABORT = DEVICE_SERVICE + "Abort"

T = TypeVar("T")


@dataclass(frozen=True)
class Waiting:
    """A check-in without work."""

    call: Call
    request: device_pb2.CheckInRequest
    hold_ms: int
    found: NoWork
    was_held: bool = False


@dataclass(frozen=True)
class Pending:
    """A step of a secure round whose stage is still open."""

    call: Call
    request: secagg_pb2.SecureRequest
    hold_ms: int
    response: secagg_pb2.SecureResponse


@dataclass(frozen=True)
class BlobRange:
    """What a device may download."""

    device_id: str
    sha256: str
    size: int
    offset: int


class DeviceDispatcher:
    """Implements :class:`evensong.wire.transport.Dispatcher`."""

    def __init__(
        self,
        context: Context,
        registry: Registry,
        pacing: Pacing,
        sums: Sums,
        secure: SecureRounds,
        traffic: Traffic,
    ) -> None:
        self._context = context
        self._registry = registry
        self._traffic = traffic
        self._pacing = pacing
        self._secure = secure
        self._held = 0
        self._handlers: dict[str, Callable[[Call, Any], Message]] = {
            BEGIN_UPLOAD: partial(collect.begin_upload, context, pacing),
            UPLOAD_CHUNK: partial(collect.upload_chunk, context, pacing),
            COMMIT_UPLOAD: partial(collect.commit_upload, context, pacing, sums, secure),
            REPORT: partial(collect.report, context, pacing),
            ABORT: partial(collect.abort, context, pacing),
        }

    # ----------------------------------------------------------------------------------------------------- one answer

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        """One request, one response. A check-in may be held until there is work, a step of a secure round until its
        stage is over."""
        if method == CHECK_IN:
            return await self._check_in(body, metadata)
        if method == SECURE:
            return await self._secure_step(body, metadata)
        return await self._context.run_blocking(self._answer, method, body, metadata)

    def _answer(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        return _encode(self._guarded(method, lambda: self._handle(method, body, metadata)))

    def _handle(self, method: str, body: bytes, metadata: Metadata) -> Message:
        if method == ENROL:
            self._check_size(body)
            enrolled = admit.enrol(self._context, self._decode(method, body), body, metadata)
            self._registry.forget(enrolled.device_id)
            enrolled.retry.CopyFrom(self._pacing.soon())
            return enrolled
        if method not in self._handlers:
            raise RefusalError(common_pb2.REFUSAL_REASON_INVALID_REQUEST, "this method answers with a stream")
        call, request = self._admit(method, body, metadata)
        with self._noted(call):
            return self._handlers[method](call, request)

    def _admit(self, method: str, body: bytes, metadata: Metadata) -> tuple[Call, Any]:
        """Who calls, and what. Nothing is parsed before its signature holds."""
        self._check_size(body)
        device = self._registry.authenticate(self._context, method, body, metadata)
        return Call(device, method, body), self._decode(method, body)

    def _guarded(self, method: str, handle: Callable[[], T]) -> T | Message:
        """What ``handle`` returns, or the refusal that its error stands for."""
        telemetry = self._context.telemetry
        name = method.rpartition("/")[2] if method in _METHODS else "unknown"
        started = time.perf_counter()
        try:
            if method not in _METHODS:
                raise RefusalError(common_pb2.REFUSAL_REASON_INVALID_REQUEST, "there is no such method")
            return handle()
        except RefusalError as refused:
            error = refused
        except StorageError as storage:
            self._context.log.error("the storage failed", method=name, error=str(storage))
            error = RefusalError(
                common_pb2.REFUSAL_REASON_UNAVAILABLE,
                "the coordinator cannot store or read now",
                fix="Try again later.",
            )
        except Exception:
            self._context.log.exception("a call failed", method=name)
            error = RefusalError(
                common_pb2.REFUSAL_REASON_UNAVAILABLE, "the coordinator failed inside", fix="Try again later."
            )
        finally:
            telemetry.observe_call(name, time.perf_counter() - started)
        reason = common_pb2.RefusalReason.Name(error.reason).removeprefix("REFUSAL_REASON_")
        telemetry.refusals.labels(name, reason).inc()
        self._context.log.debug("refused", method=name, reason=reason, message=str(error))
        return self._refusal(method, error)

    def _refusal(self, method: str, refused: RefusalError) -> Message:
        # A method that nobody knows has no answer of its own; all answers share the two fields that this one has.
        response_type: type[Any] = _METHODS[method][1] if method in _METHODS else device_pb2.AbortResponse
        response: Any = response_type(
            refusal=common_pb2.Refusal(reason=refused.reason, message=str(refused)), retry=self._pacing.after(refused)
        )
        if refused.received_bytes is not None:
            response.received_bytes = refused.received_bytes
        message: Message = response
        return message

    @contextmanager
    def _noted(self, call: Call) -> Iterator[None]:
        """The last refusal of a device is kept for operators, once it is certain that the device was the caller."""
        try:
            yield
        except RefusalError as refused:
            self._registry.note_refusal(call.device.device_id, refused.reason, str(refused))
            raise

    def _check_size(self, body: bytes) -> None:
        if len(body) > self._context.settings.max_message_bytes:
            raise RefusalError(
                common_pb2.REFUSAL_REASON_INVALID_REQUEST,
                "the message is too large",
                expected=f"at most {self._context.settings.max_message_bytes} bytes",
                got=len(body),
            )

    def _decode(self, method: str, body: bytes) -> Any:
        try:
            return _METHODS[method][0].FromString(body)
        except DecodeError:
            raise RefusalError(
                common_pb2.REFUSAL_REASON_INVALID_REQUEST, f"the body is not a {_METHODS[method][0].DESCRIPTOR.name}"
            ) from None

    # ------------------------------------------------------------------------------------------------------- check-in

    async def _check_in(self, body: bytes, metadata: Metadata) -> bytes:
        """Looks for work; without any, waits until a place is free, the device's patience ends, or the daemon
        drains."""
        context = self._context
        changed = context.work.next()
        answer = await context.run_blocking(
            self._guarded, CHECK_IN, lambda: self._look(*self._admit(CHECK_IN, body, metadata))
        )
        if isinstance(answer, Waiting) and self._held < context.settings.held_check_ins:
            look = partial(self._guarded, CHECK_IN, partial(self._look, answer.call, answer.request))
            held = await self._hold(answer, answer.hold_ms, context.work, changed, look)
            answer = replace(held, was_held=answer.hold_ms > 0) if isinstance(held, Waiting) else held
        return await context.run_blocking(self._finish_check_in, answer)

    async def _hold(
        self, answer: T, hold_ms: int, pulse: Pulse, changed: asyncio.Future[None], look: Callable[[], T | Message]
    ) -> T | Message:
        """What a call comes to that has no answer yet: it looks again at each beat, until it finds one, its patience
        ends, or the daemon drains. ``changed`` was taken before the first look, so that no news is lost."""
        context, kind = self._context, type(answer)
        found: T | Message = answer
        patience = asyncio.ensure_future(context.clock.sleep(hold_ms / 1000))
        self._held += 1
        context.telemetry.held.set(self._held)
        try:
            while hold_ms and isinstance(found, kind) and not patience.done() and not context.draining:
                await asyncio.wait([changed, patience], return_when=asyncio.FIRST_COMPLETED)
                changed = pulse.next()
                found = await context.run_blocking(look)
        finally:
            patience.cancel()
            self._held -= 1
            context.telemetry.held.set(self._held)
        return found

    def _look(self, call: Call, request: device_pb2.CheckInRequest) -> device_pb2.CheckInResponse | Waiting:
        """An assignment, or why there is none."""
        context = self._context
        with self._noted(call):
            if context.draining:
                raise RefusalError(common_pb2.REFUSAL_REASON_UNAVAILABLE, "the coordinator is about to stop")
            if request.population not in ("", call.device.population):
                raise RefusalError(
                    common_pb2.REFUSAL_REASON_INVALID_REQUEST,
                    "the device is enrolled in another population",
                    expected=call.device.population,
                    got=request.population[:200],
                )
            admit.check_runtime(context, request)
            found = assign(context, self._pacing, call, request)
        if isinstance(found, NoWork):
            hold_ms = min(request.wait_ms, context.settings.max_hold_ms) if found.fits else 0
            return Waiting(call, request, hold_ms, found)
        if found.round_id is not None:
            self._traffic.assigned(call.device.device_id, found.round_id)
        found.response.serving.extend(serving(context, call.device.population))
        found.response.certificate = self._new_certificate(call, request)
        return found.response

    def _finish_check_in(self, answer: Message | Waiting) -> bytes:
        if isinstance(answer, Waiting):
            answer = self._guarded(CHECK_IN, partial(self._no_work, answer))
        assert isinstance(answer, device_pb2.CheckInResponse)
        kind = "refused" if answer.HasField("refusal") else "work" if answer.HasField("assignment") else "none"
        self._context.telemetry.check_ins.labels(kind).inc()
        return _encode(answer)

    def _no_work(self, waited: Waiting) -> device_pb2.CheckInResponse:
        context, found = self._context, waited.found
        response = device_pb2.CheckInResponse(
            serving=serving(context, waited.call.device.population),
            certificate=self._new_certificate(waited.call, waited.request),
        )
        if not found.fits:
            refused = RefusalError(
                common_pb2.REFUSAL_REASON_INELIGIBLE, "the device fits no task", got="; ".join(found.reasons)
            )
            response.refusal.reason, response.refusal.message = refused.reason, str(refused)
            self._registry.note_refusal(waited.call.device.device_id, refused.reason, str(refused))
            response.retry.CopyFrom(self._pacing.after(refused))
        else:
            # Who was held comes back at once to be held again.
            response.retry.CopyFrom(self._pacing.soon() if waited.was_held else self._pacing.idle())
        return response

    def _new_certificate(self, call: Call, request: device_pb2.CheckInRequest) -> bytes:
        return admit.renewed_certificate(self._context, call.device, request.certificate_expires_unix_ms)

    # --------------------------------------------------------------------------------------------------- secure rounds

    async def _secure_step(self, body: bytes, metadata: Metadata) -> bytes:
        """Takes the step, and looks again whenever a stage closes, until there is an answer or no patience left."""
        context = self._context
        changed = context.secure.next()
        answer = await context.run_blocking(
            self._guarded, SECURE, lambda: self._step(*self._admit(SECURE, body, metadata))
        )
        if isinstance(answer, Pending):
            look = partial(self._guarded, SECURE, partial(self._step, answer.call, answer.request))
            answer = await self._hold(answer, answer.hold_ms, context.secure, changed, look)
        return _encode(answer.response if isinstance(answer, Pending) else answer)

    def _step(self, call: Call, request: secagg_pb2.SecureRequest) -> secagg_pb2.SecureResponse | Pending:
        with self._noted(call):
            response = self._secure.step(call, request)
        if response.WhichOneof("next") is not None:
            return response
        return Pending(call, request, min(request.wait_ms, self._context.settings.max_hold_ms), response)

    # ------------------------------------------------------------------------------------------------------- download

    async def stream(self, method: str, body: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        """A blob of the device's population by chunks, the last one short; a refusal is one answer, and the last."""
        context, size = self._context, self._context.settings.chunk_bytes
        start = await context.run_blocking(self._guarded, method, lambda: self._find_blob(method, body, metadata))
        if not isinstance(start, BlobRange):
            yield _encode(start)
            return
        offset = start.offset
        while True:
            answer = await context.run_blocking(self._guarded, method, partial(self._read_blob, start, offset, size))
            yield _encode(answer)
            offset += size
            if answer.HasField("refusal") or offset >= start.size:
                return

    def _find_blob(self, method: str, body: bytes, metadata: Metadata) -> BlobRange:
        if method != DOWNLOAD:
            raise RefusalError(common_pb2.REFUSAL_REASON_INVALID_REQUEST, "this method does not stream")
        call, request = self._admit(method, body, metadata)
        with self._noted(call):
            sha256 = request.sha256.hex()
            size = self._context.blobs.size(sha256) if self._may_read(call.device.population, sha256) else None
            if size is None:
                raise RefusalError(common_pb2.REFUSAL_REASON_NOT_FOUND, "there is no such blob", got=sha256[:64])
            if request.offset > size:
                raise RefusalError(
                    common_pb2.REFUSAL_REASON_INVALID_REQUEST,
                    "the offset lies behind the blob",
                    expected=f"at most {size}",
                    got=request.offset,
                )
            return BlobRange(call.device.device_id, sha256, size, request.offset)

    def _may_read(self, population: str, sha256: str) -> bool:
        """Devices read the artifacts and versions of their own population's tasks, and nothing else."""
        with self._context.database.read() as tx:
            return (
                tx.execute(
                    select(tables.tasks.c.task_id)
                    .join(tables.versions, tables.versions.c.task_id == tables.tasks.c.task_id)
                    .where(
                        tables.tasks.c.population == population,
                        or_(
                            tables.tasks.c.artifact_sha256 == sha256,
                            tables.versions.c.parameters_sha256 == sha256,
                            tables.versions.c.delta_sha256 == sha256,
                        ),
                    )
                    .limit(1)
                ).first()
                is not None
            )

    def _read_blob(self, blob: BlobRange, offset: int, size: int) -> device_pb2.DownloadResponse:
        data = self._context.blobs.read(blob.sha256, offset, min(size, blob.size - offset))
        self._traffic.add(blob.device_id, len(data))
        self._context.telemetry.bytes_out.inc(len(data))
        return device_pb2.DownloadResponse(
            retry=self._pacing.soon(),
            total_bytes=blob.size,
            chunk=common_pb2.BlobChunk(offset=offset, data=data, crc32c=crc32c(data)),
        )


def _encode(message: Message) -> bytes:
    return message.SerializeToString()


_METHODS: dict[str, tuple[type[Any], type[Any]]] = {
    ENROL: (device_pb2.EnrolRequest, device_pb2.EnrolResponse),
    CHECK_IN: (device_pb2.CheckInRequest, device_pb2.CheckInResponse),
    DOWNLOAD: (device_pb2.DownloadRequest, device_pb2.DownloadResponse),
    BEGIN_UPLOAD: (device_pb2.BeginUploadRequest, device_pb2.BeginUploadResponse),
    UPLOAD_CHUNK: (device_pb2.UploadChunkRequest, device_pb2.UploadChunkResponse),
    COMMIT_UPLOAD: (device_pb2.CommitUploadRequest, device_pb2.CommitUploadResponse),
    SECURE: (secagg_pb2.SecureRequest, secagg_pb2.SecureResponse),
    REPORT: (device_pb2.ReportRequest, device_pb2.ReportResponse),
    ABORT: (device_pb2.AbortRequest, device_pb2.AbortResponse),
}
