"""OperatorService on gRPC: the bearer token, the streams, and errors as status codes."""

# ruff: noqa: N802 (gRPC's names)

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio

from evensong.coordinator.context import Context
from evensong.coordinator.errors import OperatorError, RefusalError, StorageError
from evensong.coordinator.operators import Operators
from evensong.v1 import common_pb2, operator_pb2, operator_pb2_grpc
from evensong.wire.chunks import ALREADY_THERE, check_chunk, crc32c
from evensong.wire.errors import EvensongError

#: The largest that a database holds.
MAX_SEQUENCE = 2**63 - 1

Response = TypeVar("Response")
ServicerContext = grpc.aio.ServicerContext[Any, Any]


class OperatorService(operator_pb2_grpc.OperatorServiceServicer):
    """Refusals come as gRPC status: the code says what kind, the message what was expected, what came, what to do."""

    def __init__(self, context: Context, operators: Operators, token: str) -> None:
        self._context = context
        self._operators = operators
        self._token_hash = _digest(f"Bearer {token}")

    # ---------------------------------------------------------------------------------------------------- unary calls

    async def SubmitTask(self, request: Any, call: ServicerContext) -> operator_pb2.SubmitTaskResponse:
        return await self._run(call, self._operators.submit_task, request)

    async def ListTasks(self, request: Any, call: ServicerContext) -> operator_pb2.ListTasksResponse:
        return await self._run(call, self._operators.list_tasks, request)

    async def GetTask(self, request: Any, call: ServicerContext) -> operator_pb2.GetTaskResponse:
        return await self._run(call, self._operators.get_task, request)

    async def StopTask(self, request: Any, call: ServicerContext) -> operator_pb2.StopTaskResponse:
        return await self._run(call, self._operators.stop_task, request)

    async def ListVersions(self, request: Any, call: ServicerContext) -> operator_pb2.ListVersionsResponse:
        return await self._run(call, self._operators.list_versions, request)

    async def PromoteVersion(self, request: Any, call: ServicerContext) -> operator_pb2.PromoteVersionResponse:
        return await self._run(call, self._operators.promote_version, request)

    async def CreateEnrolmentToken(
        self, request: Any, call: ServicerContext
    ) -> operator_pb2.CreateEnrolmentTokenResponse:
        return await self._run(call, self._operators.create_enrolment_token, request)

    async def ListDevices(self, request: Any, call: ServicerContext) -> operator_pb2.ListDevicesResponse:
        return await self._run(call, self._operators.list_devices, request)

    async def ReadPrivacyLedger(self, request: Any, call: ServicerContext) -> operator_pb2.ReadPrivacyLedgerResponse:
        return await self._run(call, self._operators.read_privacy_ledger, request)

    async def RevokeDevice(self, request: Any, call: ServicerContext) -> operator_pb2.RevokeDeviceResponse:
        return await self._run(call, self._operators.revoke_device, request)

    # -------------------------------------------------------------------------------------------------------- streams

    async def UploadBlob(
        self, requests: AsyncIterator[operator_pb2.UploadBlobRequest], call: ServicerContext
    ) -> operator_pb2.UploadBlobResponse:
        """A blob by chunks in order; it is visible once the last one is durable."""
        run, settings = self._context.run_blocking, self._context.settings
        async with self._statuses(call):
            with await run(self._context.blobs.writer) as writer:
                async for request in requests:
                    data = check_chunk(request.chunk, writer.size, settings.max_blob_bytes, settings.chunk_bytes)
                    if data != ALREADY_THERE:
                        await run(writer.write, data)
                sha256 = await run(writer.finish)
                blob = common_pb2.BlobRef(sha256=bytes.fromhex(sha256), size_bytes=writer.size)
        return operator_pb2.UploadBlobResponse(blob=blob)

    async def DownloadBlob(
        self, request: operator_pb2.DownloadBlobRequest, call: ServicerContext
    ) -> AsyncIterator[operator_pb2.DownloadBlobResponse]:
        run, blobs, part = self._context.run_blocking, self._context.blobs, self._context.settings.chunk_bytes
        async with self._statuses(call):
            sha256 = request.sha256.hex()
            total = await run(blobs.size, sha256) if len(request.sha256) == 32 else None
            if total is None:
                raise OperatorError("NOT_FOUND", "there is no such blob", got=sha256[:64])
            if request.offset > total:
                raise OperatorError(
                    "OUT_OF_RANGE", "the offset lies behind the blob", expected=f"at most {total}", got=request.offset
                )
            offset = request.offset
            while True:
                data = await run(blobs.read, sha256, offset, min(part, total - offset))
                yield operator_pb2.DownloadBlobResponse(
                    total_bytes=total, chunk=common_pb2.BlobChunk(offset=offset, data=data, crc32c=crc32c(data))
                )
                offset += part
                if offset >= total:
                    return

    async def WatchTask(
        self, request: operator_pb2.WatchTaskRequest, call: ServicerContext
    ) -> AsyncIterator[operator_pb2.WatchTaskResponse]:
        """Past events, then live ones, until the task ends or the daemon drains."""
        context, sequence = self._context, min(request.after_sequence, MAX_SEQUENCE)
        async with self._statuses(call):
            while True:
                changed = context.news.next()
                found, ended = await context.run_blocking(self._operators.read_events, request.task_id, sequence)
                for event in found:
                    sequence = event.sequence
                    yield operator_pb2.WatchTaskResponse(event=event)
                if ended:
                    return
                if context.draining:
                    raise OperatorError("UNAVAILABLE", "the coordinator is about to stop", fix="Watch again later.")
                if not found:
                    await asyncio.shield(changed)

    # --------------------------------------------------------------------------------------------- token and statuses

    async def _run(self, call: ServicerContext, function: Callable[[Any], Response], request: Any) -> Response:
        async with self._statuses(call):
            return await self._context.run_blocking(function, request)

    @asynccontextmanager
    async def _statuses(self, call: ServicerContext) -> AsyncIterator[None]:
        """Checks the token, and turns errors into gRPC status codes."""
        try:
            self._check_token(call)
            yield
        except OperatorError as error:
            await call.abort(grpc.StatusCode[error.code], str(error))
        except RefusalError as error:
            await call.abort(_REFUSED.get(error.reason, grpc.StatusCode.INVALID_ARGUMENT), str(error))
        except StorageError as error:
            self._context.log.error("the storage failed", error=str(error))
            await call.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator cannot store or read now. Try again later.")
        except EvensongError as error:
            await call.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def _check_token(self, call: ServicerContext) -> None:
        sent = dict(call.invocation_metadata() or ()).get("authorization", "")
        if not hmac.compare_digest(_digest(sent), self._token_hash):
            raise OperatorError(
                "UNAUTHENTICATED",
                "the operator's token is missing or wrong",
                expected="metadata authorization: Bearer TOKEN",
                fix="`evensong coordinator token` prints it.",
            )


_REFUSED = {common_pb2.REFUSAL_REASON_REPLAY: grpc.StatusCode.ALREADY_EXISTS}


def _digest(text: str | bytes) -> bytes:
    # Equal lengths, so that the comparison tells nothing about the token's.
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).digest()
