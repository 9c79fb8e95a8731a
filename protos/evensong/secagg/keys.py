"""How keys follow from agreements: HKDF-SHA256 (RFC 5869), bound to the attempt and the roster. All keys have 16 bytes.

``binding`` is ``ctx ‖ R``, the salt. Ids are the 16 raw bytes.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from evensong.secagg.transcript import label
from evensong.wire.chunks import sha256

SYMMETRIC_KEY_BYTES = 16
SEED_BYTES = 32

_CHANNEL = label("channel")
_MASK = label("mask")
_SELF_MASK = label("self-mask")
_SHARE = label("share")
_SEED = label("seed")


@dataclass(frozen=True)
class End:
    """One end of an agreement: the device's id and its public X25519 key."""

    id: bytes
    key: bytes


def channel_key(agreed: bytes, binding: bytes, source: End, destination: End) -> bytes:
    """Of the shares that ``source`` sends to ``destination``; the other direction has another key."""
    return _derive(agreed, binding, _CHANNEL + source.id + destination.id + source.key + destination.key)


def pairwise_mask_key(agreed: bytes, binding: bytes, one: End, other: End) -> bytes:
    """Of the mask that the device of lower id adds and the other subtracts; the order of the ends does not matter."""
    lower, higher = (one, other) if one.id < other.id else (other, one)
    return _derive(agreed, binding, _MASK + lower.id + higher.id + lower.key + higher.key)


def self_mask_key(seed: bytes, binding: bytes, identifier: bytes) -> bytes:
    """Of the mask that a device adds on its own."""
    return _derive(seed, binding, _SELF_MASK + identifier)


def seed_commitment(seed: bytes, binding: bytes, identifier: bytes) -> bytes:
    """32 bytes that the coordinator can check a reconstructed seed against."""
    return sha256(_SEED + binding + identifier + seed)


def share_associated_data(binding: bytes, source_id: bytes, destination_id: bytes) -> bytes:
    """What the ciphertext of a pair of shares is bound to."""
    return _SHARE + binding + source_id + destination_id


def _derive(secret: bytes, binding: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 for one block of output: two calls of HMAC, a third of what a general object costs."""
    extracted = hmac.digest(binding, secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")[:SYMMETRIC_KEY_BYTES]
