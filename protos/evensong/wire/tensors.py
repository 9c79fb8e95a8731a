"""Named float32 tensors to bytes and back: model parameters, as version manifests address them.

The body after the frame (:mod:`evensong.wire.frame`, magic ``EVTN``, version 1), little-endian:

- ``u32`` number of tensors;
- for each tensor: its name (``u16`` length and that many bytes of UTF-8, 1 to 255), ``u8`` rank, ``u32`` dimensions;
- for each tensor in the same order: zeros up to a multiple of 64 bytes from the start of the frame, then its values
  (``f32``, row-major);
- nothing after the last value.

Values are finite. The order is the layout's, so that equal tensors give equal bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from math import prod
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from evensong.v1 import task_pb2
from evensong.wire.cursor import Cursor, pack_name
from evensong.wire.errors import CorruptError, UpdateError
from evensong.wire.frame import HEADER_BYTES, open_frame, seal
from evensong.wire.program import ALIGNMENT, MAX_RANK, DType, Variable

MAGIC = b"EVTN"
VERSION = 1
MAX_LAYOUT_BYTES = 1 << 31

FloatArray = npt.NDArray[np.float32]
_Float = TypeVar("_Float", bound=np.floating)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that travels: its name in the model's ``state_dict`` and the author's shape. Always float32."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


Layout = tuple[TensorSpec, ...]


# -------------------------------------------------------------------------------------------------------------- layouts


def layout_of(variables: Iterable[Variable], personal: Sequence[str] = ()) -> Layout:
    """All variables that are float32 to their author, in the artifact's order, but those whose name matches a
    ``personal`` pattern (fnmatch).
    """
    return tuple(
        TensorSpec(variable.name, variable.shape)
        for variable in variables
        if variable.value_dtype == DType.F32
        and not variable.is_scale
        and not any(fnmatchcase(variable.name, pattern) for pattern in personal)
    )


def layout_size(layout: Layout) -> int:
    """Number of values of all tensors together."""
    return sum(spec.size for spec in layout)


def split_tensors(flat: npt.NDArray[_Float], layout: Layout) -> dict[str, npt.NDArray[_Float]]:
    """A flat vector [``layout_size(layout)``] as views of it in the author's shapes."""
    tensors: dict[str, npt.NDArray[_Float]] = {}
    start = 0
    for spec in layout:
        tensors[spec.name] = flat[start : start + spec.size].reshape(spec.shape)
        start += spec.size
    return tensors


def layout_to_proto(layout: Layout) -> list[task_pb2.TensorSpec]:
    """The layout as a task bundle carries it."""
    return [task_pb2.TensorSpec(name=spec.name, shape=spec.shape) for spec in layout]


def layout_from_proto(specs: Iterable[task_pb2.TensorSpec]) -> Layout:
    """The layout of a task bundle, checked: hostile input raises :class:`UpdateError`."""
    layout = tuple(TensorSpec(spec.name, tuple(spec.shape)) for spec in specs)
    if not layout:
        raise UpdateError("the layout has no tensor", fix="Leave at least one tensor of the model to travel.")
    for spec in layout:
        if not 1 <= len(spec.name.encode()) <= 255:
            raise UpdateError("a tensor's name must have 1 to 255 bytes of UTF-8", got=repr(spec.name))
        if len(spec.shape) > MAX_RANK or 0 in spec.shape:
            raise UpdateError(
                f"tensor {spec.name!r} has a bad shape",
                expected=f"at most {MAX_RANK} dimensions, none of them 0",
                got=spec.shape,
            )
    if len({spec.name for spec in layout}) != len(layout):
        raise UpdateError("two tensors of the layout share a name")
    if 4 * layout_size(layout) > MAX_LAYOUT_BYTES:
        raise UpdateError(
            "the layout is too large", expected=f"at most {MAX_LAYOUT_BYTES} bytes", got=4 * layout_size(layout)
        )
    return layout


@lru_cache(maxsize=256)
def layout_table(layout: Layout) -> bytes:
    """Names and shapes as bytes: count, then each tensor's record."""
    table = bytearray(len(layout).to_bytes(4, "little"))
    for spec in layout:
        table += pack_name(spec.name) + bytes([len(spec.shape)])
        table += b"".join(dim.to_bytes(4, "little") for dim in spec.shape)
    return bytes(table)


# -------------------------------------------------------------------------------------------------------------- tensors


