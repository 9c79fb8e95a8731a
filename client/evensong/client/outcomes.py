"""How one step of the check-in loop ended. ``wait_s`` is how long to wait before the next."""

from __future__ import annotations

from dataclasses import dataclass

from evensong.client.conditions import Unmet
from evensong.wire.errors import EvensongError


@dataclass(frozen=True)
class Outcome:
    wait_s: float


@dataclass(frozen=True)
class NotReady(Outcome):
    """The conditions do not allow work; the coordinator was not asked."""

    unmet: tuple[Unmet, ...]


@dataclass(frozen=True)
class Idle(Outcome):
    """The coordinator has no work for this device now; ``reason`` is a refusal's name or None, ``message`` its text."""

    reason: str | None = None
    message: str = ""


@dataclass(frozen=True)
class Trained(Outcome):
    """An update was committed. ``loss`` is the mean over all examples seen in training."""

    task_id: str
    round: int
    version: int
    examples: int
    loss: float
    update_bytes: int


@dataclass(frozen=True)
class Evaluated(Outcome):
    """Metrics of the version on local test examples were handed in."""

    task_id: str
    version: int
    examples: int
    loss: float
    correct: int


@dataclass(frozen=True)
class Dropped(Outcome):
    """The work was in vain: refused (``TOO_LATE``, ``NOT_NEEDED``, ...), its lease ran out (``LEASE_EXPIRED``), or the
    cohort came to no secure sum (``NO_SUM``)."""

    task_id: str
    reason: str
    message: str


@dataclass(frozen=True)
class Aborted(Outcome):
    """The device gave the work back: ``CONDITIONS``, ``DIVERGED``, ``UNTRUSTED``, ``UNFIT`` or ``INTERNAL``."""

    task_id: str
    reason: str
    message: str


@dataclass(frozen=True)
class Postponed(Outcome):
    """Network or disk failed; nothing was lost, and the next step goes on where this one stopped."""

    error: EvensongError
