"""Integer noise for differential privacy, drawn from a keystream: discrete Gaussian, Skellam, and Gaussian on a grid.

Noise from a floating-point generator gives itself away in its low bits (Mironov 2012, *On significance of the least
significant bits for differential privacy*), and a generator that can be guessed hides nothing. Here every draw is an
integer, found by inversion in a cumulative table of 128-bit thresholds that are computed in integer arithmetic, from a
uniform word of AES in counter mode: the same key gives the same noise on every machine, and nobody else can make it.

**How exact.** A draw differs from its distribution by at most :data:`DRAW_ERROR` in total variation: the tail beyond
:func:`noise_bound` is cut off (below 2^-84), thresholds are cut at 128 bits (below 2^-108), wide Gaussians are sums
(below 2^-100). Over ``m`` draws, a mechanism that is (epsilon, delta)-DP with exact noise has
``delta + (1 + e^epsilon) m DRAW_ERROR``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from evensong.secagg.errors import ParameterError
from evensong.v1 import task_pb2

Integers = npt.NDArray[np.int64]

#: Total variation between one draw and its distribution, at most.
DRAW_ERROR = 2.0**-80

#: Standard deviations that a table serves; a wider Gaussian is a sum of several draws.
_WIDEST_TABLE = 4096.0
#: Below it, a sum of discrete Gaussians is too far from one, and the grid of an update too coarse for its noise.
LEAST_LOCAL_SIGMA = 3.0


class Keystream:
    """The AES-CTR keystream under a key of 16 or 32 bytes, from counter 0, as little-endian 64-bit words."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The next ``count`` words; uint64 [count]."""
        stream = np.empty(count, "<u8")
        view, zeros = stream.view(np.uint8).data, memoryview(_ZEROS)
        for start in range(0, len(view), len(_ZEROS)):
            part = view[start : start + len(_ZEROS)]
            self._encryptor.update_into(zeros[: len(part)], part)
        return stream


_ZEROS = bytes(1 << 18)  # fits the second-level cache, together with what is made of it


def noise_bound(sigma: float) -> int:
    """No draw is further from 0 than this, so that fields which have room for it never overflow.

    11 sigma and 14: beyond lie less than 2^-84 of the discrete Gaussian, and of the heavier-tailed Skellam (Chernoff:
    ``P(X >= t) <= exp(sqrt(t^2 + sigma^4) - sigma^2 - t asinh(t / sigma^2))``).
    """
    return math.ceil(11.0 * sigma) + 14


def discrete_gaussian(keystream: Keystream, sigma: float, count: int) -> Integers:
    """``count`` draws of the discrete Gaussian, ``P(k) ~ exp(-k^2 / (2 sigma^2))`` over all integers; int64 [count].

    Canonne, Kamath and Steinke 2020, *The discrete Gaussian for differential privacy*. ``sigma`` is above 0 and below
    2^48. Above what a table serves, the draw is ``x + 512 y`` with ``x`` of sigma 1024 and ``y`` of what is left of the
    variance: this sum differs from the discrete Gaussian by at most 4 exp(-2 pi^2 1.93^2) < 2^-100, because 1024 is
    far above the smoothing parameter of 512 Z (Micciancio and Walter 2017, *Gaussian sampling over the integers*).
    """
    _check_sigma(sigma, 2.0**48)
    if sigma <= _WIDEST_TABLE:
        return _draw(_gaussian_table(sigma), keystream, count)
    fine = _draw(_gaussian_table(1024.0), keystream, count)
    wide = 512 * discrete_gaussian(keystream, math.sqrt(sigma * sigma - 1024.0 * 1024.0) / 512, count) + fine
    bound = noise_bound(sigma)
    return np.clip(wide, -bound, bound, out=wide)


