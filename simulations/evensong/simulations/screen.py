"""What a person sees while a task runs, and the table at its end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from evensong.coordinator import EventKind, TaskEvent
from evensong.simulations.report import size
from evensong.simulations.results import DeviceOutcome, Results

_BLOCKS = "▁▂▃▄▅▆▇█"


class Screen:
    """A bar for rounds, one for the reports of the open round, and the latest figures; lines where nobody watches."""

    def __init__(self, console: Console, rounds: int, reports: int) -> None:
        self._console = console
        columns = (TextColumn("{task.description:<7}"), BarColumn(24), MofNCompleteColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
        self._rounds = self._progress.add_task("rounds", total=rounds, note="", visible=False)
        self._reports = self._progress.add_task("reports", total=reports, note="", visible=False)
        self._losses: dict[int, str] = {}  #: by version; an evaluation may come some versions later
        self._accuracies: list[float] = []
        self._live = Live(self._progress, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, what: str) -> None:
        """Something begins."""
        self._console.print(f"[dim]{what}[/]")

    def show(self, event: TaskEvent) -> None:
        """Something happened to the task."""
        progress = self._progress
        match event.kind:
            case EventKind.ROUND_STARTED:
                progress.update(self._rounds, visible=True)
                progress.reset(self._reports, visible=True)
            case EventKind.REPORT_ACCEPTED:
                progress.update(self._reports, completed=event.reports)
            case EventKind.VERSION_COMMITTED:
                self._losses[event.version] = f"loss {event.metrics.loss:.3f}" if event.metrics else ""
                progress.update(self._rounds, completed=event.version)
            case EventKind.VERSION_EVALUATED if event.metrics:
                self._accuracies.append(event.metrics.accuracy)
                note = f"version {event.version}: [bold]{event.metrics.accuracy:.1%}[/], {self._losses[event.version]}"
                progress.update(self._rounds, note=note)
                progress.update(self._reports, note=sparkline(self._accuracies))
                if not self._console.is_terminal:
                    self._console.print(note)
            case EventKind.ROUND_ABANDONED:
                self.say(f"round {event.round} came to nothing: {event.message or 'too few reports'}")


def sparkline(fractions: Sequence[float], width: int = 30) -> str:
    """The last ``width`` of ``fractions`` in [0, 1], one block each."""
    return "".join(_BLOCKS[min(int(value * len(_BLOCKS)), len(_BLOCKS) - 1)] for value in fractions[-width:])


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
    if results.coordinator_saw:
        console.print(f"\n{results.coordinator_saw}")


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
