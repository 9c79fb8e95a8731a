"""How the commands of this package start and end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click
import typer

from evensong.simulations.data import DataError
from evensong.wire.errors import EvensongError

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130


def run_app(app: typer.Typer, name: str, argv: Sequence[str] | None) -> int:
    """Runs ``app``; the exit code: 0 done, 1 failed, 2 wrong command line or data, 130 interrupted."""
    try:
        with _terminate_as_interrupt():
            result = typer.main.get_command(app).main(
                list(sys.argv[1:] if argv is None else argv), prog_name=name, standalone_mode=False
            )
        return result if isinstance(result, int) else 0
    except EvensongError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return WRONG_USE if isinstance(error, DataError) else FAILED
    except typer.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that whatever was started ends with it."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
