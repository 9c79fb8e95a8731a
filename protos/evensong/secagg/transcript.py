"""What the members of a cohort sign, and the labels that keep bytes made for one purpose from passing for another.

``R`` is the hash of the roster, ``ctx`` that of the session; both are 32 bytes.
"""

from __future__ import annotations

from evensong.wire.chunks import sha256

ID_BYTES = 16
KEY_BYTES = 32
NONCE_BYTES = 16
SIGNATURE_BYTES = 64
WORD_BYTES = 32 + SIGNATURE_BYTES  #: of a survivor to its neighbours: its masked vector's hash, and its signature


def label(name: str) -> bytes:
    """``evensong/v1/secagg/<name>`` and a zero byte."""
    return b"evensong/v1/secagg/" + name.encode() + b"\0"


_ADVERTISE = label("advertise")
_ROSTER_SIGNATURE = label("roster-signature")
_MASKED = label("masked")
_SURVIVORS = label("survivors")


def advertise_bytes(context: bytes, channel_key: bytes, mask_key: bytes, nonce: bytes) -> bytes:
    """A device signs with its identity: these two keys are mine, for this attempt."""
    return _ADVERTISE + context + channel_key + mask_key + nonce


def roster_bytes(context: bytes, roster_hash: bytes) -> bytes:
    """The coordinator signs: this is the cohort."""
    return _ROSTER_SIGNATURE + context + roster_hash


def masked_bytes(context: bytes, roster_hash: bytes, identifier: bytes, sharers: bytes, vector_sha256: bytes) -> bytes:
    """A device signs: this is my masked vector, and it hides towards all of these. ``sharers`` is the bitmap."""
    return _MASKED + context + roster_hash + identifier + sha256(sharers) + vector_sha256


def survivors_bytes(context: bytes, roster_hash: bytes, survivors: bytes) -> bytes:
    """A device signs, once in an attempt: the sum is over these members. ``survivors`` is the bitmap."""
    return _SURVIVORS + context + roster_hash + sha256(survivors)
