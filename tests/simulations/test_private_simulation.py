"""Differential privacy with real devices: the same seed gives the same noise, and a spent budget ends the run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evensong.coordinator import AdaptiveClipping, LocalTraining, Privacy, SecureAggregation, Task
from evensong.coordinator.privacy.accounting import Accounting
from evensong.simulations import load_dataset, make_fleet, simulate
from evensong.simulations.demo.scenarios import DIGITS
from evensong.v1 import task_pb2

CLIENTS = make_fleet(load_dataset("digits"), 4, seed=1, limit=60).participants
TASK = Task(
    "digits",
    DIGITS.artifact(),
    rounds=3,
    goal=4,
    over_selection=1.0,
    secure=None,
    clip_norm=1.0,
    privacy=Privacy(epsilon=8, delta=1e-5),
    local=LocalTraining(epochs=1, learning_rate=0.1),
)


def test_the_same_seed_gives_the_same_noise() -> None:
    first, again, other = (simulate(TASK, CLIENTS, seed=seed) for seed in (5, 5, 6))
    assert first.parameters_sha256 == again.parameters_sha256 != other.parameters_sha256


def test_a_spent_budget_ends_the_run_with_the_versions_that_it_paid_for() -> None:
    multiplier = TASK.to_bundle().privacy.noise_multiplier
    task = replace(TASK, rounds=50, privacy=Privacy(epsilon=8, delta=1e-5, noise_multiplier=multiplier))
    result = simulate(task, CLIENTS, seed=5)
    assert max(event.version for event in result.events) == 3
    assert "privacy budget is spent" in result.events[-1].message
    assert all(len(client.account.federated) == len(client.shard.test) for client in result.clients)


def test_devices_clip_to_the_norm_of_each_version() -> None:
    """From a clip norm far below, the quantile takes it up: devices tell whether they were within, and follow it."""
    task = replace(
        TASK,
        privacy=None,
        clip_norm=AdaptiveClipping(initial=1e-3, quantile=0.5, rate=2.0),
        rounds=4,
        weighting="uniform",
    )
    grown = simulate(task, CLIENTS, seed=5)
    fixed = simulate(replace(task, clip_norm=1e-3), CLIENTS, seed=5)
    start = task.initial_parameters()

    def distance(parameters: dict[str, np.ndarray]) -> float:
        return float(np.sqrt(sum(np.sum((parameters[name] - start[name]) ** 2) for name in start)))

    assert distance(dict(fixed.parameters)) <= 4 * 1e-3 * 1.001
    assert distance(dict(grown.parameters)) > 5 * distance(dict(fixed.parameters))


@pytest.mark.parametrize("mechanism", ["distributed-gaussian", "distributed-skellam"])
def test_devices_noise_the_secure_sum_themselves(mechanism: str) -> None:
    privacy = Privacy(epsilon=90, delta=1e-5, noise_multiplier=0.5, mechanism=mechanism)  # type: ignore[arg-type]
    secure = SecureAggregation(bits=6, corrupted=0.0, dropout=0.1, min_survivors=4)
    result = simulate(replace(TASK, secure=secure, privacy=privacy, rounds=2, evaluate_every=0), CLIENTS, seed=5)
    start, size = TASK.initial_parameters(), sum(values.size for values in result.parameters.values())
    moved = sum(float(np.sum((result.parameters[name] - start[name]) ** 2)) for name in start)
    # Two rounds of noise 0.5 * C / 4 on each value, and updates of norm C at most.
    expected = np.sqrt(2 * size) * 0.5 / 4
    assert expected - 2.1 < np.sqrt(moved) < expected + 2.1
    number = {"distributed-gaussian": task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN}.get(
        mechanism, task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_SKELLAM
    )
    assert Accounting.of(replace(TASK, secure=secure, privacy=privacy).to_bundle()).mechanism == number
