"""The rules of a task bundle: what the engineer's side and the daemon both check it by. A bundle is hostile input."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evensong.coordinator.errors import TaskError as TaskError
from evensong.coordinator.privacy.rules import check_privacy
from evensong.secagg.errors import ParameterError
from evensong.secagg.session import Policy
from evensong.secagg.vector import VectorPlan
from evensong.v1 import device_pb2, task_pb2
from evensong.wire.codec import codec_from_plan
from evensong.wire.errors import UpdateError
from evensong.wire.tensors import layout_from_proto


@dataclass(frozen=True)
class Bounds:
    """What a number may be; an open end does not belong to it. NaN and infinity never do."""

    least: float
    most: float
    least_open: bool = False
    most_open: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.least if self.least_open else value >= self.least
        below = value < self.most if self.most_open else value <= self.most
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        least = f"{'above' if self.least_open else 'at least'} {self.least:g}"
        return f"a number {least} and {'below' if self.most_open else 'at most'} {self.most:g}"


_POSITIVE = Bounds(0, 1e6, least_open=True)
_POSITIVE_OR_ABSENT = Bounds(0, 1e6)
_SHARE = Bounds(0, 1, most_open=True)
_COUNT = Bounds(1, 1_000_000)
_COUNT_OR_ABSENT = Bounds(0, 1_000_000)

#: Flower's strategies that every coordinator offers, and the arguments that they take.
STRATEGIES: dict[str, dict[str, Bounds]] = {
    "fedavg": {},
    "fedavgm": {"server_learning_rate": _POSITIVE, "server_momentum": _SHARE},
    "fedadam": {"eta": _POSITIVE, "beta_1": _SHARE, "beta_2": _SHARE, "tau": _POSITIVE},
    "fedyogi": {"eta": _POSITIVE, "beta_1": _SHARE, "beta_2": _SHARE, "tau": _POSITIVE},
    "fedadagrad": {"eta": _POSITIVE, "tau": _POSITIVE},
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_ARTIFACT_BYTES = 1 << 31
_MAX_PATTERNS = 1_000
_DAY_MS = 24 * 3_600_000


def check_bundle(bundle: task_pb2.TaskBundle) -> None:
    """:class:`TaskError` unless every field of ``bundle`` is present and in range.

    Whether the coordinator knows the strategy, has the blobs and the artifact fits the layout is for the caller to
    check.
    """
    for what, name in (("the task's name", bundle.name), ("the population", bundle.population)):
        if not _NAME.fullmatch(name):
            raise TaskError(f"{what} is malformed", expected="1 to 100 of A-Z a-z 0-9 . _ -", got=repr(name[:120]))
    if len(bundle.artifact.sha256) != 32 or not 1 <= bundle.artifact.size_bytes <= _MAX_ARTIFACT_BYTES:
        raise TaskError("the artifact's address is malformed", expected="32 bytes of SHA-256 and a size")
    try:
        layout_from_proto(bundle.layout)
        if not bundle.HasField("secure"):
            codec_from_plan(bundle.update)
    except UpdateError as error:
        raise TaskError(f"the task's updates cannot be: {error}") from error
    for name, value, bounds in _numbers(bundle):
        if not bounds.holds(value):
            raise TaskError(f"{name} is out of range", expected=bounds, got=value)
    if bundle.update.download_bits and not 2 <= bundle.update.download_bits <= 8:
        raise TaskError(
            "update.download_bits is out of range", expected="2 to 8, or 0", got=bundle.update.download_bits
        )
    if bundle.update.weighting not in (task_pb2.WEIGHTING_EXAMPLES, task_pb2.WEIGHTING_UNIFORM):
        raise TaskError("update.weighting is unknown", expected="examples or uniform", got=bundle.update.weighting)
    if bundle.round.min_reports > bundle.round.goal_reports:
        raise TaskError(
            "min_reports is above the goal", expected=f"1 to {bundle.round.goal_reports}", got=bundle.round.min_reports
        )
    _check_secure(bundle)
    check_privacy(bundle)
    _check_patterns("local.personal", bundle.local.personal)
    _check_patterns("personalization.trainable", bundle.local.personalization.trainable)
    if not _NAME.fullmatch(bundle.server.strategy) or len(bundle.server.arguments) > 100:
        raise TaskError("the strategy's name is malformed", got=repr(bundle.server.strategy[:120]))
    for argument, value in bundle.server.arguments.items():
        if not (argument.isidentifier() and math.isfinite(value)):
            raise TaskError(
                "a strategy's argument is malformed", expected="a name and a finite number", got=argument[:80]
            )


def _check_secure(bundle: task_pb2.TaskBundle) -> None:
    """What a secure sum needs: its own packing, bounds on every value, and parameters that give security."""
    update, policy, plan = bundle.update, bundle.round, bundle.secure
    if (update.codec == task_pb2.CODEC_FIELDS) != bundle.HasField("secure"):
        raise TaskError("CODEC_FIELDS goes with a secure sum, and nothing else does", got=update.codec)
    if not bundle.HasField("secure"):
        return
    if not update.clip_norm and not update.HasField("adaptive_clipping"):
        raise TaskError("a secure sum needs a clip norm: it bounds what one device adds", fix="Say clip_norm=...")
    if update.weighting == task_pb2.WEIGHTING_EXAMPLES and not update.max_weight.is_integer():
        raise TaskError("max_weight of a secure sum must be whole", got=update.max_weight)
    least = min(policy.goal_reports, policy.evaluation_reports or policy.goal_reports)
    if not 3 <= plan.min_survivors <= least:
        raise TaskError(
            "a secure sum needs three devices or more",
            expected=f"min_survivors from 3 to the goal, {least}",
            got=plan.min_survivors,
            fix="Raise goal, or say secure=None: then the coordinator sees each update.",
        )
    if plan.max_cohort < largest_cohort(policy):
        raise TaskError("max_cohort is too small", expected=f"at least {largest_cohort(policy)}", got=plan.max_cohort)
    try:
        for members in np.linspace(plan.min_survivors, plan.max_cohort, 32).astype(int):
            Policy.from_plan(plan).parameters(int(members))
        VectorPlan.from_bundle(bundle, device_pb2.WORK_TRAIN)
    except (ParameterError, UpdateError) as error:
        raise TaskError(f"the secure sum cannot be: {error}") from error


def largest_cohort(policy: task_pb2.RoundPolicy) -> int:
    """Devices that work in a round of this policy at the same time, at most."""
    goal = max(policy.goal_reports, policy.evaluation_reports)
    # Rounded first, so that 10 * 1.1 asks 11 devices and not 12.
    return math.ceil(round(goal * max(1.0, policy.over_selection), 6))


def check_server_plan(plan: task_pb2.ServerPlan) -> None:
    """:class:`TaskError` unless the plan names one of :data:`STRATEGIES` with arguments that it takes."""
    known = STRATEGIES.get(plan.strategy)
    if known is None:
        raise TaskError("there is no such strategy", expected=", ".join(STRATEGIES), got=plan.strategy[:80])
    for argument, value in plan.arguments.items():
        if argument not in known:
            raise TaskError(
                f"strategy {plan.strategy!r} has no argument {argument[:80]!r}", expected=", ".join(known) or "none"
            )
        if not known[argument].holds(value):
            raise TaskError(f"{argument} of {plan.strategy!r} is out of range", expected=known[argument], got=value)


def _numbers(bundle: task_pb2.TaskBundle) -> Iterator[tuple[str, float, Bounds]]:
    """Every number of the bundle with its name and bounds; a field that may be absent may be 0."""
    local, update, policy = bundle.local, bundle.update, bundle.round
    yield "local.epochs", local.epochs, Bounds(1, 10_000)
    yield "local.batch_size", local.batch_size, Bounds(0, 1 << 20)
    yield "local.learning_rate", local.learning_rate, _POSITIVE
    yield "local.final_learning_rate", local.final_learning_rate, _POSITIVE_OR_ABSENT
    yield "local.max_steps", local.max_steps, _COUNT_OR_ABSENT
    yield "local.min_examples", local.min_examples, _COUNT
    if local.HasField("personalization"):
        yield "personalization.epochs", local.personalization.epochs, Bounds(0, 10_000)
        if local.personalization.epochs:
            yield "personalization.learning_rate", local.personalization.learning_rate, _POSITIVE
    yield "update.clip_norm", update.clip_norm, Bounds(0, 1e30)
    yield "update.max_weight", update.max_weight, Bounds(0, 1e12, least_open=True)
    if update.HasField("adaptive_clipping"):
        yield "adaptive_clipping.initial", update.adaptive_clipping.initial, Bounds(0, 1e30, least_open=True)
        yield "adaptive_clipping.quantile", update.adaptive_clipping.quantile, Bounds(0, 1, least_open=True)
        yield "adaptive_clipping.rate", update.adaptive_clipping.rate, Bounds(0, 10, least_open=True)
    if bundle.HasField("secure"):
        yield "secure.corrupted_share", bundle.secure.corrupted_share, Bounds(0, 0.5, most_open=True)
        yield "secure.dropout_share", bundle.secure.dropout_share, Bounds(0, 0.5, most_open=True)
        yield "secure.max_cohort", bundle.secure.max_cohort, Bounds(1, 100_000)
        yield "secure.stage_ms", bundle.secure.stage_ms, Bounds(1, _DAY_MS)
        yield "update.bits", update.bits, Bounds(2, 16)
    yield "round.goal_reports", policy.goal_reports, _COUNT
    yield "round.min_reports", policy.min_reports, _COUNT
    yield "round.over_selection", policy.over_selection, Bounds(1, 10)
    yield "round.deadline_ms", policy.deadline_ms, Bounds(1, 30 * _DAY_MS)
    yield "round.rounds", policy.rounds, _COUNT
    yield "round.evaluate_every", policy.evaluate_every, _COUNT_OR_ABSENT
    yield "round.evaluation_reports", policy.evaluation_reports, _COUNT_OR_ABSENT
    yield "training_bytes", bundle.training_bytes, Bounds(1, 1 << 40)


def _check_patterns(name: str, patterns: Sequence[str]) -> None:
    if len(patterns) > _MAX_PATTERNS or not all(1 <= len(pattern) <= 255 for pattern in patterns):
        raise TaskError(f"{name} is malformed", expected=f"at most {_MAX_PATTERNS} patterns of 1 to 255 characters")
