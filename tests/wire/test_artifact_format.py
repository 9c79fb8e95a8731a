"""Artifact bytes: exact round trips, and hostile bytes that are refused with the right error and nothing else."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evensong.wire.artifact import (
    MOST_PROGRAMS,
    align,
    artifact_hash,
    decode_artifact,
    encode_artifact,
)
from evensong.wire.errors import ArtifactError, CorruptError, WireError
from evensong.wire.program import (
    OPS,
    Artifact,
    DType,
    Op,
    Port,
    Program,
    Region,
    Tensor,
    Variable,
    VariableFlag,
)

VECTORS = sorted((Path(__file__).parents[2] / "protos" / "vectors" / "artifact").glob("*.evsg"))
SMALLEST = next(path for path in VECTORS if path.stem == "smallest").read_bytes()
CLASSIFIER = next(path for path in VECTORS if path.stem == "classifier").read_bytes()


def sealed(data: bytes | bytearray) -> bytes:
    """``data`` with the length and checksum that it should have."""
    data = bytearray(data)
    struct.pack_into("<Q", data, 8, len(data))
    struct.pack_into("<I", data, 16, google_crc32c.value(bytes(data[64:])))
    return bytes(data)


def patched(data: bytes, offset: int, layout: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into("<" + layout, changed, offset, *values)
    return sealed(changed)


# ------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_vectors_decode_and_encode_to_the_same_bytes(path: Path) -> None:
    data = path.read_bytes()
    assert encode_artifact(decode_artifact(data)) == data
    assert len(artifact_hash(data)) == 64


names = (
    st.text(min_size=1, max_size=20)
    .filter(lambda text: 1 <= len(text.encode("utf-8", "ignore")) <= 255)
    .filter(lambda text: not any(0xD800 <= ord(character) < 0xE000 for character in text))
)
dims = st.lists(st.integers(1, 4), max_size=6).map(tuple)
floats = st.floats(width=32, allow_nan=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def artifacts(draw: Any) -> Artifact:
    """Structurally valid artifacts; their operations need not make sense."""
    variables, offset = [], 0
    for name in draw(st.lists(names, max_size=3, unique=True)):
        shape = draw(dims)
        perm = tuple(draw(st.permutations(range(len(shape)))))
        flag = draw(st.sampled_from([VariableFlag.TRAINABLE, VariableFlag.BUFFER]))
        variables.append(Variable(name, draw(st.sampled_from(DType)), shape, perm, offset, flag))
        offset = align(offset + variables[-1].nbytes)
    state_bytes = offset
    regions = {Region.CONST: 1 << 15, Region.SLOTS: 1 << 15, Region.ARENA: 1 << 15}
    programs = []
    for name in draw(st.lists(names, max_size=3, unique=True)):
        max_batch = draw(st.integers(1, 5))
        tensors: list[Tensor] = []
        sides: list[list[Port]] = [[], []]
        for region, side in ((Region.INPUT, sides[0]), (Region.OUTPUT, sides[1])):
            for index, port in enumerate(draw(st.lists(names, max_size=2))):
                side.append(Port(port, len(tensors)))
                tensors.append(Tensor(draw(st.sampled_from(DType)), region, draw(dims), index))
        for _ in range(draw(st.integers(0, 4))):
            shape, batched = draw(dims), draw(st.booleans())
            region = draw(st.sampled_from(list(regions)))
            batched = batched and bool(shape) and region == Region.ARENA
            if batched:
                shape = (shape[0] * max_batch, *shape[1:])
            scale, zero_point = draw(floats), draw(st.integers(-(2**31), 2**31 - 1))
            tensors.append(Tensor(draw(st.sampled_from(DType)), region, shape, 64, batched, scale, zero_point))
        ops = draw(st.lists(_ops(len(tensors)), max_size=4)) if tensors else []
        sizes = (regions[Region.ARENA], draw(st.integers(0, 2**31)))
        programs.append(Program(name, max_batch, *sizes, tuple(sides[0]), tuple(sides[1]), tuple(tensors), tuple(ops)))
    return Artifact(
        draw(st.dictionaries(st.text(), json_values, max_size=3)),
        tuple(variables),
        tuple(programs),
        draw(st.binary(max_size=9)) + bytes(regions[Region.CONST]),
        bytes(state_bytes),
        regions[Region.SLOTS],
        draw(st.dictionaries(st.integers(6, 2**32 - 1), st.binary(max_size=70), max_size=2)),
    )


@st.composite
def _ops(draw: Any, tensors: int) -> Op:
    name = draw(st.sampled_from(list(OPS)))
    spec = OPS[name]
    counts = []
    for operands in (spec.inputs, spec.outputs):
        required = sum(not operand.endswith("?") for operand in operands)
        counts.append(
            draw(st.integers(required, len(operands) + (3 if spec.variadic and operands is spec.inputs else 0)))
        )
    operand = st.integers(0, tensors - 1)
    inputs, outputs = (tuple(draw(st.lists(operand, min_size=n, max_size=n))) for n in counts)
    attrs = tuple(draw(floats if a.endswith(":f") else st.integers(-(2**31), 2**31 - 1)) for a in spec.attrs)
    return Op(name, inputs, outputs, attrs)


@settings(max_examples=150, deadline=None)
@given(artifacts())
def test_round_trip(artifact: Artifact) -> None:
    data = encode_artifact(artifact)
    decoded = decode_artifact(data)
    assert decoded == artifact
    assert encode_artifact(decoded) == data


# ------------------------------------------------------------------------------------------------- damaged bytes


def test_every_truncation_is_refused() -> None:
    for end in range(len(SMALLEST)):
        with pytest.raises(CorruptError):
            decode_artifact(SMALLEST[:end])
        with pytest.raises(WireError):  # also when whoever cut it off fixed length and checksum
            decode_artifact(sealed(SMALLEST[:end].ljust(64, b"\0")))


def test_every_flipped_byte_is_refused() -> None:
    minor_version = (6, 7)
    for offset in range(len(SMALLEST)):
        damaged = bytearray(SMALLEST)
        damaged[offset] ^= 0x41
        if offset in minor_version:
            decode_artifact(bytes(damaged))
            continue
        with pytest.raises(WireError):
            decode_artifact(bytes(damaged))


def test_left_over_bytes_are_refused() -> None:
    with pytest.raises(CorruptError, match="length"):
        decode_artifact(SMALLEST + b"\0")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_with_a_right_checksum_give_an_artifact_or_a_typed_error(data: st.DataObject) -> None:
    changed = bytearray(data.draw(st.sampled_from([SMALLEST, CLASSIFIER])))
    for _ in range(data.draw(st.integers(1, 3))):
        offset = data.draw(st.integers(64, len(changed) - 8))
        piece = data.draw(
            st.binary(min_size=1, max_size=8)
            | st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
        )
        changed[offset : offset + len(piece)] = piece
    with suppress(WireError):
        artifact = decode_artifact(sealed(changed))
        assert decode_artifact(encode_artifact(artifact)) == artifact or _has_nan(artifact)


def _has_nan(artifact: Artifact) -> bool:
    return "nan" in repr(artifact)


def test_no_count_makes_the_reader_allocate() -> None:
    """Every four bytes set to 2^32 - 1 in turn: refused, or harmless, and always in little memory."""
    tracemalloc.start()
    for offset in range(20, len(SMALLEST) - 4):
        with suppress(WireError):
            decode_artifact(patched(SMALLEST, offset, "I", 2**32 - 1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


# ------------------------------------------------------------------------------------------------- sections

TABLE = 64  # kind, zero, offset, length of 24 bytes each


def section(data: bytes, number: int) -> tuple[int, int, int, int]:
    kind, zero, offset, length = struct.unpack_from("<IIQQ", data, TABLE + 24 * number)
    return kind, zero, offset, length


SECTION_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "overlap": lambda d: patched(d, TABLE + 24 + 8, "Q", section(d, 0)[2]),
    "inside the table": lambda d: patched(d, TABLE + 8, "Q", 64),
    "not aligned": lambda d: patched(d, TABLE + 8, "Q", section(d, 0)[2] + 1),
    "beyond the end": lambda d: patched(d, TABLE + 4 * 24 + 8, "Q", align(len(d)) + 64),
    "longer than the file": lambda d: patched(d, TABLE + 4 * 24 + 16, "Q", len(d)),
    "wraps around": lambda d: patched(d, TABLE + 4 * 24 + 16, "Q", 2**64 - 64),
    "kind 0": lambda d: patched(d, TABLE, "I", 0),
    "stands twice": lambda d: patched(d, TABLE, "I", 2),
    "missing": lambda d: patched(d, TABLE + 4 * 24, "I", 77),
    "not sorted": lambda d: patched(patched(d, TABLE, "I", 2), TABLE + 24, "I", 1),
    "set bytes that must be zero": lambda d: patched(d, TABLE + 4, "I", 1),
    "header bytes that must be zero": lambda d: patched(d, 63, "B", 1),
    "more sections than fit": lambda d: patched(d, 20, "I", 2**32 - 1),
    "no sections": lambda d: patched(d, 20, "I", 0),
}


@pytest.mark.parametrize("what", SECTION_DAMAGE)
def test_a_broken_section_table_is_refused(what: str) -> None:
    with pytest.raises(CorruptError):
        decode_artifact(SECTION_DAMAGE[what](SMALLEST))


@pytest.mark.parametrize(
    "manifest", [b"", b"[]", b"{", b"\xff\xfe{\0}\0", b'{"a": NaN}', b"[" * 100_000, b'{"a": 1}x', b"null"]
)
def test_a_manifest_that_is_not_a_json_object_is_refused(manifest: bytes) -> None:
    artifact = decode_artifact(SMALLEST)
    data = bytearray(encode_artifact(replace(artifact, manifest={"padding": "x" * 100_010})))
    _, _, offset, length = section(data, 0)
    data[offset : offset + length] = manifest.ljust(length, b" ")
    with pytest.raises(ArtifactError, match="manifest"):
        decode_artifact(sealed(data))


# ------------------------------------------------------------------------------------------------- structure


def tensor(region: Region = Region.ARENA, dims: tuple[int, ...] = (4,), offset: int = 0, **more: Any) -> Tensor:
    return Tensor(more.pop("dtype", DType.F32), region, dims, offset, **more)


def program(tensors: tuple[Tensor, ...] = (), **more: Any) -> Program:
    fields: dict[str, Any] = {
        "name": "p", "max_batch": 2, "arena_bytes": 128, "workspace_bytes": 0, "inputs": (), "outputs": (), "ops": ()
    }  # fmt: skip
    return Program(tensors=tensors, **{**fields, **more})


def artifact_of(*programs: Program, variables: tuple[Variable, ...] = (), state: int = 128) -> Artifact:
    return Artifact({}, variables, programs, bytes(128), bytes(state), 128)


def variable(name: str = "w", dims: tuple[int, ...] = (4,), offset: int = 0, **more: Any) -> Variable:
    perm = more.get("perm", tuple(range(len(dims))))
    return Variable(name, DType.F32, dims, perm, offset, more.get("flags", VariableFlag.TRAINABLE))


X = tensor(Region.INPUT)
PORT = (Port("x", 0),)

BROKEN: dict[str, Artifact] = {
    "tensor beyond its region": artifact_of(program((tensor(offset=128),))),
    "tensor ends beyond its region": artifact_of(program((tensor(dims=(33,)),))),
    "offset wraps around": artifact_of(program((tensor(offset=2**64 - 64),))),
    "tensor not aligned": artifact_of(program((tensor(offset=4),))),
    "const beyond its region": artifact_of(program((tensor(Region.CONST, offset=128),))),
    "state beyond its region": artifact_of(program((tensor(Region.STATE, offset=128),))),
    "slots beyond their region": artifact_of(program((tensor(Region.SLOTS, offset=128),))),
    "dimension of zero": artifact_of(program((tensor(dims=(4, 0)),))),
    "more than 2^31 bytes": artifact_of(program((tensor(Region.INPUT, (2**29 + 1,)),), inputs=PORT)),
    "elements beyond 64 bits": artifact_of(program((tensor(Region.INPUT, (2**31,) * 6),), inputs=PORT)),
    "batched constant": artifact_of(program((tensor(Region.CONST, batched=True),))),
    "batched state": artifact_of(program((tensor(Region.STATE, batched=True),))),
    "batched scalar": artifact_of(program((tensor(dims=(), batched=True),))),
    "batch does not divide": artifact_of(program((tensor(dims=(3,), batched=True),))),
    "no batch": artifact_of(program(max_batch=0)),
    "batch too large": artifact_of(program(max_batch=2**20 + 1)),
    "arena too large": artifact_of(program(arena_bytes=2**31 + 1)),
    "workspace too large": artifact_of(program(workspace_bytes=2**31 + 1)),
    "two programs of one name": artifact_of(program(), program()),
    "input without a port": artifact_of(program((X,))),
    "output without a port": artifact_of(program((tensor(Region.OUTPUT),))),
    "port of no tensor": artifact_of(program((X,), inputs=(Port("x", 1),))),
    "port of a tensor elsewhere": artifact_of(program((tensor(),), inputs=PORT)),
    "port of another side": artifact_of(program((tensor(Region.OUTPUT),), inputs=PORT)),
    "two ports of one tensor": artifact_of(program((X,), inputs=(*PORT, *PORT))),
    "larger view of a port": artifact_of(program((X, tensor(Region.INPUT, (5,))), inputs=PORT)),
    "batched view of a port": artifact_of(program((X, tensor(Region.INPUT, batched=True)), inputs=PORT)),
    "other dtype of a port": artifact_of(program((X, tensor(Region.INPUT, dtype=DType.I32)), inputs=PORT)),
    "operand of no tensor": artifact_of(program((tensor(),), ops=(Op("COPY", (0,), (1,)),))),
    "two variables of one name": artifact_of(variables=(variable(), variable(offset=64))),
    "two variables in one place": artifact_of(variables=(variable(), variable("v"))),
    "variables overlap": artifact_of(variables=(variable(dims=(17,)), variable("v", offset=64))),
    "variable beyond the state": artifact_of(variables=(variable(offset=128),)),
    "variable not aligned": artifact_of(variables=(variable(offset=32),)),
    "permutation repeats": artifact_of(variables=(variable(dims=(2, 2), perm=(0, 0)),)),
    "permutation out of range": artifact_of(variables=(variable(dims=(2, 2), perm=(0, 2)),)),
    "flags of neither kind": artifact_of(variables=(variable(flags=3),)),
    "no flags": artifact_of(variables=(variable(flags=0),)),
    "slots too large": replace(artifact_of(), slot_bytes=2**31 + 1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_structure_is_refused(what: str) -> None:
    with pytest.raises(ArtifactError):
        decode_artifact(encode_artifact(BROKEN[what]))


def test_more_programs_than_any_device_wants_are_refused() -> None:
    many = artifact_of(*(program(name=f"p{i}") for i in range(MOST_PROGRAMS + 1)))
    with pytest.raises(CorruptError, match="count"):
        decode_artifact(encode_artifact(many))


OP_DAMAGE: dict[str, tuple[int, str, int]] = {  # offset from the operation's start in `smallest`
    "unknown code": (0, "H", 9999),
    "too few inputs": (2, "B", 1),
    "too many inputs": (2, "B", 4),
    "no output": (3, "B", 0),
    "too many outputs": (3, "B", 2),
    "too few attributes": (4, "B", 0),
    "a byte that must be zero": (5, "B", 1),
}


@pytest.mark.parametrize("what", OP_DAMAGE)
def test_a_broken_operation_is_refused(what: str) -> None:
    offset, layout, value = OP_DAMAGE[what]
    start = SMALLEST.index(struct.pack("<HBBBB", OPS["LINEAR"].code, 2, 1, 1, 0))
    with pytest.raises(ArtifactError):
        decode_artifact(patched(SMALLEST, start + offset, layout, value))


@pytest.mark.parametrize("name", [b"\xff\xfe\xfd\xfc\xfb\xfa\xf9"])
def test_names_are_utf8(name: bytes) -> None:
    data = bytearray(SMALLEST)
    at = data.index(b"predict")
    data[at : at + 7] = name
    with pytest.raises(CorruptError, match="UTF-8"):
        decode_artifact(sealed(data))


@pytest.mark.parametrize("length", [0, 256, 65535])
def test_names_have_1_to_255_bytes(length: int) -> None:
    at = SMALLEST.index(b"predict") - 2
    with pytest.raises(CorruptError, match="bad length"):
        decode_artifact(patched(SMALLEST, at, "H", length))


def test_errors_say_what_was_expected_what_came_and_what_to_do() -> None:
    damaged = bytearray(SMALLEST)
    damaged[-1] ^= 1
    with pytest.raises(CorruptError) as caught:
        decode_artifact(bytes(damaged))
    assert caught.value.expected and caught.value.got and caught.value.fix
    with pytest.raises(ArtifactError) as refused:
        decode_artifact(SMALLEST[:4] + b"\x02\x00" + SMALLEST[6:])
    assert "1.x" in str(refused.value) and "2.0" in str(refused.value)
