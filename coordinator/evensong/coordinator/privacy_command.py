"""Show what tasks have spent of their privacy, and plan the noise of new ones."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from evensong.coordinator import svg
from evensong.coordinator.bundle import largest_cohort
from evensong.coordinator.command_line import Address, CertificateAuthority, TokenFile, connected, run
from evensong.coordinator.handle import DEFAULT_ADDRESS, Coordinator, NotFoundError
from evensong.coordinator.privacy.accounting import Accounting
from evensong.coordinator.privacy.mechanism import vector_multiplier
from evensong.coordinator.privacy.rules import MOST_EPSILON, check_privacy
from evensong.coordinator.views import PrivacyLedger
from evensong.secagg.noise import DISTRIBUTED, DRAW_ERROR
from evensong.v1 import task_pb2

app = typer.Typer(
    help="What tasks have spent of their privacy, and how much noise a promise takes.\n\n"
    "A promise is a pair (epsilon, delta): whatever a task's versions show, they would show almost as likely if any "
    "one device had stayed away. Almost: e^epsilon times at most, but for a chance of delta. Small epsilon is strong "
    "(up to 1), 8 is common for models of many devices, above 20 promises little. delta stays well below one over the "
    "number of devices.",
    no_args_is_help=True,
)

Plot = Annotated[Path | None, typer.Option("--plot", help="Writes epsilon over rounds as an SVG picture.")]


class Mechanism(StrEnum):
    """As in ``Privacy(mechanism=...)``."""

    GAUSSIAN = "gaussian"
    BANDED = "banded"
    DISTRIBUTED_GAUSSIAN = "distributed-gaussian"
    DISTRIBUTED_SKELLAM = "distributed-skellam"


class Sampling(StrEnum):
    """As in ``Privacy(sampling=...)``."""

    NONE = "none"
    POISSON = "poisson"


_MECHANISMS = {
    Mechanism.GAUSSIAN: task_pb2.PRIVACY_MECHANISM_CENTRAL_GAUSSIAN,
    Mechanism.BANDED: task_pb2.PRIVACY_MECHANISM_BANDED_MATRIX,
    Mechanism.DISTRIBUTED_GAUSSIAN: task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN,
    Mechanism.DISTRIBUTED_SKELLAM: task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_SKELLAM,
}


def main(argv: Sequence[str] | None = None) -> int:
    """``evensong privacy``; the exit codes are those of :mod:`command_line`."""
    return run(app, "evensong privacy", argv)


@app.command()
def show(
    task: Annotated[str, typer.Argument(help="Id of a task, or the beginning of one.", metavar="TASK")] = "",
    population: Annotated[str, typer.Option(help="All tasks of a group of devices instead.")] = "",
    plot: Plot = None,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    tls_ca: CertificateAuthority = None,
) -> None:
    """What a task, or a population, has spent: every release with what the accountant made of it."""
    if bool(task) == bool(population):
        raise typer.BadParameter("say either a task or --population")
    with connected(address, token_file, tls_ca) as coordinator:
        ledger = coordinator.privacy(_find(coordinator, task) if task else "", population=population)
    console = Console()
    table = Table(
        "task", "round", "version", "mechanism", "noise", "clip norm", "devices", "sampled", "epsilon", "delta"
    )
    for release in ledger.releases:
        table.add_row(
            release.task_id[:8],
            str(release.round),
            str(release.version or "-"),
            release.mechanism.replace("_", " "),
            f"{release.noise_multiplier:.4g}",
            f"{release.clip_norm:.4g}",
            str(release.devices),
            "" if release.sampling_probability == 1 else f"{release.sampling_probability:.3g}",
            f"{release.epsilon:.4g}",
            f"{release.delta:g}",
        )
    console.print(table)
    console.print(_spent(ledger))
    if task:
        points = [(float(index), release.epsilon) for index, release in enumerate(ledger.releases, 1)]
        _draw(console, [(0.0, 0.0), *points], ledger.plan.epsilon if ledger.plan else None, plot)


@app.command()
def plan(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the task.")],
    goal: Annotated[int, typer.Option(min=1, help="Reports that close a round: the fixed denominator.")],
    delta: Annotated[float, typer.Option(help="Well below one over the number of devices.")] = 1e-5,
    target_epsilon: Annotated[float | None, typer.Option(help="Finds the least noise that keeps it.")] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Or tells what this noise costs: its deviation over the clip norm.")
    ] = None,
    mechanism: Annotated[Mechanism, typer.Option(help="As in Privacy(mechanism=...).")] = Mechanism.GAUSSIAN,
    sampling: Annotated[
        Sampling, typer.Option(help="none claims nothing; poisson: the coordinator draws devices of the population.")
    ] = Sampling.NONE,
    population: Annotated[int | None, typer.Option(min=1, help="Devices that are enrolled, for poisson.")] = None,
    max_participations: Annotated[int, typer.Option(min=0, help="Rounds of one device at most; 0: all.")] = 0,
    min_separation: Annotated[int, typer.Option(min=0, help="A device comes in every so manieth round at most.")] = 0,
    bands: Annotated[int, typer.Option(min=0, help="Of banded noise; 0: min-separation.")] = 0,
    parameters: Annotated[int, typer.Option(min=1, help="Of the model, for noise of devices.")] = 1_000_000,
    bits: Annotated[int, typer.Option(min=2, max=16, help="Of a value in the secure sum, for noise of devices.")] = 8,
    min_survivors: Annotated[int, typer.Option(min=0, help="For noise of devices; 0: three quarters of goal.")] = 0,
    corrupted: Annotated[float, typer.Option(min=0, max=0.49, help="Share of a cohort, for noise of devices.")] = 0.05,
    plot: Plot = None,
) -> None:
    """How much noise a target takes, or what a noise costs.

    evensong privacy plan --target-epsilon 8 --rounds 100 --goal 500

    evensong privacy plan --target-epsilon 8 --rounds 100 --goal 500 --population 20000 --sampling poisson

    evensong privacy plan --noise-multiplier 1.2 --rounds 50 --goal 100 --max-participations 5

    Needs Google's dp-accounting: pip install "evensong[privacy]".
    """
    if (target_epsilon is None) == (noise_multiplier is None):
        raise typer.BadParameter("say either --target-epsilon or --noise-multiplier")
    bundle = task_pb2.TaskBundle(
        layout=[task_pb2.TensorSpec(name="model", shape=[parameters])],
        update=task_pb2.UpdatePlan(bits=bits, clip_norm=1.0, weighting=task_pb2.WEIGHTING_UNIFORM),
        round=task_pb2.RoundPolicy(goal_reports=goal, rounds=rounds),
        privacy=task_pb2.PrivacyPlan(
            mechanism=_MECHANISMS[mechanism],
            epsilon=target_epsilon or MOST_EPSILON,
            delta=delta,
            noise_multiplier=noise_multiplier or 0.0,
            sampling=task_pb2.SAMPLING_POISSON if sampling == Sampling.POISSON else task_pb2.SAMPLING_NONE,
            population=population or 0,
            max_participations=max_participations,
            min_separation=min_separation,
            bands=bands or (min_separation if mechanism == Mechanism.BANDED else 0),
        ),
    )
    if bundle.privacy.mechanism in DISTRIBUTED:
        survivors = min_survivors or -(-3 * goal // 4)
        bundle.secure.CopyFrom(
            task_pb2.SecurePlan(
                min_survivors=survivors, corrupted_share=corrupted, max_cohort=largest_cohort(bundle.round)
            )
        )
    check_privacy(bundle, noise_is_open=True)
    accounting = Accounting.of(bundle)
    if target_epsilon is not None:
        accounting = accounting.with_noise(accounting.noise_for(target_epsilon, rounds))
    console = Console()
    console.print(_figures(accounting, rounds, goal, parameters))
    _draw(console, _curve(accounting, rounds), target_epsilon, plot)


def _figures(accounting: Accounting, rounds: int, goal: int, parameters: int) -> Table:
    multiplier, epsilon = accounting.noise_multiplier, accounting.epsilon(rounds)
    table = Table(show_header=False, box=None)
    table.add_row("noise multiplier", f"{multiplier:.5g}", "deviation of the noise on the sum, over the clip norm")
    table.add_row("noise on the mean", f"{multiplier / goal:.3g}", f"times the clip norm, on each value; goal {goal}")
    table.add_row("epsilon", f"{epsilon:.5g}", f"after {rounds} rounds, at delta {accounting.delta:g}")
    if accounting.grid is None:
        renyi = accounting.epsilon(rounds, "rdp")
        table.add_row("by Renyi divergences", f"{renyi:.5g}", "a looser bound, for comparison")
        vector = vector_multiplier(multiplier, goal)
        if accounting.mechanism == _MECHANISMS[Mechanism.GAUSSIAN]:
            fits = f"{vector:.5g}" if math.isfinite(vector) else f"needs a goal above {10 * multiplier:.3g}"
            table.add_row("with adaptive clipping", fits, "the vector's noise multiplier, at the same cost")
    else:
        sigma = multiplier * accounting.grid.unit_sigma
        table.add_row("noise of one device", f"{sigma:.4g}", "steps of its grid; 3 at least")
    if accounting.sampling_probability < 1:
        table.add_row("sampled", f"{accounting.sampling_probability:.4g}", "of the population, drawn for each round")
    times = accounting.participations(rounds)
    table.add_row("rounds of one device", str(times), "at most, as accounted for")
    devices = goal if accounting.grid is not None else 1
    inexact = rounds * devices * parameters * DRAW_ERROR * (1 + math.exp(epsilon))
    table.add_row("drawn inexactly", f"{inexact:.1e}", "of delta on top, for so many draws from finite tables")
    return table


def _curve(accounting: Accounting, rounds: int) -> list[tuple[float, float]]:
    """Epsilon at up to 24 points; at 8 where each may take half a second."""
    steps = 24 if accounting.sampling_probability == 1 else 8
    at = sorted({max(1, round(rounds * step / steps)) for step in range(1, steps + 1)})
    return [(0.0, 0.0), *((float(count), accounting.epsilon(count)) for count in at)]


def _draw(console: Console, points: Sequence[tuple[float, float]], limit: float | None, plot: Path | None) -> None:
    if len(points) > 1:
        for line in text_plot([y for _, y in points], limit):
            console.print(line, highlight=False)
        console.print(f"      {'0':<38}{points[-1][0]:>10g} rounds", style="dim")
    if plot is not None:
        picture = svg.rising_chart("Epsilon spent over rounds", points, x_label="round", y_label="epsilon", limit=limit)
        plot.write_text(svg.standalone(picture), encoding="utf-8")
        console.print(f"plot: {plot}")


def text_plot(values: Sequence[float], limit: float | None = None, width: int = 48, height: int = 6) -> list[str]:
    """A curve of unicode blocks, ``height`` lines; the axis reaches to the limit, if there is one."""
    largest = max([*values, limit or 0.0]) or 1.0
    columns = [values[round(column * (len(values) - 1) / (width - 1))] / largest * height for column in range(width)]
    lines = []
    for row in range(height - 1, -1, -1):
        blocks = "".join(" ▁▂▃▄▅▆▇█"[max(0, min(8, round((column - row) * 8)))] for column in columns)
        label = f"{largest:5.3g}" if row == height - 1 else f"{0:5g}" if row == 0 else " " * 5
        lines.append(f"{label} {blocks}")
    return lines


def _spent(ledger: PrivacyLedger) -> str:
    if not ledger.releases:
        return "nothing is spent" if ledger.plan is not None else "no privacy plan, so nothing is promised"
    tasks = len({release.task_id for release in ledger.releases})
    text = f"spent: epsilon {ledger.epsilon:.4g} at delta {ledger.delta:g}"
    if ledger.plan is not None:
        return f"{text}, of {ledger.plan.epsilon:g}"
    return f"{text}, by {tasks} task{'s' * (tasks > 1)} together (added up, an upper bound)"


def _find(coordinator: Coordinator, prefix: str) -> str:
    found = [status.task_id for status in coordinator.tasks() if status.task_id.startswith(prefix)]
    if len(found) != 1:
        raise NotFoundError("there is no such task" if not found else "several tasks begin so", got=prefix)
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
