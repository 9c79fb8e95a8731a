"""What an attempt at a secure sum is bound to, and what its plan asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from evensong.secagg.errors import ParameterError
from evensong.secagg.parameters import MIN_MEMBERS, Parameters, check_shares, parameters_for
from evensong.secagg.transcript import label
from evensong.v1 import task_pb2
from evensong.wire.chunks import sha256

_CONTEXT = label("context")
_TASK_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Session:
    """One attempt: both sides know it before the first message, from what the coordinator signed and the lease.

    ``bundle_sha256`` and ``manifest_sha256`` are 32 bytes each, of the signed task bundle and of the signed manifest of
    the version that devices trained from; ``task_id`` is 32 hex digits; ``work`` is the number of ``evensong.v1.Work``.
    :class:`ParameterError` for anything else.
    """

    bundle_sha256: bytes
    manifest_sha256: bytes
    task_id: str
    work: int
    round: int
    attempt: int
    population: str

    def __post_init__(self) -> None:
        for name, digest in (("bundle_sha256", self.bundle_sha256), ("manifest_sha256", self.manifest_sha256)):
            if len(digest) != 32:
                raise ParameterError(f"{name} is malformed", expected="32 bytes", got=f"{len(digest)} bytes")
        if not _TASK_ID.fullmatch(self.task_id):
            raise ParameterError("the task id is malformed", expected="32 lower-case hex digits", got=self.task_id)
        for name, number, bits in (("work", self.work, 8), ("round", self.round, 64), ("attempt", self.attempt, 32)):
            if not 0 <= number < 1 << bits:
                raise ParameterError(f"{name} is out of range", expected=f"{bits} bits", got=number)

    @cached_property
    def context(self) -> bytes:
        """``ctx``, 32 bytes: part of everything that is signed or derived in this attempt."""
        return sha256(
            _CONTEXT
            + self.bundle_sha256
            + self.manifest_sha256
            + bytes.fromhex(self.task_id)
            + self.work.to_bytes(1, "little")
            + self.round.to_bytes(8, "little")
            + self.attempt.to_bytes(4, "little")
        )


@dataclass(frozen=True)
class Policy:
    """What the plan of a task asks for; see ``SecurePlan``. :class:`ParameterError` if it gives no security."""

    corrupted_share: float
    dropout_share: float
    min_survivors: int
    max_cohort: int
    semi_malicious: bool = False

    def __post_init__(self) -> None:
        check_shares(self.corrupted_share, self.dropout_share)
        if self.min_survivors < MIN_MEMBERS:
            raise ParameterError("min_survivors is too low", expected=f"at least {MIN_MEMBERS}", got=self.min_survivors)
        if self.max_cohort < self.min_survivors:
            raise ParameterError(
                "max_cohort is too low", expected=f"at least min_survivors, {self.min_survivors}", got=self.max_cohort
            )

    @classmethod
    def from_plan(cls, plan: task_pb2.SecurePlan) -> Policy:
        """Of a bundle's plan."""
        return cls(plan.corrupted_share, plan.dropout_share, plan.min_survivors, plan.max_cohort, plan.semi_malicious)

    def parameters(self, members: int) -> Parameters:
        """Of a cohort of so many; :class:`ParameterError` if there are none, or too many."""
        if members > self.max_cohort:
            raise ParameterError("the cohort is too large", expected=f"at most {self.max_cohort}", got=members)
        return parameters_for(
            members,
            corrupted_share=self.corrupted_share,
            dropout_share=self.dropout_share,
            min_survivors=self.min_survivors,
            semi_malicious=self.semi_malicious,
        )
