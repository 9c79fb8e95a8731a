"""Builds the engine from the source tree: ``python mobile_runtime/engine/build.py [--target NAME] [--static]``.

Without options: the shared library of this machine, into the package folder. ``pip install`` does the same with CMake;
this needs nothing but a C++ compiler and rebuilds only what changed. Both read ``build.txt``. Other targets go to
``build/engine/TARGET/``; ``docs/targets.md`` tells how to link them. ``CXX`` names another compiler, with its options.
WebAssembly has two modules, ``evensong.wasm`` and ``evensong-relaxed.wasm``, and needs ``pip install ziglang``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ENGINE = Path(__file__).parent
FREESTANDING = ENGINE / "freestanding"
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
_ZIG = [sys.executable, "-m", "ziglang"]
HOST = _PROCESSORS.get(platform.machine(), "other")
WASM = "wasm32"
#: The WebAssembly modules, by instruction set.
MODULES = {"simd128": "evensong.wasm", "relaxed": "evensong-relaxed.wasm"}
TARGETS = (*_CROSS_COMPILERS, WASM, "other")  # "other" is any processor, in vectors of 128 bits; it needs CXX


def main() -> None:
    """Command line: what to build, where to put it, and flags to add (a sanitizer, say)."""
    parser = argparse.ArgumentParser(description="Build the evensong engine from the source tree.")
    parser.add_argument("--target", choices=TARGETS, default=HOST, help="processor (default: this one)")
    parser.add_argument("--static", action="store_true", help="build libevensong.a")
    parser.add_argument("--output", type=Path, help="the library to write")
    parser.add_argument("flags", nargs="*", help="further compiler flags, after --")
    arguments = parser.parse_args()
    try:
        if arguments.target == WASM:
            libraries = build_modules(arguments.output, extra_flags=arguments.flags)
        else:
            options = {"target": arguments.target, "static": arguments.static, "extra_flags": arguments.flags}
            libraries = [build_engine(arguments.output, **options)]
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"the engine was not built: {error}")
    for library in libraries:
        print(f"{library}: {library.stat().st_size / 1024:.0f} KB")


def build_engine(
    output: Path | None = None, *, target: str = HOST, static: bool = False, extra_flags: Sequence[str] = ()
) -> Path:
    """Compiles and links the engine; returns the library's path.

    Raises :class:`FileNotFoundError` without a compiler, :class:`subprocess.CalledProcessError` where compiling fails.
    """
    compiler = find_compiler(target)
    output = output or _default_output(target, static)
    objects = _compile_all(compiler, target, compile_units(target), extra_flags)
    with _replacing(output) as fresh:
        if static:
            _run([*_archiver(compiler), "rcs", str(fresh), *objects])
        else:
            flags = read_build_file()
            link = [*flags["link"], *flags.get(f"link/{target}", ())]
            _run([*compiler, *link, *extra_flags, "-o", str(fresh), *objects, "-lm"])
    return output


def build_modules(folder: Path | None = None, *, extra_flags: Sequence[str] = ()) -> list[Path]:
    """Compiles and links the WebAssembly modules; returns their paths, in the order of :data:`MODULES`.

    Raises as :func:`build_engine`.
    """
    compiler = find_compiler(WASM)
    outputs = []
    for isa, name in MODULES.items():
        output = (folder or OBJECTS / WASM) / name
        objects = _compile_all(compiler, f"{WASM}/{isa}", compile_units(WASM, isa), extra_flags)
        with _replacing(output) as fresh:
            _run([*_ZIG, "wasm-ld", *read_build_file()[f"link/{WASM}"], "-o", str(fresh), *objects])
        outputs.append(output)
    return outputs


@dataclass(frozen=True)
class Unit:
    """One source, compiled for one instruction set (or for all: "host")."""

    source: Path
    instruction_set: str
    flags: tuple[str, ...]


def compile_units(target: str = HOST, only: str | None = None) -> list[Unit]:
    """Everything that a library for ``target`` is made of; ``only`` leaves out all instruction sets but that one."""
    flags = read_build_file()
    sets = [only] if only else [name.removeprefix(f"{target}/") for name in flags if name.startswith(f"{target}/")]
    shared = [*flags["common"], *flags.get(f"target/{target}", ())]
    host = (*shared, *flags.get(f"host/{target}", flags["host"]), f"-DEVENSONG_BASELINE={sets[-1]}")
    sources = sorted(ENGINE.glob("src/*.cpp"))
    units = [Unit(source, "host", host) for source in sources if not source.stem.startswith("kernels")]
    if target == WASM:
        units.append(Unit(FREESTANDING / "libc.cpp", "host", host))
    for isa in sets:
        for source in sources:
            if source.stem.startswith("kernels") and source.stem in flags.get(f"only/{isa}", [source.stem]):
                names = (f"{source.stem}/{target}", source.stem, f"kernels/{target}", "kernels")
                optimise = next(flags[name] for name in names if name in flags)
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
    if target == WASM:
        if importlib.util.find_spec("ziglang") is None:
            raise FileNotFoundError("no compiler for WebAssembly was found: pip install ziglang")
        return [*_ZIG, "c++", "-target", "wasm32-freestanding"]
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    names = ("g++", "clang++", "c++") if target == HOST else _CROSS_COMPILERS.get(target, ())
    for name in names:
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError(f"no C++ compiler for {target} was found: install {' or '.join(names) or 'one'} or set CXX")


def _default_output(target: str, static: bool) -> Path:
    if target == HOST and not static:
        return LIBRARY
    return OBJECTS / target / ("libevensong.a" if static else "libevensong.so")


def _compile_all(compiler: Sequence[str], build: str, units: Sequence[Unit], extra_flags: Sequence[str]) -> list[str]:
    """The object files of ``units``. Builds with other flags keep theirs apart: two of them may run at once."""
    folder = OBJECTS / hashlib.sha256(" ".join([*compiler, build, *extra_flags]).encode()).hexdigest()[:8]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda unit: str(_compile(compiler, unit, extra_flags, folder)), units))


def _compile(compiler: Sequence[str], unit: Unit, extra_flags: Sequence[str], folder: Path) -> Path:
    """The object file of one unit; kept until a source, a header or a flag changes."""
    flags = [*unit.flags, *extra_flags]
    places = [ENGINE / "include", ENGINE / "src", *([FREESTANDING] if "-ffreestanding" in flags else [])]
    command = [*compiler, *flags, *(f"-I{place}" for place in places), "-c", str(unit.source)]
    digest = hashlib.sha256(" ".join(command).encode() + unit.source.read_bytes())
    for header in sorted(header for place in places for header in place.glob("*.h*")):
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


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A path to write to. A process may have the old library mapped: it is replaced in one step."""
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_suffix(f".{os.getpid()}.tmp")
    yield fresh
    fresh.replace(output)


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
