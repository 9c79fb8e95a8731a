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
        with _one_interrupt():
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
def _one_interrupt() -> Iterator[None]:
    """The first SIGINT or SIGTERM unwinds the program; later ones are ignored until it has ended, so that they cannot
    cut the unwinding short.

    What is unwound ends processes and closes connections, within seconds.
    """

    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        for each in former:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in former:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_IGN if interrupted else handler)
