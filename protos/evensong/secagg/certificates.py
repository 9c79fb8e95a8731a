"""Which devices count: the enrolment authority's word on an identity, 88 bytes.

serial (16) ‖ not after (u64, ms since 1970) ‖ Ed25519 signature (64). The authority can be kept offline: a coordinator
that does not hold its key cannot invent members.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.secagg.errors import ProtocolError
from evensong.secagg.primitives import Primitives
from evensong.secagg.transcript import KEY_BYTES, SIGNATURE_BYTES, label
from evensong.wire.chunks import sha256

CERTIFICATE_BYTES = 88
SERIAL_BYTES = 16

_SIGNED_BYTES = CERTIFICATE_BYTES - SIGNATURE_BYTES
_CERTIFICATE = label("certificate")
_PRIMITIVES = Primitives()


def issue(
    authority: Ed25519PrivateKey, public_key: bytes, population: str, not_after_unix_ms: int, serial: bytes
) -> bytes:
    """A certificate that the device with this identity belongs to ``population``. ``serial``: 16 fresh random bytes."""
    if len(serial) != SERIAL_BYTES or len(public_key) != KEY_BYTES:
        raise ValueError(f"a serial has {SERIAL_BYTES} bytes and a public key {KEY_BYTES}")
    head = serial + not_after_unix_ms.to_bytes(8, "little")
    return head + authority.sign(_signed(public_key, population, head))


def check(
    certificate: bytes,
    public_key: bytes,
    population: str,
    authority_public_key: bytes,
    now_unix_ms: int,
    primitives: Primitives = _PRIMITIVES,
) -> None:
    """:class:`ProtocolError` unless the authority certified this identity for this population and it is still valid."""
    expires = expires_unix_ms(certificate)
    if now_unix_ms > expires:
        raise ProtocolError(
            "a certificate has expired",
            expected=f"one that is valid at {now_unix_ms}",
            got=f"not after {expires}",
            fix="Let the device enrol again.",
        )
    head, signature = certificate[:_SIGNED_BYTES], certificate[_SIGNED_BYTES:]
    primitives.verify_certificate(authority_public_key, signature, _signed(public_key, population, head))


def expires_unix_ms(certificate: bytes) -> int:
    """The last millisecond at which it is valid; :class:`ProtocolError` if it is malformed."""
    if len(certificate) != CERTIFICATE_BYTES:
        raise ProtocolError(
            "a certificate is malformed", expected=f"{CERTIFICATE_BYTES} bytes", got=f"{len(certificate)} bytes"
        )
    return int.from_bytes(certificate[SERIAL_BYTES:_SIGNED_BYTES], "little")


def _signed(public_key: bytes, population: str, head: bytes) -> bytes:
    return _CERTIFICATE + sha256(population.encode()) + public_key + head
