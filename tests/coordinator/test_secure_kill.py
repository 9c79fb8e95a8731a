"""SIGKILL in every stage of secure rounds, and at random times: a round goes on or ends without a sum, each version is
the exact sum of its cohort, and no two secrets of one device ever leave the others.

The proof is read from the database, the blobs, and every message that a device sent or got.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from crashing import crash_at_each_point, crash_at_random_times
from daemon_process import PATIENCE_S, Connection, Daemon
from secure_device import SecureDevice, secure_plan

from evensong.coordinator.fault import CRASH_POINTS
from evensong.v1 import common_pb2, device_pb2, operator_pb2, secagg_pb2
from evensong.wire.rotation import rotation_seed
from evensong.wire.tensors import Layout, decode_tensors, encode_tensors

pytestmark = pytest.mark.secagg

SHAPES = {"weight": (10, 20), "bias": (7,)}
DEVICES = 7
POINTS = [point for point in CRASH_POINTS if point.startswith("secure.")]


class Stubborn(SecureDevice):
    """Repeats a call, byte for byte, until it is answered; leaves the protocol now and then."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        super().__init__(Connection(fleet.daemon), seed, lambda: time.time_ns() // 1_000_000)
        self.fleet = fleet
        self.luck = random.Random(seed)

    async def send(self, method: str, request: Any, response_type: type[Any], *, time: int | None = None) -> Any:
        if method == "Secure":
            self.fleet.note(self, request)
        response = await self._insist(method, request, response_type)
        if method == "Secure":
            self.fleet.note_answer(self, response)
        return response

    async def _insist(self, method: str, request: Any, response_type: type[Any]) -> Any:
        for _ in range(round(PATIENCE_S / 0.02)):
            try:
                response = await super().send(method, request, response_type)
                pending = method == "Secure" and not response.HasField("refusal") and not response.WhichOneof("next")
                if response.refusal.reason != common_pb2.REFUSAL_REASON_UNAVAILABLE and not pending:
                    return response
            except grpc.aio.AioRpcError:
                pass
            if self.fleet.over:
                raise asyncio.CancelledError
            await asyncio.sleep(0.02)
        raise AssertionError(f"{method} is not answered")

    async def live(self, token: str) -> None:
        await self.enrol(token)
        while not self.fleet.over:
            answer = await self.check_in(wait_ms=200)
            if not answer.HasField("assignment"):
                continue
            self.take(answer.assignment)
            self.fleet.vectors[answer.assignment.round, self.device_id] = self
            leave = self.luck.choice(["shares", "masked", "commit", "unmask"]) if self.luck.random() < 0.1 else ""
            self.fleet.plain[answer.assignment.round, self.device_id] = self.plain.copy()
            self.fleet.sessions[answer.assignment.round] = self.plan, self.session_fields
            await self.take_part(leave)

    def take(self, assignment: device_pb2.Assignment) -> None:
        """Drawn once a round, as a device trains once."""
        super().take(assignment)
        known = self.fleet.plain.get((assignment.round, self.device_id))
        if known is not None:
            self.plain = known.copy()


