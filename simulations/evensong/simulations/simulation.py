"""A whole fleet in one process: real devices, the real coordinator, simulated time and a simulated network.

Every part is the one that production runs; only the clock, the network, the threads and the randomness are other
objects. All of them follow one seed, so that the same seed gives the same bits.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.client import AlwaysReady, ArrayExamples, Batch, Device, Idle, Outcome
from evensong.coordinator import EventKind, Task, TaskEvent, TaskState, TaskStatus
from evensong.coordinator.config import load as load_settings
from evensong.coordinator.context import run_inline
from evensong.coordinator.privacy.keys import NoiseKey
from evensong.coordinator.server import CoordinatorCore
from evensong.secagg.primitives import SharedPrimitives
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
    simulation = _Simulation(task, network, compute_seconds, progress or (lambda event: None))
    with tempfile.TemporaryDirectory(prefix="evensong-simulate-") as folder:
        return virtual_time.run(simulation.run(clients, Path(folder), np.random.SeedSequence(seed), time_limit_seconds))


class _Simulation:
    """One run. Everything random comes from its seed, drawn in a fixed order."""

    def __init__(self, task: Task, network: Network, compute_seconds: tuple[float, float], progress: Progress) -> None:
        self._task = task
        self._network = network
        self._compute_seconds = compute_seconds
        self._progress = progress
        self._primitives = _FleetPrimitives()

    async def run(
        self, clients: Sequence[Shard], folder: Path, seed: np.random.SeedSequence, time_limit_seconds: float
    ) -> SimulationResult:
        coordinator_seed, *client_seeds = seed.spawn(1 + len(clients))
        self._clock = SimulatedClock()
        self._core = open_coordinator(folder, self._clock, coordinator_seed)
        self._core.start()
        try:
            self._token = enrolment_token(self._core, self._task.population, len(clients))
            self._history = History(self._core, submit(self._core, self._task), self._progress)
            async with asyncio.timeout(time_limit_seconds), asyncio.TaskGroup() as group:
                following = group.create_task(self._history.follow())
                lives = [
                    group.create_task(self._live(shard, own_seed))
                    for shard, own_seed in zip(clients, client_seeds, strict=True)
                ]
            return self._result(following.result(), [life.result() for life in lives])
        except TimeoutError:
            raise SimulationError(
                "the task did not end", expected=f"within {time_limit_seconds:,.0f} s of simulated time"
            ) from None
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            await self._core.stop()

    async def _live(self, shard: Shard, seed: np.random.SeedSequence) -> ClientResult:
        """One device from its enrolment until it serves the last version and has nothing left to do."""
        line_seed, device_seed = seed.spawn(2)
        luck = np.random.default_rng(line_seed)
        line = InMemoryTransport(self._core.devices, self._clock, self._network, luck)
        counted = CountingTransport(line)
        is_tested = len(shard.test) > 0
        witness = Witness(lambda: device.predict(shard.test.inputs))

        async def run_blocking(function: Callable[[], T]) -> T:
            await self._clock.sleep(luck.uniform(*self._compute_seconds))
            return function()

        device = Device(
            None,
            coordinator="simulated",
            token=self._token,
            population=self._task.population,
            conditions=AlwaysReady(),
            callbacks=[witness] if is_tested else [],
            transport=counted,
            examples=ArrayExamples(_batch(shard.train), _batch(shard.test) if is_tested else None),
            clock=self._clock,
            seed=int(device_seed.generate_state(1, np.uint64)[0]),
            run_blocking=run_blocking,
            primitives=self._primitives,
        )

        def finished(outcome: Outcome) -> bool:
            has_last = self._history.last_version in witness.answers or not is_tested
            return self._history.ended and isinstance(outcome, Idle) and has_last

        try:
            await device.run_async(finished)
            federated, personalised = (
                (witness.answers[self._history.last_version], witness.ask()) if is_tested else ([], [])
            )
            return ClientResult(
                shard, Account(federated, personalised, counted.bytes_up, counted.bytes_down), line.lost
            )
        finally:
            await device.close_async()

    def _result(self, blob: bytes, clients: list[ClientResult]) -> SimulationResult:
        return SimulationResult(
            parameters=decode_tensors(blob, self._task.layout),
            parameters_sha256=hashlib.sha256(blob).hexdigest(),
            events=tuple(self._history.events),
            clients=tuple(clients),
            simulated_seconds=(self._clock.unix_ms() - virtual_time.START_UNIX_MS) / 1000,
        )


class _FleetPrimitives(SharedPrimitives):
    """What one device has agreed or verified in a secure sum, no other computes again."""

    def once(self, message: object, reader: Hashable, compute: Callable[[], T]) -> T:
        """Computes: each device parses an answer of its own, so that nothing would be found again."""
        return compute()


class History:
    """Follows one task as an operator's watch does."""

    def __init__(self, core: CoordinatorCore, task_id: str, progress: Progress) -> None:
        self._core = core
        self._task_id = task_id
        self._progress = progress
        self.events: list[TaskEvent] = []
        self.ended = False

    @property
    def last_version(self) -> int:
        """Fewer than the task's rounds, if its privacy budget was spent before."""
        return max((event.version for event in self.events if event.kind == EventKind.VERSION_COMMITTED), default=0)

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
        noise_key=NoiseKey(draw(32)),
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
