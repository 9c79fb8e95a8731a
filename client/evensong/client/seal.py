"""Step 4 of a round: delta -> clip -> encode, or for a secure sum clip -> rotate -> round -> noise -> pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from evensong.client.trust import TrustedModel
from evensong.secagg.noise import Integers, Keystream, local_noise
from evensong.secagg.vector import VectorPlan, conditional_norm_bound
from evensong.v1 import common_pb2, device_pb2, task_pb2
from evensong.wire.codec import codec_from_plan
from evensong.wire.codecs import clip_to_norm
from evensong.wire.rotation import rotation_seed
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


@dataclass(frozen=True)
class SealedVector:
    """The lanes of a secure sum before they are masked, as little-endian bytes; ``norm`` as above (0 for an
    evaluation)."""

    data: bytes
    norm: float


def seal_vector(
    delta: Mapping[str, npt.ArrayLike],
    model: TrustedModel,
    *,
    work: device_pb2.Work,
    round: int,
    examples: int,
    metrics: common_pb2.Metrics,
    draw: Callable[[int], bytes],
) -> SealedVector:
    """What this device adds to a secure sum: ``docs/secagg.md``, "The vector". An evaluation's ``delta`` is empty.

    ``draw`` gives random bytes: rounding and noise are keystreams under fresh keys of its making. Raises
    :class:`UpdateError` for a delta or metrics that are not finite or out of range.
    """
    bundle, version = model.bundle, model.version
    plan = VectorPlan.from_bundle(bundle, work)
    clip_norm = version.clip_norm or bundle.update.clip_norm
    flat = np.concatenate([np.empty(0, np.float32), *(_flat(delta[spec.name]) for spec in model.layout if delta)])
    uniform = bundle.update.weighting == task_pb2.WEIGHTING_UNIFORM
    rounding, noise, bound = Keystream(draw(32)), None, None
    if plan.noise_bound:
        own, step = Keystream(draw(32)), plan.step(clip_norm)
        noise = partial(_noise, bundle, clip_norm, step, own)
        bound = conditional_norm_bound(clip_norm, step, plan.size)
    lanes, norm = plan.encode(
        flat,
        clip_norm=clip_norm,
        seed=rotation_seed(version.bundle_sha256, work, round),
        weight=1.0 if uniform else float(min(examples, plan.max_weight)),
        metrics=None if plan.private else metrics,
        words=lambda count: rounding.words(-(-count // 2)).view("<u4")[:count],
        noise=noise,
        norm_bound=bound,
    )
    return SealedVector(lanes.astype("<u8", copy=False).tobytes(), norm)


def _noise(bundle: task_pb2.TaskBundle, clip_norm: float, step: float, own: Keystream, count: int) -> Integers:
    return local_noise(bundle, clip_norm, step, count, own)


def _flat(values: npt.ArrayLike) -> FloatArray:
    return np.asarray(values, np.float32).reshape(-1)


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
