"""The randomised Hadamard rotation: an orthogonal map that spreads a vector's energy evenly over its coordinates.

Quantisers pay for the largest coordinate; after the rotation all coordinates are about equally large, and about
Gaussian (Suresh et al., *Distributed mean estimation with limited communication*, ICML 2017). The usual construction
needs a power of two and pads up to it, at worst doubling the bytes. This one rotates exactly ``d`` coordinates: with
``h`` the largest power of two that is at most ``d``,

1. unless ``d`` is ``h``: permute, ``y[i] = x[(a i + b) mod d]``, so that every stretch of the vector has its share in
   each of the two windows that follow;
2. flip the signs that the seed says, and apply the normalised Walsh-Hadamard transform to the first ``h`` coordinates;
3. unless ``d`` is ``h``: flip a second set of signs, and transform the last ``h`` coordinates.

The two windows overlap, since ``2 h > d``. Even of a vector whose energy was all in one place no coordinate holds more
than about ``1 / h < 2 / d``.

All choices come from the AES-128-CTR keystream (initial block zero) under the 16-byte seed: two ``u64``, ``u`` and
``v``, then the two sets of signs, of ``ceil(d / 8)`` bytes each: bit ``k`` of byte ``j`` (least significant first), if
set, flips coordinate ``8 j + k``. ``a`` is the first number from ``1 + u mod (d - 1)`` on that is coprime to ``d``, and
``b`` is ``v mod d``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Floating = TypeVar("Floating", np.float32, np.float64)

SEED_BYTES = 16

_LABEL = b"evensong/v1/rotation\0"
_PIECE = 1 << 14  # values worked on at once: they stay in the cache
_FACTOR_BITS = 4  # of the Hadamard matrices that a transform is made of: 16 x 16


def rotation_seed(bundle_sha256: bytes, work: int, round: int) -> bytes:
    """The 16-byte seed that all devices of a round share: it is no secret, only independent of deltas.

    The first bytes of SHA-256 over the label, the bundle's hash (32), the work (u8) and the round (u64).
    """
    bound = _LABEL + bundle_sha256 + work.to_bytes(1, "little") + round.to_bytes(8, "little")
    return hashlib.sha256(bound).digest()[:SEED_BYTES]


def rotate(values: npt.NDArray[Floating], seed: bytes) -> npt.NDArray[Floating]:
    """The rotation of float32 or float64 [d], as a fresh array; besides it, a quarter byte a value and some cache."""
    _check(values)
    size, draws = values.size, _Draws(seed, values.size)
    window = _window(size)
    if window == size:
        rotated = values.copy()
    else:
        rotated = np.empty_like(values)
        for place, source in draws.permutation():
            np.take(values, source, out=rotated[place], mode="clip")  # all are in range; "raise" would buffer
    _flip(rotated, draws.signs[0])
    _transform(rotated[:window])
    if window < size:
        _flip(rotated, draws.signs[1])
        _transform(rotated[size - window :])
    return rotated


def unrotate(values: npt.NDArray[Floating], seed: bytes) -> npt.NDArray[Floating]:
    """What was rotated, up to rounding, as a fresh array."""
    _check(values)
    size, draws = values.size, _Draws(seed, values.size)
    window = _window(size)
    mixed = values.copy()
    if window < size:
        _transform(mixed[size - window :])
        _flip(mixed, draws.signs[1])
    _transform(mixed[:window])
    _flip(mixed, draws.signs[0])
    if window == size:
        return mixed
    restored = np.empty_like(values)
    for place, source in draws.permutation():
        restored[source] = mixed[place]
    return restored


def inner_product(left: npt.NDArray[np.floating], right: npt.NDArray[np.floating]) -> float:
    """In float64, by pieces; without BLAS, whose threads cost more than they bring at this size."""
    total = 0.0
    for start in range(0, left.size, _PIECE):
        parts = left[start : start + _PIECE].astype(np.float64), right[start : start + _PIECE].astype(np.float64)
        total += float(np.einsum("i,i->", *parts))
    return total


def _check(values: npt.NDArray[Floating]) -> None:
    if values.ndim != 1 or values.dtype not in (np.float32, np.float64) or not values.flags.c_contiguous:
        raise ValueError(f"a rotation needs contiguous float32 or float64 [d], got {values.dtype} {values.shape}")


def _window(size: int) -> int:
    """The largest power of two that is at most ``size``."""
    return 1 << size.bit_length() - 1 if size else 0


# ------------------------------------------------------------------------------------------------ permutation and signs


class _Draws:
    """What a seed says about the rotation of ``size`` values. ``signs``: bits, uint8 [2, ceil(size / 8)]."""

    def __init__(self, seed: bytes, size: int) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a rotation's seed has {SEED_BYTES} bytes, got {len(seed)}")
        count = -(-size // 8)
        stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(16 + 2 * count))
        self.signs = np.frombuffer(stream, np.uint8, offset=16).reshape(2, count)
        self._size = size
        self._step = 1 + int.from_bytes(stream[:8], "little") % max(1, size - 1)
        while math.gcd(self._step, size) > 1:
            self._step += 1
        self._start = int.from_bytes(stream[8:16], "little") % max(1, size)

    def permutation(self) -> Iterator[tuple[slice, npt.NDArray[np.int64]]]:
        """Piece by piece: a stretch of the permuted vector, and the places that its values come from."""
        size, start = self._size, self._start
        offsets = self._step * np.arange(min(_PIECE, size), dtype=np.int64) % size
        for first in range(0, size, _PIECE):
            source = offsets[: size - first] + start
            source -= size * (source >= size)
            yield slice(first, first + source.size), source
            start = (start + self._step * _PIECE) % size


def _flip(values: npt.NDArray[Floating], signs: npt.NDArray[np.uint8]) -> None:
    """Negates in place by the sign bit: exact, and cheaper than a product."""
    words = values.view(np.uint32 if values.dtype == np.float32 else np.uint64)
    top = words.itemsize * 8 - 1
    for start in range(0, values.size, _PIECE):
        piece = words[start : start + _PIECE]
        bits = np.unpackbits(signs[start // 8 : (start + _PIECE) // 8], count=piece.size, bitorder="little")
        flips = bits.astype(words.dtype)
        flips <<= words.dtype.type(top)
        np.bitwise_xor(piece, flips, out=piece)


# ------------------------------------------------------------------------------------------------------------ transform


def _transform(values: npt.NDArray[Floating]) -> None:
    """The normalised Walsh-Hadamard transform of 2^m contiguous values, in place.

    The matrix of 2^m is the Kronecker product of matrices up to 16 x 16, one for each group of index bits. So the
    transform is a few passes of small matrix products, which BLAS does faster than memory brings the values. A pass
    works on pieces that stay in the cache, and are too small for BLAS to wake its threads (OpenBLAS: 2^18 products),
    which costs more than it brings on a busy machine. The first pass scales, so that nothing can overflow.
    """
    size = values.size
    if not size:
        return
    bits = size.bit_length() - 1
    inner, scale = 1, 2.0 ** (-bits / 2)
    buffer = np.empty(min(size, _PIECE), values.dtype)
    passes = max(1, math.ceil(bits / _FACTOR_BITS))
    for index in range(passes):
        width = 1 << (bits * (index + 1) // passes - bits * index // passes)
        matrix = (_hadamard(width) * (scale if index == 0 else 1.0)).astype(values.dtype)
        if inner == 1:
            _transform_rows(values.reshape(-1, width), matrix, buffer)
        else:
            _transform_columns(values.reshape(-1, width, inner), matrix, buffer)
        inner *= width


def _transform_rows(
    values: npt.NDArray[Floating], matrix: npt.NDArray[Floating], buffer: npt.NDArray[Floating]
) -> None:
    width = matrix.shape[0]
    rows = max(1, buffer.size // width)
    for start in range(0, values.shape[0], rows):
        piece = values[start : start + rows]
        product = buffer[: piece.size].reshape(piece.shape)
        np.matmul(piece, matrix, out=product)
        piece[...] = product


def _transform_columns(
    values: npt.NDArray[Floating], matrix: npt.NDArray[Floating], buffer: npt.NDArray[Floating]
) -> None:
    """Along the middle axis of [outer, width, inner]: several whole matrices at once, or parts of one that is large."""
    outer, width, inner = values.shape
    columns = min(inner, buffer.size // width)
    matrices = max(1, buffer.size // (width * columns))
    for first in range(0, outer, matrices):
        for start in range(0, inner, columns):
            piece = values[first : first + matrices, :, start : start + columns]
            product = buffer[: piece.size].reshape(piece.shape)
            np.matmul(matrix, piece, out=product)
            piece[...] = product


@cache
def _hadamard(width: int) -> npt.NDArray[np.float64]:
    """Sylvester's matrix, entries 1 and -1."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < width:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix
