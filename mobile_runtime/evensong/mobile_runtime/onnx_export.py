"""The ``predict`` program of a session as an ONNX model, with the weights that it has now.

Float32 results agree to rounding. Int8 parts become QuantizeLinear / DequantizeLinear pairs, which ONNX Runtime fuses
into its own integer kernels: their results may differ by one step of the grid.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime import onnx_input, onnx_sequence
from evensong.mobile_runtime.errors import ProgramError
from evensong.mobile_runtime.session import Session
from evensong.wire.program import OPS, Activation, DType, Op, Program, Region, Tensor

OPSET = 20
_IR_VERSION = 9

Array = npt.NDArray[Any]


def to_onnx(session: Session, path: str | os.PathLike[str] | None = None) -> bytes:
    """The model that ``session.predict`` runs, as the bytes of an ONNX file; also written to ``path`` if given.

    Inputs and output have the shapes of the artifact with a free first axis ``n``. Needs the package ``onnx``.

    Raises :class:`ImportError` without it, :class:`ProgramError` for an operation that has no form in ONNX here.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError('ONNX export needs the package onnx: pip install "onnx>=1.16"') from None
    exporter = Exporter(session)
    for op in exporter.program.ops:
        _emit(exporter, op)
    model = exporter.model()
    onnx.checker.check_model(model, full_check=True)
    data = bytes(model.SerializeToString())
    if path is not None:
        Path(path).write_bytes(data)
    return data


