"""The shared library: its C face, its loader under hostile bytes, its workspace, its generated header."""

from __future__ import annotations

import contextlib
import ctypes
import runpy
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
from engines import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from make_artifact_vectors import VECTORS
from one_op import Given, run_one
from op_cases import CASES, Case

from evensong.mobile_runtime import native
from evensong.mobile_runtime.errors import DivergedError, ProgramError, RuntimeFault
from evensong.mobile_runtime.native import NativeMachine
from evensong.wire.artifact import HEADER_BYTES, decode_artifact, encode_artifact
from evensong.wire.errors import ArtifactError, CorruptError, EvensongError
from evensong.wire.program import Artifact, DType, Op, Port, Program, Region, Tensor, Variable, VariableFlag
from evensong.wire.workspace import workspace_bytes

pytestmark = needs_native

Floats = npt.NDArray[np.float32]

_C_LIBRARY = {"calloc", "free", "memcmp", "memcpy", "memmove", "memset", "qsort", "snprintf", "strcmp", "vsnprintf"}

GOLDEN = sorted(VECTORS.glob("*.evsg"))


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> bytes:
    data: bytes = request.param.read_bytes()
    return data


# ------------------------------------------------------------------------------------------------------------- the face


def test_the_library_has_an_instruction_set_and_a_place() -> None:
    assert native.library_path().exists()
    assert native.instruction_set() in {"avx512", "avxvnni", "avx2", "sse2", "dotprod", "neon", "generic"}


