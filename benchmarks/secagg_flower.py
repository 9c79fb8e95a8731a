"""The peer of ``benchmarks.secagg``: one round of Flower's SecAgg+, its own code on both sides, CPU seconds of each.

The real ``SecAggPlusWorkflow`` talks through a grid in memory to nodes that run the real ``secaggplus_mod``. Left out
is only what is not secure aggregation: training, the strategy's mean, and carrying messages, which are copied through
Flower's own serialisation while both clocks stand still.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.compat.common import recorddict_compat
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

QUANTISATION_STEP = 16 / 2**22  # of the workflow's defaults: clipping to +-8, 22 bits


@dataclass(frozen=True)
class FlowerRound:
    """CPU seconds, all threads together: of the server, and of one client (the median)."""

    server_seconds: float
    client_seconds: float


def flower_round(clients: int, parameters: int, shares: int | float, threshold: float = 0.6) -> FlowerRound:
    """One round without drop-outs; ``shares`` and ``threshold`` as ``SecAggPlusWorkflow`` takes them.

    Every client sends ``parameters`` float32 values with weight 1; the mean that comes out must be the plain one.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    for attribute in ("run_id", "task_id", "node_id"):  # Flower makes no message without them, whatever they are
        setattr(TaskIdentity, attribute, 1)
    grid = InMemoryGrid(clients, parameters)
    context = _context(grid)
    began = time.process_time()
    SecAggPlusWorkflow(shares, threshold, max_weight=1.0)(grid, context)
    total = time.process_time() - began
    record = context.state.array_records[MAIN_PARAMS_RECORD]
    [model] = parameters_to_ndarrays(recorddict_compat.arrayrecord_to_parameters(record, True))
    if model.shape != (parameters,) or np.abs(model - grid.sum / clients).max() > QUANTISATION_STEP:
        raise RuntimeError("Flower's secure sum is not the sum")
    seconds = list(grid.client_seconds.values())
    return FlowerRound(total - sum(seconds) - grid.not_counted, statistics.median(seconds))


class InMemoryGrid(Grid):
    """``send_and_receive`` runs the clients in place, one after the other, and reads the clock for each."""

    def __init__(self, clients: int, parameters: int) -> None:
        self._contexts = {node: _node_context(node) for node in range(1_000, 1_000 + clients)}
        self._random = np.random.default_rng(0)
        self.sum: NDArray[np.float64] = np.zeros(parameters)
        self.client_seconds = dict.fromkeys(self._contexts, 0.0)
        self.not_counted = 0.0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._carry(self._answer(self._carry(message))) for message in messages]

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        began, not_counted = time.process_time(), self.not_counted
        reply = secaggplus_mod(message, self._contexts[node], self._train)
        self.client_seconds[node] += time.process_time() - began - (self.not_counted - not_counted)
        return reply

    def _train(self, message: Message, _context: Context) -> Message:
        began = time.process_time()
        update = self._random.normal(0.0, 0.1, self.sum.shape).astype(np.float32)
        self.sum += update
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([update]), num_examples=1, metrics={})
        reply = Message(recorddict_compat.fitres_to_recorddict(result, False), reply_to=message)
        self.not_counted += time.process_time() - began
        return reply

    def _carry(self, message: Message) -> Message:
        """A copy, as the network makes one: both sides change what they got."""
        began = time.process_time()
        copy = message_from_proto(message_to_proto(message))
        self.not_counted += time.process_time() - began
        return copy

    # The workflow needs nothing else of a grid.

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **more: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


class TakeFirst(FedAvg):
    """Samples everybody; the mean is in every result already."""

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        if failures:
            raise RuntimeError(f"Flower's clients failed: {failures[0]}")
        return results[0][1].parameters, {}


def _context(grid: InMemoryGrid) -> LegacyContext:
    nodes = list(grid.get_node_ids())
    manager = SimpleClientManager()
    for node in nodes:
        manager.register(GridClientProxy(node, grid, run_id=1))
    strategy = TakeFirst(min_fit_clients=len(nodes), min_available_clients=len(nodes))
    context = LegacyContext(_node_context(1), strategy=strategy, client_manager=manager)
    nothing = ndarrays_to_parameters([np.zeros(1, np.float32)])  # downloading the model is not measured
    context.state.array_records[MAIN_PARAMS_RECORD] = recorddict_compat.parameters_to_arrayrecord(nothing, True)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    return context


def _node_context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
