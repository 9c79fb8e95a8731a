"""Integer noise against exact probabilities, its bounds, and its golden draws."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from evensong.secagg import noise
from evensong.secagg.errors import ParameterError
from evensong.secagg.noise import Keystream, discrete_gaussian, grid_of, local_noise, local_sigma, noise_bound, skellam
from evensong.v1 import task_pb2

pytestmark = pytest.mark.secagg

VECTORS = json.loads((Path(__file__).parents[2] / "protos" / "vectors" / "noise.json").read_text())
KEY = bytes(range(16))
SAMPLERS = {"discrete_gaussian": discrete_gaussian, "skellam": skellam}


# -------------------------------------------------------------------------------------------------------- the keystream


@pytest.mark.parametrize("key", [KEY, bytes(range(32))])
def test_words_are_the_aes_ctr_keystream_however_they_are_asked_for(key: bytes) -> None:
    expected = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 100_003))
    stream = Keystream(key)
    parts = [stream.words(count) for count in (1, 0, 5, 99_997)]
    assert np.concatenate(parts).astype("<u8").tobytes() == expected


# ---------------------------------------------------------------------------------------------------- against exactness


def gaussian_probabilities(sigma: float, least: int, most: int) -> np.ndarray:
    k = np.arange(least, most + 1)
    wide = np.arange(-int(40 * sigma) - 40, int(40 * sigma) + 41)
    return np.exp(-(k**2) / (2 * sigma**2)) / np.exp(-(wide**2) / (2 * sigma**2)).sum()


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0, 17.25])
def test_thresholds_are_exact_to_128_bits(sigma: float) -> None:
    """An independent sum: each exponential by its own Taylor series, in rational arithmetic."""
    table = noise._gaussian_table(sigma)
    variance = Fraction(sigma) ** 2
    weights = {k: _exp(-Fraction(k * k) / (2 * variance)) for k in range(-int(11 * sigma) - 15, int(11 * sigma) + 16)}
    total, below = sum(weights.values()), Fraction(0)
    thresholds = [int(high) << 64 | int(low) for high, low in zip(table.high, table.low, strict=True)]
    for value in sorted(weights):
        index = value - table.least
        below += weights[value]
        if 0 <= index < len(thresholds):
            assert abs(Fraction(thresholds[index], 1 << 128) - below / total) < Fraction(1, 1 << 84)


def _exp(x: Fraction) -> Fraction:
    """exp(x) for x <= 0, to 2^-170 absolute."""
    scale, halvings = 1 << 200, max(0, int(-x).bit_length() + 1)
    small = int(x / (1 << halvings) * scale)
    term = total = scale
    for n in range(1, 60):
        term = term * small // (n * scale)
        total += term
    for _ in range(halvings):
        total = total * total // scale
    return Fraction(total, scale)


@pytest.mark.parametrize("sigma", [0.5, 3.0, 40.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_follow_their_distribution(name: str, sigma: float) -> None:
    count = 200_000
    draws = SAMPLERS[name](Keystream(KEY), sigma, count)
    edge = max(1, int(3.5 * sigma))
    if name == "skellam":
        inner = stats.skellam(sigma**2 / 2, sigma**2 / 2).pmf(np.arange(-edge, edge + 1))
    else:
        inner = gaussian_probabilities(sigma, -edge, edge)
    outer = (1 - inner.sum()) / 2
    expected = np.concatenate([[outer], inner, [outer]]) * count
    observed = np.bincount(np.clip(draws, -edge - 1, edge + 1) + edge + 1, minlength=2 * edge + 3)
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize(
    ("name", "sigma"),
    [("discrete_gaussian", s) for s in (3.0, 500.0, 4096.0, 4097.0, 1e6, 2.0**29)]
    + [("skellam", s) for s in (3.0, 500.0, 9000.0)],
)
def test_moments(name: str, sigma: float) -> None:
    count = 200_000
    draws = SAMPLERS[name](Keystream(KEY), sigma, count).astype(np.float64) / sigma
    assert abs(draws.mean()) < 5 / math.sqrt(count)
    assert abs(draws.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((draws**4).mean() - 3) < 5 * math.sqrt(96 / count) + (1 / sigma**2 if name == "skellam" else 0)


def test_a_wide_gaussian_is_as_uniform_in_its_last_digits_as_it_should_be() -> None:
    """The sum 512 y + x must show no trace of 512."""
    draws = discrete_gaussian(Keystream(KEY), 5_000.0, 300_000)
    assert stats.chisquare(np.bincount(draws % 512, minlength=512)).pvalue > 1e-4
    p = stats.kstest(draws[:50_000] + np.random.default_rng(0).uniform(-0.5, 0.5, 50_000), "norm", (0, 5_000.0)).pvalue
    assert p > 1e-4


# ------------------------------------------------------------------------------------------------------ ties and bounds


class Scripted(Keystream):
    """Words that a test chooses."""

    def __init__(self, *words: int) -> None:
        self._words = list(words)

    def words(self, count: int) -> np.ndarray:
        taken, self._words = self._words[:count], self._words[count:]
        return np.array(taken, np.uint64)


def test_a_word_that_ties_with_a_threshold_is_decided_by_one_more() -> None:
    table = noise._gaussian_table(3.0)
    index = table.high.size // 2
    high, low = int(table.high[index]), int(table.low[index])
    below = table.least + index
    assert discrete_gaussian(Scripted(high - 1), 3.0, 1)[0] == below
    assert discrete_gaussian(Scripted(high, low - 1), 3.0, 1)[0] == below
    assert discrete_gaussian(Scripted(high, low), 3.0, 1)[0] == below + 1
    assert discrete_gaussian(Scripted(high + 1), 3.0, 1)[0] == below + 1


@pytest.mark.parametrize("sigma", [0.3, 3.0, 100.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_draw_is_beyond_the_bound_even_for_extreme_words(name: str, sigma: float) -> None:
    words = [(0, 0), (2**64 - 1, 2**64 - 1), (0, 1), (2**64 - 1, 0)]
    extremes = [int(SAMPLERS[name](Scripted(*pair), sigma, 1)[0]) for pair in words]
    assert max(map(abs, extremes)) <= noise_bound(sigma)
    assert min(extremes) < -8 * sigma and max(extremes) > 8 * sigma


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 10.0, 30.0, 300.0, 4000.0])
def test_what_the_bound_cuts_off_is_less_than_it_says(sigma: float) -> None:
    t, variance = noise_bound(sigma) + 1, sigma**2
    skellam_tail = math.sqrt(t * t + variance**2) - variance - t * math.asinh(t / variance)
    assert max(skellam_tail, -t * t / (2 * variance)) + math.log(2) < -84 * math.log(2)
    assert 2.0**-84 + (2 * t + 1) * 2.0**-128 + 5 * 2.0**-100 < noise.DRAW_ERROR


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 2.0**50])
def test_a_sigma_out_of_range_is_refused(sigma: float) -> None:
    for sampler in SAMPLERS.values():
        with pytest.raises(ParameterError):
            sampler(Keystream(KEY), sigma, 1)


def test_the_grid_is_a_power_of_two_far_below_sigma() -> None:
    for sigma in (1e-9, 0.7, 1.0, 3e5):
        assert math.frexp(grid_of(sigma))[0] == 0.5
        assert 2**28 <= sigma / grid_of(sigma) < 2**29


# -------------------------------------------------------------------------------------------------- inside a secure sum


def bundle(mechanism: task_pb2.PrivacyMechanism, **secure: float) -> task_pb2.TaskBundle:
    return task_pb2.TaskBundle(
        privacy=task_pb2.PrivacyPlan(mechanism=mechanism, noise_multiplier=1.5),
        secure=task_pb2.SecurePlan(**({"corrupted_share": 0.1, "min_survivors": 41, "max_cohort": 59} | secure)),
    )


def test_the_noise_of_the_smallest_sum_that_is_revealed_has_its_whole_variance_from_honest_devices() -> None:
    plan = bundle(task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN)
    sigma = local_sigma(plan, 2.0, 0.01)
    # Of 59 at most, 5 may collude, and be among the 41 survivors.
    assert math.sqrt(36) * sigma * 0.01 == pytest.approx(1.5 * 2.0)


@pytest.mark.parametrize("mechanism", noise.DISTRIBUTED)
def test_local_noise_is_within_the_bound_and_has_its_spread(mechanism: task_pb2.PrivacyMechanism) -> None:
    plan = bundle(mechanism)
    sigma = local_sigma(plan, 1.0, 0.05)
    draws = local_noise(plan, 1.0, 0.05, 100_000, Keystream(KEY))
    assert draws.dtype == np.int64 and np.abs(draws).max() <= noise_bound(sigma)
    assert draws.std() == pytest.approx(sigma, rel=0.02)


def test_a_grid_too_coarse_for_the_noise_is_refused() -> None:
    plan = bundle(task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN)
    assert local_sigma(plan, 1.0, 1.5 / 6 / 3.0) == pytest.approx(3.0)
    with pytest.raises(ParameterError, match="too coarse"):
        local_sigma(plan, 1.0, 1.5 / 6 / 2.99)


def test_a_plan_without_noise_of_devices_has_no_local_sigma() -> None:
    with pytest.raises(ParameterError, match="no noise on devices"):
        local_sigma(bundle(task_pb2.PRIVACY_MECHANISM_CENTRAL_GAUSSIAN), 1.0, 0.1)
    with pytest.raises(ParameterError, match="honest"):
        local_sigma(bundle(task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN, min_survivors=0), 1.0, 0.1)


# ------------------------------------------------------------------------------------------------------ golden vectors


@pytest.mark.parametrize("case", VECTORS["draws"], ids=lambda case: f"{case['sampler']}-{case['sigma']}")
def test_golden_draws(case: dict[str, object]) -> None:
    draws = SAMPLERS[str(case["sampler"])](
        Keystream(bytes.fromhex(str(case["key"]))),
        float(str(case["sigma"])),
        len(case["draws"]),  # type: ignore[arg-type]
    )
    assert draws.tolist() == case["draws"]


@pytest.mark.parametrize("case", VECTORS["tables"], ids=lambda case: f"{case['sampler']}-{case['sigma']}")
def test_golden_tables(case: dict[str, object]) -> None:
    table = (noise._gaussian_table if case["sampler"] == "discrete_gaussian" else noise._skellam_table)(case["sigma"])
    assert table.least == case["least"] and table.high.size == case["thresholds"]
    at = [value - table.least for value in case["values"]]  # type: ignore[attr-defined]
    assert [f"{int(table.high[i]):016x}{int(table.low[i]):016x}" for i in at] == case["threshold_after"]


@pytest.mark.parametrize("sigma", [3.0, 50.0])
def test_skellam_thresholds_agree_with_scipy(sigma: float) -> None:
    table = noise._skellam_table(sigma)
    values = np.arange(-int(3 * sigma), int(3 * sigma) + 1)
    exact = stats.skellam(sigma**2 / 2, sigma**2 / 2).pmf(values)
    high = np.concatenate([[0.0], table.high.astype(np.float64) / 2.0**64, [1.0]])
    np.testing.assert_allclose(np.diff(high)[values - table.least], exact, rtol=1e-9, atol=1e-15)
