"""Who says so: Ed25519 (RFC 8032) signatures on requests, bundles and versions, and enrolment tokens.

Every signature covers a label that ends in a zero byte, so that bytes signed for one purpose never pass for another:

- a request: ``"evensong/v1/request\\0" + method + "\\0" + device id + "\\0" + time + SHA-256(body)``, the time being
  8 bytes, little-endian, in milliseconds since 1970;
- a blob: ``"evensong/v1/<kind>\\0" + payload``.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from evensong.v1 import task_pb2
from evensong.wire.chunks import sha256
from evensong.wire.errors import SignatureError
from evensong.wire.transport import Metadata

DEVICE_KEY = "evensong-device"
TIME_KEY = "evensong-time"
SIGNATURE_KEY = "evensong-signature-bin"
TOLERANCE_MS = 300_000
REQUEST_ID_BYTES = 16

BlobKind = Literal["bundle", "version"]

_DEVICE_ID = re.compile(r"[0-9a-f]{32}")
_TIME = re.compile(r"[0-9]{1,18}")
_TOKEN = re.compile(r"evt1\.([0-9a-f]{16})\.([A-Za-z0-9_-]{43})\.([0-9a-f]{16})")


# ----------------------------------------------------------------------------------------------------------------- keys


def public_key_of(key: Ed25519PrivateKey) -> bytes:
    """The 32 raw bytes."""
    return key.public_key().public_bytes_raw()


def device_id_of(public_key: bytes) -> str:
    """Hex of the first 16 bytes of SHA-256 of the public key."""
    return sha256(public_key)[:16].hex()


def new_request_id() -> bytes:
    """16 random bytes, for one mutating call and all its repetitions."""
    return secrets.token_bytes(REQUEST_ID_BYTES)


# ------------------------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Caller:
    """What a request's metadata claims; nothing of it is trusted before :func:`verify_request`."""

    device_id: str
    unix_ms: int
    signature: bytes


def sign_request(key: Ed25519PrivateKey, method: str, body: bytes, unix_ms: int) -> list[tuple[str, str | bytes]]:
    """The metadata of a signed call; ``method`` is the full gRPC path, ``body`` the serialised message."""
    device_id = device_id_of(public_key_of(key))
    signature = key.sign(_request_label(method, device_id, unix_ms, body))
    return [(DEVICE_KEY, device_id), (TIME_KEY, str(unix_ms)), (SIGNATURE_KEY, signature)]


def parse_caller(metadata: Metadata) -> Caller:
    """The claims of a request; :class:`SignatureError` if one is missing, repeated or malformed."""
    claims: dict[str, str | bytes] = {}
    for key, value in metadata:
        if key in (DEVICE_KEY, TIME_KEY, SIGNATURE_KEY):
            if key in claims:
                raise SignatureError(f"the request has two values of {key}", expected="one")
            claims[key] = value
    device_id, time, signature = (claims.get(key) for key in (DEVICE_KEY, TIME_KEY, SIGNATURE_KEY))
    if not isinstance(device_id, str) or not _DEVICE_ID.fullmatch(device_id):
        raise SignatureError(
            f"{DEVICE_KEY} is missing or malformed", expected="32 lower-case hex digits", got=device_id
        )
    if not isinstance(time, str) or not _TIME.fullmatch(time):
        raise SignatureError(f"{TIME_KEY} is missing or malformed", expected="milliseconds since 1970", got=time)
    if not isinstance(signature, bytes) or len(signature) != 64:
        raise SignatureError(f"{SIGNATURE_KEY} is missing or malformed", expected="64 bytes")
    return Caller(device_id, int(time), signature)


def verify_request(
    metadata: Metadata,
    method: str,
    body: bytes,
    public_key: bytes,
    now_unix_ms: int,
    tolerance_ms: int = TOLERANCE_MS,
) -> Caller:
    """The caller, if ``public_key`` signed this very call within ``tolerance_ms`` of ``now_unix_ms``.

    Raises :class:`SignatureError` otherwise, and says whether the key, the time or the content differs.
    """
    caller = parse_caller(metadata)
    device_id = device_id_of(public_key)
    if caller.device_id != device_id:
        raise SignatureError("the request names another device than its key", expected=device_id, got=caller.device_id)
    if abs(now_unix_ms - caller.unix_ms) > tolerance_ms:
        raise SignatureError(
            "the request was signed too long ago or in the future",
            expected=f"within {tolerance_ms} ms of {now_unix_ms}",
            got=caller.unix_ms,
            fix="Set the device's clock.",
        )
    label = _request_label(method, caller.device_id, caller.unix_ms, body)
    _verify(public_key, caller.signature, label, f"the signature of {method}")
    return caller


