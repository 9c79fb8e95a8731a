"""List and revoke devices, and make the tokens with which they enrol."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from evensong.coordinator.command_line import Address, CertificateAuthority, TokenFile, connected, run
from evensong.coordinator.handle import DEFAULT_ADDRESS

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


if __name__ == "__main__":
    sys.exit(main())
