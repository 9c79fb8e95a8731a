"""Builds the engine into the package folder of a source tree: ``python mobile_runtime/engine/build.py``.

``pip install`` builds it with CMake. This needs nothing but a C++ compiler (``CXX``, or the first of g++ and clang++),
and rebuilds only what changed. Both read ``build.txt``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ENGINE = Path(__file__).parent
LIBRARY = ENGINE.parent / "evensong" / "mobile_runtime" / "libevensong.so"
OBJECTS = ENGINE.parents[1] / "build" / "engine"


def main() -> None:
    """Command line: where to put the library, and flags to add (a sanitizer, say)."""
    parser = argparse.ArgumentParser(description="Build the evensong engine from the source tree.")
    parser.add_argument("--output", type=Path, default=LIBRARY, help="the library to write (default: into the package)")
    parser.add_argument("flags", nargs="*", help="further compiler flags, after --")
    arguments = parser.parse_args()
    try:
        library = build_engine(arguments.output, extra_flags=arguments.flags)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"the engine was not built: {error}")
    print(f"{library}: {library.stat().st_size / 1024:.0f} KB")


def build_engine(output: Path = LIBRARY, *, extra_flags: Sequence[str] = ()) -> Path:
    """Compiles and links the engine; returns the library's path.

    Raises :class:`FileNotFoundError` without a compiler, :class:`subprocess.CalledProcessError` where compiling fails.
    """
    compiler = _compiler()
    flags, instruction_sets = read_build_file()
    host = [*flags["common"], *flags["host"], f"-DEVENSONG_BASELINE={instruction_sets[-1]}"]
    units = [(source, "host", host) for source in ENGINE.glob("src/*.cpp") if not source.stem.startswith("kernels")]
    for isa in instruction_sets:
        for source in ENGINE.glob("src/kernels*.cpp"):
            if "-DEVENSONG_DENSE_ONLY" in flags[isa] and source.stem not in flags["dense"]:
                continue
            optimise = flags.get(source.stem, flags["kernels"])
            units.append((source, isa, [*flags["common"], *optimise, *flags[isa], f"-DEVENSONG_ISA={isa}"]))
    # Builds with other flags keep their objects apart: two of them may run at once.
    folder = OBJECTS / hashlib.sha256(" ".join([compiler, *extra_flags]).encode()).hexdigest()[:8]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(lambda unit: _compile(compiler, unit[0], unit[1], [*unit[2], *extra_flags], folder), units)
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    # A process may have the old library mapped: write beside it, then replace it in one step.
    fresh = output.with_suffix(f".{os.getpid()}.tmp")
    _run([compiler, *flags["link"], *extra_flags, "-o", str(fresh), *map(str, objects), "-lm"])
    fresh.replace(output)
    return output


def read_build_file() -> tuple[dict[str, list[str]], list[str]]:
    """Flags by name from ``build.txt``, and the instruction sets of this processor, best first."""
    processor = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
    prefix = processor.get(platform.machine(), "other") + "/"
    flags: dict[str, list[str]] = {}
    instruction_sets: list[str] = []
    for line in (ENGINE / "build.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, _, words = line.partition(":")
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            instruction_sets.append(name)
        flags[name] = words.split()
    return flags, instruction_sets


def _compile(compiler: str, source: Path, isa: str, flags: list[str], folder: Path) -> Path:
    """The object file of one source for one instruction set; kept until a source, a header or a flag changes."""
    command = [compiler, *flags, f"-I{ENGINE / 'include'}", f"-I{ENGINE / 'src'}", "-c", str(source)]
    digest = hashlib.sha256(" ".join(command).encode() + source.read_bytes())
    for header in sorted([*ENGINE.glob("src/*.h*"), *ENGINE.glob("include/*.h")]):
        digest.update(header.read_bytes())
    target = folder / f"{isa}_{source.stem}_{digest.hexdigest()[:16]}.o"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{isa}_{source.stem}_????????????????.o"):
            stale.unlink(missing_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        _run([*command, "-o", str(fresh)])
        fresh.replace(target)
    return target


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise FileNotFoundError("no C++ compiler was found; install g++ or clang++, or set CXX")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
