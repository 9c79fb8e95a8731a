"""The training program: what an artifact holds, as plain data.

A program is a flat list of kernel calls over tensors whose place in memory was decided ahead of time. This module is the
single source of the operation set: the compiler emits it, the NumPy twin and the C++ engine run it, and
``mobile_runtime/engine/src/opcodes.h`` is generated from :data:`OPS`. ``docs/artifact.md`` gives the byte format.

Conventions
-----------
- Image-like tensors are channels-last: ``[N, H, W, C]``; a 1-D signal is ``[N, 1, L, C]``. A convolution weight is
  ``[O, KH, KW, I / groups]``, a linear weight ``[O, I]``.
- A tensor with ``batched`` set has ``dims[0] = max_batch * rows_per_example``. When a program runs with ``b <= max_batch``
  examples, only the first ``dims[0] * b / max_batch`` rows exist. Offsets never change. Losses are means over the live rows.
- Offsets are in bytes and multiples of 64 within CONST, STATE, SLOTS and ARENA. For INPUT and OUTPUT the offset is the port's index.
- Every tensor is dense and row-major.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

ALIGNMENT = 64
MAX_RANK = 6


class DType(enum.IntEnum):
    """Element types; the value is the byte in the file."""

    F32 = 1
    I8 = 2
    U8 = 3
    I32 = 4

    @property
    def itemsize(self) -> int:
        return {DType.F32: 4, DType.I8: 1, DType.U8: 1, DType.I32: 4}[self]

    @property
    def numpy(self) -> str:
        """The NumPy dtype string, little-endian."""
        return {DType.F32: "<f4", DType.I8: "|i1", DType.U8: "|u1", DType.I32: "<i4"}[self]


class Region(enum.IntEnum):
    """Where a tensor lives."""

    CONST = 0  #: read-only, inside the artifact: frozen weights, quantisation tables
    STATE = 1  #: persistent and mutable, initial value in the artifact: trainable tensors, running statistics
    SLOTS = 2  #: persistent and mutable, zero at first: optimiser state
    ARENA = 3  #: scratch of one program run
    INPUT = 4  #: the host's buffer for input port ``offset``
    OUTPUT = 5  #: the host's buffer for output port ``offset``


class Activation(enum.IntEnum):
    """Fused into LINEAR and CONV2D (``NONE``, ``RELU``, ``RELU6`` only), or the kind of UNARY."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    HARDSWISH = 3
    GELU = 4  # x * Phi(x), with erf
    GELU_TANH = 5
    SIGMOID = 6
    TANH = 7
    SILU = 8
    EXP = 9
    LOG = 10  # -inf at 0, NaN below
    SQRT = 11
    RECIPROCAL = 12

    @property
    def gradient_reads_output(self) -> bool:
        """Whether UNARY_GRAD takes the forward output (else the forward input) as its second operand."""
        return self not in (
            Activation.HARDSWISH,
            Activation.GELU,
            Activation.GELU_TANH,
            Activation.SILU,
            Activation.LOG,
        )


class Split(enum.IntEnum):
    """How TOKENIZE cuts a text into tokens."""

    NONE = 0  #: the whole text is one token
    WHITESPACE = 1
    CHARACTERS = 2  #: every code point is one


MOST_NGRAMS = 4  #: tokens that TOKENIZE joins into one at most


class Interpolation(enum.IntEnum):
    """How RESIZE2D finds a pixel."""

    NEAREST = 0
    NEAREST_EXACT = 1
    BILINEAR = 2


@dataclass(frozen=True)
class OpSpec:
    """Signature of one operation. A name that ends in ``?`` is optional; optional operands come last.

    ``attrs`` are ``name:i`` (int32) or ``name:f`` (float32, stored by its bits). ``variadic`` operands repeat the last input.
    ``inplace`` lists (input, output) positions that may share the same memory exactly; any other overlap is refused.
    ``updates`` lists input positions that the kernel writes (parameters, running statistics, optimiser state).
    """

    code: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: tuple[str, ...] = ()
    variadic: bool = False
    inplace: tuple[tuple[int, int], ...] = ()
    updates: tuple[int, ...] = ()
    doc: str = ""


