"""SIGKILL at every critical line of a round, and at random times: nothing accepted is lost, nothing is counted twice.

The proof is read from the database file and the blobs, and recomputed from what the devices know they sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from crashing import crash_at_each_point, crash_at_random_times
from daemon_process import PATIENCE_S, Connection, Daemon
from tiny_device import POPULATION, RUNTIME, TinyDevice

from evensong.coordinator.fault import CRASH_POINTS
from evensong.v1 import common_pb2, device_pb2, operator_pb2
from evensong.wire.chunks import split
from evensong.wire.codecs import UpdateCodec
from evensong.wire.signing import new_request_id, public_key_of
from evensong.wire.tensors import Layout, decode_tensors, encode_tensors

SHAPES = {"weight": (40, 50), "bias": (40,)}
DEVICES, GOAL, DEADLINE_MS = 4, 3, 1_500
CODEC = UpdateCodec(bits=None)
POINTS = [point for point in CRASH_POINTS if not point.startswith("secure.")]


class Stubborn:
    """A device that repeats a call, byte for byte, until it is answered, and remembers what was acknowledged."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.device = TinyDevice(Connection(fleet.daemon), seed, lambda: time.time_ns() // 1_000_000)
        self.sent: dict[str, dict[str, Any]] = {}
        self.acknowledged: list[tuple[int, str, float]] = []

    async def insist(self, method: str, request: Any, response_type: type[Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                response = await self.device.send(method, request, response_type)
                if response.refusal.reason != common_pb2.REFUSAL_REASON_UNAVAILABLE:
                    return response
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.02)
        raise AssertionError(f"{method} is not answered")

    async def live(self, token: str) -> None:
        enrolled = await self.insist(
            "Enrol",
            device_pb2.EnrolRequest(
                request_id=new_request_id(),
                token=token,
                public_key=public_key_of(self.device.key),
                population=POPULATION,
            ),
            device_pb2.EnrolResponse,
        )
        assert not enrolled.HasField("refusal"), enrolled
        while not self.fleet.over:
            answer = await self.insist(
                "CheckIn",
                device_pb2.CheckInRequest(
                    request_id=new_request_id(),
                    population=POPULATION,
                    runtime_version=RUNTIME,
                    memory_bytes=1 << 30,
                    training_examples=10,
                    evaluation_examples=10,
                    wait_ms=100,
                ),
                device_pb2.CheckInResponse,
            )
            if not answer.HasField("assignment"):
                continue
            while self.fleet.idle and not self.fleet.over:
                await asyncio.sleep(0.01)
            if answer.assignment.work == device_pb2.WORK_TRAIN:
                await self.train(answer.assignment)
            else:
                metrics = common_pb2.Metrics(examples=4, loss_sum=1.0, correct=2)
                request = device_pb2.ReportRequest(
                    request_id=new_request_id(), lease=answer.assignment.lease, metrics=metrics
                )
                await self.insist("Report", request, device_pb2.ReportResponse)

    async def train(self, assignment: device_pb2.Assignment) -> None:
        delta = {spec.name: self.device.rng.normal(size=spec.shape).astype(np.float32) for spec in self.fleet.layout}
        data = CODEC.encode(delta, self.fleet.layout, self.device.rng)
        sha256 = hashlib.sha256(data)
        self.sent[sha256.hexdigest()] = delta
        weight = float(self.device.rng.integers(1, 100))
        begin = device_pb2.BeginUploadRequest(
            request_id=new_request_id(),
            lease=assignment.lease,
            update=common_pb2.BlobRef(sha256=sha256.digest(), size_bytes=len(data)),
        )
        begun = await self.insist("BeginUpload", begin, device_pb2.BeginUploadResponse)
        while not begun.HasField("refusal") and begun.received_bytes < len(data):
            chunk = next(split(data, 2_000, begun.received_bytes))
            request = device_pb2.UploadChunkRequest(upload_id=begun.upload_id, lease=assignment.lease, chunk=chunk)
            answer = await self.insist("UploadChunk", request, device_pb2.UploadChunkResponse)
            if answer.HasField("refusal"):
                begin.request_id = new_request_id()
                begun = await self.insist("BeginUpload", begin, device_pb2.BeginUploadResponse)
            else:
                begun.received_bytes = answer.received_bytes
        if begun.HasField("refusal"):
            return
        commit = device_pb2.CommitUploadRequest(
            request_id=new_request_id(),
            upload_id=begun.upload_id,
            lease=assignment.lease,
            weight=weight,
            metrics=common_pb2.Metrics(examples=10, loss_sum=5.0, correct=7),
        )
        answer = await self.insist("CommitUpload", commit, device_pb2.CommitUploadResponse)
        if not answer.HasField("refusal"):
            self.acknowledged.append((assignment.round, sha256.hexdigest(), weight))


class Fleet:
    """Devices that work without end against a daemon that dies again and again."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.over = False
        self.idle = False
        self.layout: Layout = ()
        self.task_id = ""
        self.devices = [Stubborn(self, seed) for seed in range(DEVICES)]

    async def begin(self) -> list[asyncio.Task[None]]:
        connection = Connection(self.daemon)
        self.task_id, self.layout = await connection.submit(
            SHAPES,
            lambda layout: encode_tensors({s.name: np.zeros(s.shape, np.float32) for s in layout}, layout),
            goal=GOAL,
            minimum=2,
            over_selection=DEVICES / GOAL,
            deadline_ms=DEADLINE_MS,
            rounds=100_000,
            evaluate_every=1,
            evaluation_reports=2,
            strategy="fedavg",
        )
        token = await connection.token(DEVICES)
        await connection.close()
        return [asyncio.create_task(device.live(token)) for device in self.devices]

    async def versions(self, connection: Connection) -> int:
        request = operator_pb2.GetTaskRequest(task_id=self.task_id)
        return int((await connection.operator("GetTask", request)).task.version)

    async def end(self, working: list[asyncio.Task[None]]) -> None:
        """Lets one more round through, then stops the devices and the daemon."""
        self.idle = False
        connection = Connection(self.daemon)
        goal = await self.versions(connection) + 1
        deadline = time.monotonic() + PATIENCE_S
        while await self.versions(connection) < goal and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.over = True
        await asyncio.gather(*working)
        await connection.close()
        for device in self.devices:
            await device.device.dispatcher.close()  # type: ignore[attr-defined]
        self.daemon.terminate()
        assert self.daemon.join() == 0


def prove(fleet: Fleet) -> int:
    """Each acknowledged update stands in the journal once, and each version is what the journal comes to."""
    daemon = fleet.daemon
    journal = daemon.query(
        "select journal.*, rounds.number, rounds.work from journal join rounds using (round_id) order by entry"
    )
    training = [row for row in journal if row["work"] == device_pb2.WORK_TRAIN]
    counted = Counter((row["number"], row["device_id"], row["update_sha256"], row["weight"]) for row in training)
    for device in fleet.devices:
        for number, sha256, weight in device.acknowledged:
            assert counted[number, device.device.device_id, sha256, weight] == 1, "an acknowledged update is lost"
    assert max(Counter((row["round_id"], row["device_id"]) for row in journal).values()) == 1

    sent = {sha256: delta for device in fleet.devices for sha256, delta in device.sent.items()}
    parameters = {spec.name: np.zeros(spec.shape, np.float32) for spec in fleet.layout}
    versions = daemon.query("select * from versions order by number")
    for version in versions[1:]:
        rows = [row for row in training if row["number"] == version["round"]]
        assert GOAL >= len(rows) == version["reports"] >= 2
        total = {name: np.zeros(values.shape) for name, values in parameters.items()}
        for row in rows:
            for name, values in sent[row["update_sha256"]].items():
                total[name] += row["weight"] * values.astype(np.float64)
        weight = sum(row["weight"] for row in rows)
        assert version["total_weight"] == weight
        blob = daemon.folder / "blobs" / version["parameters_sha256"][:2] / version["parameters_sha256"]
        committed = decode_tensors(blob.read_bytes(), fleet.layout)
        for name, values in parameters.items():
            np.testing.assert_allclose(committed[name], values + total[name] / weight, rtol=1e-6, atol=1e-7)
        parameters = committed
        assert version["training_examples"] == 10 * len(rows)

    rounds = daemon.query("select * from rounds order by round_id")
    reports = Counter(row["round_id"] for row in journal)
    assert all(round["reports"] == reports[round["round_id"]] for round in rounds)
    committed_rounds = [r["number"] for r in rounds if r["work"] == device_pb2.WORK_TRAIN and r["state"] == "committed"]
    assert committed_rounds == [version["round"] for version in versions[1:]], (
        "a round was committed not at all or twice"
    )
    accepted = Counter(row["device_id"] for row in journal)
    assert all(row["accepted_reports"] == accepted[row["device_id"]] for row in daemon.query("select * from devices"))
    events = [
        operator_pb2.TaskEvent.FromString(row[0])
        for row in daemon.query("select payload from events order by sequence")
    ]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert sum(event.kind == operator_pb2.EVENT_KIND_REPORT_ACCEPTED for event in events) == len(training)
    return len(versions) - 1


def test_a_kill_at_every_critical_line_loses_and_doubles_nothing(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "data")
    try:
        assert prove(asyncio.run(crash_at_each_point(daemon, Fleet, POINTS))) > 0
    finally:
        daemon.close()


@pytest.mark.parametrize("crashes", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_at_random_times_lose_and_double_nothing(tmp_path: Path, crashes: int) -> None:
    daemon = Daemon(tmp_path / "data")
    try:
        assert prove(asyncio.run(crash_at_random_times(daemon, Fleet, crashes))) > 0
    finally:
        daemon.close()
