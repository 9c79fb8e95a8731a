"""One round, end to end, state by state: the story of ``docs/flow.md`` with the real coordinator and real devices.

Ada and Ben are devices of the real SDK, the coordinator is the real daemon without its socket. Time is simulated, so
that who is first is decided by the story and not by the machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from sqlalchemy import select

from evensong.client import AlwaysReady, Device, Dropped, Evaluated, Idle, Trained
from evensong.client.callbacks import (
    CheckedIn,
    Downloaded,
    Enrolled,
    Event,
    ModelServed,
    Personalized,
    RoundStarted,
    Sealed,
    Uploaded,
)
from evensong.coordinator import EventKind, LocalTraining, Personalization, Task, TaskEvent, Version, tables
from evensong.coordinator.server import CoordinatorCore
from evensong.simulations import (
    InMemoryTransport,
    Network,
    Shard,
    SimulatedClock,
    load_dataset,
    make_fleet,
    virtual_time,
)
from evensong.simulations.demo.scenarios import DIGITS
from evensong.simulations.simulation import enrolment_token, open_coordinator, submit
from evensong.v1 import device_pb2, operator_pb2
from evensong.wire.codecs import UpdateCodec

T = TypeVar("T")

ADAS, BENS = make_fleet(load_dataset("digits"), 2, seed=0, limit=80).participants
HEAD = ["head.weight", "head.bias"]
TASK = Task(
    "keyboard",
    DIGITS.artifact(),
    rounds=1,
    goal=2,
    over_selection=1.0,
    secure=None,  # two devices are no cohort
    local=LocalTraining(epochs=2, learning_rate=0.1, personal=["head.*"]),
    personalization=Personalization(epochs=2, learning_rate=0.05),
)


def test_one_round(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        core = world.core

        # 0. An engineer submits a task. Version 0 is the artifact's own initial state, and round 1 is open.
        task_id = submit(core, TASK)
        assert world.rounds() == [("train", 1, "collecting")]
        token = enrolment_token(core, "default", uses=2)
        ada, ben = world.device("Ada", ADAS, token), world.device("Ben", BENS, token)

        # 1. to 5. Ada's device enrols, checks in, fetches what hashes and signatures vouch for, trains, seals, uploads.
        outcome = await ada.step_async()
        assert isinstance(outcome, Trained)
        assert (outcome.round, outcome.version, outcome.examples) == (1, 0, 2 * len(ADAS.train))
        assert world.told("Ada") == [
            Enrolled, CheckedIn, Downloaded, Downloaded, RoundStarted, Sealed, Uploaded, ModelServed
        ]  # fmt: skip
        assert world.reports() == 1 and world.rounds() == [("train", 1, "collecting")]

        # What left is as long as the plan says, and holds nothing of the personal head.
        sealed = world.last("Ada", Sealed)
        assert sealed.update_bytes == UpdateCodec().encoded_bytes(TASK.layout)
        assert not {spec.name for spec in TASK.layout} & set(HEAD)

        # The coordinator wants one more update, and not from Ada: her next check-in is held.
        waiting = asyncio.ensure_future(ada.step_async())
        await world.clock.sleep(1)
        assert not waiting.done()

        # 5. to 8. Ben's update reaches the goal: the sum becomes a mean, the strategy steps, version 1 is committed.
        outcome = await ben.step_async()
        assert isinstance(outcome, Trained)
        await world.clock.sleep(1)
        assert ("train", 1, "committed") in world.rounds()
        committed = world.event(task_id, EventKind.VERSION_COMMITTED)
        assert (committed.version, committed.reports) == (1, 2)
        assert committed.metrics is not None
        assert committed.metrics.examples == 2 * (len(ADAS.train) + len(BENS.train))
        lineage = world.version(task_id, 1)
        assert (lineage.parent, lineage.total_weight) == (0, len(ADAS.train) + len(BENS.train))

        # 9. Both devices measure it on their own test examples; Ada's held check-in was answered with that work.
        outcomes = [await waiting, await ben.step_async()]
        assert all(isinstance(outcome, Evaluated) and outcome.version == 1 for outcome in outcomes)
        evaluated = world.event(task_id, EventKind.VERSION_EVALUATED)
        assert evaluated.metrics is not None
        assert evaluated.metrics.examples == len(ADAS.test) + len(BENS.test)
        assert world.event(task_id, EventKind.TASK_ENDED)
        assert world.rounds() == [("train", 1, "committed"), ("evaluate", 1, "committed")]

        # 10. In a quiet moment each device personalises the version that it serves. Nothing of it leaves the device.
        sent = world.sent_updates()
        for name, device in (("Ada", ada), ("Ben", ben)):
            assert isinstance(await device.step_async(), Idle)
            assert world.last(name, Personalized).version == 1
        assert world.sent_updates() == sent
        pictures = np.concatenate([ADAS.test.inputs, BENS.test.inputs])
        assert not np.allclose(ada.predict(pictures), ben.predict(pictures))  # one global body, two personal models
        await world.close()

    virtual_time.run(story())


def test_an_update_that_comes_late_changes_nothing(tmp_path: Path) -> None:
    """Two may try, one is wanted: Ben's slow device learns why its work was in vain."""

    async def story() -> None:
        world = World(tmp_path)
        task_id = submit(world.core, replace(TASK, goal=1, over_selection=2.0, evaluate_every=0))
        token = enrolment_token(world.core, "default", uses=2)
        ada, ben = world.device("Ada", ADAS, token), world.device("Ben", BENS, token, seconds_to_train=120.0)

        late = asyncio.ensure_future(ben.step_async())
        while CheckedIn not in world.told("Ben"):
            await world.clock.sleep(1)
        assert isinstance(await ada.step_async(), Trained)
        await world.clock.sleep(1)
        version = world.version(task_id, 1).parameters_sha256

        outcome = await late
        assert isinstance(outcome, Dropped) and outcome.reason == "NOT_NEEDED"
        assert world.version(task_id, 1).parameters_sha256 == version
        assert world.event(task_id, EventKind.VERSION_COMMITTED).reports == 1
        assert world.sent_updates() == 1
        await world.close()

    virtual_time.run(story())


