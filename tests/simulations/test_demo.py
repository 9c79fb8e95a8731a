"""``evensong demo`` with real processes: short here, whole among the slow tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evensong.mobile_runtime import load
from evensong.simulations.data import load_dataset
from evensong.simulations.demo import build
from evensong.simulations.demo.command import main
from evensong.simulations.demo.scenarios import DIGITS, SCENARIOS
from evensong.wire.artifact import decode_artifact

COMMAND = [sys.executable, "-m", "evensong.simulations.demo.command"]


def test_a_short_demo_leaves_report_model_and_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--devices", "2", "--rounds", "2", "--output", str(tmp_path)]) == 0
    shown = capfd.readouterr().out
    for word in ("before", "federated", "personalised", "worst device", "bytes up", "peak arena"):
        assert word in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["rounds"], results["devices"]) == (2, 2)
    assert results["accuracy"]["before"] < 0.3 < results["accuracy"]["federated"]
    assert results["accuracy"]["personalised_worst"] <= results["accuracy"]["personalised_mean"]
    assert 0 < results["bytes"]["up_per_device_round"] < results["bytes"]["float32_per_device_round"]
    assert results["bytes"]["down_per_device_round"] > results["bytes"]["float32_per_device_round"]
    assert results["seconds"] > 0 and results["arena_bytes"] > 0
    assert [each["reports"] for each in results["per_round"]] == [2, 2]
    assert results["per_round"][-1]["accuracy"] is not None

    # The trained artifact is the original with other weights, and as good as the demo says.
    assert (tmp_path / "initial.evsg").read_bytes() == DIGITS.artifact()
    trained = (tmp_path / "trained.evsg").read_bytes()
    assert decode_artifact(trained).programs == decode_artifact(DIGITS.artifact()).programs
    digits = load_dataset("digits")
    everywhere = load(trained).evaluate(digits.inputs, digits.labels).accuracy
    assert everywhere == pytest.approx(results["global_test"]["federated"], abs=0.1)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{results['accuracy']['federated']:.1%}" in page


def test_a_device_that_dies_ends_the_demo_with_its_name(tmp_path: Path) -> None:
    demo = _start(tmp_path, tmp_path / "out", rounds=500)
    try:
        victim = _wait_for_child(demo.pid, "device-2")
        os.kill(victim, signal.SIGKILL)
        output, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert demo.returncode == 1
    assert re.search(r"device 2 ended early; got signal SIGKILL", output), output
    _assert_nothing_runs(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_demo_stops_every_process(tmp_path: Path, number: signal.Signals) -> None:
    demo = _start(tmp_path, tmp_path / "out", rounds=500)
    try:
        _wait_for_child(demo.pid, "device-2")
        for _ in range(3):  # impatience changes nothing
            demo.send_signal(number)
            time.sleep(0.1)
        output, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert demo.returncode == 130, output
    _assert_nothing_runs(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist"], "digits or har or fashion"),
        (["--data", "har"], "EVENSONG_DATA"),
        (["--devices", "0"], "devices"),
        (["--devices", "64", "--rounds", "1", "--data", "digits", "--what"], "--what"),
    ],
)
def test_wrong_use_is_explained(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVENSONG_DATA", raising=False)
    assert main(arguments) == 2
    assert message in capfd.readouterr().err


def test_the_shipped_artifacts_fit_their_data() -> None:
    for scenario in SCENARIOS.values():
        artifact = decode_artifact(scenario.artifact())
        assert artifact.manifest["labels"] == list(scenario.classes)
        assert artifact.manifest["batch_size"] == scenario.batch_size
        inputs = artifact.manifest["inputs"]
        assert isinstance(inputs, list) and tuple(inputs[0]["shape"]) == scenario.input_shape


@pytest.mark.torch
def test_the_shipped_artifacts_are_what_their_source_gives(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="needs torch")
    assert build.main(["--check"]) == 0, capfd.readouterr().err


@pytest.mark.torch
def test_a_stale_artifact_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="needs torch")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "SCENARIOS", {"digits": DIGITS})
    assert build.main(["--check"]) == 1
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    (tmp_path / "digits.evsg").write_bytes(DIGITS.artifact() + b"\0")
    assert build.main(["--check"]) == 1


@pytest.mark.slow
def test_the_whole_demo_reaches_its_targets(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    accuracy = results["accuracy"]
    assert accuracy["federated"] >= 0.93 and results["global_test"]["federated"] >= 0.93
    assert accuracy["personalised_mean"] > accuracy["federated"]
    assert "no single device's update" in results["coordinator_saw"]
    for way in ("up", "down"):  # two secure sums with all their messages
        assert results["bytes"][f"{way}_per_device_round"] < 0.7 * results["bytes"]["float32_per_device_round"]


@pytest.mark.slow
@pytest.mark.torch
def test_the_demo_compiles_on_the_spot(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch")
    assert main(["--compile", "--devices", "2", "--rounds", "1", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "initial.evsg").read_bytes() == DIGITS.artifact()


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(900)
@pytest.mark.skipif(not os.environ.get("EVENSONG_DATA"), reason="EVENSONG_DATA names no folder")
def test_human_activity_reaches_its_targets(tmp_path: Path) -> None:
    assert main(["--data", "har", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"]["federated"] >= 0.90
    assert results["accuracy"]["personalised_mean"] >= 0.93
    assert len(results["newcomers"]["per_device"]) == 9
    newcomers = results["newcomers"]["accuracy"]
    assert newcomers["personalised_mean"] > newcomers["federated"]


def _start(folder: Path, output: Path, rounds: int) -> subprocess.Popen[str]:
    """The demo as a person starts it, with its temporary files below ``folder``."""
    (folder / "tmp").mkdir()
    return subprocess.Popen(
        [*COMMAND, "--devices", "2", "--rounds", str(rounds), "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
    )


def _wait_for_child(parent: int, wanted: str) -> int:
    """The process id of the child whose command line holds ``wanted``, once it imports and runs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = Path(f"/proc/{parent}/task/{parent}/children")
        for pid in children.read_text().split() if children.exists() else []:
            command = Path(f"/proc/{pid}/cmdline")
            if command.exists() and wanted in command.read_text():
                return int(pid)
        time.sleep(0.05)
    raise AssertionError(f"no child with {wanted} in its command line")


def _assert_nothing_runs(folder: Path) -> None:
    """No process has ``folder`` on its command line, and its temporary files are gone."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(folder) not in command.read_text(), command
        except (FileNotFoundError, ProcessLookupError):
            continue
    assert list((folder / "tmp").iterdir()) == []
