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
    """What travels: the encoded delta and its weight. ``norm`` is the L2 norm before clipping."""

    data: bytes
    weight: float
    norm: float


def seal(
    delta: Mapping[str, npt.ArrayLike],
    layout: Layout,
    plan: task_pb2.UpdatePlan,
    *,
    examples: int,
    rounding: np.random.Generator,
) -> SealedUpdate:
    """Clips ``delta`` to the plan's L2 norm and encodes it; ``rounding`` drives stochastic rounding.

    The weight is the number of ``examples`` up to the plan's largest, or 1. Raises :class:`UpdateError` for a delta
    that is not finite.
    """
    clipped, norm = clip_to_norm(delta, plan.clip_norm)
    data = UpdateCodec.from_plan(plan).encode(clipped, layout, rounding)
    uniform = plan.weighting == task_pb2.WEIGHTING_UNIFORM
    return SealedUpdate(data, 1.0 if uniform else min(float(examples), plan.max_weight), norm)
