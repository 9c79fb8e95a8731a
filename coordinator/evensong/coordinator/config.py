"""What an operator may set: one TOML file, ``EVENSONG_COORDINATOR_*`` environment variables, or nothing at all.

Command-line options win over the environment, the environment over the file, the file over the defaults below.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from evensong.wire.errors import EvensongError


class ConfigurationError(EvensongError):
    """The configuration file, an environment variable or an option is wrong."""


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/evensong/coordinator``, by default below ``~/.local/share``."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "evensong" / "coordinator"


class Settings(BaseSettings):
    """Every setting of the daemon. Sizes are bytes, durations milliseconds."""

    model_config = SettingsConfigDict(env_prefix="EVENSONG_COORDINATOR_", extra="forbid", frozen=True)

    # --- where it listens and what it keeps
    listen: str = Field("127.0.0.1:8470", description="HOST:PORT of the gRPC socket; port 0 takes a free one")
    data_dir: Path = Field(default_factory=default_data_dir, description="database, blobs, keys and tokens")
    database_url: str = Field("", description="SQLAlchemy URL; empty: coordinator.sqlite3 in the data directory")
    blob_url: str = Field("", description="fsspec URL of the blob folder; empty: blobs/ in the data directory")
    durable: bool = Field(True, description="fsync before an update is acknowledged; false only for simulations")

    # --- the socket's own security; identity never depends on it, see evensong.wire.signing
    tls_certificate: Path | None = Field(None, description="PEM chain; with tls_key the socket speaks TLS")
    tls_key: Path | None = Field(None, description="PEM private key")
    tls_client_ca: Path | None = Field(None, description="PEM; clients must show a certificate that it signed (mTLS)")

    # --- who vouches for devices in secure sums, see docs/threat-model.md
    authority_public_key: str = Field(
        "", description="Ed25519, 64 hex digits, of an offline enrolment authority; empty: the coordinator itself"
    )
    certificate_days: int = Field(365, ge=1, le=36_500, description="how long certificates are good that it issues")

    # --- limits
    chunk_bytes: int = Field(1 << 20, ge=1 << 10, le=16 << 20, description="largest chunk of a blob")
    max_blob_bytes: int = Field(2 << 30, ge=1, description="largest artifact or parameter blob")
    max_update_bytes: int = Field(1 << 30, ge=1, description="largest update that a task may ask for")
    open_uploads_per_device: int = Field(2, ge=1, description="uploads that a device may have open")
    held_check_ins: int = Field(10_000, ge=0, description="check-ins that may be held at once")
    max_hold_ms: int = Field(60_000, ge=0, le=60_000, description="longest time that a check-in is held")
    threads: int = Field(4, ge=1, le=256, description="threads for blocking work")
    request_memory_ms: int = Field(24 * 3_600_000, ge=60_000, description="how long answers are kept for repeats")

    # --- policy
    lease_ms: int = Field(0, ge=0, description="lifetime of a lease; 0: until the round's deadline")
    check_ins_per_second: float = Field(500.0, gt=0, description="rate to which retry windows spread a large fleet")
    retry_earliest_ms: int = Field(1_000, ge=0, description="start of the retry window when there is no work")
    retry_latest_ms: int = Field(5_000, ge=1, description="its end, before the fleet's spread is added")
    minimum_runtime_version: str = Field("0.1.0", description="devices with an older runtime are ineligible")
    signature_tolerance_ms: int = Field(300_000, ge=1_000, description="how far a device's clock may be off")
    drain_ms: int = Field(10_000, ge=0, description="how long running calls may take after SIGTERM")

    # --- what it tells
    log_format: Literal["console", "json"] = Field("console", description="how log lines look")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    metrics_port: int | None = Field(
        None, ge=0, le=65_535, description="loopback HTTP port for Prometheus; 0: a free one"
    )
    reflection: bool = Field(True, description="gRPC server reflection")

    @field_validator("listen")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, separator, port = value.rpartition(":")
        if not (separator and host and port.isdecimal() and int(port) <= 65_535):
            raise ValueError(f"expected HOST:PORT, got {value!r}")
        return value

    @field_validator("authority_public_key")
    @classmethod
    def _key_in_hex(cls, value: str) -> str:
        if value and not re.fullmatch("[0-9a-f]{64}", value):
            raise ValueError("expected 64 lower-case hex digits")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key are set together or not at all")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if self.retry_latest_ms < self.retry_earliest_ms:
            raise ValueError("retry_latest_ms must not be less than retry_earliest_ms")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def max_message_bytes(self) -> int:
        """A chunk, its frame, and room for the largest other message (a bundle with many tensors)."""
        return max(self.chunk_bytes + (64 << 10), 4 << 20)

    @property
    def database_path(self) -> Path:
        return self.data_dir / "coordinator.sqlite3"

    @property
    def operator_token_file(self) -> Path:
        return self.data_dir / "operator.token"


def load(file: Path | None = None, **options: object) -> Settings:
    """Settings from ``file`` (TOML), the environment and ``options``; an option that is None counts as absent.

    Raises :class:`ConfigurationError`.
    """

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        if file is not None and not file.is_file():
            raise ConfigurationError("the configuration file is missing", got=file)
        return FromFile(**{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise ConfigurationError("the configuration is wrong", got=problems) from None
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise ConfigurationError("the configuration file cannot be read", got=error) from None