def _spec(
    code: int,
    inputs: str,
    outputs: str,
    attrs: str = "",
    *,
    variadic: bool = False,
    inplace: Sequence[tuple[int, int]] = (),
    updates: Sequence[int] = (),
    doc: str,
) -> OpSpec:
    return OpSpec(
        code,
        tuple(inputs.split()),
        tuple(outputs.split()),
        tuple(attrs.split()),
        variadic,
        tuple(inplace),
        tuple(updates),
        doc,
    )


_CONV = "stride_h:i stride_w:i pad_top:i pad_left:i dilation_h:i dilation_w:i groups:i"
_POOL = "kernel_h:i kernel_w:i stride_h:i stride_w:i pad_top:i pad_left:i"

#: Every operation. ``M`` is the product of all leading dimensions; ``rne`` rounds to the nearest integer, ties to even.
OPS: dict[str, OpSpec] = {
    # --- linear algebra, float32
    "LINEAR": _spec(1, "x w b?", "y", "activation:i", doc="y[M,O] = act(x[M,I] w[O,I]^T + b[O])"),
    "LINEAR_GRAD_INPUT": _spec(2, "dy w", "dx", doc="dx[M,I] = dy[M,O] w[O,I]"),
    "LINEAR_GRAD_WEIGHT": _spec(3, "dy x", "dw db?", doc="dw[O,I] = dy^T x; db[O] = sum of dy over rows"),
    "CONV2D": _spec(4, "x w b?", "y", _CONV + " activation:i", doc="NHWC cross-correlation; bottom and right padding follow from y's size"),
    "CONV2D_GRAD_INPUT": _spec(5, "dy w", "dx", _CONV, doc="gradient of CONV2D in x"),
    "CONV2D_GRAD_WEIGHT": _spec(6, "dy x", "dw db?", _CONV, doc="gradients of CONV2D in w and b"),
    "MATMUL": _spec(7, "a b", "y", "transpose:i", doc="for each of the leading dimensions y[M,N] = a[M,K] b[K,N]; with transpose 1 a is stored as [K,M], with 2 b as [N,K]"),
    "ATTENTION": _spec(8, "q k v", "y lse?", "causal:i scale:f", doc="[N, T, heads, D], per example and head: s = scale q k^T, with causal over the keys j <= i only; y = softmax(s) v; lse = log of the sum of e^s"),
    "ATTENTION_GRAD": _spec(9, "dy q k v lse", "dq dk dv", "causal:i scale:f", doc="gradient of ATTENTION"),
    # --- pooling, NHWC, float32
    "MAX_POOL2D": _spec(10, "x", "y index?", _POOL, doc="index: position kh * kernel_w + kw in the window of the first maximum, u8 if the window has at most 256 places, else i32; padding never wins"),
    "MAX_POOL2D_GRAD": _spec(11, "dy index", "dx", _POOL, doc="scatters dy to the maxima, adding where windows overlap"),
    "AVG_POOL2D": _spec(12, "x", "y", _POOL + " count_include_pad:i", doc="mean over the window; without count_include_pad only real positions count"),
    "AVG_POOL2D_GRAD": _spec(13, "dy", "dx", _POOL + " count_include_pad:i", doc="gradient of AVG_POOL2D"),
    # --- recurrent layers over whole sequences, float32, from a state of zeros; gx = x w_ih^T + b_ih comes from a LINEAR; with reverse from the last step to the first
    "GRU": _spec(14, "gx w b", "gates y", "reverse:i", inplace=[(0, 0)], doc="torch.nn.GRU, parts r z n of G = 3H: g = h w^T + b; r, z = sigmoid(gx + g); n = tanh(gx_n + r g_n); y = h' = (1 - z) n + z h; gates holds r z n"),
    "GRU_GRAD": _spec(15, "dy gates y w b", "dgx scratch dw? db?", "reverse:i", inplace=[(1, 0)], doc="gradient of GRU in gx, w and b; scratch is for the kernel alone"),
    "LSTM": _spec(16, "gx w b", "gates y", "reverse:i", inplace=[(0, 0)], doc="torch.nn.LSTM, parts i f g o of G = 4H: i, f, o = sigmoid(gx + h w^T + b), g = tanh(the same); c' = f c + i g; y = h' = o tanh(c'); gates holds i f g o"),
    "LSTM_GRAD": _spec(17, "dy gates y w", "dgx scratch dw? db?", "reverse:i", inplace=[(1, 0)], doc="gradient of LSTM in gx, w and b; scratch is for the kernel alone"),
    # --- normalisation over the last dimension C, float32; statistics are over all leading dimensions (batch) or over C (layer)
    "BATCH_NORM_TRAIN": _spec(20, "x gamma beta running_mean running_var", "y mean rstd", "eps:f momentum:f", updates=(3, 4), doc="biased variance normalises, unbiased variance enters running_var; running = (1 - momentum) running + momentum batch"),
    "BATCH_NORM_GRAD": _spec(21, "dy x gamma mean rstd", "dx dgamma dbeta", doc="gradient through the batch statistics"),
    "BATCH_NORM_EVAL": _spec(22, "x gamma beta mean var", "y", "eps:f", inplace=[(0, 0)], doc="y = (x - mean) / sqrt(var + eps) * gamma + beta"),
    "BATCH_NORM_EVAL_GRAD": _spec(23, "dy x gamma mean var", "dx dgamma? dbeta?", "eps:f", doc="gradient with the statistics held constant"),
    "LAYER_NORM": _spec(24, "x gamma beta", "y mean rstd", "eps:f", doc="per row over the last len(gamma) elements; mean and rstd have one entry a row"),
    "LAYER_NORM_GRAD": _spec(25, "dy x gamma mean rstd", "dx dgamma dbeta", doc="gradient of LAYER_NORM"),
    "GROUP_NORM": _spec(26, "x gamma beta", "y mean rstd", "eps:f", doc="per example, over its rows and over each of G groups of channels; mean and rstd [N, G]"),
    "GROUP_NORM_GRAD": _spec(27, "dy x gamma mean rstd", "dx dgamma dbeta", doc="gradient of GROUP_NORM"),
    "RMS_NORM": _spec(28, "x gamma", "y rstd", "eps:f", doc="y = x gamma / sqrt(mean of x^2 + eps), per row over the last len(gamma) elements"),
    "RMS_NORM_GRAD": _spec(29, "dy x gamma rstd", "dx dgamma", doc="gradient of RMS_NORM"),
    # --- element-wise, float32
    "UNARY": _spec(30, "x", "y", "kind:i", inplace=[(0, 0)], doc="y = f(x), f an Activation other than NONE"),
    "UNARY_GRAD": _spec(31, "dy s", "dx", "kind:i", inplace=[(0, 0), (1, 0)], doc="dx = dy f'; s is x for HARDSWISH, GELU, GELU_TANH, SILU and LOG, else y; RELU6 passes 0 < y < 6"),
    "ADD": _spec(32, "a b", "y", inplace=[(0, 0), (1, 0)], doc="y = a + b; b may be shorter, then b[i % len(b)] (a row)"),
    "SUB": _spec(33, "a b", "y", inplace=[(0, 0), (1, 0)], doc="y = a - b; b may be a row"),
    "MUL": _spec(34, "a b", "y", inplace=[(0, 0), (1, 0)], doc="y = a * b; b may be a row"),
    "SCALE": _spec(35, "x", "y", "alpha:f beta:f", inplace=[(0, 0)], doc="y = alpha x + beta"),
    "SUM_ROWS": _spec(36, "x", "y", doc="y[j] = sum over i of x[i * len(y) + j]"),
    "REDUCE_MEAN": _spec(37, "x", "y", "axis_size:i inner_size:i", doc="x viewed [outer, axis, inner]; y[outer, inner] = mean over axis"),
    "REDUCE_MEAN_GRAD": _spec(38, "dy", "dx", "axis_size:i inner_size:i", doc="dx[o,a,i] = dy[o,i] / axis_size"),
    "DROPOUT": _spec(39, "x", "y mask", "p:f stream:i", inplace=[(0, 0)], doc="mask u8; keep if u >= p, y = x / (1 - p); u from Philox4x32-10, see docs/artifact.md"),
    "DROPOUT_GRAD": _spec(40, "dy mask", "dx", "p:f", inplace=[(0, 0)], doc="dx = mask ? dy / (1 - p) : 0"),
    "FILL": _spec(41, "", "y", "value:f", doc="y[i] = value"),
    "MAXIMUM": _spec(42, "a b", "y", inplace=[(0, 0), (1, 0)], doc="the larger, NaN if either is; b may be a row"),
    "MINIMUM": _spec(43, "a b", "y", inplace=[(0, 0), (1, 0)], doc="the smaller, NaN if either is; b may be a row"),
    "STEP": _spec(45, "a b", "y", "at_equal:f", inplace=[(0, 0), (1, 0)], doc="y = 1 where a > b, at_equal where a = b, else 0; b may be a row"),
    # --- all that the gradient of RELU or RELU6 needs of the forward pass, where nothing else reads that later
    "ACTIVATION_MASK": _spec(46, "y", "mask", "kind:i", doc="u8: bit j % 8 of byte j // 8 of a row is 1 where UNARY_GRAD with y[j] passes dy; the bits beyond C are 0"),
    "MASK_GRAD": _spec(47, "dy mask", "dx", inplace=[(0, 0)], doc="dx = dy where the bit of ACTIVATION_MASK is 1, else 0"),
    # --- weight gradient and plain SGD in one: the gradient of a large layer needs no memory
    "LINEAR_UPDATE": _spec(44, "w dy x", "", "weight_decay:f", updates=(0,), doc="an optimiser: w -= lr (dy^T x + weight_decay w), LINEAR_GRAD_WEIGHT and SGD in one"),
    # --- movement, any dtype
    "TRANSPOSE": _spec(50, "x", "y", "perm0:i perm1:i perm2:i perm3:i perm4:i perm5:i", doc="y.dims[i] = x.dims[perm[i]]; unused places are -1; a batched tensor keeps dimension 0"),
    "CONCAT": _spec(51, "a", "y", "axis:i", variadic=True, doc="joins along axis; batched tensors not along 0"),
    "SLICE": _spec(52, "x", "y", "axis:i start:i", doc="y = x[start : start + y.dims[axis]] along axis"),
    "SLICE_GRAD": _spec(53, "dy", "dx", "axis:i start:i", doc="dx is zero but for dy at start along axis"),
    "COPY": _spec(54, "x", "y", doc="same number of elements, same dtype"),
    "EMBEDDING": _spec(55, "ids table", "y", doc="y[i,:] = table[ids[i],:]; ids i32; an id outside the table is a run-time error"),
    "EMBEDDING_GRAD": _spec(56, "dy ids", "dtable", doc="dense gradient: zero, then rows are added"),
    # --- softmax and losses, float32; C is the last dimension
    "SOFTMAX": _spec(60, "x", "y", doc="over the last dimension"),
    "SOFTMAX_GRAD": _spec(61, "dy y", "dx", doc="gradient of SOFTMAX"),
    "LOG_SOFTMAX": _spec(62, "x", "y", doc="over the last dimension"),
    "LOG_SOFTMAX_GRAD": _spec(63, "dy y", "dx", doc="gradient of LOG_SOFTMAX"),
    "CROSS_ENTROPY": _spec(65, "logits labels", "loss correct dlogits?", doc="labels i32 [M]; loss[1] mean over rows; correct i32 [1]: rows whose first argmax is the label; a label outside [0, C) is a run-time error"),
    "MSE": _spec(66, "prediction target", "loss correct dprediction?", doc="mean over elements; correct is 0"),
    "BCE_WITH_LOGITS": _spec(67, "logits target", "loss correct dlogits?", doc="mean over elements; correct counts (logit > 0) == (target > 0.5)"),
    # --- optimisers, float32; skipped for a frozen variable. lr, step (from 1) come with the run
    "SGD": _spec(70, "w g v?", "", "momentum:f weight_decay:f nesterov:i", updates=(0, 2), doc="g += wd w; v = momentum v + g; g = nesterov ? g + momentum v : v; w -= lr g (torch.optim.SGD)"),
    "ADAM": _spec(71, "w g m v", "", "beta1:f beta2:f eps:f weight_decay:f decoupled:i", updates=(0, 2, 3), doc="torch.optim.Adam, or AdamW when decoupled"),
    # --- int8; scale and zero_point stand in the tensors; bit-exact on every target, no fused multiply-add
    "QUANTIZE": _spec(80, "x", "y", doc="y = clamp(rne(x * (1 / y.scale)) + y.zero_point, -128, 127); NaN gives zero_point"),
    "DEQUANTIZE": _spec(81, "x", "y", doc="y = (x - x.zero_point) * x.scale"),
    "QLINEAR": _spec(82, "x w bias multiplier", "y", "lo:i hi:i", doc="acc i32 = bias[o] + sum x w (x raw: the zero point is folded into bias); y = clamp(rne(f32(acc) * multiplier[o]) + y.zero_point, lo, hi)"),
    "QCONV2D": _spec(83, "x w bias multiplier", "y", _CONV + " lo:i hi:i", doc="as QLINEAR; padding reads x.zero_point"),
    "QADD": _spec(84, "a b", "y", "scale_a:f scale_b:f lo:i hi:i", doc="y = clamp(rne(f32(a - a.zp) * scale_a + f32(b - b.zp) * scale_b) + y.zp, lo, hi)"),
    "QMAX_POOL2D": _spec(85, "x", "y index?", _POOL, doc="x and y share scale and zero point; index as MAX_POOL2D's"),
    "QAVG_POOL2D": _spec(86, "x", "y", _POOL + " count_include_pad:i ratio:f", doc="y = clamp(rne(f32(sum(x - x.zp)) * (ratio / f32(count))) + y.zp, -128, 127)"),
    "QLUT": _spec(87, "x table", "y", inplace=[(0, 0)], doc="y = table[x + 128]; table i8 [256]: activations and requantisation"),
    # --- int8 training: weights, activations and gradients in int8 with scales that the program moves; bit-exact; see docs/artifact.md
    "Q_PREPARE": _spec(90, "w w_scale scales b?", "bias multiplier", "x:i y:i zero_point:i", doc="what QLINEAR and QCONV2D take: bias[o] = rne(b[o] / (w_scale[o] scales[x])), at most 2^30, - zero_point sum(w[o]); multiplier[o] = w_scale[o] scales[x] / scales[y]"),
    "Q_OBSERVE": _spec(91, "x peaks", "", "index:i limit:i", updates=(1,), doc="peaks[index] = max(peaks[index], largest |x - x.zero_point| / limit)"),
    "Q_ADAPT": _spec(92, "scales peaks", "", "grow:f shrink:f", updates=(0, 1), doc="where peaks > 0: scales *= peaks >= 1 ? grow : max(peaks, shrink); peaks = 0"),
    "Q_QUANTIZE": _spec(93, "x scales", "y", "index:i", doc="y = clamp(rne(x * (1 / scales[index])) + y.zero_point, -128, 127)"),
    "Q_DEQUANTIZE": _spec(94, "x scales", "y", "index:i", doc="y = (x - x.zero_point) * scales[index]"),
    "Q_ADD": _spec(95, "a b scales", "y", "a:i b:i y:i lo:i hi:i", doc="as QADD with scale_a = scales[a] / scales[y], scale_b = scales[b] / scales[y]"),
    "G_QUANTIZE": _spec(96, "dy grads", "g", "index:i stream:i", updates=(1,), doc="grads[index,0] = s = largest |dy| / 127; g = srn(dy / s)"),
    "G_DEQUANTIZE": _spec(97, "g grads", "dy", "index:i", doc="dy = g * grads[index,0]"),
    "G_MASK": _spec(98, "g y", "dx", "lo:i hi:i", inplace=[(0, 0)], doc="dx = lo < y < hi ? g : 0"),
    "G_SCALE": _spec(99, "g w_scale grads", "dx", "from:i to:i stream:i", inplace=[(0, 0)], updates=(2,), doc="v[i] = g[i] w_scale[i % len(w_scale)]; s = largest |v| / 127; dx = srn(v / s); grads[to,0] = grads[from,0] s"),
    "G_ADD": _spec(100, "a b grads", "dx", "a:i b:i to:i stream:i", inplace=[(0, 0), (1, 0)], updates=(2,), doc="v = a grads[a,0] + b grads[b,0]; grads[to,0] = s = largest |v| / 127; dx = srn(v / s)"),
    "G_BIAS": _spec(101, "g w_scale grads", "db", "from:i", doc="db[o] = f32(sum over m of g[m,o]) * (grads[from,0] / w_scale[o])"),
    "G_LINEAR_INPUT": _spec(102, "g w grads", "dx", "from:i to:i stream:i", updates=(2,), doc="acc[m,i] = sum over o of g[m,o] w[o,i]; dx = delayed(acc, from, to)"),
    "G_CONV2D_INPUT": _spec(103, "g w grads", "dx", _CONV + " from:i to:i stream:i", updates=(2,), doc="acc is the gradient of CONV2D in x, in int32; dx = delayed(acc, from, to)"),
    "G_LINEAR_UPDATE": _spec(104, "w g x w_scale scales grads residual?", "", "from:i entry:i weight_decay:f stream:i", updates=(0, 6), doc="acc[o,i] = sum over m of g[m,o] (x[m,i] - x.zero_point); w = stepped(acc), where x has scales[entry]"),
    "G_CONV2D_UPDATE": _spec(105, "w g x w_scale scales grads residual?", "", _CONV + " from:i entry:i weight_decay:f stream:i", updates=(0, 6), doc="acc is the gradient of CONV2D in w, in int32, with x - x.zero_point and no padding; w = stepped(acc)"),
    "G_MAX_POOL2D": _spec(106, "g index", "dx", _POOL, doc="moves g to the maxima; windows do not overlap"),
    # --- input: from raw data to what the first layer takes; integers and comparisons are exact on every target
    "CAST": _spec(110, "x", "y", doc="y = x as float32"),
    "ONE_HOT": _spec(111, "ids", "y", "first:i count:i", doc="y[m,c] = 1 if row m holds the id first + c, else 0; with count how often. Ids below first count nowhere; an id past the last column is a run-time error"),
    "BUCKETIZE": _spec(112, "x boundaries", "y", "right:i", doc="y = how many boundaries are < x, with right <= x (torch.bucketize), by bisection"),
    "LOOKUP": _spec(113, "x table?", "y", "first:i bins:i salt:i", inplace=[(0, 0)], doc="table rows are (key, id), keys ascending: y = the id of the key x, else first + (mix(x ^ salt) * bins >> 32); see Lookup"),
    "TOKENIZE": _spec(114, "text", "y", "lower:i strip:i split:i ngrams:i salt:i", doc="hashes of the tokens of UTF-8 text, then zeros; see Tokens"),
    "RESIZE2D": _spec(115, "x", "y", "mode:i", doc="NHWC, mode 0 nearest, 1 nearest-exact, 2 bilinear (torch.nn.functional.interpolate, align_corners=False); see Images"),
    "RESIZE2D_GRAD": _spec(116, "dy", "dx", "mode:i", doc="gradient of RESIZE2D"),
    "CROP2D": _spec(117, "x", "y", "random:i pad_h:i pad_w:i flip_h:i flip_v:i stream:i", doc="NHWC: the window of y's size in the middle of x, or with random anywhere in x widened by zeros, mirrored at random; see Images"),
    "QLUT_U8": _spec(118, "x table", "y", doc="y[m,c] = table[c,x[m,c]]; table i8 [C,256]: what becomes of a byte by element-wise operations and QUANTIZE"),
}  # fmt: skip

