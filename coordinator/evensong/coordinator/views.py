"""What the handle gives back: plain, frozen objects in place of protobuf messages."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from evensong.v1 import common_pb2, operator_pb2, task_pb2

Name = TypeVar("Name", bound=enum.StrEnum)


class TaskState(enum.StrEnum):
    """Where a task stands; all but ``RUNNING`` are final."""

    RUNNING = "running"
    COMPLETE = "complete"
    STOPPED = "stopped"
    FAILED = "failed"
    UNKNOWN = "unknown"  #: a state that this version of the handle does not know


class EventKind(enum.StrEnum):
    """What happened to a task."""

    TASK_STARTED = "task_started"
    ROUND_STARTED = "round_started"
    REPORT_ACCEPTED = "report_accepted"
    ROUND_ABANDONED = "round_abandoned"
    VERSION_COMMITTED = "version_committed"
    VERSION_EVALUATED = "version_evaluated"
    VERSION_PROMOTED = "version_promoted"
    TASK_ENDED = "task_ended"
    UNKNOWN = "unknown"  #: a kind that this version of the handle does not know


@dataclass(frozen=True)
class Metrics:
    """Means over all examples of all devices that took part."""

    examples: int
    loss: float
    accuracy: float

    @classmethod
    def of(cls, sums: common_pb2.Metrics) -> Metrics | None:
        """None where no example was counted."""
        if not sums.examples:
            return None
        return cls(sums.examples, sums.loss_sum / sums.examples, sums.correct / sums.examples)


@dataclass(frozen=True)
class TaskEvent:
    """One line of a task's history. ``sequence`` counts from 1 without gaps."""

    sequence: int
    time: datetime  #: UTC
    kind: EventKind
    round: int
    version: int
    reports: int  #: so far, or in all, in the round
    metrics: Metrics | None
    bytes_up: int  #: updates that all devices of the round sent
    bytes_down: int  #: artifacts and parameters that they were sent
    message: str

    @classmethod
    def of(cls, event: operator_pb2.TaskEvent) -> TaskEvent:
        return cls(
            event.sequence,
            _time(event.time_unix_ms),
            _known(EventKind, operator_pb2.EventKind, "EVENT_KIND_", event.kind),
            event.round,
            event.version,
            event.reports,
            Metrics.of(event.metrics),
            event.bytes_up,
            event.bytes_down,
            event.message,
        )


@dataclass(frozen=True)
class TaskStatus:
    """A task as it stands now."""

    task_id: str
    bundle: task_pb2.TaskBundle
    state: TaskState
    round: int  #: the open one, from 1
    version: int  #: served now
    created: datetime  #: UTC
    message: str  #: why it failed

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def population(self) -> str:
        return self.bundle.population

    @property
    def rounds(self) -> int:
        """Versions after which the task is complete."""
        return self.bundle.round.rounds

    @classmethod
    def of(cls, status: operator_pb2.TaskStatus) -> TaskStatus:
        return cls(
            status.task_id,
            status.bundle,
            _known(TaskState, operator_pb2.TaskState, "TASK_STATE_", status.state),
            status.round,
            status.version,
            _time(status.created_unix_ms),
            status.message,
        )


@dataclass(frozen=True)
class Version:
    """A committed model with its lineage."""

    number: int  #: 0 is the artifact's initial state
    parent: int
    round: int
    reports: int
    total_weight: float
    training: Metrics | None
    evaluation: Metrics | None
    created: datetime  #: UTC
    serving: bool  #: the one that devices predict with
    parameters_sha256: bytes
    parameters_bytes: int

    @classmethod
    def of(cls, info: operator_pb2.VersionInfo) -> Version:
        return cls(
            info.manifest.number,
            info.manifest.parent,
            info.round,
            info.reports,
            info.total_weight,
            Metrics.of(info.training),
            Metrics.of(info.evaluation),
            _time(info.created_unix_ms),
            info.serving,
            info.manifest.parameters.sha256,
            info.manifest.parameters.size_bytes,
        )


@dataclass(frozen=True)
class DeviceStatus:
    """A device as the coordinator knows it: nothing about its owner, nothing about its data."""

    device_id: str
    population: str
    enrolled: datetime  #: UTC
    last_seen: datetime | None  #: UTC
    accepted_reports: int
    revoked: bool
    last_refusal: str  #: empty if it was never refused

    @classmethod
    def of(cls, info: operator_pb2.DeviceInfo) -> DeviceStatus:
        return cls(
            info.device_id,
            info.population,
            _time(info.enrolled_unix_ms),
            _time(info.last_seen_unix_ms) if info.last_seen_unix_ms else None,
            info.accepted_reports,
            info.revoked,
            info.last_refusal.message,
        )


@dataclass(frozen=True)
class IssuedToken:
    """An enrolment token. It is shown once: the coordinator keeps only a hash."""

    text: str
    expires: datetime  #: UTC

    @classmethod
    def of(cls, response: operator_pb2.CreateEnrolmentTokenResponse) -> IssuedToken:
        return cls(response.token, _time(response.expires_unix_ms))

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class PrivacyRelease:
    """One entry of the privacy ledger."""

    task_id: str
    round: int
    version: int  #: 0: a noised sum that the coordinator saw and made no version of
    mechanism: str
    noise_multiplier: float
    clip_norm: float
    devices: int  #: in the sum
    sampling_probability: float  #: 1: no amplification is claimed
    epsilon: float  #: spent by the task, this release included
    delta: float
    created: datetime  #: UTC

    @classmethod
    def of(cls, entry: operator_pb2.PrivacyLedgerEntry) -> PrivacyRelease:
        return cls(
            entry.task_id,
            entry.round,
            entry.version,
            task_pb2.PrivacyMechanism.Name(entry.mechanism).removeprefix("PRIVACY_MECHANISM_").lower(),
            entry.noise_multiplier,
            entry.clip_norm,
            entry.devices,
            entry.sampling_probability,
            entry.epsilon,
            entry.delta,
            _time(entry.created_unix_ms),
        )


@dataclass(frozen=True)
class PrivacyLedger:
    """What a task, or all tasks of a population, have spent. ``plan`` is the task's, if it has one."""

    plan: task_pb2.PrivacyPlan | None
    releases: tuple[PrivacyRelease, ...]

    @property
    def epsilon(self) -> float:
        """Spent by each task, added up: basic composition, an upper bound at the sum of their deltas."""
        return sum({release.task_id: release.epsilon for release in self.releases}.values())

    @property
    def delta(self) -> float:
        """That goes with :attr:`epsilon`."""
        return sum({release.task_id: release.delta for release in self.releases}.values())

    @classmethod
    def of(cls, response: operator_pb2.ReadPrivacyLedgerResponse) -> PrivacyLedger:
        plan = response.plan if response.HasField("plan") else None
        return cls(plan, tuple(PrivacyRelease.of(entry) for entry in response.entries))


def _time(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms / 1000, UTC)


def _known(names: type[Name], messages: Any, prefix: str, value: int) -> Name:
    """``names("running")`` of ``TASK_STATE_RUNNING``; "unknown" for what a newer coordinator may say."""
    try:
        return names(messages.Name(value).removeprefix(prefix).lower())
    except ValueError:
        return names("unknown")
