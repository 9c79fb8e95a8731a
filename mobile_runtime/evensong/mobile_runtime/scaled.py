"""Weights that train in int8, as hosts see them: float32 in the author's shape.

The engine holds ``stored * scale``, with a scale for each output, and where the steps are compensated a residual of
eight more bits: ``(stored + residual / 256) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from evensong.wire.program import Artifact, DType, Region, Variable
from evensong.wire.variables import scaled, scales_of

HEADROOM = 1.2  #: of a channel's range over its largest weight when weights are set: they grow before the next time
MOST = 127
_FINE = 256

Float = npt.NDArray[np.float32]
Memory = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ScaledWeight:
    """One weight: live views of what the engine holds, in the engine's layout."""

    stored: npt.NDArray[np.int8]
    scale: Float
    residual: npt.NDArray[np.int8] | None
    residual_bytes: slice  #: in SLOTS; empty without one
    perm: tuple[int, ...]

    def get(self) -> Float:
        """The weight in the author's shape."""
        exact = self.stored.astype(np.float32)
        if self.residual is not None:
            exact += self.residual.astype(np.float32) / np.float32(_FINE)
        return np.array(scaled(exact, self.scale).transpose(self.perm), np.float32, order="C")

    def set(self, value: Float) -> None:
        """Chooses scales for a weight in the author's shape, and rounds it to them."""
        weight = value.transpose(np.argsort(self.perm))
        stored, scale, residual = quantize_weight(weight)
        self.stored[...], self.scale[...] = stored, scale
        if self.residual is not None:
            self.residual[...] = residual


def quantize_weight(weight: Float) -> tuple[npt.NDArray[np.int8], Float, npt.NDArray[np.int8]]:
    """An int8 weight, its scales ``[O]`` and its residual, of a float32 weight ``[O, ...]``."""
    rows = weight.reshape(len(weight), -1)
    scale = (np.abs(rows).max(axis=1) * np.float32(HEADROOM / MOST)).astype(np.float32)
    scale[scale < 1e-12] = np.float32(1 / MOST)
    fine = np.rint(rows / scale[:, None] * np.float32(_FINE)).astype(np.int32)
    stored = np.clip((fine + _FINE // 2) >> 8, -MOST, MOST)
    residual = np.clip(fine - stored * _FINE, -128, 127)
    shape = weight.shape
    return stored.astype(np.int8).reshape(shape), scale, residual.astype(np.int8).reshape(shape)


def scaled_weights(artifact: Artifact, state: Memory, slots: Memory) -> Mapping[str, ScaledWeight]:
    """Every weight of ``artifact`` that trains in int8, by name, over the live memory of an engine.

    Raises :class:`ArtifactError` where a weight and its scales do not fit.
    """
    residuals = _residuals(artifact)
    found = {}
    for name, scale in scales_of(artifact).items():
        weight = next(v for v in artifact.variables if v.name == name)
        place = residuals.get(weight.offset)
        span = slice(0, 0) if place is None else slice(place, place + weight.nbytes)
        found[name] = ScaledWeight(
            _live(weight, state),
            _live(scale, state),
            None if place is None else slots[span].view(np.int8).reshape(weight.dims),
            span,
            weight.perm,
        )
    return found


def _residuals(artifact: Artifact) -> dict[int, int]:
    """Where in SLOTS the residual of a weight lies, by the weight's place in STATE."""
    return {
        program.tensors[op.inputs[0]].offset: program.tensors[op.inputs[6]].offset
        for program in artifact.programs
        for op in program.ops
        if op.name in ("G_LINEAR_UPDATE", "G_CONV2D_UPDATE")
        and len(op.inputs) > 6
        and program.tensors[op.inputs[6]].region == Region.SLOTS
        and program.tensors[op.inputs[6]].dtype == DType.I8
    }


def _live(variable: Variable, state: Memory) -> npt.NDArray[Any]:
    span = state[variable.offset : variable.offset + variable.nbytes]
    return span.view(variable.dtype.numpy).reshape(variable.dims)
