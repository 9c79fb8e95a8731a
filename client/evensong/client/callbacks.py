"""What a device tells its host while it works: frozen events, handed to each callback in order.

Events of training come from the thread that trains. A callback that raises is logged and ignored: progress must not
decide about work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_log = logging.getLogger("evensong.client")


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class Enrolled(Event):
    device_id: str


@dataclass(frozen=True)
class CheckedIn(Event):
    """The coordinator answered; ``work`` is "train", "evaluate" or None."""

    work: str | None
    task_id: str | None


@dataclass(frozen=True)
class Downloaded(Event):
    """A blob arrived whole and verified; ``bytes_down`` is what crossed the network this time."""

    what: str
    bytes_down: int


@dataclass(frozen=True)
class ModelServed(Event):
    """From now on ``predict`` answers with this version."""

    task_id: str
    version: int


@dataclass(frozen=True)
class RoundStarted(Event):
    task_id: str
    round: int
    version: int
    work: str


@dataclass(frozen=True)
class StepDone(Event):
    """One optimiser step; ``loss`` is the mean over its batch."""

    task_id: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Sealed(Event):
    """The update is clipped and encoded; ``norm`` is its L2 norm before clipping."""

    task_id: str
    round: int
    update_bytes: int
    norm: float


@dataclass(frozen=True)
class SecureStage(Event):
    """A stage of a secure round has begun: "shares", "masked", "commit" or "unmask", in a cohort of ``members``."""

    task_id: str
    round: int
    attempt: int
    stage: str
    members: int


@dataclass(frozen=True)
class Uploaded(Event):
    """The update was committed; ``bytes_up`` counts what was sent since the device last started."""

    task_id: str
    round: int
    bytes_up: int


@dataclass(frozen=True)
class Refused(Event):
    """The coordinator refused, or the lease ran out (``LEASE_EXPIRED``); the work was dropped."""

    task_id: str
    reason: str
    message: str


@dataclass(frozen=True)
class GaveUp(Event):
    """The device gave its lease back."""

    task_id: str
    reason: str
    message: str


@dataclass(frozen=True)
class Personalized(Event):
    task_id: str
    version: int
    steps: int
    loss: float


Callback = Callable[[Event], None]


class Callbacks:
    """Calls each of ``callbacks`` with each event."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)

    def emit(self, event: Event) -> None:
        for callback in self._callbacks:
            try:
                callback(event)
            except Exception:
                _log.exception("a callback failed on %s", type(event).__name__)
