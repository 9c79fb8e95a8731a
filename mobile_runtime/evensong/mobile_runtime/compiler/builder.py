"""What the tables of ``aten_*.py`` share: adding nodes at a place of the model, and refusing with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from evensong.mobile_runtime.compiler.ir import Graph, Value
from evensong.mobile_runtime.compiler.layout import MixesExamplesError, View, arrange
from evensong.mobile_runtime.compiler.weights import Weights
from evensong.mobile_runtime.errors import UnsupportedOperation


@dataclass
class Builder:
    """The graph being made; ``place`` and ``shape`` (of the result, as the author sees it) belong to the current
    call.
    """

    graph: Graph
    weights: Weights
    place: str = ""
    shape: tuple[int, ...] = ()
    dropouts: int = field(default=0)

    def emit(self, op: str, inputs: Sequence[Value], dims: Sequence[int], **attrs: int | float) -> Value:
        """Adds a node with one float32 result, batched if any operand is."""
        return self.emit_all(op, inputs, [tuple(dims)], **attrs)[0]

    def emit_all(
        self, op: str, inputs: Sequence[Value], dims: Sequence[tuple[int, ...]], **attrs: int | float
    ) -> list[Value]:
        """The same with several results."""
        batched = any(value.batched for value in inputs)
        outputs = [Value(shape, batched=batched, name=self.place) for shape in dims]
        self.graph.add(op, inputs, outputs, self.place, **attrs)
        return outputs

    def arrange(self, view: View, order: Sequence[int]) -> Value:
        """``view``'s value with its dimensions in ``order``."""
        return arrange(self.graph, view, order, self.place)

    def example_axis(self, view: View, axis: int, what: str) -> int:
        """``axis`` counted from the front; refuses the batch axis."""
        axis = view.axis(axis)
        if axis == view.batch_axis:
            raise MixesExamplesError(f"{self.place}: {what} over the batch axis")
        return axis


def require(holds: bool, what: str, *, expected: object = None, got: object = None, fix: str | None = None) -> None:
    """Raises :class:`UnsupportedOperation` unless ``holds``."""
    if not holds:
        raise UnsupportedOperation(what, expected=expected, got=got, fix=fix)
