"""The optimisers, and where their steps stand in the training program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from evensong.mobile_runtime.compiler.ir import Graph, Node, Value
from evensong.mobile_runtime.errors import CompileError
from evensong.wire.program import Region


@dataclass(frozen=True)
class SGD:
    """``torch.optim.SGD``; the learning rate comes with each step. Momentum costs one slot as large as the weights."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise CompileError("SGD takes 0 <= momentum < 1 and weight_decay >= 0", got=asdict(self))
        if self.nesterov and not self.momentum:
            raise CompileError("Nesterov's step needs momentum")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def step(self, weight: Value, gradient: Value, slots: list[Value]) -> Node:
        attrs = {"momentum": self.momentum, "weight_decay": self.weight_decay, "nesterov": int(self.nesterov)}
        return Node("SGD", [weight, gradient, *slots], [], attrs)


@dataclass(frozen=True)
class Adam:
    """``torch.optim.Adam``, or ``AdamW`` when ``decoupled``. Costs two slots as large as the weights."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1) or self.eps <= 0 or self.weight_decay < 0:
            raise CompileError("Adam takes 0 <= beta < 1, eps > 0 and weight_decay >= 0", got=asdict(self))

    @property
    def slots(self) -> tuple[str, ...]:
        return ("first moment", "second moment")

    def step(self, weight: Value, gradient: Value, slots: list[Value]) -> Node:
        attrs = {**asdict(self), "decoupled": int(self.decoupled)}
        return Node("ADAM", [weight, gradient, *slots], [], attrs)


Optimizer = SGD | Adam


def apply_optimizer(
    graph: Graph, gradients: Mapping[Value, Value], order: Sequence[Value], optimizer: Optimizer
) -> None:
    """Puts each weight's step right behind the last use of the weight and of its gradient, so that the gradient's
    memory is free again as early as can be. ``order`` fixes the order of slots and of steps at the same place."""
    last_use: dict[Value, int] = {}
    for index, node in enumerate(graph.nodes):
        for value in (*node.inputs, *node.outputs):
            last_use[value.root] = index
    steps: dict[int, list[Node]] = {}
    for weight in order:
        if weight not in gradients:
            continue
        gradient = gradients[weight]
        slots = [Value(weight.dims, region=Region.SLOTS, name=f"{weight.name} {slot}") for slot in optimizer.slots]
        node = optimizer.step(weight, gradient.reshaped(weight.dims), slots)
        node.place = weight.name
        steps.setdefault(max(last_use[weight], last_use[gradient.root]), []).append(node)
    graph.nodes = [n for index, node in enumerate(graph.nodes) for n in (node, *steps.get(index, []))]
