"""What a person sees while a task runs, and the table at its end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from evensong.coordinator.views import EventKind, TaskEvent
from evensong.simulations.report import size
from evensong.simulations.results import DeviceOutcome, Results


class Screen:
    """A bar for rounds, one for the reports of the open round, and the latest figures; plain lines where nobody
    watches."""

    def __init__(self, console: Console, rounds: int, reports: int) -> None:
        self._console = console
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
        self._rounds = self._progress.add_task("rounds", total=rounds, note="", visible=False)
        self._reports = self._progress.add_task("  reports of this round", total=reports, note="", visible=False)
        self._accuracy = self._loss = ""
        self._losses: dict[int, str] = {}  #: by version; an evaluation may come some versions later
        self._live = Live(self._progress, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Screen:
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
                self._losses[event.version] = self._loss
                progress.update(self._rounds, completed=event.version)
            case EventKind.VERSION_EVALUATED:
                if event.metrics:
                    self._accuracy = f"version {event.version}: accuracy [bold]{event.metrics.accuracy:.1%}[/]"
                if not self._console.is_terminal:
                    self._console.print(f"{self._accuracy}, {self._losses.get(event.version, '')}")
            case EventKind.ROUND_ABANDONED:
                self.say(f"round {event.round} came to nothing: {event.message or 'too few reports'}")
        progress.update(self._rounds, note="  ".join(filter(None, (self._accuracy, self._loss))))


def show_results(console: Console, results: Results) -> None:
    """The table that matters."""
    console.print(f"\n[bold]{results.title}[/]")
    table = Table(header_style="dim")
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
