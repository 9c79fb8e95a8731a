"""A task's bundle, parsed once: what every step asks of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from evensong.secagg.vector import VectorPlan
from evensong.v1 import device_pb2, task_pb2
from evensong.wire.codec import Codec, codec_from_plan
from evensong.wire.tensors import Layout, layout_from_proto

#: Attempts at a secure round's sum, and stages of one; then the round is abandoned, and devices train anew.
SECURE_ATTEMPTS = 3
SECURE_STAGES = 5


@dataclass(frozen=True)
class Plan:
    """Immutable, as the bundle is."""

    bundle: task_pb2.TaskBundle
    layout: Layout
    codec: Codec | None  #: None where updates are summed securely
    update_bytes: int  #: of every update of this task; the most, unless :attr:`has_fixed_uploads`

    @property
    def policy(self) -> task_pb2.RoundPolicy:
        return self.bundle.round

    @property
    def secure(self) -> task_pb2.SecurePlan | None:
        return self.bundle.secure if self.bundle.HasField("secure") else None

    @property
    def stage_ms(self) -> int:
        """How long a stage of a secure round waits."""
        return self.bundle.secure.stage_ms

    @property
    def deadline_ms(self) -> int:
        """From a round's first lease to its end: for a secure one, training and then the protocol at its slowest."""
        protocol = SECURE_ATTEMPTS * SECURE_STAGES * self.stage_ms if self.secure else 0
        return self.policy.deadline_ms + protocol

    def vector(self, work: device_pb2.Work) -> VectorPlan:
        """What is summed in a secure round."""
        return VectorPlan.from_bundle(self.bundle, work)

    def upload_bytes(self, work: device_pb2.Work) -> int:
        """The length of what a device uploads for this work; the most, unless :attr:`has_fixed_uploads`."""
        return self.vector(work).nbytes if self.secure else self.update_bytes

    @property
    def has_fixed_uploads(self) -> bool:
        """Whether all uploads for the same work have the same length."""
        return self.codec is None or self.codec.is_fixed

    def clip_norm(self, version: task_pb2.VersionManifest) -> float:
        """The L2 norm that holds in a round from this version; 0: none."""
        return version.clip_norm or self.bundle.update.clip_norm

    @property
    def is_sampled(self) -> bool:
        """Whether each training round draws its devices at random, as the privacy accountant assumes."""
        return self.bundle.HasField("privacy") and self.bundle.privacy.sampling == task_pb2.SAMPLING_POISSON

    def goal(self, work: device_pb2.Work) -> int:
        """Reports that close a round of this kind."""
        if work == device_pb2.WORK_EVALUATE and self.policy.evaluation_reports:
            return self.policy.evaluation_reports
        return self.policy.goal_reports

    def places(self, work: device_pb2.Work) -> int:
        """Devices that hold a lease or have reported, at most: the goal and its over-selection."""
        # Rounded first, so that 10 * 1.1 asks 11 devices and not 12.
        return math.ceil(round(self.goal(work) * max(1.0, self.policy.over_selection), 6))

    def minimum(self, work: device_pb2.Work) -> int:
        """Reports without which the deadline finds nothing worth keeping. An evaluation is content with any."""
        return 1 if work == device_pb2.WORK_EVALUATE else max(1, min(self.policy.min_reports, self.policy.goal_reports))

    def evaluates(self, version: int) -> bool:
        """Whether devices evaluate this version: every so many, and the last."""
        every = self.policy.evaluate_every
        return every > 0 and (version % every == 0 or version >= self.policy.rounds)


@lru_cache(maxsize=256)
def parse_plan(payload: bytes) -> Plan:
    """The plan of a serialised TaskBundle that was checked when it was submitted."""
    bundle = task_pb2.TaskBundle.FromString(payload)
    layout = layout_from_proto(bundle.layout)
    if bundle.HasField("secure"):
        return Plan(bundle, layout, None, VectorPlan.from_bundle(bundle, device_pb2.WORK_TRAIN).nbytes)
    codec = codec_from_plan(bundle.update)
    return Plan(bundle, layout, codec, codec.encoded_bytes(layout))
