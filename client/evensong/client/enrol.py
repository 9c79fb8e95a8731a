"""Enrolment: once in its life a device trades a token for the coordinator's trust, and pins the signer's key."""

from __future__ import annotations

from evensong.client.callbacks import Enrolled
from evensong.client.context import Context
from evensong.client.errors import EnrolmentError, RefusedError
from evensong.v1 import device_pb2
from evensong.wire.errors import EvensongError, SignatureError, UnreachableError
from evensong.wire.signing import EnrolmentToken

_REQUEST = "enrol"


def is_enrolled(context: Context) -> bool:
    """Whether this very key is: one that was made anew after the old one got lost is not."""
    return context.state.fact("device_id") == context.identity.device_id.encode()


def signer_public_key(context: Context) -> bytes:
    """The pinned key that bundles and versions must be signed with."""
    key = context.state.fact("signer_public_key")
    if key is None:
        raise EnrolmentError("this device is not enrolled", fix="Call device.enrol() with a token first.")
    return key


async def enrol(context: Context, token: str | None) -> None:
    """Does nothing if it was done. A request without an answer is sent again as it was: a token is used up once."""
    if is_enrolled(context):
        return
    body = _request(context, token)
    request = device_pb2.EnrolRequest.FromString(body)
    try:
        response = await context.calls.enrol(body)
        if response.device_id != context.identity.device_id:
            raise EnrolmentError(
                "the coordinator enrolled somebody else",
                expected=context.identity.device_id,
                got=response.device_id[:64],
            )
        EnrolmentToken.parse(request.token).check_signer(response.signer_public_key)
    except SignatureError as error:
        raise EnrolmentError(
            "the coordinator has another signer than the token says", got=error.got, fix=error.fix
        ) from error
    except RefusedError as error:
        if error.is_passing:
            raise UnreachableError("the coordinator cannot enrol this device now", got=error) from error
        context.state.clear_request(_REQUEST)
        raise EnrolmentError(
            f"the coordinator refused the enrolment: {error.name}", got=error.message, fix="Ask for a new token."
        ) from error
    with context.state.transaction():
        context.state.set_facts(
            signer_public_key=response.signer_public_key,
            device_id=context.identity.device_id.encode(),
            population=request.population.encode(),
        )
        context.state.clear_request(_REQUEST)
    context.callbacks.emit(Enrolled(context.identity.device_id))


def _request(context: Context, token: str | None) -> bytes:
    """The stored request, or a new one if there is none or ``token`` is another one."""
    stored = context.state.request(_REQUEST)
    if stored is not None:
        earlier = device_pb2.EnrolRequest.FromString(stored)
        if earlier.public_key == context.identity.public_key and token in (None, earlier.token):
            return stored
    if not token:
        raise EnrolmentError(
            "this device is not enrolled and has no token",
            fix="Make one in the coordinator with `evensong devices token`, and pass it as token=...",
        )
    try:
        EnrolmentToken.parse(token)
    except EvensongError as error:
        raise EnrolmentError("the enrolment token is not one", got=error.what, fix="Copy all of it: evt1...") from error
    body = device_pb2.EnrolRequest(
        request_id=context.randomness.token(16),
        token=token,
        public_key=context.identity.public_key,
        population=context.population,
    ).SerializeToString()
    context.state.set_request(_REQUEST, body)
    return body
