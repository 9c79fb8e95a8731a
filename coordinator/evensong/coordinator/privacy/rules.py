"""Which privacy plans are refused, and why: what both sides hold a bundle to before any noise is drawn."""

from __future__ import annotations

import math

from evensong.coordinator.errors import TaskError
from evensong.coordinator.privacy.mechanism import COUNT_NOISE, vector_multiplier
from evensong.secagg.errors import SecureError
from evensong.secagg.noise import DISTRIBUTED, local_sigma
from evensong.secagg.vector import VectorPlan
from evensong.v1 import device_pb2, task_pb2

#: More than that promises nothing.
MOST_EPSILON = 100.0
MOST_NOISE = 1e6
MOST_BANDS = 10_000

_CENTRAL = task_pb2.PRIVACY_MECHANISM_CENTRAL_GAUSSIAN
_BANDED = task_pb2.PRIVACY_MECHANISM_BANDED_MATRIX
_NONE, _POISSON = task_pb2.SAMPLING_NONE, task_pb2.SAMPLING_POISSON


def check_privacy(bundle: task_pb2.TaskBundle, *, noise_is_open: bool = False) -> None:
    """:class:`TaskError` unless the bundle has no privacy plan, or one that keeps what it promises.

    ``noise_is_open``: the noise is yet to be computed, and what depends on it is not checked.
    """
    if not bundle.HasField("privacy"):
        return
    plan = bundle.privacy
    if plan.mechanism not in (_CENTRAL, _BANDED, *DISTRIBUTED):
        raise TaskError("privacy.mechanism is unknown", got=plan.mechanism)
    if plan.sampling not in (_NONE, _POISSON):
        raise TaskError("privacy.sampling is unknown", expected="none or poisson", got=plan.sampling)
    _check_promise(bundle)
    _check_clipping(bundle)
    _check_sampling(bundle)
    _check_bands(plan)
    if plan.mechanism in DISTRIBUTED and not bundle.HasField("secure"):
        raise TaskError(
            "noise from devices needs a secure sum: one device's noise hides nothing of its own update",
            fix='Say secure=SecureAggregation(), or mechanism="gaussian".',
        )
    if not noise_is_open:
        _check_noise(bundle)


def _check_promise(bundle: task_pb2.TaskBundle) -> None:
    plan = bundle.privacy
    if not 0 < plan.epsilon <= MOST_EPSILON:
        raise TaskError("epsilon is out of range", expected=f"above 0, at most {MOST_EPSILON:g}", got=plan.epsilon)
    devices = max(plan.population, bundle.round.goal_reports)
    if not 0 < plan.delta < 1 / devices:
        raise TaskError(
            "delta is out of range",
            expected=f"above 0, below 1/{devices}: else revealing one device in full would keep the promise",
            got=plan.delta,
        )


def _check_clipping(bundle: task_pb2.TaskBundle) -> None:
    plan, update = bundle.privacy, bundle.update
    adaptive = update.HasField("adaptive_clipping")
    if not update.clip_norm and not adaptive:
        raise TaskError(
            "noise without clipping hides nothing: one device may change the sum by any amount",
            fix="Say clip_norm=..., or clip_norm=AdaptiveClipping().",
        )
    if update.weighting != task_pb2.WEIGHTING_UNIFORM:
        raise TaskError(
            "under differential privacy every update weighs the same: a weight tells how many examples a device has",
            expected='weighting="uniform"',
            got="weighting by examples",
        )
    if adaptive and plan.mechanism != _CENTRAL:
        raise TaskError(
            "adaptive clipping goes with central Gaussian noise: it counts devices, and only there is the count noised",
            fix="Say clip_norm=... as a number.",
        )


def _check_sampling(bundle: task_pb2.TaskBundle) -> None:
    plan, goal = bundle.privacy, bundle.round.goal_reports
    if plan.sampling == _NONE:
        return
    if plan.mechanism != _CENTRAL:
        raise TaskError(
            "Poisson sampling amplifies central Gaussian noise only; for other mechanisms no bound is known here",
            fix='Say sampling="none".',
        )
    if plan.population <= goal:
        raise TaskError(
            "Poisson sampling draws the goal from a larger population",
            expected=f"a population above the goal, {goal}",
            got=plan.population,
        )
    if plan.max_participations or plan.min_separation:
        raise TaskError(
            "Poisson sampling may draw any device in any round: limits would make it another sampling",
            fix="Leave out max_participations and min_separation.",
        )
    if bundle.HasField("secure") and bundle.secure.max_cohort < plan.population:
        raise TaskError(
            "a round may draw the whole population",
            expected=f"secure.max_cohort of at least {plan.population}",
            got=bundle.secure.max_cohort,
        )


def _check_bands(plan: task_pb2.PrivacyPlan) -> None:
    if plan.mechanism != _BANDED:
        if plan.bands:
            raise TaskError("only the banded mechanism has bands", expected=0, got=plan.bands)
        return
    if not 1 <= plan.bands <= MOST_BANDS:
        raise TaskError("bands is out of range", expected=f"1 to {MOST_BANDS}", got=plan.bands)
    if plan.bands > plan.min_separation:
        raise TaskError(
            "a device may come again while its noise is still being taken back",
            expected=f"bands of at most min_separation, {plan.min_separation}",
            got=plan.bands,
        )


def _check_noise(bundle: task_pb2.TaskBundle) -> None:
    plan, goal = bundle.privacy, bundle.round.goal_reports
    if not 0 < plan.noise_multiplier <= MOST_NOISE:
        raise TaskError("noise_multiplier is out of range", expected="a number above 0", got=plan.noise_multiplier)
    if bundle.update.HasField("adaptive_clipping") and math.isinf(vector_multiplier(plan.noise_multiplier, goal)):
        raise TaskError(
            "the goal is too small for adaptive clipping under this noise",
            expected=f"a goal above {plan.noise_multiplier / (2 * COUNT_NOISE):g}",
            got=goal,
            fix="Say clip_norm=... as a number, or raise goal.",
        )
    if plan.mechanism in DISTRIBUTED:
        try:
            local_sigma(bundle, 1.0, VectorPlan.from_bundle(bundle, device_pb2.WORK_TRAIN).step(1.0))
        except SecureError as error:
            raise TaskError(f"the noise of devices cannot be: {error}") from error
