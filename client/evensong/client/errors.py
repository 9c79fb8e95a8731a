"""The client's branch of the exception tree."""

from __future__ import annotations

from evensong.v1 import common_pb2
from evensong.wire.errors import EvensongError


class ClientError(EvensongError):
    """Base of what can go wrong on a device."""


class StateError(ClientError):
    """The state directory is in use, damaged, or written by a newer evensong."""


class StorageFullError(ClientError):
    """The device's disk is full or read-only. Nothing that was stored before is lost; the step can be repeated."""


class IdentityError(ClientError):
    """The device's private key is unreadable, or readable by others."""


class EnrolmentError(ClientError):
    """The device is not enrolled and could not be: no token, a refused one, or a coordinator with the wrong key."""


class NoModelError(ClientError):
    """There is no model to predict with yet, or its files are gone; the next check-in fetches one."""


class UntrustedError(ClientError):
    """What the coordinator sent does not verify: signature, hash chain, layout, or a field out of any sane range."""


class UnfitError(ClientError):
    """The task is genuine but not for this device: memory, examples, size or effort."""


class ConditionsChangedError(ClientError):
    """Power, network, load or memory no longer allow work."""


class LeaseExpiredError(ClientError):
    """The time for the assignment is over; what was computed for it is dropped."""


class AbandonedError(ClientError):
    """The coordinator gave the round up; what was computed for it is dropped. ``retry`` says when to come back."""

    def __init__(self, what: str, retry: common_pb2.RetryWindow, *, got: object = None) -> None:
        self.retry = retry
        super().__init__(what, got=got)


_PASSING = (
    common_pb2.REFUSAL_REASON_UNAVAILABLE,
    common_pb2.REFUSAL_REASON_QUOTA,
    common_pb2.REFUSAL_REASON_BAD_SIGNATURE,
)


class RefusedError(ClientError):
    """The coordinator refused a call. ``reason`` is a ``RefusalReason``, ``retry`` says when to come back."""

    def __init__(self, refusal: common_pb2.Refusal, retry: common_pb2.RetryWindow) -> None:
        self.reason: int = refusal.reason
        self.message = printable(refusal.message)
        self.retry = retry
        super().__init__(f"the coordinator refused: {self.name}", got=self.message or None)

    @property
    def is_passing(self) -> bool:
        """Whether it says nothing about what was asked, so that asking again later may help."""
        return self.reason in _PASSING

    @property
    def name(self) -> str:
        """The reason without its prefix, such as ``TOO_LATE``."""
        return refusal_name(self.reason)


def refusal_name(reason: int) -> str:
    """``TOO_LATE`` for ``REFUSAL_REASON_TOO_LATE``; a number that this version does not know stays a number."""
    if reason not in common_pb2.RefusalReason.values():
        return str(reason)
    return common_pb2.RefusalReason.Name(reason).removeprefix("REFUSAL_REASON_")


def printable(text: str, limit: int = 300) -> str:
    """Foreign text that is safe in a log or on a terminal: one line, no control characters, not endless."""
    return "".join(character if character.isprintable() else " " for character in text[:limit])
