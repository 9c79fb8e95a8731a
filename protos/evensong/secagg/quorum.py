"""How many signatures of a quorum a device checks, and which.

Two different survivor sets can have at most ``members + corrupted`` genuine signatures together, so of ``m`` claimed
for one of them at least the share ``f = 1 - (members + corrupted) / (2 m)`` is forged. A random sample of ``s`` misses
that with probability ``(1 - f)^s``, here below 2^-40 / members; and as many as a quorum that are genuine are one. See
``docs/secagg.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_SECURITY_BITS = 40
_WORD_BYTES = 16  # of randomness a choice: its remainder's bias is nothing


def sample_size(members: int, corrupted: int, signatures: int) -> int:
    """How many of ``signatures``, at least a quorum, are to be checked."""
    quorum = (members + corrupted) // 2 + 1
    genuine = (members + corrupted) / (2 * signatures)
    if genuine >= 1:
        return min(signatures, quorum)
    return min(signatures, quorum, math.ceil((_SECURITY_BITS + math.log2(members)) / -math.log2(genuine)))


def draw_sample(count: int, size: int, draw: Callable[[int], bytes]) -> list[int]:
    """``size`` different numbers below ``count``, uniform; ``draw(n)`` gives n random bytes (Floyd 1987)."""
    if size >= count:
        return list(range(count))
    words = draw(_WORD_BYTES * size)
    chosen: set[int] = set()
    for step, last in enumerate(range(count - size, count)):
        word = int.from_bytes(words[_WORD_BYTES * step : _WORD_BYTES * (step + 1)], "little")
        pick = word % (last + 1)
        chosen.add(last if pick in chosen else pick)
    return sorted(chosen)