OP_NAMES: dict[int, str] = {spec.code: name for name, spec in OPS.items()}


class VariableFlag(enum.IntFlag):
    TRAINABLE = 1  #: an optimiser updates it
    BUFFER = 2  #: running statistics: changed by training, not by an optimiser
    SCALE = 4  #: with BUFFER: the scales [O] of the int8 weight whose name stands before ``.scale``; no tensor of the author's


@dataclass(frozen=True)
class Variable:
    """A named persistent tensor of the STATE region.

    ``dims`` is the engine's layout. ``perm`` leads to the author's layout: ``author.shape[i] == dims[perm[i]]``, that is
    ``author = engine.transpose(perm)``. Names and author's shapes are those of the model's ``state_dict``.
    """

    name: str
    dtype: DType
    dims: tuple[int, ...]
    perm: tuple[int, ...]
    offset: int
    flags: VariableFlag

    @property
    def shape(self) -> tuple[int, ...]:
        """The author's shape: what travels on the wire and what ``get`` and ``set`` take."""
        return tuple(self.dims[axis] for axis in self.perm)

    @property
    def nbytes(self) -> int:
        return prod(self.dims) * self.dtype.itemsize

    @property
    def is_scale(self) -> bool:
        """Whether it belongs to an int8 weight: hosts and the wire do not see it."""
        return bool(self.flags & VariableFlag.SCALE)

    @property
    def is_scaled(self) -> bool:
        """Whether it is a weight that trains in int8: hosts and the wire see ``stored * scale`` in float32."""
        return self.dtype == DType.I8 and bool(self.flags & VariableFlag.TRAINABLE)

    @property
    def value_dtype(self) -> DType:
        """The dtype of the author's tensor."""
        return DType.F32 if self.is_scaled else self.dtype


