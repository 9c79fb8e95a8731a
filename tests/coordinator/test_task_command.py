"""The commands ``evensong task`` and ``evensong devices`` against a real coordinator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from served_coordinator import ServedCoordinator, trainable_artifact

from evensong.coordinator import devices_command, task_command
from evensong.coordinator.handle import Coordinator
from evensong.coordinator.task import Task
from evensong.wire import decode_tensors

DEVICES = 2


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedCoordinator]:
    coordinator = ServedCoordinator(tmp_path / "data")
    monkeypatch.setenv("EVENSONG_OPERATOR_TOKEN", coordinator.token)
    monkeypatch.setenv("EVENSONG_ADDRESS", coordinator.address)
    monkeypatch.setenv("COLUMNS", "250")
    yield coordinator
    coordinator.stop()


def task(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> str:
    """Standard output of ``evensong task ...``, or standard error where it fails."""
    assert task_command.main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_a_task_from_the_command_line(
    served: ServedCoordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert devices_command.main(["token", "--uses", str(DEVICES)]) == 0
    served.enrol(capsys.readouterr().out.strip(), DEVICES)
    artifact = tmp_path / "toy.evsg"
    artifact.write_bytes(trainable_artifact())
    task_id = task(
        capsys,
        "submit",
        artifact,
        "--rounds",
        "2",
        "--goal",
        str(DEVICES),
        "--no-secure",
        "--strategy",
        "fedadam",
        "--argument",
        "eta=0.05",
    ).strip()
    while (state := served_state(served, task_id)) == "running":
        served.contribute()
    assert state == "complete"

    assert "complete" in task(capsys, "list")
    shown = task(capsys, "show", task_id[:8])
    assert "fedadam(eta=0.05)" in shown and "11 in 3 tensors" in shown
    watched = task(capsys, "watch", task_id)
    assert watched.count("version committed") == 2 and "loss 0.5000 accuracy 0.7000" in watched
    assert "serving" in task(capsys, "versions", task_id)

    downloaded = tmp_path / "model.npz"
    task(capsys, "download", task_id, downloaded)
    raw = tmp_path / "model.evtn"
    task(capsys, "download", task_id, raw, "--version", "2")
    expected = decode_tensors(raw.read_bytes(), Task("toy", artifact).layout)
    with np.load(downloaded) as arrays:
        assert all((arrays[name] == values).all() for name, values in expected.items())

    assert "version 1 is served" in task(capsys, "rollback", task_id)
    assert "version 2 is served" in task(capsys, "promote", task_id, "2")


def served_state(served: ServedCoordinator, task_id: str) -> str:
    with Coordinator.connect(served.address, served.token) as coordinator:
        return coordinator.task(task_id).state


def test_a_task_from_a_python_file(
    served: ServedCoordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy.evsg").write_bytes(trainable_artifact())
    source = tmp_path / "toy.py"
    source.write_text(
        "from pathlib import Path\n"
        "from evensong.coordinator.task import Task\n"
        "task = Task('from-a-file', Path(__file__).with_name('toy.evsg'), population='boats')\n"
    )
    task_id = task(capsys, "submit", source).strip()
    assert "from-a-file" in task(capsys, "show", task_id) and "boats" in task(capsys, "list")
    assert "stopped" in task(capsys, "stop", task_id)
    assert task_command.main(["watch", task_id]) == 1  # it did not complete


def test_devices_are_listed_and_revoked(served: ServedCoordinator, capsys: pytest.CaptureFixture[str]) -> None:
    assert devices_command.main(["token", "--population", "boats"]) == 0
    captured = capsys.readouterr()
    served.enrol(captured.out.strip(), 1, "boats")
    assert "boats" in captured.err
    device_id = served.devices[0].device_id
    assert devices_command.main(["revoke", device_id]) == 0
    assert devices_command.main(["list"]) == 0
    out = capsys.readouterr().out
    assert device_id in out and "revoked" in out.splitlines()[-2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "0000"], 1, "no tasks have an id"),
        (["submit", "missing.py"], 1, "there is no such file"),
        (["submit", "missing.evsg"], 1, "cannot be read"),
        (["promote", "x"], 2, "Missing argument"),
        (["fly"], 2, "No such command"),
    ],
)
def test_failures_are_one_line(
    served: ServedCoordinator, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert message in task(capsys, *arguments, code=code)


def test_a_python_file_without_a_task_is_told(
    served: ServedCoordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "empty.py"
    source.write_text("task = 3\n")
    assert "does not define a task" in task(capsys, "submit", source, code=1)
    artifact = tmp_path / "toy.evsg"
    artifact.write_bytes(trainable_artifact())
    assert "NAME=NUMBER" in task(capsys, "submit", artifact, "--argument", "eta=much", code=1)


def test_help_needs_no_coordinator(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evensong", "--help"])
    assert task_command.main(["--help"]) == 0
    assert "rollback" in capsys.readouterr().out
