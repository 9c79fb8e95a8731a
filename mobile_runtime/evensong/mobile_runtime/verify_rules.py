"""The rules of single operations: the interpreter of their signatures, and what letters cannot say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from evensong.mobile_runtime.signatures import Pattern, signature
from evensong.wire.program import (
    MAX_RANK,
    MOST_NGRAMS,
    OPS,
    Activation,
    DType,
    Interpolation,
    Op,
    Program,
    Split,
    Tensor,
)

LOSSES = frozenset({"CROSS_ENTROPY", "MSE", "BCE_WITH_LOGITS"})
OPTIMIZERS = frozenset({"SGD", "ADAM", "LINEAR_UPDATE", "G_LINEAR_UPDATE", "G_CONV2D_UPDATE"})

_DTYPES = {
    "f": (DType.F32,),
    "b": (DType.I8,),
    "u": (DType.U8,),
    "i": (DType.I32,),
    "j": (DType.U8, DType.I32),
    "v": (DType.F32, DType.U8),
    "x": tuple(DType),
}


class Size(NamedTuple):
    """What a letter of a signature stands for."""

    elements: int
    batched: bool


class OpView:
    """One operation with its tensors, its attributes by name and the sizes of its signature, bound as they are met."""

    def __init__(self, program: Program, op: Op) -> None:
        self.program = program
        self.op = op
        self.inputs = [program.tensors[operand] for operand in op.inputs]
        self.outputs = [program.tensors[operand] for operand in op.outputs]
        names = (attr.partition(":")[0] for attr in OPS[op.name].attrs)
        self.attrs = dict(zip(names, op.attrs, strict=True))
        self.sizes: dict[str, Size] = {}

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter].elements

    def batched(self, letter: str) -> bool:
        return self.sizes[letter].batched

    def integer(self, name: str) -> int:
        return int(self.attrs[name])

    def bind(self, letter: str, count: int, batched: bool) -> bool:
        return self.sizes.setdefault(letter, Size(count, batched)) == (count, batched)


# ------------------------------------------------------------------------------------------------- signatures


def match_operands(view: OpView) -> str | None:
    """What does not fit the operation's signature, or None."""
    rule = signature(view.op.name)
    inputs = rule.inputs * len(view.inputs) if OPS[view.op.name].variadic else rule.inputs
    pairs = [*zip(inputs, view.inputs, strict=False), *zip(rule.outputs, view.outputs, strict=False)]
    bind_elements = not OPS[view.op.name].variadic  # the parts of a concatenation have sizes of their own
    for pattern, tensor in pairs:
        if tensor.dtype not in _DTYPES[pattern.dtype]:
            return f"wrong dtype for {pattern.text!r}: {tensor.dtype.name}"
        if (bind_elements or pattern.product != "#") and not _matches(view, pattern, tensor):
            batched = " batched" if tensor.batched else ""
            return f"{list(tensor.dims)}{batched} does not match {pattern.text!r} of {rule_text(view.op)!r}"
    if len({tensor.dtype for pattern, tensor in pairs if pattern.dtype == "x"}) > 1:
        return "its dtypes differ"
    for kind, (name, value) in zip(rule.attrs, view.attrs.items(), strict=True):
        if not _ATTRIBUTES[kind](value):
            return f"attribute {name} is out of range: {value}"
    return None


def _matches(view: OpView, pattern: Pattern, tensor: Tensor) -> bool:
    """Whether the shape fits; binds the letters that were free."""
    dims, sizes = tensor.dims, pattern.sizes
    if pattern.product == "#":
        if sizes.isdecimal():
            return tensor.elements == int(sizes) and not tensor.batched
        return view.bind(sizes, tensor.elements, tensor.batched)
    if pattern.product == "*":
        leading = len(dims) + 1 - len(sizes)
        if leading < 0:
            return False
        if not view.bind(sizes[0], math.prod(dims[:leading]), tensor.batched and leading > 0):
            return False
        return all(
            view.bind(letter, dims[axis], tensor.batched and axis == 0)
            for axis, letter in enumerate(sizes[1:], start=leading)
        )
    return len(dims) == len(sizes) and all(
        view.bind(letter, dim, tensor.batched and axis == 0)
        for axis, (letter, dim) in enumerate(zip(sizes, dims, strict=True))
    )


