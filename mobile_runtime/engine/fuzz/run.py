"""Fuzzes the engine's loader and kernels: ``python mobile_runtime/engine/fuzz/run.py --seconds 300``.

Builds ``fuzz_artifact.cpp`` with libFuzzer and the address and undefined-behaviour sanitizers (needs clang++; Debian:
``apt install clang libclang-rt-14-dev``), writes a seed corpus with programs for every operation, and fuzzes for the
given time. For a night:

    python mobile_runtime/engine/fuzz/run.py --seconds 28800 --corpus ~/evensong-corpus --jobs 4

A finding is written to ``--artifacts`` (a file named crash-, timeout-, oom- or slow-unit-...); give that file to run it
again. Findings that were fixed stay in ``fuzz/regressions/`` and belong to every corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FUZZ = Path(__file__).parent
ENGINE = FUZZ.parent
REPOSITORY = ENGINE.parents[1]
sys.path[:0] = [str(ENGINE), str(REPOSITORY / "tests" / "mobile_runtime")]

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]
SEEDS_PER_OPERATION = 6
LONGEST_INPUT = 1 << 14  #: bytes; longer artifacts only have more of the same


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=300, help="how long to fuzz (default: 300)")
    parser.add_argument("--corpus", type=Path, help="a folder that keeps interesting inputs from run to run")
    parser.add_argument("--artifacts", type=Path, default=Path("fuzz-findings"), help="where findings go")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that share the corpus")
    parser.add_argument("inputs", nargs="*", type=Path, help="run these files once instead of fuzzing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            binary = build_fuzzer(Path(folder) / "fuzz_artifact")
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            sys.exit(f"the fuzz target was not built: {error}")
        if arguments.inputs:
            sys.exit(subprocess.run([binary, *arguments.inputs], check=False).returncode)
        corpus = arguments.corpus or Path(folder) / "corpus"
        sys.exit(fuzz(binary, corpus, arguments.artifacts, seconds=arguments.seconds, jobs=arguments.jobs))


def fuzz(binary: Path, corpus: Path, artifacts: Path, *, seconds: int, jobs: int) -> int:
    """Fuzzes in ``jobs`` processes; returns 0 if none of them found anything."""
    corpus.mkdir(parents=True, exist_ok=True)
    artifacts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds"
        print(f"{write_seeds(seeds)} seeds, {seconds} seconds, {jobs} processes", flush=True)
        command = [
            str(binary), str(corpus), str(seeds),
            f"-max_total_time={seconds}", f"-artifact_prefix={artifacts}/", f"-max_len={LONGEST_INPUT}",
            "-timeout=20", "-rss_limit_mb=2048", "-use_value_profile=1", "-reload=10", "-print_final_stats=1",
        ]  # fmt: skip
        logs = [Path(folder) / f"{job}.log" for job in range(jobs)]
        running = []
        for log in logs:
            with log.open("wb") as output:
                running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
        codes = [process.wait() for process in running]
        for log, code in zip(logs, codes, strict=True):
            lines = log.read_text(errors="replace").splitlines()
            interesting = [line for line in lines if line.startswith("stat::") or "cov:" in line]
            print("\n".join(lines[-80:] if code else interesting[-7:]), flush=True)
    return max(codes, key=abs)


def build_fuzzer(output: Path) -> Path:
    """Compiles engine and target with clang; returns the program's path.

    Raises :class:`FileNotFoundError` without clang++, :class:`subprocess.CalledProcessError` where compiling fails.
    """
    from build import ENGINE, Unit, compile_units, read_build_file

    compiler = shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("clang++ was not found; Debian: apt install clang libclang-rt-14-dev")
    covered = [*SANITIZE, "-fsanitize=fuzzer-no-link", "-O1", f"-I{ENGINE / 'include'}", f"-I{ENGINE / 'src'}"]
    fuzzer = Unit(FUZZ / "fuzz_artifact.cpp", "target", tuple(read_build_file()["common"]))

    def compile_unit(unit: Unit) -> Path:
        target = output.with_name(f"{unit.instruction_set}_{unit.source.stem}.o")
        command = [compiler, *unit.flags, *covered, "-w", "-c", str(unit.source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    output.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, [*compile_units(), fuzzer]))
    subprocess.run([compiler, *SANITIZE, "-fsanitize=fuzzer", "-o", str(output), *map(str, objects), "-lm"], check=True)
    return output


def write_seeds(folder: Path) -> int:
    """A few valid programs for every operation, the golden artifacts, and inputs that once found a fault."""
    from make_artifact_vectors import VECTORS
    from op_cases import CASES

    folder.mkdir(parents=True)
    for name in CASES:
        _write_programs(folder, name)
    for path in (*VECTORS.glob("*.evsg"), *(FUZZ / "regressions").glob("*")):
        shutil.copy(path, folder)
    return len(list(folder.iterdir()))


def _write_programs(folder: Path, name: str) -> None:
    """Programs around one operation, drawn as the tests draw them, the same ones each time."""
    from hypothesis import Phase, given, settings
    from hypothesis import strategies as st
    from op_cases import CASES, Case

    from evensong.wire.artifact import encode_artifact

    @settings(max_examples=SEEDS_PER_OPERATION, derandomize=True, database=None, phases=[Phase.generate])
    @given(data=st.data())
    def write(data: st.DataObject) -> None:
        case = Case(data.draw, name)
        CASES[name](case)
        content = encode_artifact(case.artifact())
        (folder / f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.evsg").write_bytes(content)

    write()


if __name__ == "__main__":
    main()
