"""Noise that is correlated over rounds: the banded inverse square root of the prefix sum.

A model is the sum of its updates so far, so what counts is the noise of the sums: with ``z_t = w_t - w_{t-1} / 2 -
w_{t-2} / 8 - ...`` most of a round's noise is taken back by the next ones. The factorisation ``A = B C`` of the prefix
sum A with ``C^{-1}`` the Toeplitz matrix of these coefficients is the square root of A (Fichtenberger, Henzinger and
Upadhyay 2023, *Constant matters*; Henzinger et al. 2023). Cut to ``bands`` coefficients (Kalinin, Lampert and McKenna
2025, *Back to square roots*), the noise of a round needs the last ``bands`` draws only.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def inverse_coefficients(bands: int) -> Floats:
    """The first column of C^{-1}: 1, -1/2, -1/8, -1/16, -5/128, ...; float64 [bands]."""
    k = np.arange(1, bands)
    return np.concatenate([[1.0], np.cumprod((k - 1.5) / k)])


def strategy_column(releases: int, bands: int) -> Floats:
    """The first column of C, the inverse of the banded Toeplitz matrix: positive and decreasing; float64 [releases]."""
    return _strategy_column(1 << max(0, (releases - 1).bit_length()), bands)[:releases]


@lru_cache(maxsize=16)
def _strategy_column(releases: int, bands: int) -> Floats:
    taps = -inverse_coefficients(min(bands, releases))[:0:-1]
    column = np.zeros(releases)
    column[0] = 1.0
    for k in range(1, releases):
        reach = min(k, taps.size)
        column[k] = column[k - reach : k] @ taps[taps.size - reach :]
    return column


def sensitivity(releases: int, bands: int, participations: int, separation: int) -> float:
    """L2 norm of what one device adds to C times the sums, each of its updates having norm 1 at most.

    It takes part ``participations`` times at most (0: as often as it may), always ``separation`` releases or more
    apart. For a positive, decreasing Toeplitz matrix the worst is to come first and then as often as allowed (Kalinin
    and Lampert 2024, *Banded square root matrix factorization*, Theorem 2).
    """
    separation = max(1, separation)
    times = -(-releases // separation)
    column = np.zeros(times * separation)
    column[:releases] = strategy_column(releases, bands)
    stacked = np.cumsum(column.reshape(times, separation), axis=0)
    if 0 < participations < times:
        stacked[participations:] -= stacked[:-participations].copy()
    return float(np.linalg.norm(stacked.reshape(-1)[:releases]))


def max_error(releases: int, bands: int, participations: int = 1, separation: int = 1) -> float:
    """The largest standard deviation of a prefix sum's noise, for noise of the sensitivity (multiplier 1)."""
    rows = np.cumsum(np.pad(inverse_coefficients(min(bands, releases)), (0, max(0, releases - bands))))
    return float(np.linalg.norm(rows)) * sensitivity(releases, bands, participations, separation)
