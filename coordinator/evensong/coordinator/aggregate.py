"""The streaming weighted mean: one accumulator, however many devices report."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from evensong.wire.codec import Codec
from evensong.wire.errors import UpdateError
from evensong.wire.tensors import Layout, layout_size, split_tensors


class Accumulator:
    """Adds encoded updates into one flat float64 vector; memory is 8 bytes a parameter, and no update is kept.

    With a ``clip_norm`` no update counts with a larger L2 norm, whatever its device sent: what differential privacy
    relies on. That takes 8 bytes a parameter more. Updates added in the same order give the same bits. Not safe for use
    from two threads at once.
    """

    def __init__(self, layout: Layout, codec: Codec, *, max_weight: float = math.inf, clip_norm: float = 0.0) -> None:
        self.layout = layout
        self.codec = codec
        self.max_weight = max_weight
        self.clip_norm = clip_norm
        self.count = 0  #: updates added
        self.total_weight = 0.0
        self._sum = np.zeros(layout_size(layout), np.float64)
        self._clipped = np.empty_like(self._sum) if clip_norm else self._sum

    def add(self, data: bytes | memoryview, weight: float) -> None:
        """Adds ``weight * update``. Bad bytes or a bad weight raise :class:`WireError` and leave the sum as it was."""
        if not (math.isfinite(weight) and 0 < weight <= self.max_weight):
            raise UpdateError(
                "an update has a bad weight", expected=f"above 0, at most {self.max_weight:g}", got=weight
            )
        if self.clip_norm:
            self._add_clipped(data, weight)
        else:
            self.codec.accumulate(data, self.layout, weight, self._sum)
        self.total_weight += weight
        self.count += 1

    def _add_clipped(self, data: bytes | memoryview, weight: float) -> None:
        update = self._clipped
        update.fill(0.0)
        self.codec.accumulate(data, self.layout, 1.0, update)
        norm = float(np.linalg.norm(update))
        if norm > self.clip_norm:
            weight *= self.clip_norm / norm * (1 - 2.0**-40)  # what rounding adds stays below
        update *= weight
        self._sum += update

    def total(self) -> npt.NDArray[np.float64]:
        """The weighted sum so far, flat float64 [parameters]; a copy."""
        return self._sum.copy()

    def mean(self) -> dict[str, npt.NDArray[np.float64]]:
        """The weighted mean update so far, in the author's shapes; fresh arrays."""
        if not self.count:
            raise UpdateError("there is no mean of no updates", fix="Wait for the round's first report.")
        return split_tensors(self._sum / self.total_weight, self.layout)
