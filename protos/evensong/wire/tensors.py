"""Named tensors to bytes and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evensong.v1 import task_pb2
from evensong.wire.program import Variable


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that travels: its name in the model's ``state_dict`` and the author's shape. Always float32."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count


Layout = tuple[TensorSpec, ...]


def layout_of(variables: Iterable[Variable], personal: Sequence[str] = ()) -> Layout:
    """All float32 variables but those whose name matches a ``personal`` pattern (fnmatch), in the artifact's order."""
    raise NotImplementedError


def layout_to_proto(layout: Layout) -> list[task_pb2.TensorSpec]:
    raise NotImplementedError


def layout_from_proto(specs: Iterable[task_pb2.TensorSpec]) -> Layout:
    raise NotImplementedError


def layout_size(layout: Layout) -> int:
    """Number of values of all tensors together."""
    return sum(spec.size for spec in layout)


def encode_tensors(tensors: Mapping[str, npt.ArrayLike], layout: Layout) -> bytes:
    raise NotImplementedError


def decode_tensors(data: bytes | memoryview, layout: Layout) -> dict[str, npt.NDArray[np.float32]]:
    raise NotImplementedError
