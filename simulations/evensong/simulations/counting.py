"""Counts what crosses a device's line, whatever carries it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from evensong.wire.transport import Metadata, Transport


class CountingTransport:
    """Around any :class:`evensong.wire.transport.Transport`.

    ``bytes_up`` are the bodies and metadata of requests, ``bytes_down`` the bodies of answers that arrived; framing of
    HTTP and below is not counted. A repeated call counts again.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.calls = 0
        self.bytes_up = 0
        self.bytes_down = 0

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        self._count_request(body, metadata)
        answer = await self._inner.call(method, body, metadata)
        self.bytes_down += len(answer)
        return answer

    async def stream(self, method: str, body: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        self._count_request(body, metadata)
        async for message in self._inner.stream(method, body, metadata):
            self.bytes_down += len(message)
            yield message

    async def close(self) -> None:
        await self._inner.close()

    def _count_request(self, body: bytes, metadata: Metadata) -> None:
        self.calls += 1
        self.bytes_up += len(body) + sum(len(key) + len(value) for key, value in metadata)
