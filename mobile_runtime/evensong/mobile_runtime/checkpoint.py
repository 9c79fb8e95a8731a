"""Checkpoints: a session's mutable state as bytes.

Little-endian: magic ``EVCK``, u16 version 1, u16 zero, u32 CRC32C of all bytes after it, 32 bytes SHA-256 of the
artifact, u64 step, u64 seed, u64 bytes of STATE, u64 bytes of SLOTS; then STATE, then SLOTS.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import google_crc32c

from evensong.mobile_runtime.errors import CheckpointError

MAGIC = b"EVCK"
VERSION = 1

_FRAME = struct.Struct("<4sHHI")
_BODY = struct.Struct("<32sQQQQ")


@dataclass(frozen=True)
class Checkpoint:
    artifact_hash: str  #: lower-case hex SHA-256
    step: int
    seed: int
    state: bytes
    slots: bytes


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    body = _BODY.pack(
        bytes.fromhex(checkpoint.artifact_hash),
        checkpoint.step,
        checkpoint.seed,
        len(checkpoint.state),
        len(checkpoint.slots),
    )
    body += checkpoint.state + checkpoint.slots
    return _FRAME.pack(MAGIC, VERSION, 0, google_crc32c.value(body)) + body


def decode_checkpoint(data: bytes) -> Checkpoint:
    """Raises :class:`CheckpointError` for bytes that are not a whole and undamaged checkpoint."""
    data = bytes(data)
    if len(data) < _FRAME.size + _BODY.size:
        raise CheckpointError(
            "the checkpoint is truncated", expected=f"at least {_FRAME.size + _BODY.size} bytes", got=len(data)
        )
    magic, version, zero, checksum = _FRAME.unpack_from(data)
    if magic != MAGIC or version != VERSION or zero:
        raise CheckpointError(
            "not a checkpoint of this runtime",
            expected=f"{MAGIC!r} version {VERSION}",
            got=f"{magic!r} version {version}",
        )
    body = data[_FRAME.size :]
    if google_crc32c.value(body) != checksum:
        raise CheckpointError("the checkpoint is damaged: its checksum does not match", fix="Use an older checkpoint.")
    digest, step, seed, state_bytes, slot_bytes = _BODY.unpack_from(body)
    if len(body) != _BODY.size + state_bytes + slot_bytes:
        raise CheckpointError(
            "the checkpoint's length is wrong", expected=_BODY.size + state_bytes + slot_bytes, got=len(body)
        )
    regions = body[_BODY.size :]
    return Checkpoint(digest.hex(), step, seed, regions[:state_bytes], regions[state_bytes:])
