"""What quantisation costs and gains, layer by layer: the same model in float32 and in int8, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.errors import ProgramError
from evensong.mobile_runtime.loading import HasBytes, load
from evensong.mobile_runtime.profile import profile
from evensong.mobile_runtime.session import Array
from evensong.mobile_runtime.twin import TwinMachine
from evensong.wire.artifact import decode_artifact
from evensong.wire.program import Artifact, DType, Tensor

_EXAMPLES = 64  #: examples that the layers are compared on


@dataclass(frozen=True)
class LayerReport:
    """One module of the author's model.

    ``signal_to_noise`` is that of its result in decibels (mean square of the float32 result over the mean square of
    the difference), NaN where the two programs have no result in common; times are seconds for one run of ``predict``.
    """

    place: str
    signal_to_noise: float
    float_seconds: float
    int8_seconds: float


@dataclass(frozen=True)
class QuantizationReport:
    """All layers, and the whole. Accuracies are NaN without labels; ``agreement`` is the share of equal answers."""

    layers: tuple[LayerReport, ...]
    signal_to_noise: float
    agreement: float
    float_accuracy: float
    int8_accuracy: float
    float_bytes: int  #: of the artifact
    int8_bytes: int

    @property
    def float_seconds(self) -> float:
        return sum(layer.float_seconds for layer in self.layers)

    @property
    def int8_seconds(self) -> float:
        return sum(layer.int8_seconds for layer in self.layers)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "signal to noise", "float32", "int8", "times faster")]
        rows += [_row(x.place, x.signal_to_noise, x.float_seconds, x.int8_seconds) for x in self.layers]
        rows.append(_row("all", self.signal_to_noise, self.float_seconds, self.int8_seconds))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        accuracy = ""
        if not math.isnan(self.float_accuracy):
            accuracy = f"accuracy {self.float_accuracy:.2%} -> {self.int8_accuracy:.2%}, "
        size = f"{self.float_bytes:,} -> {self.int8_bytes:,} bytes"
        return "\n".join([*table, f"{accuracy}same answers {self.agreement:.2%}, artifact {size}"])


def quantization_report(
    float32: HasBytes | bytes,
    int8: HasBytes | bytes,
    inputs: Sequence[npt.ArrayLike],
    labels: npt.ArrayLike | None = None,
) -> QuantizationReport:
    """Compares two artifacts of one model.

    Args:
        float32, int8: the model compiled without and with quantisation.
        inputs: one array ``[n, ...]`` for each input of the model.
        labels: ``[n]``, for accuracies.

    Raises :class:`ProgramError` where the two do not take the same inputs.
    """
    data = [item if isinstance(item, bytes) else item.to_bytes() for item in (float32, int8)]
    artifacts = [decode_artifact(item) for item in data]
    _check_alike(*artifacts)
    arrays = [np.asarray(value) for value in inputs]
    answers = [load(item).predict(*arrays) for item in data]
    exact, rounded = (_results_by_place(artifact, [array[:_EXAMPLES] for array in arrays]) for artifact in artifacts)
    times = [_seconds_by_place(artifact) for artifact in artifacts]
    places = list(dict.fromkeys([*times[0], *times[1]]))
    layers = tuple(
        LayerReport(
            place, _ratio(exact.get(place), rounded.get(place)), times[0].get(place, 0.0), times[1].get(place, 0.0)
        )
        for place in places
    )
    best = [answer.reshape(len(answer), -1).argmax(axis=1) for answer in answers]
    accuracies = [math.nan if labels is None else float((b == np.asarray(labels)).mean()) for b in best]
    agreement = float((best[0] == best[1]).mean())
    return QuantizationReport(
        layers, _ratio(*answers), agreement, accuracies[0], accuracies[1], len(data[0]), len(data[1])
    )


def _check_alike(float32: Artifact, int8: Artifact) -> None:
    ports = [
        [program.tensors[port.tensor].dims[1:] for port in program.inputs]
        for program in (float32.program("predict"), int8.program("predict"))
    ]
    if ports[0] != ports[1]:
        raise ProgramError("the artifacts are not of one model", expected=ports[0], got=ports[1])


def _results_by_place(artifact: Artifact, inputs: Sequence[Array]) -> dict[str, npt.NDArray[np.float64]]:
    """The last result of each module over all examples, as real numbers; ``predict`` takes them one by one."""
    program = artifact.program("predict")
    machine = TwinMachine(artifact)
    found: dict[str, list[npt.NDArray[np.float64]]] = {}
    places = _places(artifact)
    for start in range(0, len(inputs[0]), program.max_batch):
        batch = [array[start : start + program.max_batch] for array in inputs]
        last: dict[str, npt.NDArray[np.float64]] = {}
        for index, results in machine.trace("predict", batch):
            tensor = program.tensors[program.ops[index].outputs[0]]
            last[places[index]] = _reals(tensor, results[0])
        for place, value in last.items():
            found.setdefault(place, []).append(value.reshape(-1))
    return {place: np.concatenate(values) for place, values in found.items()}


def _seconds_by_place(artifact: Artifact) -> Mapping[str, float]:
    places, times = _places(artifact), profile(artifact)
    total: dict[str, float] = {}
    for place, operation in zip(places, times, strict=True):
        total[place] = total.get(place, 0.0) + operation.seconds
    return total


def _places(artifact: Artifact) -> list[str]:
    names = artifact.manifest.get("places")
    listed = names.get("predict", []) if isinstance(names, dict) else []
    ops = artifact.program("predict").ops
    return [str(listed[i]) if i < len(listed) else op.name for i, op in enumerate(ops)]


def _reals(tensor: Tensor, stored: Array) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = stored.astype(np.float64)
    return (values - tensor.zero_point) * tensor.scale if tensor.dtype == DType.I8 else values


def _ratio(exact: Array | None, rounded: Array | None) -> float:
    if exact is None or rounded is None or exact.size != rounded.size:
        return math.nan
    reference = exact.astype(np.float64).reshape(-1)
    noise = np.square(rounded.astype(np.float64).reshape(-1) - reference).mean()
    signal = np.square(reference).mean()
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf


def _row(place: str, decibels: float, float_seconds: float, int8_seconds: float) -> tuple[str, ...]:
    noise = "" if math.isnan(decibels) else "exact" if math.isinf(decibels) else f"{decibels:.1f} dB"
    times = f"{float_seconds * 1e6:.1f} us", f"{int8_seconds * 1e6:.1f} us"
    return place, noise, *times, f"{float_seconds / int8_seconds:.2f}" if int8_seconds > 0 else ""
