"""Case 39, secrets absent from logs and disk, and what a restart in the midst of a secure round leaves behind."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from lying_coordinator import ABORTED, AGAIN, DONE, Secrets, SecureCoordinator, end, seen_sealed
from scripted import FakeClock, device_for, lose, refusal

from evensong.client import Aborted, Device, Dropped, Idle, Trained
from evensong.client.callbacks import SecureStage
from evensong.v1 import common_pb2, device_pb2, secagg_pb2
from evensong.wire.errors import UnreachableError

pytestmark = pytest.mark.secagg

TRAIN = device_pb2.WORK_TRAIN
STEPS = ["advertise", "shares", "masked", "commit", "unmask"]


class Crash(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""


def crash_in(coordinator: SecureCoordinator, step: str, *, after: bool) -> None:
    """The process dies when it sends ``step``: before the coordinator has it, or before the answer is here. "upload" is
    the commit of the masked vector."""

    def hook(number: int, method: str) -> None:
        if step == "upload":
            hit = method == "CommitUpload"
        else:
            sent = len([at for at, _ in coordinator.steps])
            hit = method == "Secure" and sent == STEPS.index(step) + after
        if hit:
            coordinator.before = coordinator.after = lambda number, method: None
            raise Crash

    if after:
        coordinator.after = hook
    else:
        coordinator.before = hook


def die(device: Device) -> None:
    """As the system does for a dead process: the lock goes, nothing is written."""
    device._state.close()
    device._examples.close()
    if device._runner:
        device._runner.close()


def everything_on_disk(folder: Path) -> bytes:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert any(path.name == "state.sqlite" for path in files)
    return b"\n".join(path.read_bytes() for path in files)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", [*STEPS[:3], "upload", *STEPS[3:]])
def test_a_process_that_dies_in_a_stage_has_left_its_cohort_for_good(
    step: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    coordinator = SecureCoordinator(FakeClock(), give=[TRAIN])
    crash_in(coordinator, step, after=after)
    first, second = Secrets(monkeypatch), Secrets(monkeypatch)
    device = device_for(coordinator, tmp_path, primitives=first.primitives)
    first.watch(device)
    with pytest.raises(Crash):
        device.step()
    first.assert_absent("on disk", everything_on_disk(tmp_path))
    first.assert_absent("in the repr of its parts", repr(vars(device._context)).encode())
    die(device)
    sent, vectors = list(coordinator.requests), set(coordinator.vectors)

    with device_for(coordinator, tmp_path, primitives=second.primitives) as device:
        second.watch(device)
        outcome = device.step()
        new = [name for name, _ in coordinator.requests[len(sent) :]]
        if step == "unmask" and after:
            assert isinstance(outcome, Trained) and new == ["Secure"]  # nothing was left to do
        else:
            assert isinstance(outcome, Aborted) and outcome.reason == "UNFIT"
            assert new == ["Secure", "Abort"]  # it asks, and gives the work back
        assert len(coordinator.asked) == 1 and device._state.work() is None
        coordinator.give = [TRAIN]
        assert isinstance(device.step(), Trained)
        second.assert_absent("on disk", everything_on_disk(tmp_path))
    assert len(coordinator.sums()) == 1 + (step == "unmask" and after)
    assert not first.drawn & second.drawn and not first.primitives.seen & second.primitives.seen
    assert not vectors & set(coordinator.vectors[len(vectors) :])
    advertised = [request.advertise for at, request in coordinator.steps if at == "advertise"]
    keys = [key for message in advertised for key in (message.channel_key, message.mask_key, message.nonce)]
    assert len(set(keys)) == len(keys) >= 3
    for secrets in (first, second):
        secrets.assert_absent("in the log", caplog.text.encode())
        secrets.assert_absent("on disk", everything_on_disk(tmp_path))
    for vector in coordinator.vectors:
        assert vector[:32] not in everything_on_disk(tmp_path)


TOLD = {
    "a later attempt": (end(AGAIN, 2), "Trained"),
    "the same attempt": (end(AGAIN, 1), "UNTRUSTED"),
    "given up": (end(ABORTED, 1), "NO_SUM"),
    "done": (end(DONE, 1), "Trained"),
    "survivors": (secagg_pb2.SecureResponse(survivors=secagg_pb2.SecureSurvivors(survivors=b"\x1f")), "UNFIT"),
    "too late": (secagg_pb2.SecureResponse(refusal=refusal(common_pb2.REFUSAL_REASON_TOO_LATE)), "UNFIT"),
    "not needed": (secagg_pb2.SecureResponse(refusal=refusal(common_pb2.REFUSAL_REASON_NOT_NEEDED)), "NOT_NEEDED"),
}


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("spent", [False, True], ids=["unspent", "spent"])
def test_what_a_new_process_is_told_of_the_attempt(told: str, spent: bool, tmp_path: Path) -> None:
    """It asks until it is answered, once; and whatever the answer, a spent update joins no other attempt."""
    coordinator = SecureCoordinator(FakeClock(), give=[TRAIN])
    crash_in(coordinator, "unmask" if spent else "masked", after=False)
    device = device_for(coordinator, tmp_path)
    with pytest.raises(Crash):
        device.step()
    die(device)
    before = len(coordinator.steps)
    coordinator.told, ending = TOLD[told]
    coordinator.before = lose({coordinator.moments + 1, coordinator.moments + 2})
    with device_for(coordinator, tmp_path) as device:
        outcome = device.step()
        assert isinstance(device.step(), Idle)
    joins = told == "a later attempt" and not spent
    assert getattr(outcome, "reason", "Trained") == ("UNTRUSTED" if told == "a later attempt" and spent else ending)
    assert [request.attempt for request in coordinator.asked] == [1]
    assert [request.attempt for _, request in coordinator.steps[before:]] == [2] * (5 if joins else 0)


def test_no_masked_vector_is_on_disk_while_it_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator, looked = SecureCoordinator(FakeClock(), give=[TRAIN]), []

    def look(number: int, method: str) -> None:
        if method in ("BeginUpload", "UploadChunk", "CommitUpload"):
            looked.append(everything_on_disk(tmp_path))

    with device_for(coordinator, tmp_path) as device:
        sealed = seen_sealed(device, monkeypatch)
        coordinator.before = look
        assert isinstance(device.step(), Trained)
    assert len(looked) >= 3
    for disk in looked:
        assert coordinator.vectors[0][:16] not in disk
        assert sealed[0].tobytes() in disk  # what is masked anew if the attempt is: of the same kind as the examples
        assert b"uploaded" not in disk


@pytest.mark.parametrize("lost", ["before", "after"])
def test_every_call_of_the_protocol_may_be_lost(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request once, or each answer once."""
    coordinator, gone = SecureCoordinator(FakeClock(), give=[TRAIN]), set()

    def lose(number: int, method: str) -> None:
        body = coordinator.requests[-1][1]
        if method in ("Secure", "BeginUpload", "UploadChunk", "CommitUpload") and body not in gone:
            gone.add(body)
            raise UnreachableError(f"{method} was lost")

    setattr(coordinator, lost, lose)
    with device_for(coordinator, tmp_path) as device:
        sealed = seen_sealed(device, monkeypatch)
        assert isinstance(device.step(), Trained)
    assert len(gone) == 8 and len(set(coordinator.vectors)) == 1
    [total] = coordinator.sums()
    assert (total == sealed[0]).all()


def test_events_and_outcomes_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator, secrets, told = SecureCoordinator(FakeClock(), give=[TRAIN, TRAIN]), Secrets(monkeypatch), []
    with device_for(coordinator, tmp_path, primitives=secrets.primitives, callbacks=[told.append]) as device:
        secrets.watch(device)
        told.append(device.step())
        coordinator.ends = [("commit", end(ABORTED, 1, "too few"))]
        told.append(device.step())
        assert isinstance(told[-1], Dropped)
        told.append(device.status())
    secrets.assert_absent("in what the host is told", repr(told).encode())
    stages = [(event.stage, event.attempt, event.members) for event in told if isinstance(event, SecureStage)]
    assert stages[:4] == [(stage, 1, 5) for stage in ("shares", "masked", "commit", "unmask")]
