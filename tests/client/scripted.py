"""A coordinator in memory for the client's tests: honest by default, and as hostile as a test makes it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny_artifact import tiny_artifact, tiny_examples

from evensong.client import AlwaysReady, Device, Outcome, inline
from evensong.v1 import common_pb2, device_pb2, secagg_pb2, task_pb2
from evensong.wire.artifact import decode_artifact
from evensong.wire.chunks import ALREADY_THERE, check_chunk, crc32c, sha256
from evensong.wire.codecs import UpdateCodec
from evensong.wire.errors import CorruptError, UnreachableError
from evensong.wire.signing import EnrolmentToken, public_key_of, sign_blob, verify_request
from evensong.wire.tensors import encode_tensors, layout_from_proto, layout_of, layout_to_proto
from evensong.wire.transport import Metadata

SECOND = 1000
START = 1_800_000_000_000


class FakeClock:
    """Time stands still unless somebody sleeps or moves it."""

    def __init__(self) -> None:
        self.now = START

    def unix_ms(self) -> int:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += int(seconds * 1000)


@dataclass
class Committed:
    weight: float
    metrics: common_pb2.Metrics
    delta: dict[str, np.ndarray]


@dataclass
class Coordinator:
    """The device service, as far as a device can tell. ``give`` lists the kinds of work for the next check-ins.

    ``before`` is called with a running number and the method before each message is handled, ``after`` once it was:
    raising UnreachableError there loses the request or the answer. ``tamper`` may change any response.
    """

    clock: FakeClock
    features: int = 4
    classes: int = 3
    give: list[int] = field(default_factory=list)
    lease_ms: int = 600 * SECOND
    chunk_bytes: int = 1024
    plan: Callable[[task_pb2.TaskBundle], None] = lambda bundle: None
    before: Callable[[int, str], None] = lambda number, method: None
    after: Callable[[int, str], None] = lambda number, method: None
    tamper: Callable[[str, object], None] = lambda method, response: None
    retry: tuple[int, int] = (1000, 2000)
    task_id = "task-1"

    def __post_init__(self) -> None:
        self.artifact = tiny_artifact(self.features, self.classes)
        self.signer = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
        self.token = str(EnrolmentToken.create(public_key_of(self.signer)))
        self.calls: list[str] = []
        self.requests: list[tuple[str, bytes]] = []
        self.answers: dict[bytes, bytes] = {}  # by request id
        self.bodies: dict[bytes, bytes] = {}  # by request id: a repetition must be the very same request
        self.moments = 0  # at which something may be lost: see `before` and `after`
        self.devices: dict[str, bytes] = {}
        self.uploads: dict[str, tuple[common_pb2.BlobRef, bytearray]] = {}
        self.committed: list[Committed] = []
        self.reports: list[common_pb2.Metrics] = []
        self.aborts: list[tuple[int, str]] = []
        self.blobs: dict[bytes, bytes] = {}
        self.round = 0
        self.serve = True
        self.publish(0)

    # what operators do

    def publish(self, number: int, values: dict[str, np.ndarray] | None = None) -> None:
        """Version ``number`` with ``values``; by default the artifact's own."""
        artifact = decode_artifact(self.artifact)
        bundle = task_pb2.TaskBundle(
            name="tiny",
            population="default",
            artifact=self._store(self.artifact),
            local=task_pb2.LocalPlan(epochs=2, learning_rate=0.5),
            update=task_pb2.UpdatePlan(
                codec=task_pb2.CODEC_FLOAT32, weighting=task_pb2.WEIGHTING_EXAMPLES, max_weight=1000
            ),
            round=task_pb2.RoundPolicy(rounds=10, goal_reports=1),
        )
        self.plan(bundle)
        if not bundle.layout:
            bundle.layout.extend(layout_to_proto(layout_of(artifact.variables, list(bundle.local.personal))))
        self.layout = layout_from_proto(bundle.layout)
        self.values = {spec.name: np.zeros(spec.shape, np.float32) for spec in self.layout} | (values or {})
        self.bundle = sign_blob("bundle", bundle.SerializeToString(), self.signer)
        manifest = task_pb2.VersionManifest(
            task_id=self.task_id,
            bundle_sha256=sha256(self.bundle.payload),
            number=number,
            parameters=self._store(encode_tensors(self.values, self.layout)),
        )
        self.version = sign_blob("version", manifest.SerializeToString(), self.signer)

    def update_of(self, data: bytes) -> dict[str, np.ndarray]:
        plan = task_pb2.TaskBundle.FromString(self.bundle.payload).update
        return UpdateCodec.from_plan(plan).decode(data, self.layout)

    def _store(self, data: bytes) -> common_pb2.BlobRef:
        self.blobs[sha256(data)] = data
        return common_pb2.BlobRef(sha256=sha256(data), size_bytes=len(data))

    # the transport

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        name = method.rpartition("/")[2]
        self.calls.append(name)
        self.requests.append((name, body))
        self._moment(self.before, name)
        request = getattr(secagg_pb2 if name == "Secure" else device_pb2, f"{name}Request").FromString(body)
        if name == "Enrol":
            verify_request(metadata, method, body, request.public_key, self.clock.now)
            self.devices[dict(metadata)["evensong-device"]] = request.public_key
        else:
            verify_request(metadata, method, body, self.devices[dict(metadata)["evensong-device"]], self.clock.now)
        request_id = getattr(request, "request_id", b"")
        assert not request_id or self.bodies.setdefault(request_id, body) == body
        if request_id not in self.answers or name == "BeginUpload":
            response = getattr(self, f"_{name}")(request)
            if not response.HasField("retry"):
                response.retry.earliest_ms, response.retry.latest_ms = self.retry
            self.tamper(name, response)
            answer = response.SerializeToString()
            if request_id and not response.HasField("refusal"):
                self.answers[request_id] = answer
        else:
            answer = self.answers[request_id]
        self._moment(self.after, name)
        return answer

    async def stream(self, method: str, body: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        self.calls.append("Download")
        request = device_pb2.DownloadRequest.FromString(body)
        data = self.blobs[request.sha256]
        for offset in range(request.offset, len(data), self.chunk_bytes):
            self._moment(self.before, "Download")
            part = data[offset : offset + self.chunk_bytes]
            response = device_pb2.DownloadResponse(
                total_bytes=len(data), chunk=common_pb2.BlobChunk(offset=offset, data=part, crc32c=crc32c(part))
            )
            self.tamper("Download", response)
            yield response.SerializeToString()
            self._moment(self.after, "Download")

    async def close(self) -> None:
        pass

    def _moment(self, hook: Callable[[int, str], None], method: str) -> None:
        self.moments += 1
        hook(self.moments, method)

    # the calls

    def _Enrol(self, request: device_pb2.EnrolRequest) -> device_pb2.EnrolResponse:  # noqa: N802
        return device_pb2.EnrolResponse(
            device_id=sha256(request.public_key)[:16].hex(), signer_public_key=public_key_of(self.signer)
        )

    def _CheckIn(self, request: device_pb2.CheckInRequest) -> device_pb2.CheckInResponse:  # noqa: N802
        response = device_pb2.CheckInResponse()
        if self.serve:
            response.serving.add(task_id=self.task_id, bundle=self.bundle, version=self.version)
        if self.give:
            self.round += 1
            response.assignment.CopyFrom(
                device_pb2.Assignment(
                    lease=common_pb2.Lease(
                        lease_id=f"lease-{self.round}",
                        fencing_token=self.round,
                        expires_unix_ms=self.clock.now + self.lease_ms,
                    ),
                    work=self.give.pop(0),
                    task_id=self.task_id,
                    round=self.round,
                    bundle=self.bundle,
                    version=self.version,
                )
            )
        return response

    def _BeginUpload(self, request: device_pb2.BeginUploadRequest) -> device_pb2.BeginUploadResponse:  # noqa: N802
        name = f"upload-{request.lease.lease_id}"
        _, data = self.uploads.setdefault(name, (request.update, bytearray()))
        return device_pb2.BeginUploadResponse(upload_id=name, received_bytes=len(data), chunk_bytes=self.chunk_bytes)

    def _UploadChunk(self, request: device_pb2.UploadChunkRequest) -> device_pb2.UploadChunkResponse:  # noqa: N802
        if request.upload_id not in self.uploads:
            return device_pb2.UploadChunkResponse(refusal=refusal(common_pb2.REFUSAL_REASON_NOT_FOUND))
        update, data = self.uploads[request.upload_id]
        try:
            part = check_chunk(request.chunk, len(data), update.size_bytes, 1 << 20)
        except CorruptError as error:
            bad = refusal(common_pb2.REFUSAL_REASON_BAD_CHUNK, str(error))
            return device_pb2.UploadChunkResponse(refusal=bad, received_bytes=len(data))
        if part is not ALREADY_THERE:
            data += part
        return device_pb2.UploadChunkResponse(received_bytes=len(data))

    def _CommitUpload(self, request: device_pb2.CommitUploadRequest) -> device_pb2.CommitUploadResponse:  # noqa: N802
        if request.upload_id not in self.uploads:
            return device_pb2.CommitUploadResponse(refusal=refusal(common_pb2.REFUSAL_REASON_NOT_FOUND))
        update, data = self.uploads[request.upload_id]
        assert sha256(bytes(data)) == update.sha256
        self.committed.append(Committed(request.weight, request.metrics, self.update_of(bytes(data))))
        return device_pb2.CommitUploadResponse()

    def _Report(self, request: device_pb2.ReportRequest) -> device_pb2.ReportResponse:  # noqa: N802
        self.reports.append(request.metrics)
        return device_pb2.ReportResponse()

    def _Abort(self, request: device_pb2.AbortRequest) -> device_pb2.AbortResponse:  # noqa: N802
        self.aborts.append((request.reason, request.message))
        return device_pb2.AbortResponse()


def refusal(reason: int, message: str = "no") -> common_pb2.Refusal:
    return common_pb2.Refusal(reason=reason, message=message)


def device_for(coordinator: Coordinator, state_dir=None, *, examples: int = 40, **options) -> Device:
    """A deterministic device for ``coordinator``, with ``examples`` to train on and half as many to test on."""
    options = {"conditions": AlwaysReady(), "seed": 1, "run_blocking": inline, "clock": coordinator.clock} | options
    device = Device(state_dir, coordinator="in-memory", token=coordinator.token, transport=coordinator, **options)
    if examples and not device.examples.count():
        shape = coordinator.features, coordinator.classes
        device.examples.add_many(*tiny_examples(examples, 1, *shape))
        device.examples.add_many(*tiny_examples(examples // 2, 2, *shape), split="test")
    return device


def lose(moments: Collection[int]) -> Callable[[int, str], None]:
    """For ``before`` and ``after``: what would cross the network at these moments is lost."""

    def hook(moment: int, method: str) -> None:
        if moment in moments:
            raise UnreachableError(f"{method} was lost at moment {moment}")

    return hook


def step_until(device: Device, kind: type[Outcome], *, most: int = 100) -> Outcome:
    """Steps and lets the told time pass until an outcome of ``kind``."""
    for _ in range(most):
        outcome = device.step()
        if isinstance(outcome, kind):
            return outcome
        device._context.clock.now += int(outcome.wait_s * 1000)
    raise AssertionError(f"no {kind.__name__} in {most} steps")
