"""The golden files and their format: ``python tests/conformance/golden.py [NAME ...]`` makes those that are missing.

``golden/OPERATION.golden`` holds a few programs around one operation, drawn from ``op_cases.py`` as other tests draw
theirs; ``golden/models.golden`` whole models that predict and train (``protos/vectors/artifact``);
``golden/refused.golden`` bytes and runs that every engine must refuse. Expected values are the NumPy twin's. A name on
the command line is made again: do that only where a result is meant to change. README.md describes the bytes.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FOLDER = Path(__file__).parent / "golden"
sys.path.append(str(Path(__file__).parents[1] / "mobile_runtime"))

import make_artifact_vectors  # noqa: E402
from hypothesis import Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from op_cases import CASES, Case  # noqa: E402

from evensong.mobile_runtime.twin import TwinMachine  # noqa: E402
from evensong.wire.artifact import decode_artifact, encode_artifact  # noqa: E402
from evensong.wire.program import OPS, Artifact, DType, Program, Region  # noqa: E402

Array = npt.NDArray[Any]

MAGIC = b"EVGC"
VERSION = 1
OK, CORRUPT, ARTIFACT, PROGRAM, ARGUMENT, EXAMPLE, DIVERGED = range(7)  # evensong_status

#: float32 results agree to this, relative to the largest expected element or 1: sums may go in any order.
TOLERANCE = 1e-5
#: Their float32 results are exact, whatever the order and with or without fused multiply-add.
EXACT = frozenset(
    {"CAST", "CONCAT", "COPY", "CROP2D", "DEQUANTIZE", "EMBEDDING", "FILL", "MAX_POOL2D", "ONE_HOT"}
    | {"SLICE", "SLICE_GRAD", "TRANSPOSE"}
)

_DRAWN = 80  # examples of an operation that are looked at
_SMALL = (3, 1600)  # so many of at most so many bytes, as different as they come ...
_LARGE = 4200  # ... and the largest below this


@dataclass(frozen=True)
class Result:
    """What a run or a whole case leaves: a tensor, and how close one has to come."""

    value: Array
    tolerance: float


@dataclass(frozen=True)
class Run:
    """One run of a program. Where it fails with ``status``, nothing is compared."""

    program: int
    batch: int
    inputs: Sequence[Array]
    outputs: Sequence[Result] = ()
    learning_rate: float = 0.0
    step: int = 1
    seed: int = 0
    status: int = OK


@dataclass(frozen=True)
class Golden:
    """One case: an artifact, its runs one after the other, and what then lies in STATE and SLOTS."""

    name: str
    artifact: bytes
    runs: Sequence[Run] = ()
    memory: Sequence[tuple[Region, int, Result]] = ()
    status: int = OK  #: of opening it


def main(names: Sequence[str]) -> None:
    """Writes the named files, and those that are missing."""
    FOLDER.mkdir(exist_ok=True)
    for name in [*OPS, "models", "refused"]:
        path = FOLDER / f"{name}.golden"
        if name in names or not path.exists():
            cases = {"models": models, "refused": refused}.get(name, lambda name=name: list(operation(name)))()
            path.write_bytes(encode(cases))
            print(f"{path.name}: {len(cases)} cases, {path.stat().st_size} bytes")


# ------------------------------------------------------------------------------------------------- what to look at


def operation(name: str) -> Iterator[Golden]:
    """A few cases of one operation: small ones that differ in kind, and a larger one for whole vectors and panels."""
    drawn = sorted(_draw(name), key=lambda case: len(encode([case[1]])))
    count, most = _SMALL
    fitting = [case for case in drawn if len(encode([case[1]])) <= _LARGE]
    kinds: dict[object, Golden] = {}
    for kind, case in [case for case in fitting if len(encode([case[1]])) <= most][::-1] or fitting[:count]:
        kinds.setdefault(kind, case)
    chosen = list(kinds.values())
    spread = [chosen[len(chosen) * i // count] for i in range(min(count, len(chosen)))]
    unique = {case.artifact: case for case in [*spread, fitting[-1][1]]}
    for number, case in enumerate(unique.values()):
        yield replace(case, name=f"{name}/{number}")


def _draw(name: str) -> list[tuple[object, Golden]]:
    found: list[tuple[object, Golden]] = []

    @settings(max_examples=_DRAWN, derandomize=True, database=None, phases=[Phase.generate], deadline=None)
    @given(data=st.data())
    def draw(data: st.DataObject) -> None:
        case = Case(data.draw, name)
        CASES[name](case)
        run = (0, case.batch, case.values, 0.1, case.step, case.seed)
        golden = computed(name, case.artifact(), [run])
        kind = (case.in_place, case.batch < case.max_batch, len(case.operands), len(case.results), case.builder.ops)
        found.append((repr(kind), golden))

    draw()
    return found


#: program, batch, inputs, learning rate, step, seed
Planned = tuple[int, int, Sequence[Array], float, int, int]


def computed(name: str, artifact: Artifact, plan: Sequence[Planned]) -> Golden:
    """The plan, run on the twin."""
    machine = TwinMachine(artifact)
    runs = []
    for index, batch, inputs, learning_rate, step, seed in plan:
        program = artifact.programs[index]
        outputs = [_empty(program, port.tensor, batch) for port in program.outputs]
        machine.run(index, batch, inputs, outputs, learning_rate=learning_rate, step=step, seed=seed)
        tolerance = 0.0 if {op.name for op in program.ops} <= EXACT else TOLERANCE
        results = [Result(output, tolerance if output.dtype == np.float32 else 0.0) for output in outputs]
        runs.append(Run(index, batch, inputs, results, learning_rate, step, seed))
    return Golden(name, encode_artifact(artifact), runs, _memory(artifact, machine))


def _memory(artifact: Artifact, machine: TwinMachine) -> list[tuple[Region, int, Result]]:
    """The tensors that the programs keep in STATE and SLOTS."""
    found: dict[tuple[Region, int], Result] = {}
    for program in artifact.programs:
        for tensor in program.tensors:
            if tensor.region not in (Region.STATE, Region.SLOTS):
                continue
            memory = machine.state if tensor.region == Region.STATE else machine.slots
            value = memory[tensor.offset : tensor.offset + tensor.nbytes].copy().view(tensor.dtype.numpy)
            tolerance = TOLERANCE if tensor.dtype == DType.F32 else 0.0
            found.setdefault((tensor.region, tensor.offset), Result(value, tolerance))
    return [(region, offset, result) for (region, offset), result in sorted(found.items())]


def _empty(program: Program, tensor_index: int, batch: int) -> Array:
    tensor = program.tensors[tensor_index]
    dims = (tensor.dims[0] // program.max_batch * batch, *tensor.dims[1:]) if tensor.batched else tensor.dims
    return np.zeros(dims, tensor.dtype.numpy)


def models() -> list[Golden]:
    """Whole models, float32 and int8, that train and predict."""
    found = []
    for name, (_, artifact, plan) in make_artifact_vectors.vectors().items():
        programs = [program.name for program in artifact.programs]
        found.append(computed(name, artifact, [(programs.index(program), *rest) for program, *rest in plan]))
    return found


def refused() -> list[Golden]:
    """What every engine refuses, with the same status."""
    _, artifact, plan = make_artifact_vectors.vectors()["classifier"]
    data = encode_artifact(artifact)
    x, labels = (np.array(value) for value in plan[0][2])
    train = [program.name for program in artifact.programs].index("train")
    huge = np.full_like(x, 3e38)
    runs = [
        Run(train, 8, [x, np.full_like(labels, 3)], learning_rate=0.1, status=EXAMPLE),
        Run(train, 8, [x, labels], learning_rate=float("nan"), status=ARGUMENT),
        Run(train, 9, [x, labels], learning_rate=0.1, status=ARGUMENT),
        Run(train, 8, [huge, labels], learning_rate=0.1, status=DIVERGED),
        Run(9, 8, [], status=ARGUMENT),
    ]
    machine = TwinMachine(artifact)
    flipped, other_version = bytearray(data), bytearray(data)
    flipped[-1] ^= 1
    other_version[4] = 9
    program = artifact.programs[train]
    no_workspace = replace(artifact, programs=(replace(program, workspace_bytes=0),))
    return [
        Golden("nothing that is refused changes anything", data, runs, _memory(artifact, machine)),
        Golden("no bytes", b"", status=CORRUPT),
        Golden("another magic", b"PK" + data[2:], status=CORRUPT),
        Golden("cut off", data[:-1], status=CORRUPT),
        Golden("a flipped bit", bytes(flipped), status=CORRUPT),
        Golden("another version", bytes(other_version), status=ARTIFACT),
        Golden("too little workspace", encode_artifact(no_workspace), status=PROGRAM),
    ]


# ------------------------------------------------------------------------------------------------- the format


def encode(cases: Sequence[Golden]) -> bytes:
    """The bytes of a golden file; README.md describes them."""
    out = bytearray(MAGIC + struct.pack("<II", VERSION, len(cases)))
    for case in cases:
        name = case.name.encode()
        out += struct.pack("<H", len(name)) + name
        out += struct.pack("<II", case.status, len(case.artifact)) + case.artifact
        out += struct.pack("<H", len(case.runs))
        for run in case.runs:
            out += struct.pack("<IIfQQI", run.program, run.batch, run.learning_rate, run.step, run.seed, run.status)
            out += struct.pack("<B", len(run.inputs))
            for value in run.inputs:
                out += struct.pack("<I", value.nbytes) + value.tobytes()
            out += struct.pack("<B", len(run.outputs))
            for result in run.outputs:
                out += _encode_result(result)
        out += struct.pack("<H", len(case.memory))
        for region, offset, result in case.memory:
            out += struct.pack("<BQ", region, offset) + _encode_result(result)
    return bytes(out)


def _encode_result(result: Result) -> bytes:
    dtype = next(dtype for dtype in DType if np.dtype(dtype.numpy) == result.value.dtype)
    return struct.pack("<BfI", dtype, result.tolerance, result.value.nbytes) + result.value.tobytes()


def decode(data: bytes) -> list[Golden]:
    """The cases of a golden file; arrays are flat."""
    reader = _Reader(data)
    if reader.take(4) != MAGIC or reader.unpack("<I") != (VERSION,):
        raise ValueError("not a golden file of this version")
    (count,) = reader.unpack("<I")
    cases = [_decode_case(reader) for _ in range(count)]
    if reader.at != len(data):
        raise ValueError("a golden file with bytes too many")
    return cases


def _decode_case(reader: _Reader) -> Golden:
    name = reader.take(*reader.unpack("<H")).decode()
    status, size = reader.unpack("<II")
    artifact = reader.take(size)
    parsed = decode_artifact(artifact) if status == OK else None
    runs = []
    for _ in range(*reader.unpack("<H")):
        program, batch, learning_rate, step, seed, run_status = reader.unpack("<IIfQQI")
        inputs = []
        for port in range(*reader.unpack("<B")):
            assert parsed is not None
            code = parsed.programs[program]
            raw = reader.take(*reader.unpack("<I"))
            inputs.append(np.frombuffer(raw, code.tensors[code.inputs[port].tensor].dtype.numpy))
        outputs = [_decode_result(reader) for _ in range(*reader.unpack("<B"))]
        runs.append(Run(program, batch, inputs, outputs, learning_rate, step, seed, run_status))
    memory = []
    for _ in range(*reader.unpack("<H")):
        region, offset = reader.unpack("<BQ")
        memory.append((Region(region), offset, _decode_result(reader)))
    return Golden(name, artifact, runs, memory, status)


def _decode_result(reader: _Reader) -> Result:
    dtype, tolerance, size = reader.unpack("<BfI")
    return Result(np.frombuffer(reader.take(size), DType(dtype).numpy), tolerance)


@dataclass
class _Reader:
    data: bytes
    at: int = field(default=0)

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))


if __name__ == "__main__":
    main(sys.argv[1:])
