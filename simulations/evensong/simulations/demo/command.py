"""Watch a real coordinator and real devices learn real data together, on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from evensong.simulations.cli import run_app
from evensong.simulations.demo.run import Plan, run_demo
from evensong.simulations.demo.scenarios import SCENARIOS, scenario_named
from evensong.simulations.screen import Screen, show_results

app = typer.Typer(add_completion=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code. Every process that the demo started has ended by then."""
    return run_app(app, "evensong demo", argv)


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
    with Screen(console, plan.rounds, plan.devices) as screen:
        results = run_demo(plan, screen)
    show_results(console, results)
    console.print(f"\nLeft in [bold]{output}[/]: report.html, results.json, trained.evsg, initial.evsg")


if __name__ == "__main__":
    sys.exit(main())
