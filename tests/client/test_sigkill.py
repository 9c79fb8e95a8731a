"""SIGKILL, for real: a device process dies at chosen moments of its round, and the next process goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from daemon import Daemon, running_daemon
from tiny_artifact import tiny_artifact, tiny_examples

from evensong.client import ExampleStore
from evensong.coordinator.task import LocalTraining, Task

FEATURES, CLASSES = 2000, 10  # an update of 80 kB


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory):
    with running_daemon(tmp_path_factory.mktemp("coordinator")) as running:
        yield running


@pytest.mark.parametrize("moment", ["Enrolled", "Downloaded", "StepDone", "Sealed"])
def test_the_next_process_finishes_the_round_and_it_counts_once(daemon: Daemon, tmp_path: Path, moment: str) -> None:
    population = moment.lower()
    task = Task(
        population,
        tiny_artifact(FEATURES, CLASSES),
        population=population,
        rounds=1,
        goal=1,
        over_selection=1.0,
        deadline=60.0,
        evaluate_every=0,
        local=LocalTraining(epochs=5, learning_rate=0.1),
    )
    task_id = daemon.ask(daemon.operator.submit(task, request_id=population.encode().ljust(16)))
    token = daemon.ask(daemon.operator.token(1, population, request_id=population.encode().rjust(16)))
    store = ExampleStore(tmp_path / "examples.sqlite")
    store.add_many(*tiny_examples(200, 1, FEATURES, CLASSES))
    store.close()

    first = start(tmp_path, daemon.address, token, population)
    kill_at(first, moment)
    second = start(tmp_path, daemon.address, token, population)
    events = [json.loads(line) for line in second.communicate(timeout=60)[0].splitlines()]
    assert second.returncode == 0
    assert events[-1]["event"] in ("Trained", "Idle"), events[-1]

    [initial, trained] = daemon.ask(daemon.operator.versions(task_id))
    assert (initial.manifest.number, trained.manifest.number, trained.reports) == (0, 1, 1)
    assert trained.total_weight == 200 and trained.training.examples == 1000


def start(state: Path, address: str, token: str, population: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "evensong.client.command", "device", "run", "--once", "--json", "--always"]
    options = ["--state", str(state), "--coordinator", address, "--token", token, "--population", population]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)


def kill_at(process: subprocess.Popen[str], moment: str) -> None:
    """SIGKILL as soon as the event is told; whatever comes next is cut anywhere."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if json.loads(line)["event"] == moment:
                process.kill()
                break
        else:
            raise AssertionError(f"the device never came to {moment}")
    process.wait(timeout=30)
