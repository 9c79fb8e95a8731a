"""Rounds under a privacy plan, end to end in one process: noise, the fixed denominator, the ledger, the budget."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_device import POPULATION, TinyDevice, World, settle

from evensong.coordinator.errors import OperatorError, StorageError
from evensong.coordinator.privacy.accounting import Accounting
from evensong.v1 import operator_pb2, task_pb2
from evensong.wire.tensors import decode_tensors

CENTRAL = task_pb2.PRIVACY_MECHANISM_CENTRAL_GAUSSIAN
BANDED = task_pb2.PRIVACY_MECHANISM_BANDED_MATRIX


def private_plan(**fields: Any) -> task_pb2.PrivacyPlan:
    values = {"mechanism": CENTRAL, "epsilon": 8, "delta": 1e-5, "sampling": task_pb2.SAMPLING_NONE}
    return task_pb2.PrivacyPlan(**(values | fields))


class PrivateWorld(World):
    """Submits tasks with clipping and a privacy plan."""

    async def submit_private(self, plan: dict[str, Any], **fields: Any) -> str:
        uniform = {"weighting": task_pb2.WEIGHTING_UNIFORM, "max_weight": 1.0}
        return await self.submit(**(uniform | {"privacy": private_plan(**plan)} | fields))

    async def contribute(self, device: TinyDevice, scale: float = 1.0, **fields: Any) -> np.ndarray | None:
        """One update of L2 norm ``scale``; None where the device gets no place."""
        answer = await device.check_in()
        if not answer.HasField("assignment"):
            return None
        flat = device.rng.normal(size=15)
        flat *= scale / np.linalg.norm(flat)
        delta, start = {}, 0
        for spec in self.layout:
            delta[spec.name] = flat[start : start + spec.size].reshape(spec.shape).astype(np.float32)
            start += spec.size
        upload_id = await device.upload(answer.assignment.lease, self.codec.encode(delta, self.layout, device.rng))
        committed = await device.commit(upload_id, answer.assignment.lease, weight=1.0, **fields)
        assert not committed.HasField("refusal"), committed
        await settle()
        return flat

    def ledger(self) -> list[operator_pb2.PrivacyLedgerEntry]:
        request = operator_pb2.ReadPrivacyLedgerRequest(task_id=self.task_id)
        return list(self.core.operators.read_privacy_ledger(request).entries)

    def parameters(self, version: int) -> np.ndarray:
        sha256 = self.versions()[version].manifest.parameters.sha256.hex()
        tensors = decode_tensors(self.core.context.blobs.read(sha256), self.layout)
        return np.concatenate([tensors[spec.name].reshape(-1) for spec in self.layout])


def test_a_round_is_noised_divided_by_the_goal_and_written_down(tmp_path: Path) -> None:
    async def run() -> None:
        async with PrivateWorld(tmp_path / "data") as world:
            await world.submit_private({"noise_multiplier": 0.8}, goal=4, minimum=2, rounds=2, clip_norm=2.0)
            devices = await world.enrol(3)
            updates = [await world.contribute(device, 1.5) for device in devices]
            await world.clock.advance(61_000)  # three of four: the deadline closes the round
            mean = sum(updates) / 4  # type: ignore[arg-type]
            noise = (world.parameters(1) - mean) * 4 / (0.8 * 2.0)
            assert 0.3 < np.linalg.norm(noise) / np.sqrt(15) < 2.5
            (entry,) = world.ledger()
            assert (entry.round, entry.version, entry.devices, entry.clip_norm) == (1, 1, 3, 2.0)
            assert entry.population == POPULATION and entry.noise_multiplier == 0.8 and entry.sampling_probability == 1
            assert entry.epsilon == Accounting(CENTRAL, 0.8, 1e-5).epsilon(1)
            assert world.versions()[1].total_weight == 4

    asyncio.run(run())


def test_no_device_counts_with_more_than_the_clip_norm_whatever_it_sends(tmp_path: Path) -> None:
    async def run() -> None:
        async with PrivateWorld(tmp_path / "data") as world:
            await world.submit_private({"noise_multiplier": 1e-6, "epsilon": 100.0, "delta": 1e-5}, goal=2, rounds=1)

    with pytest.raises(OperatorError, match="first round alone would overspend"):
        asyncio.run(run())

    async def run_loud() -> None:
        async with PrivateWorld(tmp_path / "other") as world:
            await world.submit_private({"noise_multiplier": 0.7, "epsilon": 10.0}, goal=2, rounds=1, clip_norm=1e-3)
            one, two = await world.enrol(2)
            await world.contribute(one, 1e6)
            await world.contribute(two, 1e-3)
            assert np.linalg.norm(world.parameters(1)) < 1e-3 * (2 + 0.7 * 15) / 2

    asyncio.run(run_loud())


def test_a_task_stops_at_its_budget_and_never_after(tmp_path: Path) -> None:
    accounting = Accounting(CENTRAL, 1.0, 1e-5)
    budget = accounting.epsilon(3) + 0.01

    async def run() -> None:
        async with PrivateWorld(tmp_path / "data") as world:
            plan = {"noise_multiplier": 1.0, "epsilon": budget}
            await world.submit_private(plan, goal=2, rounds=50, evaluate_every=10, evaluation_reports=1)
            devices = await world.enrol(2)
            for _ in range(3):
                for device in devices:
                    assert await world.contribute(device) is not None
            assert [entry.epsilon for entry in world.ledger()] == [accounting.epsilon(n) for n in (1, 2, 3)]
            assert world.task().state == operator_pb2.TASK_STATE_RUNNING  # the last version is still evaluated
            lease = (await devices[0].check_in()).assignment.lease
            await devices[0].report(lease)
            await settle()
            task = world.task()
            assert task.state == operator_pb2.TASK_STATE_COMPLETE
            assert "privacy budget is spent" in task.message and task.version == 3
            assert not (await devices[0].check_in()).HasField("assignment")
            assert "privacy budget is spent" in world.events()[-1].message

    asyncio.run(run())


def test_ledger_and_version_are_one_transaction(tmp_path: Path) -> None:
    failures = [StorageError("the disk is full")]

    def full_disk(place: str) -> None:
        if place == "commit.before_commit" and failures:
            raise failures.pop()

    async def run() -> None:
        async with PrivateWorld(tmp_path / "data", fault=full_disk, log_level="error") as world:
            await world.submit_private({"noise_multiplier": 1.0}, goal=2, rounds=2)
            for device in await world.enrol(2):
                await world.contribute(device)
            assert not failures
            assert not world.ledger() and len(world.versions()) == 1
            await world.clock.advance(2_000)  # the step is tried again
            assert len(world.ledger()) == 1 and len(world.versions()) == 2

    asyncio.run(run())


def test_a_step_that_is_computed_again_draws_no_other_noise(tmp_path: Path) -> None:
    failures = [StorageError("killed")]
    seen: list[str] = []

    def fault(place: str) -> None:
        if place == "commit.after_blobs":
            blobs = tmp_path / "data" / "blobs"
            seen.append(",".join(sorted(path.name for path in blobs.rglob("*") if path.is_file())))
            if failures:
                raise failures.pop()

    async def run() -> None:
        async with PrivateWorld(tmp_path / "data", fault=fault, log_level="error") as world:
            await world.submit_private({"noise_multiplier": 1.0}, goal=2, rounds=2)
            for device in await world.enrol(2):
                await world.contribute(device)
            await world.clock.advance(2_000)
            assert len(seen) == 2 and seen[0] == seen[1]  # the very same blobs
            assert len(world.ledger()) == 1

    asyncio.run(run())


def test_max_participations_and_min_separation_hold_at_check_in(tmp_path: Path) -> None:
    async def run() -> None:
        async with PrivateWorld(tmp_path / "data") as world:
            plan = {
                "mechanism": BANDED,
                "noise_multiplier": 4.0,
                "max_participations": 2,
                "min_separation": 3,
                "bands": 2,
            }
            await world.submit_private(plan, goal=1, minimum=1, rounds=20)
            devices = await world.enrol(4)
            came = []
            for _ in range(8):
                for number, device in enumerate(devices):
                    if await world.contribute(device) is not None:
                        came.append(number)
                        break
            # Two times each, three releases apart; then nobody is left.
            assert came == [0, 1, 2, 0, 1, 2, 3]
            assert len(world.ledger()) == 7
            assert world.ledger()[-1].epsilon == Accounting(BANDED, 4.0, 1e-5, 1.0, 2, 3, 2).epsilon(7)

    asyncio.run(run())


def test_banded_noise_is_taken_back_by_later_rounds(tmp_path: Path) -> None:
    async def run() -> None:
        async with PrivateWorld(tmp_path / "data") as world:
            plan = {"mechanism": BANDED, "noise_multiplier": 1000.0, "min_separation": 4, "bands": 4}
            await world.submit_private(plan, goal=1, minimum=1, rounds=50)
            devices = await world.enrol(4)
            for release in range(40):
                assert await world.contribute(devices[release % 4], 1e-6) is not None
            steps = np.diff([world.parameters(version) for version in range(41)], axis=0)
            first = np.corrcoef(steps[:-1].reshape(-1), steps[1:].reshape(-1))[0, 1]
            assert -0.55 < first < -0.15  # independent noise: 0

    asyncio.run(run())


@pytest.mark.parametrize("within", [True, False])
def test_the_clip_norm_follows_the_quantile_without_noise_too(tmp_path: Path, within: bool) -> None:
    async def run() -> None:
        async with PrivateWorld(tmp_path / "data") as world:
            adaptive = task_pb2.AdaptiveClipping(initial=2.0, quantile=0.75, rate=0.5)
            await world.submit(adaptive=adaptive, goal=2, rounds=3)
            assert world.versions()[0].manifest.clip_norm == 2.0
            for device in await world.enrol(2):
                await world.contribute(device, within_clip_norm=within)
            expected = 2.0 * np.exp(-0.5 * ((1.0 if within else 0.0) - 0.75))
            assert world.versions()[1].manifest.clip_norm == pytest.approx(expected, rel=1e-12)
            assert not world.ledger()

    asyncio.run(run())


def test_poisson_sampling_waits_for_its_population_and_gives_places_to_who_was_drawn(tmp_path: Path) -> None:
    async def run() -> None:
        async with PrivateWorld(tmp_path / "data") as world:
            plan = {"noise_multiplier": 1.0, "sampling": task_pb2.SAMPLING_POISSON, "population": 24}
            await world.submit_private(plan, goal=6, rounds=30)
            devices = await world.enrol(20)
            assert await world.contribute(devices[0]) is None  # four are missing
            devices += await world.enrol(4)
            await settle()
            came = set()
            for _ in range(4):
                for device in devices:
                    if await world.contribute(device) is not None:
                        came.add(device.device_id)
            entries, key = world.ledger(), world.core.context.noise_key
            assert len(entries) >= 4 and len(came) > 6
            for entry in entries:  # each round has all that were drawn for it, and nobody else
                drawn = [key.chooses(world.task_id, entry.round, device.device_id, 0.25) for device in devices]
                assert entry.devices == sum(drawn)
            assert {entry.sampling_probability for entry in entries} == {0.25}
            assert entries[2].epsilon == Accounting(CENTRAL, 1.0, 1e-5, 0.25).epsilon(3)
            await world.clock.advance(1)
            for late in await world.enrol(8):
                assert await world.contribute(late) is None  # enrolled after the draw of this round

    asyncio.run(run())


def test_a_ledger_is_read_for_a_population_or_a_task_and_not_for_neither(tmp_path: Path) -> None:
    async def run() -> None:
        async with PrivateWorld(tmp_path / "data") as world:
            for _ in range(2):
                await world.submit_private({"noise_multiplier": 1.0}, goal=1, minimum=1, rounds=1)
                (device,) = await world.enrol(1)
                await world.contribute(device)
            read = world.core.operators.read_privacy_ledger
            mine = read(operator_pb2.ReadPrivacyLedgerRequest(task_id=world.task_id))
            assert len(mine.entries) == 1 and mine.plan.noise_multiplier == 1.0
            both = read(operator_pb2.ReadPrivacyLedgerRequest(population=POPULATION))
            assert len({entry.task_id for entry in both.entries}) == 2 and not both.HasField("plan")
            with pytest.raises(OperatorError, match="a task or for a population"):
                read(operator_pb2.ReadPrivacyLedgerRequest())

    asyncio.run(run())
