"""The command line: verbs from entry points, one line for what went wrong, nothing imported that is not used."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from scripted import Coordinator, FakeClock, device_for
from tiny_artifact import tiny_examples

import evensong.client
from evensong.client import ExampleStore, command, device_command
from evensong.wire.errors import EvensongError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Installed entry points: a package ``choir`` whose modules explode when they are imported, and one that works."""
    package = tmp_path / "choir"
    package.mkdir()
    (package / "__init__.py").write_text('"""A package."""\nraise SystemExit("imported")\n')
    (package / "sing.py").write_text('"""Sing in harmony.\n\nMore."""\nraise SystemExit("imported")\n')
    (tmp_path / "solo.py").write_text('"""Sing alone."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        metadata.EntryPoint("sing", "choir.sing:main", command.GROUP),
        metadata.EntryPoint("solo", "solo:main", command.GROUP),
        metadata.EntryPoint("gone", "no_such_package.at_all:main", command.GROUP),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: points if group == command.GROUP else [])
    return tmp_path


def test_help_lists_every_verb_with_its_first_line_and_imports_none(verbs: Path, capsys) -> None:
    for arguments in (["--help"], ["-h"], ["help"]):
        assert command.main(arguments) == 0
        text = capsys.readouterr().out
        assert "Sing in harmony." in text and "Sing alone." in text and "Run this machine as a device" in text
        assert "gone" in text  # listed, if without a description
    assert "choir" not in sys.modules


def test_no_verb_is_wrong_use(verbs: Path, capsys) -> None:
    assert command.main([]) == 2 and "usage" in capsys.readouterr().out


def test_an_unknown_verb_suggests_near_ones(verbs: Path, capsys) -> None:
    assert command.main(["devise"]) == 2
    assert "Did you mean 'device'?" in capsys.readouterr().err
    assert command.main(["zzzzz"]) == 2
    assert "--help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("return 7", 7, ""),
        ("return None", 0, ""),
        (
            "raise EvensongError('it broke', expected='a', got='b', fix='Do c.')",
            1,
            "it broke; expected a; got b. Do c.",
        ),
        ("raise KeyboardInterrupt", 130, ""),
        ("import flwr_is_not_here", 1, "flwr_is_not_here"),
        ("raise ModuleNotFoundError('x', name='torch.nn')", 1, 'pip install "evensong[compile]"'),
        ("raise ModuleNotFoundError('x', name='flwr')", 1, 'pip install "evensong[coordinator]"'),
    ],
)
def test_what_a_verb_can_end_with(verbs: Path, capsys, body: str, code: int, text: str) -> None:
    (verbs / "solo.py").write_text(
        f"from evensong.wire.errors import EvensongError\ndef main(argv):\n    assert argv == ['--loud']\n    {body}\n"
    )
    sys.modules.pop("solo", None)
    assert command.main(["solo", "--loud"]) == code
    error = capsys.readouterr().err
    assert text in error and error.count("\n") <= 1


def test_a_bug_of_ours_is_not_hidden(verbs: Path) -> None:
    (verbs / "solo.py").write_text("def main(argv):\n    return 1 / 0\n")
    sys.modules.pop("solo", None)
    with pytest.raises(ZeroDivisionError):
        command.main(["solo"])


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(command._EXTRAS.values()) <= set(project["optional-dependencies"])
    assert evensong.client.__version__ == project["version"]
    assert project["scripts"]["evensong"] == "evensong.client.command:main"


