"""SIGKILL, for real: a device process dies at chosen moments of its round, and the next process goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from daemon import Daemon, running_daemon
from tiny_artifact import tiny_artifact, tiny_examples

from evensong.client import AlwaysReady, Device, ExampleStore, Limits
from evensong.coordinator import SecureAggregation
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
        secure=None,
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


@pytest.mark.secagg
@pytest.mark.parametrize("stage", ["shares", "masked", "commit", "unmask"])
def test_the_next_process_never_enters_a_cohort_again(daemon: Daemon, tmp_path: Path, stage: str) -> None:
    """Four devices, of which one dies in the first secure round: that one ends with or without it, and the next one
    has all four."""
    population = f"secure-{stage}"
    task = Task(
        population,
        tiny_artifact(),
        population=population,
        rounds=2,
        goal=4,
        over_selection=1.0,
        evaluate_every=0,
        secure=SecureAggregation(corrupted=0.0, dropout=0.3, stage_seconds=30.0),
        local=LocalTraining(epochs=1, learning_rate=0.1),
    )
    task_id = daemon.ask(daemon.operator.submit(task, request_id=population.encode().ljust(16)))
    token = daemon.ask(daemon.operator.token(4, population, request_id=population.encode().rjust(16)))
    state = tmp_path / "mortal"
    state.mkdir()
    store = ExampleStore(state / "examples.sqlite")
    store.add_many(*tiny_examples(20, 1))
    store.close()

    with ThreadPoolExecutor(3) as pool:
        done = threading.Event()
        peers = [pool.submit(live, tmp_path / str(i), daemon.address, token, population, done) for i in range(3)]
        try:
            first = kill_at(start(state, daemon.address, token, population), "SecureStage", stage=stage)
            second = start(state, daemon.address, token, population, "--json")
            deadline = time.monotonic() + 60
            while len(versions := daemon.ask(daemon.operator.versions(task_id))) < 3:
                assert time.monotonic() < deadline and second.poll() is None
                time.sleep(0.05)
            second.send_signal(signal.SIGTERM)
            events = [json.loads(line) for line in second.communicate(timeout=30)[0].splitlines()]
        finally:
            done.set()
        for peer in peers:
            peer.result(30)

    assert [version.reports for version in versions][1] in (3, 4) and versions[2].reports == 4
    assert not cohorts(first) & cohorts(events)
    assert next(event["event"] for event in events if "wait_s" in event) in ("Aborted", "Dropped", "Trained")


def live(state: Path, address: str, token: str, population: str, done: threading.Event) -> None:
    with Device(
        state,
        coordinator=address,
        token=token,
        population=population,
        conditions=AlwaysReady(),
        limits=Limits(hold_ms=300),
    ) as device:
        device.examples.add_many(*tiny_examples(20, int(state.name)))
        device.run(until=lambda outcome: done.is_set())


def cohorts(events: list[dict[str, object]]) -> set[tuple[object, object]]:
    return {(event["round"], event["attempt"]) for event in events if event["event"] == "SecureStage"}


def test_enrolment_by_command_and_a_service_manager_that_stops_it(daemon: Daemon, tmp_path: Path) -> None:
    token = daemon.ask(daemon.operator.token(2, request_id=b"command-01234567"))
    command = [sys.executable, "-m", "evensong.client.command", "device"]
    to = ["--coordinator", daemon.address]
    enrol = [*command, "enrol", "--state", str(tmp_path / "one"), *to, "--token", "-"]
    device_id = subprocess.run(enrol, input=token, capture_output=True, text=True, check=True).stdout.strip()
    assert len(device_id) == 32

    run = [*command, "run", "--state", str(tmp_path / "two"), *to, "--token", token, "--always", "--json"]
    running = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None and json.loads(running.stdout.readline())["event"] == "Enrolled"
    running.send_signal(signal.SIGTERM)  # in the check-in that the coordinator holds
    running.communicate(timeout=30)
    assert running.returncode == 0

    status = [*command, "status", "--state", str(tmp_path / "two")]
    told = json.loads(subprocess.run(status, capture_output=True, text=True, check=True).stdout)
    assert told["enrolled"] and told["device_id"] != device_id


def start(state: Path, address: str, token: str, population: str, how: str = "--once") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "evensong.client.command", "device", "run", how, "--json", "--always"]
    options = ["--state", str(state), "--coordinator", address, "--token", token, "--population", population]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)


def kill_at(process: subprocess.Popen[str], moment: str, **fields: object) -> list[dict[str, object]]:
    """SIGKILL as soon as the event is told; whatever comes next is cut anywhere. All events until then."""
    assert process.stdout is not None
    events = []
    with process.stdout:
        for line in process.stdout:
            events.append(json.loads(line))
            if {"event": moment, **fields}.items() <= events[-1].items():
                process.kill()
                break
        else:
            raise AssertionError(f"the device never came to {moment}")
    process.wait(timeout=30)
    return events
