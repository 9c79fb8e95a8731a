"""Flower's strategies over a sum step as Flower does over single replies, and survive a restart between two rounds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Krum, Strategy

from evensong.coordinator.aggregate import Accumulator
from evensong.coordinator.strategies import SINGLE_REPLY_STRATEGIES, FlowerOptimizer, Optimizers, ServerOptimizer
from evensong.coordinator.strategy_state import StrategyError
from evensong.coordinator.task import TaskError
from evensong.v1 import task_pb2
from evensong.wire import CorruptError, TensorSpec, UpdateCodec

LAYOUT = (TensorSpec("weight", (4, 3)), TensorSpec("bias", (3,)), TensorSpec("scale", ()))
DEVICES, ROUNDS = 3, 5
ONE = {"min_train_nodes": 1, "min_available_nodes": 1}
SEVERAL = {"min_train_nodes": DEVICES, "min_available_nodes": DEVICES}

Tensors = dict[str, npt.NDArray[Any]]

CASES: list[tuple[str, dict[str, float], type[Strategy]]] = [
    ("fedavg", {}, FedAvg),
    ("fedavgm", {"server_learning_rate": 0.5, "server_momentum": 0.9}, FedAvgM),
    ("fedavgm", {"server_momentum": 0.9}, FedAvgM),
    ("fedadam", {}, FedAdam),
    ("fedadam", {"eta": 0.03, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01}, FedAdam),
    ("fedyogi", {"eta": 0.05}, FedYogi),
    ("fedadagrad", {"eta": 0.05, "tau": 0.01}, FedAdagrad),
]
cases = pytest.mark.parametrize(("name", "arguments", "flower"), CASES, ids=lambda value: str(value))


def plan(name: str, **arguments: float) -> task_pb2.ServerPlan:
    return task_pb2.ServerPlan(strategy=name, arguments=arguments)


def tensors(rng: np.random.Generator, scale: float = 1.0) -> Tensors:
    return {spec.name: np.asarray(rng.normal(scale=scale, size=spec.shape), np.float32) for spec in LAYOUT}


def deltas_of_rounds() -> list[list[tuple[Tensors, float]]]:
    """For each round, each device's delta and weight."""
    rng = np.random.default_rng(7)
    return [[(tensors(rng, 0.1), float(rng.integers(1, 50))) for _ in range(DEVICES)] for _ in range(ROUNDS)]


def mean_of(reports: list[tuple[Tensors, float]]) -> tuple[Mapping[str, npt.NDArray[np.float64]], float]:
    accumulator, codec = Accumulator(LAYOUT, UpdateCodec(None)), UpdateCodec(None)
    for delta, weight in reports:
        accumulator.add(codec.encode(delta, LAYOUT, np.random.default_rng(0)), weight)
    return accumulator.mean(), accumulator.total_weight


class Nodes:
    def __init__(self, count: int) -> None:
        self._ids = list(range(1, count + 1))

    def get_node_ids(self) -> list[int]:
        return self._ids


def to_record(values: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array, np.float64)) for name, array in values.items()})


def run_flower(strategy: Strategy, start: Tensors, replies_in_round: int = DEVICES) -> Iterator[Tensors]:
    """Flower's own loop over single replies (or their mean), with float32 models between rounds as we have them."""
    current = start
    for number, reports in enumerate(deltas_of_rounds(), 1):
        if replies_in_round == 1:
            mean, total = mean_of(reports)
            reports = [(dict(mean), total)]
        nodes: Any = Nodes(replies_in_round)
        messages = sorted(
            strategy.configure_train(number, to_record(current), ConfigRecord(), nodes),
            key=lambda message: message.metadata.dst_node_id,
        )
        replies = []
        for message, (delta, weight) in zip(messages, reports, strict=True):
            trained = {name: np.asarray(values, np.float64) + delta[name] for name, values in current.items()}
            content = {"arrays": to_record(trained), "metrics": MetricRecord({"num-examples": weight})}
            replies.append(Message(RecordDict(content), reply_to=message))
        arrays, _ = strategy.aggregate_train(number, replies)
        assert arrays is not None
        current = {name: np.asarray(array.numpy(), np.float32) for name, array in arrays.items()}
        yield current


def run_ours(optimizer: ServerOptimizer, start: Tensors, rounds: range, state: bytes) -> tuple[list[Tensors], bytes]:
    versions, current = [], start
    for number in rounds:
        mean, total = mean_of(deltas_of_rounds()[number - 1])
        current, state = optimizer.step(
            state, current, mean, round=number, total_weight=total, reports=DEVICES, metrics={"train_loss": 0.5}
        )
        versions.append(current)
    return versions, state


