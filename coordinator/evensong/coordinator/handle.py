"""The light handle: what engineers and operators use to talk to a coordinator. Needs only grpc and the contract.

    with Coordinator.connect() as coordinator:
        task = coordinator.submit(Task("digits", artifact, rounds=20))
        for event in task.watch():
            print(event.kind, event.metrics)
        parameters = task.download()

Every call that changes something carries an id made once, so that it is repeated safely while the network fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import grpc

from evensong.coordinator.credentials import AccessError, Tls, find_token, is_loopback
from evensong.coordinator.task import Task
from evensong.coordinator.views import DeviceStatus, IssuedToken, PrivacyLedger, TaskEvent, TaskStatus, Version
from evensong.v1 import common_pb2, operator_pb2, operator_pb2_grpc
from evensong.wire.chunks import ALREADY_THERE, check_chunk, sha256, split
from evensong.wire.errors import CorruptError, EvensongError, UnreachableError
from evensong.wire.signing import new_request_id
from evensong.wire.tensors import FloatArray, decode_tensors, layout_from_proto

DEFAULT_ADDRESS = "127.0.0.1:8470"

_CHUNK_BYTES = 256 << 10
_MAX_MESSAGE_BYTES = 64 << 20
_PAUSES = (0.1, 0.3, 1.0, 2.0)  # seconds between repetitions of a call
_WATCH_PAUSES = tuple(chain(_PAUSES, repeat(5.0, 12)))  # a coordinator may be restarted while somebody watches
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

T = TypeVar("T")


class RejectedError(EvensongError):
    """The coordinator refused a call because of what it asks; the message is the coordinator's."""


class NotFoundError(RejectedError):
    """There is no such task, version, device or blob."""


