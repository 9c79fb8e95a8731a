"""What releases cost, by Google's dp-accounting (``pip install "evensong[privacy]"``).

The unit is a device: two runs are neighbours if one device's updates are all there or all zero. The denominator of a
mean is fixed, so the sum is all that a release tells.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from evensong.coordinator.privacy import matrix
from evensong.secagg import noise
from evensong.secagg.vector import VectorPlan, conditional_norm_bound
from evensong.v1 import task_pb2
from evensong.wire.errors import EvensongError
from evensong.wire.tensors import layout_from_proto, layout_size

Accountant = Literal["pld", "rdp"]

#: The bound for Skellam noise is proven for whole orders.
WHOLE_ORDERS = (*range(2, 129), *range(136, 513, 8), 1024)
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6


class AccountingError(EvensongError):
    """dp-accounting is missing, or a target cannot be met."""


@dataclass(frozen=True)
class Grid:
    """Where noise is added by devices: vectors of ``size`` whole numbers."""

    sensitivity: float  #: L2 norm of one device's vector at most, in steps
    unit_sigma: float  #: standard deviation of one device's noise in steps, for a noise multiplier of 1
    devices: int  #: honest ones in the smallest sum
    size: int


@dataclass(frozen=True)
class Accounting:
    """All that the cost of a task's releases depends on. ``sampling_probability`` 1: nothing is sampled."""

    mechanism: int
    noise_multiplier: float
    delta: float
    sampling_probability: float = 1.0
    max_participations: int = 0
    min_separation: int = 0
    bands: int = 0
    grid: Grid | None = None

    @classmethod
    def of(cls, bundle: task_pb2.TaskBundle) -> Accounting:
        """Of a task with a privacy plan that was checked."""
        plan = bundle.privacy
        sampled = plan.sampling == task_pb2.SAMPLING_POISSON
        return cls(
            plan.mechanism,
            plan.noise_multiplier,
            plan.delta,
            bundle.round.goal_reports / plan.population if sampled else 1.0,
            plan.max_participations,
            plan.min_separation,
            plan.bands,
            _grid(bundle) if plan.mechanism in noise.DISTRIBUTED else None,
        )

    def participations(self, releases: int) -> int:
        """How many of so many releases can tell about one device."""
        separated = -(-releases // max(1, self.min_separation))
        return min(separated, self.max_participations or separated)

    def epsilon(self, releases: int, accountant: Accountant = "pld") -> float:
        """Spent by so many releases, at ``delta``: an upper bound.

        Central noise: by privacy loss distributions, or by Renyi divergences if asked. Noise of devices: always by
        Renyi divergences. Raises :class:`AccountingError` without dp-accounting.
        """
        return _epsilon(self, releases, accountant) if releases else 0.0

    def with_noise(self, noise_multiplier: float) -> Accounting:
        """The same under other noise."""
        return replace(self, noise_multiplier=noise_multiplier)

    def noise_for(self, epsilon: float, releases: int) -> float:
        """The least noise multiplier for which so many releases cost ``epsilon`` at most, and not 0.01 % less.

        Raises :class:`AccountingError` where no noise is enough.
        """

        def cost(multiplier: float, accountant: Accountant = "pld") -> float:
            return self.with_noise(multiplier).epsilon(releases, accountant)

        if cost(_MOST_NOISE, "rdp") > epsilon:
            raise AccountingError("no noise is enough", expected="a larger epsilon, or fewer rounds", got=epsilon)
        # A Renyi bound is quick and close: it says where to look.
        most = _solve(lambda multiplier: cost(multiplier, "rdp"), epsilon, _LEAST_NOISE, _MOST_NOISE, 0.01)
        least = 0.95 * most
        while cost(least) <= epsilon and least > _LEAST_NOISE:
            most, least = least, 0.8 * least
        return _solve(cost, epsilon, least, most, 1e-4)


def distributed_rho(grid: Grid, noise_multiplier: float) -> float:
    """Zero-concentrated DP of one sum with discrete Gaussian noise from each device.

    ``grid.devices`` discrete Gaussians are not quite one: Kairouz, Liu and Steinke 2021, Theorem 1, where ``tau``
    bounds the difference and vanishes from sigma = 3 on.
    """
    sigma = noise_multiplier * grid.unit_sigma
    k = np.arange(1, grid.devices)
    tau = 10 * float(np.exp(-2 * math.pi**2 * sigma**2 * k / (k + 1)).sum())
    square = grid.sensitivity**2 / (grid.devices * sigma**2)
    return min(square + tau * grid.size / 2, (math.sqrt(square) + tau * math.sqrt(grid.size)) ** 2) / 2


def skellam_rdp(grid: Grid, noise_multiplier: float, order: int) -> float:
    """Renyi DP of one sum with Skellam noise: Agarwal, Kairouz and Liu 2021, Corollary 3.6, for a whole ``order``."""
    variance = grid.devices * (noise_multiplier * grid.unit_sigma) ** 2
    square = grid.sensitivity**2
    one_norm = min(square, math.sqrt(grid.size) * grid.sensitivity)  # of whole numbers
    excess = min(((2 * order - 1) * square + 6 * one_norm) / (4 * variance**2), 3 * one_norm / (2 * variance))
    return order * square / (2 * variance) + excess


@lru_cache(maxsize=4096)
def _epsilon(accounting: Accounting, releases: int, accountant: Accountant) -> float:
    multiplier, delta = accounting.noise_multiplier, accounting.delta
    times = accounting.participations(releases)
    if accounting.grid is not None:
        return _distributed_epsilon(accounting, accounting.grid, times)
    if accounting.mechanism == task_pb2.PRIVACY_MECHANISM_BANDED_MATRIX:
        norm = matrix.sensitivity(releases, accounting.bands, accounting.max_participations, accounting.min_separation)
        return _gaussian_epsilon(multiplier / norm, delta, accountant)
    if accounting.sampling_probability == 1.0:
        return _gaussian_epsilon(multiplier / math.sqrt(times), delta, accountant)
    library = _library("dp_accounting")
    event = library.PoissonSampledDpEvent(accounting.sampling_probability, library.GaussianDpEvent(multiplier))
    return float(_new_accountant(accountant).compose(event, times).get_epsilon(delta))


def _gaussian_epsilon(multiplier: float, delta: float, accountant: Accountant) -> float:
    """One Gaussian of sensitivity 1; exactly, by its privacy loss distribution in closed form, unless "rdp"."""
    if accountant == "rdp":
        event = _library("dp_accounting").GaussianDpEvent(multiplier)
        return float(_new_accountant("rdp").compose(event).get_epsilon(delta))
    loss = _library("dp_accounting.pld.privacy_loss_mechanism").GaussianPrivacyLoss(multiplier)
    most = 0.5 / multiplier**2 + math.sqrt(2 * math.log(1 / delta)) / multiplier + 1
    least = 0.0
    if loss.get_delta_for_epsilon(least) <= delta:
        return 0.0
    while most - least > 1e-9 * most:
        middle = (least + most) / 2
        least, most = (least, middle) if loss.get_delta_for_epsilon(middle) <= delta else (middle, most)
    return most


def _distributed_epsilon(accounting: Accounting, grid: Grid, times: int) -> float:
    if accounting.mechanism == task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN:
        rho = distributed_rho(grid, accounting.noise_multiplier)
        event = _library("dp_accounting").ZCDpEvent(rho, 0.0)
        return float(_new_accountant("rdp").compose(event, times).get_epsilon(accounting.delta))
    rdp = [times * skellam_rdp(grid, accounting.noise_multiplier, order) for order in WHOLE_ORDERS]
    epsilon, _ = _library("dp_accounting.rdp").compute_epsilon(WHOLE_ORDERS, rdp, accounting.delta)
    return float(epsilon)


def _grid(bundle: task_pb2.TaskBundle) -> Grid:
    """The same for every clip norm, as the step follows it."""
    size, secure = layout_size(layout_from_proto(bundle.layout)), bundle.secure
    step = VectorPlan(size, bundle.update.bits, max_cohort=1).step(1.0)
    honest = noise.honest_survivors(secure)
    return Grid(
        sensitivity=conditional_norm_bound(1.0, step, size) / step,
        unit_sigma=1.0 / (math.sqrt(honest) * step),
        devices=honest,
        size=size,
    )


def _new_accountant(kind: Accountant) -> Any:
    return (
        _library("dp_accounting.pld").PLDAccountant()
        if kind == "pld"
        else _library("dp_accounting.rdp").RdpAccountant()
    )


def _library(module: str) -> Any:
    """A module of dp-accounting, imported late: it brings SciPy."""
    try:
        logging.getLogger("absl").setLevel(logging.ERROR)  # it tells of each order that it leaves out
        return importlib.import_module(module)
    except ImportError as error:
        raise AccountingError(
            "privacy accounting needs Google's dp-accounting", got=error, fix='pip install "evensong[privacy]"'
        ) from None


def _solve(cost: Callable[[float], float], target: float, least: float, most: float, slack: float) -> float:
    """Where ``cost``, which falls from ``least`` to ``most``, is in [(1 - slack) target, target].

    False position in logarithms, where cost and noise are nearly a straight line; with the weights of the Illinois
    method, so that both ends move.
    """
    aim = math.log(target * (1 - slack / 2))
    low, high = math.log(least), math.log(most)
    above, below = math.log(cost(least)) - aim, math.log(max(cost(most), 1e-9)) - aim
    if above <= 0:
        return least
    while high - low > 1e-9:
        middle = high - below * (high - low) / (below - above)
        here = cost(math.exp(middle))
        if (1 - slack) * target <= here <= target:
            return math.exp(middle)
        value = math.log(max(here, 1e-9)) - aim
        if value > 0:
            low, above, below = middle, value, below / 2
        else:
            high, below, above = middle, value, above / 2
    return math.exp(high)
