"""Secure rounds of real devices with the real coordinator, in one process under simulated time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select
from tiny_artifact import tiny_artifact, tiny_examples

from evensong.client import (
    Aborted,
    AlwaysReady,
    Device,
    EnrolmentError,
    Evaluated,
    Idle,
    Outcome,
    Trained,
    device_command,
    inline,
)
from evensong.client import work as device_work
from evensong.coordinator import EventKind, LocalTraining, SecureAggregation, Task, TaskEvent, devices_command, tables
from evensong.coordinator.config import load as load_settings
from evensong.coordinator.context import run_inline
from evensong.coordinator.privacy.keys import NoiseKey
from evensong.coordinator.server import CoordinatorCore
from evensong.secagg.vector import VectorPlan
from evensong.simulations import SimulatedClock, virtual_time
from evensong.simulations.simulation import enrolment_token, submit
from evensong.v1 import device_pb2, operator_pb2, secagg_pb2
from evensong.wire.errors import UnreachableError
from evensong.wire.rotation import rotation_seed
from evensong.wire.tensors import decode_tensors
from evensong.wire.transport import Metadata

pytestmark = pytest.mark.secagg

TASK = {
    "rounds": 1,
    "goal": 3,
    "over_selection": 1.0,
    "local": LocalTraining(epochs=1, learning_rate=0.3),
    "secure": SecureAggregation(corrupted=0.0, stage_seconds=60.0),
    "clip_norm": 0.5,
}
#: Of the protocol: what a Secure request brings.
STEPS = ["advertise", "shares", "masked", "commit", "unmask"]


class Crash(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""


class Line:
    """A device's line to the coordinator; ``before`` and ``after`` may lose what passes, or end the process."""

    def __init__(self, core: CoordinatorCore, clock: SimulatedClock) -> None:
        self._core, self._clock = core, clock
        self.sent: list[tuple[str, Any]] = []
        self.before: Callable[[str, Any], None] = lambda name, request: None
        self.after: Callable[[str, Any], None] = lambda name, request: None

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        name = method.rpartition("/")[2]
        request = getattr(secagg_pb2 if name == "Secure" else device_pb2, f"{name}Request").FromString(body)
        self.sent.append((name, request))
        await self._clock.sleep(0.01)
        self.before(name, request)
        answer = await self._core.devices.call(method, body, metadata)
        self.after(name, request)
        return answer

    def questions(self) -> list[secagg_pb2.SecureRequest]:
        """What a new process asks: how the attempt of the one before it ended."""
        secure = [request for name, request in self.sent if name == "Secure"]
        return [request for request in secure if request.HasField("masked") and not request.wait_ms]

    async def stream(self, method: str, body: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        async for message in self._core.devices.stream(method, body, metadata):
            yield message

    async def close(self) -> None:
        pass


class Sealed(NamedTuple):
    name: str
    work: int
    round: int
    lanes: np.ndarray[Any, Any]


class World:
    """One coordinator and its fleet; ``sealed`` has every vector that a device sealed, before any mask."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, devices: int = 3, **settings: Any) -> None:
        self.folder, self.clock = folder, SimulatedClock()
        self.core = CoordinatorCore(
            load_settings(data_dir=folder / "coordinator", durable=False, log_level="error", **settings),
            clock=self.clock,
            run_blocking=run_inline,
            signer=Ed25519PrivateKey.from_private_bytes(bytes(range(32))),
            noise_key=NoiseKey(bytes(32)),
        )
        self.core.start()
        self.names = [f"device-{index}" for index in range(devices)]
        self.devices: dict[str, Device] = {}
        self.lines = {name: Line(self.core, self.clock) for name in self.names}
        self.sealed: list[Sealed] = []
        original = device_work.seal_vector

        def seal(*arguments: Any, **options: Any) -> Any:
            vector = original(*arguments, **options)
            randomness = options["draw"].__self__
            name = next(n for n, device in self.devices.items() if device._context.randomness is randomness)
            lanes = np.frombuffer(vector.data, "<u8")
            self.sealed.append(Sealed(name, options["work"], options["round"], lanes))
            return vector

        monkeypatch.setattr(device_work, "seal_vector", seal)

    def submit(self, **fields: Any) -> None:
        self.task = Task("tiny", tiny_artifact(), **(TASK | fields))
        self.task_id = submit(self.core, self.task)
        self.token = enrolment_token(self.core, "default", uses=len(self.names))

    def open(self, name: str, **options: Any) -> Device:
        """The device of that name, from its own folder: for the first time, or as after a restart."""
        index = self.names.index(name)
        device = Device(
            self.folder / name,
            coordinator="in memory",
            token=self.token,
            conditions=AlwaysReady(),
            transport=self.lines[name],
            clock=self.clock,
            seed=index,
            run_blocking=inline,
            **options,
        )
        if not device.examples.count():
            device.examples.add_many(*tiny_examples(20 + index, index))
            device.examples.add_many(*tiny_examples(10, 50 + index), split="test")
        self.devices[name] = device
        return device

    async def live(self, name: str) -> list[Outcome]:
        """Until the task has ended; a process that dies is followed by another one."""
        outcomes: list[Outcome] = []
        device = self.devices.get(name) or self.open(name)
        while not (self.ended() and isinstance(outcomes[-1], Idle)):
            try:
                outcomes.append(await device.step_async())
            except Crash:
                device._state.close()
                device._examples.close()
                device = self.open(name)
                continue
            await self.clock.sleep(max(outcomes[-1].wait_s, 0.1))
        return outcomes

    async def all_live(self) -> dict[str, list[Outcome]]:
        lives = await asyncio.gather(*(self.live(name) for name in self.names))
        return dict(zip(self.names, lives, strict=True))

    def trained(self, round: int) -> list[Sealed]:
        return [sealed for sealed in self.sealed if (sealed.work, sealed.round) == (device_pb2.WORK_TRAIN, round)]

    def events(self, kind: EventKind) -> list[TaskEvent]:
        found, _ = self.core.operators.read_events(self.task_id, 0)
        return [event for event in map(TaskEvent.of, found) if event.kind == kind]

    def ended(self) -> bool:
        return bool(self.events(EventKind.TASK_ENDED))

    def sum_of(self, round: int, lanes: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """The mean update that these sealed vectors come to, without any mask; float64 [parameters]."""
        blob = self.core.operators.list_versions(operator_pb2.ListVersionsRequest(task_id=self.task_id))
        bundle_sha256 = blob.versions[0].manifest.bundle_sha256
        plan = VectorPlan.from_bundle(self.task.to_bundle(), device_pb2.WORK_TRAIN)
        total = np.sum(lanes, axis=0, dtype=np.uint64)
        seed = rotation_seed(bundle_sha256, device_pb2.WORK_TRAIN, round)
        found = plan.decode(total, len(lanes), clip_norm=0.5, seed=seed)
        return found.update / found.total_weight

    def version(self, number: int) -> np.ndarray[Any, Any]:
        """Its parameters, float32."""
        versions = self.core.operators.list_versions(operator_pb2.ListVersionsRequest(task_id=self.task_id)).versions
        blob = self.core.context.blobs.read(versions[number].manifest.parameters.sha256.hex())
        return np.concatenate([values.reshape(-1) for values in decode_tensors(blob, self.task.layout).values()])

    def assert_exact(self, number: int, summed: list[Sealed]) -> None:
        """Version ``number`` is its parent plus the mean of exactly these."""
        expected = self.version(number - 1) + self.sum_of(summed[0].round, [sealed.lanes for sealed in summed])
        assert np.array_equal(self.version(number), expected.astype("<f4"))

    def journal(self) -> list[tuple[int, str]]:
        with self.core.context.database.read() as tx:
            rows = tx.execute(select(tables.journal.c.round_id, tables.journal.c.device_id)).all()
        return [(row.round_id, row.device_id) for row in rows]

    async def close(self) -> None:
        for device in self.devices.values():
            await device.close_async()
        await self.core.stop()


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(story: Callable[[World], Awaitable[None]], **options: Any) -> None:
        async def whole() -> None:
            world = World(tmp_path, monkeypatch, **options)
            try:
                async with asyncio.timeout(24 * 3600):
                    await story(world)
            finally:
                await world.close()

        virtual_time.run(whole())

    return run


Play = Callable[..., None]


def test_training_and_evaluation_are_the_exact_sums_of_what_devices_sealed(play: Play) -> None:
    async def story(world: World) -> None:
        world.submit(rounds=2)
        lives = await world.all_live()
        for outcomes in lives.values():
            kinds = [type(outcome) for outcome in outcomes if not isinstance(outcome, Idle)]
            assert kinds == [Trained, Evaluated] * 2
        for number in (1, 2):
            assert len(world.trained(number)) == 3
            world.assert_exact(number, world.trained(number))
        evaluated = world.events(EventKind.VERSION_EVALUATED)
        assert [event.metrics.examples for event in evaluated if event.metrics] == [30, 30]
        told = [outcome for outcomes in lives.values() for outcome in outcomes if isinstance(outcome, Evaluated)]
        for event in evaluated:
            assert event.metrics is not None
            assert event.metrics.accuracy * 30 == sum(told_.correct for told_ in told if told_.version == event.version)
            loss = sum(told_.loss * told_.examples for told_ in told if told_.version == event.version)
            assert event.metrics.loss * 30 == pytest.approx(loss, abs=3 / 4096)
        assert not any(name == "Report" for line in world.lines.values() for name, _ in line.sent)

    play(story)


@pytest.mark.parametrize("lost", ["before", "after"], ids=["requests", "responses"])
def test_the_round_commits_though_each_call_is_lost_once(play: Play, lost: str) -> None:
    async def story(world: World) -> None:
        world.submit()
        for line in world.lines.values():
            setattr(line, lost, each_once())
        await world.all_live()
        assert len(world.trained(1)) == 3 == len(set(world.journal()[:3]))
        world.assert_exact(1, world.trained(1))
        advertised = [
            request.advertise.channel_key
            for line in world.lines.values()
            for name, request in line.sent
            if name == "Secure" and request.HasField("advertise")
        ]
        assert len(advertised) >= 2 * len(set(advertised)) == 2 * 6  # one attempt of each sum, each message twice

    play(story)


def each_once() -> Callable[[str, Any], None]:
    seen: set[bytes] = set()

    def lose(name: str, request: Any) -> None:
        body = name.encode() + request.SerializeToString()
        if body not in seen:
            seen.add(body)
            raise UnreachableError(f"{name} was lost")

    return lose


@pytest.mark.parametrize("call", [*STEPS, "BeginUpload", "UploadChunk", "CommitUpload"])
def test_the_round_commits_though_one_device_loses_one_call_for_a_while(play: Play, call: str) -> None:
    """Not once but for a minute, while the others wait for it, or go on without it and it learns so."""

    async def story(world: World) -> None:
        world.submit(goal=4)
        left = [6]

        def lose(name: str, request: Any) -> None:
            if left[0] and call in (name, request.WhichOneof("step") if name == "Secure" else None):
                left[0] -= 1
                raise UnreachableError(f"{call} was lost")

        world.lines["device-0"].before = lose
        await world.all_live()
        assert left == [0]
        [committed] = world.events(EventKind.VERSION_COMMITTED)
        rows = world.journal()
        assert len(set(rows)) == len(rows) and committed.reports in (3, 4)
        if committed.reports == 4:
            world.assert_exact(1, world.trained(committed.round))

    play(story, devices=4)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_device_that_dies_in_a_stage_is_back_for_the_next_round(play: Play, step: str, after: bool) -> None:
    async def story(world: World) -> None:
        world.submit(goal=4, rounds=2)
        line = world.lines["device-0"]

        def die(name: str, request: Any) -> None:
            if name == "Secure" and request.HasField(step):
                line.before = line.after = lambda name, request: None
                raise Crash

        setattr(line, "after" if after else "before", die)
        lives = await world.all_live()
        mine = lives["device-0"]
        committed = world.events(EventKind.VERSION_COMMITTED)
        assert [event.version for event in committed] == [1, 2] and committed[1].reports == 4
        gave_up = [outcome.reason for outcome in mine if isinstance(outcome, Aborted)]
        assert gave_up == ([] if (step, after) == ("unmask", True) else ["UNFIT"])  # nothing was left to do then
        assert any(isinstance(outcome, Trained) and outcome.round == committed[1].round for outcome in mine)
        rows = world.journal()
        assert len(set(rows)) == len(rows)
        [question] = line.questions()
        secure = [request for name, request in line.sent if name == "Secure" and request is not question]
        for kind, fields in (("advertise", ("channel_key", "mask_key", "nonce")), ("shares", ("seed_commitment",))):
            bodies = {getattr(r, kind).SerializeToString(): getattr(r, kind) for r in secure if r.HasField(kind)}
            values = [getattr(message, field) for message in bodies.values() for field in fields]
            assert len(set(values)) == len(values) > 0
        joined = [(r.lease.lease_id, r.attempt) for r in secure if r.HasField("advertise")]
        dead = next(i for i, r in enumerate(secure) if r.HasField(step))
        assert not {(r.lease.lease_id, r.attempt) for r in secure[dead + 1 :]} & {joined[0]}

    play(story, devices=4)


def test_a_second_attempt_sums_each_update_once(play: Play) -> None:
    """Two of five die before they share: the rest are too few, and newcomers make them enough."""

    async def story(world: World) -> None:
        secure = SecureAggregation(corrupted=0.0, dropout=0.2, min_survivors=5, stage_seconds=60.0)
        world.submit(goal=5, secure=secure, evaluate_every=0)
        leavers, newcomers = world.names[:2], world.names[5:]
        for name in leavers:
            world.lines[name].before = die
        running = [asyncio.ensure_future(world.live(name)) for name in world.names[:5]]
        await world.clock.sleep(5)
        await asyncio.gather(*running, *map(world.live, newcomers))
        [committed] = world.events(EventKind.VERSION_COMMITTED)
        assert (committed.version, committed.round, committed.reports) == (1, 1, 5)
        attempts = {name: {r.attempt for kind, r in world.lines[name].sent if kind == "Secure"} for name in world.names}
        assert all(attempts[name] == {1, 2} for name in world.names[2:5])
        begun = [r for name in world.names for kind, r in world.lines[name].sent if kind == "BeginUpload"]
        vectors = [request.update.sha256 for request in begun]
        assert len(set(vectors)) == len(vectors) == 5
        world.assert_exact(1, [sealed for sealed in world.trained(1) if sealed.name not in leavers])

    def die(name: str, request: Any) -> None:
        if name == "Secure" and request.HasField("shares"):
            raise Crash

    play(story, devices=7)


@pytest.mark.parametrize(
    ("sent", "unsent"), [("shares", "shares"), ("masked", "BeginUpload"), ("masked", "CommitUpload")]
)
def test_a_process_that_starts_anew_takes_part_in_the_next_attempt(play: Play, sent: str, unsent: str) -> None:
    """Two of five die. What the first had sent kept its place: it brings what it had sealed before. The other kept the
    cohort waiting, and comes back under a new lease."""

    async def story(world: World) -> None:
        secure = SecureAggregation(corrupted=0.0, dropout=0.2, min_survivors=5, stage_seconds=60.0)
        world.submit(goal=5, secure=secure, evaluate_every=0)
        back_ms = world.clock.unix_ms() + 75_000  # the first attempt is given up then, the next one gathers devices
        kept, lost, *others = world.names
        world.lines[kept].after, world.lines[lost].before = dying(sent), dying(unsent)

        async def leave(name: str) -> list[Outcome]:
            device, line = world.open(name), world.lines[name]
            with pytest.raises(Crash):
                await device.step_async()
            device._state.close()
            device._examples.close()
            line.before = line.after = lambda name, request: None
            await world.clock.sleep((back_ms - world.clock.unix_ms()) / 1000)
            world.open(name)
            return await world.live(name)

        await asyncio.gather(leave(kept), leave(lost), *map(world.live, others))
        [committed] = world.events(EventKind.VERSION_COMMITTED)
        assert (committed.version, committed.round, committed.reports) == (1, 1, 5)
        sealed = world.trained(1)
        assert sorted(one.name for one in sealed) == sorted([*world.names, lost])
        world.assert_exact(1, list({one.name: one for one in sealed}.values()))  # of the last of each
        for name, leases in ((kept, 1), (lost, 2)):
            questions = world.lines[name].questions()
            assert [question.attempt for question in questions] == [1] * leases
            calls = [request for kind, request in world.lines[name].sent if kind == "Secure"]
            assert len({request.lease.lease_id for request in calls}) == leases
            assert {request.attempt for request in calls[calls.index(questions[-1]) + 1 :]} == {2}
            keys = [request.advertise.mask_key for request in calls if request.HasField("advertise")]
            assert len(set(keys)) == len(keys) == 2

    def dying(call: str) -> Callable[[str, Any], None]:
        def die(name: str, request: Any) -> None:
            if call in (name, request.WhichOneof("step") if name == "Secure" else None):
                raise Crash

        return die

    play(story, devices=5)


# --------------------------------------------------------------------------------------------------------- certificates


def test_an_offline_authority_works_end_to_end(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(main: Callable[[list[str]], int], *arguments: object) -> bytes:
        assert main([str(argument) for argument in arguments]) == 0
        return bytes.fromhex(capsys.readouterr().out)

    ours, theirs = tmp_path / "authority.key", tmp_path / "other.key"
    authority = printed(devices_command.main, "authority", ours)
    other = printed(devices_command.main, "authority", theirs)

    def certificate(name: str, by: Path) -> bytes:
        public_key = printed(device_command.main, "key", "--state", tmp_path / name).hex()
        return printed(devices_command.main, "certify", public_key, "--authority", by, "--days", 3650)

    names = ["device-0", "device-1", "device-2", "late"]
    certified = {name: certificate(name, ours) for name in names}
    wrongly = certificate("late", theirs)

    async def story(world: World) -> None:
        world.submit()
        *on_time, late = world.names = names
        world.lines[late] = Line(world.core, world.clock)
        for name in on_time:
            world.open(name, authority=authority, certificate=certified[name])
        await asyncio.gather(*map(world.live, on_time))
        assert len(world.events(EventKind.VERSION_COMMITTED)) == 1

        async def fails(why: str, **told: bytes) -> None:
            device = world.open(late, **told)
            with pytest.raises(EnrolmentError, match=why):
                await device.step_async()
            await device.close_async()

        world.token = enrolment_token(world.core, "default", uses=1)
        await fails("certificate does not hold", authority=authority, certificate=wrongly)
        await fails("names another enrolment authority")  # a device that was told of none believes in none
        device = world.open(late, authority=authority, certificate=certified[late])
        assert isinstance(await device.step_async(), Idle)  # with the token of the first try
        await device.close_async()
        await fails("trusts another enrolment authority", authority=other)
        world.open(late, authority=authority)

    play(story, authority_public_key=authority.hex())
