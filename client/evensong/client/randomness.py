"""The device's one source of randomness: the operating system's in production, a seed in a simulation."""

from __future__ import annotations

import random
import secrets

import numpy as np


class Randomness:
    """Request ids, jitter, example order and stochastic rounding all draw from here.

    With ``seed`` None everything comes from the operating system. With a seed the same device behaves the same way
    again; ``boots`` (how often its state was opened) keeps a restarted device from drawing the request ids of its
    former life.
    """

    def __init__(self, seed: int | None = None, boots: int = 0) -> None:
        self._seeded = None if seed is None else np.random.default_rng([seed, boots])

    def token(self, count: int) -> bytes:
        """``count`` random bytes."""
        return secrets.token_bytes(count) if self._seeded is None else self._seeded.bytes(count)

    def uniform(self, low: float, high: float) -> float:
        """One number from [low, high]."""
        if self._seeded is None:
            return random.SystemRandom().uniform(low, high)
        return float(self._seeded.uniform(low, high))

    def generator(self) -> np.random.Generator:
        """A generator of its own for one piece of work, seeded with 128 bits from here."""
        return np.random.default_rng(int.from_bytes(self.token(16), "little"))
