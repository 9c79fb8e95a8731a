"""What the coordinator raises inside; the two services turn each into their own kind of answer."""

from __future__ import annotations

from evensong.v1 import common_pb2
from evensong.wire.errors import EvensongError


class RefusalError(EvensongError):
    """A device's call that changes nothing: ``reason`` is one of ``REFUSAL_REASON_*``, the message is for a log.

    ``retry`` overrides the usual window of the reason, in milliseconds (earliest, latest).
    """

    def __init__(
        self,
        reason: common_pb2.RefusalReason,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
        retry: tuple[int, int] | None = None,
        received_bytes: int | None = None,
    ) -> None:
        super().__init__(what, expected=expected, got=got, fix=fix)
        self.reason = reason
        self.retry = retry
        #: of a refused chunk: where the device goes on.
        self.received_bytes = received_bytes


class TaskError(EvensongError):
    """A task asks for something that is missing, out of range or contradictory."""


class StorageError(EvensongError):
    """The database or the disk did not do what it was asked: full, locked, damaged, or gone. Nothing was changed."""


class OperatorError(EvensongError):
    """An operator asked for what cannot be; ``code`` is the name of a gRPC status code."""

    def __init__(
        self, code: str, what: str, *, expected: object = None, got: object = None, fix: str | None = None
    ) -> None:
        super().__init__(what, expected=expected, got=got, fix=fix)
        self.code = code
