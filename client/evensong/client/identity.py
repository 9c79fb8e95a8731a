"""Who the device is: an Ed25519 key (RFC 8032) that is made at first use and never leaves the device."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from evensong.client.database import raise_if_full
from evensong.client.errors import IdentityError
from evensong.client.randomness import Randomness
from evensong.wire.signing import device_id_of, public_key_of

_KEY_BYTES = 32


class Identity:
    """The device's key pair."""

    def __init__(self, seed: bytes) -> None:
        self.key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = public_key_of(self.key)
        self.device_id = device_id_of(self.public_key)


def open_identity(folder: Path | None, randomness: Randomness) -> Identity:
    """The identity of a state directory; made if there is none. ``folder`` None makes one that nobody stores.

    Raises :class:`IdentityError` if the key can be read by group or others, belongs to another user, or is damaged: a
    key that may have been copied proves nothing.
    """
    if folder is None:
        return Identity(randomness.token(_KEY_BYTES))
    path = folder / "identity.key"
    if not path.exists():
        _create(path, randomness.token(_KEY_BYTES))
    return Identity(_read(path))


def _create(path: Path, seed: bytes) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    key = Ed25519PrivateKey.from_private_bytes(seed)
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise_if_full(error, str(path))
        raise IdentityError(f"{path} cannot be written", got=error.strerror) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            seed = file.read(_KEY_BYTES + 1)
    except OSError as error:
        raise IdentityError(f"{path} cannot be read", got=error.strerror) from error
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise IdentityError(
            f"{path} can be read by others",
            expected="mode 0600",
            got=f"mode {stat.S_IMODE(status.st_mode):04o}",
            fix=f"If nobody copied it: chmod 600 {path}. If in doubt, delete it and enrol again.",
        )
    if status.st_uid != os.geteuid():
        raise IdentityError(f"{path} belongs to another user", expected=os.geteuid(), got=status.st_uid)
    if len(seed) != _KEY_BYTES:
        raise IdentityError(
            f"{path} is not a key", expected=f"{_KEY_BYTES} bytes", got=len(seed), fix="Delete it and enrol again."
        )
    return seed
