"""Whatever is lost on the way, the update is counted once, and no request changes its mind."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Coordinator, FakeClock, device_for, lose, refusal, step_until

from evensong.client import Dropped, Postponed, Trained
from evensong.client.cache import FolderCache
from evensong.v1 import common_pb2, device_pb2

TRAIN = device_pb2.WORK_TRAIN
SHAPE = {"features": 200, "classes": 5}  # an update of 4 kB: five chunks


def coordinator_with_work() -> Coordinator:
    return Coordinator(FakeClock(), **SHAPE, give=[TRAIN], lease_ms=10**9)


@given(lost=st.sets(st.integers(1, 60), max_size=15))
@settings(max_examples=40, deadline=None)
def test_lost_requests_and_answers_cost_time_and_nothing_else(lost: set[int]) -> None:
    coordinator = coordinator_with_work()
    coordinator.before = coordinator.after = lose(lost)
    with device_for(coordinator) as device:
        step_until(device, Trained)
        assert device.status()["work"] is None
    assert len(coordinator.committed) == 1 and len(coordinator.devices) == 1
    announced = {
        device_pb2.BeginUploadRequest.FromString(b).update.sha256 for b in requests(coordinator, "BeginUpload")
    }
    commits = {device_pb2.CommitUploadRequest.FromString(b).request_id for b in requests(coordinator, "CommitUpload")}
    assert len(announced) == len(commits) == 1


@given(cuts=st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1)), max_size=6))
@settings(max_examples=40, deadline=None)
def test_an_upload_goes_on_from_whatever_byte_the_coordinator_has(cuts: list[tuple[int, float]]) -> None:
    coordinator = coordinator_with_work()
    calls = iter(range(1, 1000))

    def shorten(moment: int, method: str) -> None:
        if method != "UploadChunk":
            return
        number = next(calls)
        for at, fraction in cuts:
            if at == number:
                for _, data in coordinator.uploads.values():
                    del data[int(len(data) * fraction) :]

    coordinator.before = shorten
    with device_for(coordinator) as device:
        step_until(device, Trained)
    assert len(coordinator.committed) == 1


@given(kept=st.floats(0, 1), damaged=st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_download_goes_on_from_whatever_byte_it_has(tmp_path_factory: pytest.TempPathFactory, kept, damaged) -> None:
    coordinator = coordinator_with_work()
    folder = tmp_path_factory.mktemp("device")
    with device_for(coordinator, folder) as device:
        device.enrol()
    cache = FolderCache(folder / "cache")
    sha256 = next(iter(coordinator.blobs))
    data = coordinator.blobs[sha256][: int(len(coordinator.blobs[sha256]) * kept)]
    cache.append(sha256, 0, bytes(len(data)) if damaged else data)
    with device_for(coordinator, folder) as device:
        if damaged and any(data):  # found out at the end, discarded, and the work given back
            device.step()
            assert coordinator.aborts
            coordinator.give = [TRAIN]
        step_until(device, Trained)
    assert len(coordinator.committed) == 1


def test_a_repeated_check_in_gets_the_assignment_whose_answer_was_lost() -> None:
    coordinator = coordinator_with_work()
    coordinator.after = lose({4})  # 1, 2: Enrol; 3, 4: CheckIn
    with device_for(coordinator) as device:
        assert isinstance(device.step(), Postponed)
        assert isinstance(device.step(), Trained)
    assert coordinator.round == 1


def test_an_upload_that_the_coordinator_forgot_is_begun_again() -> None:
    coordinator = coordinator_with_work()
    forgotten = iter([True, True, False])

    def forget(moment: int, method: str) -> None:
        if method == "CommitUpload" and next(forgotten, False):
            coordinator.uploads.clear()

    coordinator.before = forget
    with device_for(coordinator) as device:
        assert isinstance(device.step(), Trained)
    begun = [device_pb2.BeginUploadRequest.FromString(b).request_id for b in requests(coordinator, "BeginUpload")]
    assert len(set(begun)) == 3 and len(coordinator.committed) == 1


REASONS = common_pb2.RefusalReason
FINAL = [
    REASONS.REFUSAL_REASON_TOO_LATE,
    REASONS.REFUSAL_REASON_STALE,
    REASONS.REFUSAL_REASON_NOT_NEEDED,
    REASONS.REFUSAL_REASON_LEASE_EXPIRED,
    REASONS.REFUSAL_REASON_INVALID_UPDATE,
    REASONS.REFUSAL_REASON_ALREADY_REPORTED,
    REASONS.REFUSAL_REASON_REPLAY,
]
PASSING = [REASONS.REFUSAL_REASON_UNAVAILABLE, REASONS.REFUSAL_REASON_QUOTA, REASONS.REFUSAL_REASON_BAD_SIGNATURE]
UPLOAD_CALLS = ["BeginUpload", "UploadChunk", "CommitUpload"]


def refusing_once(method: str, reason: int) -> object:
    refusals: Iterator[bool] = iter([True])

    def tamper(name: str, response) -> None:
        if name == method and next(refusals, False):
            response.Clear()
            response.refusal.CopyFrom(refusal(reason, "this is why"))
            response.retry.earliest_ms = response.retry.latest_ms = 7000

    return tamper


@pytest.mark.parametrize("method", UPLOAD_CALLS)
@pytest.mark.parametrize("reason", FINAL)
def test_a_final_refusal_drops_the_update_and_says_why(method: str, reason: int) -> None:
    coordinator = coordinator_with_work()
    coordinator.tamper = refusing_once(method, reason)
    with device_for(coordinator) as device:
        outcome = device.step()
        assert isinstance(outcome, Dropped) and outcome.message == "this is why" and outcome.wait_s == 7
        assert f"REFUSAL_REASON_{outcome.reason}" == REASONS.Name(reason)
        coordinator.give = [TRAIN]
        assert isinstance(device.step(), Trained)  # and life goes on


@pytest.mark.parametrize("method", UPLOAD_CALLS)
@pytest.mark.parametrize("reason", PASSING)
def test_a_passing_refusal_keeps_the_update(method: str, reason: int) -> None:
    coordinator = coordinator_with_work()
    coordinator.tamper = refusing_once(method, reason)
    with device_for(coordinator) as device:
        outcome = device.step()
        assert isinstance(outcome, Postponed) and outcome.wait_s == 7 and device.status()["work"] is not None
        coordinator.answers.clear()
        assert isinstance(step_until(device, Trained), Trained)
    assert coordinator.calls.count("CheckIn") == 1


def test_a_sealed_update_is_dropped_when_its_lease_ends() -> None:
    coordinator = coordinator_with_work()
    coordinator.lease_ms = 60_000
    coordinator.before = lambda moment, method: lose({moment} if method == "BeginUpload" else ())(moment, method)
    with device_for(coordinator) as device:
        waits = []
        while isinstance(outcome := device.step(), Postponed):
            waits.append(outcome.wait_s)
            coordinator.clock.now += int(outcome.wait_s * 1000)
            assert len(waits) < 100
        assert isinstance(outcome, Dropped) and outcome.reason == "LEASE_EXPIRED"
        assert coordinator.clock.now <= 1_800_000_060_000 + 1000  # not slept through by back-off
    assert not coordinator.committed


def test_clipping_and_quantisation_are_those_of_the_plan() -> None:
    from evensong.v1 import task_pb2

    def plan(bundle: task_pb2.TaskBundle) -> None:
        bundle.update.codec, bundle.update.bits = task_pb2.CODEC_QUANTIZED, 8
        bundle.update.clip_norm, bundle.update.max_weight = 0.25, 10

    coordinator = Coordinator(FakeClock(), **SHAPE, give=[TRAIN], plan=plan)
    with device_for(coordinator) as device:
        outcome = device.step()
    [committed] = coordinator.committed
    norm = np.sqrt(sum(float((delta**2).sum()) for delta in committed.delta.values()))
    assert 0.2 < norm < 0.3 and committed.weight == 10
    assert isinstance(outcome, Trained) and outcome.update_bytes < 4 * 1005 / 2


def requests(coordinator: Coordinator, method: str) -> list[bytes]:
    return [body for name, body in coordinator.requests if name == method]