@cases
def test_a_sum_steps_as_single_replies_do(name: str, arguments: dict[str, float], flower: type[Strategy]) -> None:
    start = tensors(np.random.default_rng(0))
    optimizer = Optimizers().create(plan(name, **arguments))
    versions, _ = run_ours(optimizer, start, range(1, ROUNDS + 1), optimizer.init(start))
    for ours, theirs in zip(versions, run_flower(flower(**SEVERAL, **arguments), start), strict=True):
        for tensor in start:
            np.testing.assert_allclose(ours[tensor], theirs[tensor], rtol=2e-6, atol=2e-7)
            assert ours[tensor].dtype == np.float32


@cases
def test_one_strategy_that_lives_on_gives_the_same_bits(
    name: str, arguments: dict[str, float], flower: type[Strategy]
) -> None:
    """Ours is made anew and restored each round; Flower's runs on, with the mean as its one reply."""
    start = tensors(np.random.default_rng(0))
    optimizer = Optimizers().create(plan(name, **arguments))
    versions, _ = run_ours(optimizer, start, range(1, ROUNDS + 1), optimizer.init(start))
    strategy = flower(**ONE, **arguments)
    for number, theirs in enumerate(run_flower(strategy, start, replies_in_round=1)):
        for tensor in start:
            if (
                flower is FedAvgM
            ):  # it keeps its own float64 copy of the model, where we continue from the committed one
                np.testing.assert_allclose(versions[number][tensor], theirs[tensor], rtol=1e-6, atol=1e-7)
            else:
                assert versions[number][tensor].tobytes() == theirs[tensor].tobytes()


@cases
def test_a_restart_in_mid_run_changes_no_bit(name: str, arguments: dict[str, float], flower: type[Strategy]) -> None:
    start = tensors(np.random.default_rng(0))
    optimizer = Optimizers().create(plan(name, **arguments))
    straight, straight_state = run_ours(optimizer, start, range(1, ROUNDS + 1), optimizer.init(start))
    before, state = run_ours(optimizer, start, range(1, 3), optimizer.init(start))
    after, state = run_ours(Optimizers().create(plan(name, **arguments)), before[-1], range(3, ROUNDS + 1), state)
    assert state == straight_state
    for tensor in start:
        assert after[-1][tensor].tobytes() == straight[-1][tensor].tobytes()


def test_a_promoted_version_is_where_momentum_continues() -> None:
    """After a rollback FedAvgM steps from the promoted parameters, not from those that it saw last."""
    start = tensors(np.random.default_rng(0))
    optimizer = Optimizers().create(plan("fedavgm", server_learning_rate=1.0, server_momentum=0.9))
    versions, state = run_ours(optimizer, start, range(1, 4), optimizer.init(start))
    zero = {name: np.zeros_like(values, np.float64) for name, values in start.items()}
    stepped, _ = optimizer.step(state, versions[0], zero, round=4, total_weight=1.0, reports=1, metrics={})
    momentum = {name: versions[2][name] - versions[1][name] for name in start}
    for tensor in start:
        np.testing.assert_allclose(stepped[tensor], versions[0][tensor] + 0.9 * momentum[tensor], rtol=1e-5, atol=1e-6)


def test_state_of_another_strategy_or_damaged_state_is_refused() -> None:
    start = tensors(np.random.default_rng(0))
    adam, yogi = Optimizers().create(plan("fedadam")), Optimizers().create(plan("fedyogi"))
    _, state = run_ours(adam, start, range(1, 2), adam.init(start))
    with pytest.raises(StrategyError, match="another strategy"):
        run_ours(yogi, start, range(1, 2), state)
    damaged = bytearray(state)
    damaged[-1] ^= 1
    with pytest.raises(CorruptError):
        run_ours(adam, start, range(1, 2), bytes(damaged))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (plan("fedsgd"), "no such strategy"),
        (plan(""), "no such strategy"),
        (plan("fedavg", eta=0.1), "no argument 'eta'"),
        (plan("fedadam", eta=0.0), "eta of 'fedadam' is out of range"),
        (plan("fedadam", beta_1=1.0), "beta_1"),
        (plan("fedadam", eta=float("nan")), "eta"),
        (plan("fedavgm", server_momentum=-0.1), "server_momentum"),
    ],
)
def test_bad_plans_are_refused(bad: task_pb2.ServerPlan, message: str) -> None:
    with pytest.raises((StrategyError, TaskError), match=message):
        Optimizers().create(bad)


@pytest.mark.parametrize("name", [*SINGLE_REPLY_STRATEGIES, "krum", "fedmedian"])
def test_strategies_that_need_single_replies_are_refused_by_name(name: str) -> None:
    with pytest.raises(StrategyError, match="every single reply"):
        Optimizers().create(plan(name))


