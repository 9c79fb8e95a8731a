"""A device written on the wire package alone, an artifact without a program, and a coordinator under a fake clock."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.coordinator.config import Settings
from evensong.coordinator.context import run_inline
from evensong.coordinator.fault import Fault, no_fault
from evensong.coordinator.server import CoordinatorCore
from evensong.coordinator.strategies import Optimizers
from evensong.v1 import common_pb2, device_pb2, operator_pb2, task_pb2
from evensong.wire.artifact import encode_artifact
from evensong.wire.chunks import split
from evensong.wire.codecs import UpdateCodec
from evensong.wire.program import Artifact, DType, Variable, VariableFlag
from evensong.wire.signing import device_id_of, new_request_id, public_key_of, sign_request, verify_blob
from evensong.wire.tensors import Layout, encode_tensors, layout_of, layout_to_proto
from evensong.wire.transport import DEVICE_SERVICE, Dispatcher

POPULATION = "testers"
RUNTIME = "0.1.0"


# ------------------------------------------------------------------------------------------------------------- models


def make_artifact(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, Layout]:
    """An artifact with these variables, all zero, and no program: the coordinator needs no more."""
    variables, offset = [], 0
    for name, shape in shapes.items():
        variables.append(Variable(name, DType.F32, shape, tuple(range(len(shape))), offset, VariableFlag.TRAINABLE))
        offset += -(-4 * int(np.prod(shape)) // 64) * 64
    artifact = Artifact({}, tuple(variables), (), b"", bytes(offset), 0)
    return encode_artifact(artifact), layout_of(variables)


def make_bundle(
    artifact: bytes,
    layout: Layout,
    *,
    goal: int = 3,
    minimum: int = 2,
    over_selection: float = 1.0,
    deadline_ms: int = 60_000,
    rounds: int = 2,
    evaluate_every: int = 0,
    evaluation_reports: int = 0,
    codec: UpdateCodec | None = None,
    strategy: str = "plain",
    name: str = "toy",
    weighting: task_pb2.Weighting | None = None,
    max_weight: float = 100.0,
    training_bytes: int = 1_000,
    min_examples: int = 1,
    population: str = POPULATION,
    secure: task_pb2.SecurePlan | None = None,
    clip_norm: float = 1.0,
    privacy: task_pb2.PrivacyPlan | None = None,
    adaptive: task_pb2.AdaptiveClipping | None = None,
) -> task_pb2.TaskBundle:
    """A plan with float32 updates, or with 8-bit values in a secure sum; clipped if it is secure or private."""
    update = (codec or UpdateCodec(bits=None)).to_plan()
    alone = secure is None
    weighting = weighting or (task_pb2.WEIGHTING_EXAMPLES if alone else task_pb2.WEIGHTING_UNIFORM)
    update.weighting, update.max_weight = weighting, max_weight
    if secure is not None:
        update = task_pb2.UpdatePlan(
            codec=task_pb2.CODEC_FIELDS,
            bits=8,
            clip_norm=clip_norm,
            weighting=weighting,
            max_weight=max_weight,
        )
    if privacy is not None:
        update.clip_norm = clip_norm
    if adaptive is not None:
        update.clip_norm = 0.0
        update.adaptive_clipping.CopyFrom(adaptive)
    return task_pb2.TaskBundle(
        name=name,
        population=population,
        artifact=common_pb2.BlobRef(sha256=hashlib.sha256(artifact).digest(), size_bytes=len(artifact)),
        layout=layout_to_proto(layout),
        local=task_pb2.LocalPlan(epochs=1, batch_size=1, learning_rate=0.1, min_examples=min_examples),
        update=update,
        round=task_pb2.RoundPolicy(
            goal_reports=goal,
            min_reports=minimum,
            over_selection=over_selection,
            deadline_ms=deadline_ms,
            rounds=rounds,
            evaluate_every=evaluate_every,
            evaluation_reports=evaluation_reports,
        ),
        server=task_pb2.ServerPlan(strategy=strategy),
        training_bytes=training_bytes,
        privacy=privacy,
        secure=secure,
    )


# ------------------------------------------------------------------------------------------------------------- device


class RefusedUploadError(AssertionError):
    """A test that expects it reads why."""

    def __init__(self, refusal: common_pb2.Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class TinyDevice:
    """Speaks the device protocol call by call; each method takes what a test may want to get wrong."""

    def __init__(self, dispatcher: Dispatcher, seed: int, now: Callable[[], int]) -> None:
        self.dispatcher = dispatcher
        self.key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"device%d" % seed).digest())
        self.device_id = device_id_of(public_key_of(self.key))
        self.rng = np.random.default_rng(seed)
        self.now = now
        self.signer = b""

    async def send(self, method: str, request: Any, response_type: type[Any], *, time: int | None = None) -> Any:
        body = request if isinstance(request, bytes) else request.SerializeToString()
        path = DEVICE_SERVICE + method
        metadata = sign_request(self.key, path, body, self.now() if time is None else time)
        response = response_type.FromString(await self.dispatcher.call(path, body, metadata))
        assert response.HasField("retry"), f"{method} was answered without a retry window"
        return response

    async def enrol(self, token: str, population: str = POPULATION) -> device_pb2.EnrolResponse:
        request = device_pb2.EnrolRequest(
            request_id=new_request_id(), token=token, public_key=public_key_of(self.key), population=population
        )
        response: device_pb2.EnrolResponse = await self.send("Enrol", request, device_pb2.EnrolResponse)
        self.signer = response.signer_public_key
        return response

    async def check_in(self, **fields: Any) -> device_pb2.CheckInResponse:
        values: dict[str, Any] = {
            "request_id": new_request_id(),
            "population": POPULATION,
            "runtime_version": RUNTIME,
            "memory_bytes": 1 << 30,
            "training_examples": 10,
            "evaluation_examples": 10,
        } | fields
        response: device_pb2.CheckInResponse = await self.send(
            "CheckIn", device_pb2.CheckInRequest(**values), device_pb2.CheckInResponse
        )
        return response

    async def begin(self, lease: common_pb2.Lease, data: bytes, **fields: Any) -> device_pb2.BeginUploadResponse:
        reference = common_pb2.BlobRef(sha256=hashlib.sha256(data).digest(), size_bytes=len(data))
        values: dict[str, Any] = {"request_id": new_request_id(), "lease": lease, "update": reference} | fields
        response: device_pb2.BeginUploadResponse = await self.send(
            "BeginUpload", device_pb2.BeginUploadRequest(**values), device_pb2.BeginUploadResponse
        )
        return response

    async def chunk(self, upload_id: str, lease: common_pb2.Lease, chunk: common_pb2.BlobChunk) -> Any:
        request = device_pb2.UploadChunkRequest(upload_id=upload_id, lease=lease, chunk=chunk)
        return await self.send("UploadChunk", request, device_pb2.UploadChunkResponse)

    async def commit(self, upload_id: str, lease: common_pb2.Lease, **fields: Any) -> device_pb2.CommitUploadResponse:
        values: dict[str, Any] = {
            "request_id": new_request_id(),
            "upload_id": upload_id,
            "lease": lease,
            "weight": 10.0,
            "metrics": common_pb2.Metrics(examples=10, loss_sum=5.0, correct=7),
        } | fields
        response: device_pb2.CommitUploadResponse = await self.send(
            "CommitUpload", device_pb2.CommitUploadRequest(**values), device_pb2.CommitUploadResponse
        )
        return response

    async def upload(self, lease: common_pb2.Lease, update: bytes, chunk_bytes: int = 0) -> str:
        """Begins and sends all chunks; the upload's id."""
        begun = await self.begin(lease, update)
        if begun.HasField("refusal"):
            raise RefusedUploadError(begun.refusal)
        for chunk in split(update, chunk_bytes or begun.chunk_bytes, begun.received_bytes):
            answer = await self.chunk(begun.upload_id, lease, chunk)
            if answer.HasField("refusal"):
                raise RefusedUploadError(answer.refusal)
        return begun.upload_id

    async def report(self, lease: common_pb2.Lease, **fields: Any) -> device_pb2.ReportResponse:
        values: dict[str, Any] = {
            "request_id": new_request_id(),
            "lease": lease,
            "metrics": common_pb2.Metrics(examples=4, loss_sum=2.0, correct=3),
        } | fields
        response: device_pb2.ReportResponse = await self.send(
            "Report", device_pb2.ReportRequest(**values), device_pb2.ReportResponse
        )
        return response

    async def abort(
        self, lease: common_pb2.Lease, reason: device_pb2.AbortReason = device_pb2.ABORT_REASON_CONDITIONS
    ) -> device_pb2.AbortResponse:
        request = device_pb2.AbortRequest(request_id=new_request_id(), lease=lease, reason=reason)
        response: device_pb2.AbortResponse = await self.send("Abort", request, device_pb2.AbortResponse)
        return response

    async def download(self, sha256: bytes, offset: int = 0) -> bytes:
        path = DEVICE_SERVICE + "Download"
        body = device_pb2.DownloadRequest(sha256=sha256, offset=offset).SerializeToString()
        data = bytearray()
        async for part in self.dispatcher.stream(path, body, sign_request(self.key, path, body, self.now())):
            answer = device_pb2.DownloadResponse.FromString(part)
            assert not answer.HasField("refusal"), answer
            data += answer.chunk.data
        return bytes(data)

    def make_update(self, layout: Layout, codec: UpdateCodec) -> bytes:
        delta = {spec.name: self.rng.normal(size=spec.shape).astype(np.float32) for spec in layout}
        return codec.encode(delta, layout, self.rng)

    def manifest(self, assignment: device_pb2.Assignment) -> task_pb2.VersionManifest:
        """The version to train from, verified as a device does."""
        return task_pb2.VersionManifest.FromString(verify_blob("version", assignment.version, self.signer))


