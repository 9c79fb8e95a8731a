"""What carries a call: gRPC in production, a function call in the simulator. Bodies are serialised protobuf messages.

Method names are the full gRPC paths, such as ``/evensong.v1.DeviceService/CheckIn``. Metadata keys are lower-case;
values of keys that end in ``-bin`` are bytes, all others are str.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

Metadata = Sequence[tuple[str, str | bytes]]

DEVICE_SERVICE = "/evensong.v1.DeviceService/"
OPERATOR_SERVICE = "/evensong.v1.OperatorService/"


class Transport(Protocol):
    """The client's end. Failures of the network raise :class:`evensong.wire.errors.UnreachableError`."""

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        """One request, one response."""
        ...

    def stream(self, method: str, body: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        """One request, a stream of responses."""
        ...

    async def close(self) -> None: ...


class Dispatcher(Protocol):
    """The server's end for the device service: authenticates, decodes, handles, encodes. Never raises on bad input:
    refusals are answers."""

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes: ...

    def stream(self, method: str, body: bytes, metadata: Metadata) -> AsyncIterator[bytes]: ...