def test_the_library_exports_only_its_c_face_and_needs_only_the_c_library() -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    lines = subprocess.run(
        ["nm", "-D", str(native.library_path())], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    defined = {line.split()[-1] for line in lines if line.split()[-2] in "TDBR"}
    needed = {line.split()[-1].partition("@")[0] for line in lines if line.split()[-2] == "U"}
    assert defined
    assert all(name.startswith("evensong_") for name in defined), defined
    assert not {name for name in needed if name.startswith(("_Z", "__cxa_throw", "__gxx"))}, needed
    assert needed <= _C_LIBRARY, needed - _C_LIBRARY


@pytest.mark.parametrize("perm", [(1,), (32,), (128,), (0, 0), (0, 33)])
def test_a_permutation_that_is_none_is_refused(perm: tuple[int, ...]) -> None:
    variable = Variable("w", DType.F32, (4, 2)[: len(perm)], perm, 0, VariableFlag.TRAINABLE)
    data = encode_artifact(replace(_copy(), variables=(variable,), state=bytes(32)))
    with pytest.raises(EvensongError, match="bad permutation"):
        NativeMachine(None, data)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(RuntimeFault, match="instruction set 'mmx'"):
        NativeMachine(None, encode_artifact(_copy()), instruction_set="mmx")


def test_wrong_buffers_are_refused_with_both_sizes() -> None:
    machine = NativeMachine(None, encode_artifact(_copy()))
    good, short = np.zeros(4, np.float32), np.zeros(3, np.float32)
    with pytest.raises(RuntimeFault, match=r"input 0 of 'p' for 2 examples must be 16 bytes.* got 12"):
        machine.run(0, 2, [short], [good])
    with pytest.raises(RuntimeFault, match="output 0 of 'p'"):
        machine.run(0, 2, [good], [short])
    with pytest.raises(RuntimeFault, match="1 input ports; got 2"):
        machine.run(0, 2, [good, good], [good])
    with pytest.raises(RuntimeFault, match="takes 1 to 4 examples; got 5"):
        machine.run(0, 5, [good], [good])
    with pytest.raises(RuntimeFault, match="no program 1"):
        machine.run(1, 1, [good], [good])
    unaligned = np.zeros(17, np.uint8)[1:].view(np.float32)
    with pytest.raises(RuntimeFault, match="aligned"):
        machine.run(0, 2, [unaligned], [good])


def test_every_batch_up_to_the_most_runs_on_its_own_rows_only() -> None:
    machine = NativeMachine(None, encode_artifact(_copy()))
    for batch in (4, 1, 3, 2, 4):
        x, y = np.arange(2 * batch, dtype=np.float32), np.zeros(2 * batch, np.float32)
        machine.run(0, batch, [x], [y])
        np.testing.assert_array_equal(x, y)


def test_a_closed_machine_says_so() -> None:
    machine = NativeMachine(None, encode_artifact(_copy()))
    machine.close()
    machine.close()
    with pytest.raises(RuntimeFault, match="closed"):
        machine.run(0, 1, [np.zeros(2, np.float32)], [np.zeros(2, np.float32)])


def test_constants_can_be_borrowed_from_aligned_bytes_only() -> None:
    artifact = _copy(const=np.arange(8, dtype=np.float32).tobytes())
    data = encode_artifact(artifact)
    library, message = ctypes.CDLL(str(native.library_path())), ctypes.create_string_buffer(200)
    store = np.zeros(len(data) + 128, np.uint8)
    start = -store.ctypes.data % 64
    for shift, expected in ((0, 0), (4, 4)):
        store[start + shift : start + shift + len(data)] = np.frombuffer(data, np.uint8)
        handle = ctypes.c_void_p()
        address = ctypes.c_void_p(store.ctypes.data + start + shift)
        size = ctypes.c_size_t(len(data))
        assert library.evensong_open(address, size, 1, ctypes.byref(handle), message, 200) == expected
        library.evensong_close(handle)


@pytest.mark.parametrize("x_value", [1.0, 1e25, np.inf, np.nan])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_that_is_never_stored_follows_the_same_rules(x_value: float, frozen: bool) -> None:
    rows, inputs, outputs = 20, 33, 17
    rng = np.random.default_rng(0)
    dy, x = rng.standard_normal((rows, outputs), np.float32), rng.standard_normal((rows, inputs), np.float32)
    w = rng.standard_normal((outputs, inputs), np.float32)
    x[3, 5], dy[3, :] = x_value, 1e15 if x_value > 1 else 1
    machine = NativeMachine(None, encode_artifact(_linear_update(dy, x, w)))
    machine.freeze([0] if frozen else [])
    with np.errstate(all="ignore"):
        expected = w - np.float32(0.1) * (dy.T @ x)
    if frozen:
        machine.run(0, rows, [dy, x], [], learning_rate=0.1)
        expected = w
    elif np.isfinite(expected).all():
        machine.run(0, rows, [dy, x], [], learning_rate=0.1)
    else:
        with pytest.raises(DivergedError):
            machine.run(0, rows, [dy, x], [], learning_rate=0.1)
        return
    np.testing.assert_allclose(machine.state.view(np.float32).reshape(w.shape), expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone() -> None:
    w, g = np.ones(5, np.float32), np.array([1, 2, np.inf, 3, 4], np.float32)
    with pytest.raises(DivergedError):
        run_one("SGD", [w, Given(g)], [], learning_rate=0.1)


# ----------------------------------------------------------------------------------------------------------- the loader


def test_golden_artifacts_open(golden: bytes) -> None:
    machine = NativeMachine(decode_artifact(golden), golden)
    assert machine.memory_bytes >= len(machine.state) + len(machine.slots)
    machine.close()


def test_each_kind_of_damage_has_its_error(golden: bytes) -> None:
    wrong_version = bytearray(golden)
    struct.pack_into("<H", wrong_version, 4, 9)
    cases: list[tuple[bytes, type[EvensongError], str]] = [
        (b"", CorruptError, "not an evensong artifact"),
        (b"PK" + golden[2:], CorruptError, "not an evensong artifact"),
        (golden[:-1], CorruptError, "length is wrong"),
        (golden + b"\0", CorruptError, "length is wrong"),
        (golden[:-1] + bytes([golden[-1] ^ 1]), CorruptError, "CRC32C"),
        (bytes(wrong_version), ArtifactError, "another runtime"),
    ]
    for data, error, text in cases:
        with pytest.raises(error, match=text):
            NativeMachine(None, data)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_bytes_behind_a_right_checksum_never_crash(data: st.DataObject) -> None:
    original = data.draw(st.sampled_from(GOLDEN)).read_bytes()
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(HEADER_BYTES, len(damaged) - 1))
        width = data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([2**31, 2**32 - 1, 2**63, 2**64 - 1, 64, 65])))
        patch = (value & (2 ** (8 * width) - 1)).to_bytes(width, "little")[: len(damaged) - at]
        damaged[at : at + len(patch)] = patch
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(HEADER_BYTES, len(damaged))) :]
    open_and_run(seal(damaged))


