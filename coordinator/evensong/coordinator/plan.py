"""A task's bundle, parsed once: what every step asks of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from evensong.v1 import device_pb2, task_pb2
from evensong.wire.codecs import UpdateCodec
from evensong.wire.tensors import Layout, layout_from_proto


@dataclass(frozen=True)
class Plan:
    """Immutable, as the bundle is."""

    bundle: task_pb2.TaskBundle
    layout: Layout
    codec: UpdateCodec
    update_bytes: int  #: of every update of this task

    @property
    def policy(self) -> task_pb2.RoundPolicy:
        return self.bundle.round

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
    codec = UpdateCodec.from_plan(bundle.update)
    return Plan(bundle, layout, codec, codec.encoded_bytes(layout))
