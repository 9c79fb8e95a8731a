"""What range each activation has on calibration examples: the frozen part of a graph is run in float32 and watched."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.compiler.interpret import Interpreter
from evensong.mobile_runtime.compiler.ir import Data, Graph, Node, Value
from evensong.mobile_runtime.errors import CompileError
from evensong.wire.program import DType

RangeMethod = Literal["minmax", "percentile", "mse"]

_BATCH = 64
_SAMPLES_PER_BATCH = 8192
_CLIPS = np.linspace(1.0, 0.4, 31)  # shares of the full range that "mse" tries


@dataclass(frozen=True)
class PostTrainingInt8:
    """Post-training quantisation of everything frozen: int8 weights with a scale a channel, int8 activations.

    Args:
        calibration: examples like those the model will see: one array ``[n, ...]``, a list with one array for each
            input, or an iterable of such batches. A few hundred are enough.
        activations: how a range is chosen: ``"minmax"`` covers all that was seen, ``"percentile"`` cuts the tails,
            ``"mse"`` takes the clip with the least squared error on the examples.
        percentile: kept share in percent, split between both tails, for ``"percentile"``.
        equalize: cross-layer equalisation: channels between two layers are scaled so that both have use for the same
            grid (Nagel et al., *Data-free quantization through weight equalization and bias correction*, ICCV 2019).
            ``"auto"`` keeps it where the model's output then has less error on the calibration examples.
        bias_correction: takes the mean error that rounding gives each channel of a layer off its bias (the same
            paper).
    """

    calibration: Any
    activations: RangeMethod = "mse"
    percentile: float = 99.99
    equalize: bool | Literal["auto"] = False
    bias_correction: bool = True

    def __post_init__(self) -> None:
        if self.activations not in ("minmax", "percentile", "mse") or not 50 < self.percentile <= 100:
            raise CompileError("unknown way to choose ranges", got=(self.activations, self.percentile))
        if self.equalize not in (True, False, "auto"):
            raise CompileError("unknown way to equalise", expected='True, False or "auto"', got=self.equalize)

    def calibrator(self, inputs: Sequence[Value]) -> Calibrator:
        """For ``compile``: what measures the ranges of a model with these input ports."""
        return Calibrator(self, inputs)


@dataclass(frozen=True)
class Quantization:
    """``real = scale (stored - zero_point)``, stored in int8."""

    scale: float
    zero_point: int


class Calibrator:
    """Ranges of activations. Programs of one model share them: a value is known by how it is computed."""

    def __init__(self, settings: PostTrainingInt8, inputs: Sequence[Value]) -> None:
        self.settings = settings
        #: Weights in the engine's layout that take the place of a frozen tensor's, by its name.
        self.weights: Mapping[str, Data] = {}
        self._batches = list(_batches(settings.calibration, inputs))
        self._known: dict[bytes, Quantization] = {}

    def with_weights(self, weights: Mapping[str, Data]) -> Calibrator:
        """The same ranges for other weights."""
        other = copy(self)
        other.weights = weights
        return other

    def examples(self, most: int) -> list[Data]:
        """The first calibration examples, at most so many: one array for each input port."""
        taken, found = [], 0
        for batch in self._batches:
            if found < most:
                taken.append(batch)
                found += len(batch[0])
        return [np.concatenate(parts)[:most] for parts in zip(*taken, strict=True)]

    def quantizations(self, graph: Graph, frozen: Sequence[Node]) -> dict[Value, Quantization]:
        """Scale and zero point of every float32 result of ``frozen`` and of the input ports, by root value."""
        keys = _keys(graph, frozen)
        if any(key not in self._known for key in keys.values()):
            self._known |= self._measure(graph, frozen, keys)
        return {value: self._known[key] for value, key in keys.items()}

    def _measure(self, graph: Graph, frozen: Sequence[Node], keys: Mapping[Value, bytes]) -> dict[bytes, Quantization]:
        seen: dict[Value, _Seen] = {value: _Seen() for value in keys}
        for batch in self._batches:
            run = Interpreter(dict(zip(graph.inputs.values(), batch, strict=False)))
            for node in frozen:
                run.run(node)
            for value in seen:
                seen[value].add(run.contents[value])
        return {keys[value]: self._choose(found) for value, found in seen.items()}

    def _choose(self, seen: _Seen) -> Quantization:
        if self.settings.activations == "minmax":
            return quantization(seen.least, seen.most)
        samples = np.concatenate(seen.samples)
        if self.settings.activations == "percentile":
            tail = (100 - self.settings.percentile) / 2
            low, high = np.percentile(samples, [tail, 100 - tail])
            return quantization(max(float(low), seen.least), min(float(high), seen.most))
        choices = [quantization(seen.least * clip, seen.most * clip) for clip in _CLIPS]
        return min(choices, key=lambda choice: _squared_error(samples, choice))


def quantization(low: float, high: float) -> Quantization:
    """The int8 grid over ``[low, high]``, widened to hold zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = _short((high - low) / 255)
    if not scale > 1e-30:
        return Quantization(1.0, 0)
    return Quantization(scale, int(np.clip(np.rint(-128 - low / scale), -128, 127)))