def _request_label(method: str, device_id: str, unix_ms: int, body: bytes) -> bytes:
    head = b"evensong/v1/request\0" + method.encode() + b"\0" + device_id.encode() + b"\0"
    return head + unix_ms.to_bytes(8, "little") + sha256(body)


# ---------------------------------------------------------------------------------------------------------------- blobs


def sign_blob(kind: BlobKind, payload: bytes, key: Ed25519PrivateKey) -> task_pb2.SignedBlob:
    """``payload`` with its signature as a ``kind``."""
    signature = key.sign(_blob_label(kind, payload))
    return task_pb2.SignedBlob(payload=payload, signature=signature, public_key=public_key_of(key))


def verify_blob(kind: BlobKind, signed: task_pb2.SignedBlob, expected_public_key: bytes) -> bytes:
    """The payload, if ``expected_public_key`` signed it as this ``kind``; else :class:`SignatureError`."""
    if not hmac.compare_digest(signed.public_key, expected_public_key):
        raise SignatureError(
            f"the {kind} was signed by another key",
            expected=expected_public_key.hex(),
            got=signed.public_key[:64].hex() or "none",
            fix="Trust only the coordinator that the device enrolled with.",
        )
    _verify(expected_public_key, signed.signature, _blob_label(kind, signed.payload), f"the signature of the {kind}")
    return signed.payload


def _blob_label(kind: BlobKind, payload: bytes) -> bytes:
    return f"evensong/v1/{kind}\0".encode() + payload


def _verify(public_key: bytes, signature: bytes, message: bytes, what: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except InvalidSignature:
        raise SignatureError(f"{what} does not verify", expected=f"a signature by {public_key.hex()}") from None
    except ValueError as error:
        raise SignatureError(f"{what} cannot be checked: {error}") from None


# ----------------------------------------------------------------------------------------------------- enrolment tokens


@dataclass(frozen=True)
class EnrolmentToken:
    """``evt1.<id>.<secret>.<fingerprint>``: lets devices register; the coordinator keeps only :meth:`secret_hash`."""

    token_id: str  #: 8 random bytes, hex
    secret: str = field(repr=False)  #: 32 random bytes, base64url without padding
    fingerprint: str  #: first 8 bytes of SHA-256 of the signer's public key, hex

    @classmethod
    def create(cls, signer_public_key: bytes) -> EnrolmentToken:
        """A fresh token for devices that shall trust ``signer_public_key``."""
        return cls(secrets.token_hex(8), secrets.token_urlsafe(32), _fingerprint(signer_public_key))

    @classmethod
    def parse(cls, text: str) -> EnrolmentToken:
        """The token that ``str`` wrote; surrounding white space is allowed."""
        match = _TOKEN.fullmatch(text.strip())
        if match is None:
            raise SignatureError(
                "this is not an enrolment token",
                expected="evt1.<id>.<secret>.<fingerprint>",
                got=f"{len(text)} characters",  # never the text: it may hold a secret
                fix="Copy the whole token that `evensong devices token` printed.",
            )
        return cls(*match.groups())

    def __str__(self) -> str:
        return f"evt1.{self.token_id}.{self.secret}.{self.fingerprint}"

    def secret_hash(self) -> bytes:
        """SHA-256 of the secret, 32 bytes: what the coordinator stores and compares."""
        return sha256(self.secret.encode())

    def check_signer(self, signer_public_key: bytes) -> None:
        """:class:`SignatureError` unless this is the key that the token names."""
        fingerprint = _fingerprint(signer_public_key)
        if not hmac.compare_digest(fingerprint, self.fingerprint):
            raise SignatureError(
                "the coordinator is not the one that made the token",
                expected=f"a signing key with fingerprint {self.fingerprint}",
                got=fingerprint,
                fix="Check the address, or ask the operator for a token of this coordinator.",
            )


def _fingerprint(public_key: bytes) -> str:
    return sha256(public_key)[:8].hex()