def encode_tensors(tensors: Mapping[str, npt.ArrayLike], layout: Layout) -> bytes:
    """The one byte string of ``tensors``: exactly those of ``layout``, all finite, else :class:`UpdateError`."""
    values = check_tensors(tensors, layout)
    starts, total = _places(layout)
    buffer = bytearray(total)
    table = layout_table(layout)
    buffer[HEADER_BYTES : HEADER_BYTES + len(table)] = table
    for spec, start in zip(layout, starts, strict=True):
        target = np.frombuffer(buffer, "<f4", spec.size, start)
        target[:] = values[spec.name].reshape(-1)
    return seal(buffer, MAGIC, VERSION)


def decode_tensors(data: bytes | memoryview, layout: Layout) -> dict[str, FloatArray]:
    """Fresh float32 arrays in the author's shapes, in the layout's order.

    Raises :class:`CorruptError` for damaged bytes and :class:`UpdateError` for tensors that are not those of ``layout``
    or not finite. Memory is taken only after the length and the layout were found right.
    """
    view = memoryview(data)
    body = open_frame(view, MAGIC, VERSION, "a tensor file")
    table = layout_table(layout)
    if body[: len(table)] != table:
        _refuse_layout(body, layout)
    starts, total = _places(layout)
    if len(view) != total:
        raise CorruptError(
            "the tensor file has a wrong length for its tensors", expected=f"{total} bytes", got=len(view)
        )
    end = HEADER_BYTES + len(table)
    tensors: dict[str, FloatArray] = {}
    for spec, start in zip(layout, starts, strict=True):
        if any(view[end:start]):
            raise CorruptError(f"the padding before tensor {spec.name!r} is not zero")
        values = np.frombuffer(view, "<f4", spec.size, start).astype(np.float32).reshape(spec.shape)
        _require_finite(values, spec.name)
        tensors[spec.name] = values
        end = start + 4 * spec.size
    return tensors


def check_tensors(tensors: Mapping[str, npt.ArrayLike], layout: Layout) -> dict[str, FloatArray]:
    """``tensors`` as C-ordered float32 arrays (copied only where needed), exactly those of ``layout``, all finite."""
    _require_names(tensors, layout)
    checked: dict[str, FloatArray] = {}
    for spec in layout:
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite and is refused below
            values = np.ascontiguousarray(tensors[spec.name], dtype=np.float32).reshape(np.shape(tensors[spec.name]))
        if values.shape != spec.shape:
            raise UpdateError(f"tensor {spec.name!r} has the wrong shape", expected=spec.shape, got=values.shape)
        _require_finite(values, spec.name)
        checked[spec.name] = values
    return checked


def _places(layout: Layout) -> tuple[list[int], int]:
    """Where each tensor starts, and the length of the whole."""
    starts: list[int] = []
    end = HEADER_BYTES + len(layout_table(layout))
    for spec in layout:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        starts.append(start)
        end = start + 4 * spec.size
    return starts, end


def _require_names(names: Iterable[str], layout: Layout) -> None:
    expected, came = {spec.name for spec in layout}, set(names)
    if expected != came:
        raise UpdateError(
            "the tensors are not those of the layout",
            expected=f"{len(expected)} tensors",
            got=f"missing {_some(expected - came)}, extra {_some(came - expected)}",
        )


def _some(names: set[str]) -> str:
    """The first names of a set, for a message that stays readable."""
    shown = ", ".join(repr(name[:80]) for name in sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"


def _require_finite(values: FloatArray, name: str) -> None:
    if not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise UpdateError(
            f"tensor {name!r} is not finite", expected="no NaN or infinity", got=f"{bad} of {values.size}"
        )


def _refuse_layout(body: memoryview, layout: Layout) -> None:
    """Reads the table that came, to say how it differs from ``layout``."""
    cursor = Cursor(body, "a tensor file")
    shapes: dict[str, tuple[int, ...]] = {}
    for _ in range(cursor.u32()):  # ends with CorruptError at the latest where the bytes end
        name = cursor.name()
        shapes[name] = tuple(cursor.u32() for _ in range(cursor.u8()))
    _require_names(shapes, layout)
    for spec in layout:
        if shapes[spec.name] != spec.shape:
            raise UpdateError(f"tensor {spec.name!r} has the wrong shape", expected=spec.shape, got=shapes[spec.name])
    raise UpdateError("the tensors are not in the layout's order", expected=[spec.name for spec in layout][:3])
