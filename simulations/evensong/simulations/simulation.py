"""A whole fleet in one process: the real devices and the real coordinator, under simulated time and over a simulated
network.

Every part is the one that production runs; only the clock, the network, the threads and the randomness are other
objects. All of them follow one seed, so that the same seed gives the same bits.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.client import AlwaysReady, ArrayExamples, Batch, Device, Idle, Outcome
from evensong.coordinator import Task, TaskEvent, TaskState, TaskStatus
from evensong.coordinator.config import load as load_settings
from evensong.coordinator.context import run_inline
from evensong.coordinator.server import CoordinatorCore
from evensong.simulations import virtual_time
from evensong.simulations.counting import CountingTransport
from evensong.simulations.fleet import Examples, Shard
from evensong.simulations.in_memory import InMemoryTransport, Network
from evensong.simulations.virtual_time import SimulatedClock
from evensong.simulations.witness import Account, Witness
from evensong.v1 import common_pb2, operator_pb2
from evensong.wire.clock import Clock
from evensong.wire.errors import EvensongError
from evensong.wire.tensors import FloatArray, decode_tensors

T = TypeVar("T")
GOOD_NETWORK = Network()
Progress = Callable[[TaskEvent], None]


class SimulationError(EvensongError):
    """The simulated task did not come to its end."""


@dataclass(frozen=True)
class ClientResult:
    """One device's share. The answers in ``account`` are empty where it has no test examples."""

    shard: Shard
    account: Account
    lost_messages: int


@dataclass(frozen=True)
class SimulationResult:
    """``parameters`` of the last version, the task's whole history, and each device's share in it."""

    parameters: Mapping[str, FloatArray]
    parameters_sha256: str  #: of the version's blob: equal for equal seeds
    events: tuple[TaskEvent, ...]
    clients: tuple[ClientResult, ...]
    simulated_seconds: float


def simulate(
    task: Task,
    clients: Sequence[Shard],
    *,
    seed: int,
    network: Network = GOOD_NETWORK,
    compute_seconds: tuple[float, float] = (1.0, 10.0),
    time_limit_seconds: float = 30 * 86_400.0,
    progress: Progress | None = None,
) -> SimulationResult:
    """Runs ``task`` to its end on ``clients``, one real :class:`Device` each.

    ``network`` decides delays and losses, ``compute_seconds`` how long each computation of a device takes (uniform).
    ``progress`` sees each event of the task as it happens. Raises :class:`SimulationError` if the task fails, or has
    not ended after ``time_limit_seconds`` of simulated time (as when no device can train it).
    """
    if not clients:
        raise SimulationError("a simulation needs clients")
    if task.goal > len(clients):
        raise SimulationError(
            "the task can never reach its goal", expected=f"at most {len(clients)} reports, one a client", got=task.goal
        )
    with tempfile.TemporaryDirectory(prefix="evensong-simulate-") as folder:
        world = _World(Path(folder), np.random.SeedSequence(seed), network, compute_seconds)
        life = world.run(task, clients, progress or (lambda event: None))
        return virtual_time.run(_limited(life, time_limit_seconds))


async def _limited(life: Coroutine[Any, Any, SimulationResult], seconds: float) -> SimulationResult:
    try:
        async with asyncio.timeout(seconds):
            return await life
    except TimeoutError:
        raise SimulationError("the task did not end", expected=f"within {seconds:,.0f} s of simulated time") from None