def seal(data: bytearray) -> bytes:
    """Makes length and checksum right again, so that what lies behind them is reached."""
    struct.pack_into("<QI", data, 8, len(data), google_crc32c.value(bytes(data[HEADER_BYTES:])))
    return bytes(data)


def open_and_run(data: bytes) -> None:
    """Opens what may be opened; whatever the engine accepts must also run without a crash."""
    try:
        artifact = decode_artifact(data)
        machine = NativeMachine(artifact, data)
    except EvensongError:
        return
    for index, program in enumerate(artifact.programs):
        sizes = [artifact.slot_bytes, program.arena_bytes, *(t.nbytes for t in program.tensors)]
        if max(sizes) > 1 << 24:
            continue
        for batch in {1, program.max_batch}:
            ports = [
                [np.zeros(_live_bytes(program, port, batch), np.uint8).view(program.tensors[port.tensor].dtype.numpy)
                 for port in side]
                for side in (program.inputs, program.outputs)
            ]  # fmt: skip
            with contextlib.suppress(EvensongError):
                machine.run(index, batch, ports[0], ports[1], learning_rate=0.1)
    machine.close()


def _live_bytes(program: Program, port: Port, batch: int) -> int:
    tensor = program.tensors[port.tensor]
    return tensor.nbytes // program.max_batch * batch if tensor.batched else tensor.nbytes


# ------------------------------------------------------------------------------------------------- workspace and header


@pytest.mark.parametrize("name", ["LINEAR", "LINEAR_GRAD_INPUT", "LINEAR_GRAD_WEIGHT", "CONV2D", "CONV2D_GRAD_INPUT",
                                  "CONV2D_GRAD_WEIGHT", "QLINEAR", "QCONV2D"])  # fmt: skip
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_sides_compute_the_same_workspace(name: str, data: st.DataObject) -> None:
    case = Case(data.draw, name)
    CASES[name](case)
    artifact = case.artifact()
    need = artifact.programs[0].workspace_bytes
    NativeMachine(None, encode_artifact(artifact)).close()
    if need:
        with pytest.raises(ProgramError, match="workspace is too small"):
            NativeMachine(None, encode_artifact(_with_workspace(artifact, need - 1)))


def test_the_generated_header_is_current() -> None:
    folder = Path(__file__).parents[2] / "mobile_runtime" / "engine"
    generator = runpy.run_path(str(folder / "opcodes_header.py"))
    assert generator["HEADER"].read_text() == generator["opcodes_header"]()


def _with_workspace(artifact: Artifact, size: int) -> Artifact:
    return replace(artifact, programs=(replace(artifact.programs[0], workspace_bytes=size),))


def _linear_update(dy: Floats, x: Floats, w: Floats) -> Artifact:
    tensors = (
        Tensor(DType.F32, Region.INPUT, dy.shape, 0, batched=True),
        Tensor(DType.F32, Region.INPUT, x.shape, 1, batched=True),
        Tensor(DType.F32, Region.STATE, w.shape, 0),
    )
    ops = (Op("LINEAR_UPDATE", (2, 0, 1), (), (0.0,)),)
    ports = (Port("dy", 0), Port("x", 1))
    program = Program("p", len(dy), 0, workspace_bytes(ops, tensors), ports, (), tensors, ops)
    variable = Variable("w", DType.F32, w.shape, (0, 1), 0, VariableFlag.TRAINABLE)
    return Artifact({}, (variable,), (program,), b"", w.tobytes(), 0)


def _copy(const: bytes = b"") -> Artifact:
    """One program that copies [4, 2] float32."""
    tensors = (
        Tensor(DType.F32, Region.INPUT, (4, 2), 0, batched=True),
        Tensor(DType.F32, Region.OUTPUT, (4, 2), 0, batched=True),
    )
    program = Program("p", 4, 0, 0, (Port("x", 0),), (Port("y", 1),), tensors, (Op("COPY", (0,), (1,)),))
    return Artifact({}, (), (program,), const, b"", 0)
