"""The simulated fleet: same seed, same bits, whatever the network loses; and it computes federated averaging, in secure
sums or without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evensong.coordinator import EventKind, LocalTraining, Personalization, SecureAggregation, Task
from evensong.mobile_runtime import load
from evensong.secagg.vector import VectorPlan
from evensong.simulations import (
    Examples,
    Network,
    Shard,
    SimulationError,
    SimulationResult,
    load_dataset,
    make_fleet,
    simulate,
)
from evensong.simulations.demo.scenarios import DIGITS
from evensong.v1 import device_pb2
from evensong.wire.codecs import UpdateCodec

BAD_NETWORK = Network(lost_request=0.08, lost_response=0.08)
CLIENTS = make_fleet(load_dataset("digits"), 4, seed=1, limit=60).participants
TASK = Task(
    "digits",
    DIGITS.artifact(),
    rounds=3,
    goal=4,
    over_selection=1.0,
    secure=None,
    local=LocalTraining(epochs=2, learning_rate=0.1),
    personalization=Personalization(epochs=2, learning_rate=0.05),
)
SECURE = replace(TASK, secure=SecureAggregation())


@pytest.fixture(scope="module")
def quiet() -> SimulationResult:
    return simulate(TASK, CLIENTS, seed=11)


@pytest.fixture(scope="module")
def lossy() -> SimulationResult:
    return simulate(TASK, CLIENTS, seed=11, network=BAD_NETWORK)


@pytest.fixture(scope="module")
def secure() -> SimulationResult:
    return simulate(SECURE, CLIENTS, seed=11)


@pytest.fixture(scope="module")
def secure_lossy() -> SimulationResult:
    return simulate(SECURE, CLIENTS, seed=11, network=BAD_NETWORK)


@pytest.mark.parametrize(("run", "task"), [("lossy", TASK), ("secure_lossy", SECURE)], ids=["plain", "secure"])
def test_the_same_seed_gives_the_same_bits(run: str, task: Task, request: pytest.FixtureRequest) -> None:
    first: SimulationResult = request.getfixturevalue(run)
    again = simulate(task, CLIENTS, seed=11, network=BAD_NETWORK)
    assert again.parameters_sha256 == first.parameters_sha256
    assert again.events == first.events
    assert [client.account for client in again.clients] == [client.account for client in first.clients]
    assert again.simulated_seconds == first.simulated_seconds


def test_another_seed_gives_another_run(quiet: SimulationResult) -> None:
    other = simulate(TASK, CLIENTS, seed=12)
    assert other.parameters_sha256 != quiet.parameters_sha256
    assert other.simulated_seconds != quiet.simulated_seconds


@pytest.mark.parametrize("run", ["quiet", "lossy", "secure", "secure_lossy"])
def test_each_accepted_update_counts_once(run: str, request: pytest.FixtureRequest) -> None:
    result: SimulationResult = request.getfixturevalue(run)
    assert (sum(client.lost_messages for client in result.clients) > 0) == ("lossy" in run)
    assert [event.sequence for event in result.events] == list(range(1, len(result.events) + 1))
    committed = [event for event in result.events if event.kind == EventKind.VERSION_COMMITTED]
    assert [event.version for event in committed] == [1, 2, 3]
    epochs_of_all = 2 * sum(len(client.train) for client in CLIENTS)
    vector = VectorPlan.from_bundle(SECURE.to_bundle(), device_pb2.WORK_TRAIN)
    update_bytes = vector.nbytes if "secure" in run else UpdateCodec().encoded_bytes(TASK.layout)
    for event in committed:
        assert event.reports == 4
        assert event.metrics is not None and event.metrics.examples == epochs_of_all
        assert event.bytes_up == 4 * update_bytes
    evaluated = [event for event in result.events if event.kind == EventKind.VERSION_EVALUATED]
    tests_of_all = sum(len(client.test) for client in CLIENTS)
    # A cohort meets for a moment: on a bad network some come late, or so few that a version goes without an evaluation.
    given_up = [event.version for event in result.events if event.kind == EventKind.ROUND_ABANDONED]
    assert sorted([event.version for event in evaluated] + given_up) == [1, 2, 3] and evaluated
    assert run == "secure_lossy" or not given_up
    counted = [event.metrics.examples for event in evaluated if event.metrics]
    assert counted == [tests_of_all] * len(evaluated) or (run == "secure_lossy" and max(counted) <= tests_of_all)


@pytest.mark.parametrize("run", ["quiet", "secure"])
def test_devices_see_what_the_coordinator_evaluated(run: str, request: pytest.FixtureRequest) -> None:
    result: SimulationResult = request.getfixturevalue(run)
    last = next(e for e in result.events if e.kind == EventKind.VERSION_EVALUATED and e.version == 3)
    right = sum(
        int(np.sum(np.array(client.account.federated) == client.shard.test.labels)) for client in result.clients
    )
    assert last.metrics is not None
    assert last.metrics.accuracy * last.metrics.examples == pytest.approx(right)


def test_it_learns_and_personalisation_changes_the_models_of_devices_only(quiet: SimulationResult) -> None:
    losses = [e.metrics.loss for e in quiet.events if e.kind == EventKind.VERSION_COMMITTED and e.metrics]
    assert losses[2] < losses[1] < losses[0]
    assert any(client.account.federated != client.account.personalised for client in quiet.clients)
    other_recipe = replace(TASK, personalization=Personalization(epochs=4, learning_rate=0.02))
    assert simulate(other_recipe, CLIENTS, seed=11).parameters_sha256 == quiet.parameters_sha256


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"update": UpdateCodec(bits=None)}, 1e-6),
        ({"secure": SecureAggregation(bits=16), "weighting": "examples", "max_weight": 16, "clip_norm": 4.0}, 2e-4),
    ],
    ids=["plain", "secure"],
)
def test_the_result_is_federated_averaging(changes: dict[str, Any], tolerance: float) -> None:
    """One round, one full batch a device: the mean of the devices' models, weighted by examples, up to rounding."""
    sizes = (16, 5, 11)
    clients = [
        Shard(shard.name, Examples(shard.train.inputs[:size], shard.train.labels[:size]), shard.test)
        for shard, size in zip(CLIENTS, sizes, strict=False)
    ]
    task = replace(TASK, rounds=1, goal=3, local=LocalTraining(epochs=1, learning_rate=0.3), **changes)
    result = simulate(task, clients, seed=0)
    trained = []
    for client in clients:
        session = load(task.artifact_bytes)
        session.train_step(client.train.inputs, client.train.labels, learning_rate=0.3)
        trained.append(session.get())
    for name, value in result.parameters.items():
        mean = sum(
            size / sum(sizes) * model[name].astype(np.float64) for size, model in zip(sizes, trained, strict=True)
        )
        np.testing.assert_allclose(value, mean, rtol=1e-5, atol=tolerance)


def test_over_selection_goes_on_without_the_slow() -> None:
    task = replace(TASK, goal=2, over_selection=1.5, evaluate_every=0)
    result = simulate(task, CLIENTS, seed=3, compute_seconds=(1.0, 300.0))
    committed = [event for event in result.events if event.kind == EventKind.VERSION_COMMITTED]
    assert [event.reports for event in committed] == [2, 2, 2]


def test_a_task_that_nobody_can_train_ends_with_an_error() -> None:
    task = replace(TASK, local=LocalTraining(learning_rate=1e6))
    with pytest.raises(SimulationError, match="did not end"):
        simulate(task, CLIENTS, seed=0, time_limit_seconds=900.0)


def test_a_goal_that_cannot_be_reached_is_refused_at_once() -> None:
    with pytest.raises(SimulationError, match="never reach its goal"):
        simulate(TASK, CLIENTS[:2], seed=0)
    with pytest.raises(SimulationError, match="needs clients"):
        simulate(TASK, [], seed=0)
