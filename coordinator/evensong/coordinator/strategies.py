"""The server step through Flower's own strategies (``flwr.serverapp.strategy``), over a sum instead of single replies.

Flower averages the replies of a round and lets the strategy step from the average. Here the average is there already:
the mean update, applied to the parameters that the round trained, is fed to the strategy as *one* reply whose
``num-examples`` is the total weight. A strategy that looks at nothing but the weighted average (FedAvg and the FedOpt
family of Reddi et al., *Adaptive federated optimization*, ICLR 2021) steps as it would from the single replies.

The arithmetic is float64, so that small updates of large parameters keep their digits; committed parameters are
float32.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from evensong.coordinator.bundle import STRATEGIES, check_server_plan
from evensong.coordinator.strategy_state import StrategyError, export_state, restore_state
from evensong.v1 import task_pb2
from evensong.wire.tensors import FloatArray

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

Parameters = Mapping[str, FloatArray]
Update = Mapping[str, npt.NDArray[np.floating[Any]]]

#: Flower's strategies that must see every single reply.
SINGLE_REPLY_STRATEGIES = (
    "Bulyan",
    "FedMedian",
    "FedTrimmedAvg",
    "FedXgbBagging",
    "FedXgbCyclic",
    "Krum",
    "MultiKrum",
    "QFedAvg",
    "DifferentialPrivacyClientSideAdaptiveClipping",
    "DifferentialPrivacyClientSideFixedClipping",
    "DifferentialPrivacyServerSideAdaptiveClipping",
    "DifferentialPrivacyServerSideFixedClipping",
)

_FLOWER_CLASSES = {
    "fedavg": "FedAvg",
    "fedavgm": "FedAvgM",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedadagrad": "FedAdagrad",
}
_ONE_NODE = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


class ServerOptimizer(Protocol):
    """One server step a round. Holds nothing between calls: all that it remembers is in ``state``, which the
    coordinator stores with the version in one transaction, so that it can be killed at any line."""

    def init(self, parameters: Parameters) -> bytes:
        """The state before the first round."""
        ...

    def step(
        self,
        state: bytes,
        parameters: Parameters,
        mean_update: Update,
        *,
        round: int,
        total_weight: float,
        reports: int,
        metrics: Mapping[str, float],
    ) -> tuple[dict[str, FloatArray], bytes]:
        """New parameters (float32, same names and shapes) and state; the same arguments give the same bits.

        ``parameters`` are those that the round's devices trained from, ``mean_update`` the mean of their ``reports``
        deltas by weights that add up to ``total_weight``; ``round`` counts from 1. Raises :class:`StrategyError`, for
        instance when the result is not finite.
        """
        ...


class Optimizers:
    """The server optimisers that a coordinator offers by name: Flower's, and those that it was started with."""

    def __init__(self) -> None:
        self._factories: dict[str, Callable[..., Strategy | ServerOptimizer]] = {}

    def register(self, name: str, factory: Callable[..., Strategy | ServerOptimizer]) -> None:
        """Offers ``factory(**arguments)`` as ``name``; it gives a Flower strategy or a :class:`ServerOptimizer`.

        A Flower strategy must work with one node (``min_available_nodes=1``, ``min_train_nodes=1``).
        """
        if name in STRATEGIES or name in self._factories:
            raise StrategyError(f"there is already a strategy {name!r}", fix="Choose another name.")
        self._factories[name] = factory

    @property
    def names(self) -> tuple[str, ...]:
        """What :meth:`create` knows."""
        return (*STRATEGIES, *self._factories)

    def create(self, plan: task_pb2.ServerPlan) -> ServerOptimizer:
        """The optimiser of a task; :class:`StrategyError` or :class:`TaskError` says what is wrong with the plan."""
        arguments = dict(plan.arguments)
        if plan.strategy in _FLOWER_CLASSES:
            check_server_plan(plan)
            return FlowerOptimizer(plan.strategy, lambda: _flower_strategy(plan.strategy, arguments))
        if plan.strategy.lower() in {name.lower() for name in SINGLE_REPLY_STRATEGIES}:
            raise _needs_single_replies(plan.strategy)
        if plan.strategy not in self._factories:
            raise StrategyError("there is no such strategy", expected=", ".join(self.names), got=plan.strategy[:80])
        factory = self._factories[plan.strategy]
        try:
            made = factory(**arguments)
        except (TypeError, ValueError) as error:
            raise StrategyError(f"strategy {plan.strategy!r} does not take these arguments", got=error) from error
        if hasattr(made, "step") and hasattr(made, "init"):
            return made
        _refuse_single_reply_strategy(made)
        return FlowerOptimizer(plan.strategy, cast("Callable[[], Strategy]", lambda: factory(**arguments)))


