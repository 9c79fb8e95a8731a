"""Submit, watch and steer federated training tasks."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from evensong.coordinator.bundle import TaskError
from evensong.coordinator.command_line import FAILED, Address, CertificateAuthority, TokenFile, connected, run
from evensong.coordinator.handle import DEFAULT_ADDRESS, Coordinator, NotFoundError
from evensong.coordinator.plan import parse_plan
from evensong.coordinator.task import LocalTraining, SecureAggregation, Strategy, Task
from evensong.coordinator.views import EventKind, Metrics, TaskEvent, TaskState, TaskStatus
from evensong.wire.codecs import UpdateCodec
from evensong.wire.tensors import encode_tensors, layout_from_proto

app = typer.Typer(help="Federated training tasks on a coordinator.", no_args_is_help=True)

TaskId = Annotated[str, typer.Argument(help="Id of a task, or the beginning of one.", metavar="TASK")]


def main(argv: Sequence[str] | None = None) -> int:
    """``evensong task``; the exit codes are those of :mod:`command_line`."""
    return run(app, "evensong task", argv)


@app.command()
def submit(
    source: Annotated[Path, typer.Argument(help="A Python file that defines `task`, or a compiled artifact.")],
    name: Annotated[str | None, typer.Option(help="Default: the artifact's file name.")] = None,
    population: Annotated[str, typer.Option(help="Group of devices.")] = "default",
    rounds: Annotated[int, typer.Option(help="Committed versions.")] = 10,
    goal: Annotated[int, typer.Option(help="Reports that close a round.")] = 8,
    deadline: Annotated[float, typer.Option(help="Seconds of a round.")] = 600.0,
    epochs: Annotated[int, typer.Option(help="Local epochs.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Local learning rate.")] = 0.1,
    personal: Annotated[list[str] | None, typer.Option(help="Pattern of tensors that stay on the device.")] = None,
    secure: Annotated[
        bool, typer.Option(help="Learn only the sum of a cohort's updates; needs a goal of three or more.")
    ] = True,
    bits: Annotated[int, typer.Option(help="Bits of an update's values; 32 with --no-secure: float32.")] = 8,
    clip_norm: Annotated[float | None, typer.Option(help="L2 norm of an update.")] = None,
    strategy: Annotated[str, typer.Option(help="Server strategy.")] = "fedavg",
    argument: Annotated[list[str] | None, typer.Option(help="Of the strategy, as eta=0.01.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until the task has ended.")] = False,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    tls_ca: CertificateAuthority = None,
) -> int:
    """Uploads and starts a task; prints its id. With a Python file, the options that describe the task are not used."""
    if source.suffix == ".py":
        task = _task_of(source)
    else:
        task = Task(
            name or source.stem,
            source,
            population=population,
            rounds=rounds,
            goal=goal,
            deadline=deadline,
            local=LocalTraining(epochs=epochs, learning_rate=learning_rate, personal=personal or ()),
            secure=SecureAggregation(bits=bits) if secure else None,
            update=None if secure else UpdateCodec(None if bits == 32 else bits),
            clip_norm=clip_norm,
            strategy=Strategy(strategy, **_arguments(argument or ())),
        )
    with connected(address, token_file, tls_ca) as coordinator:
        handle = coordinator.submit(task)
        print(handle.task_id, flush=True)
        return _watch(coordinator, handle.status()) if watch else 0


@app.command(name="list")
def list_tasks(
    address: Address = DEFAULT_ADDRESS, token_file: TokenFile = None, tls_ca: CertificateAuthority = None
) -> None:
    """All tasks."""
    with connected(address, token_file, tls_ca) as coordinator:
        table = Table("task", "name", "population", "state", "round", "version", "created")
        for status in coordinator.tasks():
            table.add_row(
                status.task_id,
                status.name,
                status.population,
                status.state,
                f"{status.round}/{status.rounds}",
                str(status.version),
                f"{status.created:%Y-%m-%d %H:%M}",
            )
        Console().print(table)


@app.command()
def show(
    task: TaskId, address: Address = DEFAULT_ADDRESS, token_file: TokenFile = None, tls_ca: CertificateAuthority = None
) -> None:
    """One task in full."""
    with connected(address, token_file, tls_ca) as coordinator:
        status = _find(coordinator, task)
    layout = layout_from_proto(status.bundle.layout)
    plan = parse_plan(status.bundle.SerializeToString())
    policy, server = status.bundle.round, status.bundle.server
    arguments = ", ".join(f"{key}={value:g}" for key, value in sorted(server.arguments.items()))
    table = Table(show_header=False, box=None)
    for key, value in (
        ("task", status.task_id),
        ("name", status.name),
        ("population", status.population),
        ("state", f"{status.state} {status.message}".rstrip()),
        ("round", f"{status.round} of {status.rounds}"),
        ("version", status.version),
        (
            "reports",
            f"{policy.goal_reports} wanted, {policy.min_reports} needed within {policy.deadline_ms / 1000:g} s",
        ),
        ("strategy", f"{server.strategy}({arguments})"),
        ("parameters", f"{sum(spec.size for spec in layout):,} in {len(layout)} tensors"),
        ("update", f"{plan.update_bytes:,} bytes, {'in a secure sum' if plan.secure else 'seen singly'}"),
        ("artifact", f"{status.bundle.artifact.size_bytes:,} bytes, sha256 {status.bundle.artifact.sha256.hex()}"),
        ("created", f"{status.created:%Y-%m-%d %H:%M:%S} UTC"),
    ):
        table.add_row(key, str(value))
    Console().print(table)


@app.command()
def watch(
    task: TaskId, address: Address = DEFAULT_ADDRESS, token_file: TokenFile = None, tls_ca: CertificateAuthority = None
) -> int:
    """Follows a task until it ends; 1 if it failed or was stopped."""
    with connected(address, token_file, tls_ca) as coordinator:
        return _watch(coordinator, _find(coordinator, task))


@app.command()
def versions(
    task: TaskId, address: Address = DEFAULT_ADDRESS, token_file: TokenFile = None, tls_ca: CertificateAuthority = None
) -> None:
    """The committed models of a task, with their lineage."""
    with connected(address, token_file, tls_ca) as coordinator:
        table = Table("version", "parent", "round", "reports", "weight", "training", "evaluation", "created", "")
        for version in coordinator.versions(_find(coordinator, task).task_id):
            table.add_row(
                str(version.number),
                str(version.parent) if version.number else "-",
                str(version.round),
                str(version.reports),
                f"{version.total_weight:g}",
                _describe(version.training),
                _describe(version.evaluation),
                f"{version.created:%Y-%m-%d %H:%M}",
                "serving" if version.serving else "",
            )
        Console().print(table)


@app.command()
def download(
    task: TaskId,
    output: Annotated[Path, typer.Argument(help="File to write: .npz for NumPy, else evensong's tensor format.")],
    version: Annotated[int | None, typer.Option(help="Default: the one that is served.")] = None,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    tls_ca: CertificateAuthority = None,
) -> None:
    """Writes the parameters of a version to a file."""
    with connected(address, token_file, tls_ca) as coordinator:
        status = _find(coordinator, task)
        parameters = coordinator.download(status.task_id, version)
    if output.suffix == ".npz":
        np.savez(output, **parameters)  # type: ignore[arg-type,unused-ignore]
    else:
        output.write_bytes(encode_tensors(parameters, layout_from_proto(status.bundle.layout)))
    print(f"{output}: {len(parameters)} tensors, {sum(array.size for array in parameters.values()):,} parameters")


@app.command()
def promote(
    task: TaskId,
    version: Annotated[int, typer.Argument(help="Number of the version.")],
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    tls_ca: CertificateAuthority = None,
) -> None:
    """Makes a version the one that devices predict with and training goes on from."""
    with connected(address, token_file, tls_ca) as coordinator:
        coordinator.promote(_find(coordinator, task).task_id, version)
    print(f"version {version} is served")


@app.command()
def rollback(
    task: TaskId, address: Address = DEFAULT_ADDRESS, token_file: TokenFile = None, tls_ca: CertificateAuthority = None
) -> None:
    """Promotes the parent of the version that is served."""
    with connected(address, token_file, tls_ca) as coordinator:
        number = coordinator.rollback(_find(coordinator, task).task_id)
    print(f"version {number} is served")


@app.command()
def stop(
    task: TaskId, address: Address = DEFAULT_ADDRESS, token_file: TokenFile = None, tls_ca: CertificateAuthority = None
) -> None:
    """Ends a task; its versions stay."""
    with connected(address, token_file, tls_ca) as coordinator:
        coordinator.stop(_find(coordinator, task).task_id)
    print("stopped")


def _find(coordinator: Coordinator, task_id: str) -> TaskStatus:
    """The one task whose id begins so."""
    found = [status for status in coordinator.tasks() if status.task_id.startswith(task_id)]
    if len(found) != 1:
        raise NotFoundError(
            f"{'no' if not found else len(found)} tasks have an id that begins with {task_id!r}", expected="one"
        )
    return found[0]


def _task_of(source: Path) -> Task:
    if not source.is_file():
        raise TaskError("there is no such file", got=source)
    found = runpy.run_path(str(source)).get("task")
    if not isinstance(found, Task):
        raise TaskError(
            f"{source} does not define a task", expected="a variable `task`, a Task", got=type(found).__name__
        )
    return found


def _arguments(pairs: Sequence[str]) -> dict[str, float]:
    arguments = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            arguments[name] = float(value)
        except ValueError:
            raise TaskError("an argument of the strategy is malformed", expected="NAME=NUMBER", got=pair) from None
    return arguments


# ------------------------------------------------------------------------------------------------------------- watching


def _watch(coordinator: Coordinator, status: TaskStatus) -> int:
    """A line for each event that matters, and on a terminal two bars that move."""
    console = Console()
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        versions = progress.add_task("versions", total=status.rounds)
        reports = progress.add_task("reports", total=status.bundle.round.goal_reports)
        for event in coordinator.watch(status.task_id):
            if event.kind == EventKind.ROUND_STARTED:
                progress.reset(reports, total=status.bundle.round.goal_reports)
            elif event.kind == EventKind.REPORT_ACCEPTED:
                progress.update(reports, completed=event.reports)
            elif event.kind in (EventKind.VERSION_COMMITTED, EventKind.VERSION_PROMOTED):
                progress.update(versions, completed=event.version)
            if event.kind != EventKind.REPORT_ACCEPTED:
                progress.console.print(_line(event), highlight=False, markup=False)
    return 0 if coordinator.task(status.task_id).state == TaskState.COMPLETE else FAILED


def _line(event: TaskEvent) -> str:
    what = event.kind.replace("_", " ")
    parts = [f"{event.time:%H:%M:%S}  {what:<17}  round {event.round:<4} version {event.version:<4}"]
    if event.reports:
        parts.append(f"{event.reports} reports")
    if event.metrics:
        parts.append(_describe(event.metrics))
    if event.bytes_up or event.bytes_down:
        parts.append(f"{event.bytes_up / 1e6:.2f} MB up, {event.bytes_down / 1e6:.2f} MB down")
    return "  ".join([*parts, event.message]).rstrip()


def _describe(metrics: Metrics | None) -> str:
    return f"loss {metrics.loss:.4f} accuracy {metrics.accuracy:.4f}" if metrics else "-"


if __name__ == "__main__":
    sys.exit(main())
