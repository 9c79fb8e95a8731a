"""The demo from beginning to end: a real coordinator and real devices, each a process on this machine."""

from __future__ import annotations

import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from evensong.coordinator import (
    Compression,
    Coordinator,
    LocalTraining,
    Personalization,
    SecureAggregation,
    Task,
    TaskEvent,
    TaskHandle,
    TaskState,
)
from evensong.simulations.assess import summarise, write_all
from evensong.simulations.data import load_dataset
from evensong.simulations.demo.device_process import read_account
from evensong.simulations.demo.processes import ChildError, Children
from evensong.simulations.demo.scenarios import Scenario
from evensong.simulations.fleet import Fleet, Shard, make_fleet
from evensong.simulations.partition import label_skew
from evensong.simulations.results import Results
from evensong.simulations.trained import with_parameters
from evensong.simulations.witness import Account
from evensong.wire.errors import EvensongError

COORDINATOR = "coordinator"
LEAST_COHORT = 3  # devices in a secure sum
_START_S = 30.0
_LAST_WORDS_S = 120.0  # for a device to personalise and end, once the task is complete
_STALLED_S = 300.0  # without any event: two round deadlines and more
_POLL_S = 0.2

#: One thread a process: the devices share this machine's cores.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Plan:
    """What to run and where to leave the result."""

    scenario: Scenario
    devices: int
    rounds: int
    seed: int
    output: Path
    compile: bool = False


class Stage(Protocol):
    """Whoever shows the progress."""

    def say(self, what: str) -> None:
        """Something begins."""
        ...

    def show(self, event: TaskEvent) -> None:
        """Something happened to the task."""
        ...


def run_demo(plan: Plan, stage: Stage) -> Results:
    """Runs ``plan`` and writes ``report.html``, ``results.json`` and the artifacts to ``plan.output``.

    Raises :class:`ChildError` if a process fails, with the end of what it wrote. No process outlives this call.
    """
    started = time.monotonic()

    # 1. Real data, dealt to devices that share nothing.
    if plan.devices < LEAST_COHORT:
        stage.say(f"fewer than {LEAST_COHORT} devices: nobody to hide among, so each update is seen as it arrives")
    stage.say(f"dealing {plan.scenario.title.lower()} to {plan.devices} devices")
    fleet = _deal(plan)

    # 2. The artifact: a training program that needs no torch.
    if plan.compile:
        stage.say("compiling the model")
    artifact = plan.scenario.compile().to_bytes() if plan.compile else plan.scenario.artifact()
    task = _task(plan, artifact)

    with tempfile.TemporaryDirectory(prefix="evensong-demo-") as folder, Children(Path(folder)) as children:
        # 3. The coordinator, and what it is to do.
        stage.say("starting the coordinator")
        address = _start_coordinator(children, Path(folder))
        with Coordinator.connect(address, token=_operator_token(Path(folder))) as coordinator:
            everyone = len(fleet.participants) + len(fleet.newcomers)
            token = coordinator.create_token(uses=everyone).text
            submitted = coordinator.submit(task)

            # 4. The devices join, and train together.
            stage.say(f"starting {len(fleet.participants)} devices")
            joined = _Devices(plan, children, Path(folder), address, token)
            joined.start(fleet.participants)
            history = []
            for event in _watch(submitted, children):
                history.append(event)
                stage.show(event)
            _require_complete(submitted)
            parameters = submitted.download()

            # 5. Each device adapts the last version to its own examples; so do people who never took part.
            stage.say("personalising on each device")
            joined.wait(fleet.participants)
            if fleet.newcomers:
                stage.say(f"welcoming {len(fleet.newcomers)} newcomers")
                joined.start(fleet.newcomers)
                joined.wait(fleet.newcomers)
        accounts = {shard.name: joined.account(shard) for shard in (*fleet.participants, *fleet.newcomers)}

    # 6. What came of it.
    trained = with_parameters(artifact, parameters)
    results = summarise(
        fleet,
        artifact,
        trained,
        history,
        accounts,
        title=f"{plan.scenario.title}: {plan.devices} devices learn together",
        seed=plan.seed,
        seconds=time.monotonic() - started,
        notes={"cores": str(os.cpu_count())},
        task=task,
    )
    write_all(results, artifact, trained, plan.output)
    return results


