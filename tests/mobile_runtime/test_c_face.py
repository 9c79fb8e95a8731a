"""What a C program learns from the library without Python, and engines in memory of its own."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import make_artifact_vectors
import numpy as np
import pytest
from engines import needs_native
from program_builder import ProgramBuilder

from evensong.mobile_runtime import load, memory_report, native
from evensong.wire.artifact import align, encode_artifact
from evensong.wire.program import Artifact, VariableFlag

pytestmark = needs_native

_TEXT_BYTES = 200


class Memory(ctypes.Structure):
    names = ("constants", "state", "slots", "arena", "workspace", "statistics", "description")
    _fields_ = tuple((name, ctypes.c_size_t) for name in names)


class ProgramInfo(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        *((name, ctypes.c_uint32) for name in ("max_batch", "inputs", "outputs")),
        *((name, ctypes.c_size_t) for name in ("arena_bytes", "workspace_bytes")),
    )


class PortInfo(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("batched", ctypes.c_int32),
        ("rank", ctypes.c_uint32),
        ("dims", ctypes.c_uint32 * 6),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
    )


class VariableInfo(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("trainable", ctypes.c_int32),
        ("rank", ctypes.c_uint32),
        ("dims", ctypes.c_uint32 * 6),
        ("bytes", ctypes.c_size_t),
    )


class Engine:
    """An engine opened through the C face, in memory of the test's."""

    def __init__(self, data: bytes, *, spare: int = 0, shift: int = 0) -> None:
        self.c = ctypes.CDLL(str(native.library_path()))
        self.message = ctypes.create_string_buffer(_TEXT_BYTES)
        needed = ctypes.c_size_t()
        self.check(self.c.evensong_memory_needed(data, ctypes.c_size_t(len(data)), 0, ctypes.byref(needed), *self.text))
        self.needed = needed.value
        self.memory = np.full(self.needed + spare + 192, 0xA5, np.uint8)
        self.start = -self.memory.ctypes.data % 64 + 64 + shift
        self.handle = ctypes.c_void_p()
        address, size = ctypes.c_void_p(self.memory.ctypes.data + self.start), ctypes.c_size_t(self.needed + spare)
        self.check(
            self.c.evensong_open_in(
                address, size, None, data, ctypes.c_size_t(len(data)), 0, ctypes.byref(self.handle), *self.text
            )
        )

    @property
    def text(self) -> tuple[Any, ...]:
        return self.message, ctypes.c_size_t(_TEXT_BYTES)

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"{status}: {self.message.value.decode()}")

    def read(self, variable: int, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        value = np.zeros_like(like, order="C")
        self.check(
            self.c.evensong_read_variable(
                self.handle, variable, value.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(value.nbytes), *self.text
            )
        )
        return value

    def write(self, variable: int, value: np.ndarray[Any, Any]) -> None:
        value = np.ascontiguousarray(value)
        self.check(
            self.c.evensong_write_variable(
                self.handle, variable, value.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(value.nbytes), *self.text
            )
        )


@pytest.fixture(scope="module", params=sorted(make_artifact_vectors.vectors()))
def artifact(request: pytest.FixtureRequest) -> Artifact:
    _, made, _ = make_artifact_vectors.vectors()[request.param]
    return replace(made, manifest={"name": request.param})


@pytest.fixture
def engine(artifact: Artifact) -> Iterator[Engine]:
    opened = Engine(encode_artifact(artifact))
    yield opened
    opened.c.evensong_close(opened.handle)


def test_ports_and_programs_are_those_of_the_artifact(artifact: Artifact, engine: Engine) -> None:
    assert engine.c.evensong_program_count(engine.handle) == len(artifact.programs)
    for index, program in enumerate(artifact.programs):
        info, port_info = ProgramInfo(), PortInfo()
        assert engine.c.evensong_find_program(engine.handle, program.name.encode()) == index
        assert engine.c.evensong_program_info(engine.handle, index, ctypes.byref(info)) == 0
        assert (info.name.decode(), info.max_batch) == (program.name, program.max_batch)
        assert (info.arena_bytes, info.workspace_bytes) == (program.arena_bytes, program.workspace_bytes)
        for output, (ports, count) in enumerate(((program.inputs, info.inputs), (program.outputs, info.outputs))):
            assert count == len(ports)
            for position, port in enumerate(ports):
                tensor = program.tensors[port.tensor]
                assert engine.c.evensong_port_info(engine.handle, index, output, position, ctypes.byref(port_info)) == 0
                first = tensor.dims[0] // (program.max_batch if tensor.batched else 1)
                assert (port_info.name.decode(), port_info.dtype) == (port.name, tensor.dtype)
                assert tuple(port_info.dims[: port_info.rank]) == (first, *tensor.dims[1:])
                assert (bool(port_info.batched), port_info.zero_point) == (tensor.batched, tensor.zero_point)
            assert engine.c.evensong_port_info(engine.handle, index, output, len(ports), ctypes.byref(port_info)) == 4
    assert engine.c.evensong_program_info(engine.handle, len(artifact.programs), ctypes.byref(info)) == 4
    assert engine.c.evensong_find_program(engine.handle, b"no such program") == -1


def test_variables_travel_in_the_authors_layout(artifact: Artifact, engine: Engine) -> None:
    session = load(artifact)
    assert engine.c.evensong_variable_count(engine.handle) == len(artifact.variables)
    for index, variable in enumerate(artifact.variables):
        info, value = VariableInfo(), session.get([variable.name])[variable.name]
        assert engine.c.evensong_find_variable(engine.handle, variable.name.encode()) == index
        assert engine.c.evensong_variable_info(engine.handle, index, ctypes.byref(info)) == 0
        assert (info.name.decode(), info.dtype, info.bytes) == (variable.name, variable.dtype, variable.nbytes)
        assert tuple(info.dims[: info.rank]) == variable.shape
        assert bool(info.trainable) == (variable.flags == VariableFlag.TRAINABLE)
        np.testing.assert_array_equal(engine.read(index, value), value)
    with pytest.raises(RuntimeError, match="there is no variable"):
        engine.read(len(artifact.variables), np.zeros(1))


def test_a_permuted_variable_is_written_where_it_lies() -> None:
    builder = ProgramBuilder()
    stored = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    w = builder.variable("w", stored, perm=(0, 3, 1, 2))
    builder.op("COPY", [w], [builder.output("y", stored.shape)])
    engine = Engine(encode_artifact(builder.artifact()))
    author = stored.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(engine.read(0, author), author)
    engine.write(0, author + 1000)
    np.testing.assert_array_equal(engine.read(0, author), author + 1000)
    size = ctypes.c_size_t()
    engine.c.evensong_state.restype = ctypes.c_void_p
    state = engine.c.evensong_state(engine.handle, ctypes.byref(size))
    live = np.ctypeslib.as_array((ctypes.c_float * stored.size).from_address(state))
    np.testing.assert_array_equal(live.reshape(stored.shape), stored + 1000)
    with pytest.raises(RuntimeError, match="variable 'w' has 480 bytes; got 4"):
        engine.write(0, np.zeros(1, np.float32))


def test_memory_is_what_the_artifact_declares(artifact: Artifact, engine: Engine) -> None:
    told, report = Memory(), memory_report(artifact)
    engine.c.evensong_memory_info(engine.handle, ctypes.byref(told))
    assert (told.constants, told.state, told.slots) == (report.const, report.state, report.slots)
    assert told.statistics == report.statistics
    assert told.arena == max(program.arena for program in report.programs)
    assert told.workspace == max(program.workspace for program in report.programs)
    engine.c.evensong_memory_bytes.restype = ctypes.c_size_t
    parts = sum(align(getattr(told, name)) for name in Memory.names)
    assert engine.c.evensong_memory_bytes(engine.handle) == parts == engine.needed


def test_an_engine_writes_in_its_own_memory_only(artifact: Artifact) -> None:
    engine = Engine(encode_artifact(artifact), spare=100)
    assert (engine.memory[: engine.start] == 0xA5).all()
    assert (engine.memory[engine.start + engine.needed :] == 0xA5).all()


def test_too_little_memory_and_unaligned_memory_are_refused(artifact: Artifact) -> None:
    data = encode_artifact(artifact)
    with pytest.raises(RuntimeError, match=r"7: this artifact needs \d+ bytes of memory; got \d+"):
        Engine(data, spare=-1)
    with pytest.raises(RuntimeError, match="4: the memory must start at a multiple of 64"):
        Engine(data, shift=8)


def test_the_manifest_lies_in_the_bytes(artifact: Artifact) -> None:
    data = encode_artifact(artifact)
    c, text, size = ctypes.CDLL(str(native.library_path())), ctypes.c_void_p(), ctypes.c_size_t()
    arguments = (ctypes.byref(text), ctypes.byref(size), None, ctypes.c_size_t(0))
    assert c.evensong_manifest(data, ctypes.c_size_t(len(data)), *arguments) == 0
    assert json.loads(ctypes.string_at(text.value or 0, size.value)) == artifact.manifest
    assert c.evensong_manifest(data[:-1], ctypes.c_size_t(len(data) - 1), *arguments) == 1
