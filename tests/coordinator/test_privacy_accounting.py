"""Accounting against published tables, dp-accounting called directly, and brute force."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp

from evensong.coordinator.privacy import matrix
from evensong.coordinator.privacy.accounting import Accounting, AccountingError, Grid, distributed_rho, skellam_rdp
from evensong.coordinator.privacy.mechanism import vector_multiplier
from evensong.v1 import task_pb2

CENTRAL = task_pb2.PRIVACY_MECHANISM_CENTRAL_GAUSSIAN
BANDED = task_pb2.PRIVACY_MECHANISM_BANDED_MATRIX
GAUSSIAN = task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN
SKELLAM = task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_SKELLAM


# ------------------------------------------------------------------------------------------------------ central noise


@pytest.mark.parametrize(
    ("probability", "multiplier", "rounds", "delta", "accountant", "epsilon"),
    [
        (150 / 60_000, 1.3, 6_000, 1e-5, "rdp", 0.7242),
        (0.001, 1.0, 30_000, 1e-7, "rdp", 1.41550),
        (0.04, 1.5, 2_250, 1e-5, "rdp", 7.3293),
        (0.04, 1.5, 2_250, 1e-5, "pld", 6.7688),
        (1.0, 1.0, 1, 1e-5, "pld", 4.37718),
        (1.0, 0.5, 1, 1e-5, "pld", 9.99726),
    ],
)
def test_published_values(
    probability: float, multiplier: float, rounds: int, delta: float, accountant: Any, epsilon: float
) -> None:
    accounting = Accounting(CENTRAL, multiplier, delta, probability)
    assert accounting.epsilon(rounds, accountant) == pytest.approx(epsilon, abs=6e-5)


def test_releases_compose_and_limits_on_participation_pay() -> None:
    free = Accounting(CENTRAL, 2.0, 1e-5)
    assert free.epsilon(0) == 0
    assert free.epsilon(4) == pytest.approx(Accounting(CENTRAL, 1.0, 1e-5).epsilon(1), rel=1e-8)
    capped = Accounting(CENTRAL, 2.0, 1e-5, max_participations=3)
    assert [capped.epsilon(n) for n in (3, 50)] == [free.epsilon(3)] * 2
    apart = Accounting(CENTRAL, 2.0, 1e-5, min_separation=10)
    assert apart.epsilon(10) == free.epsilon(1) and apart.epsilon(11) == free.epsilon(2)


@pytest.mark.parametrize("epsilon", [0.3, 2.0, 8.0])
@pytest.mark.parametrize(
    "accounting",
    [
        Accounting(CENTRAL, 1.0, 1e-5),
        Accounting(CENTRAL, 1.0, 1e-5, max_participations=2),
        Accounting(BANDED, 1.0, 1e-6, 1.0, 3, 8, 4),
        Accounting(GAUSSIAN, 1.0, 1e-5, grid=Grid(3000.0, 250.0, 90, 1 << 20)),
        Accounting(SKELLAM, 1.0, 1e-5, grid=Grid(3000.0, 250.0, 90, 1 << 20)),
    ],
    ids=["central", "capped", "banded", "discrete", "skellam"],
)
def test_the_noise_for_a_target_is_enough_and_not_much_more(accounting: Accounting, epsilon: float) -> None:
    noise = accounting.noise_for(epsilon, 25)
    assert accounting.with_noise(noise).epsilon(25) <= epsilon
    assert accounting.with_noise(noise * 0.9995).epsilon(25) > epsilon


def test_a_sampled_target_agrees_with_dp_accounting_called_directly() -> None:
    noise = Accounting(CENTRAL, 1.0, 1e-6, 0.01).noise_for(1.0, 3_000)

    def direct(multiplier: float) -> float:
        event = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(multiplier))
        return float(pld.PLDAccountant().compose(event, 3_000).get_epsilon(1e-6))

    assert direct(noise) <= 1.0 < direct(noise * 0.999)


def test_no_noise_is_enough_for_a_discrete_target_that_the_grid_forbids() -> None:
    with pytest.raises(AccountingError, match="no noise is enough"):
        Accounting(CENTRAL, 1.0, 1e-12).noise_for(1e-9, 1_000)


def test_adaptive_clipping_takes_its_share_of_the_noise() -> None:
    assert vector_multiplier(1.0, 100) == pytest.approx(1.005038, abs=1e-6)
    assert math.isinf(vector_multiplier(1.0, 10))
    z, count = vector_multiplier(0.7, 60), 2 * 0.05 * 60
    assert (z**-2 + count**-2) ** -0.5 == pytest.approx(0.7)


def test_without_dp_accounting_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *_: Any) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(AccountingError, match=r'pip install "evensong\[privacy\]"'):
        Accounting(CENTRAL, 1.2345, 1e-5).epsilon(7)


# ----------------------------------------------------------------------------------------------- correlated over rounds


def test_the_square_root_of_the_prefix_sum() -> None:
    assert matrix.inverse_coefficients(5).tolist() == [1, -1 / 2, -1 / 8, -1 / 16, -5 / 128]
    np.testing.assert_allclose(matrix.strategy_column(5, 5), [1, 1 / 2, 3 / 8, 5 / 16, 35 / 128])
    assert matrix.max_error(64, 64) == pytest.approx(2.3888, abs=5e-5)
    assert matrix.max_error(1024, 1024) == pytest.approx(3.2726, abs=5e-5)
    assert matrix.max_error(64, 1) == pytest.approx(8) and matrix.max_error(1024, 1, 1, 1024) == pytest.approx(32)


@pytest.mark.parametrize("bands", [1, 2, 3, 5, 12])
def test_the_strategy_is_the_inverse_and_falls(bands: int) -> None:
    n = 40
    column = matrix.strategy_column(n, bands)
    assert (column >= 0).all() and (np.diff(column) <= 0).all()
    inverse = np.pad(matrix.inverse_coefficients(bands), (0, n - bands))
    np.testing.assert_allclose(np.convolve(column, inverse)[:n], np.eye(n)[0], atol=1e-12)


@pytest.mark.parametrize("separation", [1, 2, 3, 5])
@pytest.mark.parametrize("participations", [0, 1, 2, 3])
def test_sensitivity_is_the_worst_of_all_ways_to_take_part(separation: int, participations: int) -> None:
    n, bands = 11, 3
    column = matrix.strategy_column(n, bands)
    strategy = np.array([[column[i - j] if i >= j else 0.0 for j in range(n)] for i in range(n)])
    worst = max(
        float(np.linalg.norm(strategy[:, rounds].sum(1)))
        for count in range(1, (participations or n) + 1)
        for rounds in itertools.combinations(range(n), count)
        if all(later - earlier >= separation for earlier, later in itertools.pairwise(rounds))
    )
    assert matrix.sensitivity(n, bands, participations, separation) == pytest.approx(worst, rel=1e-12)


# ---------------------------------------------------------------------------------------------------- noise of devices


@pytest.mark.parametrize(("bits", "epsilon"), [(14, 4.912), (16, 4.763), (18, 4.753)])
def test_the_distributed_discrete_gaussian_of_kairouz_et_al(bits: int, epsilon: float) -> None:
    """z = 1, n = 100, d = 2^20: their grid, of which 2^bits points span four standard deviations of the sum."""
    n, d, z = 100, 1 << 20, 1.0
    local = z / math.sqrt(n)

    def span(step: float) -> float:
        return 8 * math.sqrt(n * n / d + n * (step * step / 4 + local * local)) / step

    low, high = 1e-9, 1.0
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if span(middle) > 2**bits else (low, middle)
    norm = 1 / high
    sensitivity = math.sqrt(min(norm**2 + d / 4 + norm + math.sqrt(d) / 2, (norm + math.sqrt(d)) ** 2))
    grid = Grid(sensitivity, local / high, n, d)
    accountant = rdp.RdpAccountant(orders=[*range(2, 129), 256])
    accountant.compose(dp_accounting.ZCDpEvent(distributed_rho(grid, z), 0.0))
    assert accountant.get_epsilon(1e-5) == pytest.approx(epsilon, abs=6e-4)


def test_a_fine_grid_costs_what_continuous_noise_costs() -> None:
    grid = Grid(1e5, 1e5 / math.sqrt(50), 50, 1_000)
    assert distributed_rho(grid, 1.0) == pytest.approx(0.5, rel=1e-9)
    for order in (2, 10, 100):
        assert skellam_rdp(grid, 1.0, order) == pytest.approx(order / 2, rel=1e-3)


def test_skellam_costs_no_less_than_gauss_and_little_more() -> None:
    grid = Grid(300.0, 30.0, 100, 10_000)
    gauss, skellam = (Accounting(kind, 1.0, 1e-5, grid=grid).epsilon(1) for kind in (GAUSSIAN, SKELLAM))
    assert gauss < skellam < 1.01 * gauss


def test_a_tiny_sigma_is_charged_for_not_being_gaussian() -> None:
    """Below sigma = 1, a sum of discrete Gaussians is not one: tau counts."""
    coarse = Grid(1.0, 0.5, 4, 10)
    assert distributed_rho(coarse, 1.0) > 2 * (1.0 / (2 * 4 * 0.25))
