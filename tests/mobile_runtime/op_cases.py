"""One random program per operation, for tests that compare engines: shapes, attributes, batch and values are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from program_builder import ProgramBuilder

from evensong.wire.program import OPS, Activation, Artifact, DType, VariableFlag

Array = npt.NDArray[Any]

_NUMPY = {DType.F32: np.float32, DType.I8: np.int8, DType.U8: np.uint8, DType.I32: np.int32}


class Case:
    """A program under construction around one operation, with the values of its inputs.

    Dimensions are those of one example: a batched tensor multiplies the first by the batch. Whether the program is
    batched, whether the operation works in place and where it writes are drawn as well.
    """

    def __init__(self, draw: Callable[[Any], Any], name: str) -> None:
        self.draw = draw
        self.name = name
        self.max_batch = draw(st.integers(1, 4))
        self.batch = draw(st.integers(1, self.max_batch))
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.builder = ProgramBuilder("case", self.max_batch)
        self.values: list[Array] = []
        self.operands: list[int] = []
        self.results: list[int] = []
        #: The input that shares its memory with the first output, if any.
        self.in_place = draw(st.sampled_from([None, *(source for source, _ in OPS[name].inplace)]))
        self.step = draw(st.integers(1, 1000))
        self.seed = draw(st.integers(0, 2**64 - 1))

    def size(self, low: int = 1, high: int = 6) -> int:
        return int(self.draw(st.integers(low, high)))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def floats(self, *dims: int) -> Array:
        return self.rng.normal(size=dims).astype(np.float32)

    def integers(self, low: int, high: int, *dims: int, dtype: Any = np.int32) -> Array:
        return self.rng.integers(low, high, size=dims, endpoint=True).astype(dtype)

    # --- operands

    def live(self, dims: tuple[int, ...], batched: bool) -> tuple[int, ...]:
        return (dims[0] * self.batch, *dims[1:]) if batched else dims

    def declared(self, dims: tuple[int, ...], batched: bool) -> tuple[int, ...]:
        return (dims[0] * self.max_batch, *dims[1:]) if batched else dims

    def input(self, *dims: int, value: Array | None = None, batched: bool = True, **quantised: Any) -> int:
        """An input of the operation; ``value`` has the live shape and normal float32 values by default."""
        value = self.floats(*self.live(dims, batched)) if value is None else value
        dtype = {np.dtype(v): k for k, v in _NUMPY.items()}[value.dtype]
        declared = self.declared(dims, batched)
        index = self.builder.input(f"in{len(self.values)}", declared, dtype, batched=batched, **quantised)
        self.values.append(value)
        if self.in_place == len(self.operands):  # the output will lie here: bring it to memory that may be written
            copy = self.builder.scratch(declared, dtype, batched=batched, **quantised)
            self.builder.op("COPY", [index], [copy])
            index = copy
        self.operands.append(index)
        return index

    def weight(self, *dims: int, value: Array | None = None, **quantised: Any) -> int:
        return self.input(*dims, value=value, batched=False, **quantised)

    def output(self, *dims: int, dtype: DType = DType.F32, batched: bool = True, **quantised: Any) -> None:
        declared = self.declared(dims, batched)
        port = self.builder.output(f"out{len(self.results)}", declared, dtype, batched=batched, **quantised)
        if self.in_place is not None and not self.results:
            shared = self.operands[self.in_place]
            self.results.append(shared)
            self._after = (shared, port)
        else:
            self.results.append(port)

    def maybe(self, *dims: int, dtype: DType = DType.F32, batched: bool = True) -> bool:
        """An optional output, there or not; later ones only after it."""
        there = self.flag()
        if there:
            self.output(*dims, dtype=dtype, batched=batched)
        return there

    def finish(self, **attrs: float) -> None:
        self.builder.op(self.name, self.operands, self.results, **attrs)
        if self.in_place is not None:
            self.builder.op("COPY", [self._after[0]], [self._after[1]])

    # --- running

    def artifact(self) -> Artifact:
        return self.builder.artifact()

    def buffers(self) -> list[Array]:
        """Fresh output buffers of live size, filled with a pattern that no kernel may leave behind."""
        tensors = [self.builder.tensors[port.tensor] for port in self.builder.outputs]
        return [
            np.full(
                (t.dims[0] // self.max_batch * self.batch, *t.dims[1:]) if t.batched else t.dims, 77, _NUMPY[t.dtype]
            )
            for t in tensors
        ]


CASES: dict[str, Callable[[Case], None]] = {}


def _case(*names: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def register(make: Callable[[Case], None]) -> Callable[[Case], None]:
        CASES.update(dict.fromkeys(names, make))
        return make

    return register


def _big(c: Case) -> int:
    """Mostly small, sometimes beyond the widest vector and panel."""
    return c.draw(st.one_of(st.integers(1, 9), st.integers(10, 70)))


# ------------------------------------------------------------------------------------------------- linear, convolution


@_case("LINEAR")
def _linear(c: Case) -> None:
    rows, depth, columns = c.size(), _big(c), _big(c)
    c.input(rows, depth)
    c.weight(columns, depth)
    if c.flag():
        c.weight(columns)
    c.output(rows, columns)
    c.finish(activation=c.size(0, 2))


@_case("LINEAR_GRAD_INPUT")
def _linear_grad_input(c: Case) -> None:
    rows, depth, columns = c.size(), _big(c), _big(c)
    c.input(rows, columns)
    c.weight(columns, depth)
    c.output(rows, depth)
    c.finish()


@_case("LINEAR_GRAD_WEIGHT")
def _linear_grad_weight(c: Case) -> None:
    rows, depth, columns = c.size(), _big(c), _big(c)
    c.input(rows, columns)
    c.input(rows, depth)
    c.output(columns, depth, batched=False)
    c.maybe(columns, batched=False)
    c.finish()


class Geometry:
    """Sizes and attributes of a random convolution: depthwise, grouped, strided, dilated, padded, 1-D."""

    def __init__(self, c: Case) -> None:
        self.groups = c.draw(st.sampled_from([1, 1, 2, 3, 8]))
        self.depthwise = c.flag()
        self.inputs = self.groups * (1 if self.depthwise else c.size(1, 5))
        self.outputs = self.groups * (1 if self.depthwise else c.draw(st.sampled_from([1, 2, 7, 16])))
        self.attrs: dict[str, float] = {"groups": self.groups}
        self.image, self.out, self.kernel = [], [], []
        for axis, pad_name in (("h", "pad_top"), ("w", "pad_left")):
            one = axis == "h" and c.flag()
            kernel, stride, dilation = (1, 1, 1) if one else (c.size(1, 5), c.size(1, 3), c.size(1, 2))
            extent = (kernel - 1) * dilation + 1
            pad, end = (0, 0) if one else (c.size(0, kernel), c.size(0, kernel))
            size = max(1, extent - pad - end) + (0 if one else c.size(0, 8))
            self.image.append(size)
            self.kernel.append(kernel)
            self.out.append((size + pad + end - extent) // stride + 1)
            self.attrs |= {f"stride_{axis}": stride, f"dilation_{axis}": dilation, pad_name: pad}

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.outputs, *self.kernel, self.inputs // self.groups)


@_case("CONV2D")
def _conv(c: Case) -> None:
    g = Geometry(c)
    c.input(1, *g.image, g.inputs)
    c.weight(*g.weight)
    if c.flag():
        c.weight(g.outputs)
    c.output(1, *g.out, g.outputs)
    c.finish(**g.attrs, activation=c.size(0, 2))


@_case("CONV2D_GRAD_INPUT")
def _conv_grad_input(c: Case) -> None:
    g = Geometry(c)
    c.input(1, *g.out, g.outputs)
    c.weight(*g.weight)
    c.output(1, *g.image, g.inputs)
    c.finish(**g.attrs)


@_case("CONV2D_GRAD_WEIGHT")
def _conv_grad_weight(c: Case) -> None:
    g = Geometry(c)
    c.input(1, *g.out, g.outputs)
    c.input(1, *g.image, g.inputs)
    c.output(*g.weight, batched=False)
    c.maybe(g.outputs, batched=False)
    c.finish(**g.attrs)


class Pooling:
    """Sizes and attributes of a random pooling."""

    def __init__(self, c: Case, largest: int = 4) -> None:
        self.channels = c.draw(st.sampled_from([1, 3, 8, 17]))
        self.attrs: dict[str, float] = {}
        self.image, self.out, self.kernel = [], [], []
        for axis, pad_name in (("h", "pad_top"), ("w", "pad_left")):
            kernel, stride = c.size(1, largest), c.size(1, 3)
            pad = c.size(0, kernel // 2)
            size = kernel + c.size(0, 6)
            self.image.append(size)
            self.kernel.append(kernel)
            most = (size + pad - 1) // stride + 1  # the last window still starts inside
            self.out.append(c.draw(st.integers(1, most)))
            self.attrs |= {f"kernel_{axis}": kernel, f"stride_{axis}": stride, pad_name: pad}

    @property
    def index(self) -> DType:
        return DType.U8 if self.kernel[0] * self.kernel[1] <= 256 else DType.I32


@_case("MAX_POOL2D")
def _max_pool(c: Case) -> None:
    p = Pooling(c, c.draw(st.sampled_from([4, 4, 18])))
    values = c.integers(-3, 3, *c.live((1, *p.image, p.channels), True), dtype=np.float32)  # with ties
    c.input(1, *p.image, p.channels, value=values if c.flag() else None)
    c.output(1, *p.out, p.channels)
    c.maybe(1, *p.out, p.channels, dtype=p.index)
    c.finish(**p.attrs)


@_case("MAX_POOL2D_GRAD")
def _max_pool_grad(c: Case) -> None:
    p = Pooling(c, c.draw(st.sampled_from([4, 4, 18])))
    c.input(1, *p.out, p.channels)
    c.input(1, *p.out, p.channels, value=_places(c, p).astype(_NUMPY[p.index]))
    c.output(1, *p.image, p.channels)
    c.finish(**p.attrs)


def _places(c: Case, p: Pooling) -> Array:
    """For each window a random place of it that lies in the image."""
    axes = []
    for axis, pad_name in enumerate(("pad_top", "pad_left")):
        start = np.arange(p.out[axis]) * int(p.attrs[f"stride_{'hw'[axis]}"]) - int(p.attrs[pad_name])
        low = np.maximum(0, -start)
        high = np.minimum(p.kernel[axis], p.image[axis] - start)
        axes.append((low, high))
    shape = (c.batch, *p.out, p.channels)
    (top, bottom), (left, right) = axes
    down = c.rng.integers(top[:, None, None], bottom[:, None, None], size=shape)
    across = c.rng.integers(left[:, None], right[:, None], size=shape)
    return down * p.kernel[1] + across


@_case("AVG_POOL2D", "AVG_POOL2D_GRAD")
def _avg_pool(c: Case) -> None:
    p = Pooling(c)
    sides = [(1, *p.image, p.channels), (1, *p.out, p.channels)]
    source, target = sides if c.name == "AVG_POOL2D" else reversed(sides)
    c.input(*source)
    c.output(*target)
    c.finish(**p.attrs, count_include_pad=c.size(0, 1))


# ------------------------------------------------------------------------------------------------- attention


@_case("MATMUL")
def _matmul(c: Case) -> None:
    lead, rows, depth, columns, transpose = c.size(1, 3), _big(c), _big(c), _big(c), c.size(0, 2)
    c.input(1, lead, *((depth, rows) if transpose == 1 else (rows, depth)))
    c.input(1, lead, *((columns, depth) if transpose == 2 else (depth, columns)))
    c.output(1, lead, rows, columns)
    c.finish(transpose=transpose)


@_case("ATTENTION", "ATTENTION_GRAD")
def _attention(c: Case) -> None:
    queries, keys, heads, size, other = _big(c), _big(c), c.size(1, 3), c.size(1, 18), c.size(1, 18)
    q, k, v = (1, queries, heads, size), (1, keys, heads, size), (1, keys, heads, other)
    if c.name == "ATTENTION_GRAD":
        c.input(1, queries, heads, other)
    for dims in (q, k, v):
        c.input(*dims, value=c.floats(*c.live(dims, True)) / np.float32(2))
    if c.name == "ATTENTION":
        c.output(1, queries, heads, other)
        c.maybe(1, queries, heads)
    else:
        c.input(1, queries, heads, value=2 + np.abs(c.floats(*c.live((1, queries, heads), True))))
        for dims in (q, k, v):
            c.output(*dims)
    c.finish(causal=c.size(0, 1), scale=0.5)


# ------------------------------------------------------------------------------------------------- recurrent


@_case("GRU", "LSTM")
def _recurrent(c: Case) -> None:
    rows, steps, hidden = c.draw(st.sampled_from([1, 2, 40])), c.size(), _big(c)
    gates = hidden * (3 if c.name == "GRU" else 4)
    c.input(rows, steps, gates)
    c.weight(gates, hidden)
    c.weight(gates)
    c.output(rows, steps, gates)
    c.output(rows, steps, hidden)
    c.finish(reverse=c.size(0, 1))


@_case("GRU_GRAD", "LSTM_GRAD")
def _recurrent_grad(c: Case) -> None:
    rows, steps, hidden = c.draw(st.sampled_from([1, 2, 40])), c.draw(st.sampled_from([1, 2, 5, 30])), _big(c)
    parts = 3 if c.name == "GRU_GRAD" else 4
    gates = c.rng.uniform(0, 1, c.live((rows, steps, parts * hidden), True)).astype(np.float32)
    c.input(rows, steps, hidden)
    c.input(rows, steps, parts * hidden, value=gates)
    c.input(rows, steps, hidden)
    c.weight(parts * hidden, hidden, value=c.floats(parts * hidden, hidden) / np.float32(4 * hidden**0.5))
    if c.name == "GRU_GRAD":
        c.weight(parts * hidden)
    c.output(rows, steps, parts * hidden)
    c.output(rows, steps, hidden)
    _ = c.maybe(parts * hidden, hidden, batched=False) and c.maybe(parts * hidden, batched=False)
    c.finish(reverse=c.size(0, 1))


# ------------------------------------------------------------------------------------------------- normalisation


@_case("BATCH_NORM_TRAIN")
def _batch_norm(c: Case) -> None:
    rows, channels = c.size(2, 8), _big(c)
    c.input(rows, channels)
    c.weight(channels)
    c.weight(channels)
    for name in ("mean", "var"):
        c.operands.append(c.builder.variable(name, np.abs(c.floats(channels)), VariableFlag.BUFFER))
    c.output(rows, channels)
    c.output(channels, batched=False)
    c.output(channels, batched=False)
    c.finish(eps=1e-3, momentum=0.1)


@_case("BATCH_NORM_GRAD", "BATCH_NORM_EVAL_GRAD")
def _batch_norm_grad(c: Case) -> None:
    rows, channels = c.size(), _big(c)
    c.input(rows, channels)
    c.input(rows, channels)
    c.weight(channels)
    c.weight(channels)
    c.weight(channels, value=np.abs(c.floats(channels)) + np.float32(0.5))
    c.output(rows, channels)
    if c.name == "BATCH_NORM_GRAD":
        c.output(channels, batched=False)
        c.output(channels, batched=False)
        c.finish()
    else:
        _ = c.maybe(channels, batched=False) and c.maybe(channels, batched=False)
        c.finish(eps=1e-3)


@_case("BATCH_NORM_EVAL")
def _batch_norm_eval(c: Case) -> None:
    rows, channels = c.size(), _big(c)
    c.input(rows, channels)
    for _ in range(3):
        c.weight(channels)
    c.weight(channels, value=np.abs(c.floats(channels)))
    c.output(rows, channels)
    c.finish(eps=1e-3)


@_case("LAYER_NORM")
def _layer_norm(c: Case) -> None:
    rows, channels = c.size(), _big(c) + 1
    c.input(rows, channels)
    c.weight(channels)
    c.weight(channels)
    c.output(rows, channels)
    c.output(rows, 1)
    c.output(rows)
    c.finish(eps=1e-3)


@_case("LAYER_NORM_GRAD")
def _layer_norm_grad(c: Case) -> None:
    rows, channels = c.size(), _big(c) + 1
    c.input(rows, channels)
    c.input(rows, channels)
    c.weight(channels)
    c.input(rows)
    c.input(rows, value=np.abs(c.floats(*c.live((rows,), True))))
    c.output(rows, channels)
    c.output(channels, batched=False)
    c.output(channels, batched=False)
    c.finish()


@_case("GROUP_NORM")
def _group_norm(c: Case) -> None:
    groups, length = c.size(), c.size(2, 8)
    channels = groups * c.size(1, 9)
    c.input(1, length, channels)
    c.weight(channels)
    c.weight(channels)
    c.output(1, length, channels)
    c.output(1, groups)
    c.output(1, groups)
    c.finish(eps=1e-3)


@_case("GROUP_NORM_GRAD")
def _group_norm_grad(c: Case) -> None:
    groups, length = c.size(), c.size(1, 8)
    channels = groups * c.size(1, 9)
    c.input(1, length, channels)
    c.input(1, length, channels)
    c.weight(channels)
    c.input(1, groups)
    c.input(1, groups, value=np.abs(c.floats(*c.live((1, groups), True))))
    c.output(1, length, channels)
    c.output(channels, batched=False)
    c.output(channels, batched=False)
    c.finish()


@_case("RMS_NORM")
def _rms_norm(c: Case) -> None:
    rows, channels = c.size(), _big(c)
    c.input(rows, channels)
    c.weight(channels)
    c.output(rows, channels)
    c.output(rows)
    c.finish(eps=1e-3)


@_case("RMS_NORM_GRAD")
def _rms_norm_grad(c: Case) -> None:
    rows, channels = c.size(), _big(c)
    c.input(rows, channels)
    c.input(rows, channels)
    c.weight(channels)
    c.input(rows, value=np.abs(c.floats(*c.live((rows,), True))))
    c.output(rows, channels)
    c.output(channels, batched=False)
    c.finish()


# ------------------------------------------------------------------------------------------------- element-wise


@_case("UNARY")
def _unary(c: Case) -> None:
    count = _big(c)
    c.input(count, 3, value=4 * c.floats(*c.live((count, 3), True)))
    c.output(count, 3)
    c.finish(kind=c.size(1, max(Activation)))


@_case("UNARY_GRAD")
def _unary_grad(c: Case) -> None:
    count, kind = _big(c), Activation(c.size(1, max(Activation)))
    s = 4 * c.floats(*c.live((count, 3), True))
    if kind in (Activation.SIGMOID, Activation.TANH):
        s = np.tanh(s)
    c.input(count, 3)
    c.input(count, 3, value=s)
    c.output(count, 3)
    c.finish(kind=kind)


@_case("ADD", "SUB", "MUL", "MAXIMUM", "MINIMUM", "STEP")
def _binary(c: Case) -> None:
    rows, columns = c.size(), _big(c)
    values = c.integers(-2, 2, *c.live((rows, columns), True), dtype=np.float32)  # some are equal
    c.input(rows, columns, value=values)
    if c.in_place != 1 and c.flag():
        c.weight(columns, value=c.integers(-2, 2, columns, dtype=np.float32))
    else:
        c.input(rows, columns)
    c.output(rows, columns)
    c.finish(**({"at_equal": 0.25} if c.name == "STEP" else {}))


@_case("SCALE")
def _scale(c: Case) -> None:
    count = _big(c)
    c.input(count)
    c.output(count)
    c.finish(alpha=1.5, beta=-0.25)


@_case("SUM_ROWS")
def _sum_rows(c: Case) -> None:
    rows, columns = c.size(), _big(c)
    c.input(rows, columns)
    c.output(columns, batched=False)
    c.finish()


@_case("REDUCE_MEAN", "REDUCE_MEAN_GRAD")
def _reduce_mean(c: Case) -> None:
    outer, axis, inner = c.size(), _big(c), c.size(1, 20)
    sides = [(outer, axis, inner), (outer, inner)]
    source, target = sides if c.name == "REDUCE_MEAN" else reversed(sides)
    c.input(*source)
    c.output(*target)
    c.finish(axis_size=axis, inner_size=inner)


@_case("DROPOUT")
def _dropout(c: Case) -> None:
    count = _big(c)
    c.input(count, 5)
    c.output(count, 5)
    c.output(count, 5, dtype=DType.U8)
    c.finish(p=c.draw(st.sampled_from([0.0, 0.25, 0.5, 0.9])), stream=c.draw(st.integers(-(2**31), 2**31 - 1)))


@_case("DROPOUT_GRAD")
def _dropout_grad(c: Case) -> None:
    count = _big(c)
    c.input(count, 5)
    c.input(count, 5, value=c.integers(0, 1, *c.live((count, 5), True), dtype=np.uint8))
    c.output(count, 5)
    c.finish(p=0.25)


@_case("ACTIVATION_MASK")
def _activation_mask(c: Case) -> None:
    rows, columns = c.size(), _big(c)
    c.input(rows, columns, value=4 * c.floats(*c.live((rows, columns), True)))
    c.output(rows, -(-columns // 8), dtype=DType.U8)
    c.finish(kind=c.size(1, 2))


@_case("MASK_GRAD")
def _mask_grad(c: Case) -> None:
    rows, columns = c.size(), _big(c)
    bytes_ = -(-columns // 8)
    c.input(rows, columns)
    c.input(rows, bytes_, value=c.integers(0, 255, *c.live((rows, bytes_), True), dtype=np.uint8))
    c.output(rows, columns)
    c.finish()


@_case("FILL")
def _fill(c: Case) -> None:
    c.output(_big(c), 3)
    c.finish(value=0.1)


# ------------------------------------------------------------------------------------------------- movement


def _any_dtype(c: Case, *dims: int, batched: bool = True) -> DType:
    """Adds an input of a random dtype, or of the dtype of the first one."""
    shape = c.live(dims, batched)
    first = c.operands[0] if c.operands else None
    dtype = c.draw(st.sampled_from(list(DType))) if first is None else c.builder.tensors[first].dtype
    value = c.floats(*shape) if dtype == DType.F32 else c.integers(0, 100, *shape, dtype=_NUMPY[dtype])
    c.input(*dims, value=value, batched=batched)
    return dtype


@_case("TRANSPOSE")
def _transpose(c: Case) -> None:
    dims = [c.size(1, 5) for _ in range(c.size(1, 6))]
    batched = c.flag()
    order = c.draw(st.permutations(range(1, len(dims)) if batched else range(len(dims))))
    order = [0, *order] if batched else list(order)
    dtype = _any_dtype(c, *dims, batched=batched)
    c.output(*(dims[axis] for axis in order), dtype=dtype, batched=batched)
    c.finish(**{f"perm{place}": axis for place, axis in enumerate(order)})


@_case("CONCAT")
def _concat(c: Case) -> None:
    dims = [c.size() for _ in range(c.size(2, 4))]
    axis = c.size(1, len(dims) - 1)
    widths = [c.size() for _ in range(c.size(1, 4))]
    for width in widths:
        dtype = _any_dtype(c, *dims[:axis], width, *dims[axis + 1 :])
    c.output(*dims[:axis], sum(widths), *dims[axis + 1 :], dtype=dtype)
    c.finish(axis=axis)


@_case("SLICE", "SLICE_GRAD")
def _slice(c: Case) -> None:
    dims = [c.size() for _ in range(c.size(2, 4))]
    axis = c.size(1, len(dims) - 1)
    start = c.size(0, dims[axis] - 1)
    part = [*dims[:axis], c.size(1, dims[axis] - start), *dims[axis + 1 :]]
    source, target = (dims, part) if c.name == "SLICE" else (part, dims)
    dtype = _any_dtype(c, *source)
    c.output(*target, dtype=dtype)
    c.finish(axis=axis, start=start)


@_case("COPY")
def _copy(c: Case) -> None:
    rows, columns = c.size(), c.size()
    dtype = _any_dtype(c, rows, columns)
    c.output(rows * columns, dtype=dtype)
    c.finish()


@_case("EMBEDDING", "EMBEDDING_GRAD")
def _embedding(c: Case) -> None:
    count, words, width = c.size(), c.size(), _big(c)
    ids = c.integers(0, words - 1, *c.live((count,), True))
    if c.name == "EMBEDDING":
        c.input(count, value=ids)
        c.weight(words, width)
        c.output(count, width)
    else:
        c.input(count, width)
        c.input(count, value=ids)
        c.output(words, width, batched=False)
    c.finish()


# ------------------------------------------------------------------------------------------------- softmax, losses


@_case("SOFTMAX", "LOG_SOFTMAX")
def _softmax(c: Case) -> None:
    rows, classes = c.size(), _big(c)
    c.input(rows, classes, value=5 * c.floats(*c.live((rows, classes), True)))
    c.output(rows, classes)
    c.finish()


@_case("SOFTMAX_GRAD", "LOG_SOFTMAX_GRAD")
def _softmax_grad(c: Case) -> None:
    rows, classes = c.size(), _big(c)
    x = c.floats(*c.live((rows, classes), True))
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    c.input(rows, classes)
    c.input(rows, classes, value=p if c.name == "SOFTMAX_GRAD" else np.log(p))
    c.output(rows, classes)
    c.finish()


@_case("CROSS_ENTROPY")
def _cross_entropy(c: Case) -> None:
    rows, classes = c.size(), _big(c)
    c.input(rows, classes, value=3 * c.floats(*c.live((rows, classes), True)))
    c.input(rows, value=c.integers(0, classes - 1, *c.live((rows,), True)))
    _loss_outputs(c, rows, classes)


@_case("MSE", "BCE_WITH_LOGITS")
def _elementwise_loss(c: Case) -> None:
    rows, width = c.size(), _big(c)
    c.input(rows, width)
    c.input(rows, width, value=c.rng.random(c.live((rows, width), True)).astype(np.float32))
    _loss_outputs(c, rows, width)


def _loss_outputs(c: Case, *dims: int) -> None:
    c.output(1, batched=False)
    c.output(1, dtype=DType.I32, batched=False)
    c.maybe(*dims)
    c.finish()


# ------------------------------------------------------------------------------------------------- optimisers


@_case("SGD")
def _sgd(c: Case) -> None:
    count, momentum = _big(c), c.flag()
    c.operands.append(c.builder.variable("w", c.floats(count)))
    c.weight(count)
    if momentum:
        c.operands.append(c.builder.slot((count,)))
    c.finish(momentum=0.9 if momentum else 0.0, weight_decay=0.01, nesterov=int(momentum and c.flag()))


@_case("ADAM")
def _adam(c: Case) -> None:
    count = _big(c)
    c.operands.append(c.builder.variable("w", c.floats(count)))
    c.weight(count)
    c.operands += [c.builder.slot((count,)), c.builder.slot((count,))]
    c.finish(beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.05, decoupled=c.size(0, 1))


@_case("LINEAR_UPDATE")
def _linear_update(c: Case) -> None:
    rows, depth, columns = c.size(), _big(c), _big(c)
    c.operands.append(c.builder.variable("w", c.floats(columns, depth)))
    c.input(rows, columns)
    c.input(rows, depth)
    c.finish(weight_decay=c.draw(st.sampled_from([0.0, 0.01])))


# ------------------------------------------------------------------------------------------------- int8


def _int8(c: Case, *dims: int, batched: bool = True) -> Array:
    return c.integers(-128, 127, *c.live(dims, batched), dtype=np.int8)


def _zero_point(c: Case) -> dict[str, Any]:
    return {"scale": 0.05, "zero_point": c.draw(st.integers(-128, 127))}


def _range(c: Case) -> dict[str, float]:
    low, high = sorted((c.draw(st.integers(-128, 127)), c.draw(st.integers(-128, 127))))
    return {"lo": low, "hi": high} if c.flag() else {"lo": -128, "hi": 127}


@_case("QUANTIZE")
def _quantize(c: Case) -> None:
    count = _big(c)
    value = 3 * c.floats(*c.live((count, 3), True))
    value.ravel()[:: c.size(2, 9)] = c.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e30, 0.125]))
    c.input(count, 3, value=value)
    c.output(count, 3, dtype=DType.I8, scale=c.draw(st.sampled_from([0.05, 0.25, 1e-30])), zero_point=c.size(-128, 127))
    c.finish()


@_case("DEQUANTIZE")
def _dequantize(c: Case) -> None:
    count = _big(c)
    c.input(count, 3, value=_int8(c, count, 3), **_zero_point(c))
    c.output(count, 3)
    c.finish()


@_case("QLINEAR")
def _qlinear(c: Case) -> None:
    rows, depth, columns = c.size(), c.draw(st.sampled_from([1, 3, 31, 64, 200])), _big(c)
    c.input(rows, depth, value=_int8(c, rows, depth), **_zero_point(c))
    c.weight(columns, depth, value=_int8(c, columns, depth, batched=False))
    _requantise(c, columns, depth)
    c.output(rows, columns, dtype=DType.I8, **_zero_point(c))
    c.finish(**_range(c))


@_case("QCONV2D")
def _qconv(c: Case) -> None:
    g = Geometry(c)
    c.input(1, *g.image, g.inputs, value=_int8(c, 1, *g.image, g.inputs), **_zero_point(c))
    c.weight(*g.weight, value=_int8(c, *g.weight, batched=False))
    _requantise(c, g.outputs, int(np.prod(g.weight[1:])))
    c.output(1, *g.out, g.outputs, dtype=DType.I8, **_zero_point(c))
    c.finish(**g.attrs, **_range(c))


def _requantise(c: Case, columns: int, depth: int) -> None:
    c.weight(columns, value=c.integers(-5000, 5000, columns))
    typical = 40.0 / (64 * 64 * np.sqrt(depth))
    c.weight(columns, value=(typical * (0.5 + c.rng.random(columns))).astype(np.float32))


@_case("QADD")
def _qadd(c: Case) -> None:
    count = _big(c)
    for _ in range(2):
        c.input(count, 3, value=_int8(c, count, 3), **_zero_point(c))
    c.output(count, 3, dtype=DType.I8, **_zero_point(c))
    c.finish(scale_a=float(c.rng.random()), scale_b=float(c.rng.random()), **_range(c))


@_case("QMAX_POOL2D", "QAVG_POOL2D")
def _qpool(c: Case) -> None:
    p = Pooling(c)
    quantised = _zero_point(c)
    c.input(1, *p.image, p.channels, value=_int8(c, 1, *p.image, p.channels), **quantised)
    average = c.name == "QAVG_POOL2D"
    c.output(1, *p.out, p.channels, dtype=DType.I8, **(_zero_point(c) if average else quantised))
    if not average:
        places = p.attrs["kernel_h"] * p.attrs["kernel_w"]
        c.maybe(1, *p.out, p.channels, dtype=DType.U8 if places <= 256 else DType.I32)
    more = {"count_include_pad": c.size(0, 1), "ratio": float(0.5 + c.rng.random())} if average else {}
    c.finish(**p.attrs, **more)


@_case("QLUT")
def _qlut(c: Case) -> None:
    count = _big(c)
    c.input(count, 3, value=_int8(c, count, 3))
    c.weight(256, value=_int8(c, 256, batched=False))
    c.output(count, 3, dtype=DType.I8)
    c.finish()


# ------------------------------------------------------------------------------------------------- input


@_case("CAST")
def _cast(c: Case) -> None:
    count = _big(c)
    whole = c.live((count, 3), True)
    values = c.integers(0, 255, *whole, dtype=np.uint8) if c.flag() else c.integers(-(2**31), 2**31 - 1, *whole)
    c.input(count, 3, value=values)
    c.output(count, 3)
    c.finish()


@_case("ONE_HOT")
def _one_hot(c: Case) -> None:
    rows, width, columns, first = c.size(), c.size(), _big(c), c.size(-3, 3)
    c.input(rows, width, value=c.integers(first - 2, first + columns - 1, *c.live((rows, width), True)))
    c.output(rows, columns)
    c.finish(first=first, count=c.size(0, 1))


@_case("BUCKETIZE")
def _bucketize(c: Case) -> None:
    count, boundaries = _big(c), c.size(1, 20)
    x = c.floats(*c.live((count, 2), True))
    edges = c.rng.choice(x.reshape(-1), boundaries)  # some values lie on a boundary; now and then not in order
    c.input(count, 2, value=x)
    c.weight(boundaries, value=edges if c.flag() else np.sort(edges))
    c.output(count, 2, dtype=DType.I32)
    c.finish(right=c.size(0, 1))


@_case("LOOKUP")
def _lookup(c: Case) -> None:
    count = _big(c)
    c.input(count, value=c.integers(-20, 20, *c.live((count,), True)))
    if c.flag():
        keys = c.integers(-20, 20, c.size(1, 30))
        keys = keys if c.flag() else np.unique(keys)
        c.weight(len(keys), 2, value=np.stack([keys, c.integers(-9, 99, len(keys))], axis=1))
    c.output(count, dtype=DType.I32)
    bins = c.draw(st.sampled_from([1, 2, 7, 1000, 2**31 - 1]))
    c.finish(first=c.size(-5, 0), bins=bins, salt=c.draw(st.integers(-(2**31), 2**31 - 1)))


@_case("TOKENIZE")
def _tokenize(c: Case) -> None:
    rows, size = c.size(), _big(c)
    alphabet = np.frombuffer(b"aAbBzZ @[`{09\t.,-'\x00\xc3\xa9\x80\xff", np.uint8)
    c.input(rows, size, value=c.rng.choice(alphabet, c.live((rows, size), True)))
    c.output(rows, c.size(1, 20), dtype=DType.I32)
    salt = c.draw(st.sampled_from([0, 1, -1, 2**31 - 1]))
    c.finish(lower=c.size(0, 1), strip=c.size(0, 1), split=c.size(0, 2), ngrams=c.size(1, 4), salt=salt)


@_case("RESIZE2D", "RESIZE2D_GRAD")
def _resize(c: Case) -> None:
    channels = c.draw(st.sampled_from([1, 3, 17]))
    sides = [(1, c.size(1, 9), c.size(1, 9), channels) for _ in range(2)]
    if c.name == "RESIZE2D" and c.flag():
        c.input(*sides[0], value=c.integers(0, 255, *c.live(sides[0], True), dtype=np.uint8))
    else:
        c.input(*sides[0])
    c.output(*sides[1])
    c.finish(mode=c.size(0, 2))


@_case("CROP2D")
def _crop(c: Case) -> None:
    image, pads = [c.size(1, 7), c.size(1, 7)], [c.size(0, 3), c.size(0, 3)]
    window = [c.size(1, side + 2 * pad) for side, pad in zip(image, pads, strict=True)]
    channels = c.draw(st.sampled_from([1, 3]))
    dtype = _any_dtype(c, 1, *image, channels)
    c.output(1, *window, channels, dtype=dtype)
    flips = {"flip_h": c.size(0, 1), "flip_v": c.size(0, 1)}
    c.finish(
        random=c.size(0, 1), pad_h=pads[0], pad_w=pads[1], **flips, stream=c.draw(st.integers(-(2**31), 2**31 - 1))
    )


@_case("QLUT_U8")
def _byte_table(c: Case) -> None:
    rows, channels = c.size(), c.draw(st.sampled_from([1, 3, 20]))
    c.input(rows, channels, value=c.integers(0, 255, *c.live((rows, channels), True), dtype=np.uint8))
    c.weight(channels, 256, value=_int8(c, channels, 256, batched=False))
    c.output(rows, channels, dtype=DType.I8)
    c.finish()


# ------------------------------------------------------------------------------------------------- int8 training


class Training:
    """What int8 training keeps beside a model: scales and peaks of activations, scales of gradients."""

    def __init__(self, c: Case) -> None:
        self.c = c
        self.count = c.size(1, 3)
        values = (0.01 + c.rng.random(self.count) / 10).astype(np.float32)
        self.scales = c.builder.const(values)
        self.updated_scales = c.builder.variable("scales", values, VariableFlag.BUFFER)
        self.peaks = c.builder.slot((self.count,))
        self.gradients = c.builder.slot((4, 2))

    def entry(self) -> int:
        return self.c.size(0, self.count - 1)

    def known_gradient(self) -> int:
        """The number of a gradient whose scale the program has set: from a few random numbers."""
        index = self.c.size(0, 2)
        numbers = self.c.builder.const(self.c.floats(5) * np.float32(10.0 ** self.c.size(-3, 1)))
        scratch = self.c.builder.scratch((5,), DType.I8)
        self.c.builder.op("G_QUANTIZE", [numbers, self.gradients], [scratch], index=index, stream=1)
        return index

    def weight_scale(self, outputs: int) -> int:
        return self.c.builder.const((0.001 + self.c.rng.random(outputs) / 50).astype(np.float32))


def _gradient(c: Case, *dims: int) -> Array:
    return c.integers(-127, 127, *c.live(dims, True), dtype=np.int8)


def _stream(c: Case) -> int:
    return int(c.draw(st.integers(-(2**31), 2**31 - 1)))


@_case("Q_PREPARE")
def _prepare(c: Case) -> None:
    t, outputs, depth = Training(c), _big(c), _big(c)
    c.weight(outputs, depth, value=_int8(c, outputs, depth, batched=False))
    c.operands += [t.weight_scale(outputs), t.scales]
    if c.flag():
        c.weight(outputs, value=c.floats(outputs) * np.float32(10.0 ** c.size(-3, 9)))
    c.output(outputs, dtype=DType.I32, batched=False)
    c.output(outputs, batched=False)
    c.finish(x=t.entry(), y=t.entry(), zero_point=c.size(-128, 127))


@_case("Q_OBSERVE")
def _observe(c: Case) -> None:
    t, count = Training(c), _big(c)
    zero_point = c.draw(st.sampled_from([0, -128, 5]))
    c.input(count, 3, value=_int8(c, count, 3), scale=0.05, zero_point=zero_point)
    c.operands.append(t.peaks)
    c.finish(index=t.entry(), limit=c.draw(st.sampled_from([127, 255])))
    c.builder.op("Q_ADAPT", [t.updated_scales, t.peaks], [], grow=1.25, shrink=0.9)


@_case("Q_ADAPT")
def _adapt(c: Case) -> None:
    t, count = Training(c), _big(c)
    small = c.integers(-100, 100, *c.live((count, 3), True), dtype=np.int8)
    x = c.builder.input("in0", c.declared((count, 3), True), DType.I8, batched=True)
    c.values.append(small)
    c.builder.op("Q_OBSERVE", [x, t.peaks], [], index=t.entry(), limit=c.draw(st.sampled_from([127, 255])))
    c.operands += [t.updated_scales, t.peaks]
    c.finish(grow=1.25, shrink=float(np.float32(c.rng.random())))


@_case("Q_QUANTIZE")
def _scaled_quantize(c: Case) -> None:
    t, count = Training(c), _big(c)
    value = 3 * c.floats(*c.live((count, 3), True))
    value.ravel()[:: c.size(2, 9)] = c.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e30, 0.125]))
    c.input(count, 3, value=value)
    c.operands.append(t.scales)
    c.output(count, 3, dtype=DType.I8, zero_point=c.size(-128, 127))
    c.finish(index=t.entry())


@_case("Q_DEQUANTIZE")
def _scaled_dequantize(c: Case) -> None:
    t, count = Training(c), _big(c)
    c.input(count, 3, value=_int8(c, count, 3), **_zero_point(c))
    c.operands.append(t.scales)
    c.output(count, 3)
    c.finish(index=t.entry())


@_case("Q_ADD")
def _scaled_add(c: Case) -> None:
    t, count = Training(c), _big(c)
    for _ in range(2):
        c.input(count, 3, value=_int8(c, count, 3), **_zero_point(c))
    c.operands.append(t.scales)
    c.output(count, 3, dtype=DType.I8, **_zero_point(c))
    c.finish(a=t.entry(), b=t.entry(), y=t.entry(), **_range(c))


@_case("G_QUANTIZE")
def _gradient_quantize(c: Case) -> None:
    t, count = Training(c), _big(c)
    value = c.floats(*c.live((count, 3), True)) * np.float32(10.0 ** c.size(-30, 10))
    value.ravel()[:: c.size(2, 9)] = c.draw(st.sampled_from([np.nan, 0.0]))
    c.input(count, 3, value=value)
    c.operands.append(t.gradients)
    c.output(count, 3, dtype=DType.I8)
    c.finish(index=c.size(0, 3), stream=_stream(c))


@_case("G_DEQUANTIZE")
def _gradient_dequantize(c: Case) -> None:
    t, count = Training(c), _big(c)
    index = t.known_gradient()
    c.input(count, 3, value=_gradient(c, count, 3))
    c.operands.append(t.gradients)
    c.output(count, 3)
    c.finish(index=index)


@_case("G_MASK")
def _gradient_mask(c: Case) -> None:
    count = _big(c)
    c.input(count, 3, value=_gradient(c, count, 3))
    c.input(count, 3, value=_int8(c, count, 3))
    c.output(count, 3, dtype=DType.I8)
    c.finish(lo=c.size(-129, 10), hi=c.size(0, 128))


@_case("G_SCALE")
def _gradient_scale(c: Case) -> None:
    t, rows, outputs = Training(c), c.size(), _big(c)
    index = t.known_gradient()
    c.input(rows, outputs, value=_gradient(c, rows, outputs))
    c.operands += [t.weight_scale(outputs), t.gradients]
    c.output(rows, outputs, dtype=DType.I8)
    c.finish(**{"from": index, "to": c.size(0, 3), "stream": _stream(c)})


@_case("G_ADD")
def _gradient_add(c: Case) -> None:
    t, count = Training(c), _big(c)
    a, b = t.known_gradient(), t.known_gradient()
    for _ in range(2):
        c.input(count, 3, value=_gradient(c, count, 3))
    c.operands.append(t.gradients)
    c.output(count, 3, dtype=DType.I8)
    c.finish(a=a, b=b, to=c.size(0, 3), stream=_stream(c))


@_case("G_BIAS")
def _gradient_bias(c: Case) -> None:
    t, rows, outputs = Training(c), c.size(), _big(c)
    index = t.known_gradient()
    c.input(rows, outputs, value=_gradient(c, rows, outputs))
    c.operands += [t.weight_scale(outputs), t.gradients]
    c.output(outputs, batched=False)
    c.finish(**{"from": index})


def _finish_delayed(c: Case, t: Training, index: int, **attrs: float) -> None:
    """Once, when the operation finds its scale by itself, or twice: the second run takes what the first proposed."""
    for _ in range(c.size(1, 2)):
        c.finish(**attrs, **{"from": index, "to": 3, "stream": _stream(c)})


@_case("G_LINEAR_INPUT")
def _gradient_linear_input(c: Case) -> None:
    t, rows, depth, columns = Training(c), c.draw(st.integers(1, 20)), _big(c), _big(c)
    index = t.known_gradient()
    c.input(rows, columns, value=_gradient(c, rows, columns))
    c.weight(columns, depth, value=_int8(c, columns, depth, batched=False))
    c.operands.append(t.gradients)
    c.output(rows, depth, dtype=DType.I8)
    _finish_delayed(c, t, index)


@_case("G_CONV2D_INPUT")
def _gradient_conv_input(c: Case) -> None:
    t, g = Training(c), Geometry(c)
    index = t.known_gradient()
    c.input(1, *g.out, g.outputs, value=_gradient(c, 1, *g.out, g.outputs))
    c.weight(*g.weight, value=_int8(c, *g.weight, batched=False))
    c.operands.append(t.gradients)
    c.output(1, *g.image, g.inputs, dtype=DType.I8)
    _finish_delayed(c, t, index, **g.attrs)


def _finish_update(c: Case, t: Training, index: int, residual: bool, elements: int, **attrs: float) -> None:
    c.operands += [t.scales, t.gradients]
    if residual:
        c.operands.append(c.builder.slot((elements,), DType.I8))
    decay = float(c.draw(st.sampled_from([0.0, 0.01])))
    for _ in range(2):  # the second time with a residual that is not zero
        c.finish(**attrs, **{"from": index, "entry": t.entry(), "weight_decay": decay, "stream": _stream(c)})


@_case("G_LINEAR_UPDATE")
def _linear_step(c: Case) -> None:
    t, rows, depth, columns = Training(c), c.draw(st.integers(1, 80)), _big(c), _big(c)
    index = t.known_gradient()
    weight = c.integers(-127, 127, columns, depth, dtype=np.int8)
    c.operands.append(c.builder.variable("w", weight))
    c.input(rows, columns, value=_gradient(c, rows, columns))
    c.input(rows, depth, value=_int8(c, rows, depth), **_zero_point(c))
    c.operands.append(t.weight_scale(columns))
    _finish_update(c, t, index, c.flag(), weight.size)


@_case("G_CONV2D_UPDATE")
def _conv_step(c: Case) -> None:
    t, g = Training(c), Geometry(c)
    index = t.known_gradient()
    weight = c.integers(-127, 127, *g.weight, dtype=np.int8)
    c.operands.append(c.builder.variable("w", weight))
    c.input(1, *g.out, g.outputs, value=_gradient(c, 1, *g.out, g.outputs))
    c.input(1, *g.image, g.inputs, value=_int8(c, 1, *g.image, g.inputs), **_zero_point(c))
    c.operands.append(t.weight_scale(g.outputs))
    _finish_update(c, t, index, c.flag(), weight.size, **g.attrs)


@_case("G_MAX_POOL2D")
def _gradient_max_pool(c: Case) -> None:
    kernel, channels = c.size(1, 3), c.draw(st.sampled_from([1, 3, 8, 17]))
    out, stride = (c.size(1, 4), c.size(1, 4)), kernel + c.size(0, 1)
    image = tuple(size * stride for size in out)
    c.input(1, *out, channels, value=_gradient(c, 1, *out, channels))
    places = c.integers(0, kernel * kernel - 1, *c.live((1, *out, channels), True), dtype=np.uint8)
    c.input(1, *out, channels, value=places)
    c.output(1, *image, channels, dtype=DType.I8)
    c.finish(kernel_h=kernel, kernel_w=kernel, stride_h=stride, stride_w=stride)