_ATTRIBUTES: dict[str, Callable[[float], bool]] = {
    "s": lambda value: 1 <= value <= 32768,
    "p": lambda value: 0 <= value <= 32768,
    "n": lambda value: value >= 0,
    ".": lambda value: True,
    "b": lambda value: value in (0, 1),
    "q": lambda value: -128 <= value <= 127,
    "a": lambda value: Activation.NONE <= value <= Activation.RELU6,
    "k": lambda value: Activation.NONE < value <= Activation.RECIPROCAL,
    "f": math.isfinite,
}

# ------------------------------------------------------------------------------------------------- beyond letters

_MOST_COORDINATE = 1 << 30  # kernels compute coordinates in 32 bits
_MOST_DEPTH = 1 << 16  # products of two int8 that an int32 holds, and twice as many
_LEAST_SCALE = 2.0**-128  # float32 has no finite inverse of this and of less


def _coordinates_fit(inputs: int, outputs: int, reach: int, stride: int, padding: int) -> bool:
    """For ``outputs`` windows of ``reach`` inputs over ``inputs``."""
    return max(inputs, outputs, outputs * stride + reach + padding) < _MOST_COORDINATE


def _convolution(view: OpView) -> str | None:
    groups = view.integer("groups")
    if view["C"] != view["D"] * groups or view["O"] % groups:
        return "its groups do not divide its channels"
    for axis, (inputs, outputs, kernel) in {"h": ("H", "P", "K"), "w": ("W", "Q", "L")}.items():
        reach = view[kernel] * view.integer(f"dilation_{axis}")
        stride, pad = view.integer(f"stride_{axis}"), view.integer("pad_top" if axis == "h" else "pad_left")
        if view[kernel] > 32768 or not _coordinates_fit(view[inputs], view[outputs], reach, stride, pad):
            return "its window is too large"
    return None


def _matmul(view: OpView) -> str | None:
    transpose = view.integer("transpose")
    left, right = view["C"], view["D"]
    rows, depth = (right, left) if transpose == 1 else (left, right)
    left, right = view["E"], view["F"]
    other, columns = (right, left) if transpose == 2 else (left, right)
    if transpose > 2 or depth != other or (rows, columns) != (view["M"], view["N"]):
        return "its matrices do not fit"
    return "it goes over the batch" if any(map(view.batched, "CDEFMN")) else None


def _pool(view: OpView) -> str | None:
    for axis, (inputs, outputs) in {"h": ("H", "P"), "w": ("W", "Q")}.items():
        kernel, stride = view.integer(f"kernel_{axis}"), view.integer(f"stride_{axis}")
        pad = view.integer("pad_top" if axis == "h" else "pad_left")
        if not _coordinates_fit(view[inputs], view[outputs], kernel, stride, pad):
            return "its window is too large"
        if 2 * pad > kernel:
            return "its padding is more than half of its window"
        if (view[outputs] - 1) * stride - pad >= view[inputs]:
            return "its last window lies outside the input"
    return None


def _max_pool(view: OpView) -> str | None:
    index = view.inputs[1:] if view.op.name == "MAX_POOL2D_GRAD" else view.outputs[1:]
    small = view.integer("kernel_h") * view.integer("kernel_w") <= 256
    if any(tensor.dtype != (DType.U8 if small else DType.I32) for tensor in index):
        return "its index has the wrong dtype"
    return _pool(view)


def _row(view: OpView) -> str | None:
    """R is N itself, or a row that repeats within one example of N."""
    if view.sizes["N"] == view.sizes["R"]:
        return None
    example = view["N"] // view.program.max_batch if view.batched("N") else view["N"]
    if view.batched("R") or example % view["R"]:
        return "one operand is not a row of the other"
    return None


def _recurrent(view: OpView) -> str | None:
    parts = 3 if view.op.name.startswith("GRU") else 4
    return None if view["G"] == parts * view["H"] else f"its gates are not {parts} parts"


def _layer_norm(view: OpView) -> str | None:
    fits = view["N"] == view["R"] * view["G"] and view.batched("N") == view.batched("R") and not view.batched("G")
    return None if fits else "its rows do not fit gamma"


