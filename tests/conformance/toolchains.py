"""Tools that not every machine has. A test without its tool is skipped; in CI it fails, since .ci/run installs them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

REPOSITORY = Path(__file__).parents[2]
ENGINE = REPOSITORY / "mobile_runtime" / "engine"


def _load_build_script() -> ModuleType:
    """``engine/build.py`` as a module, under a name that no package has."""
    spec = importlib.util.spec_from_file_location("engine_build", ENGINE / "build.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["engine_build"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


engine_build = _load_build_script()

#: How a C program for a target is compiled, and under which commands it runs here.
CROSS = {
    "aarch64": (
        "aarch64-linux-gnu-gcc",
        {cpu: ["qemu-aarch64-static", "-cpu", cpu] for cpu in ("max", "cortex-a53")},
    ),
    "armv7": ("arm-linux-gnueabihf-gcc", {cpu: ["qemu-arm-static", "-cpu", cpu] for cpu in ("max", "cortex-a7")}),
}


def tool(name: str) -> str:
    """The path of a program."""
    return shutil.which(name) or _missing(f"{name} is not installed")


def wasm_modules(folder: Path) -> dict[str, Path]:
    """The engine's WebAssembly modules by instruction set, freshly built."""
    if importlib.util.find_spec("ziglang") is None:
        _missing("ziglang is not installed")
    simd128, relaxed = engine_build.build_modules(folder)
    return {"simd128": simd128, "relaxed": relaxed}


def cross_library(target: str, folder: Path, *, static: bool = True) -> Path:
    """The engine's library for one of :data:`CROSS`."""
    compiler, _ = CROSS[target]
    tool(compiler.replace("gcc", "g++"))
    return engine_build.build_engine(
        folder / ("libevensong.a" if static else "libevensong.so"), target=target, static=static
    )


def compile_c(compiler: str, source: Path, libraries: Sequence[str], output: Path) -> Path:
    """Compiles a C program that includes ``evensong.h``, with warnings as errors."""
    command = [tool(compiler), "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1"]
    subprocess.run([*command, f"-I{ENGINE / 'include'}", str(source), *libraries, "-lm", "-o", str(output)], check=True)
    return output


def execute(command: Sequence[str | Path]) -> str:
    """What the command prints; fails the test with all of it where it returns anything but 0."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _missing(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI must run this test")
    pytest.skip(reason)
