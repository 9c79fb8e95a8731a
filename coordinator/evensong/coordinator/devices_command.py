"""List and revoke devices, and make the tokens with which they enrol."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from rich.console import Console
from rich.table import Table

from evensong.coordinator.command_line import Address, CertificateAuthority, TokenFile, connected, run
from evensong.coordinator.config import ConfigurationError
from evensong.coordinator.files import typed_errors, write_private
from evensong.coordinator.handle import DEFAULT_ADDRESS
from evensong.secagg import certificates
from evensong.wire.signing import public_key_of

app = typer.Typer(help="Devices of a coordinator, and the tokens with which they enrol.", no_args_is_help=True)


def main(argv: Sequence[str] | None = None) -> int:
    """``evensong devices``; the exit codes are those of :mod:`command_line`."""
    return run(app, "evensong devices", argv)


@app.command(name="list")
def list_devices(
    address: Address = DEFAULT_ADDRESS, token_file: TokenFile = None, tls_ca: CertificateAuthority = None
) -> None:
    """All enrolled devices."""
    with connected(address, token_file, tls_ca) as coordinator:
        table = Table("device", "population", "enrolled", "last seen", "reports", "", "last refusal")
        for device in coordinator.devices():
            table.add_row(
                device.device_id,
                device.population,
                f"{device.enrolled:%Y-%m-%d %H:%M}",
                f"{device.last_seen:%Y-%m-%d %H:%M}" if device.last_seen else "-",
                str(device.accepted_reports),
                "revoked" if device.revoked else "",
                device.last_refusal,
            )
        Console().print(table)


@app.command()
def revoke(
    device: Annotated[str, typer.Argument(help="Id of the device.")],
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    tls_ca: CertificateAuthority = None,
) -> None:
    """Refuses a device from now on."""
    with connected(address, token_file, tls_ca) as coordinator:
        coordinator.revoke(device)
    print("revoked")


@app.command()
def token(
    population: Annotated[str, typer.Option(help="Group that the devices join.")] = "default",
    uses: Annotated[int, typer.Option(help="How many devices may use it.")] = 1,
    hours: Annotated[float, typer.Option(help="How long it is good for.")] = 24.0,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    tls_ca: CertificateAuthority = None,
) -> None:
    """Prints a token with which devices enrol. It is shown only once."""
    with connected(address, token_file, tls_ca) as coordinator:
        issued = coordinator.create_token(population, uses, hours * 3600)
    print(issued)
    print(f"for {uses} device(s) of {population!r} until {issued.expires:%Y-%m-%d %H:%M} UTC", file=sys.stderr)


@app.command()
def authority(
    file: Annotated[Path, typer.Argument(help="Where to keep the private key: on a machine that stays offline.")],
) -> None:
    """Makes the key of an enrolment authority that is not the coordinator, and prints its public half.

    Give that half to the coordinator (setting authority_public_key) and to each device (--authority). With an authority
    of its own, a coordinator cannot invent devices to fill a secure sum with.
    """
    if file.exists():
        raise ConfigurationError("the file exists", got=file, fix="An authority's key is never overwritten.")
    key = Ed25519PrivateKey.generate()
    with typed_errors("writing the authority's key"):
        write_private(file, key.private_bytes_raw())
    print(public_key_of(key).hex())


@app.command()
def certify(
    public_key: Annotated[str, typer.Argument(help="The device's, 64 hex digits: `evensong device key` prints it.")],
    authority_file: Annotated[Path, typer.Option("--authority", help="The authority's private key.")],
    population: Annotated[str, typer.Option(help="Group that the device joins.")] = "default",
    days: Annotated[int, typer.Option(help="How long the certificate is good for.", min=1)] = 365,
) -> None:
    """Signs a certificate for one device, offline; the device enrols with it (evensong device enrol --certificate)."""
    try:
        key = Ed25519PrivateKey.from_private_bytes(authority_file.read_bytes())
        device = bytes.fromhex(public_key)
        Ed25519PublicKey.from_public_bytes(device)
    except (OSError, ValueError) as error:
        raise ConfigurationError("a key cannot be used", got=error, expected="32 raw bytes, 64 hex digits") from None
    not_after = time.time_ns() // 1_000_000 + days * 24 * 3_600_000
    print(certificates.issue(key, device, population, not_after, secrets.token_bytes(16)).hex())


if __name__ == "__main__":
    sys.exit(main())
