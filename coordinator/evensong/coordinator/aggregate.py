"""The streaming weighted mean: one accumulator, however many devices report."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from evensong.wire.codecs import UpdateCodec
from evensong.wire.errors import UpdateError
from evensong.wire.tensors import Layout, layout_size


class Accumulator:
    """Adds encoded updates into one flat float64 vector; memory is 8 bytes a parameter, and no update is kept.

    Updates added in the same order give the same bits. Not safe for use from two threads at once.
    """

    def __init__(self, layout: Layout, codec: UpdateCodec, *, max_weight: float = math.inf) -> None:
        self.layout = layout
        self.codec = codec
        self.max_weight = max_weight
        self.count = 0  #: updates added
        self.total_weight = 0.0
        self._sum = np.zeros(layout_size(layout), np.float64)

    def add(self, data: bytes | memoryview, weight: float) -> None:
        """Adds ``weight * update``. Bad bytes or a bad weight raise :class:`WireError` and leave the sum as it was."""
        if not (math.isfinite(weight) and 0 < weight <= self.max_weight):
            raise UpdateError(
                "an update has a bad weight", expected=f"above 0, at most {self.max_weight:g}", got=weight
            )
        self.codec.accumulate(data, self.layout, weight, self._sum)
        self.total_weight += weight
        self.count += 1

    def mean(self) -> dict[str, npt.NDArray[np.float64]]:
        """The weighted mean update so far, in the author's shapes; fresh arrays."""
        if not self.count:
            raise UpdateError("there is no mean of no updates", fix="Wait for the round's first report.")
        mean = self._sum / self.total_weight
        tensors: dict[str, npt.NDArray[np.float64]] = {}
        start = 0
        for spec in self.layout:
            tensors[spec.name] = mean[start : start + spec.size].reshape(spec.shape)
            start += spec.size
        return tensors
