"""``mobile_runtime/examples/c`` builds with a C compiler and the library alone, learns, and stays within its memory."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from engines import needs_native
from toolchains import CROSS, REPOSITORY, compile_c, cross_library, engine_build, execute, tool

from evensong.mobile_runtime import memory_report, native
from evensong.wire.artifact import decode_artifact

EXAMPLE = REPOSITORY / "mobile_runtime" / "examples" / "c"
ARTIFACT = EXAMPLE / "spirals.evsg"

ANDROID_C_LIBRARY = {
    *("calloc", "free", "getauxval", "snprintf", "vsnprintf"),
    *("memcmp", "memcpy", "memmove", "memset", "strcmp"),
}
PAGE_BYTES = 16384  # of Android from version 15 on


def check(text: str) -> None:
    """It learned (it returned 0 for that) and says the same of its memory as the artifact does."""
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1
    report = memory_report(decode_artifact(ARTIFACT.read_bytes()))
    sentence = r"declares (\d+) .*describes it in (\d+); it holds (\d+) of the (\d+)"
    declared, description, held, given = map(int, re.findall(sentence, " ".join(text.split()))[0])
    assert declared == report.peak
    assert held == given <= declared + description + 6 * 64


@needs_native
@pytest.mark.parametrize("kind", ["shared", "static"])
def test_it_trains_here(kind: str, tmp_path: Path) -> None:
    if kind == "shared":
        library = native.library_path()
        linked = [str(library), f"-Wl,-rpath,{library.parent}"]
    else:
        linked = [str(engine_build.build_engine(tmp_path / "libevensong.a", static=True))]
    check(execute([compile_c("cc", EXAMPLE / "train.c", linked, tmp_path / "train"), ARTIFACT]))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", CROSS)
def test_it_trains_on_arm(target: str, tmp_path: Path) -> None:
    compiler, machines = CROSS[target]
    library = cross_library(target, tmp_path)
    program = compile_c(compiler, EXAMPLE / "train.c", ["-static", str(library)], tmp_path / "train")
    for command in machines.values():
        check(execute([tool(command[0]), *command[1:], program, ARTIFACT]))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", CROSS)
def test_a_shared_library_for_arm_links_and_runs(target: str, tmp_path: Path) -> None:
    compiler, machines = CROSS[target]
    library = cross_library(target, tmp_path, static=False)
    linked = [str(library), f"-Wl,-rpath,{library.parent}"]
    program = compile_c(compiler, EXAMPLE / "train.c", linked, tmp_path / "train")
    root = Path("/usr") / Path(tool(compiler)).name.removesuffix("-gcc")  # where Debian keeps the target's C library
    command = machines["max"]
    check(execute([tool(command[0]), *command[1:], "-L", root, program, ARTIFACT]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_library_for_android_needs_only_what_its_system_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built as the NDK's clang does, without the NDK's headers. Nobody links it here: what it asks for counts."""
    linker = tool("aarch64-linux-gnu-ld")
    monkeypatch.setenv("CXX", f"{tool('clang++')} --target=aarch64-linux-android21 -fuse-ld={linker}")
    library = engine_build.build_engine(
        tmp_path / "libevensong.so", target="aarch64", extra_flags=["-ffreestanding", "-nostdlib", "-w"]
    )
    symbols = execute([tool("aarch64-linux-gnu-nm"), "-D", library]).splitlines()
    assert {line.split()[-1] for line in symbols if line.split()[-2] == "U"} <= ANDROID_C_LIBRARY
    loads = [line.split() for line in execute(["readelf", "-lW", library]).splitlines() if "LOAD" in line]
    assert loads and all(int(load[-1], 16) >= PAGE_BYTES for load in loads)


def test_the_artifact_is_what_its_script_compiles() -> None:
    made = runpy.run_path(str(EXAMPLE / "make_artifact.py"))["spirals"]()
    assert made == ARTIFACT.read_bytes(), "run python mobile_runtime/examples/c/make_artifact.py"
