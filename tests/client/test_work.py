"""What ends work before its time: the lease, the conditions, divergence, a full disk. Nothing half-done stays."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from scripted import START, Coordinator, FakeClock, device_for, step_until
from tiny_artifact import BIAS, WEIGHT, tiny_examples

from evensong.client import (
    Aborted,
    ClientError,
    Dropped,
    Idle,
    NotReady,
    Postponed,
    StorageFullError,
    Trained,
    UnfitError,
    Unmet,
    in_thread,
)
from evensong.client.callbacks import CheckedIn, Event, RoundStarted, Sealed, StepDone, Uploaded
from evensong.mobile_runtime import DivergedError
from evensong.v1 import device_pb2, task_pb2

TRAIN, EVALUATE = device_pb2.WORK_TRAIN, device_pb2.WORK_EVALUATE


class Unplugged:
    """Ready until it is told otherwise."""

    def __init__(self) -> None:
        self.unmet: list[Unmet] = []

    def check(self, *, training: bool = False) -> list[Unmet]:
        return self.unmet


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator(FakeClock(), give=[TRAIN])


def test_without_power_nobody_is_asked(coordinator: Coordinator) -> None:
    conditions = Unplugged()
    conditions.unmet = [Unmet("power", "BAT0 is discharging")]
    with device_for(coordinator, conditions=conditions) as device:
        outcome = device.step()
        assert isinstance(outcome, NotReady) and outcome.unmet == tuple(conditions.unmet) and outcome.wait_s >= 10
        assert not coordinator.calls
        conditions.unmet = []
        assert isinstance(device.step(), Trained)


def test_unplugging_in_mid_training_gives_the_work_back(coordinator: Coordinator) -> None:
    conditions = Unplugged()

    def unplug(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            conditions.unmet = [Unmet("power", "BAT0 is discharging")]
            coordinator.clock.now += 2000
        assert not isinstance(event, StepDone) or event.step <= 3

    with device_for(coordinator, conditions=conditions, callbacks=[unplug]) as device:
        outcome = device.step()
    assert isinstance(outcome, Aborted) and outcome.reason == "CONDITIONS" and "BAT0" in outcome.message
    assert coordinator.aborts == [(device_pb2.ABORT_REASON_CONDITIONS, outcome.message)]
    assert not coordinator.committed


def test_the_lease_ends_in_mid_training(coordinator: Coordinator) -> None:
    coordinator.lease_ms = 60_000

    def dawdle(event: Event) -> None:
        if isinstance(event, StepDone):
            coordinator.clock.now += 20_000

    with device_for(coordinator, callbacks=[dawdle]) as device:
        outcome = device.step()
        assert isinstance(outcome, Dropped) and outcome.reason == "LEASE_EXPIRED"
        assert device.status()["work"] is None and isinstance(device.step(), Idle)
    assert "BeginUpload" not in coordinator.calls and "Abort" not in coordinator.calls  # nobody waits for it any more


def test_a_lease_that_ended_while_the_device_was_off(coordinator: Coordinator, tmp_path: Path) -> None:
    def vanish(moment: int, method: str) -> None:
        if method == "CommitUpload":
            raise KeyboardInterrupt

    coordinator.before = vanish
    device = device_for(coordinator, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.step()
    device.close()
    coordinator.clock.now += 10**7
    with device_for(coordinator, tmp_path) as device:
        outcome = device.step()
        assert isinstance(outcome, Dropped) and outcome.reason == "LEASE_EXPIRED"
    assert not coordinator.committed


def test_divergence_leaves_no_trace(tmp_path: Path) -> None:
    def plan(bundle: task_pb2.TaskBundle) -> None:
        bundle.local.personal.append("*.bias")
        bundle.local.learning_rate = 1e5
        bundle.local.epochs = 200

    coordinator = Coordinator(FakeClock(), give=[TRAIN], plan=plan)
    with device_for(coordinator, tmp_path, examples=0) as device:
        x, y = tiny_examples(40, seed=1)
        device.examples.add_many(x * 1e30, y)
        outcome = device.step()
        assert isinstance(outcome, Aborted) and outcome.reason == "DIVERGED"
        assert not device._state.personal("task-1")
    assert coordinator.aborts[0][0] == device_pb2.ABORT_REASON_DIVERGED and not coordinator.committed


def test_evaluation_without_test_examples_is_given_back() -> None:
    coordinator = Coordinator(FakeClock(), give=[EVALUATE])
    with device_for(coordinator, examples=0) as device:
        outcome = device.step()
    assert isinstance(outcome, Aborted) and outcome.reason == "UNFIT" and not coordinator.reports


def test_a_bug_of_ours_is_reported_and_survived(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    with device_for(coordinator) as device:
        monkeypatch.setattr("evensong.client.work.seal", lambda *arguments, **options: 1 / 0)
        outcome = device.step()
        assert isinstance(outcome, Aborted) and outcome.reason == "INTERNAL" and outcome.message == "ZeroDivisionError"
        monkeypatch.undo()
        coordinator.give = [TRAIN]
        assert isinstance(device.step(), Trained)


def test_a_full_disk_postpones_and_loses_nothing(coordinator: Coordinator, tmp_path: Path) -> None:
    """Real SQLITE_FULL: the database may not grow, so that the sealed update cannot be stored."""
    coordinator.features = 300
    coordinator.__post_init__()
    coordinator.give = [TRAIN]
    with device_for(coordinator, tmp_path) as device:
        device.enrol()
        connection = device._state._database.connection
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 1}")
        outcome = device.step()
        assert isinstance(outcome, Postponed) and isinstance(outcome.error, StorageFullError)
        assert not coordinator.committed
        connection.execute("PRAGMA max_page_count = 1000000")
        assert isinstance(step_until(device, Trained), Trained)
    assert len(coordinator.committed) == 1 and len(coordinator.devices) == 1


def test_a_disk_that_fills_up_during_a_download_keeps_what_it_has(coordinator: Coordinator, tmp_path: Path) -> None:
    from evensong.wire.chunks import sha256

    with device_for(coordinator, tmp_path) as device:
        device.enrol()
        part = tmp_path / "cache" / f"{sha256(coordinator.artifact).hex()}.part"
        part.symlink_to("/dev/full")
        outcome = device.step()
        assert isinstance(outcome, Postponed) and isinstance(outcome.error, StorageFullError)
        part.unlink()
        assert isinstance(step_until(device, Trained), Trained)
    assert coordinator.calls.count("CheckIn") == 1


def test_events_tell_the_round_in_order(coordinator: Coordinator) -> None:
    events: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("a callback must not decide about work")

    with device_for(coordinator, callbacks=[broken, events.append]) as device:
        device.step()
    kinds = [type(event) for event in events]
    wanted = [CheckedIn, RoundStarted, StepDone, Sealed, Uploaded]
    assert [kind for kind in dict.fromkeys(kinds) if kind in wanted] == wanted
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [step.step for step in steps] == list(range(1, 11)) and steps[-1].loss < steps[0].loss


def test_personalisation_is_bound_to_its_version_and_repeated_for_the_next(tmp_path: Path) -> None:
    coordinator = Coordinator(FakeClock())
    x, y = tiny_examples(100, seed=1)
    with device_for(coordinator, tmp_path) as device:
        device.step()
        uniform = device.predict(x)
        device.personalize(epochs=3, learning_rate=0.5, trainable=["*.weight"])
        assert np.mean(device.predict(x).argmax(1) == y) > 0.9 > np.mean(uniform.argmax(1) == y)
        session = device._serving._session(None)
        assert session.get([WEIGHT])[WEIGHT].any() and not session.get([BIAS])[BIAS].any()  # the bias was frozen
    with device_for(coordinator, tmp_path) as device:
        assert np.mean(device.predict(x).argmax(1) == y) > 0.9  # offline, after a restart
        coordinator.publish(1, {BIAS: np.array([5, 0, 0], np.float32)})
        assert isinstance(device.step(), Idle)
        [model] = device.status()["models"]
        assert model["version"] == 1 and model["personalized"]
        bias = device._serving._session(None).get([BIAS])[BIAS]
        assert bias.tolist() == [5, 0, 0]  # the new version's, still frozen


def test_the_tasks_own_recipe_is_followed_without_being_asked() -> None:
    def plan(bundle: task_pb2.TaskBundle) -> None:
        bundle.local.personalization.epochs, bundle.local.personalization.learning_rate = 2, 0.5

    coordinator = Coordinator(FakeClock(), plan=plan)
    with device_for(coordinator) as device:
        device.step()
        assert device.status()["models"][0]["personalized"]
        assert device.evaluate().accuracy > 0.9


def test_personalisation_that_cannot_be_says_why_and_keeps_what_was(coordinator: Coordinator) -> None:
    coordinator.give = []
    x = tiny_examples(5, seed=3)[0]
    with device_for(coordinator) as device:
        device.step()
        device.personalize(epochs=1, learning_rate=0.1)
        before = device.predict(x)
        for options, message in (
            ({}, "how to personalise"),
            ({"epochs": 1, "trainable": ["nothing.*"]}, "nothing is left"),
            ({"epochs": 10**6}, "too much work"),
        ):
            with pytest.raises(UnfitError, match=message):
                device.personalize(**options)
        with pytest.raises(DivergedError):
            device.personalize(epochs=50, learning_rate=1e38)
        assert np.array_equal(device.predict(x), before)


def test_predict_answers_while_training_runs_in_another_thread(coordinator: Coordinator) -> None:
    coordinator.give = []
    x = tiny_examples(5, seed=3)[0]
    answers: list[np.ndarray] = []
    with device_for(coordinator) as probe:
        probe.step()

        def ask(event: Event) -> None:
            if isinstance(event, StepDone):
                assert threading.current_thread() is not threading.main_thread()
                answers.append(device.predict(x))

        with device_for(coordinator, run_blocking=in_thread, callbacks=[ask]) as device:
            device.step()
            coordinator.give = [TRAIN]
            assert isinstance(device.step(), Trained)
            assert len(answers) == 10 and all(np.array_equal(answer, device.predict(x)) for answer in answers)


def test_cancelling_stops_the_training_thread_and_the_work_is_kept(coordinator: Coordinator) -> None:
    coordinator.plan = lambda bundle: setattr(bundle.local, "epochs", 10_000)
    coordinator.publish(0)
    steps = threading.Event()
    seen: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, StepDone):
            seen.append(event.step)
            steps.set()

    async def scenario() -> None:
        device = device_for(coordinator, run_blocking=in_thread, callbacks=[note])
        running = asyncio.ensure_future(device.run_async())
        await asyncio.to_thread(steps.wait)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert device.status()["work"] == "assigned"
        with pytest.raises(ClientError, match="event loop"):
            device.step()
        await device.close_async()

    asyncio.run(scenario())  # ends only when the thread has: 50,000 steps would take a while
    assert len(seen) < 50_000 and not coordinator.aborts


def test_run_waits_as_told_until_it_may_stop(coordinator: Coordinator) -> None:
    coordinator.give = []
    outcomes = []

    def until(outcome: object) -> bool:
        outcomes.append(outcome)
        return len(outcomes) == 5

    with device_for(coordinator) as device:
        assert device.run(until) is outcomes[-1]
    assert START + 4000 <= coordinator.clock.now <= START + 8000


def test_what_is_told_to_the_coordinator_quotes_no_example(coordinator: Coordinator) -> None:
    with device_for(coordinator, examples=0) as device:
        device.examples.add_many(np.zeros((3, 4), np.float32), np.array([0, 1, 987654]))  # there is no such class
        assert isinstance(step_until(device, Aborted), Aborted)
    [(reason, message)] = coordinator.aborts
    assert reason == device_pb2.ABORT_REASON_UNFIT and message and "987654" not in message
