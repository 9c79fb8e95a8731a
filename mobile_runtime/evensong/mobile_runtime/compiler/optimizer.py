"""The optimisers, and where their steps stand in the training program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from evensong.mobile_runtime.compiler.ir import Graph, Node, Value, nbytes
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
    graph: Graph, gradients: Mapping[Value, Value], order: Sequence[Value], optimizer: Optimizer, batch: int
) -> None:
    """Puts each weight's step right behind the last use of the weight and of its gradient, so that the gradient's
    memory is free again as early as can be. ``order`` fixes the order of slots and of steps at the same place.

    Steps of ``batch`` examples decide where a gradient is better never stored, see :func:`update_linear_weights`.
    """
    last_use = _last_uses(graph)
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
    update_linear_weights(graph, batch)


def update_linear_weights(graph: Graph, batch: int) -> None:
    """A linear layer's weight gradient and the plain SGD that alone reads it become one LINEAR_UPDATE, which adds the
    product to the weight as it is computed: often the largest tensor of all is then never stored.

    The price is that the layer's input lives until the update, behind the last use of the weight. Where that costs
    more than the gradient would, the two stay apart.
    """
    makers, readers, last_use = graph.producers(), graph.readers(), _last_uses(graph)
    for at, step in enumerate(graph.nodes):
        if step.op != "SGD" or len(step.inputs) != 2:
            continue
        weight, gradient = step.inputs
        maker = makers.get(gradient.root)
        if maker is None or maker.op != "LINEAR_GRAD_WEIGHT" or gradient.root is not maker.outputs[0].root:
            continue
        if len(readers[gradient.root]) != 1:
            continue
        dy, x = maker.inputs
        grown = [value.root for value in (dy, x) if value.region == Region.ARENA and last_use[value.root] < at]
        if graph.nodes.index(maker) + 1 < at and sum(nbytes(v, batch) for v in grown) > nbytes(gradient.root, batch):
            continue
        attrs = {"weight_decay": step.attrs["weight_decay"]}
        graph.nodes[at] = Node("LINEAR_UPDATE", [weight.reshaped(maker.outputs[0].dims), dy, x], [], attrs, step.place)
        maker.op, maker.inputs, maker.outputs = "SUM_ROWS", [dy], maker.outputs[1:]
    graph.nodes = [node for node in graph.nodes if node.op != "SUM_ROWS" or node.outputs]


def _last_uses(graph: Graph) -> dict[Value, int]:
    """For each root value, the last place in the order of execution that reads or writes it."""
    return {value.root: at for at, node in enumerate(graph.nodes) for value in (*node.inputs, *node.outputs)}
