"""``evensong simulate``: what it prints and leaves, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evensong.mobile_runtime import load
from evensong.simulations.command import main
from evensong.simulations.data import load_dataset

SHORT = ["--clients", "4", "--rounds", "2", "--goal", "3", "--strategy", "fedavgm", "--bits", "4", "--lost", "0.05"]


@pytest.mark.parametrize("secure", ["--secure", "--no-secure"])
def test_the_same_seed_prints_the_same_parameters(
    secure: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for folder in ("first", "second"):
        assert main([*SHORT, secure, "--seed", "4", "--output", str(tmp_path / folder)]) == 0
        printed.append(re.search(r"parameters ([0-9a-f]{64})", capfd.readouterr().out))
    assert printed[0] and printed[1] and printed[0][1] == printed[1][1]
    first, second = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("first", "second"))
    assert first["notes"]["parameters"] == printed[0][1]
    for each in (first, second):
        del each["seconds"]
    assert first == second
    assert (first["devices"], first["rounds"]) == (4, 2)
    trained = load((tmp_path / "first" / "trained.evsg").read_bytes())
    digits = load_dataset("digits")
    assert trained.evaluate(digits.inputs, digits.labels).accuracy > 0.2
    assert (tmp_path / "first" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--partition", "shards"], 2, "dirichlet:ALPHA"),
        (["--data", "mnist"], 2, "digits or har or fashion"),
        (["--clients", "2", "--goal", "3"], 1, "never reach its goal"),
        (["--clients", "3", "--strategy", "krum"], 1, "krum"),
        (["--clients", "3", "--goal", "2"], 1, "three devices"),
        (["--bits", "0"], 2, "--bits"),
    ],
)
def test_wrong_use_is_explained(
    arguments: list[str], status: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    assert message in capfd.readouterr().err
