"""Philox4x32-10, the counter-based generator behind dropout.

Salmon, Moraes, Dror and Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011. Every element is a pure function
of (seed, step, stream, position), so that a step can be repeated on any engine in any order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Encrypts counters ``[n, 4]`` of 32-bit words (held in uint64) into random words ``[n, 4]``."""
    c0, c1, c2, c3 = counter.T
    for i in range(_ROUNDS):
        k0, k1 = (np.uint64((k + i * step) & 0xFFFFFFFF) for k, step in zip(key, _KEY_STEPS, strict=True))
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> _32) ^ c1 ^ k0, product1 & _LOW, (product0 >> _32) ^ c3 ^ k1, product0 & _LOW
    return np.stack((c0, c1, c2, c3), axis=1)


def uniform(count: int, seed: int, step: int, stream: int) -> npt.NDArray[np.float32]:
    """``count`` float32 numbers in [0, 1), laid out as ``docs/artifact.md`` says."""
    counter = np.empty((-(-count // 4), 4), np.uint64)
    counter[:, 0] = np.arange(len(counter), dtype=np.uint64)
    counter[:, 1:] = (stream & 0xFFFFFFFF, step & 0xFFFFFFFF, step >> 32)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).ravel()[:count]
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)