def skellam(keystream: Keystream, sigma: float, count: int) -> Integers:
    """``count`` draws of the difference of two Poisson variables of mean ``sigma^2 / 2``; int64 [count].

    Unlike discrete Gaussians, Skellam variables add up to a Skellam variable exactly (Agarwal, Kairouz and Liu 2021,
    *The Skellam mechanism for differentially private federated learning*). ``sigma`` is above 0 and at most 2^15.
    """
    _check_sigma(sigma, 2.0**15)
    parts = math.ceil((sigma / _WIDEST_TABLE) ** 2)
    table = _skellam_table(sigma / math.sqrt(parts))
    noise = _draw(table, keystream, count)
    for _ in range(parts - 1):
        noise += _draw(table, keystream, count)
    bound = noise_bound(sigma)
    return np.clip(noise, -bound, bound, out=noise)


def grid_of(sigma: float) -> float:
    """The power of two on whose multiples real-valued noise of this ``sigma`` lies: 2^-29 to 2^-28 of it.

    What it is added to must lie on the same grid; rounding to it moves a vector of ``d`` values by at most
    ``grid * sqrt(d) / 2``.
    """
    return 2.0 ** (math.frexp(sigma)[1] - 29)


# -------------------------------------------------------------------------------------------------- inside a secure sum


def local_sigma(bundle: task_pb2.TaskBundle, clip_norm: float, step: float) -> float:
    """Standard deviation of the noise that each device adds, in steps of the grid on which its update lies.

    ``noise_multiplier * clip_norm / sqrt(honest_survivors)``, over ``step``: the smallest sum that is ever revealed has
    its whole noise from honest devices alone, however many drop out (Kairouz, Liu and Steinke 2021, *The distributed
    discrete Gaussian mechanism*). Both sides compute it from the signed bundle. Raises :class:`ParameterError` if the
    plan has no noise of devices, or the grid is too coarse for it.
    """
    plan = bundle.privacy
    if plan.mechanism not in DISTRIBUTED:
        raise ParameterError("the plan adds no noise on devices", got=plan.mechanism)
    honest = honest_survivors(bundle.secure)
    if not (honest >= 1 and step > 0 and clip_norm > 0):
        raise ParameterError("noise needs honest devices, a step and a clip norm", got=(honest, step, clip_norm))
    sigma = plan.noise_multiplier * clip_norm / math.sqrt(honest) / step
    if not sigma >= LEAST_LOCAL_SIGMA:
        raise ParameterError(
            "the grid is too coarse for the noise of one device",
            expected=f"a standard deviation of at least {LEAST_LOCAL_SIGMA:g} steps",
            got=f"{sigma:.3g}",
            fix="Take more bits, more noise, or a smaller min_survivors.",
        )
    return sigma


def honest_survivors(plan: task_pb2.SecurePlan) -> int:
    """Honest devices in the smallest sum that is revealed: all that may collude were in the cohort, and stayed."""
    return plan.min_survivors - math.floor(plan.corrupted_share * plan.max_cohort)


def local_noise(
    bundle: task_pb2.TaskBundle, clip_norm: float, step: float, count: int, keystream: Keystream
) -> Integers:
    """What one device adds to its ``count`` grid values; int64 [count], within ``noise_bound(local_sigma(...))``.

    The keystream's key is fresh and secret to the device, for each vector another.
    """
    sigma = local_sigma(bundle, clip_norm, step)
    draw = skellam if bundle.privacy.mechanism == task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_SKELLAM else discrete_gaussian
    return draw(keystream, sigma, count)


#: Mechanisms whose noise comes from the devices.
DISTRIBUTED = (
    task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN,
    task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_SKELLAM,
)


# ------------------------------------------------------------------------------------------------ tables of thresholds


