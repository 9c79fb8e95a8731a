"""The process dies at any moment; the next one goes on, and the update counts once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scripted import Coordinator, FakeClock, device_for, step_until
from tiny_artifact import BIAS

from evensong.client import Aborted, Device, Idle, StateError
from evensong.client.database import Database
from evensong.v1 import device_pb2, task_pb2

TRAIN, EVALUATE = device_pb2.WORK_TRAIN, device_pb2.WORK_EVALUATE


class Crash(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""


class CrashOnce:
    """Raises :class:`Crash` at the ``number``-th transaction of the device's state, before or after it is durable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, *, after: bool) -> None:
        self.left, self.happened = number, False
        original = Database.transaction

        @contextmanager
        def transaction(database: Database) -> Iterator[object]:
            outermost = database._depth == 0 and database._name.endswith("state.sqlite")
            with original(database) as connection:
                yield connection
                if outermost and not after:
                    self.count()
            if outermost and after:
                self.count()

        monkeypatch.setattr(Database, "transaction", transaction)

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.happened = True
            raise Crash


def personal_bias(bundle: task_pb2.TaskBundle) -> None:
    bundle.local.personal.append("*.bias")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("work", [TRAIN, EVALUATE], ids=["train", "evaluate"])
def test_a_crash_at_any_transaction_loses_nothing_and_repeats_nothing(
    work: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 40):
        with monkeypatch.context() as patch:
            crash = CrashOnce(patch, number, after=after)
            coordinator = Coordinator(FakeClock(), give=[work], plan=personal_bias)
            folder = tmp_path / f"{number}"
            live_until_done(coordinator, folder)
            if not crash.happened:  # the round has fewer transactions than that
                assert number > 5
                return
            assert len(coordinator.devices) == 1 and coordinator.round == 1
            assert (len(coordinator.committed), len(coordinator.reports)) == ((1, 0) if work == TRAIN else (0, 1))
    raise AssertionError("the round never ended")


def live_until_done(coordinator: Coordinator, folder: Path) -> None:
    """Opens the device and steps until it has nothing to do; after a crash, opens it again."""
    for _ in range(3):
        device: Device | None = None
        try:
            device = device_for(coordinator, folder)
            step_until(device, Idle, most=10)
            return
        except Crash:
            continue
        finally:
            if device is not None:
                device._state.close()  # as the system does for a dead process: the lock goes, nothing is written
                device._examples.close()
                if device._runner:
                    device._runner.close()
    raise AssertionError("one crash, and still not done")


def test_training_that_kills_the_process_again_and_again_is_given_back(tmp_path: Path) -> None:
    coordinator = Coordinator(FakeClock(), give=[TRAIN])

    def die(event: object) -> None:
        raise Crash

    for _ in range(3):
        device = device_for(
            coordinator, tmp_path, callbacks=[lambda event: die(event) if "Step" in str(event) else None]
        )
        with pytest.raises(Crash):
            device.step()
        device._state.close()
    with device_for(coordinator, tmp_path) as device:
        outcome = device.step()
    assert isinstance(outcome, Aborted) and outcome.reason == "INTERNAL" and "3 times" in outcome.message
    assert [reason for reason, _ in coordinator.aborts] == [device_pb2.ABORT_REASON_INTERNAL]


def test_personal_tensors_are_stored_together_with_the_sealed_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash between the two would train them twice, or lose what the update was computed with."""
    coordinator = Coordinator(FakeClock(), give=[TRAIN], plan=personal_bias)
    seen = []
    original = Database.transaction

    @contextmanager
    def transaction(database: Database) -> Iterator[object]:
        with original(database) as connection:
            yield connection
        if database._depth == 0 and database._name.endswith("state.sqlite"):
            stage = database.rows("SELECT stage FROM work")
            seen.append((stage[0][0] if stage else None, bool(database.rows("SELECT 1 FROM personal"))))

    monkeypatch.setattr(Database, "transaction", transaction)
    with device_for(coordinator, tmp_path) as device:
        device.step()
        assert BIAS not in coordinator.committed[0].delta
    assert ("assigned", False) in seen and ("sealed", True) in seen
    assert ("assigned", True) not in seen and ("sealed", False) not in seen


def test_two_processes_cannot_share_a_state_directory(tmp_path: Path) -> None:
    coordinator = Coordinator(FakeClock())
    with device_for(coordinator, tmp_path), pytest.raises(StateError, match="used by another process"):
        device_for(coordinator, tmp_path)
    device_for(coordinator, tmp_path).close()


def test_a_damaged_or_newer_database_is_named_and_left_alone(tmp_path: Path) -> None:
    import sqlite3

    (tmp_path / "state.sqlite").write_bytes(b"not a database at all" * 100)
    before = (tmp_path / "state.sqlite").read_bytes()
    with pytest.raises(StateError, match="cannot be read"):
        Device(tmp_path)
    assert (tmp_path / "state.sqlite").read_bytes() == before
    newer = tmp_path / "newer"
    newer.mkdir()
    with sqlite3.connect(newer / "state.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StateError, match="newer evensong"):
        Device(newer)
