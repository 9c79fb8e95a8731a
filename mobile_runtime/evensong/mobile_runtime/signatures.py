"""The operands and attributes of every operation, as one line each. ``engine/src/verify.cpp`` holds the same lines.

``"f*MI fOI fO? > f*MO | a"`` says: the first input is float32, its last dimension is I and the product of the others is
M; the second is [O, I]; the third, if it is there, is [O]; the output is [..., O] with the same product M; the
attribute is an activation. Every letter stands for one size in the whole line, together with whether that size shrinks
with the batch, so that what fits for ``max_batch`` fits for every smaller batch.

- operand: a dtype, then a shape, then ``?`` if it is optional. Dtypes: ``f`` float32, ``b`` int8, ``u`` uint8,
  ``i`` int32, ``j`` uint8 or int32, ``v`` float32 or uint8, ``x`` any (all x of a line agree). Shapes: letters are the
  dimensions in turn; ``*X`` in front is the product of the leading ones; ``#X`` is the product of all; ``#`` and a
  number is exactly so many elements, not batched.
- attribute: ``s`` 1 to 32768 (stride, dilation, kernel), ``p`` 0 to 32768 (padding), ``n`` any >= 0, ``.`` any,
  ``b`` 0 or 1, ``q`` an int8, ``a`` a fused activation, ``k`` an activation but NONE, ``f`` finite.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from evensong.wire.program import OPS

SIGNATURES: dict[str, str] = {
    "LINEAR": "f*MI fOI fO? > f*MO | a",
    "LINEAR_GRAD_INPUT": "f*MO fOI > f*MI",
    "LINEAR_GRAD_WEIGHT": "f*MO f*MI > fOI fO?",
    "CONV2D": "fNHWC fOKLD fO? > fNPQO | ssppsssa",
    "CONV2D_GRAD_INPUT": "fNPQO fOKLD > fNHWC | ssppsss",
    "CONV2D_GRAD_WEIGHT": "fNPQO fNHWC > fOKLD fO? | ssppsss",
    "MATMUL": "f*BCD f*BEF > f*BMN | n",
    "ATTENTION": "fNTHD fNSHD fNSHE > fNTHE fNTH? | bf",
    "ATTENTION_GRAD": "fNTHE fNTHD fNSHD fNSHE fNTH > fNTHD fNSHD fNSHE | bf",
    "MAX_POOL2D": "fNHWC > fNPQC jNPQC? | sssspp",
    "MAX_POOL2D_GRAD": "fNPQC jNPQC > fNHWC | sssspp",
    "AVG_POOL2D": "fNHWC > fNPQC | ssssppb",
    "AVG_POOL2D_GRAD": "fNPQC > fNHWC | ssssppb",
    "GRU": "fNTG fGH fG > fNTG fNTH | b",
    "GRU_GRAD": "fNTH fNTG fNTH fGH fG > fNTG fNTH fGH? fG? | b",
    "LSTM": "fNTG fGH fG > fNTG fNTH | b",
    "LSTM_GRAD": "fNTH fNTG fNTH fGH > fNTG fNTH fGH? fG? | b",
    "BATCH_NORM_TRAIN": "f*MC fC fC fC fC > f*MC fC fC | ff",
    "BATCH_NORM_GRAD": "f*MC f*MC fC fC fC > f*MC fC fC",
    "BATCH_NORM_EVAL": "f*MC fC fC fC fC > f*MC | f",
    "BATCH_NORM_EVAL_GRAD": "f*MC f*MC fC fC fC > f*MC fC? fC? | f",
    "LAYER_NORM": "f#N f#G f#G > f#N f#R f#R | f",
    "LAYER_NORM_GRAD": "f#N f#N f#G f#R f#R > f#N f#G f#G",
    "GROUP_NORM": "fNLC fC fC > fNLC fNG fNG | f",
    "GROUP_NORM_GRAD": "fNLC fNLC fC fNG fNG > fNLC fC fC",
    "RMS_NORM": "f#N f#G > f#N f#R | f",
    "RMS_NORM_GRAD": "f#N f#N f#G f#R > f#N f#G",
    "UNARY": "f#N > f#N | k",
    "UNARY_GRAD": "f#N f#N > f#N | k",
    "ADD": "f#N f#R > f#N",
    "SUB": "f#N f#R > f#N",
    "MUL": "f#N f#R > f#N",
    "SCALE": "f#N > f#N | ff",
    "SUM_ROWS": "f#N > f#R",
    "REDUCE_MEAN": "f#N > f#R | nn",
    "REDUCE_MEAN_GRAD": "f#R > f#N | nn",
    "DROPOUT": "f#N > f#N u#N | f.",
    "DROPOUT_GRAD": "f#N u#N > f#N | f",
    "FILL": "> f#N | f",
    "MAXIMUM": "f#N f#R > f#N",
    "MINIMUM": "f#N f#R > f#N",
    "STEP": "f#N f#R > f#N | f",
    "ACTIVATION_MASK": "f*MC > u*MB | a",
    "MASK_GRAD": "f*MC u*MB > f*MC",
    "LINEAR_UPDATE": "fOI f*MO f*MI > | f",
    "TRANSPOSE": "x#N > x#N | ......",
    "CONCAT": "x#A > x#N | n",
    "SLICE": "x#A > x#N | nn",
    "SLICE_GRAD": "x#N > x#A | nn",
    "COPY": "x#N > x#N",
    "EMBEDDING": "i#N fVD > f*ND",
    "EMBEDDING_GRAD": "f*ND i#N > fVD",
    "SOFTMAX": "f*MC > f*MC",
    "SOFTMAX_GRAD": "f*MC f*MC > f*MC",
    "LOG_SOFTMAX": "f*MC > f*MC",
    "LOG_SOFTMAX_GRAD": "f*MC f*MC > f*MC",
    "CROSS_ENTROPY": "f*MC i#M > f#1 i#1 f*MC?",
    "MSE": "f#N f#N > f#1 i#1 f#N?",
    "BCE_WITH_LOGITS": "f#N f#N > f#1 i#1 f#N?",
    "SGD": "f#N f#N f#N? > | ffb",
    "ADAM": "f#N f#N f#N f#N > | ffffb",
    "QUANTIZE": "f#N > b#N",
    "DEQUANTIZE": "b#N > f#N",
    "QLINEAR": "b*MI bOI iO fO > b*MO | qq",
    "QCONV2D": "bNHWC bOKLD iO fO > bNPQO | ssppsssqq",
    "QADD": "b#N b#N > b#N | ffqq",
    "QMAX_POOL2D": "bNHWC > bNPQC jNPQC? | sssspp",
    "QAVG_POOL2D": "bNHWC > bNPQC | ssssppbf",
    "QLUT": "b#N b#256 > b#N",
    "Q_PREPARE": "bOI fO f#T fO? > iO fO | nnq",
    "Q_OBSERVE": "b#N f#T > | nn",
    "Q_ADAPT": "f#T f#T > | ff",
    "Q_QUANTIZE": "f#N f#T > b#N | n",
    "Q_DEQUANTIZE": "b#N f#T > f#N | n",
    "Q_ADD": "b#N b#N f#T > b#N | nnnqq",
    "G_QUANTIZE": "f#N f#S > b#N | n.",
    "G_DEQUANTIZE": "b#N f#S > f#N | n",
    "G_MASK": "b#N b#N > b#N | ..",
    "G_SCALE": "b#N f#R f#S > b#N | nn.",
    "G_ADD": "b#N b#N f#S > b#N | nnn.",
    "G_BIAS": "b*MO fO f#S > fO | n",
    "G_LINEAR_INPUT": "b*MO bOI f#S > b*MI | nn.",
    "G_CONV2D_INPUT": "bNPQO bOKLD f#S > bNHWC | ssppsssnn.",
    "G_LINEAR_UPDATE": "bOI b*MO b*MI fO f#T f#S b#R? > | nnf.",
    "G_CONV2D_UPDATE": "bOKLD bNPQO bNHWC fO f#T f#S b#R? > | ssppsssnnf.",
    "G_MAX_POOL2D": "bNPQC jNPQC > bNHWC | sssspp",
    "CAST": "j#N > f#N",
    "ONE_HOT": "i*MW > f*MC | .b",
    "BUCKETIZE": "f#N fK > i#N | b",
    "LOOKUP": "i#N iKT? > i#N | .n.",
    "TOKENIZE": "u*MB > i*MT | bbnn.",
    "RESIZE2D": "vNHWC > fNPQC | n",
    "RESIZE2D_GRAD": "fNPQC > fNHWC | n",
    "CROP2D": "xNHWC > xNPQC | bppbb.",
    "QLUT_U8": "u*MC bCT > b*MC",
}


@dataclass(frozen=True)
class Pattern:
    """One operand of a signature."""

    text: str
    dtype: str
    product: str  #: "#" all dimensions together, "*" the leading ones together, "" none
    sizes: str  #: letters, or one number after "#"


@dataclass(frozen=True)
class Signature:
    inputs: tuple[Pattern, ...]
    outputs: tuple[Pattern, ...]
    attrs: str  #: one character an attribute


@cache
def signature(name: str) -> Signature:
    """The signature of operation ``name``, taken apart."""
    operands, _, attrs = SIGNATURES[name].partition(" | ")
    inputs, outputs = (tuple(map(_pattern, side.split())) for side in operands.split(">"))
    return Signature(inputs, outputs, attrs)


_OPERAND = re.compile(r"(?P<dtype>[fbuijvx])(?P<product>[*#]?)(?P<sizes>[A-Z]+|\d+)\??")


def _pattern(text: str) -> Pattern:
    match = _OPERAND.fullmatch(text)
    assert match, text
    return Pattern(text, **match.groupdict())


assert list(SIGNATURES) == list(OPS), "every operation has one signature, in the order of OPS"
