"""Makes ``protos/vectors/artifact``: ``python tests/mobile_runtime/make_artifact_vectors.py``.

Each ``NAME.evsg`` is an artifact, and ``NAME.json`` says what its programs give when they run one after the other from
the initial state. Expected values come from the NumPy twin; the tests hold the compiled engine to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from program_builder import Memory, ProgramBuilder, classifier

from evensong.mobile_runtime.twin import TwinMachine
from evensong.wire.artifact import encode_artifact
from evensong.wire.program import Activation, Artifact, DType, VariableFlag

VECTORS = Path(__file__).parents[2] / "protos" / "vectors" / "artifact"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Run:
    """One run of a program; arrays as in JSON: dtype, shape, and the elements in a row."""

    program: str
    batch: int
    learning_rate: float
    step: int
    seed: int
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


def main() -> None:
    VECTORS.mkdir(parents=True, exist_ok=True)
    for name, (about, artifact, plan) in vectors().items():
        (VECTORS / f"{name}.evsg").write_bytes(encode_artifact(artifact))
        text = json.dumps(expected(about, artifact, plan), indent=1)
        text = re.sub(r"\[[^\[\]{}]*\]", lambda array: " ".join(array[0].split()), text)  # an array is one line
        (VECTORS / f"{name}.json").write_text(text + "\n")
    print(f"wrote {len(vectors())} vectors")


#: (program, batch, inputs, learning rate, step, seed)
Plan = list[tuple[str, int, list[Array], float, int, int]]


def vectors() -> dict[str, tuple[str, Artifact, Plan]]:
    return {
        "smallest": smallest(),
        "classifier": linear_classifier(),
        "convolution": convolution(),
        "text": text(),
        "int8": int8(),
        "raw": raw(),
    }


def expected(about: str, artifact: Artifact, plan: Plan) -> dict[str, Any]:
    """Runs ``plan`` on the twin."""
    machine = TwinMachine(artifact)
    runs = []
    for name, batch, inputs, learning_rate, step, seed in plan:
        index = next(i for i, program in enumerate(artifact.programs) if program.name == name)
        program = artifact.programs[index]
        outputs = []
        for port in program.outputs:
            t = program.tensors[port.tensor]
            dims = (t.dims[0] // program.max_batch * batch, *t.dims[1:]) if t.batched else t.dims
            outputs.append(np.zeros(dims, t.dtype.numpy))
        machine.run(index, batch, inputs, outputs, learning_rate=learning_rate, step=step, seed=seed)
        runs.append(Run(name, batch, learning_rate, step, seed, [*map(to_json, inputs)], [*map(to_json, outputs)]))
    return {
        "about": about,
        "tolerance": "integers exactly; float32 to 1e-5 of the largest element",
        "runs": [asdict(run) for run in runs],
        "state_float32": machine.state.view(np.float32).tolist(),
        "slots_float32": machine.slots.view(np.float32).tolist(),
    }


def to_json(array: Array) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": array.ravel().tolist()}


# ------------------------------------------------------------------------------------------------- the artifacts


def smallest() -> tuple[str, Artifact, Plan]:
    b = ProgramBuilder("predict", 4)
    x = b.input("x", (4, 2), batched=True)
    w = b.const(np.array([[0.5, -2.0]], np.float32))
    b.op("LINEAR", [x, w], [b.output("y", (4, 1), batched=True)])
    values = np.array([[1, 2], [3, 4], [-1, 0.25]], np.float32)
    return "y = x w^T on three of at most four examples", b.artifact(), [("predict", 3, [values], 0.0, 1, 0)]


def linear_classifier() -> tuple[str, Artifact, Plan]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    labels = rng.integers(0, 3, 8).astype(np.int32)
    steps: Plan = [("train", 8 - i, [x[i:], labels[i:]], 0.1, i + 1, 0) for i in range(3)]
    return (
        "linear layer, softmax cross-entropy, SGD with momentum; batches of 8, 7 and 6",
        classifier(),
        [*steps, ("evaluate", 8, [x, labels], 0.0, 1, 0), ("predict", 1, [x[:1]], 0.0, 1, 0)],
    )


def convolution() -> tuple[str, Artifact, Plan]:
    """Training of conv 3x3 (stride 1, padding 1), batch norm, ReLU, max pool, dropout, linear; SGD and Adam."""
    rng = np.random.default_rng(2)
    n, channels = 4, 5
    b = ProgramBuilder("train", n, Memory())

    def image(*dims: int, dtype: DType = DType.F32) -> int:
        return b.scratch((n, *dims), dtype, batched=True)

    x = b.input("x", (n, 6, 6, 2), batched=True)
    target = b.input("target", (n,), DType.I32, batched=True)
    loss, correct = b.output("loss", (1,)), b.output("correct", (1,), DType.I32)
    conv = b.variable("conv.weight", rng.normal(size=(channels, 3, 3, 2)).astype(np.float32) / 4, perm=(0, 3, 1, 2))
    gamma = b.variable("norm.weight", np.ones(channels, np.float32))
    beta = b.variable("norm.bias", np.zeros(channels, np.float32))
    mean = b.variable("norm.running_mean", np.zeros(channels, np.float32), VariableFlag.BUFFER)
    var = b.variable("norm.running_var", np.ones(channels, np.float32), VariableFlag.BUFFER)
    head = b.variable("head.weight", rng.normal(size=(3, 9 * channels)).astype(np.float32) / 8)
    geometry = {"stride_h": 1, "stride_w": 1, "pad_top": 1, "pad_left": 1, "dilation_h": 1, "dilation_w": 1}
    geometry["groups"] = 1
    pool = {"kernel_h": 2, "kernel_w": 2, "stride_h": 2, "stride_w": 2}

    c, normal, relu = (image(6, 6, channels) for _ in range(3))
    batch_mean, batch_rstd = b.scratch((channels,)), b.scratch((channels,))
    pooled, index = image(3, 3, channels), image(3, 3, channels, dtype=DType.U8)
    dropped, mask = image(9 * channels), image(9 * channels, dtype=DType.U8)
    logits, dlogits = image(3), image(3)
    b.op("CONV2D", [x, conv], [c], **geometry)
    b.op("BATCH_NORM_TRAIN", [c, gamma, beta, mean, var], [normal, batch_mean, batch_rstd], eps=1e-5, momentum=0.1)
    b.op("UNARY", [normal], [relu], kind=Activation.RELU)
    b.op("MAX_POOL2D", [relu], [pooled, index], **pool)
    flat = image(9 * channels)
    b.op("COPY", [pooled], [flat])
    b.op("DROPOUT", [flat], [dropped, mask], p=0.25, stream=3)
    b.op("LINEAR", [dropped, head], [logits])
    b.op("CROSS_ENTROPY", [logits, target], [loss, correct, dlogits])

    dhead, ddropped, dflat = b.scratch((3, 9 * channels)), image(9 * channels), image(9 * channels)
    dpooled, drelu, dnormal, dc = image(3, 3, channels), *(image(6, 6, channels) for _ in range(3))
    dgamma, dbeta, dconv = b.scratch((channels,)), b.scratch((channels,)), b.scratch((channels, 3, 3, 2))
    b.op("LINEAR_GRAD_WEIGHT", [dlogits, dropped], [dhead])
    b.op("LINEAR_GRAD_INPUT", [dlogits, head], [ddropped])
    b.op("DROPOUT_GRAD", [ddropped, mask], [dflat], p=0.25)
    b.op("COPY", [dflat], [dpooled])
    b.op("MAX_POOL2D_GRAD", [dpooled, index], [drelu], **pool)
    b.op("UNARY_GRAD", [drelu, relu], [dnormal], kind=Activation.RELU)
    b.op("BATCH_NORM_GRAD", [dnormal, c, gamma, batch_mean, batch_rstd], [dc, dgamma, dbeta])
    b.op("CONV2D_GRAD_WEIGHT", [dc, x], [dconv], **geometry)
    slots = [b.slot((channels, 3, 3, 2)), b.slot((channels, 3, 3, 2))]
    b.op("ADAM", [conv, dconv, *slots], [], beta1=0.9, beta2=0.99, eps=1e-4, weight_decay=0.01, decoupled=1)
    b.op("SGD", [gamma, dgamma], [], weight_decay=0.01)
    b.op("SGD", [beta, dbeta, b.slot((channels,))], [], momentum=0.9, nesterov=1)
    b.op("SGD", [head, dhead], [])

    images = rng.normal(size=(n, 6, 6, 2)).astype(np.float32)
    labels = rng.integers(0, 3, n).astype(np.int32)
    plan: Plan = [("train", n - i, [images[i:], labels[i:]], 0.05, i + 1, 2**40 + 7) for i in range(3)]
    return "convolution, batch norm, max pool, dropout; Adam and SGD; batches of 4, 3 and 2", b.artifact(), plan


def text() -> tuple[str, Artifact, Plan]:
    """predict of a small text model: embedding, layer norm, GELU, mean over tokens, softmax."""
    rng = np.random.default_rng(3)
    n, tokens, width = 3, 5, 8
    b = ProgramBuilder("predict", n)
    ids = b.input("ids", (n, tokens), DType.I32, batched=True)
    table = b.const(rng.normal(size=(11, width)).astype(np.float32))
    gamma, beta = (b.const(rng.normal(size=width).astype(np.float32)) for _ in range(2))
    head = b.const(rng.normal(size=(4, width)).astype(np.float32))
    bias = b.const(rng.normal(size=4).astype(np.float32))
    embedded, normal, gelu = (b.scratch((n, tokens, width), batched=True) for _ in range(3))
    mean, rstd = (b.scratch((n, tokens), batched=True) for _ in range(2))
    pooled, logits = b.scratch((n, width), batched=True), b.scratch((n, 4), batched=True)
    b.op("EMBEDDING", [ids, table], [embedded])
    b.op("LAYER_NORM", [embedded, gamma, beta], [normal, mean, rstd], eps=1e-5)
    b.op("UNARY", [normal], [gelu], kind=Activation.GELU)
    b.op("REDUCE_MEAN", [gelu], [pooled], axis_size=tokens, inner_size=width)
    b.op("LINEAR", [pooled, head, bias], [logits], activation=0)
    b.op("SOFTMAX", [logits], [b.output("probabilities", (n, 4), batched=True)])
    words = rng.integers(0, 11, (n, tokens)).astype(np.int32)
    return (
        "embedding, layer norm, GELU, mean over tokens, linear, softmax",
        b.artifact(),
        [
            ("predict", 3, [words], 0.0, 1, 0),
            ("predict", 1, [words[1:2]], 0.0, 1, 0),
        ],
    )


def int8() -> tuple[str, Artifact, Plan]:
    """predict of a quantised convolutional network with a residual; the int8 tensors come out as well."""
    rng = np.random.default_rng(4)
    n = 2
    b = ProgramBuilder("predict", n)
    outputs: Iterator[int] = iter(range(100))

    def quantised(*dims: int, scale: float, zero_point: int) -> int:
        return b.output(f"int8_{next(outputs)}", (n, *dims), DType.I8, batched=True, scale=scale, zero_point=zero_point)

    def weights(*dims: int) -> list[int]:
        w = b.const(rng.integers(-127, 128, dims).astype(np.int8))
        bias = b.const(rng.integers(-3000, 3000, dims[0]).astype(np.int32))
        scale = 30.0 / (64 * 64 * np.sqrt(np.prod(dims[1:])))
        return [w, bias, b.const((scale * (0.5 + rng.random(dims[0]))).astype(np.float32))]

    x = b.input("x", (n, 6, 6, 4), batched=True)
    q = quantised(6, 6, 4, scale=0.02, zero_point=-3)
    deep = quantised(6, 6, 4, scale=0.05, zero_point=4)
    full = quantised(6, 6, 4, scale=0.04, zero_point=-7)
    added = quantised(6, 6, 4, scale=0.06, zero_point=10)
    largest = quantised(3, 3, 4, scale=0.06, zero_point=10)
    mean = quantised(1, 1, 4, scale=0.03, zero_point=-20)
    bent = quantised(1, 1, 4, scale=0.03, zero_point=-20)
    scores = quantised(5, scale=0.1, zero_point=0)
    one = {"stride_h": 1, "stride_w": 1, "pad_top": 1, "pad_left": 1, "dilation_h": 1, "dilation_w": 1}
    b.op("QUANTIZE", [x], [q])
    b.op("QCONV2D", [q, *weights(4, 3, 3, 1)], [deep], **one, groups=4, lo=4, hi=127)
    b.op("QCONV2D", [deep, *weights(4, 3, 3, 4)], [full], **one, groups=1, lo=-128, hi=127)
    b.op("QADD", [q, full], [added], scale_a=0.02 / 0.06, scale_b=0.04 / 0.06, lo=-128, hi=127)
    b.op("QMAX_POOL2D", [added], [largest], kernel_h=2, kernel_w=2, stride_h=2, stride_w=2)
    b.op(
        "QAVG_POOL2D", [largest], [mean], kernel_h=3, kernel_w=3, stride_h=1, stride_w=1, count_include_pad=1, ratio=2.0
    )
    b.op("QLUT", [mean, b.const(rng.permutation(np.arange(-128, 128)).astype(np.int8))], [bent])
    flat = b.scratch((n, 4), DType.I8, batched=True, scale=0.03, zero_point=-20)
    b.op("COPY", [bent], [flat])
    b.op("QLINEAR", [flat, *weights(5, 4)], [scores], lo=-128, hi=127)
    b.op("DEQUANTIZE", [scores], [b.output("logits", (n, 5), batched=True)])
    images = rng.normal(size=(n, 6, 6, 4)).astype(np.float32)
    return (
        "quantise, depthwise and full convolution, residual, pools, table, linear; int8 tensors exact",
        b.artifact(),
        [
            ("predict", 2, [images], 0.0, 1, 0),
            ("predict", 1, [images[1:]], 0.0, 1, 0),
        ],
    )


def raw() -> tuple[str, Artifact, Plan]:
    """What stands in front of a model: text, a number and an image of bytes; all results are integers or exact."""
    rng = np.random.default_rng(5)
    n, size, tokens, channels = 3, 24, 6, 2
    b = ProgramBuilder("input", n)
    text = b.input("text", (n, size), DType.U8, batched=True)
    number = b.input("number", (n,), batched=True)
    image = b.input("image", (n, 5, 6, channels), DType.U8, batched=True)
    hashes = b.output("hashes", (n, tokens), DType.I32, batched=True)
    ids = b.output("ids", (n, tokens), DType.I32, batched=True)
    keys = np.sort([0, *np.array([0xE40C292C, 0xBF9CF968], np.uint32).view(np.int32)])  # none, "a", "foobar"
    table = b.const(np.stack([keys, np.where(keys == 0, 0, 2 + np.arange(3))], axis=1).astype(np.int32))
    b.op("TOKENIZE", [text], [hashes], lower=1, strip=1, split=1, ngrams=2, salt=0)
    b.op("LOOKUP", [hashes, table], [ids], first=5, bins=3, salt=-2)
    b.op("ONE_HOT", [ids], [b.output("counts", (n, 7), batched=True)], first=1, count=1)
    boundaries = b.const(np.array([-1.5, 0, 0.25, 3], np.float32))
    b.op("BUCKETIZE", [number, boundaries], [b.output("bucket", (n,), DType.I32, batched=True)], right=1)
    window = b.output("window", (n, 4, 4, channels), DType.U8, batched=True)
    b.op("CROP2D", [image], [window], random=1, pad_h=1, pad_w=1, flip_h=1, flip_v=1, stream=-1)
    stored = b.output("stored", (n, 4, 4, channels), DType.I8, batched=True, scale=0.1, zero_point=1)
    b.op("QLUT_U8", [window, b.const(rng.integers(-128, 128, (channels, 256)).astype(np.int8))], [stored])
    resized, real = (b.output(name, (n, 3, 5, channels), batched=True) for name in ("resized", "real"))
    b.op("RESIZE2D", [window], [resized], mode=2)
    small = b.scratch((n, 3, 5, channels), DType.U8, batched=True)
    b.op("CROP2D", [image], [small])
    b.op("CAST", [small], [real])
    texts = np.zeros((n, size), np.uint8)
    for row, sentence in zip(texts, ("A foo-bar, a foobar!", "Ärger\t\ta 😀", ""), strict=True):
        row[: len(sentence.encode())] = np.frombuffer(sentence.encode(), np.uint8)
    numbers = np.array([0.25, -7, 1e9], np.float32)
    images = rng.integers(0, 256, (n, 5, 6, channels)).astype(np.uint8)
    return (
        "tokens, lookup, counts, bucket, random crop, resize, byte table; integers exact",
        b.artifact(),
        [
            ("input", 3, [texts, numbers, images], 0.0, 1, 2**40 + 7),
            ("input", 2, [texts[:2], numbers[:2], images[:2]], 0.0, 9, 3),
        ],
    )


if __name__ == "__main__":
    main()
