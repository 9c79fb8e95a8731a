"""One round of an honest coordinator, as the device lives it."""

from __future__ import annotations

import numpy as np
import pytest
from scripted import Coordinator, FakeClock, device_for
from tiny_artifact import BIAS, WEIGHT, tiny_examples

from evensong.client import Evaluated, Idle, NoModelError, Trained
from evensong.v1 import device_pb2, task_pb2

TRAIN, EVALUATE = device_pb2.WORK_TRAIN, device_pb2.WORK_EVALUATE


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator(FakeClock())


def test_a_device_enrols_trains_and_commits_the_difference(coordinator: Coordinator) -> None:
    coordinator.give = [TRAIN]
    with device_for(coordinator) as device:
        outcome = device.step()
    assert isinstance(outcome, Trained) and (outcome.task_id, outcome.round, outcome.version) == ("task-1", 1, 0)
    [committed] = coordinator.committed
    assert committed.weight == 40 and committed.metrics.examples == 80  # two epochs
    assert np.linalg.norm(committed.delta[WEIGHT]) > 0.1
    assert coordinator.calls[:2] == ["Enrol", "CheckIn"] and coordinator.calls[-1] == "CommitUpload"


def test_the_federated_model_gets_better_and_is_served(coordinator: Coordinator) -> None:
    x, y = tiny_examples(200, seed=9)
    with device_for(coordinator) as device:
        with pytest.raises(NoModelError):
            device.predict(x)
        device.step()
        before = np.mean(device.predict(x).argmax(1) == y)
        for number in range(1, 4):
            coordinator.give = [TRAIN]
            device.step()
            delta = coordinator.committed[-1].delta
            coordinator.publish(number, {name: coordinator.values[name] + delta[name] for name in delta})
        assert isinstance(device.step(), Idle)
        assert np.mean(device.predict(x).argmax(1) == y) > max(0.9, before)
        assert 0 < device.memory().inference_peak < device.memory().training_peak


def test_evaluation_reports_sums_over_the_test_examples(coordinator: Coordinator) -> None:
    coordinator.give = [EVALUATE]
    with device_for(coordinator) as device:
        outcome = device.step()
    [metrics] = coordinator.reports
    assert isinstance(outcome, Evaluated) and metrics.examples == outcome.examples == 20
    assert metrics.loss_sum / metrics.examples == pytest.approx(np.log(3), rel=1e-5)  # version 0 is all zeros here


def test_personal_tensors_never_travel_and_survive_versions_and_restarts(tmp_path) -> None:
    def plan(bundle: task_pb2.TaskBundle) -> None:
        bundle.local.personal.append("*.bias")

    coordinator = Coordinator(FakeClock(), plan=plan, give=[TRAIN])
    with device_for(coordinator, tmp_path) as device:
        device.step()
        assert set(coordinator.committed[0].delta) == {WEIGHT}
        material = device._serving.material()
    coordinator.publish(1)
    with device_for(coordinator, tmp_path) as device:
        device.step()
        bias = device._serving._session(None).get([BIAS])[BIAS]
        assert np.abs(bias).max() > 0.01
        assert material.model.version.number == 0 and device._serving.material().model.version.number == 1


def test_same_seed_same_bytes() -> None:
    def run() -> list[bytes]:
        coordinator = Coordinator(FakeClock(), give=[TRAIN, EVALUATE])
        with device_for(coordinator) as device:
            device.step()
            device.step()
        return [body for name, body in coordinator.requests if name != "Enrol"]

    assert run() == run()
