"""``evensong demo``: the command line and what it shows."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import click
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from evensong.coordinator.views import EventKind, TaskEvent
from evensong.simulations.data import DataError
from evensong.simulations.demo.run import Plan, run_demo
from evensong.simulations.demo.scenarios import SCENARIOS, scenario_named
from evensong.simulations.report import size
from evensong.simulations.results import DeviceOutcome, Results
from evensong.wire.errors import EvensongError

FAILED, INTERRUPTED = 1, 130

app = typer.Typer(add_completion=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code: 0 done, 1 failed, 2 wrong command line or data, 130 interrupted."""
    try:
        result = typer.main.get_command(app).main(
            list(sys.argv[1:] if argv is None else argv), prog_name="evensong demo", standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except DataError as error:
        print(f"evensong demo: {error}", file=sys.stderr)
        return 2
    except EvensongError as error:
        print(f"evensong demo: {error}", file=sys.stderr)
        return FAILED
    except typer.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("evensong demo: interrupted; every process was stopped", file=sys.stderr)
        return INTERRUPTED


@app.command()
def demo(
    data: Annotated[str, typer.Option(help=f"{', '.join(SCENARIOS)}; har and fashion need EVENSONG_DATA.")] = "digits",
    devices: Annotated[int | None, typer.Option(min=1, max=64, help="Device processes.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, max=1000, help="Rounds of federated training.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Who holds what, and in which order it is learnt.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for report, artifacts and results.")] = Path("evensong-demo"),
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model now; needs torch.")] = False,
) -> None:
    """A real coordinator and real devices learn together on this machine, then each device personalises."""
    scenario = scenario_named(data)
    plan = Plan(scenario, devices or scenario.devices, rounds or scenario.rounds, seed, output, compile)
    console = Console()
    with _terminate_as_interrupt(), _Screen(console, plan) as screen:
        results = run_demo(plan, screen)
    show_results(console, results)
    console.print(f"\nLeft in [bold]{output}[/]: report.html, results.json, trained.evsg, initial.evsg")


class _Screen:
    """A bar for rounds, one for the reports of the open round, and the latest figures; plain lines where nobody
    watches."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console = console
        self._plan = plan
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
        self._rounds = self._progress.add_task("rounds", total=plan.rounds, note="", visible=False)
        self._reports = self._progress.add_task("  reports of this round", total=plan.devices, note="", visible=False)
        self._accuracy = self._loss = ""
        self._live = Live(self._progress, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> _Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, what: str) -> None:
        self._console.print(f"[dim]{what}[/]")

    def show(self, event: TaskEvent) -> None:
        progress = self._progress
        match event.kind:
            case EventKind.ROUND_STARTED:
                progress.update(self._rounds, visible=True)
                progress.reset(self._reports, visible=True)
            case EventKind.REPORT_ACCEPTED:
                progress.update(self._reports, completed=event.reports)
            case EventKind.VERSION_COMMITTED:
                self._loss = f"loss {event.metrics.loss:.3f}" if event.metrics else ""
                progress.update(self._rounds, completed=event.version)
            case EventKind.VERSION_EVALUATED:
                self._accuracy = f"accuracy [bold]{event.metrics.accuracy:.1%}[/]" if event.metrics else ""
                if not self._console.is_terminal:
                    self._console.print(f"version {event.version}: {self._accuracy}, {self._loss}")
            case EventKind.ROUND_ABANDONED:
                self.say(f"round {event.round} came to nothing: {event.message or 'too few reports'}")
        progress.update(self._rounds, note="  ".join(filter(None, (self._accuracy, self._loss))))


def show_results(console: Console, results: Results) -> None:
    """The table that matters."""
    table = Table(title=results.title, title_justify="left", title_style="bold", header_style="dim")
    table.add_column("accuracy on held-out examples")
    for heading in ("before", "federated", "personalised"):
        table.add_column(heading, justify="right")
    _add_group(table, "", results.devices)
    if results.global_test:
        before, federated = (f"{results.global_test[stage]:.1%}" for stage in ("before", "federated"))
        table.add_row("examples of no device", before, federated, "")
    if results.newcomers:
        table.add_section()
        _add_group(table, "newcomers, ", results.newcomers)
    console.print(table)
    figures = Table.grid(padding=(0, 2))
    for what, figure in _figures(results):
        figures.add_row(f"[dim]{what}[/]", figure)
    console.print(figures)


def _figures(results: Results) -> list[tuple[str, str]]:
    traffic = results.traffic

    def compared(count: float) -> str:
        return f"{size(count)} per device and round, {count / traffic.float32_per_device_round:.0%} of float32"

    return [
        ("bytes up", compared(traffic.up_per_device_round)),
        ("bytes down", compared(traffic.down_per_device_round)),
        ("peak arena", f"{size(results.arena_bytes)} to train {results.parameters:,} parameters"),
        ("time", f"{results.seconds:.1f} s for {len(results.rounds)} rounds on {len(results.devices)} devices"),
    ]


def _add_group(table: Table, prefix: str, devices: Sequence[DeviceOutcome]) -> None:
    rows = [(device.before, device.federated, device.personalised) for device in devices]
    means = [sum(column) / len(column) for column in zip(*rows, strict=True)]
    worst = [min(column) for column in zip(*rows, strict=True)]
    table.add_row(f"{prefix}mean over {len(devices)} devices", *(f"[bold]{value:.1%}[/]" for value in means))
    table.add_row(f"{prefix}worst device", *(f"{value:.1%}" for value in worst))


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that the processes of the demo end with it."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


if __name__ == "__main__":
    sys.exit(main())