@dataclass(frozen=True, eq=False)
class _Table:
    """Value ``least + i`` is drawn if ``i`` thresholds lie at or below a uniform number of 128 bits.

    ``high`` and ``low`` are the thresholds' halves, uint64 [values - 1]. ``first`` [65536] is the number of thresholds
    below a word with these top 16 bits, and ``is_open`` tells whether the rest of the word can change it.
    """

    least: int
    high: npt.NDArray[np.uint64]
    low: npt.NDArray[np.uint64]
    first: Integers
    is_open: npt.NDArray[np.bool_]


def _draw(table: _Table, keystream: Keystream, count: int) -> Integers:
    """One word a draw; in a tie with a threshold's upper half (once in 2^48 draws or less), one more word decides."""
    words = keystream.words(count)
    cells = words.view("<u2")[3::4]
    index: Integers = table.first[cells]
    unsure = np.flatnonzero(table.is_open[cells])
    index[unsure] = places = np.searchsorted(table.high, words[unsure])
    tied = table.high[np.minimum(places, table.high.size - 1)] == words[unsure]
    for place in unsure[tied]:
        equal = table.high == words[place]
        index[place] += np.count_nonzero(table.low[equal] <= keystream.words(1)[0])
    index += table.least
    return index


@lru_cache(maxsize=8)
def _gaussian_table(sigma: float) -> _Table:
    return _table(_gaussian_weights(sigma))


@lru_cache(maxsize=8)
def _skellam_table(sigma: float) -> _Table:
    return _table(_skellam_weights(sigma))


def _table(weights: list[int]) -> _Table:
    """From the weights of 0, 1, ... of a symmetric distribution, to any scale."""
    weights = [weight for weight in weights if weight]  # of a narrow Gaussian, the last are too small for the scale
    both_sides = [*reversed(weights[1:]), *weights]
    total = sum(both_sides)
    thresholds = [(below << 128) // total for below in accumulate(both_sides[:-1])]
    high = np.array([threshold >> 64 for threshold in thresholds], np.uint64)
    low = np.array([threshold & (1 << 64) - 1 for threshold in thresholds], np.uint64)
    starts = np.arange(1 << 16, dtype=np.uint64) << np.uint64(48)
    first = np.searchsorted(high, starts).astype(np.int64)
    following = np.append(first[1:], high.size)
    return _Table(1 - len(weights), high, low, first, first != following)


_SCALE = 256  # bits behind the point


def _gaussian_weights(sigma: float) -> list[int]:
    """exp(-k^2 / (2 sigma^2)) for k = 0 ... bound, times 2^256, by two recurrences:
    ``w(k + 1) = w(k) r(k)`` and ``r(k + 1) = r(k) exp(-1 / sigma^2)``."""
    exact = Context(prec=100)
    variance = exact.power(Decimal(sigma), 2)

    def scaled_exp(numerator: int) -> int:
        return int(exact.multiply(exact.exp(exact.divide(Decimal(-numerator), 2 * variance)), Decimal(2**_SCALE)))

    weight, ratio, square = 1 << _SCALE, scaled_exp(1), scaled_exp(2)
    weights = []
    for _ in range(noise_bound(sigma) + 1):
        weights.append(weight)
        weight, ratio = weight * ratio >> _SCALE, ratio * square >> _SCALE
    return weights


def _skellam_weights(sigma: float) -> list[int]:
    """Modified Bessel functions I_k(sigma^2) for k = 0 ... bound, to some scale, by Miller's downward recurrence
    ``I(k - 1) = I(k + 1) + 2 k / sigma^2 I(k)``."""
    variance = Fraction(sigma) ** 2
    bound = noise_bound(sigma)
    above, here = 0, 1 << _SCALE
    weights = []
    for k in range(2 * bound, -1, -1):
        if k <= bound:
            weights.append(here)
        above, here = here, above + 2 * k * variance.denominator * here // variance.numerator
    return weights[::-1]


def _check_sigma(sigma: float, most: float) -> None:
    if not 0.0 < sigma <= most:
        raise ParameterError("a standard deviation is out of range", expected=f"above 0, at most {most:g}", got=sigma)