@dataclass(frozen=True)
class Tensor:
    """One tensor of one program."""

    dtype: DType
    region: Region
    dims: tuple[int, ...]
    offset: int
    batched: bool = False
    scale: float = 0.0
    zero_point: int = 0

    @property
    def elements(self) -> int:
        return prod(self.dims)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Op:
    """One kernel call; operands are indices into the program's tensors, attributes are in the order of its OpSpec."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attrs: tuple[int | float, ...] = ()


@dataclass(frozen=True)
class Port:
    """One input or output of a program; ``tensor`` indexes the program's tensors."""

    name: str
    tensor: int


@dataclass(frozen=True)
class Program:
    """``predict`` (inputs -> outputs), ``evaluate`` (inputs, target -> loss, correct) or ``train`` (the same, and it updates)."""

    name: str
    max_batch: int
    arena_bytes: int
    workspace_bytes: int  #: scratch for packed panels, see ``workspace_bytes`` in docs/artifact.md
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Artifact:
    """Everything that a device needs to predict and to train. Immutable; :mod:`evensong.wire.artifact` turns it to and from bytes."""

    manifest: dict[str, object]  #: JSON; see docs/artifact.md
    variables: tuple[Variable, ...]
    programs: tuple[Program, ...]
    const: bytes  #: CONST region
    state: bytes  #: initial STATE region
    slot_bytes: int  #: size of the SLOTS region
    extra: dict[int, bytes] = field(default_factory=dict)  #: unknown sections, kept

    def program(self, name: str) -> Program:
        for program in self.programs:
            if program.name == name:
                return program
        raise KeyError(name)
