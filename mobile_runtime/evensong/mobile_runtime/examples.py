"""Examples and labels on their way into a program: checked, and cast only where nothing can be lost unnoticed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.errors import ExampleError
from evensong.mobile_runtime.text import encode_text, is_text
from evensong.wire.program import DType, Program, Tensor

Array = npt.NDArray[Any]

_SMALL = 1 << 13  # up to this many elements a dot product finds NaN and infinity faster than isfinite, on one thread


@dataclass(frozen=True)
class InputPort:
    """One input of a program: ``[n * rows, ...]`` if it is batched, else exactly ``shape``."""

    name: str
    dtype: DType
    numpy: np.dtype[Any]
    shape: tuple[int, ...]
    rows: int  #: of dimension 0 per example; 0 if the port is not batched

    @classmethod
    def of(cls, program: Program, index: int) -> InputPort:
        port = program.inputs[index]
        tensor = program.tensors[port.tensor]
        return cls(
            port.name, tensor.dtype, np.dtype(tensor.dtype.numpy), tensor.dims, rows_per_example(tensor, program)
        )

    def check(self, value: npt.ArrayLike) -> Array:
        """``value`` as a C-contiguous array of the port's dtype and shape; copied only if it has to be.

        float32 takes every float and integer type but uint8 (pixels that were not scaled are the commonest mistake);
        integer ports take integers and booleans in range; uint8 takes strings too, see :func:`encode_text`. Raises
        :class:`ExampleError`.
        """
        array = np.asarray(value)
        if self.dtype == DType.U8 and len(self.shape) > 1 and is_text(array):
            array = encode_text(array, self.shape[-1])
        if array.dtype != self.numpy:
            array = self._cast(array)
        expected = array.shape[:1] + self.shape[1:] if self.rows and array.ndim else self.shape
        if array.shape != expected or (self.rows and (not len(array) or len(array) % self.rows)):
            raise ExampleError(f"{self.name!r} has the wrong shape", expected=self._shape_text(), got=array.shape)
        array = np.ascontiguousarray(array)
        if self.dtype == DType.F32 and not all_finite(array):
            raise ExampleError(f"{self.name!r} holds NaN or infinite values", expected="finite numbers")
        return array

    def _cast(self, array: Array) -> Array:
        kind = array.dtype.kind
        if self.dtype == DType.F32 and kind in "fiu" and array.dtype != np.uint8:
            with np.errstate(over="ignore"):  # what overflows is then found not finite
                return array.astype(self.numpy)
        if self.dtype != DType.F32 and kind in "iub":
            limits = np.iinfo(self.numpy)
            if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
                raise ExampleError(
                    f"{self.name!r} is out of range",
                    expected=f"{limits.min} to {limits.max}",
                    got=f"{array.min()} to {array.max()}",
                )
            return array.astype(self.numpy)
        raise ExampleError(
            f"{self.name!r} has the wrong dtype",
            expected=self.numpy.name,
            got=array.dtype,
            fix="Scale the pixels as in training, such as x.astype('float32') / 255, or put Rescaling into the model."
            if array.dtype == np.uint8
            else None,
        )

    def _shape_text(self) -> str:
        if not self.rows:
            return str(self.shape)
        first = "n" if self.rows == 1 else f"n * {self.rows}"
        return f"({', '.join([first, *map(str, self.shape[1:])])}{',' if len(self.shape) == 1 else ''})"


def rows_per_example(tensor: Tensor, program: Program) -> int:
    """Rows of dimension 0 that belong to one example; 0 for a tensor that is not batched."""
    return tensor.dims[0] // program.max_batch if tensor.batched else 0


def all_finite(array: Array) -> bool:
    """Whether no element of a float32 array is NaN or infinite."""
    if array.size <= _SMALL and math.isfinite(np.vdot(array, array)):
        return True
    return bool(np.isfinite(array).all())