def test_a_lost_answer_is_asked_for_again_and_counted_once(tmp_path: Path) -> None:
    """The connection breaks after the coordinator accepted Ada's update, before she hears of it."""

    async def story() -> None:
        world = World(tmp_path)
        submit(world.core, replace(TASK, goal=2))
        token = enrolment_token(world.core, "default", uses=2)
        ada = world.device("Ada", ADAS, token, network=Network(lost_response=0.35), luck=1)
        outcomes = [await ada.step_async()]
        while not isinstance(outcomes[-1], Trained):
            await world.clock.sleep(outcomes[-1].wait_s)
            outcomes.append(await ada.step_async())
        assert len(outcomes) > 1, "nothing was lost: choose another luck"
        assert world.told("Ada").count(Sealed) == 1  # trained once, sent as often as needed
        assert world.reports() == world.sent_updates() == 1
        await world.close()

    virtual_time.run(story())


class World:
    """A coordinator, its devices, and what both sides wrote down."""

    def __init__(self, folder: Path) -> None:
        self.clock = SimulatedClock()
        self.core: CoordinatorCore = open_coordinator(folder, self.clock, np.random.SeedSequence(0))
        self.core.start()
        self._devices: list[Device] = []
        self._events: dict[str, list[Event]] = {}

    def device(
        self,
        name: str,
        shard: Shard,
        token: str,
        *,
        seconds_to_train: float = 5.0,
        network: Network = Network(),  # noqa: B008
        luck: int = 0,
    ) -> Device:
        async def run_blocking(function: Callable[[], T]) -> T:
            await self.clock.sleep(seconds_to_train)
            return function()

        told = self._events[name] = []
        device = Device(
            None,
            coordinator="in memory",
            token=token,
            conditions=AlwaysReady(),
            callbacks=[told.append],
            transport=InMemoryTransport(self.core.devices, self.clock, network, np.random.default_rng(luck)),
            clock=self.clock,
            seed=len(self._devices),
            run_blocking=run_blocking,
        )
        device.examples.add_many(shard.train.inputs, shard.train.labels)
        device.examples.add_many(shard.test.inputs, shard.test.labels, split="test")
        self._devices.append(device)
        return device

    def told(self, name: str) -> list[type[Event]]:
        """The kinds of events of a device in order, each step of training left out."""
        return [type(event) for event in self._events[name] if type(event).__name__ != "StepDone"]

    def last(self, name: str, kind: type[T]) -> T:
        return next(event for event in reversed(self._events[name]) if isinstance(event, kind))

    def rounds(self) -> list[tuple[str, int, str]]:
        with self.core.context.database.read() as tx:
            rows = tx.execute(select(tables.rounds).order_by(tables.rounds.c.round_id)).all()
        return [(device_pb2.Work.Name(row.work).removeprefix("WORK_").lower(), row.number, row.state) for row in rows]

    def reports(self) -> int:
        with self.core.context.database.read() as tx:
            return int(tx.execute(select(tables.rounds.c.reports)).scalars().first() or 0)

    def sent_updates(self) -> int:
        """Rows of the journal: one for each update that was accepted."""
        with self.core.context.database.read() as tx:
            return len(tx.execute(select(tables.journal)).all())

    def event(self, task_id: str, kind: EventKind) -> TaskEvent:
        found, _ = self.core.operators.read_events(task_id, 0)
        return next(event for event in map(TaskEvent.of, found) if event.kind == kind)

    def version(self, task_id: str, number: int) -> Version:
        request = operator_pb2.ListVersionsRequest(task_id=task_id)
        return Version.of(self.core.operators.list_versions(request).versions[number])

    async def close(self) -> None:
        for device in self._devices:
            await device.close_async()
        await self.core.stop()
