"""How fast updates come in, against a server that throws them away, and what memory a thousand of them take.

``ingest/bare_grpc_sink``: the real daemon (signatures, checksums, fsync, journal, sum) and a bare grpc.aio server get
the very same signed chunks from eight connections at once, in turns. ``ingest_rss_mb``: the daemon's peak resident
memory after 1,000 reports of a million parameters in one round. Daemon and sink are processes of their own; the load is
this process.
"""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.harness import Row, wanted
from evensong.v1 import common_pb2, device_pb2, operator_pb2, operator_pb2_grpc, task_pb2
from evensong.wire.artifact import encode_artifact
from evensong.wire.chunks import split
from evensong.wire.codecs import UpdateCodec
from evensong.wire.program import Artifact, DType, Variable, VariableFlag
from evensong.wire.signing import new_request_id, public_key_of, sign_request
from evensong.wire.tensors import Layout, encode_tensors, layout_of, layout_to_proto
from evensong.wire.transport import DEVICE_SERVICE

CONNECTIONS = 8
PARAMETERS = (1000, 1000)
REPORTS_A_BLOCK, BLOCKS = 32, 5
REPORTS_FOR_MEMORY = 1_000
POPULATION = "benchmark"
Channel = Any  # grpc.aio.Channel; its stubs want arguments that have defaults
OPTIONS = (("grpc.max_receive_message_length", 8 << 20), ("grpc.use_local_subchannel_pool", 1))


def run(only: str) -> Iterator[Row]:
    """Rows ``ingest/bare_grpc_sink`` (MB/s) and ``ingest_rss_mb`` (MB)."""
    if wanted("ingest/bare_grpc_sink", only):
        ours, sink = asyncio.run(_measure_speed())
        yield Row("ingest/bare_grpc_sink", ours, sink, "MB/s", "higher")
    if wanted("ingest_rss_mb", only):
        yield Row("ingest_rss_mb", asyncio.run(_measure_memory()), None, "MB", "lower")


# -------------------------------------------------------------------------------------------------------------- speed


async def _measure_speed() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        async with _daemon(Path(folder)) as (_, daemon_channels, fleet), _sink() as sink_channels:
            await fleet.submit(goal=REPORTS_A_BLOCK, rounds=BLOCKS + 1)
            devices = await fleet.enrol(REPORTS_A_BLOCK)
            seconds: dict[str, list[float]] = {"ours": [], "sink": []}
            for block in range(BLOCKS + 1):
                prepared = [await device.prepare() for device in devices]
                timed = [
                    ("ours", await _send(daemon_channels, prepared, check=True)),
                    ("sink", 0.0),
                ]
                await fleet.wait_for_version(block + 1)  # the server step must not run into the sink's turn
                timed[1] = ("sink", await _send(sink_channels, prepared, check=False))
                if block:  # the first one warms up
                    for name, value in timed:
                        seconds[name].append(value)
        megabytes = REPORTS_A_BLOCK * fleet.update_bytes / 1e6
        return megabytes / statistics.median(seconds["ours"]), megabytes / statistics.median(seconds["sink"])


async def _send(channels: Sequence[Channel], uploads: Sequence[Upload], *, check: bool) -> float:
    """Seconds until all uploads are answered, each connection sending one after the other."""

    async def work(channel: Channel, mine: Sequence[Upload]) -> None:
        for upload in mine:
            for call in upload.calls:
                answer = await channel.unary_unary(call.method)(call.body, metadata=call.metadata)
                if check and device_pb2.CommitUploadResponse.FromString(answer).HasField("refusal"):
                    raise RuntimeError(device_pb2.CommitUploadResponse.FromString(answer).refusal.message)

    start = time.perf_counter()
    await asyncio.gather(*(work(channel, uploads[i :: len(channels)]) for i, channel in enumerate(channels)))
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------------- memory