class FlowerOptimizer:
    """Any Flower strategy that steps from the weighted average; ``factory`` makes it anew for each step."""

    def __init__(self, name: str, factory: Callable[[], Strategy]) -> None:
        self._name = name
        self._factory = factory

    def init(self, parameters: Parameters) -> bytes:
        return export_state(self._name, self._factory(), self._factory())

    def step(
        self,
        state: bytes,
        parameters: Parameters,
        mean_update: Update,
        *,
        round: int,
        total_weight: float,
        reports: int,
        metrics: Mapping[str, float],
    ) -> tuple[dict[str, FloatArray], bytes]:
        strategy = self._factory()
        restore_state(self._name, strategy, state)
        try:
            stepped = _run_round(strategy, parameters, mean_update, round, total_weight, metrics)
        except Exception as error:  # a user's strategy may raise anything: it must not stop the coordinator
            raise StrategyError(f"strategy {self._name!r} failed in round {round}", got=repr(error)) from error
        return self._checked(stepped, parameters), export_state(self._name, strategy, self._factory())

    def _checked(self, stepped: Mapping[str, npt.NDArray[Any]], parameters: Parameters) -> dict[str, FloatArray]:
        """The strategy's result as float32, if it has the tensors of ``parameters`` and is finite."""
        result: dict[str, FloatArray] = {}
        for name, before in parameters.items():
            after = stepped.get(name)
            if after is None or after.shape != before.shape:
                raise StrategyError(
                    f"strategy {self._name!r} changed the shape of tensor {name!r}",
                    expected=before.shape,
                    got=None if after is None else after.shape,
                )
            with np.errstate(over="ignore"):
                result[name] = np.asarray(after, np.float32)
            if not np.isfinite(result[name]).all():
                raise StrategyError(
                    f"strategy {self._name!r} made tensor {name!r} not finite",
                    fix="Start again with a smaller server learning rate or a clip norm.",
                )
        return result


def _run_round(
    strategy: Strategy,
    parameters: Parameters,
    mean_update: Update,
    round: int,
    total_weight: float,
    metrics: Mapping[str, float],
) -> dict[str, npt.NDArray[Any]]:
    """One round as Flower's own loop runs it, with one node that holds the round's mean."""
    app = _flower("app")
    current = app.ArrayRecord({name: _to_array(app, values) for name, values in parameters.items()})
    messages = strategy.configure_train(round, current, app.ConfigRecord(), _OneNode())  # type: ignore[arg-type]
    message = next(iter(messages))
    trained = {name: _to_array(app, values, mean_update[name]) for name, values in parameters.items()}
    weight_key = getattr(strategy, "weighted_by_key", "num-examples")
    measured = app.MetricRecord({**metrics, weight_key: float(total_weight)})
    content = app.RecordDict({"arrays": app.ArrayRecord(trained), "metrics": measured})
    arrays, _ = strategy.aggregate_train(round, [app.Message(content, reply_to=message)])
    if arrays is None:
        raise ValueError("the strategy gave no arrays")
    return {name: array.numpy() for name, array in arrays.items()}


def _to_array(app: ModuleType, values: FloatArray, update: npt.NDArray[np.floating[Any]] | float = 0.0) -> Any:
    """Flower's ``Array`` (its own copy, float64) of one tensor: no more than one lies around twice."""
    return app.Array(np.asarray(values.astype(np.float64) + update))


class _OneNode:
    """As much of Flower's ``Grid`` as a strategy needs to address one node."""

    def get_node_ids(self) -> Iterable[int]:
        return [1]


def _flower_strategy(name: str, arguments: Mapping[str, float]) -> Strategy:
    strategy: Strategy = getattr(_flower("serverapp.strategy"), _FLOWER_CLASSES[name])(**_ONE_NODE, **arguments)
    return strategy


def _refuse_single_reply_strategy(strategy: object) -> None:
    for base in type(strategy).__mro__:
        if base.__name__ in SINGLE_REPLY_STRATEGIES and base.__module__.startswith("flwr."):
            raise _needs_single_replies(base.__name__)


def _needs_single_replies(name: str) -> StrategyError:
    return StrategyError(
        f"strategy {name!r} must see every single reply, and this coordinator only ever learns their sum",
        expected=", ".join(STRATEGIES),
        fix="Bound what one device can do with clip_norm and max_weight instead.",
    )


def _flower(module: str) -> ModuleType:
    """Imports a module of Flower, late: it takes a second, and only the server step needs it."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported
    imported = importlib.import_module(f"flwr.{module}")
    logging.getLogger("flwr").setLevel(logging.WARNING)  # it logs every reply it gets
    identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    for attribute in ("run_id", "task_id", "node_id"):  # Flower makes no message without them, whatever they are
        if getattr(identity, f"_{attribute}") is None:
            setattr(identity, attribute, 1)
    return imported