def test_public_names_are_there_and_importing_them_needs_nothing_heavy() -> None:
    for name in evensong.client.__all__:
        assert getattr(evensong.client, name) is not None
    assert sorted(evensong.client._HOME_OF) == sorted(evensong.client.__all__)
    code = (
        "import sys, evensong.client; names = set(sys.modules);"
        "import evensong.client.command, evensong.mobile_runtime; from evensong.client import Device;"
        "print(sorted({'numpy', 'grpc', 'cryptography'} & names),"
        "sorted({'torch', 'flwr', 'sqlalchemy', 'typer', 'rich', 'grpc'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] []"


# ---------------------------------------------------------------------------------------------------- evensong device


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """The state directory of a device that holds a model."""
    state = tmp_path / "state"
    with device_for(Coordinator(FakeClock()), state) as device:
        device.step()
    return state


def run(capsys, *arguments: object) -> str:
    assert device_command.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_examples_come_from_npz_files(tmp_path: Path, capsys) -> None:
    x, y = tiny_examples(6, seed=1)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    np.savez(tmp_path / "two.npz", x0=x, x1=x, y=y)
    state = tmp_path / "state"
    assert json.loads(run(capsys, "examples", "add", "--state", state, tmp_path / "data.npz")) == {
        "train": 6,
        "test": 0,
    }
    run(capsys, "examples", "add", "--state", state, "--split", "test", tmp_path / "data.npz")
    assert json.loads(run(capsys, "examples", "count", "--state", state)) == {"train": 6, "test": 6}
    [batch] = ExampleStore(state / "examples.sqlite").batches(10)
    assert np.array_equal(batch.inputs[0], x) and np.array_equal(batch.target, y)
    with pytest.raises(EvensongError, match="wrong number of inputs"):
        run(capsys, "examples", "add", "--state", state, tmp_path / "two.npz")
    run(capsys, "examples", "clear", "--state", state)
    assert json.loads(run(capsys, "examples", "count", "--state", state)) == {"train": 0, "test": 0}


def test_files_that_are_not_examples(tmp_path: Path, capsys) -> None:
    np.savez(tmp_path / "no_y.npz", x=np.zeros(3))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npz").write_text("hello")
    for name in ("no_y.npz", "pickled.npy", "text.npz", "absent.npz"):
        with pytest.raises(EvensongError, match=name):
            run(capsys, "examples", "add", "--state", tmp_path / "state", tmp_path / name)


def test_a_device_predicts_personalises_and_evaluates_offline(served: Path, tmp_path: Path, capsys) -> None:
    x, y = tiny_examples(20, seed=5)
    np.save(tmp_path / "x.npy", x)
    before = json.loads(run(capsys, "evaluate", "--state", served))["accuracy"]
    training = json.loads(run(capsys, "personalize", "--state", served, "--epochs", 5, "--learning-rate", 0.5))
    assert training["steps"] == 25
    assert json.loads(run(capsys, "evaluate", "--state", served))["accuracy"] > max(before, 0.9)
    predicted = [int(line) for line in run(capsys, "predict", "--state", served, tmp_path / "x.npy").split()]
    assert np.mean(np.array(predicted) == y) > 0.8
    run(capsys, "predict", "--state", served, tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    assert np.load(tmp_path / "y.npy").argmax(1).tolist() == predicted
    status = json.loads(run(capsys, "status", "--state", served))
    assert status["enrolled"] and status["models"][0]["personalized"] and status["examples"]["train"] == 40


def test_reset_forgets_the_device_and_keeps_the_examples_unless_told(served: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    assert device_command.main(["reset", "--state", str(served)]) == 1 and (served / "identity.key").exists()
    run(capsys, "reset", "--state", served, "--yes")
    assert not (served / "identity.key").exists() and not (served / "cache").exists()
    assert json.loads(run(capsys, "examples", "count", "--state", served))["train"] == 40
    status = json.loads(run(capsys, "status", "--state", served))
    assert not status["enrolled"] and status["models"] == []
    run(capsys, "reset", "--state", served, "--yes", "--examples")
    assert json.loads(run(capsys, "examples", "count", "--state", served))["train"] == 0
    with pytest.raises(EvensongError, match="not a device's state"):
        run(capsys, "reset", "--state", served / "elsewhere", "--yes")


def test_wrong_use_is_argparse_and_unenrolled_is_one_line(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        device_command.main(["enrol"])
    assert exit_.value.code == 2
    capsys.readouterr()
    assert command.main(["device", "run", "--state", str(tmp_path), "--once", "--always"]) == 1
    error = capsys.readouterr().err
    assert "not enrolled" in error and error.count("\n") == 1
