"""From a round's sum to the mean that the server step may see: noise, the fixed denominator, and the next clip norm.

A pure function of the sum, the plan and the noise key, for plain and secure rounds alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evensong.coordinator.privacy.keys import NoiseKey
from evensong.coordinator.privacy.matrix import inverse_coefficients
from evensong.secagg import noise
from evensong.v1 import task_pb2

Floats = npt.NDArray[np.float64]

#: Noise on the count of devices within the clip norm, over the goal (Andrew et al. 2021).
COUNT_NOISE = 0.05
#: Where an adaptive clip norm stays.
_LEAST_CLIP, _MOST_CLIP = 1e-12, 1e12


@dataclass(frozen=True)
class Total:
    """What a round's devices come to. ``update`` is the weighted sum of their updates, flat float64 [parameters]."""

    update: Floats
    weight: float
    devices: int
    within: int = 0  #: devices whose update's norm was at most the clip norm, for adaptive clipping


@dataclass(frozen=True)
class Released:
    """``mean`` is the update for the server step, float64 [parameters], of total ``weight``."""

    mean: Floats
    weight: float
    clip_norm: float  #: of the next round; 0: the plan's
    tag: bytes = b""  #: names the noise; empty where the coordinator adds none


def release(
    bundle: task_pb2.TaskBundle,
    total: Total,
    *,
    clip_norm: float,
    key: NoiseKey,
    task_id: str,
    round: int,
    earlier: Sequence[bytes] = (),
) -> Released:
    """The mean of a round and the clip norm of the next.

    ``clip_norm`` bounds each update of the sum; ``earlier`` are the tags of the task's last ``bands - 1`` releases, the
    newest first. Under a privacy plan the denominator is the goal, whoever took part: the mean must not tell.
    """
    if not bundle.HasField("privacy"):
        share = total.within / total.devices
        return Released(total.update / total.weight, total.weight, _next_clip_norm(bundle, clip_norm, share))
    plan, goal = bundle.privacy, bundle.round.goal_reports
    if plan.mechanism in noise.DISTRIBUTED:
        return Released(total.update / goal, float(goal), 0.0)
    tag = key.tag(task_id, round, total.update)
    if plan.mechanism == task_pb2.PRIVACY_MECHANISM_BANDED_MATRIX:
        noised = _add_banded(plan, total.update, clip_norm, key, [tag, *earlier[: plan.bands - 1]])
        return Released(noised / goal, float(goal), 0.0, tag)
    multiplier = plan.noise_multiplier
    if bundle.update.HasField("adaptive_clipping"):
        multiplier = vector_multiplier(multiplier, goal)
    noised = _add_gaussian(total.update, multiplier, clip_norm, key.stream(tag, "vector"))
    share = _noised_share(total, goal, key.stream(tag, "count"))
    return Released(noised / goal, float(goal), _next_clip_norm(bundle, clip_norm, share), tag)


def vector_multiplier(noise_multiplier: float, goal: int) -> float:
    """What is left for the vector, if it and the count of devices together are to cost ``noise_multiplier``.

    ``z_v = (z^-2 - (2 s_b)^-2)^(-1/2)`` with ``s_b = 0.05 goal`` (Andrew et al. 2021, Theorem 1); infinite where the
    count alone costs more.
    """
    left = noise_multiplier**-2 - (2 * COUNT_NOISE * goal) ** -2
    return left**-0.5 if left > 0 else math.inf


def _add_gaussian(total: Floats, multiplier: float, clip_norm: float, stream: noise.Keystream) -> Floats:
    """Noise and sum on one grid. The noise is wider by what rounding to it adds to the sensitivity."""
    grid = noise.grid_of(multiplier * clip_norm)
    sigma = multiplier * (clip_norm + grid * math.sqrt(total.size))
    steps = np.rint(total / grid) + noise.discrete_gaussian(stream, sigma / grid, total.size)
    return np.asarray(steps * grid, np.float64)


def _add_banded(
    plan: task_pb2.PrivacyPlan, total: Floats, clip_norm: float, key: NoiseKey, tags: Sequence[bytes]
) -> Floats:
    """Each release's own draw is made again from its tag: no noise is ever stored."""
    sigma = plan.noise_multiplier * clip_norm
    grid = noise.grid_of(sigma)
    mixed = np.zeros(total.size)
    for coefficient, tag in zip(inverse_coefficients(plan.bands), tags, strict=False):
        mixed += coefficient * noise.discrete_gaussian(key.stream(tag, "vector"), sigma / grid, total.size)
    return np.asarray((np.rint(total / grid) + np.rint(mixed)) * grid, np.float64)


def _noised_share(total: Total, goal: int, stream: noise.Keystream) -> float:
    """The share of devices within the clip norm: each counts as +-1/2, so that one changes the count by 1/2 only."""
    draw = int(noise.discrete_gaussian(stream, 2 * COUNT_NOISE * goal, 1)[0])
    return 0.5 + (2 * total.within - total.devices + draw) / (2 * goal)


def _next_clip_norm(bundle: task_pb2.TaskBundle, clip_norm: float, share: float) -> float:
    """Andrew et al. 2021, the geometric update of the clip norm towards the quantile."""
    if not bundle.update.HasField("adaptive_clipping"):
        return 0.0
    plan = bundle.update.adaptive_clipping
    return min(max(clip_norm * math.exp(-plan.rate * (share - plan.quantile)), _LEAST_CLIP), _MOST_CLIP)
