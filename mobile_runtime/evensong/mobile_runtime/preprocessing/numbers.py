"""Numbers: scaled, standardised, cut into intervals; and integers spread over columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from evensong.mobile_runtime.errors import CompileError
from evensong.mobile_runtime.preprocessing.calls import one_hot
from evensong.mobile_runtime.preprocessing.learned import Learned, fail_unlearned

_LEAST_DEVIATION = 1e-7  # what does not vary is only centred


class Rescaling(nn.Module):
    """``x * scale + offset`` in float32; ``Rescaling(1 / 255)`` brings pixels to 0 to 1. Takes any dtype and shape."""

    def __init__(self, scale: float, offset: float = 0.0) -> None:
        super().__init__()
        self.scale = float(scale)
        self.offset = float(offset)

    def forward(self, x: Tensor) -> Tensor:
        return torch.rsub(x.float(), self.offset, alpha=-self.scale)


class Normalization(Learned):
    """``(x - mean) / sqrt(variance)`` in float32.

    ``axis`` is the axis of ``x`` that has a mean and a variance for each of its places: -1 for tables, 1 for images
    ``[n, C, H, W]``; None takes one of each for everything. Both are given, or learned from an array ``[n, ...]``
    like ``x`` by :meth:`adapt`.
    """

    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        axis: int | None = -1,
        mean: float | Sequence[float] | None = None,
        variance: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (variance is None) or axis == 0:
            raise CompileError("Normalization takes mean and variance or neither, and not the batch axis", got=axis)
        self.axis = axis
        self.register_buffer("mean", _row([] if mean is None else mean))
        self.register_buffer("variance", _row([] if variance is None else variance))

    def adapt(self, data: npt.ArrayLike) -> None:
        array = np.asarray(data, np.float64)
        kept = None if self.axis is None else self.axis % array.ndim
        others = tuple(axis for axis in range(array.ndim) if axis != kept)
        self.mean, self.variance = _row(array.mean(axis=others)), _row(array.var(axis=others))

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.mean):
            fail_unlearned(self, "mean and variance")
        places = [1] * (0 if self.axis is None else x.dim() - 1 - self.axis % x.dim())
        inverse = 1 / torch.sqrt(self.variance).clamp(min=_LEAST_DEVIATION)
        return (x.float() - self.mean.reshape(-1, *places)) * inverse.reshape(-1, *places)


class Discretization(Learned):
    """The number of the interval that ``x`` lies in, int64: 0 below the first boundary, 1 from there on, ...

    ``boundaries`` ascend; or ``adapt(data)`` finds those that cut ``data`` into ``bins`` parts of equal size.
    """

    boundaries: Tensor

    def __init__(self, boundaries: Sequence[float] | None = None, *, bins: int | None = None) -> None:
        super().__init__()
        if (boundaries is None) == (bins is None) or (bins is not None and bins < 2):
            raise CompileError("Discretization takes boundaries, or at least two bins to learn", got=(boundaries, bins))
        self.bins = bins
        self.register_buffer("boundaries", _row(sorted(boundaries or [])))

    def adapt(self, data: npt.ArrayLike) -> None:
        shares = np.arange(1, self.bins or 1) / (self.bins or 1)
        self.boundaries = _row(np.unique(np.quantile(np.asarray(data, np.float64), shares).astype(np.float32)))

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.boundaries):
            fail_unlearned(self, "boundaries")
        return torch.bucketize(x.float(), self.boundaries, right=True)


class CategoryEncoding(nn.Module):
    """Integers 0 to ``tokens - 1`` as float32 columns.

    ``"one_hot"``: ids ``[...]`` (or ``[..., 1]``) -> ``[..., tokens]``. ``"multi_hot"`` and ``"count"``: ids
    ``[..., n]`` -> ``[..., tokens]``, which ids there are, or how often. Negative ids count nowhere; an id that is too
    large is an :class:`ExampleError`.
    """

    def __init__(self, tokens: int, mode: Literal["one_hot", "multi_hot", "count"] = "one_hot") -> None:
        super().__init__()
        if tokens < 1 or mode not in ("one_hot", "multi_hot", "count"):
            raise CompileError("CategoryEncoding cannot do that", expected="one_hot, multi_hot or count", got=mode)
        self.tokens = tokens
        self.mode = mode

    def forward(self, ids: Tensor) -> Tensor:
        if self.mode == "one_hot" and (ids.dim() == 1 or ids.shape[-1] != 1):
            ids = ids.unsqueeze(-1)
        return one_hot(ids, self.tokens, 0, self.mode == "count")


def _row(values: float | npt.ArrayLike) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32).reshape(-1))
