"""Secure rounds, the device's side of ``docs/secagg.md``: what was computed is masked, so that only a sum is learnt.

The protocol is :class:`evensong.secagg.device.DeviceMachine`; here it meets the network and the disk. Its secrets and
the masked vector exist in memory only. What is written down is which attempt the device joined, before anything of it
leaves, and that the update is *spent*, before the device's signature on the survivors does: from there on a sum may be
revealed. So a process that starts anew has left the cohort of the one before it: it asks what became of that, and takes
part at most in a later attempt. No mask is made twice, and no update becomes part of two sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from evensong.client.callbacks import SecureStage
from evensong.client.context import Context
from evensong.client.enrol import authority_public_key, certificate_of, signer_public_key
from evensong.client.errors import (
    AbandonedError,
    LeaseExpiredError,
    RefusedError,
    UnfitError,
    UntrustedError,
    printable,
)
from evensong.client.pacing import Backoff, draw_wait
from evensong.client.state import Cohort, Stage, Work
from evensong.client.upload import upload
from evensong.secagg.device import DeviceMachine
from evensong.secagg.errors import SecureError
from evensong.secagg.session import Policy, Session
from evensong.v1 import common_pb2, device_pb2, secagg_pb2, task_pb2
from evensong.wire.errors import UnreachableError

Result = TypeVar("Result")

_HOLD_MS = 60_000
_MOST_ATTEMPTS = 100  # of one round; higher numbers are nonsense
_MOST_ROUNDS = 1 << 63  # what the database can hold
_GONE = "this device has been in this cohort, or a later one, and those secrets are gone"


@dataclass(frozen=True)
class TookPart:
    """The sum is revealed. ``sent`` counts the bytes of masked vectors that left, in all attempts."""

    retry: common_pb2.RetryWindow
    sent: int


async def take_part(context: Context, work: Work, assignment: device_pb2.Assignment) -> TookPart:
    """Runs the protocol with the sealed lanes of ``work.update``, in as many attempts as the coordinator needs.

    Raises :class:`AbandonedError` when the round comes to no sum, :class:`UntrustedError` when the coordinator breaks
    the protocol, :class:`UnfitError` without a certificate or while an attempt runs that a former process joined, and
    :class:`RefusedError` and :class:`LeaseExpiredError` as any other work. The network may fail for as long as the
    lease holds.
    """
    taking_part = _TakingPart(context, work, assignment)
    attempt = taking_part.joined()
    response = await taking_part.ask(attempt) if attempt else await taking_part.attempt(attempt := 1)
    while response.end.outcome != secagg_pb2.SECURE_OUTCOME_DONE:
        if response.end.outcome != secagg_pb2.SECURE_OUTCOME_AGAIN:
            told = printable(response.end.message)
            raise AbandonedError("the round came to no sum", response.retry, got=told or None)
        if not attempt < response.attempt <= _MOST_ATTEMPTS:
            raise UntrustedError(
                "the coordinator goes on with an impossible attempt", expected=f"above {attempt}", got=response.attempt
            )
        attempt = response.attempt
        response = await taking_part.attempt(attempt)
    return TookPart(response.retry, taking_part.sent)


class _TakingPart:
    """One piece of work in its round."""

    def __init__(self, context: Context, work: Work, assignment: device_pb2.Assignment) -> None:
        self._context = context
        self._work = work
        self._assignment = assignment
        self._bundle = task_pb2.TaskBundle.FromString(assignment.bundle.payload)  # verified before it was computed
        self.sent = 0

    def joined(self) -> int:
        """The last attempt of this round that an earlier process, or an earlier lease, took part in; 0 if none did."""
        known = self._known()
        return known.attempt if known and known.round == self._assignment.round else 0

    async def ask(self, attempt: int) -> secagg_pb2.SecureResponse:
        """How that attempt ended. While it goes on, this device has dropped out of it."""
        request = secagg_pb2.SecureRequest(
            lease=self._assignment.lease, attempt=attempt, masked=secagg_pb2.SecureWait(), wait_ms=0
        )
        try:
            response = await self._patiently(lambda: self._context.calls.secure(request))
        except RefusedError as error:
            if error.reason != common_pb2.REFUSAL_REASON_TOO_LATE:
                raise
            raise UnfitError(_GONE) from error  # its vector never arrived
        if not response.HasField("end"):
            raise UnfitError(_GONE)
        return response

    async def attempt(self, attempt: int) -> secagg_pb2.SecureResponse:
        """The five steps; ends early with whatever end the coordinator tells."""
        try:
            machine = self._machine(attempt)
            self._join(attempt)
            try:
                return await self._run(machine, attempt)
            finally:
                machine.abort()  # all secrets are forgotten, however it ended
        except SecureError as error:
            raise UntrustedError("the coordinator broke the protocol of secure sums", got=error) from error

    async def _run(self, machine: DeviceMachine, attempt: int) -> secagg_pb2.SecureResponse:
        context = self._context
        response = await self._send(attempt, advertise=machine.advertise())
        if response.HasField("end"):
            return response
        roster = _expected(response, "roster").roster
        shares = await context.run_blocking(lambda: machine.on_roster(roster, context.clock.unix_ms()))
        self._tell(attempt, "shares", machine)
        response = await self._send(attempt, shares=shares)
        if response.HasField("end"):
            return response
        delivery = _expected(response, "delivery").delivery
        await context.run_blocking(lambda: machine.on_delivery(delivery))
        self._tell(attempt, "masked", machine)
        await self._upload(machine, attempt)
        response = await self._send(attempt, masked=secagg_pb2.SecureWait())
        if response.HasField("end"):
            return response
        survivors = _expected(response, "survivors").survivors
        commit = await context.run_blocking(lambda: machine.on_survivors(survivors))
        self._remember(attempt, spent=True)
        self._tell(attempt, "commit", machine)
        response = await self._send(attempt, commit=commit)
        if response.HasField("end"):
            return response
        quorum = _expected(response, "quorum").quorum
        shares_of_others = await context.run_blocking(lambda: machine.on_quorum(quorum))
        self._tell(attempt, "unmask", machine)
        return _expected(await self._send(attempt, unmask=shares_of_others), "end")

    def _join(self, attempt: int) -> None:
        """Writes down that the device takes part, unless it did before: then it cannot, and must not."""
        round = self._assignment.round
        if round >= _MOST_ROUNDS:
            raise UntrustedError("the round's number is out of range", got=round)
        known = self._known()
        if known is not None and (round, attempt) <= (known.round, known.attempt):
            raise UnfitError(_GONE)
        if known is not None and known.spent and known.round == round:
            raise UntrustedError("the coordinator asks for a second sum with the same update")
        self._remember(attempt, spent=False)

    def _known(self) -> Cohort | None:
        return self._context.state.cohort(self._assignment.task_id, self._assignment.work)

    def _remember(self, attempt: int, *, spent: bool) -> None:
        cohort = Cohort(self._assignment.round, attempt, spent)
        self._context.state.set_cohort(self._assignment.task_id, self._assignment.work, cohort)

    def _machine(self, attempt: int) -> DeviceMachine:
        context, assignment = self._context, self._assignment
        certificate = certificate_of(context)
        session = Session(
            bundle_sha256=hashlib.sha256(assignment.bundle.payload).digest(),
            manifest_sha256=hashlib.sha256(assignment.version.payload).digest(),
            task_id=assignment.task_id,
            work=assignment.work,
            round=assignment.round,
            attempt=attempt,
            population=self._bundle.population,
        )
        return DeviceMachine(
            session,
            Policy.from_plan(self._bundle.secure),
            identity=context.identity.key,
            certificate=certificate,
            authority_public_key=authority_public_key(context),
            coordinator_public_key=signer_public_key(context),
            draw=context.randomness.token,
            primitives=context.primitives,
        )

    async def _upload(self, machine: DeviceMachine, attempt: int) -> None:
        """The masked vector, from memory: it is never stored, and signed once."""
        context = self._context

        def mask() -> tuple[bytes, secagg_pb2.SecureMasked]:
            lanes = np.frombuffer(self._work.update or b"", "<u8").astype(np.uint64)
            machine.mask(lanes)
            data = lanes.astype("<u8", copy=False).tobytes()
            return data, machine.masked(hashlib.sha256(data).digest())

        data, word = await context.run_blocking(mask)
        work = replace(
            self._work,
            stage=Stage.SEALED,
            update=data,
            weight=0.0,
            metrics=b"",
            within=False,
            request_id=context.randomness.token(16),
            begin_request_id=context.randomness.token(16),
        )
        _, sent = await self._patiently(lambda: upload(context, work, self._assignment.lease, masked=word))
        self.sent += sent

    async def _send(self, attempt: int, **step: Message) -> secagg_pb2.SecureResponse:
        """One step, the same bytes again and again until its stage is over."""
        request = secagg_pb2.SecureRequest(
            lease=self._assignment.lease,
            attempt=attempt,
            wait_ms=_HOLD_MS,
            **step,  # type: ignore[arg-type]
        )
        while True:
            response = await self._patiently(lambda: self._context.calls.secure(request))
            if response.WhichOneof("next") is not None:
                return response
            await self._pause(draw_wait(response.retry, self._context.randomness))

    async def _patiently(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Outlasts a network or a coordinator that fails, as long as the lease holds."""
        backoff = Backoff(self._context.randomness)
        while True:
            try:
                return await call()
            except UnreachableError:
                await self._pause(backoff.next())
            except RefusedError as error:
                if not error.is_passing:
                    raise
                await self._pause(draw_wait(error.retry, self._context.randomness))

    async def _pause(self, seconds: float) -> None:
        now = self._context.clock.unix_ms()
        if now + 1000 * seconds >= self._work.deadline_unix_ms:
            raise LeaseExpiredError("the lease ran out during the protocol")
        await self._context.clock.sleep(seconds)

    def _tell(self, attempt: int, stage: str, machine: DeviceMachine) -> None:
        assignment = self._assignment
        self._context.callbacks.emit(SecureStage(assignment.task_id, assignment.round, attempt, stage, machine.members))


def _expected(response: secagg_pb2.SecureResponse, field: str) -> secagg_pb2.SecureResponse:
    if response.WhichOneof("next") != field:
        raise UntrustedError(
            "the coordinator answered another step than was asked", expected=field, got=response.WhichOneof("next")
        )
    return response