def _deal(plan: Plan) -> Fleet:
    scenario = plan.scenario
    return make_fleet(
        load_dataset(scenario.name),
        plan.devices,
        seed=plan.seed,
        divide=label_skew(scenario.concentration),
        global_test=scenario.held_out,
        limit=scenario.limit,
    )


def _task(plan: Plan, artifact: bytes) -> Task:
    """All devices take part in every round; a version is measured on all of them. Both are secure sums, unless there
    are too few devices to hide among."""
    scenario = plan.scenario
    secure = SecureAggregation(bits=8, stage_seconds=20.0) if plan.devices >= LEAST_COHORT else None
    return Task(
        scenario.name,
        artifact,
        rounds=plan.rounds,
        goal=plan.devices,
        over_selection=1.0,
        deadline=120.0,
        secure=secure,
        compression=Compression(download_bits=8),
        local=LocalTraining(
            epochs=scenario.epochs,
            learning_rate=scenario.learning_rate,
            final_learning_rate=scenario.final_learning_rate,
        ),
        personalization=Personalization(epochs=scenario.personal_epochs, learning_rate=scenario.personal_learning_rate),
    )


# ---------------------------------------------------------------------------------------------------------- processes


def _start_coordinator(children: Children, folder: Path) -> str:
    """``evensong coordinator serve`` on a free port of the loopback; its address once it listens."""
    data = folder / COORDINATOR
    arguments = ["serve", "--listen", "127.0.0.1:0", "--data-dir", str(data)]
    children.start(COORDINATOR, [sys.executable, "-m", "evensong.coordinator.command", *arguments], _ENVIRONMENT)
    deadline = time.monotonic() + _START_S
    while not (data / "address").is_file():
        children.require(COORDINATOR)
        if time.monotonic() > deadline:
            raise ChildError("the coordinator does not answer", expected=f"within {_START_S:g} s")
        time.sleep(_POLL_S / 4)
    return (data / "address").read_text().strip()


def _operator_token(folder: Path) -> str:
    return (folder / COORDINATOR / "operator.token").read_text().strip()


class _Devices:
    """One process for each shard; a process sees its own folder only."""

    def __init__(self, plan: Plan, children: Children, folder: Path, address: str, token: str) -> None:
        self._plan = plan
        self._children = children
        self._folder = folder
        self._address = address
        self._token = token
        self._started = 0  # a device's seed makes its key too: no two may share one

    def start(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            self._started += 1
            folder = self._home(shard)
            folder.mkdir(mode=0o700)
            (folder / "token").write_text(self._token)
            np.savez(
                folder / "shard.npz",
                train_x=shard.train.inputs,
                train_y=shard.train.labels,
                test_x=shard.test.inputs,
                test_y=shard.test.labels,
            )
            options = {
                "--coordinator": self._address,
                "--last-version": str(self._plan.rounds),
                "--seed": str(1000 * self._plan.seed + self._started),
            }
            module = "evensong.simulations.demo.device_process"
            flat = [part for option in options.items() for part in option]
            self._children.start(shard.name, [sys.executable, "-m", module, str(folder), *flat], _ENVIRONMENT)

    def wait(self, shards: Sequence[Shard]) -> None:
        self._children.wait([shard.name for shard in shards], _LAST_WORDS_S)

    def account(self, shard: Shard) -> Account:
        return read_account(self._home(shard))

    def _home(self, shard: Shard) -> Path:
        return self._folder / shard.name.replace(" ", "-")


def _watch(task: TaskHandle, children: Children) -> Iterator[TaskEvent]:
    """The task's events until it ends, with an eye on the processes: a dead one would keep the round waiting."""
    arrived: queue.Queue[TaskEvent | BaseException | None] = queue.Queue()

    def follow() -> None:
        try:
            for event in task.watch():
                arrived.put(event)
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    threading.Thread(target=follow, daemon=True).start()
    last = time.monotonic()
    while True:
        try:
            event = arrived.get(timeout=_POLL_S)
        except queue.Empty:
            children.require(COORDINATOR)
            if time.monotonic() - last > _STALLED_S:
                raise ChildError("the task does not move", expected=f"an event within {_STALLED_S:g} s") from None
            continue
        if event is None:
            return
        if isinstance(event, BaseException):
            children.require(COORDINATOR)
            raise event
        last = time.monotonic()
        yield event


def _require_complete(task: TaskHandle) -> None:
    status = task.status()
    if status.state != TaskState.COMPLETE:
        raise EvensongError(f"the task ended as {status.state}", got=status.message or None)
