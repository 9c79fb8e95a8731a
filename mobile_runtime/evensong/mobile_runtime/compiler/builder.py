"""What the tables of ``aten_*.py`` share: adding nodes at a place of the model, and refusing with a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evensong.mobile_runtime.compiler.ir import Graph, Value
from evensong.mobile_runtime.compiler.layout import MixesExamplesError, View, arrange, reshaped, squeezed
from evensong.mobile_runtime.compiler.weights import Weights
from evensong.mobile_runtime.errors import UnsupportedOperation
from evensong.wire.program import DType

NHWC = (0, 2, 3, 1)  #: the engine's order of the author's axes [N, C, H, W]
Sizes = Sequence[int] | int


@dataclass
class Builder:
    """The graph being made; ``place``, ``shape`` (of the result, as the author sees it) and whether the result is
    ``floating`` belong to the current call.
    """

    graph: Graph
    weights: Weights
    place: str = ""
    shape: tuple[int, ...] = ()
    floating: bool = True
    streams: int = field(default=0)  #: of random numbers, handed out so far

    def emit(self, op: str, inputs: Sequence[Value], dims: Sequence[int], **attrs: int | float) -> Value:
        """Adds a node with one float32 result, batched if any operand is."""
        return self.emit_as(DType.F32, op, inputs, dims, **attrs)

    def emit_as(
        self, dtype: DType, op: str, inputs: Sequence[Value], dims: Sequence[int], **attrs: int | float
    ) -> Value:
        """The same with a result of any dtype."""
        result = Value(tuple(dims), dtype, batched=any(value.batched for value in inputs), name=self.place)
        self.graph.add(op, inputs, [result], self.place, **attrs)
        return result

    def emit_all(
        self, op: str, inputs: Sequence[Value], dims: Sequence[tuple[int, ...]], **attrs: int | float
    ) -> list[Value]:
        """The same with several float32 results."""
        batched = any(value.batched for value in inputs)
        outputs = [Value(shape, batched=batched, name=self.place) for shape in dims]
        self.graph.add(op, inputs, outputs, self.place, **attrs)
        return outputs

    def arrange(self, view: View, order: Sequence[int]) -> Value:
        """``view``'s value with its dimensions in ``order``."""
        return arrange(self.graph, view, order, self.place)

    def stream(self) -> int:
        """A stream of random numbers for one call site."""
        self.streams += 1
        return self.streams - 1

    def real(self, view: View) -> View:
        """``view`` in float32, cast here if it holds integers; refuses arithmetic whose result is one."""
        if view.value.dtype == DType.F32:
            return view
        require(self.floating, "arithmetic on integers", fix="Convert to float32 first: x.float().")
        return View(self.emit("CAST", [view.value], view.value.dims), view.shape, view.order)

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


def as_image(b: Builder, x: View, layer: Callable[[View], View]) -> View:
    """Runs a 2-D layer on a signal [N, C, L] seen as an image [N, C, 1, L]."""
    require(len(x.shape) == 3, "a signal without a batch axis", expected="3 axes", got=len(x.shape))
    shape = b.shape
    b.shape = (shape[0], shape[1], 1, shape[2])
    result = squeezed(layer(as_picture(b, x)), [2])
    b.shape = shape
    return result


def as_picture(b: Builder, signal: View) -> View:
    """A signal, or the weight of one, [A, B, L] as [A, B, 1, L]."""
    first, second, length = signal.shape
    return reshaped(b.graph, signal, (first, second, 1, length), b.place)


def pair(sizes: Sizes) -> tuple[int, int]:
    """Height and width of a size that torch may give as one number."""
    if isinstance(sizes, int):
        return sizes, sizes
    return (sizes[0], sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def single(sizes: Sizes) -> int:
    """The one number of a size along a signal."""
    return sizes if isinstance(sizes, int) else sizes[0]
