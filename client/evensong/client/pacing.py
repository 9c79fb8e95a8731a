"""When to come back: the coordinator's retry window with jitter, and back-off of our own where it does not answer."""

from __future__ import annotations

from evensong.client.randomness import Randomness
from evensong.v1 import common_pb2

LEAST_WAIT_S = 0.05  #: no coordinator can make a device spin
MOST_WAIT_S = 24 * 3600.0  #: nor send it to sleep for good
_FIRST_BACKOFF_S, _MOST_BACKOFF_S = 1.0, 900.0


def draw_wait(retry: common_pb2.RetryWindow, randomness: Randomness) -> float:
    """Seconds, uniformly from the window; the window is clamped to what is reasonable first."""
    earliest = _clamp(retry.earliest_ms / 1000)
    latest = max(earliest, _clamp(retry.latest_ms / 1000))
    return randomness.uniform(earliest, latest)


class Backoff:
    """Exponential back-off: failure n in a row (from 0) waits uniformly in [d/2, d], d = 2^n s up to 15 minutes."""

    def __init__(self, randomness: Randomness) -> None:
        self._randomness = randomness
        self._failures = 0

    def next(self) -> float:
        """Seconds to wait after one more failure."""
        delay = min(_MOST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(self._failures, 20))
        self._failures += 1
        return self._randomness.uniform(delay / 2, delay)

    def reset(self) -> None:
        """After an answer."""
        self._failures = 0


def _clamp(seconds: float) -> float:
    return min(max(seconds, LEAST_WAIT_S), MOST_WAIT_S)