class Fleet:
    """Devices that take part without end, and all that they said and heard."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.over = False
        self.idle = False
        self.layout: Layout = ()
        self.task_id = ""
        self.vectors: dict[tuple[int, str], Stubborn] = {}
        self.plain: dict[tuple[int, str], Any] = {}
        self.sessions: dict[int, Any] = {}
        self.revealed: dict[tuple[int, int, str], set[bytes]] = defaultdict(set)
        self.signed: dict[tuple[int, int, str], set[bytes]] = defaultdict(set)
        self.survivors: dict[tuple[int, int], set[bytes]] = defaultdict(set)
        self.rosters: dict[tuple[int, int], set[bytes]] = defaultdict(set)
        self.devices = [Stubborn(self, seed) for seed in range(DEVICES)]

    def note(self, device: Stubborn, request: secagg_pb2.SecureRequest) -> None:
        key = device.assignment.round, request.attempt, device.device_id
        if request.HasField("unmask"):
            self.revealed[key].add(request.unmask.shares)
        if request.HasField("commit"):
            self.signed[key].add(request.commit.signature)

    def note_answer(self, device: Stubborn, response: secagg_pb2.SecureResponse) -> None:
        key = device.assignment.round, device.attempt
        if response.HasField("survivors"):
            self.survivors[key].add(response.survivors.survivors)
        if response.HasField("quorum"):
            self.survivors[key].add(response.quorum.survivors)
        if response.HasField("roster"):
            self.rosters[key].add(response.roster.SerializeToString())

    async def begin(self) -> list[asyncio.Task[None]]:
        connection = Connection(self.daemon)
        self.task_id, self.layout = await connection.submit(
            SHAPES,
            lambda layout: encode_tensors({s.name: np.zeros(s.shape, np.float32) for s in layout}, layout),
            goal=DEVICES - 1,
            minimum=4,
            over_selection=DEVICES / (DEVICES - 1),
            deadline_ms=2_000,
            rounds=100_000,
            strategy="fedavg",
            secure=secure_plan(DEVICES - 1, places=DEVICES, min_survivors=3, stage_ms=300),
        )
        token = await connection.token(DEVICES)
        await connection.close()
        return [asyncio.create_task(device.live(token)) for device in self.devices]

    async def end(self, working: list[asyncio.Task[None]]) -> None:
        """Lets one more round through, then stops the devices and the daemon."""
        connection = Connection(self.daemon)

        async def version() -> int:
            request = operator_pb2.GetTaskRequest(task_id=self.task_id)
            return int((await connection.operator("GetTask", request)).task.version)

        goal, deadline = await version() + 1, time.monotonic() + PATIENCE_S
        while await version() < goal and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.over = True
        for task, result in zip(working, await asyncio.gather(*working, return_exceptions=True), strict=True):
            assert task.cancelled() or not isinstance(result, Exception), result
        await connection.close()
        for device in self.devices:
            await device.dispatcher.close()  # type: ignore[attr-defined]
        self.daemon.terminate()
        assert self.daemon.join() == 0


def prove(fleet: Fleet) -> int:
    """Each version is its cohort's exact sum, counted once; in each attempt there was one story for all."""
    daemon = fleet.daemon
    journal = daemon.query(
        "select journal.device_id, rounds.number from journal join rounds using (round_id) order by entry"
    )
    assert max(Counter((row["number"], row["device_id"]) for row in journal).values()) == 1
    parameters = np.zeros(sum(spec.size for spec in fleet.layout), np.float32)
    versions = daemon.query("select * from versions order by number")
    for version in versions[1:]:
        cohort = [row["device_id"] for row in journal if row["number"] == version["round"]]
        assert len(cohort) == version["reports"] == version["total_weight"] >= 4
        plan, session = fleet.sessions[version["round"]]
        total = np.zeros(plan.fields.lanes, np.uint64)
        for device_id in cohort:
            total += fleet.plain[version["round"], device_id]
        seed = rotation_seed(session["bundle_sha256"], session["work"], session["round"])
        summed = plan.decode(total, len(cohort), clip_norm=1.0, seed=seed)
        blob = daemon.folder / "blobs" / version["parameters_sha256"][:2] / version["parameters_sha256"]
        committed = np.concatenate([v.reshape(-1) for v in decode_tensors(blob.read_bytes(), fleet.layout).values()])
        expected = parameters + summed.update / summed.total_weight
        np.testing.assert_allclose(committed, expected, rtol=1e-6, atol=1e-6)
        parameters = committed
        assert version["training_examples"] == 10 * len(cohort)
    # With one roster and one survivor set in an attempt, a holder's one answer gives one secret of each neighbour.
    for what, sets in (("rosters", fleet.rosters), ("survivor sets", fleet.survivors)):
        assert all(len(shown) == 1 for shown in sets.values()), f"two {what} in one attempt"
    assert all(len(words) == 1 for words in fleet.signed.values()), "a device signed twice"
    assert all(len(words) == 1 for words in fleet.revealed.values()), "a device revealed twice"
    revealed_attempts: dict[tuple[int, str], set[int]] = defaultdict(set)
    for number, attempt, device_id in fleet.revealed:
        revealed_attempts[number, device_id].add(attempt)
    assert all(len(attempts) == 1 for attempts in revealed_attempts.values()), "an update was revealed in two cohorts"
    return len(versions) - 1


def test_a_kill_at_every_line_that_matters_keeps_the_sum_and_the_secrets(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "data")
    try:
        assert prove(asyncio.run(crash_at_each_point(daemon, Fleet, POINTS))) > 0
    finally:
        daemon.close()


@pytest.mark.parametrize("crashes", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_at_random_times_keep_the_sum_and_the_secrets(tmp_path: Path, crashes: int) -> None:
    daemon = Daemon(tmp_path / "data")
    try:
        assert prove(asyncio.run(crash_at_random_times(daemon, Fleet, crashes))) > 0
    finally:
        daemon.close()