def test_a_subclass_of_such_a_strategy_is_refused_too() -> None:
    class MyKrum(Krum):
        pass

    optimizers = Optimizers()
    optimizers.register("mine", lambda: MyKrum(min_available_nodes=1))
    with pytest.raises(StrategyError, match="'Krum' must see every single reply"):
        optimizers.create(plan("mine"))


class Counting(FedAvg):
    """Remembers a number, a text, and nested arrays; halves every second update."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__(min_train_nodes=1, min_available_nodes=1)
        self.factor = factor
        self.rounds = 0
        self.last: dict[str, Any] = {"name": "", "norms": []}
        self.origin: ArrayRecord | None = None

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> Any:
        self.origin_norm = float(np.linalg.norm(arrays["bias"].numpy()))
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.rounds += 1
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        self.last = {
            "name": f"round {server_round}",
            "norms": [*self.last["norms"], np.float32(self.origin_norm)],
            "nested": (True, None, [np.arange(3)]),
        }
        if self.rounds % 2 == 0:
            arrays = ArrayRecord(
                {name: Array(np.asarray(array.numpy() * self.factor)) for name, array in arrays.items()}
            )
        return arrays, metrics


def test_a_strategy_of_ones_own_is_stored_without_a_line_of_code() -> None:
    optimizers = Optimizers()
    optimizers.register("counting", Counting)
    start = tensors(np.random.default_rng(0))
    optimizer = optimizers.create(plan("counting", factor=0.25))
    straight, straight_state = run_ours(optimizer, start, range(1, 5), optimizer.init(start))
    before, state = run_ours(optimizer, start, range(1, 4), optimizer.init(start))
    after, state = run_ours(optimizer, before[-1], range(4, 5), state)
    assert state == straight_state
    assert after[-1]["weight"].tobytes() == straight[-1]["weight"].tobytes()
    mean, _ = mean_of(deltas_of_rounds()[1])
    np.testing.assert_allclose(before[1]["bias"], 0.25 * (before[0]["bias"] + mean["bias"]), rtol=1e-6)
    with pytest.raises(StrategyError, match="already"):
        optimizers.register("counting", Counting)
    with pytest.raises(StrategyError, match="arguments"):
        optimizers.create(plan("counting", wrong=1.0))


class Forgetful(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.memory = object()
        return super().aggregate_train(server_round, replies)


class Raising(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("strategy", "message"), [(Forgetful, "cannot be stored.*'memory'.*object"), (Raising, "failed in round 1.*no")]
)
def test_a_strategy_that_fails_is_named(strategy: type[FedAvg], message: str) -> None:
    optimizer = FlowerOptimizer("mine", lambda: strategy(**ONE))  # type: ignore[arg-type]
    start = tensors(np.random.default_rng(0))
    with pytest.raises(StrategyError, match=message):
        run_ours(optimizer, start, range(1, 2), optimizer.init(start))


def test_a_step_that_overflows_is_refused() -> None:
    optimizer = Optimizers().create(plan("fedavgm", server_learning_rate=1e6))
    start = tensors(np.random.default_rng(0))
    huge = {name: np.full(values.shape, 1e38) for name, values in start.items()}
    with pytest.raises(StrategyError, match="not finite"):
        optimizer.step(optimizer.init(start), start, huge, round=1, total_weight=1.0, reports=1, metrics={})


class Halving:
    """A server optimiser without Flower: half of the mean update, and the number of rounds as state."""

    def init(self, parameters: Mapping[str, Any]) -> bytes:
        return b"0"

    def step(
        self, state: bytes, parameters: Mapping[str, Any], mean_update: Mapping[str, Any], **_: Any
    ) -> tuple[dict[str, Any], bytes]:
        stepped = {name: np.float32(values + 0.5 * mean_update[name]) for name, values in parameters.items()}
        return stepped, str(int(state) + 1).encode()


def test_an_optimizer_of_ones_own_needs_no_flower() -> None:
    optimizers = Optimizers()
    optimizers.register("halving", Halving)
    start = tensors(np.random.default_rng(0))
    optimizer = optimizers.create(plan("halving"))
    versions, state = run_ours(optimizer, start, range(1, 3), optimizer.init(start))
    mean, _ = mean_of(deltas_of_rounds()[0])
    np.testing.assert_allclose(versions[0]["bias"], start["bias"] + 0.5 * mean["bias"], rtol=1e-6)
    assert state == b"2"


def test_flower_is_imported_only_for_a_step() -> None:
    code = (
        "import sys, evensong.coordinator.strategies as s; s.Optimizers(); "
        "sys.exit('flwr was imported' if 'flwr' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