async def _measure_memory() -> float:
    with tempfile.TemporaryDirectory() as folder:
        async with _daemon(Path(folder)) as (process, channels, fleet):
            await fleet.submit(goal=REPORTS_FOR_MEMORY, rounds=1)
            devices = await fleet.enrol(REPORTS_FOR_MEMORY)

            async def work(channel: Channel, mine: Sequence[LoadDevice]) -> None:
                for device in mine:
                    await _send([channel], [await device.prepare()], check=True)

            await asyncio.gather(*(work(channel, devices[i :: len(channels)]) for i, channel in enumerate(channels)))
            await fleet.wait_for_version(1)
            status = Path(f"/proc/{process.pid}/status").read_text()
            return next(int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmHWM"))


# --------------------------------------------------------------------------------------------------------------- load


@dataclass(frozen=True)
class SignedCall:
    method: str
    body: bytes
    metadata: tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class Upload:
    """The chunks of one update and its commit, ready to be sent."""

    calls: Sequence[SignedCall]


class LoadDevice:
    """Speaks the protocol up to the upload; then all that is left is to send bytes."""

    def __init__(self, channel: Channel, update: bytes) -> None:
        self._channel = channel
        self._update = update
        self.key = Ed25519PrivateKey.generate()

    async def prepare(self) -> Upload:
        """Checks in, begins an upload, and signs its chunks and commit."""
        answer = device_pb2.CheckInResponse.FromString(
            await self.call(
                "CheckIn",
                device_pb2.CheckInRequest(
                    request_id=new_request_id(),
                    population=POPULATION,
                    runtime_version="0.1.0",
                    memory_bytes=1 << 40,
                    training_examples=100,
                    wait_ms=60_000,
                ),
            )
        )
        lease = answer.assignment.lease
        reference = common_pb2.BlobRef(sha256=hashlib.sha256(self._update).digest(), size_bytes=len(self._update))
        begun = device_pb2.BeginUploadResponse.FromString(
            await self.call(
                "BeginUpload",
                device_pb2.BeginUploadRequest(request_id=new_request_id(), lease=lease, update=reference),
            )
        )
        requests: list[tuple[str, Any]] = [
            ("UploadChunk", device_pb2.UploadChunkRequest(upload_id=begun.upload_id, lease=lease, chunk=chunk))
            for chunk in split(self._update, begun.chunk_bytes)
        ]
        commit = device_pb2.CommitUploadRequest(
            request_id=new_request_id(),
            upload_id=begun.upload_id,
            lease=lease,
            weight=1.0,
            metrics=common_pb2.Metrics(examples=1, loss_sum=1.0, correct=1),
        )
        return Upload([self.sign(name, request) for name, request in [*requests, ("CommitUpload", commit)]])

    def sign(self, name: str, request: Any) -> SignedCall:
        method, body = DEVICE_SERVICE + name, request.SerializeToString()
        return SignedCall(method, body, tuple(sign_request(self.key, method, body, time.time_ns() // 1_000_000)))

    async def call(self, name: str, request: Any) -> bytes:
        signed = self.sign(name, request)
        answer: bytes = await self._channel.unary_unary(signed.method)(signed.body, metadata=signed.metadata)
        return answer


class Fleet:
    """The operator's side of the load: the task, the devices, and when a version is there."""

    def __init__(self, channel: Channel, token: str) -> None:
        self._channel = channel
        self._stub: Any = operator_pb2_grpc.OperatorServiceStub(channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._task_id = ""
        variable = Variable("weight", DType.F32, PARAMETERS, (0, 1), 0, VariableFlag.TRAINABLE)
        self.layout: Layout = layout_of([variable])
        self.artifact = encode_artifact(Artifact({}, (variable,), (), b"", bytes(4 * PARAMETERS[0] * PARAMETERS[1]), 0))
        self.codec = UpdateCodec(bits=None)
        self.update_bytes = self.codec.encoded_bytes(self.layout)

    async def submit(self, *, goal: int, rounds: int) -> None:
        zeros = encode_tensors({"weight": np.zeros(PARAMETERS, np.float32)}, self.layout)
        artifact, parameters = await self._upload(self.artifact), await self._upload(zeros)
        update = self.codec.to_plan()
        update.weighting, update.max_weight = task_pb2.WEIGHTING_UNIFORM, 1.0
        bundle = task_pb2.TaskBundle(
            name="ingest",
            population=POPULATION,
            artifact=artifact,
            layout=layout_to_proto(self.layout),
            local=task_pb2.LocalPlan(epochs=1, learning_rate=0.1, min_examples=1),
            update=update,
            round=task_pb2.RoundPolicy(
                goal_reports=goal, min_reports=goal, over_selection=1.0, deadline_ms=3_600_000, rounds=rounds
            ),
            server=task_pb2.ServerPlan(strategy="fedavg"),
            training_bytes=1,
        )
        request = operator_pb2.SubmitTaskRequest(
            request_id=new_request_id(), bundle=bundle, initial_parameters=parameters
        )
        self._task_id = (await self._stub.SubmitTask(request, metadata=self._metadata)).task_id

    async def enrol(self, count: int) -> list[LoadDevice]:
        request = operator_pb2.CreateEnrolmentTokenRequest(
            request_id=new_request_id(), population=POPULATION, uses=count
        )
        token = (await self._stub.CreateEnrolmentToken(request, metadata=self._metadata)).token
        values = np.random.default_rng(0).normal(size=PARAMETERS).astype(np.float32)
        update = self.codec.encode({"weight": values}, self.layout, np.random.default_rng(0))
        devices = [LoadDevice(self._channel, update) for _ in range(count)]
        for device in devices:
            enrol = device_pb2.EnrolRequest(
                request_id=new_request_id(),
                token=token,
                public_key=public_key_of(device.key),
                population=POPULATION,
            )
            await device.call("Enrol", enrol)
        return devices

    async def wait_for_version(self, version: int) -> None:
        request = operator_pb2.WatchTaskRequest(task_id=self._task_id)
        async for answer in self._stub.WatchTask(request, metadata=self._metadata):
            if answer.event.kind == operator_pb2.EVENT_KIND_VERSION_COMMITTED and answer.event.version == version:
                return

    async def _upload(self, data: bytes) -> common_pb2.BlobRef:
        async def chunks() -> AsyncIterator[operator_pb2.UploadBlobRequest]:
            for chunk in split(data, 1 << 20):
                yield operator_pb2.UploadBlobRequest(chunk=chunk)

        blob: common_pb2.BlobRef = (await self._stub.UploadBlob(chunks(), metadata=self._metadata)).blob
        return blob


# ---------------------------------------------------------------------------------------------------------- processes


@asynccontextmanager
async def _daemon(folder: Path) -> AsyncIterator[tuple[subprocess.Popen[bytes], list[Channel], Fleet]]:
    command = [sys.executable, "-m", "evensong.coordinator.command", "serve", "--data-dir", str(folder)]
    process = subprocess.Popen([*command, "--listen", "127.0.0.1:0", "--log-level", "error"], stdout=subprocess.DEVNULL)
    try:
        while not (folder / "address").exists():
            if process.poll() is not None:
                raise RuntimeError("the coordinator does not start")
            await asyncio.sleep(0.05)
        address = (folder / "address").read_text().strip()
        channels: list[Channel] = [grpc.aio.insecure_channel(address, options=OPTIONS) for _ in range(CONNECTIONS)]
        yield process, channels, Fleet(channels[0], (folder / "operator.token").read_text().strip())
        for channel in channels:
            await channel.close()
    finally:
        process.terminate()
        process.wait(30)


@asynccontextmanager
async def _sink() -> AsyncIterator[list[Channel]]:
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.coordinator"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        channels: list[Channel] = [grpc.aio.insecure_channel(address, options=OPTIONS) for _ in range(CONNECTIONS)]
        yield channels
        for channel in channels:
            await channel.close()
    finally:
        process.terminate()
        process.wait(30)


async def _serve_sink() -> None:
    """The peer: takes any message and throws it away."""

    class Sink(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            async def answer(_body: bytes, _call: object) -> bytes:
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 8 << 20)])
    server.add_generic_rpc_handlers((Sink(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve_sink())