class Coordinator:
    """A connection to one coordinator. Safe for use from several threads."""

    def __init__(self, channel: grpc.Channel, token: str, address: str, timeout: float) -> None:
        self.address = address
        self._channel = channel
        self._stub = operator_pb2_grpc.OperatorServiceStub(channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._timeout = timeout

    @classmethod
    def connect(
        cls,
        address: str = DEFAULT_ADDRESS,
        token: str | Path | None = None,
        tls: Tls | bool | None = None,
        *,
        timeout: float = 30.0,
    ) -> Coordinator:
        """Connects, and makes sure that the coordinator is there and takes the token.

        ``token``: the text, or a Path to its file; by default the variable ``EVENSONG_OPERATOR_TOKEN``, or the file
        of a coordinator on this machine. ``tls``: by default plain on loopback and TLS elsewhere; True takes the
        system's authorities, False insists on plain. ``timeout``: seconds for each single call. Raises
        :class:`UnreachableError` or :class:`AccessError`.
        """
        if tls is None:
            tls = not is_loopback(address)
        text = find_token(token, address)
        options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
        if tls:
            credentials = (Tls() if tls is True else tls).credentials()
            channel = grpc.secure_channel(address, credentials, options)
        else:
            channel = grpc.insecure_channel(address, options)
        coordinator = cls(channel, text, address, timeout)
        try:
            coordinator._call(coordinator._stub.ListDevices, operator_pb2.ListDevicesRequest(limit=1))
        except BaseException:
            coordinator.close()
            raise
        return coordinator

    def close(self) -> None:
        """Ends the connection; running watches end with an error."""
        self._channel.close()

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------ tasks

    def submit(self, task: Task) -> TaskHandle:
        """Uploads the artifact and its initial parameters, and starts the task."""
        request = operator_pb2.SubmitTaskRequest(
            request_id=new_request_id(),
            bundle=task.to_bundle(),
            initial_parameters=self._upload(task.encoded_parameters()),
        )
        self._upload(task.artifact_bytes)
        return TaskHandle(self, self._call(self._stub.SubmitTask, request).task_id)

    def tasks(self) -> list[TaskStatus]:
        """All tasks, the oldest first."""
        response = self._call(self._stub.ListTasks, operator_pb2.ListTasksRequest())
        return [TaskStatus.of(status) for status in response.tasks]

    def task(self, task_id: str) -> TaskStatus:
        """One task as it stands now."""
        return TaskStatus.of(self._call(self._stub.GetTask, operator_pb2.GetTaskRequest(task_id=task_id)).task)

    def handle(self, task_id: str) -> TaskHandle:
        """For a task that was submitted before."""
        return TaskHandle(self, self.task(task_id).task_id)

    def stop(self, task_id: str) -> None:
        """No new rounds; the open one is abandoned."""
        self._call(self._stub.StopTask, operator_pb2.StopTaskRequest(request_id=new_request_id(), task_id=task_id))

    def watch(self, task_id: str, after: int = 0) -> Iterator[TaskEvent]:
        """The task's events with a sequence above ``after``: past ones at once, then live, until the task ends.

        Goes on by itself where the network fails or the coordinator restarts; :class:`UnreachableError` after a minute.
        """
        pauses = iter(_WATCH_PAUSES)
        while True:
            request = operator_pb2.WatchTaskRequest(task_id=task_id, after_sequence=after)
            stream = self._stub.WatchTask(request, metadata=self._metadata)
            try:
                for response in stream:
                    after = response.event.sequence
                    pauses = iter(_WATCH_PAUSES)
                    yield TaskEvent.of(response.event)
                return
            except grpc.RpcError as error:
                self._pause_or_raise(error, pauses)
            finally:
                stream.cancel()

    # --------------------------------------------------------------------------------------------------------- versions

    def versions(self, task_id: str) -> list[Version]:
        """All committed versions of a task, from 0."""
        response = self._call(self._stub.ListVersions, operator_pb2.ListVersionsRequest(task_id=task_id))
        return [Version.of(info) for info in response.versions]

    def download(self, task_id: str, version: int | None = None) -> dict[str, FloatArray]:
        """The parameters of a version, by default the one that is served: float32 arrays in the author's shapes.

        The bytes are checked against the version's content address.
        """
        layout = layout_from_proto(self.task(task_id).bundle.layout)
        wanted = self._version(task_id, version)
        return decode_tensors(self._download(wanted.parameters_sha256, wanted.parameters_bytes), layout)

    def download_artifact(self, task_id: str) -> bytes:
        """The task's artifact, as devices fetch it."""
        artifact = self.task(task_id).bundle.artifact
        return self._download(artifact.sha256, artifact.size_bytes)

    def promote(self, task_id: str, version: int) -> None:
        """Devices predict with this version from now on, and training goes on from it."""
        request = operator_pb2.PromoteVersionRequest(request_id=new_request_id(), task_id=task_id, version=version)
        self._call(self._stub.PromoteVersion, request)

    def rollback(self, task_id: str) -> int:
        """Promotes the parent of the version that is served, and returns its number."""
        serving = self._version(task_id, None)
        if serving.number == 0:
            raise RejectedError("there is nothing to roll back to", got="version 0 is served")
        self.promote(task_id, serving.parent)
        return serving.parent

    def _version(self, task_id: str, number: int | None) -> Version:
        versions = self.versions(task_id)
        for version in versions:
            if version.number == number or (number is None and version.serving):
                return version
        raise NotFoundError(
            "there is no such version",
            expected=f"0 to {max(v.number for v in versions)}" if versions else None,
            got=number,
        )

    # ---------------------------------------------------------------------------------------------------------- privacy

    def privacy(self, task_id: str = "", *, population: str = "") -> PrivacyLedger:
        """What a task, or all tasks of a population, have spent of their privacy, release by release."""
        request = operator_pb2.ReadPrivacyLedgerRequest(task_id=task_id, population=population)
        return PrivacyLedger.of(self._call(self._stub.ReadPrivacyLedger, request))

    # ---------------------------------------------------------------------------------------------------------- devices

    def create_token(self, population: str = "default", uses: int = 1, lifetime: float = 24 * 3600.0) -> IssuedToken:
        """A token with which ``uses`` devices may enrol within ``lifetime`` seconds."""
        if uses < 1 or not lifetime > 0:
            raise RejectedError("a token must be usable", expected="uses >= 1 and lifetime > 0", got=(uses, lifetime))
        request = operator_pb2.CreateEnrolmentTokenRequest(
            request_id=new_request_id(), population=population, uses=uses, lifetime_ms=max(1, round(lifetime * 1000))
        )
        response = self._call(self._stub.CreateEnrolmentToken, request)
        return IssuedToken.of(response)

    def devices(self) -> Iterator[DeviceStatus]:
        """All devices by their id, fetched page by page."""
        last = ""
        while True:
            request = operator_pb2.ListDevicesRequest(after_device_id=last, limit=1000)
            page: Sequence[operator_pb2.DeviceInfo] = self._call(self._stub.ListDevices, request).devices
            if not page:
                return
            yield from (DeviceStatus.of(info) for info in page)
            last = page[-1].device_id

    def revoke(self, device_id: str) -> None:
        """The device's calls are refused from now on; what it contributed stays."""
        request = operator_pb2.RevokeDeviceRequest(request_id=new_request_id(), device_id=device_id)
        self._call(self._stub.RevokeDevice, request)

    # ------------------------------------------------------------------------------------------------------------ calls

    def _call(self, method: Callable[..., T], request: object) -> T:
        return self._repeat(lambda: method(request, timeout=self._timeout, metadata=self._metadata))

    def _upload(self, data: bytes) -> common_pb2.BlobRef:
        def attempt() -> operator_pb2.UploadBlobResponse:
            parts = (operator_pb2.UploadBlobRequest(chunk=chunk) for chunk in split(data, _CHUNK_BYTES))
            response: operator_pb2.UploadBlobResponse = self._stub.UploadBlob(parts, metadata=self._metadata)
            return response

        blob = self._repeat(attempt).blob
        if blob.sha256 != sha256(data) or blob.size_bytes != len(data):
            raise CorruptError("the coordinator stored other bytes than it was sent", got=blob.sha256.hex())
        return blob

    def _download(self, expected_sha256: bytes, size: int) -> bytes:
        received = bytearray()

        def attempt() -> None:
            request = operator_pb2.DownloadBlobRequest(sha256=expected_sha256, offset=len(received))
            for response in self._stub.DownloadBlob(request, metadata=self._metadata):
                part = check_chunk(response.chunk, len(received), size, _MAX_MESSAGE_BYTES)
                if part != ALREADY_THERE:
                    received.extend(part)

        self._repeat(attempt)
        if sha256(received) != expected_sha256:
            raise CorruptError(
                "the coordinator sent other bytes than their address says",
                expected=expected_sha256.hex(),
                got=f"{sha256(received).hex()} ({len(received)} of {size} bytes)",
            )
        return bytes(received)

    def _repeat(self, attempt: Callable[[], T]) -> T:
        pauses = iter(_PAUSES)
        while True:
            try:
                return attempt()
            except grpc.RpcError as error:
                self._pause_or_raise(error, pauses)

    def _pause_or_raise(self, error: grpc.RpcError, pauses: Iterator[float]) -> None:
        """Waits if the failure may pass and there is patience left; else raises what the status means."""
        code, details = error.code(), error.details() or ""
        pause = next(pauses, None) if code in _PASSING else None
        if pause is not None:
            time.sleep(pause)
            return
        if code in _PASSING:
            raise UnreachableError(
                f"the coordinator at {self.address} does not answer",
                got=details,
                fix="Is `evensong coordinator serve` running there, and does it (not) speak TLS as you do?",
            ) from None
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise AccessError(f"the coordinator at {self.address} refused the token", got=details) from None
        if code == grpc.StatusCode.NOT_FOUND:
            raise NotFoundError(details) from None
        raise RejectedError(f"the coordinator refused ({code.name}): {details}") from None


@dataclass(frozen=True)
class TaskHandle:
    """One task on one coordinator."""

    coordinator: Coordinator
    task_id: str

    def status(self) -> TaskStatus:
        """The task as it stands now."""
        return self.coordinator.task(self.task_id)

    def watch(self, after: int = 0) -> Iterator[TaskEvent]:
        """See :meth:`Coordinator.watch`."""
        return self.coordinator.watch(self.task_id, after)

    def wait(self) -> TaskStatus:
        """Returns when the task has ended."""
        for _ in self.watch():
            pass
        return self.status()

    def versions(self) -> list[Version]:
        """All committed versions, from 0."""
        return self.coordinator.versions(self.task_id)

    def download(self, version: int | None = None) -> dict[str, FloatArray]:
        """See :meth:`Coordinator.download`."""
        return self.coordinator.download(self.task_id, version)

    def promote(self, version: int) -> None:
        """See :meth:`Coordinator.promote`."""
        self.coordinator.promote(self.task_id, version)

    def rollback(self) -> int:
        """See :meth:`Coordinator.rollback`."""
        return self.coordinator.rollback(self.task_id)

    def privacy(self) -> PrivacyLedger:
        """See :meth:`Coordinator.privacy`."""
        return self.coordinator.privacy(self.task_id)

    def stop(self) -> None:
        """See :meth:`Coordinator.stop`."""
        self.coordinator.stop(self.task_id)