class Exporter:
    """The graph being made. Values are known by where they lie in memory, as the engine knows them."""

    def __init__(self, session: Session) -> None:
        from onnx import helper

        self._helper = helper
        artifact = session.artifact
        self.artifact = artifact
        self.program: Program = artifact.program("predict")
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._state = _state(session)
        self._known: dict[tuple[Region, int], str] = {}
        self._count = 0
        for port in self.program.inputs:
            tensor = self.program.tensors[port.tensor]
            self._known[tensor.region, tensor.offset] = port.name

    # --- values

    def array(self, index: int) -> Array | None:
        """The content of a persistent tensor, None for any other."""
        tensor = self.program.tensors[index]
        memory = {Region.CONST: self.artifact.const, Region.STATE: self._state}.get(tensor.region)
        if memory is None:
            return None
        return np.frombuffer(memory, tensor.dtype.numpy, tensor.elements, tensor.offset).reshape(tensor.dims)

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        """An initializer."""
        from onnx import numpy_helper

        array = np.array(value, dtype)
        name = self._fresh("c")
        self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def read(self, index: int, shape: Sequence[int] | None = None) -> str:
        """An operand, under ``shape`` (its own dimensions by default; the first of a batched one is free)."""
        tensor = self.program.tensors[index]
        array = self.array(index)
        if array is not None:
            return self.constant(array if shape is None else array.reshape(shape), array.dtype)
        return self.reshaped(self._known[tensor.region, tensor.offset], shape or self.dims(index))

    def dims(self, index: int) -> list[int]:
        """Dimensions for a Reshape."""
        tensor = self.program.tensors[index]
        return [-1, *tensor.dims[1:]] if tensor.batched else list(tensor.dims)

    def write(self, index: int, value: str) -> None:
        """The result of an operation, whatever its shape is here."""
        tensor = self.program.tensors[index]
        self._known[tensor.region, tensor.offset] = value

    # --- nodes

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one result."""
        name = self._fresh(kind.lower())
        self._nodes.append(self._helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def reshaped(self, value: str, shape: Sequence[int]) -> str:
        return self.node("Reshape", value, self.constant(list(shape), np.int64))

    def model(self) -> Any:
        """The finished ModelProto."""
        helper = self._helper
        for port in self.program.outputs:
            last = self.reshaped(self._known[Region.OUTPUT, 0], self.dims(port.tensor))
            self._nodes.append(helper.make_node("Identity", [last], [port.name]))
        graph = helper.make_graph(
            self._nodes,
            str(self.artifact.manifest.get("name", "model")),
            [self._port(port.name, port.tensor) for port in self.program.inputs],
            [self._port(port.name, port.tensor) for port in self.program.outputs],
            list(self._initializers.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="evensong")
        model.ir_version = _IR_VERSION
        return model

    def _port(self, name: str, index: int) -> Any:
        from onnx import TensorProto

        tensor = self.program.tensors[index]
        kinds = {DType.F32: "FLOAT", DType.I8: "INT8", DType.U8: "UINT8", DType.I32: "INT32"}
        rows = tensor.dims[0] // self.program.max_batch
        first: str | int = "n" if rows == 1 else f"{rows}n"
        shape = [first, *tensor.dims[1:]] if tensor.batched else list(tensor.dims)
        return self._helper.make_tensor_value_info(name, getattr(TensorProto, kinds[tensor.dtype]), shape)

    def _fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"


def _state(session: Session) -> bytes:
    """The STATE region as it is now."""
    variables = {variable.name: variable for variable in session.artifact.variables}
    memory = bytearray(session.artifact.state)
    for name, value in session.get().items():
        variable = variables[name]
        stored = np.empty(variable.dims, variable.dtype.numpy)
        stored.transpose(variable.perm)[...] = value
        memory[variable.offset : variable.offset + variable.nbytes] = stored.tobytes()
    return bytes(memory)


def _emit(g: Exporter, op: Op) -> None:
    rule = _RULES.get(op.name)
    if rule is None:
        raise ProgramError(f"{op.name} has no form in ONNX here", expected=sorted(_RULES), got=op.name)
    names = (attr.partition(":")[0] for attr in OPS[op.name].attrs)
    rule(g, op, dict(zip(names, op.attrs, strict=True)))


Attributes = Mapping[str, Any]
Rule = Callable[[Exporter, Op, Attributes], None]

# ------------------------------------------------------------------------------------------------------------- float32


def _linear(g: Exporter, op: Op, a: Attributes) -> None:
    x, w, *b = op.inputs
    depth = g.program.tensors[w].dims[1]
    inputs = [g.read(x, [-1, depth]), g.read(w), *map(g.read, b)]
    g.write(op.outputs[0], _activated(g, g.node("Gemm", *inputs, transB=1), a["activation"]))


def _conv2d(g: Exporter, op: Op, a: Attributes) -> None:
    x, w, *b = op.inputs
    weight = _array(g, w).transpose(0, 3, 1, 2)
    operands = [g.constant(weight), *map(g.read, b)]
    y = _convolution(g, _channels_first(g, g.read(x)), op, a, operands, weight.shape[2:])
    g.write(op.outputs[0], _channels_last(g, _activated(g, y, a["activation"])))


def _convolution(
    g: Exporter, image: str, op: Op, a: Attributes, operands: Sequence[str], kernel: tuple[int, ...]
) -> str:
    stride, dilation = (a["stride_h"], a["stride_w"]), (a["dilation_h"], a["dilation_w"])
    image, pads = _padded(g, image, op, kernel, stride, dilation, a)
    return g.node(
        "Conv",
        image,
        *operands,
        strides=stride,
        dilations=dilation,
        group=a["groups"],
        pads=pads,
        kernel_shape=kernel,
    )


def _max_pool(g: Exporter, op: Op, a: Attributes) -> None:
    y = _pool(g, "MaxPool", _channels_first(g, g.read(op.inputs[0])), op, a)
    g.write(op.outputs[0], _channels_last(g, y))


def _avg_pool(g: Exporter, op: Op, a: Attributes) -> None:
    image = _channels_first(g, g.read(op.inputs[0]))
    y = _pool(g, "AveragePool", image, op, a, count_include_pad=a["count_include_pad"])
    g.write(op.outputs[0], _channels_last(g, y))


def _pool(g: Exporter, kind: str, image: str, op: Op, a: Attributes, **more: int) -> str:
    kernel, stride = (a["kernel_h"], a["kernel_w"]), (a["stride_h"], a["stride_w"])
    image, pads = _padded(g, image, op, kernel, stride, (1, 1), a)
    return g.node(kind, image, kernel_shape=kernel, strides=stride, pads=pads, **more)


def _batch_norm_eval(g: Exporter, op: Op, a: Attributes) -> None:
    gamma, beta, mean, var = (_array(g, index).astype(np.float64) for index in op.inputs[1:])
    factor = gamma / np.sqrt(var + a["eps"])
    x = g.read(op.inputs[0], [-1, len(factor)])
    scaled = g.node("Mul", x, g.constant(factor))
    g.write(op.outputs[0], g.node("Add", scaled, g.constant(beta - mean * factor)))


def _layer_norm(g: Exporter, op: Op, a: Attributes) -> None:
    x, gamma, beta = op.inputs
    size = g.program.tensors[gamma].elements
    inputs = [g.read(x, [-1, size]), g.read(gamma, [size]), g.read(beta, [size])]
    g.write(op.outputs[0], g.node("LayerNormalization", *inputs, epsilon=a["eps"], axis=-1))


def _conv2d_transposed(g: Exporter, op: Op, a: Attributes) -> None:
    weight = _array(g, op.inputs[1]).transpose(0, 3, 1, 2)
    kernel, stride, dilation = weight.shape[2:], (a["stride_h"], a["stride_w"]), (a["dilation_h"], a["dilation_w"])
    image, before = _channels_first(g, g.read(op.inputs[0])), (a["pad_top"], a["pad_left"])
    inputs, outputs = (g.program.tensors[index].dims[1:3] for index in (op.inputs[0], op.outputs[0]))
    full = [(inputs[i] - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1 for i in (0, 1)]
    # What is missing at the end is output_padding where the stride allows it; more than that is never written.
    after = [full[i] - before[i] - outputs[i] for i in (0, 1)]
    image = g.node(
        "ConvTranspose",
        image,
        g.constant(weight),
        strides=stride,
        dilations=dilation,
        group=a["groups"],
        kernel_shape=kernel,
        pads=[*before, *(max(end, 0) for end in after)],
        output_padding=[max(-end, 0) for end in after],
    )
    g.write(op.outputs[0], _channels_last(g, image))


def _group_norm(g: Exporter, op: Op, a: Attributes) -> None:
    """As an instance norm of ``[n, groups, rows * channels of a group]``, then gamma and beta."""
    x, gamma, beta = op.inputs
    _, length, channels = g.program.tensors[x].dims
    groups = g.program.tensors[op.outputs[1]].dims[1]
    split = g.node("Transpose", g.read(x, [-1, length, groups, channels // groups]), perm=[0, 2, 1, 3])
    one, zero = g.constant(np.ones(groups)), g.constant(np.zeros(groups))
    flat = g.reshaped(split, [-1, groups, length * channels // groups])
    normal = g.node("InstanceNormalization", flat, one, zero, epsilon=a["eps"])
    back = g.node("Transpose", g.reshaped(normal, [-1, groups, length, channels // groups]), perm=[0, 2, 1, 3])
    scaled = g.node("Mul", g.reshaped(back, [-1, channels]), g.read(gamma))
    g.write(op.outputs[0], g.node("Add", scaled, g.read(beta)))


def _rms_norm(g: Exporter, op: Op, a: Attributes) -> None:
    x, gamma = op.inputs
    size = g.program.tensors[gamma].elements
    rows = g.read(x, [-1, size])
    squares = g.node("ReduceMean", g.node("Mul", rows, rows), g.constant([1], np.int64))
    root = g.node("Sqrt", g.node("Add", squares, g.constant(a["eps"])))
    g.write(op.outputs[0], g.node("Mul", g.node("Div", rows, root), g.read(gamma, [size])))


def _step(g: Exporter, op: Op, a: Attributes) -> None:
    """``at_equal (a >= b) + (1 - at_equal) (a > b)``."""
    from onnx import TensorProto

    size = g.program.tensors[op.inputs[1]].elements
    operands = g.read(op.inputs[0], [-1, size]), g.read(op.inputs[1], [-1, size])
    parts = []
    for kind, factor in (("GreaterOrEqual", a["at_equal"]), ("Greater", 1 - a["at_equal"])):
        truth = g.node("Cast", g.node(kind, *operands), to=TensorProto.FLOAT)
        parts.append(g.node("Mul", truth, g.constant(factor)))
    g.write(op.outputs[0], g.node("Add", *parts))


def _unary(g: Exporter, op: Op, a: Attributes) -> None:
    g.write(op.outputs[0], _activated(g, g.read(op.inputs[0]), a["kind"]))


def _binary(kind: str) -> Rule:
    def emit(g: Exporter, op: Op, a: Attributes) -> None:
        left, right = (g.program.tensors[index] for index in op.inputs)
        if right.batched == left.batched and right.elements == left.elements:
            operands = [g.read(op.inputs[0]), g.read(op.inputs[1], g.dims(op.inputs[0]))]
        else:
            operands = [g.read(op.inputs[0], [-1, right.elements]), g.read(op.inputs[1], [1, right.elements])]
        g.write(op.outputs[0], g.node(kind, *operands))

    return emit


def _scale(g: Exporter, op: Op, a: Attributes) -> None:
    y = g.node("Mul", g.read(op.inputs[0]), g.constant(a["alpha"]))
    g.write(op.outputs[0], g.node("Add", y, g.constant(a["beta"])) if a["beta"] else y)


def _reduce_mean(g: Exporter, op: Op, a: Attributes) -> None:
    x = g.read(op.inputs[0], [-1, a["axis_size"], a["inner_size"]])
    g.write(op.outputs[0], g.node("ReduceMean", x, g.constant([1], np.int64), keepdims=0))


def _spread(g: Exporter, op: Op, a: Attributes) -> None:
    x = g.node("Div", g.read(op.inputs[0], [-1, 1, a["inner_size"]]), g.constant(float(a["axis_size"])))
    g.write(op.outputs[0], g.node("Tile", x, g.constant([1, a["axis_size"], 1], np.int64)))


def _softmax(kind: str) -> Rule:
    return lambda g, op, a: g.write(op.outputs[0], g.node(kind, g.read(op.inputs[0]), axis=-1))


# ------------------------------------------------------------------------------------------------------------ movement


def _fill(g: Exporter, op: Op, a: Attributes) -> None:
    """As many rows as the first input has examples."""
    first, *rest = g.program.tensors[op.outputs[0]].dims
    examples = g.node("Shape", g.program.inputs[0].name, end=1)
    rows = g.node("Mul", examples, g.constant([first // g.program.max_batch], np.int64))
    shape = g.node("Concat", rows, g.constant(rest, np.int64), axis=0)
    g.write(op.outputs[0], g.node("Expand", g.constant(a["value"]), shape))


def _transpose(g: Exporter, op: Op, a: Attributes) -> None:
    perm = [axis for axis in a.values() if axis >= 0]
    g.write(op.outputs[0], g.node("Transpose", g.read(op.inputs[0]), perm=perm))


def _concat(g: Exporter, op: Op, a: Attributes) -> None:
    g.write(op.outputs[0], g.node("Concat", *map(g.read, op.inputs), axis=a["axis"]))


def _slice(g: Exporter, op: Op, a: Attributes) -> None:
    size = g.program.tensors[op.outputs[0]].dims[a["axis"]]
    bounds = [g.constant([value], np.int64) for value in (a["start"], a["start"] + size, a["axis"])]
    g.write(op.outputs[0], g.node("Slice", g.read(op.inputs[0]), *bounds))


def _widen(g: Exporter, op: Op, a: Attributes) -> None:
    part, whole = g.program.tensors[op.inputs[0]], g.program.tensors[op.outputs[0]]
    before = [0] * len(whole.dims)
    after = list(before)
    before[a["axis"]] = a["start"]
    after[a["axis"]] = whole.dims[a["axis"]] - part.dims[a["axis"]] - a["start"]
    g.write(op.outputs[0], g.node("Pad", g.read(op.inputs[0]), g.constant([*before, *after], np.int64)))


def _copy(g: Exporter, op: Op, a: Attributes) -> None:
    g.write(op.outputs[0], g.node("Identity", g.read(op.inputs[0], g.dims(op.outputs[0]))))


def _embedding(g: Exporter, op: Op, a: Attributes) -> None:
    ids, table = op.inputs
    g.write(op.outputs[0], g.node("Gather", g.read(table), g.read(ids, [-1]), axis=0))


# ---------------------------------------------------------------------------------------------------------------- int8


def _quantize(g: Exporter, op: Op, a: Attributes) -> None:
    g.write(op.outputs[0], _to_int8(g, g.read(op.inputs[0]), g.program.tensors[op.outputs[0]]))


def _dequantize(g: Exporter, op: Op, a: Attributes) -> None:
    g.write(op.outputs[0], _to_float(g, g.read(op.inputs[0]), g.program.tensors[op.inputs[0]]))


def _quantized_layer(g: Exporter, op: Op, a: Attributes) -> None:
    x, w, bias, multiplier = op.inputs
    source, result = g.program.tensors[x], g.program.tensors[op.outputs[0]]
    weight = _array(g, w)
    step = _array(g, multiplier).astype(np.float64) * result.scale  # of one unit of the sum
    scale = g.constant(step / source.scale)
    sums = weight.reshape(len(weight), -1).sum(axis=1, dtype=np.int64)
    offset = _array(g, bias).astype(np.int64) + source.zero_point * sums
    float_bias = g.constant(offset * step)
    if op.name == "QLINEAR":
        stored = g.constant(weight, np.int8)
        real = g.node("DequantizeLinear", stored, scale, g.constant(np.zeros(len(weight)), np.int8), axis=0)
        operand = _to_float(g, g.read(x, [-1, weight.shape[1]]), source)
        y = g.node("Gemm", operand, real, float_bias, transB=1)
    else:
        stored = g.constant(weight.transpose(0, 3, 1, 2), np.int8)
        real = g.node("DequantizeLinear", stored, scale, g.constant(np.zeros(len(weight)), np.int8), axis=0)
        image = _to_float(g, _channels_first(g, g.read(x)), source)
        y = _convolution(g, image, op, a, [real, float_bias], weight.shape[1:3])
        y = _channels_last(g, y)
    g.write(op.outputs[0], _to_int8(g, y, result, a["lo"], a["hi"]))


def _quantized_add(g: Exporter, op: Op, a: Attributes) -> None:
    result = g.program.tensors[op.outputs[0]]
    parts = []
    for index, name in zip(op.inputs, ("scale_a", "scale_b"), strict=True):
        tensor = g.program.tensors[index]
        real = _dequantized(g, g.read(index, [-1]), a[name] * result.scale, tensor.zero_point)
        parts.append(real)
    g.write(op.outputs[0], _to_int8(g, g.node("Add", *parts), result, a["lo"], a["hi"]))


def _quantized_max_pool(g: Exporter, op: Op, a: Attributes) -> None:
    x, y = g.program.tensors[op.inputs[0]], g.program.tensors[op.outputs[0]]
    image = _to_float(g, _channels_first(g, g.read(op.inputs[0])), x)
    g.write(op.outputs[0], _to_int8(g, _channels_last(g, _pool(g, "MaxPool", image, op, a)), y))


def _quantized_avg_pool(g: Exporter, op: Op, a: Attributes) -> None:
    x, y = g.program.tensors[op.inputs[0]], g.program.tensors[op.outputs[0]]
    image = _to_float(g, _channels_first(g, g.read(op.inputs[0])), x)
    pooled = _pool(g, "AveragePool", image, op, a, count_include_pad=a["count_include_pad"])
    g.write(op.outputs[0], _to_int8(g, _channels_last(g, pooled), y))


def _table(g: Exporter, op: Op, a: Attributes) -> None:
    from onnx import TensorProto

    index = g.node("Cast", g.read(op.inputs[0]), to=TensorProto.INT32)
    place = g.node("Add", index, g.constant(128, np.int32))
    g.write(op.outputs[0], g.node("Gather", g.read(op.inputs[1]), place, axis=0))


def _to_int8(g: Exporter, real: str, tensor: Tensor, lo: int = -128, hi: int = 127) -> str:
    if (lo, hi) != (-128, 127):
        bounds = [g.constant((bound - tensor.zero_point) * tensor.scale) for bound in (lo, hi)]
        real = g.node("Clip", real, *bounds)
    return g.node("QuantizeLinear", real, g.constant(tensor.scale), g.constant(tensor.zero_point, np.int8))


def _to_float(g: Exporter, stored: str, tensor: Tensor) -> str:
    return _dequantized(g, stored, tensor.scale, tensor.zero_point)


def _dequantized(g: Exporter, stored: str, scale: float, zero_point: int) -> str:
    return g.node("DequantizeLinear", stored, g.constant(scale), g.constant(zero_point, np.int8))


# ------------------------------------------------------------------------------------------------------------- helpers


def _activated(g: Exporter, y: str, kind: int) -> str:
    match Activation(kind):
        case Activation.NONE:
            return y
        case Activation.RELU6:
            return g.node("Clip", y, g.constant(0.0), g.constant(6.0))
        case Activation.GELU:
            return g.node("Gelu", y)
        case Activation.GELU_TANH:
            return g.node("Gelu", y, approximate="tanh")
        case Activation.SILU:
            return g.node("Mul", y, g.node("Sigmoid", y))
        case other:
            names = {Activation.HARDSWISH: "HardSwish"}
            return g.node(names.get(other, other.name.capitalize()), y)


def _array(g: Exporter, index: int) -> Array:
    array = g.array(index)
    if array is None:
        raise ProgramError("a weight that is computed in the program has no form in ONNX here")
    return array


def _channels_first(g: Exporter, image: str) -> str:
    return g.node("Transpose", image, perm=[0, 3, 1, 2])


def _channels_last(g: Exporter, image: str) -> str:
    return g.node("Transpose", image, perm=[0, 2, 3, 1])


def _padded(
    g: Exporter,
    image: str,
    op: Op,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    a: Attributes,
) -> tuple[str, list[int]]:
    """``image`` without the rows and columns at its end that no window reaches, and the pads around it."""
    inputs, outputs = g.program.tensors[op.inputs[0]].dims, g.program.tensors[op.outputs[0]].dims
    before = [a["pad_top"], a["pad_left"]]
    after = []
    for axis in (0, 1):
        reach = (outputs[1 + axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1
        missing = reach - inputs[1 + axis] - before[axis]
        if missing < 0:
            bounds = [g.constant([value], np.int64) for value in (0, inputs[1 + axis] + missing, 2 + axis)]
            image = g.node("Slice", image, *bounds)
        after.append(max(missing, 0))
    return image, [*before, *after]


_RULES: Mapping[str, Rule] = {
    "LINEAR": _linear,
    "CONV2D": _conv2d,
    "MAX_POOL2D": _max_pool,
    "AVG_POOL2D": _avg_pool,
    "BATCH_NORM_EVAL": _batch_norm_eval,
    "LAYER_NORM": _layer_norm,
    "GROUP_NORM": _group_norm,
    "RMS_NORM": _rms_norm,
    "CONV2D_GRAD_INPUT": _conv2d_transposed,
    "UNARY": _unary,
    "ADD": _binary("Add"),
    "SUB": _binary("Sub"),
    "MUL": _binary("Mul"),
    "MAXIMUM": _binary("Max"),
    "MINIMUM": _binary("Min"),
    "STEP": _step,
    "SCALE": _scale,
    "REDUCE_MEAN": _reduce_mean,
    "REDUCE_MEAN_GRAD": _spread,
    "FILL": _fill,
    "TRANSPOSE": _transpose,
    "CONCAT": _concat,
    "SLICE": _slice,
    "SLICE_GRAD": _widen,
    "COPY": _copy,
    "EMBEDDING": _embedding,
    "SOFTMAX": _softmax("Softmax"),
    "LOG_SOFTMAX": _softmax("LogSoftmax"),
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    "QLINEAR": _quantized_layer,
    "QCONV2D": _quantized_layer,
    "QADD": _quantized_add,
    "QMAX_POOL2D": _quantized_max_pool,
    "QAVG_POOL2D": _quantized_avg_pool,
    "QLUT": _table,
    **onnx_input.RULES,
    **onnx_sequence.RULES,
}
