"""Model updates to bytes and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evensong.v1 import task_pb2
from evensong.wire.tensors import Layout

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class UpdateCodec:
    """``bits`` None: float32; 1 to 16: stochastic integers. ``block_size`` 0: one scale a tensor; else a multiple of 8."""

    bits: int | None = 8
    block_size: int = 0

    @classmethod
    def from_plan(cls, plan: task_pb2.UpdatePlan) -> UpdateCodec:
        raise NotImplementedError

    def to_plan(self) -> task_pb2.UpdatePlan:
        """Only ``codec``, ``bits`` and ``block_size`` are set."""
        raise NotImplementedError

    def encoded_bytes(self, layout: Layout) -> int:
        raise NotImplementedError

    def encode(self, delta: Mapping[str, npt.ArrayLike], layout: Layout, rng: np.random.Generator) -> bytes:
        raise NotImplementedError

    def decode(self, data: bytes | memoryview, layout: Layout) -> dict[str, FloatArray]:
        raise NotImplementedError

    def accumulate(
        self, data: bytes | memoryview, layout: Layout, weight: float, into: npt.NDArray[np.float64]
    ) -> None:
        """Adds ``weight * update`` to the flat ``into`` [layout_size(layout)]; checks everything before it adds anything."""
        raise NotImplementedError


def clip_to_norm(delta: Mapping[str, npt.ArrayLike], clip_norm: float) -> tuple[dict[str, FloatArray], float]:
    """The delta scaled to an L2 norm (over all tensors) of at most ``clip_norm``, and its norm before. 0 does not clip."""
    raise NotImplementedError
