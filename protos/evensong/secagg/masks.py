"""Masks: keystreams that hide a vector, added and taken away.

A mask is the AES-128-CTR keystream (SP 800-38A) under its key from counter 0, read as little-endian 64-bit lanes, and
lanes are added modulo 2^64. A vector is worked on in pieces: a piece and the keystream's stay in the cache
while all streams pass over it. ``update_into`` and NumPy release the interpreter's lock, so threads share the lanes,
and each starts its keystreams at its own counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CTR

Lanes = npt.NDArray[np.uint64]
Mask = tuple[bytes, int]  #: key of 16 bytes, and +1 to add or -1 to take away

PIECE_BYTES = 1 << 19
_PIECE_LANES = PIECE_BYTES // 8
_BLOCK_BYTES = 16
_STREAMS = 256  # open at a time
_LANE = np.dtype("<u8")
_ZEROS = memoryview(bytes(PIECE_BYTES))
_FROM_ZERO = CTR(bytes(_BLOCK_BYTES))


class Scratch:
    """One piece of keystream: a buffer, and its view as lanes."""

    def __init__(self, lanes: int = _PIECE_LANES) -> None:
        self.buffer = bytearray(min(lanes, _PIECE_LANES) * 8 + _BLOCK_BYTES - 1)
        self.lanes: npt.NDArray[Any] = np.frombuffer(self.buffer, _LANE, count=min(lanes, _PIECE_LANES))


def add_mask(lanes: Lanes, key: bytes, sign: int, scratch: Scratch) -> None:
    """Adds (``sign`` 1) or subtracts (-1) the mask of ``key`` in place; ``scratch`` holds a piece, or all lanes."""
    _pass_over(lanes, [(key, sign)], 0, scratch)


def apply_masks(lanes: Lanes, masks: Sequence[Mask], threads: int = 1) -> None:
    """Adds or subtracts all masks in place. ``lanes`` has one dimension and is contiguous."""
    if lanes.dtype != np.uint64 or lanes.ndim != 1 or not lanes.flags.c_contiguous:
        raise ValueError(f"lanes must be one contiguous row of uint64, got {lanes.dtype} of shape {lanes.shape}")
    # A thread's share is whole pieces; below two pieces it would cost more than it gains.
    pieces = -(-len(lanes) // _PIECE_LANES)
    workers = max(1, min(threads, pieces))
    share = -(-pieces // workers) * _PIECE_LANES
    if workers == 1:
        _pass_over(lanes, masks, 0, Scratch(len(lanes)))
        return
    with ThreadPoolExecutor(workers) as pool:
        starts = range(0, len(lanes), share)
        list(pool.map(lambda start: _pass_over(lanes[start : start + share], masks, start, Scratch()), starts))


def _pass_over(lanes: Lanes, masks: Sequence[Mask], first_lane: int, scratch: Scratch) -> None:
    """As :func:`apply_masks`, for the lanes from number ``first_lane`` (an even one) on."""
    start = CTR((first_lane // 2).to_bytes(_BLOCK_BYTES, "big")) if first_lane else _FROM_ZERO
    for first in range(0, len(masks), _STREAMS):
        streams = [(_keystream(key, start), sign) for key, sign in masks[first : first + _STREAMS]]
        for offset in range(0, len(lanes), _PIECE_LANES):
            piece = lanes[offset : offset + _PIECE_LANES]
            zeros, keystream = _ZEROS[: 8 * len(piece)], scratch.lanes[: len(piece)]
            for context, sign in streams:
                context.update_into(zeros, scratch.buffer)
                if sign > 0:
                    np.add(piece, keystream, out=piece)
                else:
                    np.subtract(piece, keystream, out=piece)


def _keystream(key: bytes, start: CTR) -> CipherContext:
    return Cipher(AES128(key), start).encryptor()
