"""What an operator shows a coordinator: its token, and how the connection is secured."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

import grpc

from evensong.wire.errors import EvensongError

TOKEN_VARIABLE = "EVENSONG_OPERATOR_TOKEN"
DATA_DIR_VARIABLE = "EVENSONG_COORDINATOR_DATA_DIR"


class AccessError(EvensongError):
    """The operator's token is missing, unreadable or refused, or the connection may not carry it."""


@dataclass(frozen=True)
class Tls:
    """PEM files. ``ca``: who signed the coordinator's certificate, None for the system's authorities; ``certificate``
    and ``key``: the operator's own, where the coordinator asks for one (mTLS)."""

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel; :class:`AccessError` if a file cannot be read."""
        try:
            ca, key, certificate = (
                Path(path).read_bytes() if path is not None else None for path in (self.ca, self.key, self.certificate)
            )
        except OSError as error:
            raise AccessError("a TLS file cannot be read", got=error) from None
        return grpc.ssl_channel_credentials(ca, key, certificate)


def find_token(token: str | Path | None, address: str) -> str:
    """``token`` itself, the content of its file, :data:`TOKEN_VARIABLE`, or that of the coordinator on this machine.

    The last is read from the coordinator's data directory, and only for a loopback address: it is nobody else's
    business.
    """
    if isinstance(token, str):
        return token.strip()
    if token is None and (text := os.environ.get(TOKEN_VARIABLE, "").strip()):
        return text
    if token is None and not is_loopback(address):
        raise AccessError(
            "there is no operator token for this coordinator",
            got=address,
            fix=f"Pass token=... or set {TOKEN_VARIABLE}; `evensong coordinator token` prints it on the server.",
        )
    path = token or local_data_dir() / "operator.token"
    try:
        return path.read_text().strip()
    except OSError as error:
        raise AccessError(
            "the operator's token cannot be read",
            got=error,
            fix=f"Start `evensong coordinator serve` once, pass token=..., or set {TOKEN_VARIABLE}.",
        ) from None


def local_data_dir() -> Path:
    """Where a coordinator on this machine keeps its token unless it was told otherwise."""
    if folder := os.environ.get(DATA_DIR_VARIABLE):
        return Path(folder)
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "evensong" / "coordinator"


def is_loopback(address: str) -> bool:
    """Whether ``HOST:PORT`` (or ``unix:PATH``) can only be on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    if address.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False
