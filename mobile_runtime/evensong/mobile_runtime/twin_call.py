"""What an operation of the NumPy twin sees besides its operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.errors import DivergedError
from evensong.wire.program import Tensor

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]

#: ``kernel(call, *inputs, **attributes)`` returns its outputs; operands that it updates are written in place.
Kernel = Callable[..., "Array | tuple[Array, ...] | None"]


@dataclass(frozen=True)
class Clock:
    """What one run of a program shares between its operations."""

    learning_rate: float
    step: int  #: from 1
    seed: int


@dataclass(frozen=True)
class Call:
    """One operation of one run. Shapes are live: dimension 0 of a batched tensor is scaled to the run's batch."""

    shapes: tuple[tuple[int, ...], ...]  #: of the outputs
    inputs: tuple[Tensor, ...]  #: declarations, for scale and zero point
    outputs: tuple[Tensor, ...]
    clock: Clock


def rows(x: Array) -> Array:
    """``x`` as a matrix ``[M, last dimension]``."""
    return x.reshape(-1, x.shape[-1])


def finite_loss(loss: np.floating[Any]) -> Float:
    """``loss`` as the tensor ``[1]``; raises :class:`DivergedError` if it is NaN or infinite."""
    if not np.isfinite(loss):
        raise DivergedError("the loss is not finite", got=float(loss))
    return np.array([loss], np.float32)
