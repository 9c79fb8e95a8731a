"""What can go wrong in a secure sum."""

from __future__ import annotations

from evensong.wire.errors import EvensongError


class SecureError(EvensongError):
    """Base of the errors of secure aggregation."""


class ParameterError(SecureError):
    """A cohort, or what its plan asks for, gives no security. Nothing is weakened instead."""


class ProtocolError(SecureError):
    """A message breaks the protocol: malformed, replayed, forged, or out of turn. ``blamed`` is the id of the device
    that it is certain to come from, if any."""

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
        blamed: str | None = None,
    ) -> None:
        super().__init__(what, expected=expected, got=got, fix=fix)
        self.blamed = blamed


class AbortedError(SecureError):
    """The attempt is over without a sum; nothing was revealed."""