# ----------------------------------------------------------------------------------------------- a fake clock's world


class FakeClock:
    """Time stands still until :meth:`advance`."""

    def __init__(self, unix_ms: int = 1_700_000_000_000) -> None:
        self._now = unix_ms
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._count = itertools.count()

    def unix_ms(self) -> int:
        return self._now

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + max(0, round(seconds * 1000)), next(self._count), future))
        await future

    async def advance(self, milliseconds: int) -> None:
        """Wakes sleepers in order, and lets everything that follows from each happen before the next."""
        end = self._now + milliseconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, future = heapq.heappop(self._sleepers)
            self._now = max(self._now, due)
            if not future.done():
                future.set_result(None)
            await settle()
        self._now = end
        await settle()


async def settle() -> None:
    """Lets all tasks run until they wait for the clock."""
    for _ in range(50):
        await asyncio.sleep(0)


class PlainAverage:
    """A server optimiser without Flower: adds the mean. Its state counts the steps."""

    def init(self, parameters: Mapping[str, Any]) -> bytes:
        return b"0"

    def step(
        self, state: bytes, parameters: Mapping[str, Any], mean_update: Mapping[str, Any], **_: Any
    ) -> tuple[dict[str, Any], bytes]:
        stepped = {name: (values + mean_update[name]).astype(np.float32) for name, values in parameters.items()}
        return stepped, b"%d" % (int(state) + 1)


