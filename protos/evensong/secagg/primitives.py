"""The cryptography that the machines stand on, in one place: a simulation may remember what it has computed before."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from evensong.secagg.errors import ProtocolError
from evensong.secagg.transcript import KEY_BYTES
from evensong.wire.chunks import sha256

_Result = TypeVar("_Result")

_CURVE25519_PRIME = 2**255 - 19
_GCM_NONCE = bytes(12)  # a key seals one message only
_REMEMBERED = 20_000  # certificates, about 100 bytes each
_PROBE = X25519PrivateKey.from_private_bytes(b"\x01" * 32)


class Primitives:
    """X25519 (RFC 7748), Ed25519 (RFC 8032) and AES-128-GCM (SP 800-38D); failures are :class:`ProtocolError`.

    One object may serve many rounds: it remembers the certificates that it has checked, by their hashes.
    """

    def __init__(self) -> None:
        self._certified: dict[bytes, None] = {}

    def agree(self, private_key: X25519PrivateKey, public_key: bytes) -> bytes:
        """The 32 bytes that both ends share; refuses low-order points, with which anyone would share them."""
        try:
            return private_key.exchange(X25519PublicKey.from_public_bytes(public_key))
        except ValueError:
            raise ProtocolError("a public key gives no agreement", expected="a point of large order") from None

    def sign(self, key: Ed25519PrivateKey, message: bytes) -> bytes:
        """64 bytes."""
        return key.sign(message)

    def verify(self, public_key: bytes, signature: bytes, message: bytes, what: str) -> None:
        """:class:`ProtocolError` about ``what`` if the signature does not hold."""
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
        except (InvalidSignature, ValueError):
            raise ProtocolError(f"{what} does not hold", expected=f"one by {public_key.hex()}") from None

    def verify_certificate(self, public_key: bytes, signature: bytes, message: bytes) -> None:
        """As :meth:`verify`; what held once is not computed again, as long as it is one of the newest ones."""
        claim = sha256(public_key + signature + message)
        if claim in self._certified:
            return
        self.verify(public_key, signature, message, "a certificate")
        self._certified[claim] = None
        if len(self._certified) > _REMEMBERED:
            del self._certified[next(iter(self._certified))]

    def seal(self, key: bytes, plaintext: bytes, associated: bytes) -> bytes:
        """The ciphertext and 16 bytes of tag. One message a key: the nonce is zero."""
        return AESGCM(key).encrypt(_GCM_NONCE, plaintext, associated)

    def open(self, key: bytes, ciphertext: bytes, associated: bytes) -> bytes | None:
        """The plaintext, or None if it was sealed by another key, for another purpose, or changed."""
        try:
            return AESGCM(key).decrypt(_GCM_NONCE, ciphertext, associated)
        except InvalidTag:
            return None

    def once(self, message: object, reader: Hashable, compute: Callable[[], _Result]) -> _Result:
        """What ``compute`` gives: a reading of ``message`` that depends on nothing but it and ``reader``."""
        return compute()


class SharedPrimitives(Primitives):
    """For a whole cohort in one process: an agreement is the same for both ends, a signature that held still holds, and
    all read the same roster. Results never differ from :class:`Primitives`; failures are not remembered."""

    def __init__(self) -> None:
        super().__init__()
        self._agreements: dict[tuple[bytes, bytes], bytes] = {}
        self._own_keys: dict[int, tuple[X25519PrivateKey, bytes]] = {}
        self._held: set[tuple[bytes, bytes, bytes]] = set()
        self._readings: dict[tuple[int, Hashable], tuple[object, object]] = {}

    def agree(self, private_key: X25519PrivateKey, public_key: bytes) -> bytes:
        _, own = self._own_keys.get(id(private_key), (None, b""))
        if not own:
            own = private_key.public_key().public_bytes_raw()
            self._own_keys[id(private_key)] = (private_key, own)  # kept, so that no other object gets its id
        ends = (own, public_key) if own < public_key else (public_key, own)
        # The second end is the last to ask.
        agreed = self._agreements.pop(ends, None)
        if agreed is None:
            agreed = self._agreements[ends] = super().agree(private_key, public_key)
        return agreed

    def sign(self, key: Ed25519PrivateKey, message: bytes) -> bytes:
        signature = super().sign(key, message)
        self._held.add((key.public_key().public_bytes_raw(), signature, message))
        return signature

    def verify(self, public_key: bytes, signature: bytes, message: bytes, what: str) -> None:
        claim = (public_key, signature, message)
        if claim not in self._held:
            super().verify(public_key, signature, message, what)
            self._held.add(claim)

    def once(self, message: object, reader: Hashable, compute: Callable[[], _Result]) -> _Result:
        known = self._readings.get((id(message), reader))
        if known is None:
            known = self._readings[id(message), reader] = (message, compute())  # kept, so that no other gets its id
        return known[1]  # type: ignore[return-value]  # a message has one kind of reading


def check_agreement_key(public_key: bytes, what: str) -> None:
    """:class:`ProtocolError` unless these are the canonical 32 bytes of an X25519 point."""
    if len(public_key) != KEY_BYTES or int.from_bytes(public_key, "little") >= _CURVE25519_PRIME:
        raise ProtocolError(f"{what} is malformed", expected="the 32 canonical bytes of an X25519 key")


def check_order(public_key: bytes, what: str) -> None:
    """:class:`ProtocolError` for a low-order point: those give no agreement with any key."""
    try:
        _PROBE.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:
        raise ProtocolError(f"{what} gives no agreement", expected="a point of large order") from None
