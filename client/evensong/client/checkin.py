"""Step 1 of a round: is there work? The answer is checked, and stored together with the end of the request."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from evensong.client import __version__
from evensong.client.callbacks import CheckedIn
from evensong.client.context import Context
from evensong.client.enrol import adopt_certificate, certificate_expiry
from evensong.client.errors import EnrolmentError, RefusedError
from evensong.client.state import Stage, Work
from evensong.v1 import common_pb2, device_pb2

_log = logging.getLogger("evensong.client")

_REQUEST = "check-in"
_MOST_HOLD_MS = 60_000
_MOST_SERVED = 64
_WORK = {device_pb2.WORK_TRAIN: "train", device_pb2.WORK_EVALUATE: "evaluate"}


@dataclass(frozen=True)
class Answer:
    """``work`` is stored already. ``serving`` is not verified yet; it may come beside a refusal of work."""

    work: Work | None
    serving: tuple[device_pb2.Serving, ...]
    retry: common_pb2.RetryWindow
    refused: RefusedError | None = None


async def check_in(context: Context, *, hold_ms: int) -> Answer:
    """One CheckIn. An unanswered one is sent again as it was, so that an assignment whose answer got lost is not lost.

    Raises :class:`UnreachableError`.
    """
    body = context.state.request(_REQUEST)
    if body is None:
        body = _request(context, hold_ms)
        context.state.set_request(_REQUEST, body)
    response = await context.calls.check_in(body)
    refused = RefusedError(response.refusal, response.retry) if response.HasField("refusal") else None
    work = None if refused else _accept(context, response)
    with context.state.transaction():
        context.state.clear_request(_REQUEST)
        if work:
            context.state.set_work(work)
    if response.certificate:
        _adopt(context, response.certificate)
    given = response.assignment
    context.callbacks.emit(CheckedIn(_WORK[given.work], given.task_id) if work else CheckedIn(None, None))
    return Answer(work, tuple(response.serving[:_MOST_SERVED]), response.retry, refused)


def _request(context: Context, hold_ms: int) -> bytes:
    return device_pb2.CheckInRequest(
        request_id=context.randomness.token(16),
        population=context.population,
        runtime_version=__version__,
        memory_bytes=context.memory_bytes,
        training_examples=context.examples.count("train"),
        evaluation_examples=context.examples.count("test"),
        wait_ms=min(max(hold_ms, 0), _MOST_HOLD_MS),
        certificate_expires_unix_ms=certificate_expiry(context),
    ).SerializeToString()


def _adopt(context: Context, certificate: bytes) -> None:
    """A bad one is no reason to stop working."""
    try:
        adopt_certificate(context, certificate)
    except EnrolmentError as error:
        _log.warning("the coordinator sent a certificate that does not hold: %s", error)


def _accept(context: Context, response: device_pb2.CheckInResponse) -> Work | None:
    """The assignment as work of ours; None if there is none, it is over already, or it asks for what we do not know."""
    if not response.HasField("assignment"):
        return None
    assignment, now = response.assignment, context.clock.unix_ms()
    deadline = min(assignment.lease.expires_unix_ms, now + context.limits.lease_ms)
    if assignment.work not in _WORK or deadline <= now:
        return None
    return Work(
        assignment=assignment.SerializeToString(),
        stage=Stage.ASSIGNED,
        deadline_unix_ms=deadline,
        request_id=context.randomness.token(16),
        begin_request_id=context.randomness.token(16),
    )
