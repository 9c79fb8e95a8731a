"""Real devices against the real coordinator, over gRPC on loopback."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from daemon import Operator, settings
from tiny_artifact import BIAS, tiny_artifact, tiny_examples

from evensong.client import (
    AlwaysReady,
    Device,
    Dropped,
    EnrolmentError,
    Evaluated,
    Idle,
    Limits,
    Postponed,
    Trained,
)
from evensong.client.callbacks import Event, Uploaded
from evensong.coordinator.server import CoordinatorServer
from evensong.coordinator.task import LocalTraining, Personalization, Task
from evensong.v1 import operator_pb2

DEVICES, ROUNDS = 3, 4


def task(**local: object) -> Task:
    return Task(
        "tiny",
        tiny_artifact(),
        rounds=ROUNDS,
        goal=DEVICES,
        over_selection=1.0,
        deadline=60.0,
        secure=None,
        local=LocalTraining(epochs=1, learning_rate=0.3, **local),
        personalization=Personalization(epochs=2, learning_rate=0.1),
    )


def open_device(folder: Path, address: str, token: str, seed: int, events: list[Event] | None = None) -> Device:
    device = Device(
        folder,
        coordinator=address,
        token=token,
        conditions=AlwaysReady(),
        limits=Limits(hold_ms=300),
        callbacks=[events.append] if events is not None else [],
    )
    if not device.examples.count():
        device.examples.add_many(*tiny_examples(40, seed=seed))
        device.examples.add_many(*tiny_examples(20, seed=seed + 100), split="test")
    return device


def test_devices_finish_a_task_and_serve_it_offline(tmp_path: Path) -> None:
    events: list[Event] = []

    async def scenario() -> list[Device]:
        server = CoordinatorServer(settings(tmp_path / "coordinator"))
        await server.start()
        operator = Operator(server)
        task_id = await operator.submit(task(personal=["*.bias"]))
        token = await operator.token(DEVICES)
        devices = [open_device(tmp_path / f"device-{i}", server.address, token, i, events) for i in range(DEVICES)]

        async def until_complete(device: Device) -> None:
            while (status := await operator.status(task_id)).state != operator_pb2.TASK_STATE_COMPLETE:
                assert status.state == operator_pb2.TASK_STATE_RUNNING, status.message
                outcome = await device.step_async()
                assert isinstance(outcome, Trained | Evaluated | Idle | Dropped)
                await asyncio.sleep(outcome.wait_s)
            await device.step_async()

        async with asyncio.timeout(120):
            await asyncio.gather(*map(until_complete, devices))
        await operator.close()
        for device in devices:
            await device.close_async()
        await server.stop(0)
        return devices

    asyncio.run(scenario())
    assert sum(isinstance(event, Uploaded) for event in events) >= DEVICES * ROUNDS
    biases = []
    x, y = tiny_examples(200, seed=77)
    for i in range(DEVICES):
        with Device(tmp_path / f"device-{i}") as device:  # neither address nor token: both are remembered or not needed
            [model] = device.status()["models"]
            assert model["version"] == ROUNDS and model["personalized"]
            assert np.mean(device.predict(x).argmax(1) == y) > 0.9
            assert device.evaluate().accuracy > 0.8
            biases.append(device._serving._session(None).get([BIAS])[BIAS])
    assert not np.array_equal(biases[0], biases[1])  # personal


def test_a_wrong_token_and_a_revoked_device_are_told_apart(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = CoordinatorServer(settings(tmp_path / "coordinator"))
        await server.start()
        operator = Operator(server)
        good = await operator.token(1)
        wrong = good.replace(good.split(".")[2], good.split(".")[2][::-1])
        stranger = open_device(tmp_path / "stranger", server.address, wrong, 1)
        with pytest.raises(EnrolmentError, match="BAD_TOKEN"):
            await stranger.step_async()
        device = open_device(tmp_path / "device", server.address, good, 2)
        assert isinstance(await device.step_async(), Idle)
        await operator.revoke(device.device_id)
        with pytest.raises(EnrolmentError, match="revoked"):
            await device.step_async()
        for each in (stranger, device):
            await each.close_async()
        await operator.close()
        await server.stop(0)

    asyncio.run(scenario())


def test_a_coordinator_that_is_away_is_waited_for(tmp_path: Path) -> None:
    with (
        Device(tmp_path / "device", coordinator="127.0.0.1:1", token="evt1.x", conditions=AlwaysReady()) as device,
        pytest.raises(EnrolmentError, match="not one"),
    ):
        device.step()

    async def scenario() -> None:
        server = CoordinatorServer(settings(tmp_path / "coordinator"))
        await server.start()
        operator = Operator(server)
        token = await operator.token(1)
        await operator.close()
        device = open_device(tmp_path / "device", server.address, token, 1)
        assert isinstance(await device.step_async(), Idle)
        await server.stop(0)
        assert isinstance(outcome := await device.step_async(), Postponed) and outcome.wait_s > 0
        await device.close_async()

    asyncio.run(scenario())