class _World:
    """One simulation: everything random comes from ``seeds``, in a fixed order."""

    def __init__(
        self, folder: Path, seeds: np.random.SeedSequence, network: Network, compute_seconds: tuple[float, float]
    ) -> None:
        self._folder = folder
        self._network = network
        self._compute_seconds = compute_seconds
        self._coordinator_seed, self._client_seeds = seeds.spawn(2)

    async def run(self, task: Task, clients: Sequence[Shard], progress: Progress) -> SimulationResult:
        clock = SimulatedClock()
        core = open_coordinator(self._folder, clock, self._coordinator_seed)
        core.start()
        try:
            token = enrolment_token(core, task.population, len(clients))
            history = History(core, submit(core, task), progress)
            seeds = self._client_seeds.spawn(len(clients))
            async with asyncio.TaskGroup() as group:
                following = group.create_task(history.follow())
                lives = [
                    group.create_task(self._live(core, clock, shard, token, task, history, seed))
                    for shard, seed in zip(clients, seeds, strict=True)
                ]
            blob = following.result()
            return SimulationResult(
                parameters=decode_tensors(blob, task.layout),
                parameters_sha256=hashlib.sha256(blob).hexdigest(),
                events=tuple(history.events),
                clients=tuple(life.result() for life in lives),
                simulated_seconds=(clock.unix_ms() - virtual_time.START_UNIX_MS) / 1000,
            )
        except ExceptionGroup as group_of_errors:
            raise group_of_errors.exceptions[0] from None
        finally:
            await core.stop()

    async def _live(
        self,
        core: CoordinatorCore,
        clock: SimulatedClock,
        shard: Shard,
        token: str,
        task: Task,
        history: History,
        seed: np.random.SeedSequence,
    ) -> ClientResult:
        """One device from its enrolment until it serves the last version and has nothing left to do."""
        line_seed, own_seed = seed.spawn(2)
        luck = np.random.default_rng(line_seed)
        line = InMemoryTransport(core.devices, clock, self._network, luck)
        counted = CountingTransport(line)
        witness = Witness(lambda: device.predict(shard.test.inputs))

        async def run_blocking(function: Callable[[], T]) -> T:
            await clock.sleep(luck.uniform(*self._compute_seconds))
            return function()

        device = Device(
            None,
            coordinator="simulated",
            token=token,
            population=task.population,
            conditions=AlwaysReady(),
            callbacks=[witness] if len(shard.test) else [],
            transport=counted,
            examples=ArrayExamples(_batch(shard.train), _batch(shard.test) if len(shard.test) else None),
            clock=clock,
            seed=int.from_bytes(np.random.default_rng(own_seed).bytes(8), "little"),
            run_blocking=run_blocking,
        )
        try:

            def finished(outcome: Outcome) -> bool:
                is_served = task.rounds in witness.answers or not len(shard.test)
                return history.ended and isinstance(outcome, Idle) and is_served

            await device.run_async(finished)
            return ClientResult(
                shard,
                Account(
                    federated=witness.answers.get(task.rounds, []),
                    personalised=witness.ask() if len(shard.test) else [],
                    bytes_up=counted.bytes_up,
                    bytes_down=counted.bytes_down,
                ),
                line.lost,
            )
        finally:
            await device.close_async()


class History:
    """Follows one task as an operator's watch does."""

    def __init__(self, core: CoordinatorCore, task_id: str, progress: Progress) -> None:
        self._core = core
        self._task_id = task_id
        self._progress = progress
        self.events: list[TaskEvent] = []
        self.ended = False

    async def follow(self) -> bytes:
        """Until the task ends; the parameters of its last version, as the blob that devices fetch."""
        while not self.ended:
            news = self._core.context.news.next()
            found, ended = self._core.operators.read_events(self._task_id, len(self.events))
            for event in map(TaskEvent.of, found):
                self.events.append(event)
                self._progress(event)
            if not found and not ended:
                await asyncio.shield(news)
            self.ended = ended
        request = operator_pb2.GetTaskRequest(task_id=self._task_id)
        status = TaskStatus.of(self._core.operators.get_task(request).task)
        if status.state != TaskState.COMPLETE:
            raise SimulationError(f"the task ended as {status.state}", got=status.message or None)
        versions = self._core.operators.list_versions(operator_pb2.ListVersionsRequest(task_id=self._task_id)).versions
        return self._core.context.blobs.read(versions[-1].manifest.parameters.sha256.hex())


def open_coordinator(folder: Path, clock: Clock, seed: np.random.SeedSequence) -> CoordinatorCore:
    """The daemon without its socket: ``start`` and ``stop`` it on a running loop."""
    draw = np.random.default_rng(seed).bytes
    return CoordinatorCore(
        load_settings(data_dir=folder, durable=False, log_level="warning"),
        clock=clock,
        run_blocking=run_inline,
        rng=random.Random(draw(16)),
        signer=Ed25519PrivateKey.from_private_bytes(draw(32)),
    )


def submit(core: CoordinatorCore, task: Task) -> str:
    """What ``Coordinator.submit`` does over gRPC; returns the task's id."""
    initial = task.encoded_parameters()
    core.context.blobs.put(task.artifact_bytes)
    reference = common_pb2.BlobRef(sha256=bytes.fromhex(core.context.blobs.put(initial)), size_bytes=len(initial))
    request = operator_pb2.SubmitTaskRequest(
        request_id=bytes(16), bundle=task.to_bundle(), initial_parameters=reference
    )
    return core.operators.submit_task(request).task_id


def enrolment_token(core: CoordinatorCore, population: str, uses: int) -> str:
    """What ``Coordinator.create_token`` asks for over gRPC."""
    request = operator_pb2.CreateEnrolmentTokenRequest(request_id=bytes(16), population=population, uses=uses)
    return core.operators.create_enrolment_token(request).token


def _batch(examples: Examples) -> Batch:
    return Batch((examples.inputs,), examples.labels)
