"""The engine's own tests once more, on a build with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evensong.mobile_runtime.native import LIBRARY_VARIABLE

BUILD = runpy.run_path(str(Path(__file__).parents[2] / "mobile_runtime" / "engine" / "build.py"))
TESTS = [
    "test_native_library.py",
    "test_native_products.py",
    "test_engines_agree.py",
    "test_engines_refuse_alike.py",
    "test_host_session.py",
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_memory_error_and_no_undefined_behaviour(tmp_path: Path) -> None:
    library = BUILD["build_engine"](
        tmp_path / "libevensong.so",
        extra_flags=[
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=undefined",
            "-fno-omit-frame-pointer",
            "-g1",
        ],
    )
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not needs_only_the_c_library",
         *(str(folder / name) for name in TESTS)],
        env={
            **os.environ,
            LIBRARY_VARIABLE: str(library),
            "LD_PRELOAD": runtime.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
