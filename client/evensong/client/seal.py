"""Step 4 of a round, where updates are not summed securely: delta -> clip -> encode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evensong.v1 import task_pb2
from evensong.wire.codec import codec_from_plan
from evensong.wire.codecs import clip_to_norm
from evensong.wire.tensors import FloatArray, Layout
from evensong.wire.top_k import TopKCodec, residual_of


@dataclass(frozen=True)
class SealedUpdate:
    """What travels: the encoded delta, its weight, and whether its L2 norm before clipping, ``norm``, was within the
    clip norm. ``residual`` is what a sparse update left out, to be kept for the task's next one."""

    data: bytes
    weight: float
    norm: float
    within_clip_norm: bool
    residual: dict[str, FloatArray] | None = None


def seal(
    delta: Mapping[str, npt.ArrayLike],
    layout: Layout,
    plan: task_pb2.UpdatePlan,
    *,
    examples: int,
    rounding: np.random.Generator,
    clip_norm: float = 0.0,
    residual: Mapping[str, FloatArray] | None = None,
) -> SealedUpdate:
    """Clips ``delta`` and encodes it; ``rounding`` drives all random choices of the codec.

    ``clip_norm`` is that of the version which was trained from; 0 takes the plan's, and 0 there does not clip.
    ``residual`` is that of the task's last update, and added before clipping; what is clipped is gone for good, so that
    residuals cannot pile up.

    The weight is the number of ``examples`` up to the plan's largest, or 1. Raises :class:`UpdateError` for a delta
    that is not finite.
    """
    bound = clip_norm or plan.clip_norm
    if residual is not None:
        delta = {name: np.asarray(values, np.float32) + residual[name] for name, values in delta.items()}
    clipped, norm = clip_to_norm(delta, bound)
    codec = codec_from_plan(plan)
    data = codec.encode(clipped, layout, rounding)
    left_out = residual_of(clipped, data, codec, layout) if isinstance(codec, TopKCodec) else None
    uniform = plan.weighting == task_pb2.WEIGHTING_UNIFORM
    weight = 1.0 if uniform else min(float(examples), plan.max_weight)
    return SealedUpdate(data, weight, norm, bound > 0 and norm <= bound, left_out)
