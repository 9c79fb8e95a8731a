"""Builds the engine from the source tree: ``python mobile_runtime/engine/build.py [--target NAME] [--static]``.

Without options: the shared library of this machine, into the package folder. ``pip install`` does the same with CMake;
this needs nothing but a C++ compiler and rebuilds only what changed. Both read ``build.txt``. Other targets go to
``build/engine/TARGET/``; ``docs/targets.md`` tells how to link them. ``CXX`` names another compiler, with its options.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ENGINE = Path(__file__).parent
LIBRARY = ENGINE.parent / "evensong" / "mobile_runtime" / "libevensong.so"
OBJECTS = ENGINE.parents[1] / "build" / "engine"

_PROCESSORS = {
    "x86_64": "x86_64",
    "AMD64": "x86_64",
    "aarch64": "aarch64",
    "arm64": "aarch64",
    "armv7l": "armv7",
}
#: Compilers to try for each target, besides ``CXX``; Debian has them in packages named g++-x86-64-linux-gnu and so on.
_CROSS_COMPILERS = {
    "x86_64": ("x86_64-linux-gnu-g++",),
    "aarch64": ("aarch64-linux-gnu-g++",),
    "armv7": ("arm-linux-gnueabihf-g++",),
}
HOST = _PROCESSORS.get(platform.machine(), "other")
TARGETS = tuple(dict.fromkeys([*_CROSS_COMPILERS, HOST]))


def main() -> None:
    """Command line: what to build, where to put it, and flags to add (a sanitizer, say)."""
    parser = argparse.ArgumentParser(description="Build the evensong engine from the source tree.")
    parser.add_argument("--target", choices=TARGETS, default=HOST, help="processor (default: this one)")
    parser.add_argument("--static", action="store_true", help="build libevensong.a")
    parser.add_argument("--output", type=Path, help="the library to write")
    parser.add_argument("flags", nargs="*", help="further compiler flags, after --")
    arguments = parser.parse_args()
    try:
        library = build_engine(
            arguments.output, target=arguments.target, static=arguments.static, extra_flags=arguments.flags
        )
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"the engine was not built: {error}")
    print(f"{library}: {library.stat().st_size / 1024:.0f} KB")


def build_engine(
    output: Path | None = None, *, target: str = HOST, static: bool = False, extra_flags: Sequence[str] = ()
) -> Path:
    """Compiles and links the engine; returns the library's path.

    Raises :class:`FileNotFoundError` without a compiler, :class:`subprocess.CalledProcessError` where compiling fails.
    """
    compiler = find_compiler(target)
    output = output or _default_output(target, static)
    # Builds with other flags keep their objects apart: two of them may run at once.
    folder = OBJECTS / hashlib.sha256(" ".join([*compiler, target, *extra_flags]).encode()).hexdigest()[:8]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda unit: _compile(compiler, unit, extra_flags, folder), compile_units(target)))
    output.parent.mkdir(parents=True, exist_ok=True)
    # A process may have the old library mapped: write beside it, then replace it in one step.
    fresh = output.with_suffix(f".{os.getpid()}.tmp")
    names = [str(path) for path in objects]
    if static:
        _run([*_archiver(compiler), "rcs", str(fresh), *names])
    else:
        flags = read_build_file()
        link = [*flags["link"], *flags.get(f"link/{target}", ())]
        _run([*compiler, *link, *extra_flags, "-o", str(fresh), *names, "-lm"])
    fresh.replace(output)
    return output


@dataclass(frozen=True)
class Unit:
    """One source, compiled for one instruction set (or for all: "host")."""

    source: Path
    instruction_set: str
    flags: tuple[str, ...]


def compile_units(target: str = HOST) -> list[Unit]:
    """Everything that the library of ``target`` is made of."""
    flags = read_build_file()
    sets = [name.removeprefix(f"{target}/") for name in flags if name.startswith(f"{target}/")]
    shared = [*flags["common"], *flags.get(f"target/{target}", ())]
    host = (*shared, *flags["host"], f"-DEVENSONG_BASELINE={sets[-1]}")
    sources = sorted(ENGINE.glob("src/*.cpp"))
    units = [Unit(source, "host", host) for source in sources if not source.stem.startswith("kernels")]
    for isa in sets:
        for source in sources:
            if source.stem.startswith("kernels") and source.stem in flags.get(f"only/{isa}", [source.stem]):
                optimise = flags.get(source.stem, flags["kernels"])
                special = (*shared, *optimise, *flags[f"{target}/{isa}"], f"-DEVENSONG_ISA={isa}")
                units.append(Unit(source, isa, special))
    return units


def read_build_file() -> Mapping[str, list[str]]:
    """Flags by name from ``build.txt``, in its order."""
    lines = (ENGINE / "build.txt").read_text().splitlines()
    named = (line.partition(":") for line in lines if not line.startswith("#"))
    return {name: words.split() for name, _, words in named}


def find_compiler(target: str) -> list[str]:
    """The command that compiles for ``target``; raises :class:`FileNotFoundError`."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    names = ("g++", "clang++", "c++") if target == HOST else _CROSS_COMPILERS[target]
    for name in names:
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError(f"no C++ compiler for {target} was found; install {names[0]}, or set CXX")


def _default_output(target: str, static: bool) -> Path:
    if target == HOST and not static:
        return LIBRARY
    return OBJECTS / target / ("libevensong.a" if static else "libevensong.so")


def _compile(compiler: Sequence[str], unit: Unit, extra_flags: Sequence[str], folder: Path) -> Path:
    """The object file of one unit; kept until a source, a header or a flag changes."""
    includes = [f"-I{ENGINE / 'include'}", f"-I{ENGINE / 'src'}"]
    command = [*compiler, *unit.flags, *extra_flags, *includes, "-c", str(unit.source)]
    digest = hashlib.sha256(" ".join(command).encode() + unit.source.read_bytes())
    for header in sorted([*ENGINE.glob("src/*.h*"), *ENGINE.glob("include/*.h")]):
        digest.update(header.read_bytes())
    name = f"{unit.instruction_set}_{unit.source.stem}"
    target = folder / f"{name}_{digest.hexdigest()[:16]}.o"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{name}_????????????????.o"):
            stale.unlink(missing_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        _run([*command, "-o", str(fresh)])
        fresh.replace(target)
    return target


def _archiver(compiler: Sequence[str]) -> list[str]:
    """``AR``, or the archiver that belongs to the compiler."""
    if command := shlex.split(os.environ.get("AR", "")):
        return command
    asked = subprocess.run([*compiler, "-print-prog-name=ar"], capture_output=True, text=True, check=True)
    return [asked.stdout.strip()]


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
