"""SIGKILL around a private server step: the ledger and the version stand or fall together, and no noise is drawn twice.

The proof is read from the files: each version is its journal's sum under the noise of its ledger entry, and no other.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from daemon_process import PATIENCE_S, Connection, Daemon
from tiny_device import TinyDevice

from evensong.coordinator.privacy.accounting import Accounting
from evensong.coordinator.privacy.keys import load_noise_key
from evensong.coordinator.privacy.mechanism import Total, release
from evensong.v1 import operator_pb2, task_pb2
from evensong.wire.codecs import UpdateCodec
from evensong.wire.tensors import decode_tensors, encode_tensors

SHAPES = {"weight": (20, 30), "bias": (20,)}
GOAL, ROUNDS = 2, 4
CODEC = UpdateCodec(bits=None)
PRIVACY = task_pb2.PrivacyPlan(
    mechanism=task_pb2.PRIVACY_MECHANISM_CENTRAL_GAUSSIAN,
    epsilon=20.0,
    delta=1e-5,
    noise_multiplier=1.0,
    sampling=task_pb2.SAMPLING_NONE,
)


async def insist(attempt: Callable[[], Awaitable[Any]]) -> Any:
    """Repeats while the daemon is down."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await attempt()
        except grpc.aio.AioRpcError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


class Worker:
    """A device that knows what it sent: round -> clipped update."""

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self.device = TinyDevice(Connection(daemon), seed, lambda: time.time_ns() // 1_000_000)
        self.sent: dict[int, np.ndarray] = {}

    async def work(self, layout: Any, over: asyncio.Event) -> None:
        while not over.is_set():
            answer = await insist(lambda: self.device.check_in(wait_ms=100))
            if not answer.HasField("assignment"):
                await asyncio.sleep(0.01)
                continue
            lease, number = answer.assignment.lease, answer.assignment.round
            flat = np.random.default_rng((number, self.device.now())).normal(size=620).astype(np.float32)
            flat *= np.float32(0.9) / np.linalg.norm(flat)
            delta = {"weight": flat[:600].reshape(20, 30), "bias": flat[600:]}
            data = CODEC.encode(delta, layout, self.device.rng)
            try:
                upload_id = await self.device.upload(lease, data)
            except (grpc.aio.AioRpcError, AssertionError):
                continue
            request_id = self.device.rng.bytes(16)
            committed = await insist(
                lambda lease=lease, upload_id=upload_id, request_id=request_id: self.device.commit(  # type: ignore[misc]
                    upload_id, lease, weight=1.0, request_id=request_id
                )
            )
            if not committed.HasField("refusal"):
                self.sent[number] = flat


@pytest.mark.parametrize("point", ["commit.after_blobs", "commit.before_commit", "commit.after_commit"])
def test_a_kill_around_the_commit_spends_each_release_once(tmp_path: Path, point: str) -> None:
    daemon = Daemon(tmp_path / "data")

    async def run() -> tuple[list[Worker], str, Any]:
        daemon.start(crash_at=f"{point}:2")
        connection = Connection(daemon)
        task_id, layout = await connection.submit(
            SHAPES,
            lambda layout: encode_tensors({s.name: np.zeros(s.shape, np.float32) for s in layout}, layout),
            goal=GOAL,
            minimum=2,
            rounds=ROUNDS,
            strategy="fedavg",
            weighting=task_pb2.WEIGHTING_UNIFORM,
            max_weight=1.0,
            privacy=PRIVACY,
        )
        token = await connection.token(GOAL)
        workers, over = [Worker(daemon, seed) for seed in range(GOAL)], asyncio.Event()
        for worker in workers:
            assert not (await worker.device.enrol(token)).HasField("refusal")
        working = [asyncio.create_task(worker.work(layout, over)) for worker in workers]
        while daemon.exit_code is None:
            await asyncio.sleep(0.01)
        assert daemon.exit_code == -signal.SIGKILL
        before = daemon.query("select * from privacy_ledger")
        assert len(before) == len(daemon.query("select * from versions where number > 0"))
        daemon.start()
        request = operator_pb2.GetTaskRequest(task_id=task_id)
        deadline = time.monotonic() + PATIENCE_S
        while (await insist(lambda: connection.operator("GetTask", request))).task.version < ROUNDS:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        over.set()
        await asyncio.gather(*working)
        ledger = operator_pb2.ReadPrivacyLedgerRequest(task_id=task_id)
        entries = (await connection.operator("ReadPrivacyLedger", ledger)).entries
        assert [entry.version for entry in entries] == [1, 2, 3, 4]
        assert [tuple(row) for row in daemon.query("select * from privacy_ledger")][: len(before)] == [
            tuple(row) for row in before
        ]
        accounting = Accounting(PRIVACY.mechanism, 1.0, 1e-5)
        assert [entry.epsilon for entry in entries] == [accounting.epsilon(n) for n in (1, 2, 3, 4)]
        for worker in workers:
            await worker.device.dispatcher.close()  # type: ignore[attr-defined]
        await connection.close()
        daemon.terminate()
        assert daemon.join() == 0
        return workers, task_id, layout

    try:
        workers, task_id, layout = asyncio.run(run())
        _prove(daemon, workers, task_id, layout)
    finally:
        daemon.close()


def _prove(daemon: Daemon, workers: list[Worker], task_id: str, layout: Any) -> None:
    assert (daemon.folder / "noise.key").stat().st_mode & 0o777 == 0o600
    key = load_noise_key(daemon.folder / "noise.key")
    bundle = task_pb2.TaskBundle.FromString(daemon.query("select payload from bundles")[0]["payload"])
    before = np.zeros(620, np.float32)
    for version in daemon.query("select * from versions where number > 0 order by number"):
        total = np.zeros(620)
        journal = "select device_id from journal join rounds using (round_id) where number = {} order by entry"
        for row in daemon.query(journal.format(version["round"])):
            (sender,) = (worker for worker in workers if worker.device.device_id == row["device_id"])
            total += sender.sent[version["round"]].astype(np.float64)
        released = release(
            bundle,
            Total(total, GOAL, GOAL),
            clip_norm=1.0,
            key=key,
            task_id=task_id,
            round=version["round"],
        )
        blob = daemon.folder / "blobs" / version["parameters_sha256"][:2] / version["parameters_sha256"]
        tensors = decode_tensors(blob.read_bytes(), layout)
        after = np.concatenate([tensors[spec.name].reshape(-1) for spec in layout])
        np.testing.assert_allclose(after - before, released.mean, atol=1e-5)
        before = after
