"""The coordinator's secret for privacy: its noise, and its draw of devices, made from one key of 32 bytes.

A release's noise is keyed by the very sum that it hides: the same sum (after a crash) gets the same noise, so that a
recomputation is no second draw, and any other sum (from a restored backup, say) other noise. Nothing but the key file
is stored; who reads it can take the noise off again.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evensong.coordinator import files
from evensong.coordinator.errors import StorageError
from evensong.secagg.noise import Keystream

_BYTES = 32


class NoiseKey:
    """HMAC-SHA256 under the key, with one label for each purpose."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != _BYTES:
            raise ValueError(f"a noise key has {_BYTES} bytes, got {len(secret)}")
        self._secret = secret

    def tag(self, task_id: str, round: int, total: npt.NDArray[np.float64]) -> bytes:
        """32 bytes that name the noise of one release; they tell nothing without the key and may be stored."""
        digest = hashlib.sha256(np.ascontiguousarray(total, "<f8").data).digest()
        return self._derive("tag", f"{task_id}/{round}/".encode() + digest)

    def stream(self, tag: bytes, purpose: str) -> Keystream:
        """The randomness of the release that ``tag`` names: AES-256 in counter mode."""
        return Keystream(self._derive("noise/" + purpose, tag))

    def chooses(self, task_id: str, round: int, device_id: str, probability: float) -> bool:
        """Whether a round draws a device: each independently with ``probability``, the same whenever it is asked."""
        value = int.from_bytes(self._derive("sample", f"{task_id}/{round}/{device_id}".encode())[:8], "big")
        return value < int(probability * 2.0**64)

    def _derive(self, purpose: str, message: bytes) -> bytes:
        return hmac.digest(self._secret, f"evensong/v1/privacy/{purpose}\0".encode() + message, "sha256")


def load_noise_key(path: Path) -> NoiseKey:
    """The key in ``path``, made at the first start (mode 0600)."""
    with files.typed_errors("reading the noise key"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            files.write_private(path, secrets.token_bytes(_BYTES))
        secret = path.read_bytes()
    if len(secret) != _BYTES:
        raise StorageError("the noise key is damaged", got=path, fix="Restore it from a backup.")
    return NoiseKey(secret)
