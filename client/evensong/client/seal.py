"""Step 4 of a round: delta -> clip -> quantise. (Noise and masks come with secure aggregation.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evensong.v1 import task_pb2
from evensong.wire.codecs import UpdateCodec, clip_to_norm
from evensong.wire.tensors import Layout


@dataclass(frozen=True)
class SealedUpdate:
    """What travels: the encoded delta, its weight, and whether its L2 norm before clipping, ``norm``, was within the
    clip norm."""

    data: bytes
    weight: float
    norm: float
    within_clip_norm: bool


def seal(
    delta: Mapping[str, npt.ArrayLike],
    layout: Layout,
    plan: task_pb2.UpdatePlan,
    *,
    examples: int,
    rounding: np.random.Generator,
    clip_norm: float = 0.0,
) -> SealedUpdate:
    """Clips ``delta`` and encodes it; ``rounding`` drives stochastic rounding.

    ``clip_norm`` is that of the version which was trained from; 0 takes the plan's, and 0 there does not clip.

    The weight is the number of ``examples`` up to the plan's largest, or 1. Raises :class:`UpdateError` for a delta
    that is not finite.
    """
    bound = clip_norm or plan.clip_norm
    clipped, norm = clip_to_norm(delta, bound)
    data = UpdateCodec.from_plan(plan).encode(clipped, layout, rounding)
    uniform = plan.weighting == task_pb2.WEIGHTING_UNIFORM
    weight = 1.0 if uniform else min(float(examples), plan.max_weight)
    return SealedUpdate(data, weight, norm, bound > 0 and norm <= bound)
