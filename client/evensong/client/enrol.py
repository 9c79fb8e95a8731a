"""Enrolment: once in its life a device trades a token for the coordinator's trust, and pins the signer's key."""

from __future__ import annotations

from evensong.client.callbacks import Enrolled
from evensong.client.context import Context
from evensong.client.errors import EnrolmentError, RefusedError, UnfitError
from evensong.secagg import certificates
from evensong.secagg.errors import ProtocolError
from evensong.v1 import device_pb2
from evensong.wire.errors import EvensongError, SignatureError, UnreachableError
from evensong.wire.signing import EnrolmentToken

_REQUEST = "enrol"
_NEW_CERTIFICATE = "Its enrolment authority makes one: `evensong devices certify`, then --certificate on the device."


def is_enrolled(context: Context) -> bool:
    """Whether this very key is: one that was made anew after the old one got lost is not."""
    return context.state.fact("device_id") == context.identity.device_id.encode()


def signer_public_key(context: Context) -> bytes:
    """The pinned key that bundles and versions must be signed with."""
    key = context.state.fact("signer_public_key")
    if key is None:
        raise EnrolmentError("this device is not enrolled", fix="Call device.enrol() with a token first.")
    return key


def authority_public_key(context: Context) -> bytes:
    """The pinned key that certifies devices: the signer's own, unless the device was told another one."""
    return context.state.fact("authority_public_key") or signer_public_key(context)


def certificate_of(context: Context) -> bytes:
    """This device's certificate; :class:`UnfitError` without one that is valid now: no secure sum is open to it."""
    certificate = context.state.fact("certificate")
    try:
        _check_certificate(context, certificate or b"", authority_public_key(context))
    except EnrolmentError as error:
        raise UnfitError(
            "this device has no valid certificate", got=error.got if certificate else "none", fix=_NEW_CERTIFICATE
        ) from error
    return certificate or b""


def adopt_certificate(context: Context, certificate: bytes) -> None:
    """Keeps one that is valid for longer than what is there; :class:`EnrolmentError` if such a one does not hold."""
    well_formed = len(certificate) == certificates.CERTIFICATE_BYTES
    if well_formed and certificates.expires_unix_ms(certificate) <= certificate_expiry(context):
        return
    _check_certificate(context, certificate, authority_public_key(context))
    context.state.set_facts(certificate=certificate)


def certificate_expiry(context: Context) -> int:
    """Unix milliseconds; 0 without a certificate."""
    certificate = context.state.fact("certificate")
    return certificates.expires_unix_ms(certificate) if certificate else 0


async def enrol(
    context: Context, token: str | None, *, authority: bytes | None = None, certificate: bytes | None = None
) -> None:
    """A request without an answer is sent again as it was: a token is used up once. If the device is enrolled already,
    all that may be new to it is a later ``certificate``.

    ``authority`` pins the key of an enrolment authority that is not the coordinator, ``certificate`` is that
    authority's word on this device.
    """
    if is_enrolled(context):
        _check_told_again(context, authority, certificate)
        return
    if authority and certificate:  # before the token is used
        _check_certificate(context, certificate, authority)
    body = _request(context, token, certificate or b"")
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
        _check_authority(response, authority)
        certificate = certificate or response.certificate
        if certificate:
            _check_certificate(context, certificate, authority or response.signer_public_key)
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
            authority_public_key=authority or response.signer_public_key,
            certificate=certificate,
        )
        context.state.clear_request(_REQUEST)
    context.callbacks.emit(Enrolled(context.identity.device_id))


def _check_told_again(context: Context, authority: bytes | None, certificate: bytes | None) -> None:
    pinned = authority_public_key(context)
    if authority and authority != pinned:
        raise EnrolmentError(
            "this device trusts another enrolment authority",
            expected=pinned.hex(),
            got=authority.hex(),
            fix="`evensong device reset`, then enrol with a new token.",
        )
    if certificate and certificate != context.state.fact("certificate"):
        adopt_certificate(context, certificate)


def _check_authority(response: device_pb2.EnrolResponse, authority: bytes | None) -> None:
    """Who certifies devices is known beforehand, or is the coordinator itself; it is never learnt from the answer."""
    expected = authority or response.signer_public_key
    if response.authority_public_key and response.authority_public_key != expected:
        raise EnrolmentError(
            "the coordinator names another enrolment authority",
            expected=expected.hex(),
            got=response.authority_public_key[:32].hex(),
            fix="Pass the authority's key (authority=..., --authority) as its keeper gave it to you.",
        )


def _check_certificate(context: Context, certificate: bytes, authority: bytes) -> None:
    try:
        certificates.check(
            certificate, context.identity.public_key, context.population, authority, context.clock.unix_ms()
        )
    except ProtocolError as error:
        raise EnrolmentError("the device's certificate does not hold", got=error.what, fix=error.fix) from error


def _request(context: Context, token: str | None, certificate: bytes) -> bytes:
    """The stored request, or a new one if there is none or ``token`` is another one."""
    stored = context.state.request(_REQUEST)
    if stored is not None:
        earlier = device_pb2.EnrolRequest.FromString(stored)
        if earlier.public_key == context.identity.public_key and token in (None, earlier.token):
            return stored  # with whatever certificate: what the coordinator is shown here, it need not keep
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
        certificate=certificate,
    ).SerializeToString()
    context.state.set_request(_REQUEST, body)
    return body
