"""Signed calls to the coordinator: a message in, a message out, refusals as exceptions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from evensong.client.errors import RefusedError
from evensong.client.identity import Identity
from evensong.v1 import common_pb2, device_pb2, secagg_pb2
from evensong.wire.clock import Clock
from evensong.wire.errors import UnreachableError
from evensong.wire.signing import sign_request
from evensong.wire.transport import DEVICE_SERVICE, Transport

Response = TypeVar("Response", bound=Message)


class Calls:
    """The device service, as this device calls it. Every deadline is the transport's.

    Raises :class:`UnreachableError` if no valid answer came, and :class:`RefusedError` for a refusal.
    """

    def __init__(self, open_transport: Callable[[], Transport], identity: Identity, clock: Clock) -> None:
        self._open_transport = open_transport
        self._opened: Transport | None = None
        self._identity = identity
        self._clock = clock

    async def enrol(self, body: bytes) -> device_pb2.EnrolResponse:
        return await self._call("Enrol", body, device_pb2.EnrolResponse)

    async def check_in(self, body: bytes) -> device_pb2.CheckInResponse:
        """A refusal is left in the response: models for ``predict`` may stand beside it."""
        return await self._call("CheckIn", body, device_pb2.CheckInResponse, refusals=False)

    async def begin_upload(self, request: device_pb2.BeginUploadRequest) -> device_pb2.BeginUploadResponse:
        return await self._call("BeginUpload", request.SerializeToString(), device_pb2.BeginUploadResponse)

    async def upload_chunk(self, request: device_pb2.UploadChunkRequest) -> device_pb2.UploadChunkResponse:
        """A refusal is left in the response: for BAD_CHUNK, ``received_bytes`` beside it says where to go on."""
        body = request.SerializeToString()
        return await self._call("UploadChunk", body, device_pb2.UploadChunkResponse, refusals=False)

    async def commit_upload(self, request: device_pb2.CommitUploadRequest) -> device_pb2.CommitUploadResponse:
        return await self._call("CommitUpload", request.SerializeToString(), device_pb2.CommitUploadResponse)

    async def secure(self, request: secagg_pb2.SecureRequest) -> secagg_pb2.SecureResponse:
        """A step of a secure round. It may be held, and has no ``next`` while the stage is open."""
        return await self._call("Secure", request.SerializeToString(), secagg_pb2.SecureResponse)

    async def report(self, request: device_pb2.ReportRequest) -> device_pb2.ReportResponse:
        return await self._call("Report", request.SerializeToString(), device_pb2.ReportResponse)

    async def abort(self, request: device_pb2.AbortRequest) -> device_pb2.AbortResponse:
        return await self._call("Abort", request.SerializeToString(), device_pb2.AbortResponse)

    async def download(self, request: device_pb2.DownloadRequest) -> AsyncGenerator[device_pb2.DownloadResponse, None]:
        """Close it (``aclosing``) to end the call early."""
        method, body = DEVICE_SERVICE + "Download", request.SerializeToString()
        answers = self._transport.stream(method, body, self._sign(method, body))
        try:
            async for answer in answers:
                yield _parse(answer, device_pb2.DownloadResponse, "Download")
        finally:
            if isinstance(answers, AsyncGenerator):
                await answers.aclose()

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    @property
    def _transport(self) -> Transport:
        """Opened with the first call: a device that only predicts never connects."""
        if self._opened is None:
            self._opened = self._open_transport()
        return self._opened

    async def _call(self, name: str, body: bytes, answer: type[Response], *, refusals: bool = True) -> Response:
        method = DEVICE_SERVICE + name
        response = _parse(await self._transport.call(method, body, self._sign(method, body)), answer, name)
        if refusals:
            raise_refusal(response)
        return response

    def _sign(self, method: str, body: bytes) -> list[tuple[str, str | bytes]]:
        return sign_request(self._identity.key, method, body, self._clock.unix_ms())


def raise_refusal(response: Message) -> None:
    """RefusedError if ``response`` carries a refusal."""
    if response.HasField("refusal"):
        refusal: common_pb2.Refusal = response.refusal  # type: ignore[attr-defined]
        retry: common_pb2.RetryWindow = response.retry  # type: ignore[attr-defined]
        raise RefusedError(refusal, retry)


def _parse(body: bytes, answer: type[Response], name: str) -> Response:
    try:
        return answer.FromString(body)
    except DecodeError:
        raise UnreachableError(
            f"the answer to {name} is not a valid message", fix="Is this address an evensong coordinator?"
        ) from None
