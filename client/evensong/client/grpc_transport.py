"""The transport of production: grpc.aio, with a deadline on every call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from evensong.wire.errors import UnreachableError
from evensong.wire.transport import DEVICE_SERVICE, Metadata

_log = logging.getLogger("evensong.client")

_MOST_MESSAGE_BYTES = 16 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", _MOST_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MOST_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]
_HELD = (DEVICE_SERVICE + "CheckIn", DEVICE_SERVICE + "Secure")
_LONGEST_HOLD_S = 60.0
_LOOPBACK = ("localhost", "127.", "[::1]", "unix:")


@dataclass(frozen=True)
class Tls:
    """PEM bytes. ``root_certificates`` None trusts the system's; key and chain are for mutual TLS."""

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None


class GrpcTransport:
    """Calls ``address`` ("host:port"). Must be used from one event loop.

    A call that is not answered after ``deadline_s`` (a check-in or a step of a secure round: after that and the 60 s
    that it may be held; a stream: that long without a message) raises :class:`UnreachableError`, as every failure of
    the network does. Requests are signed and models verified in any case; without ``tls`` updates can be read on the
    way.
    """

    def __init__(self, address: str, *, tls: Tls | None = None, deadline_s: float = 30.0) -> None:
        self.address = address
        self._tls = tls
        self._deadline_s = deadline_s
        self._channel: grpc.aio.Channel | None = None

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        deadline = self._deadline_s + (_LONGEST_HOLD_S if method in _HELD else 0.0)
        try:
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._connected().unary_unary(
                method, _as_is, _as_is
            )
            return await unary(body, metadata=tuple(metadata), timeout=deadline)
        except grpc.aio.AioRpcError as error:
            raise self._unreachable(method, error) from error

    async def stream(self, method: str, body: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        call = self._connected().unary_stream(method, _as_is, _as_is)(body, metadata=tuple(metadata))
        try:
            messages = aiter(call)
            while True:
                async with asyncio.timeout(self._deadline_s):
                    message = await anext(messages, None)
                if message is None:
                    return
                yield message
        except TimeoutError:
            raise UnreachableError(f"{self.address} stopped in the middle of {method}") from None
        except grpc.aio.AioRpcError as error:
            raise self._unreachable(method, error) from error
        finally:
            call.cancel()

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close(None)
            self._channel = None

    def _connected(self) -> grpc.aio.Channel:
        """The channel, opened with the first call: it belongs to the event loop that runs then."""
        if self._channel is None and self._tls is not None:
            tls = self._tls
            credentials = grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)
            self._channel = grpc.aio.secure_channel(self.address, credentials, _OPTIONS)
        elif self._channel is None:
            if not self.address.startswith(_LOOPBACK):
                _log.warning("no TLS to %s: updates can be read on the way", self.address)
            self._channel = grpc.aio.insecure_channel(self.address, _OPTIONS)
        return self._channel

    def _unreachable(self, method: str, error: grpc.aio.AioRpcError) -> UnreachableError:
        return UnreachableError(
            f"{self.address} did not answer {method}", got=f"{error.code().name}: {(error.details() or '')[:200]}"
        )


def _as_is(body: bytes) -> bytes:
    """Bodies are serialised already."""
    return body
