"""Hostile artifacts under libFuzzer and the sanitizers: see ``mobile_runtime/engine/fuzz/run.py``."""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path

import pytest

FUZZ = runpy.run_path(str(Path(__file__).parents[2] / "mobile_runtime" / "engine" / "fuzz" / "run.py"))
SECONDS = int(os.environ.get("EVENSONG_FUZZ_SECONDS", "300"))
IN_CI = os.environ.get("CI") == "true"  # there the compiler must be installed: .ci/run does it


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.skipif(not IN_CI and shutil.which("clang++") is None, reason="needs clang++ with libFuzzer")
def test_no_artifact_leaves_its_memory(tmp_path: Path) -> None:
    binary = FUZZ["build_fuzzer"](tmp_path / "build" / "fuzz_artifact")
    findings = tmp_path / "findings"
    code = FUZZ["fuzz"](binary, tmp_path / "corpus", findings, seconds=SECONDS, jobs=1)
    assert code == 0, f"{[path.name for path in findings.iterdir()]}; the log above says what was found"
    assert not list(findings.iterdir())
