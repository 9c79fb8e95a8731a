"""Random histories of a small fleet under a fake clock: each report counts once and sums are exact, come what may."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import select
from tiny_device import FakeClock, TinyDevice, World, settle

from evensong.coordinator import tables
from evensong.coordinator.rounds import LIVE, TRANSITIONS, State
from evensong.v1 import common_pb2, device_pb2, operator_pb2
from evensong.wire.signing import new_request_id
from evensong.wire.tensors import decode_tensors

FLEET, GOAL, MINIMUM = 4, 2, 1
ABORTS = [device_pb2.ABORT_REASON_CONDITIONS, device_pb2.ABORT_REASON_UNFIT]
devices = st.integers(0, FLEET - 1)


class Rounds(RuleBasedStateMachine):
    """Devices check in, upload, report, repeat themselves, give up; time passes; the coordinator dies and returns."""

    @initialize(evaluate_every=st.integers(0, 2), over_selection=st.sampled_from([1.0, 1.5]))
    def start(self, evaluate_every: int, over_selection: float) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = FakeClock()
        self.acknowledged: list[tuple[str, int, float]] = []
        self.assignments: dict[int, device_pb2.Assignment] = {}
        self.updates: dict[str, dict[str, Any]] = {}
        self.last: dict[int, tuple[str, Any, type[Any], Any]] = {}
        self.world = World(self.folder / "data", clock=self.clock, log_level="error")
        self.do(self.world.__aenter__())
        self.do(
            self.world.submit(
                goal=GOAL,
                minimum=MINIMUM,
                over_selection=over_selection,
                deadline_ms=1_000,
                rounds=4,
                evaluate_every=evaluate_every,
            )
        )
        self.do(self.world.enrol(FLEET))

    def do(self, coroutine: Any) -> Any:
        async def run() -> Any:
            result = await coroutine
            await settle()
            return result

        return self.loop.run_until_complete(run())

    def device(self, index: int) -> TinyDevice:
        return self.world.devices[index]

    def send(self, index: int, method: str, request: Any, response_type: type[Any]) -> Any:
        answer = self.do(self.device(index).send(method, request, response_type))
        self.last[index] = (method, request, response_type, answer)
        return answer

    # ------------------------------------------------------------------------------------------------------------ rules

    @rule(index=devices)
    def check_in(self, index: int) -> None:
        request = device_pb2.CheckInRequest(
            request_id=new_request_id(),
            runtime_version="0.1.0",
            memory_bytes=1 << 30,
            training_examples=10,
            evaluation_examples=10,
        )
        answer = self.send(index, "CheckIn", request, device_pb2.CheckInResponse)
        assert not answer.HasField("refusal"), answer
        if answer.HasField("assignment"):
            assert answer.assignment.lease.expires_unix_ms > self.clock.unix_ms()
            self.assignments[index] = answer.assignment

    @rule(index=devices, weight=st.integers(1, 100), keep=st.booleans())
    def contribute(self, index: int, weight: int, keep: bool) -> None:
        assignment = self.assignments.get(index)
        if assignment is None:
            return
        if not keep:
            del self.assignments[index]
        if assignment.work == device_pb2.WORK_EVALUATE:
            report = device_pb2.ReportRequest(
                request_id=new_request_id(),
                lease=assignment.lease,
                metrics=common_pb2.Metrics(examples=4, loss_sum=0.5, correct=1),
            )
            self.send(index, "Report", report, device_pb2.ReportResponse)
            return
        device = self.device(index)
        delta = {s.name: device.rng.normal(size=s.shape).astype(np.float32) for s in self.world.layout}
        data = self.world.codec.encode(delta, self.world.layout, device.rng)
        begun = self.do(device.begin(assignment.lease, data))
        if begun.HasField("refusal"):
            return
        upload_id = self.do(device.upload(assignment.lease, data))
        self.updates[upload_id] = delta
        commit = device_pb2.CommitUploadRequest(
            request_id=new_request_id(),
            upload_id=upload_id,
            lease=assignment.lease,
            weight=float(weight),
            metrics=common_pb2.Metrics(examples=10, loss_sum=1.0, correct=5),
        )
        answer = self.send(index, "CommitUpload", commit, device_pb2.CommitUploadResponse)
        if not answer.HasField("refusal"):
            self.acknowledged.append((upload_id, assignment.round, float(weight)))

    @rule(index=devices)
    def repeat_the_last_call(self, index: int) -> None:
        if index not in self.last:
            return
        method, request, response_type, first = self.last[index]
        answer = self.do(self.device(index).send(method, request, response_type))
        changed = not first.HasField("refusal") and (method != "CheckIn" or first.HasField("assignment"))
        if changed:
            assert not answer.HasField("refusal")
            if method == "CheckIn":
                assert answer.assignment == first.assignment

    @rule(index=devices, reason=st.sampled_from(ABORTS))
    def give_up(self, index: int, reason: device_pb2.AbortReason) -> None:
        assignment = self.assignments.pop(index, None)
        if assignment is not None:
            self.do(self.device(index).abort(assignment.lease, reason))

    @rule(milliseconds=st.integers(1, 1_200))
    def time_passes(self, milliseconds: int) -> None:
        self.do(self.clock.advance(milliseconds))

    @rule()
    def the_coordinator_dies_and_comes_back(self) -> None:
        self.do(self.world.core.stop())
        before = self.world
        self.world = World(self.folder / "data", clock=self.clock, log_level="error")
        self.do(self.world.__aenter__())
        self.world.task_id = before.task_id
        self.world.devices = before.devices
        for device in self.world.devices:
            device.dispatcher = self.world.core.devices

    @rule(version=st.integers(0, 3))
    def promote(self, version: int) -> None:
        if version <= max(info.manifest.number for info in self.world.versions()):
            request = operator_pb2.PromoteVersionRequest(
                request_id=new_request_id(), task_id=self.world.task_id, version=version
            )
            self.world.core.operators.promote_version(request)
            self.do(settle())

    # ------------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def the_journal_is_what_was_acknowledged(self) -> None:
        rows = self.read(
            select(tables.journal, tables.rounds.c.number).join(
                tables.rounds, tables.rounds.c.round_id == tables.journal.c.round_id
            )
        )
        assert sorted((r.upload_id, r.number, r.weight) for r in rows if r.upload_id) == sorted(self.acknowledged)
        assert max(Counter((r.round_id, r.device_id) for r in rows).values(), default=1) == 1

    @invariant()
    def rounds_keep_their_bounds(self) -> None:
        now = self.clock.unix_ms()
        reports = Counter(row.round_id for row in self.read(select(tables.journal)))
        leases = self.read(
            select(tables.leases).where(tables.leases.c.state == "active", tables.leases.c.expires_ms > now)
        )
        assert max(Counter(lease.device_id for lease in leases).values(), default=1) == 1
        held = Counter(lease.round_id for lease in leases)
        live = 0
        for row in self.read(select(tables.rounds)):
            assert row.reports == reports[row.round_id] <= row.goal
            assert row.reports + held[row.round_id] <= row.places or row.state not in LIVE
            assert row.state != State.COMMITTED or row.reports >= row.minimum
            live += row.work == device_pb2.WORK_TRAIN and row.state in LIVE
        running = self.world.task().state == operator_pb2.TASK_STATE_RUNNING
        assert live <= running, "one training round a running task, none of another"

    @invariant()
    def versions_are_what_the_journal_comes_to(self) -> None:
        versions = self.read(select(tables.versions).order_by(tables.versions.c.number))
        parameters: list[dict[str, Any]] = []
        for version in versions:
            blob = self.world.core.context.blobs.read(version.parameters_sha256)
            parameters.append(decode_tensors(blob, self.world.layout))
            if version.number == 0:
                continue
            rows = self.read(
                select(tables.journal)
                .join(tables.rounds, tables.rounds.c.round_id == tables.journal.c.round_id)
                .where(tables.rounds.c.number == version.round, tables.rounds.c.work == device_pb2.WORK_TRAIN)
                .order_by(tables.journal.c.entry)
            )
            total = sum(row.weight for row in rows)
            assert (version.reports, version.total_weight) == (len(rows), total)
            for name, base in parameters[version.parent].items():
                mean = sum(row.weight * self.updates[row.upload_id][name].astype(np.float64) for row in rows) / total
                np.testing.assert_allclose(parameters[-1][name], base + mean, rtol=1e-6, atol=1e-7)

    @invariant()
    def events_have_no_gap(self) -> None:
        numbers = [event.sequence for event in self.world.events()]
        assert numbers == list(range(1, len(numbers) + 1))

    def read(self, statement: Any) -> list[Any]:
        with self.world.core.context.database.read() as tx:
            return list(tx.execute(statement).all())

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.do(self.world.core.stop())
            self.loop.close()
            shutil.rmtree(self.folder)


TestRounds = Rounds.TestCase
TestRounds.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_every_state_is_left_or_final_and_reached() -> None:
    """The table itself: from the two first states everything is reached, and only the ends are never left."""
    reached = {State.COLLECTING, State.EVALUATING} | set(TRANSITIONS.values())
    assert reached == set(State)
    assert {state for state in State if not any(before == state for before, _ in TRANSITIONS)} == set(State) - set(LIVE)


def test_the_documented_transitions_are_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "coordinator.md").read_text()
    documented = text.split("<!-- transitions -->")[1].split("```")[1].split("\n")[1:-1]
    assert documented == [f"{before} --{trigger}--> {after}" for (before, trigger), after in TRANSITIONS.items()]
