"""Artifacts to bytes and back. The format is told byte by byte in ``docs/artifact.md``.

Reading is strict: the bytes are hostile until the frame, the checksum and every structural rule hold. What remains to
be checked (operand shapes of each operation) is checked by whoever runs the program, before the first kernel runs.
"""

from __future__ import annotations

import hashlib
import json
import struct
from itertools import pairwise

import google_crc32c

from evensong.wire.cursor import Cursor, pack_name
from evensong.wire.errors import ArtifactError, CorruptError
from evensong.wire.program import (
    ALIGNMENT,
    MAX_RANK,
    OP_NAMES,
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

MAGIC = b"EVSG"
VERSION = (1, 0)
HEADER_BYTES = 64
MAX_ARTIFACT_BYTES = 1 << 31
MOST_PROGRAMS, MOST_VARIABLES, MOST_TENSORS, MOST_OPS = 32, 1 << 14, 1 << 18, 1 << 16  # each program's own

_DTYPES, _REGIONS = {int(dtype): dtype for dtype in DType}, {int(region): region for region in Region}

_HEADER = struct.Struct("<4sHHQII")  # magic, major, minor, file bytes, CRC32C of all after the header, sections
_SECTION = struct.Struct("<IIQQ")  # kind, zero, offset, bytes

_MANIFEST, _VARIABLES, _PROGRAMS, _CONST, _STATE = 1, 2, 3, 4, 5
_REQUIRED = (_MANIFEST, _VARIABLES, _PROGRAMS, _CONST, _STATE)


def artifact_hash(data: bytes) -> str:
    """The content address of an artifact: lower-case hex SHA-256 of all its bytes."""
    return hashlib.sha256(data).hexdigest()


def align(size: int) -> int:
    """``size`` rounded up to the alignment of tensors."""
    return -(-size // ALIGNMENT) * ALIGNMENT


# ------------------------------------------------------------------------------------------------- writing


def encode_artifact(artifact: Artifact) -> bytes:
    """The one byte string of ``artifact``: the same artifact gives the same bytes on every machine."""
    sections = {
        _MANIFEST: json.dumps(artifact.manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode(),
        _VARIABLES: _encode_variables(artifact),
        _PROGRAMS: b"".join(
            [len(artifact.programs).to_bytes(4, "little"), *(_encode_program(p) for p in artifact.programs)]
        ),
        _CONST: artifact.const,
        _STATE: artifact.state,
        **artifact.extra,
    }
    table = bytearray()
    body = bytearray()
    start = align(HEADER_BYTES + _SECTION.size * len(sections))
    for kind, data in sorted(sections.items()):
        body += bytes(align(len(body)) - len(body))
        table += _SECTION.pack(kind, 0, start + len(body), len(data))
        body += data
    table += bytes(start - HEADER_BYTES - len(table))
    checked = bytes(table + body)
    header = _HEADER.pack(MAGIC, *VERSION, HEADER_BYTES + len(checked), google_crc32c.value(checked), len(sections))
    return header + bytes(HEADER_BYTES - len(header)) + checked


def _encode_variables(artifact: Artifact) -> bytes:
    out = bytearray(struct.pack("<IQQ", len(artifact.variables), len(artifact.state), artifact.slot_bytes))
    for v in artifact.variables:
        out += pack_name(v.name) + struct.pack("<BBBB", v.dtype, v.flags, len(v.dims), 0)
        out += struct.pack(f"<{len(v.dims)}I{len(v.dims)}BQ", *v.dims, *v.perm, v.offset)
    return bytes(out)


def _encode_program(program: Program) -> bytes:
    out = bytearray(pack_name(program.name))
    out += struct.pack("<IQQ", program.max_batch, program.arena_bytes, program.workspace_bytes)
    for ports in (program.inputs, program.outputs):
        out.append(len(ports))
        for port in ports:
            out += pack_name(port.name) + struct.pack("<I", port.tensor)
    out += struct.pack("<I", len(program.tensors))
    for t in program.tensors:
        out += struct.pack("<BBBB", t.dtype, t.region, len(t.dims), t.batched)
        out += struct.pack(f"<{len(t.dims)}IQfi", *t.dims, t.offset, t.scale, t.zero_point)
    out += struct.pack("<I", len(program.ops))
    for op in program.ops:
        kinds = "".join(attr[-1] for attr in OPS[op.name].attrs)
        out += struct.pack("<HBBBB", OPS[op.name].code, len(op.inputs), len(op.outputs), len(op.attrs), 0)
        out += struct.pack(f"<{len(op.inputs) + len(op.outputs)}I", *op.inputs, *op.outputs)
        out += struct.pack("<" + kinds, *op.attrs)
    return bytes(out)


# ------------------------------------------------------------------------------------------------- reading


def decode_artifact(data: bytes) -> Artifact:
    """Parses and checks ``data``.

    Raises :class:`CorruptError` where the bytes are damaged and :class:`ArtifactError` where they are whole but wrong.
    """
    sections = _read_sections(data)
    try:
        manifest = json.loads(bytes(sections[_MANIFEST]).decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("the manifest is not JSON", got=str(error)) from None
    if not isinstance(manifest, dict):
        raise ArtifactError("the manifest is not a JSON object", got=type(manifest).__name__)
    const, state = sections[_CONST], sections[_STATE]
    variables, slot_bytes = _read_variables(sections[_VARIABLES], len(state))
    cursor = Cursor(sections[_PROGRAMS], "the programs section")
    limits = {Region.CONST: len(const), Region.STATE: len(state), Region.SLOTS: slot_bytes}
    programs = tuple(_read_program(cursor, limits) for _ in range(_count(cursor, cursor.u32(), 32, MOST_PROGRAMS)))
    cursor.end()
    if len({p.name for p in programs}) != len(programs):
        raise ArtifactError("two programs share a name", got=[p.name for p in programs])
    extra = {kind: bytes(part) for kind, part in sections.items() if kind not in _REQUIRED}
    return Artifact(manifest, variables, programs, bytes(const), bytes(state), slot_bytes, extra)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_sections(data: bytes) -> dict[int, memoryview]:
    cursor = Cursor(data, "the artifact")
    magic, major, minor, size, checksum, count = _HEADER.unpack(cursor.take(_HEADER.size))
    if magic != MAGIC:
        raise CorruptError("not an evensong artifact", expected=f"magic {MAGIC!r}", got=bytes(magic))
    if major != VERSION[0]:
        raise ArtifactError(
            "the artifact was made for another runtime",
            expected=f"format {VERSION[0]}.x",
            got=f"{major}.{minor}",
            fix="Compile the model with the version of evensong that this device runs.",
        )
    if size != len(data) or size > MAX_ARTIFACT_BYTES:
        raise CorruptError("the artifact's length is wrong", expected=f"{size} bytes", got=len(data))
    if bytes(cursor.take(HEADER_BYTES - _HEADER.size)).strip(b"\0"):
        raise CorruptError("the artifact's header has bytes set that must be zero")
    actual = google_crc32c.value(bytes(memoryview(data)[HEADER_BYTES:]))
    if actual != checksum:
        raise CorruptError(
            "the artifact is damaged", expected=f"CRC32C {checksum:08x}", got=f"{actual:08x}", fix="Fetch it again."
        )
    sections: dict[int, memoryview] = {}
    last_kind, free_from = 0, HEADER_BYTES + _count(cursor, count, _SECTION.size) * _SECTION.size
    for _ in range(count):
        kind, zero, offset, length = _SECTION.unpack(cursor.take(_SECTION.size))
        if zero or offset % ALIGNMENT or not free_from <= offset <= size or length > size - offset or kind <= last_kind:
            raise CorruptError(
                f"section {kind} is out of place or lies outside the artifact", got=f"{offset}+{length} of {size}"
            )
        sections[kind] = memoryview(data)[offset : offset + length]
        last_kind, free_from = kind, offset + length
    if missing := [kind for kind in _REQUIRED if kind not in sections]:
        raise CorruptError("a section is missing", expected=list(_REQUIRED), got=f"none of kind {missing}")
    return sections


def _count(cursor: Cursor, count: int, least_bytes: int, most: int = 1 << 32) -> int:
    """``count`` records of at least ``least_bytes`` must fit in what is left: no hostile count allocates memory."""
    if count * least_bytes > cursor.remaining or count > most:
        raise CorruptError(
            f"a count of {count} cannot fit", expected=f"at most {min(most, cursor.remaining // least_bytes)}"
        )
    return count


def _read_variables(section: memoryview, state_bytes: int) -> tuple[tuple[Variable, ...], int]:
    cursor = Cursor(section, "the variables section")
    count, declared_state, slot_bytes = cursor.u32(), cursor.u64(), cursor.u64()
    if declared_state != state_bytes or slot_bytes > MAX_ARTIFACT_BYTES:
        raise ArtifactError("the state's size is wrong", expected=state_bytes, got=declared_state)
    variables: list[Variable] = []
    for _ in range(_count(cursor, count, 15, MOST_VARIABLES)):
        name = cursor.name()
        dtype, flags, rank, zero = (cursor.u8() for _ in range(4))
        if zero or rank > MAX_RANK or flags not in (1, 2, 6):
            raise ArtifactError(f"variable {name!r} has a bad header", got=(flags, rank, zero))
        dims = tuple(cursor.u32() for _ in range(rank))
        perm = tuple(cursor.u8() for _ in range(rank))
        variable = Variable(name, _dtype(dtype), dims, perm, cursor.u64(), VariableFlag(flags))
        if sorted(perm) != list(range(rank)):
            raise ArtifactError(f"variable {name!r} has a bad permutation", got=perm)
        _check_place(f"variable {name!r}", variable.nbytes, variable.offset, state_bytes)
        variables.append(variable)
    cursor.end()
    if len({v.name for v in variables}) != count:
        raise ArtifactError("two variables share a name")
    spans = sorted((v.offset, v.offset + v.nbytes) for v in variables)
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        raise ArtifactError("two variables share memory")
    return tuple(variables), slot_bytes


def _read_program(cursor: Cursor, persistent: dict[Region, int]) -> Program:
    name = cursor.name()
    max_batch, arena_bytes, workspace_bytes = cursor.u32(), cursor.u64(), cursor.u64()
    if not 1 <= max_batch <= 1 << 20 or max(arena_bytes, workspace_bytes) > MAX_ARTIFACT_BYTES:
        raise ArtifactError(f"program {name!r} has a bad size", got=(max_batch, arena_bytes, workspace_bytes))
    inputs, outputs = (tuple(Port(cursor.name(), cursor.u32()) for _ in range(cursor.u8())) for _ in range(2))
    limits = {**persistent, Region.ARENA: arena_bytes}
    tensors = tuple(
        _read_tensor(cursor, name, max_batch, limits, len(inputs), len(outputs))
        for _ in range(_count(cursor, cursor.u32(), 20, MOST_TENSORS))
    )
    for region, side in ((Region.INPUT, inputs), (Region.OUTPUT, outputs)):
        for index, port in enumerate(side):
            at = tensors[port.tensor] if port.tensor < len(tensors) else None
            if at is None or at.region != region or at.offset != index:
                raise ArtifactError(f"port {port.name!r} of {name!r} does not name its own tensor", got=port.tensor)
    for tensor in tensors:  # another view of a port has exactly the port's bytes, whatever the batch
        if tensor.region in (Region.INPUT, Region.OUTPUT):
            side = inputs if tensor.region == Region.INPUT else outputs
            owner = tensors[side[tensor.offset].tensor]
            if (tensor.nbytes, tensor.dtype, tensor.batched) != (owner.nbytes, owner.dtype, owner.batched):
                raise ArtifactError(f"a tensor of {name!r} does not have the size of its port")
    ops = tuple(_read_op(cursor, name, len(tensors)) for _ in range(_count(cursor, cursor.u32(), 6, MOST_OPS)))
    return Program(name, max_batch, arena_bytes, workspace_bytes, inputs, outputs, tensors, ops)


def _read_tensor(
    cursor: Cursor, program: str, max_batch: int, limits: dict[Region, int], inputs: int, outputs: int
) -> Tensor:
    dtype, region_code, rank, batched = cursor.unpack("4B")
    if region_code > Region.OUTPUT or rank > MAX_RANK or batched > 1:
        raise ArtifactError(f"a tensor of {program!r} has a bad header", got=(dtype, region_code, rank, batched))
    *sizes, offset, scale, zero_point = cursor.unpack(f"{rank}IQfi")
    dims, region = tuple(sizes), _REGIONS[region_code]
    tensor = Tensor(_dtype(dtype), region, dims, offset, bool(batched), scale, zero_point)
    if batched and (not rank or dims[0] % max_batch or region in (Region.CONST, Region.STATE, Region.SLOTS)):
        raise ArtifactError(f"a batched tensor of {program!r} does not divide by its batch", got=dims)
    what = f"a tensor of {program!r}"
    if region in limits:
        _check_place(what, tensor.nbytes, tensor.offset, limits[region])
    elif tensor.offset >= (inputs if region == Region.INPUT else outputs):
        raise ArtifactError(f"{what} names a port that does not exist", got=tensor.offset)
    else:
        _check_place(what, tensor.nbytes, 0, MAX_ARTIFACT_BYTES)
    return tensor


def _read_op(cursor: Cursor, program: str, tensors: int) -> Op:
    code, n_inputs, n_outputs, n_attrs, zero = cursor.unpack("H4B")
    name = OP_NAMES.get(code)
    if name is None or zero:
        raise ArtifactError(
            f"{program!r} uses an operation that this runtime does not know",
            got=code,
            fix="Update evensong on the device.",
        )
    spec = OPS[name]
    fits_inputs = _required(spec.inputs) <= n_inputs and (spec.variadic or n_inputs <= len(spec.inputs))
    fits_outputs = _required(spec.outputs) <= n_outputs <= len(spec.outputs)
    if not fits_inputs or not fits_outputs or n_attrs != len(spec.attrs):
        raise ArtifactError(
            f"{name} in {program!r} has the wrong number of operands", got=(n_inputs, n_outputs, n_attrs)
        )
    operands = cursor.unpack(f"{n_inputs + n_outputs}I")
    if any(operand >= tensors for operand in operands):
        raise ArtifactError(f"{name} in {program!r} names a tensor that does not exist", got=operands)
    attrs = cursor.unpack("".join(attr[-1] for attr in spec.attrs))  # i or f
    return Op(name, operands[:n_inputs], operands[n_inputs:], attrs)


def _required(names: tuple[str, ...]) -> int:
    return sum(not name.endswith("?") for name in names)


def _dtype(code: int) -> DType:
    if code not in _DTYPES:
        raise ArtifactError("unknown dtype", expected="1 to 4", got=code)
    return _DTYPES[code]


def _check_place(what: str, size: int, offset: int, limit: int) -> None:
    if not size or offset % ALIGNMENT or offset + size > limit:
        raise ArtifactError(
            f"{what} does not fit its region", expected=f"at most {limit} bytes", got=f"{offset}+{size}"
        )
