"""The real daemon as a process that tests may kill, and devices that never give up on it."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.process
import os
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from tiny_device import POPULATION, make_artifact, make_bundle

from evensong.coordinator import fault
from evensong.v1 import common_pb2, operator_pb2, operator_pb2_grpc
from evensong.wire.chunks import split
from evensong.wire.signing import new_request_id
from evensong.wire.tensors import Layout
from evensong.wire.transport import Metadata

PATIENCE_S = 60.0

# A process that has imported everything once and forks for each start: a start costs no second of imports.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["evensong.coordinator.command", "flwr.serverapp.strategy"])
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")


def run(arguments: Sequence[str], log: str, environment: dict[str, str]) -> None:
    """The daemon's whole life, in a process of its own."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from evensong.coordinator.command import main

    sys.exit(main(arguments))


class Daemon:
    """`evensong coordinator serve` on a free loopback port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        self._options = options
        self._process: multiprocessing.process.BaseProcess | None = None

    def start(self, crash_at: str = "", **environment: str) -> None:
        (self.folder / "address").unlink(missing_ok=True)
        arguments = ["serve", "--data-dir", str(self.folder), "--listen", "127.0.0.1:0", *self._options]
        environment[fault.ENVIRONMENT] = crash_at
        self._process = _processes.Process(target=run, args=(arguments, str(self.log), environment))
        self._process.start()

    @property
    def exit_code(self) -> int | None:
        assert self._process is not None
        return self._process.exitcode

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def terminate(self) -> None:
        assert self._process is not None and self._process.pid is not None
        os.kill(self._process.pid, signal.SIGTERM)

    def join(self) -> int:
        """Waits for the end; its exit code."""
        assert self._process is not None
        self._process.join(PATIENCE_S)
        assert self._process.exitcode is not None, "the daemon does not end"
        return self._process.exitcode

    def close(self) -> None:
        """For the end of a test, whatever happened."""
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join(PATIENCE_S)

    async def address(self) -> str:
        """Where it listens, once it does; waits through restarts."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                if text := (self.folder / "address").read_text().strip():
                    return text
            except FileNotFoundError:
                pass
            await asyncio.sleep(0.01)
        raise AssertionError(f"the daemon does not start: {self.log.read_text()[-2000:]}")

    def operator_token(self) -> str:
        return (self.folder / "operator.token").read_text().strip()

    def query(self, statement: str) -> list[sqlite3.Row]:
        """Reads the database file, past all code of ours."""
        with closing(sqlite3.connect(self.folder / "coordinator.sqlite3")) as connection:
            connection.row_factory = sqlite3.Row
            return connection.execute(statement).fetchall()


class Connection:
    """A dispatcher over gRPC that finds the daemon again after each restart; raises AioRpcError when it is gone."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._address = ""
        self._channel: grpc.aio.Channel | None = None

    async def channel(self) -> grpc.aio.Channel:
        address = await self._daemon.address()
        if self._channel is None or address != self._address:
            await self.close()
            self._address = address
            self._channel = grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", 64 << 20)])
        return self._channel

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        channel = await self.channel()
        response: bytes = await channel.unary_unary(method)(body, metadata=tuple(metadata), timeout=30)
        return response

    async def stream(self, method: str, body: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        channel = await self.channel()
        async for part in channel.unary_stream(method)(body, metadata=tuple(metadata), timeout=30):
            yield part

    async def operator(self, method: str, request: Any) -> Any:
        """One call as the operator."""
        channel = await self.channel()
        stub: Any = operator_pb2_grpc.OperatorServiceStub(channel)
        metadata = (("authorization", f"Bearer {self._daemon.operator_token()}"),)
        return await getattr(stub, method)(request, metadata=metadata, timeout=30)

    async def upload_blob(self, data: bytes) -> common_pb2.BlobRef:
        async def chunks() -> AsyncIterator[operator_pb2.UploadBlobRequest]:
            for chunk in split(data, 1 << 20):
                yield operator_pb2.UploadBlobRequest(chunk=chunk)

        response: operator_pb2.UploadBlobResponse = await self.operator("UploadBlob", chunks())
        return response.blob

    async def submit(self, shapes: dict[str, tuple[int, ...]], initial: Any, **policy: Any) -> tuple[str, Layout]:
        """Uploads an artifact and submits its task; ``initial``: a function from layout to the encoded parameters."""
        artifact, layout = make_artifact(shapes)
        await self.upload_blob(artifact)
        parameters = await self.upload_blob(initial(layout))
        request = operator_pb2.SubmitTaskRequest(
            request_id=new_request_id(),
            bundle=make_bundle(artifact, layout, **policy),
            initial_parameters=parameters,
        )
        return (await self.operator("SubmitTask", request)).task_id, layout

    async def token(self, uses: int) -> str:
        request = operator_pb2.CreateEnrolmentTokenRequest(
            request_id=new_request_id(), population=POPULATION, uses=uses
        )
        token: str = (await self.operator("CreateEnrolmentToken", request)).token
        return token

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
