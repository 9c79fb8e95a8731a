"""Variables as their author sees them, from the bytes of a STATE region."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import numpy.typing as npt

from evensong.wire.errors import ArtifactError
from evensong.wire.program import Artifact, DType, Variable

Float = npt.NDArray[np.float32]


def initial_values(artifact: Artifact) -> dict[str, Float]:
    """The float32 tensors that ``artifact`` starts from, in their author's shapes."""
    scales = scales_of(artifact)
    values: dict[str, Float] = {}
    for variable in artifact.variables:
        if variable.value_dtype != DType.F32 or variable.is_scale:
            continue
        stored = stored_values(variable, artifact.state)
        if variable.is_scaled:
            stored = scaled(stored.astype(np.float32), stored_values(scales[variable.name], artifact.state))
        values[variable.name] = np.array(stored.transpose(variable.perm), np.float32, order="C")
    return values


def scales_of(artifact: Artifact) -> Mapping[str, Variable]:
    """For each weight that trains in int8, by its name, the variable that holds its scales.

    Raises :class:`ArtifactError` where one is missing, does not fit, or stands alone.
    """
    found = {v.name.removesuffix(".scale"): v for v in artifact.variables if v.is_scale}
    weights = {v.name: v for v in artifact.variables if v.is_scaled}
    for name in found.keys() | weights.keys():
        weight, scale = weights.get(name), found.get(name)
        if weight is None or scale is None or scale.dtype != DType.F32 or scale.dims != weight.dims[:1]:
            raise ArtifactError(
                f"the int8 weight {name!r} and its scales do not fit",
                expected="int8 [O, ...] and float32 [O]",
                got=(weight and weight.dims, scale and scale.dims),
            )
    return found


def stored_values(variable: Variable, state: bytes) -> npt.NDArray[np.generic]:
    """A variable as it lies in ``state``, in the engine's layout."""
    count = prod(variable.dims)
    return np.frombuffer(state, variable.dtype.numpy, count, variable.offset).reshape(variable.dims)


def scaled(stored: Float, scale: npt.NDArray[np.generic]) -> Float:
    """``stored * scale``, with one scale for each place of the first dimension."""
    return stored * scale.astype(np.float32).reshape(-1, *(1,) * (stored.ndim - 1))
