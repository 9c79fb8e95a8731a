"""The golden files against the twin and the engine, on every target: see README.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import golden
import numpy as np
import pytest
from engines import needs_native
from one_op import instruction_sets
from toolchains import CROSS, compile_c, cross_library, engine_build, execute, tool, wasm_modules

from evensong.mobile_runtime import native
from evensong.mobile_runtime.errors import RuntimeFault
from evensong.mobile_runtime.twin import TwinMachine
from evensong.wire.artifact import decode_artifact
from evensong.wire.errors import EvensongError
from evensong.wire.program import OPS, Region

FOLDER = Path(__file__).parent
FILES = sorted(golden.FOLDER.glob("*.golden"))
LIMIT_BYTES = 1_000_000  # of all golden files


def test_every_operation_has_golden_cases() -> None:
    expected = {*OPS, "models", "refused"}
    assert {path.stem for path in FILES} == expected, "run python tests/conformance/golden.py"
    for name in OPS:
        cases = golden.decode((golden.FOLDER / f"{name}.golden").read_bytes())
        programs = [program for case in cases for program in decode_artifact(case.artifact).programs]
        assert any(op.name == name for program in programs for op in program.ops), name


def test_they_are_small_and_read_back_as_they_were_written() -> None:
    assert sum(path.stat().st_size for path in FILES) < LIMIT_BYTES
    for path in FILES:
        assert golden.encode(golden.decode(path.read_bytes())) == path.read_bytes(), path.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_twin_gives_these_results(path: Path) -> None:
    for case in golden.decode(path.read_bytes()):
        if case.status != golden.OK:
            with pytest.raises(EvensongError):
                TwinMachine(decode_artifact(case.artifact))
            continue
        artifact = decode_artifact(case.artifact)
        machine = TwinMachine(artifact)
        for run in case.runs:
            if run.status in (golden.OK, golden.EXAMPLE, golden.DIVERGED):  # others are the C face's to find
                _run_on_twin(machine, artifact.programs[run.program], run, case.name)
        regions = {Region.STATE: machine.state, Region.SLOTS: machine.slots}
        for region, offset, result in case.memory:
            actual = regions[region][offset : offset + result.value.nbytes].view(result.value.dtype)
            _assert_close(actual, result, case.name)


def _run_on_twin(machine: TwinMachine, program: golden.Program, run: golden.Run, name: str) -> None:
    shapes = [golden._empty(program, port.tensor, run.batch) for port in program.inputs]
    inputs = [value.reshape(shape.shape) for value, shape in zip(run.inputs, shapes, strict=True)]
    outputs = [golden._empty(program, port.tensor, run.batch) for port in program.outputs]
    options = {"learning_rate": run.learning_rate, "step": run.step, "seed": run.seed}
    if run.status != golden.OK:
        with pytest.raises(RuntimeFault):
            machine.run(run.program, run.batch, inputs, outputs, **options)
        return
    machine.run(run.program, run.batch, inputs, outputs, **options)
    for output, result in zip(outputs, run.outputs, strict=True):
        _assert_close(output.ravel(), result, name)


def _assert_close(actual: golden.Array, result: golden.Result, name: str) -> None:
    finite = np.abs(result.value[np.isfinite(result.value)]) if result.tolerance else np.zeros(0)
    atol = result.tolerance * max(1.0, float(finite.max(initial=0.0)))
    np.testing.assert_allclose(actual, result.value, rtol=0, atol=atol, err_msg=name)


# ------------------------------------------------------------------------------------------------- the engine


@needs_native
def test_this_machine_conforms_on_every_instruction_set(tmp_path: Path) -> None:
    library = native.library_path()
    program = compile_c(
        "cc", FOLDER / "conformance.c", [str(library), f"-Wl,-rpath,{library.parent}"], tmp_path / "run"
    )
    for name in instruction_sets():
        assert execute([program, "--instruction-set", name, *FILES]).startswith(f"{name}: ")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", CROSS)
def test_arm_conforms_under_qemu(target: str, tmp_path: Path) -> None:
    compiler, machines = CROSS[target]
    library = cross_library(target, tmp_path)
    program = compile_c(compiler, FOLDER / "conformance.c", ["-static", str(library)], tmp_path / "run")
    found = {cpu: execute([tool(command[0]), *command[1:], program, *FILES]) for cpu, command in machines.items()}
    best = {"aarch64": "dotprod", "armv7": "neon"}[target]
    assert found.pop("max").startswith(f"{best}: ")
    assert all(text.startswith("neon: ") for text in found.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_webassembly_conforms_in_node(tmp_path: Path) -> None:
    node = tool("node")
    for name, module in wasm_modules(tmp_path).items():
        flags = ["--experimental-wasm-relaxed-simd"] if name == "relaxed" and _node_hides_relaxed_simd(node) else []
        execute([node, *flags, FOLDER / "conformance.mjs", module, *FILES])


def _node_hides_relaxed_simd(node: str) -> bool:
    return int(execute([node, "--version"]).lstrip("v").partition(".")[0]) < 21


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(engine_build.HOST != "x86_64" or "avx512" not in instruction_sets(), reason="needs AVX-512 VNNI")
def test_products_of_256_bits_conform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source for AVX-VNNI, which few CPUs have, with the instruction's AVX-512 encoding in the place of AVX2."""
    original = engine_build.compile_units
    wide = ("-mavx512f", "-mavx512vl", "-mavx512vnni", "-DEVENSONG_LANES=8")

    def compile_units(target: str = engine_build.HOST, only: str | None = None) -> list[engine_build.Unit]:
        return [
            replace(unit, flags=(*unit.flags, *wide))
            if (unit.instruction_set, unit.source.stem) == ("avx2", "kernels_int8")
            else unit
            for unit in original(target, only)
        ]

    monkeypatch.setattr(engine_build, "compile_units", compile_units)
    library = engine_build.build_engine(tmp_path / "libevensong.a", static=True)
    program = compile_c("cc", FOLDER / "conformance.c", [str(library)], tmp_path / "run")
    execute([program, "--instruction-set", "avx2", *FILES])
