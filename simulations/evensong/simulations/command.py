"""Run a whole fleet of virtual devices in this process, under simulated time."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from evensong.coordinator import LocalTraining, Personalization, SecureAggregation, Task
from evensong.simulations.assess import summarise, write_all
from evensong.simulations.cli import run_app
from evensong.simulations.data import DataError, load_dataset
from evensong.simulations.demo.scenarios import SCENARIOS, Scenario, scenario_named
from evensong.simulations.fleet import Fleet, make_fleet
from evensong.simulations.in_memory import Network
from evensong.simulations.partition import divide_by
from evensong.simulations.results import Results
from evensong.simulations.screen import Screen, show_results
from evensong.simulations.simulation import SimulationResult, simulate
from evensong.simulations.trained import with_parameters
from evensong.wire.codecs import UpdateCodec

app = typer.Typer(add_completion=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    return run_app(app, "evensong simulate", argv)


@app.command()
def simulate_command(
    data: Annotated[str, typer.Option(help=f"{', '.join(SCENARIOS)}; har and fashion need EVENSONG_DATA.")] = "digits",
    clients: Annotated[int | None, typer.Option(min=1, help="Simulated devices.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Versions to commit.")] = None,
    goal: Annotated[int | None, typer.Option(min=1, help="Reports that close a round; by default all clients.")] = None,
    partition: Annotated[
        str | None, typer.Option(help="skew:ALPHA, iid, dirichlet:ALPHA or pathological:CLASSES.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="The server's: fedavg, fedavgm, fedadam, ...")] = "fedavg",
    secure: Annotated[bool, typer.Option(help="Sum updates securely, as the demo does.")] = True,
    bits: Annotated[int, typer.Option(min=1, max=32, help="Of an update's values; 32 with --no-secure: float32.")] = 8,
    lost: Annotated[float, typer.Option(min=0, max=0.9, help="Share of messages that the network loses.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything: the same seed gives the same bits.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for report, artifacts and results.")] = None,
) -> None:
    """The real devices and the real coordinator in one process, under simulated time and over a simulated network."""
    started = time.monotonic()
    scenario = scenario_named(data)
    fleet = _deal(scenario, clients, partition, seed)
    count = len(fleet.participants)
    task = Task(
        scenario.name,
        scenario.artifact(),
        rounds=rounds or scenario.rounds,
        goal=goal or count,
        over_selection=1.0 if goal in (None, count) else 1.3,
        local=LocalTraining(scenario.epochs, scenario.learning_rate, scenario.final_learning_rate),
        personalization=Personalization(scenario.personal_epochs, scenario.personal_learning_rate),
        secure=SecureAggregation(bits=bits) if secure else None,
        update=None if secure else UpdateCodec(bits=None if bits == 32 else bits),
        strategy=strategy,
    )
    console = Console()
    with Screen(console, task.rounds, task.goal) as screen:
        screen.say(f"simulating {count} devices")
        network = Network(lost_request=lost, lost_response=lost)
        simulation = simulate(task, fleet.participants, seed=seed, network=network, progress=screen.show)
    trained = with_parameters(task.artifact_bytes, simulation.parameters)
    results = _results(scenario, fleet, task, trained, simulation, seed, time.monotonic() - started)
    show_results(console, results)
    console.print(f"parameters {simulation.parameters_sha256}")
    if output is not None:
        write_all(results, task.artifact_bytes, trained, output)
        console.print(f"\nLeft in [bold]{output}[/]: report.html, results.json, trained.evsg, initial.evsg")


def _deal(scenario: Scenario, clients: int | None, partition: str | None, seed: int) -> Fleet:
    dataset = load_dataset(scenario.name)
    if partition is not None and dataset.people is not None:
        raise DataError("this data set is divided by person", got=f"--partition {partition}", fix="Leave it out.")
    return make_fleet(
        dataset,
        clients or scenario.devices,
        seed=seed,
        divide=divide_by(partition or f"skew:{scenario.concentration}"),
        global_test=scenario.held_out,
        limit=scenario.limit,
    )


def _results(
    scenario: Scenario,
    fleet: Fleet,
    task: Task,
    trained: bytes,
    simulation: SimulationResult,
    seed: int,
    seconds: float,
) -> Results:
    lost = sum(client.lost_messages for client in simulation.clients)
    return summarise(
        replace(fleet, newcomers=()),  # a simulation ends with the task: nobody comes later
        task.artifact_bytes,
        trained,
        simulation.events,
        {client.shard.name: client.account for client in simulation.clients},
        title=f"{scenario.title}: {len(simulation.clients)} simulated devices learn together",
        seed=seed,
        seconds=seconds,
        notes={
            "simulated time": f"{simulation.simulated_seconds:,.0f} s",
            "messages lost": f"{lost:,}",
            "parameters": simulation.parameters_sha256,
        },
        task=task,
    )


if __name__ == "__main__":
    sys.exit(main())