def plain_average() -> Optimizers:
    optimizers = Optimizers()
    optimizers.register("plain", PlainAverage)
    return optimizers


_lives = itertools.count()


class World:
    """A whole coordinator in this process, deterministic: no threads, no sockets, a fake clock."""

    def __init__(
        self, folder: Path, *, clock: FakeClock | None = None, fault: Fault = no_fault, **settings: Any
    ) -> None:
        self.clock = clock or FakeClock()
        self.settings = Settings(data_dir=folder, durable=False, **settings)
        folder.mkdir(parents=True, exist_ok=True)
        self.core = CoordinatorCore(
            self.settings,
            clock=self.clock,
            run_blocking=run_inline,
            rng=random.Random(next(_lives)),
            optimizers=plain_average(),
            fault=fault,
        )
        self.devices: list[TinyDevice] = []
        self.artifact, self.layout = make_artifact({"weight": (3, 4), "bias": (3,)})
        self.codec = UpdateCodec(bits=None)
        self.task_id = ""

    async def __aenter__(self) -> World:
        self.core.start()
        await settle()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.core.stop()

    async def submit(self, **fields: Any) -> str:
        blobs = self.core.context.blobs
        blobs.put(self.artifact)
        zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in self.layout}
        initial = encode_tensors(zeros, self.layout)
        blobs.put(initial)
        self.codec = fields.get("codec") or self.codec
        response = self.core.operators.submit_task(
            operator_pb2.SubmitTaskRequest(
                request_id=new_request_id(),
                bundle=make_bundle(self.artifact, self.layout, **fields),
                initial_parameters=common_pb2.BlobRef(sha256=hashlib.sha256(initial).digest(), size_bytes=len(initial)),
            )
        )
        self.task_id = response.task_id
        await settle()
        return self.task_id

    async def enrol(self, count: int, kind: type[TinyDevice] = TinyDevice) -> list[TinyDevice]:
        """More devices, all enrolled with one token."""
        token = self.core.operators.create_enrolment_token(
            operator_pb2.CreateEnrolmentTokenRequest(request_id=new_request_id(), population=POPULATION, uses=count)
        ).token
        new = [kind(self.core.devices, len(self.devices) + index, self.clock.unix_ms) for index in range(count)]
        for device in new:
            assert not (await device.enrol(token)).HasField("refusal")
        self.devices += new
        return new

    async def train(self, device: TinyDevice, **fields: Any) -> device_pb2.CommitUploadResponse:
        """One whole contribution: check-in, upload, commit."""
        answer = await device.check_in()
        assert answer.assignment.work == device_pb2.WORK_TRAIN, answer
        lease = answer.assignment.lease
        upload_id = await device.upload(lease, device.make_update(self.layout, self.codec))
        committed = await device.commit(upload_id, lease, **fields)
        await settle()
        return committed

    def task(self) -> operator_pb2.TaskStatus:
        return self.core.operators.get_task(operator_pb2.GetTaskRequest(task_id=self.task_id)).task

    def versions(self) -> list[operator_pb2.VersionInfo]:
        return list(self.core.operators.list_versions(operator_pb2.ListVersionsRequest(task_id=self.task_id)).versions)

    def events(self) -> list[operator_pb2.TaskEvent]:
        return self.core.operators.read_events(self.task_id, 0)[0]