# ------------------------------------------------------------------------------------------------------------- helpers


def _short(scale: float) -> float:
    """``scale`` with 12 bits: the last bits of a range differ between machines, those of an artifact must not."""
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(math.ceil(mantissa * 4096), exponent - 12)


class _Seen:
    """Extremes and a thinned sample of one value's elements."""

    def __init__(self) -> None:
        self.least = 0.0
        self.most = 0.0
        self.samples: list[npt.NDArray[np.float32]] = []

    def add(self, content: Data) -> None:
        flat = content.astype(np.float32).reshape(-1)
        self.least = min(self.least, float(flat.min()))
        self.most = max(self.most, float(flat.max()))
        self.samples.append(flat[:: -(-len(flat) // _SAMPLES_PER_BATCH)])


def _squared_error(samples: npt.NDArray[np.float32], choice: Quantization) -> float:
    stored = np.clip(np.rint(samples / np.float32(choice.scale)) + choice.zero_point, -128, 127)
    error = (stored - choice.zero_point) * np.float32(choice.scale) - samples
    return float(np.dot(error, error))


def _keys(graph: Graph, nodes: Sequence[Node]) -> dict[Value, bytes]:
    """A name for every float32 value that says how it is computed: equal in every program of the same model."""
    keys: dict[Value, bytes] = {
        value: f"port {name}".encode() for name, value in graph.inputs.items() if name != "target"
    }
    for node in nodes:
        if node.op == "CROP2D" and node.inputs[0].dims == node.outputs[0].dims:
            keys[node.outputs[0].root] = keys[node.inputs[0].root]  # a flip, which is no node outside training
            continue
        attrs = {} if node.op == "CROP2D" else node.attrs  # random in training, from the middle elsewhere
        told = hashlib.sha256(f"{node.op} {sorted(attrs.items())}".encode())
        for value in node.inputs:
            data = value.root.data
            told.update(keys[value.root] if data is None else hashlib.sha256(data.tobytes()).digest())
            told.update(repr(value.dims).encode())
        for at, value in enumerate(node.outputs):
            keys[value.root] = told.digest() + bytes([at])
    return {value: key for value, key in keys.items() if value.dtype == DType.F32}


def _batches(calibration: Any, inputs: Sequence[Value]) -> Iterator[list[Data]]:
    """Calibration examples in batches of arrays that fit the input ports.

    Raises :class:`CompileError` when there are none or their shape is wrong.
    """
    if _is_example(calibration):
        groups: Any = [[calibration]]
    elif isinstance(calibration, (list, tuple)) and len(calibration) == len(inputs) and _fit(calibration, inputs):
        groups = [calibration]
    else:
        groups = (group if isinstance(group, (list, tuple)) else [group] for group in calibration)
    found = False
    for group in groups:
        arrays = [np.asarray(array) for array in group]
        if not _fit(arrays, inputs):
            raise CompileError(
                "calibration examples do not fit the model's inputs",
                expected=[f"[n, {', '.join(map(str, value.dims[1:]))}]" for value in inputs],
                got=[array.shape for array in arrays],
            )
        typed = [array.astype(value.dtype.numpy) for array, value in zip(arrays, inputs, strict=True)]
        for start in range(0, len(typed[0]), _BATCH):
            found = True
            yield [array[start : start + _BATCH] for array in typed]
    if not found:
        raise CompileError("quantisation needs calibration examples", expected="a few hundred", got=0)


def _is_example(item: Any) -> bool:
    return hasattr(item, "shape") and hasattr(item, "dtype")


def _fit(arrays: Sequence[Any], inputs: Sequence[Value]) -> bool:
    shapes = [tuple(np.shape(array))[1:] for array in arrays]
    return shapes == [value.dims[1:] for value in inputs]
