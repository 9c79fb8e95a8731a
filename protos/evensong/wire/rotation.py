"""The randomised Hadamard rotation: an orthogonal map that spreads a vector's energy evenly over its coordinates.

Quantisers pay for the largest coordinate; after the rotation all coordinates are about equally large, and about
Gaussian (Suresh et al., *Distributed mean estimation with limited communication*, ICML 2017). The usual construction
needs a power of two and pads up to it, at worst doubling the bytes. This one rotates ``d`` coordinates in place: with
``h`` the largest power of two that is at most ``d``,

1. flip the signs that the seed says, and apply the normalised Walsh-Hadamard transform to the first ``h`` coordinates;
2. unless ``d`` is ``h``: flip a second set of signs, and transform the last ``h`` coordinates.

The two windows overlap, since ``2 h > d``. Of a vector whose energy was all in one place no coordinate holds more than
about ``1 / h < 2 / d``.

Signs come from the AES-128-CTR keystream (initial block zero) under the 16-byte seed: bit ``k`` of byte ``j`` (least
significant first) flips coordinate ``8 j + k``; the second set begins at the next whole byte.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from evensong.wire.tensors import FloatArray

SEED_BYTES = 16

_LABEL = b"evensong/v1/rotation\0"
_PIECE = 1 << 16  # values worked on at once: they stay in the cache
_FACTOR_BITS = 6  # of the Hadamard matrices that a transform is made of: 64 x 64


def rotation_seed(bundle_sha256: bytes, work: int, round: int) -> bytes:
    """The 16-byte seed that all devices of a round share: it is no secret, only independent of deltas.

    The first bytes of SHA-256 over the label, the bundle's hash (32), the work (u8) and the round (u64).
    """
    bound = _LABEL + bundle_sha256 + work.to_bytes(1, "little") + round.to_bytes(8, "little")
    return hashlib.sha256(bound).digest()[:SEED_BYTES]


def rotate(values: npt.ArrayLike, seed: bytes) -> FloatArray:
    """The rotation of float32 [d], as a fresh array. Beyond it, memory is a quarter byte a value and some cache."""
    rotated = np.array(values, np.float32)
    rotate_in_place(rotated, seed)
    return rotated


def unrotate(values: npt.ArrayLike, seed: bytes) -> FloatArray:
    """What was rotated, up to rounding: float32 [d], a fresh array."""
    restored = np.array(values, np.float32)
    unrotate_in_place(restored, seed)
    return restored


def rotate_in_place(values: npt.NDArray[np.floating], seed: bytes) -> None:
    """:func:`rotate` on contiguous float32 or float64 [d]."""
    size = _check(values)
    half = _window(size)
    signs = _signs(seed, size)
    _flip(values, signs[0])
    _transform(values[:half])
    if half < size:
        _flip(values, signs[1])
        _transform(values[size - half :])


def unrotate_in_place(values: npt.NDArray[np.floating], seed: bytes) -> None:
    """:func:`unrotate` on contiguous float32 or float64 [d]."""
    size = _check(values)
    half = _window(size)
    signs = _signs(seed, size)
    if half < size:
        _transform(values[size - half :])
        _flip(values, signs[1])
    _transform(values[:half])
    _flip(values, signs[0])


def _check(values: npt.NDArray[np.floating]) -> int:
    if values.ndim != 1 or values.dtype not in (np.float32, np.float64) or not values.flags.c_contiguous:
        raise ValueError(f"a rotation needs contiguous float32 or float64 [d], got {values.dtype} {values.shape}")
    return values.size


def _window(size: int) -> int:
    """The largest power of two that is at most ``size``."""
    return 1 << size.bit_length() - 1 if size else 0


# ---------------------------------------------------------------------------------------------------------------- signs


def _signs(seed: bytes, size: int) -> npt.NDArray[np.uint8]:
    """The two sets of sign bits, uint8 [2, ceil(size / 8)]."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a rotation's seed has {SEED_BYTES} bytes, got {len(seed)}")
    keystream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    count = -(-size // 8)
    return np.frombuffer(keystream.update(bytes(2 * count)), np.uint8).reshape(2, count)


def _flip(values: npt.NDArray[np.floating], signs: npt.NDArray[np.uint8]) -> None:
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


def _transform(values: npt.NDArray[np.floating]) -> None:
    """The normalised Walsh-Hadamard transform of 2^m contiguous values, in place.

    The matrix of 2^m is the Kronecker product of matrices up to 64 x 64, one for each group of index bits. So the
    transform is a few passes of small matrix products, which BLAS does faster than memory brings the values. A pass
    works on pieces that stay in the cache; the first one scales, so that nothing can overflow.
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
    values: npt.NDArray[np.floating], matrix: npt.NDArray[np.floating], buffer: npt.NDArray[np.floating]
) -> None:
    width = matrix.shape[0]
    rows = max(1, buffer.size // width)
    for start in range(0, values.shape[0], rows):
        piece = values[start : start + rows]
        product = buffer[: piece.size].reshape(piece.shape)
        np.matmul(piece, matrix, out=product)
        piece[...] = product


def _transform_columns(
    values: npt.NDArray[np.floating], matrix: npt.NDArray[np.floating], buffer: npt.NDArray[np.floating]
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
