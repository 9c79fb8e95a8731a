"""What the commands of engineers and operators share: the options of a connection, and exit codes.

0 done, 1 refused or failed, 2 wrong command line, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import click
import typer

from evensong.coordinator.credentials import Tls
from evensong.coordinator.handle import Coordinator
from evensong.wire.errors import EvensongError

FAILED, INTERRUPTED = 1, 130

Address = Annotated[str, typer.Option("--address", envvar="EVENSONG_ADDRESS", help="HOST:PORT of the coordinator.")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="Operator's token; default: $EVENSONG_OPERATOR_TOKEN, or this machine's."),
]
CertificateAuthority = Annotated[
    Path | None, typer.Option("--tls-ca", help="PEM of who signed the coordinator's certificate; implies TLS.")
]


@contextmanager
def connected(address: str, token_file: Path | None, tls_ca: Path | None) -> Iterator[Coordinator]:
    """The coordinator that the options name, closed at the end."""
    with Coordinator.connect(address, token_file, Tls(ca=tls_ca) if tls_ca else None) as coordinator:
        yield coordinator


def run(app: typer.Typer, name: str, argv: Sequence[str] | None) -> int:
    """Exit codes: 0 done, 1 refused or failed, 2 wrong command line, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        result = typer.main.get_command(app).main(arguments, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except EvensongError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return FAILED
    except click.exceptions.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
