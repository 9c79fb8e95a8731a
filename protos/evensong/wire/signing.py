"""Who says so: Ed25519 signatures on requests, bundles and versions, and enrolment tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.v1 import task_pb2
from evensong.wire.transport import Metadata

DEVICE_KEY = "evensong-device"
TIME_KEY = "evensong-time"
SIGNATURE_KEY = "evensong-signature-bin"
TOLERANCE_MS = 300_000

BlobKind = Literal["bundle", "version"]


@dataclass(frozen=True)
class Caller:
    """What a request's metadata claims; nothing of it is trusted before :func:`verify_request`."""

    device_id: str
    unix_ms: int
    signature: bytes


@dataclass(frozen=True)
class EnrolmentToken:
    """``evt1.<id>.<secret>.<fingerprint>``: the coordinator stores only a hash of ``secret``."""

    token_id: str
    secret: str
    fingerprint: str  #: first 8 bytes of SHA-256 of the signer's public key, hex

    @classmethod
    def create(cls, signer_public_key: bytes) -> EnrolmentToken:
        raise NotImplementedError

    @classmethod
    def parse(cls, text: str) -> EnrolmentToken:
        raise NotImplementedError

    def __str__(self) -> str:
        return f"evt1.{self.token_id}.{self.secret}.{self.fingerprint}"

    def check_signer(self, signer_public_key: bytes) -> None:
        """SignatureError unless the key is the one that the token names."""
        raise NotImplementedError


def public_key_of(key: Ed25519PrivateKey) -> bytes:
    """The 32 raw bytes."""
    raise NotImplementedError


def device_id_of(public_key: bytes) -> str:
    """Hex of the first 16 bytes of SHA-256 of the public key."""
    raise NotImplementedError


def new_request_id() -> bytes:
    """16 random bytes."""
    raise NotImplementedError


def sign_request(key: Ed25519PrivateKey, method: str, body: bytes, unix_ms: int) -> list[tuple[str, str | bytes]]:
    """The metadata of a signed call; ``method`` is the full gRPC path."""
    raise NotImplementedError


def parse_caller(metadata: Metadata) -> Caller:
    raise NotImplementedError


def verify_request(
    metadata: Metadata,
    method: str,
    body: bytes,
    public_key: bytes,
    now_unix_ms: int,
    tolerance_ms: int = TOLERANCE_MS,
) -> Caller:
    """SignatureError unless ``public_key`` signed this very call at about this time."""
    raise NotImplementedError


def sign_blob(kind: BlobKind, payload: bytes, key: Ed25519PrivateKey) -> task_pb2.SignedBlob:
    raise NotImplementedError


def verify_blob(kind: BlobKind, signed: task_pb2.SignedBlob, expected_public_key: bytes) -> bytes:
    """The payload, if ``expected_public_key`` signed it as this kind."""
    raise NotImplementedError
