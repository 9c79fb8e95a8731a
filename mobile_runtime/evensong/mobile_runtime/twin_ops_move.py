"""Operations that move elements of any dtype, and embeddings."""

from __future__ import annotations

import numpy as np

from evensong.mobile_runtime.errors import ExampleError
from evensong.mobile_runtime.twin_call import Array, Call, Kernel, rows


def transpose(call: Call, x: Array, **perm: int) -> Array:
    return x.transpose([perm[f"perm{axis}"] for axis in range(x.ndim)])


def concat(call: Call, *parts: Array, axis: int) -> Array:
    return np.concatenate(parts, axis)


def slice_(call: Call, x: Array, *, axis: int, start: int) -> Array:
    return x[along(axis, start, call.shapes[0][axis])]


def slice_grad(call: Call, dy: Array, *, axis: int, start: int) -> Array:
    dx = np.zeros(call.shapes[0], dy.dtype)
    dx[along(axis, start, dy.shape[axis])] = dy
    return dx


def along(axis: int, start: int, length: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(start, start + length),)


def copy(call: Call, x: Array) -> Array:
    return x


def embedding(call: Call, ids: Array, table: Array) -> Array:
    check_ids(ids, len(table))
    return table[ids]


def embedding_grad(call: Call, dy: Array, ids: Array) -> Array:
    dtable = np.zeros(call.shapes[0], np.float32)
    check_ids(ids, len(dtable))
    np.add.at(dtable, ids.ravel(), rows(dy))
    return dtable


def check_ids(ids: Array, count: int) -> None:
    if ids.min() < 0 or ids.max() >= count:
        raise ExampleError(
            "an embedding id is out of range", expected=f"0 to {count - 1}", got=f"{ids.min()} to {ids.max()}"
        )


KERNELS: dict[str, Kernel] = {
    "TRANSPOSE": transpose,
    "CONCAT": concat,
    "SLICE": slice_,
    "SLICE_GRAD": slice_grad,
    "COPY": copy,
    "EMBEDDING": embedding,
    "EMBEDDING_GRAD": embedding_grad,
}