def _group_norm(view: OpView) -> str | None:
    return None if view["C"] % view["G"] == 0 else "its groups do not divide its channels"


def _reduce(view: OpView) -> str | None:
    axis, inner = view.integer("axis_size"), view.integer("inner_size")
    if not axis or not inner or view["R"] % inner or view["N"] != view["R"] * axis:
        return "its axis does not fit"
    if view.batched("N") != view.batched("R"):
        return "only one side is batched"
    if view.batched("N") and view["R"] // inner % view.program.max_batch:
        return "it reduces over the batch"
    return None


def _dropout(view: OpView) -> str | None:
    return None if 0 <= view.attrs["p"] < 1 else "its probability is not in [0, 1)"


def _mask(view: OpView) -> str | None:
    if view["B"] != -(-view["C"] // 8) or view.batched("B") or view.batched("C"):
        return "its mask has not one bit an element"
    if view.op.name == "ACTIVATION_MASK" and view.integer("kind") == Activation.NONE:
        return "its activation has no mask"
    return None


def _transpose(view: OpView) -> str | None:
    x, y = view.inputs[0], view.outputs[0]
    rank, perm = len(x.dims), [view.integer(f"perm{axis}") for axis in range(MAX_RANK)]
    if len(y.dims) != rank or x.batched != y.batched:
        return "its ranks differ"
    if sorted(perm[:rank]) != list(range(rank)) or any(place != -1 for place in perm[rank:]):
        return "its permutation is not one"
    if y.dims != tuple(x.dims[axis] for axis in perm[:rank]):
        return "its output has other dimensions"
    return "it moves the batch" if x.batched and perm[0] else None


def _differs_only_along(part: Tensor, whole: Tensor, axis: int) -> bool:
    if len(part.dims) != len(whole.dims) or part.batched != whole.batched:
        return False
    if axis >= len(whole.dims) or (axis == 0 and whole.batched):
        return False
    return all(p == w for i, (p, w) in enumerate(zip(part.dims, whole.dims, strict=True)) if i != axis)


def _concat(view: OpView) -> str | None:
    axis, y = view.integer("axis"), view.outputs[0]
    if not all(_differs_only_along(part, y, axis) for part in view.inputs):
        return "its parts do not fit"
    return None if sum(part.dims[axis] for part in view.inputs) == y.dims[axis] else "its parts do not add up"


def _slice(view: OpView) -> str | None:
    axis, start = view.integer("axis"), view.integer("start")
    part, whole = view.outputs[0], view.inputs[0]
    if view.op.name == "SLICE_GRAD":
        part, whole = whole, part
    if not _differs_only_along(part, whole, axis):
        return "its part does not fit"
    return None if start + part.dims[axis] <= whole.dims[axis] else "it reaches past the end"


def _quantized(view: OpView) -> str | None:
    for tensor in (*view.inputs, *view.outputs):
        if tensor.dtype != DType.I8:
            continue
        if not -128 <= tensor.zero_point <= 127:
            return "a zero point is not an int8"
        if view.op.name in ("QUANTIZE", "DEQUANTIZE") and not _LEAST_SCALE < tensor.scale < math.inf:
            return "a scale is not positive and finite, or its inverse is not"
    return None


def _quantized_linear(view: OpView) -> str | None:
    return "it adds up too many products for 32 bits" if view["I"] > _MOST_DEPTH else _quantized(view)


def _quantized_convolution(view: OpView) -> str | None:
    if view["K"] * view["L"] * view["D"] > _MOST_DEPTH:
        return "it adds up too many products for 32 bits"
    return _convolution(view) or _quantized(view)


def _quantized_pool(view: OpView) -> str | None:
    return _pool(view) or _quantized(view)


def _lookup(view: OpView) -> str | None:
    if len(view.inputs) > 1 and view["T"] != 2:
        return "its table has not two columns"
    bins = view.integer("bins")
    return None if bins and view.integer("first") + bins <= 1 << 31 else "its bins are no ids"


def _tokenize(view: OpView) -> str | None:
    fits = view.integer("split") <= Split.CHARACTERS and 1 <= view.integer("ngrams") <= MOST_NGRAMS
    return None if fits else "it splits in an unknown way"


def _resize(view: OpView) -> str | None:
    return None if view.integer("mode") <= Interpolation.BILINEAR else "its mode is unknown"


def _crop(view: OpView) -> str | None:
    fits = all(
        view[part] <= view[whole] + 2 * view.integer(pad)
        for part, whole, pad in (("P", "H", "pad_h"), ("Q", "W", "pad_w"))
    )
    return None if fits else "its window is larger than the image"


def _byte_table(view: OpView) -> str | None:
    return None if view["T"] == 256 else "its table has not 256 columns"


_TABLES = {"T": 1, "S": 2}  # entries of an index into scales and peaks, and into grads


def _indices(**letters: str) -> Callable[[OpView], str | None]:
    """Attributes that index the table of scales (T) or of gradients (S)."""

    def check(view: OpView) -> str | None:
        for name, letter in letters.items():
            if view.integer(name.rstrip("_")) >= view[letter] // _TABLES[letter]:
                return "an index lies outside its table"
        return None

    return check


def _all(*checks: Callable[[OpView], str | None]) -> Callable[[OpView], str | None]:
    return lambda view: next((wrong for check in checks if (wrong := check(view))), None)


def _zero_points(view: OpView) -> str | None:
    for tensor in (*view.inputs, *view.outputs):
        if tensor.dtype == DType.I8 and not -128 <= tensor.zero_point <= 127:
            return "a zero point is not an int8"
    return None


def _prepare(view: OpView) -> str | None:
    return "it adds up too many products for 32 bits" if view["I"] > _MOST_DEPTH else None


def _observe(view: OpView) -> str | None:
    return None if view.integer("limit") in (127, 255) else "its limit is neither 127 nor 255"


def _summed(count: Callable[[OpView], int]) -> Callable[[OpView], str | None]:
    return lambda view: "it adds up too many products for 32 bits" if count(view) > _MOST_DEPTH else None


def _residual(view: OpView) -> str | None:
    weight = view.inputs[0]
    return None if len(view.inputs) < 7 or view["R"] == weight.elements else "its residual does not fit the weight"


def _apart(view: OpView) -> str | None:
    apart = all(view.integer(f"stride_{axis}") >= view.integer(f"kernel_{axis}") for axis in "hw")
    return None if apart else "its windows overlap"


def _first_maxima(view: OpView) -> str | None:
    small = view.integer("kernel_h") * view.integer("kernel_w") <= 256
    index = view.inputs[1:] if view.op.name == "G_MAX_POOL2D" else view.outputs[1:]
    return (
        "its index has the wrong dtype" if any(t.dtype != (DType.U8 if small else DType.I32) for t in index) else None
    )


RULES: dict[str, Callable[[OpView], str | None]] = {
    "CONV2D": _convolution,
    "CONV2D_GRAD_INPUT": _convolution,
    "CONV2D_GRAD_WEIGHT": _convolution,
    "MATMUL": _matmul,
    "MAX_POOL2D": _max_pool,
    "MAX_POOL2D_GRAD": _max_pool,
    "AVG_POOL2D": _pool,
    "AVG_POOL2D_GRAD": _pool,
    **dict.fromkeys(("GRU", "GRU_GRAD", "LSTM", "LSTM_GRAD"), _recurrent),
    "LAYER_NORM": _layer_norm,
    "LAYER_NORM_GRAD": _layer_norm,
    "GROUP_NORM": _group_norm,
    "GROUP_NORM_GRAD": _group_norm,
    "RMS_NORM": _layer_norm,
    "RMS_NORM_GRAD": _layer_norm,
    "ADD": _row,
    "SUB": _row,
    "MUL": _row,
    "MAXIMUM": _row,
    "MINIMUM": _row,
    "STEP": _row,
    "SUM_ROWS": _row,
    "REDUCE_MEAN": _reduce,
    "REDUCE_MEAN_GRAD": _reduce,
    "DROPOUT": _dropout,
    "DROPOUT_GRAD": _dropout,
    "ACTIVATION_MASK": _mask,
    "MASK_GRAD": _mask,
    "TRANSPOSE": _transpose,
    "CONCAT": _concat,
    "SLICE": _slice,
    "SLICE_GRAD": _slice,
    "QUANTIZE": _quantized,
    "DEQUANTIZE": _quantized,
    "QLINEAR": _quantized_linear,
    "QCONV2D": _quantized_convolution,
    "QADD": _quantized,
    "QMAX_POOL2D": _all(_first_maxima, _quantized_pool),
    "QAVG_POOL2D": _quantized_pool,
    "Q_PREPARE": _all(_indices(x="T", y="T"), _prepare),
    "Q_OBSERVE": _all(_indices(index="T"), _zero_points, _observe),
    "Q_QUANTIZE": _all(_indices(index="T"), _zero_points),
    "Q_DEQUANTIZE": _all(_indices(index="T"), _zero_points),
    "Q_ADD": _all(_indices(a="T", b="T", y="T"), _zero_points),
    "G_QUANTIZE": _indices(index="S"),
    "G_DEQUANTIZE": _indices(index="S"),
    "G_SCALE": _all(_indices(from_="S", to="S"), _row),
    "G_ADD": _indices(a="S", b="S", to="S"),
    "G_BIAS": _all(_indices(from_="S"), _summed(lambda view: view["M"])),
    "G_LINEAR_INPUT": _all(_indices(from_="S", to="S"), _summed(lambda view: view["O"])),
    "G_CONV2D_INPUT": _all(
        _indices(from_="S", to="S"), _summed(lambda view: view["O"] * view["K"] * view["L"]), _convolution
    ),
    "G_LINEAR_UPDATE": _all(_indices(from_="S", entry="T"), _zero_points, _summed(lambda view: view["M"]), _residual),
    "G_CONV2D_UPDATE": _all(
        _indices(from_="S", entry="T"),
        _zero_points,
        _summed(lambda view: view["N"] * view["P"] * view["Q"]),
        _residual,
        _convolution,
    ),
    "G_MAX_POOL2D": _all(_first_maxima, _apart, _pool),
    "LOOKUP": _lookup,
    "TOKENIZE": _tokenize,
    "RESIZE2D": _resize,
    "RESIZE2D_GRAD": _resize,
    "CROP2D": _crop,
    "QLUT_U8": _byte_table,
}

# ------------------------------------------------------------------------------------------------- amount of work

_PRODUCTS = {
    **dict.fromkeys(("LINEAR", "LINEAR_GRAD_INPUT", "LINEAR_GRAD_WEIGHT", "LINEAR_UPDATE", "QLINEAR"), "MIO"),
    **dict.fromkeys(("CONV2D", "CONV2D_GRAD_INPUT", "CONV2D_GRAD_WEIGHT", "QCONV2D"), "NPQOKLD"),
    **dict.fromkeys(("G_LINEAR_INPUT", "G_LINEAR_UPDATE"), "MIO"),
    **dict.fromkeys(("G_CONV2D_INPUT", "G_CONV2D_UPDATE"), "NPQOKLD"),
    **dict.fromkeys(("GRU", "GRU_GRAD", "LSTM", "LSTM_GRAD"), "NTGH"),
    "MATMUL": "BCDN",
    **dict.fromkeys(("ATTENTION", "ATTENTION_GRAD"), "NTSHD"),
}
_WINDOWS = ("MAX_POOL2D", "AVG_POOL2D", "AVG_POOL2D_GRAD", "QMAX_POOL2D", "QAVG_POOL2D")


def amount_of_work(view: OpView) -> int:
    """Multiply-adds of matrix products, places of pooling windows, else 1 + elements of all operands."""
    if letters := _PRODUCTS.get(view.op.name):
        return math.prod(view[letter] for letter in letters)
    if view.op.name in _WINDOWS:
        return math.prod(view[letter] for letter in "NPQC") * view.integer("kernel_h") * view.integer("kernel_w")
    return 1 + sum(tensor.elements for tensor in (*view.inputs, *view.outputs))


def rule_text(op: Op) -> str:
    """The signature as it stands in the documentation."""
    rule = signature(op.name)
    sides = (" ".join(pattern.text for pattern in side) for side in (rule.inputs, rule.outputs))
    return " > ".join(sides)
