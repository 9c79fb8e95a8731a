"""A real coordinator on loopback for the client's tests, and the few operator calls that they need."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from evensong.v1 import common_pb2, operator_pb2, operator_pb2_grpc
from evensong.wire.chunks import split
from evensong.wire.tensors import encode_tensors

pytest.importorskip("sqlalchemy", reason="the coordinator's extra is not installed")
from evensong.coordinator.config import Settings
from evensong.coordinator.server import CoordinatorServer
from evensong.coordinator.task import Task


def settings(folder: Path, **values: object) -> Settings:
    """A free port, quiet, and short retry windows."""
    return Settings(
        data_dir=folder, listen="127.0.0.1:0", log_level="error", retry_earliest_ms=50, retry_latest_ms=100, **values
    )


class Operator:
    """The few operator calls that these tests need, on the bare stub."""

    def __init__(self, server: CoordinatorServer) -> None:
        self._channel = grpc.aio.insecure_channel(server.address)
        self._stub = operator_pb2_grpc.OperatorServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {server.operator_token}"),)

    async def submit(self, task: Task, *, request_id: bytes = b"submit-0-1-2-3-4") -> str:
        await self._upload(task.artifact_bytes)
        parameters = await self._upload(encode_tensors(task.initial_parameters(), task.layout))
        request = operator_pb2.SubmitTaskRequest(
            request_id=request_id, bundle=task.to_bundle(), initial_parameters=parameters
        )
        return (await self._stub.SubmitTask(request, metadata=self._metadata)).task_id

    async def token(self, uses: int, population: str = "default", *, request_id: bytes = b"token-0-1-2-3-4-") -> str:
        request = operator_pb2.CreateEnrolmentTokenRequest(request_id=request_id, population=population, uses=uses)
        return (await self._stub.CreateEnrolmentToken(request, metadata=self._metadata)).token

    async def revoke(self, device_id: str) -> None:
        request = operator_pb2.RevokeDeviceRequest(request_id=b"revoke-0-1-2-3-4", device_id=device_id)
        await self._stub.RevokeDevice(request, metadata=self._metadata)

    async def versions(self, task_id: str) -> list[operator_pb2.VersionInfo]:
        request = operator_pb2.ListVersionsRequest(task_id=task_id)
        return list((await self._stub.ListVersions(request, metadata=self._metadata)).versions)

    async def status(self, task_id: str) -> operator_pb2.TaskStatus:
        request = operator_pb2.GetTaskRequest(task_id=task_id)
        return (await self._stub.GetTask(request, metadata=self._metadata)).task

    async def close(self) -> None:
        await self._channel.close()

    async def _upload(self, data: bytes) -> common_pb2.BlobRef:
        async def chunks():
            for chunk in split(data, 1 << 16):
                yield operator_pb2.UploadBlobRequest(chunk=chunk)

        return (await self._stub.UploadBlob(chunks(), metadata=self._metadata)).blob


class Daemon:
    """A coordinator in a thread of its own, for tests whose devices are other processes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: CoordinatorServer, operator: Operator) -> None:
        self._loop, self.address, self.operator = loop, server.address, operator

    def ask(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Runs an operator call on the daemon's loop."""
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30)


@contextmanager
def running_daemon(folder: Path) -> Iterator[Daemon]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, loop).result(60)

    async def open_() -> tuple[CoordinatorServer, Operator]:
        server = CoordinatorServer(settings(folder))
        await server.start()
        return server, Operator(server)

    server, operator = run(open_())
    try:
        yield Daemon(loop, server, operator)
    finally:
        run(operator.close())
        run(server.stop(0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
