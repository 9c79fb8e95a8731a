"""How much memory an artifact needs, told from the artifact alone before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evensong.wire.artifact import align
from evensong.wire.program import Artifact, Program, Region, Tensor, VariableFlag

_LARGEST = 12


@dataclass(frozen=True)
class LiveTensor:
    """A scratch tensor (or several that share its memory) alive where a program needs the most; ``places`` made it."""

    nbytes: int
    dims: tuple[int, ...]
    op: str
    place: str


@dataclass(frozen=True)
class ProgramMemory:
    """Scratch of one program, in bytes; ``lower_bound`` is what the tensors alive at the worst operation take
    together.
    """

    name: str
    max_batch: int
    arena: int
    workspace: int
    lower_bound: int
    peak_op: str
    live: tuple[LiveTensor, ...]  #: alive at ``peak_op``, largest first


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that a device needs. ``const`` can stay in the file's pages; state, slots and scratch are real memory.

    ``statistics`` counts the running statistics in ``state``: training keeps a second copy, to undo a diverged step.
    """

    programs: tuple[ProgramMemory, ...]
    const: int
    state: int
    slots: int
    statistics: int

    def program(self, name: str) -> ProgramMemory | None:
        """The scratch of one program, or None if the artifact lacks it."""
        return next((program for program in self.programs if program.name == name), None)

    @property
    def inference_peak(self) -> int:
        """State and the scratch of ``predict``."""
        return self._with_scratch("predict")

    @property
    def training_peak(self) -> int:
        """State, optimiser slots and the scratch of ``train``; 0 for an artifact that cannot train."""
        return self._with_scratch("train") + self.slots + self.statistics if self.program("train") else 0

    @property
    def peak(self) -> int:
        """What an engine allocates once for all programs, besides the constants; a budget is held against it."""
        arena = max((program.arena for program in self.programs), default=0)
        workspace = max((program.workspace for program in self.programs), default=0)
        return self.state + self.slots + self.statistics + arena + workspace

    def _with_scratch(self, name: str) -> int:
        program = self.program(name)
        return self.state + (program.arena + program.workspace if program else 0)

    def __str__(self) -> str:
        rows = [("program", "batch", "arena", "workspace", "lower bound")]
        rows += [
            (p.name, str(p.max_batch), f"{p.arena:,}", f"{p.workspace:,}", f"{p.lower_bound:,}") for p in self.programs
        ]
        rest = [
            f"const {self.const:,}   state {self.state:,}   optimiser slots {self.slots:,}",
            f"bytes to predict {self.inference_peak:,}"
            + (f", to train {self.training_peak:,}" if self.training_peak else "")
            + f", for any of it {self.peak:,}",
        ]
        return "\n".join([*_table(rows), *rest])

    def explain(self, name: str | None = None) -> str:
        """The largest tensors alive at the worst operation of one program, or of each."""
        return "\n\n".join(_explain(program) for program in self.programs if name in (None, program.name))


def memory_report(artifact: Artifact) -> MemoryReport:
    """What ``artifact`` needs; module names come from its manifest."""
    places = artifact.manifest.get("places")
    names = places if isinstance(places, dict) else {}
    return MemoryReport(
        tuple(_program_memory(program, names.get(program.name)) for program in artifact.programs),
        len(artifact.const),
        len(artifact.state),
        artifact.slot_bytes,
        sum(align(variable.nbytes) for variable in artifact.variables if variable.flags & VariableFlag.BUFFER),
    )


def _program_memory(program: Program, places: object) -> ProgramMemory:
    names = [str(place) for place in places] if isinstance(places, list) else []
    names += [""] * (len(program.ops) - len(names))
    blocks = _blocks(program)
    sums = [sum(b.tensor.nbytes for b in blocks if b.first <= at <= b.last) for at in range(len(program.ops))]
    peak = max(range(len(sums)), key=lambda at: (sums[at], -at), default=-1)
    live = sorted((b for b in blocks if b.first <= peak <= b.last), key=lambda b: (-b.tensor.nbytes, b.first))
    return ProgramMemory(
        program.name,
        program.max_batch,
        program.arena_bytes,
        program.workspace_bytes,
        sums[peak] if sums else 0,
        f"{program.ops[peak].name} {names[peak]}".strip() if sums else "",
        tuple(LiveTensor(b.tensor.nbytes, b.tensor.dims, program.ops[b.first].name, names[b.first]) for b in live),
    )


@dataclass
class _Block:
    """One stretch of the arena from the operation that first writes it to the last that uses it."""

    tensor: Tensor
    first: int
    last: int


def _blocks(program: Program) -> list[_Block]:
    """Scratch values over time. A write starts a new value unless the operation works in place on the old one."""
    current: dict[int, _Block] = {}
    blocks: list[_Block] = []
    for at, op in enumerate(program.ops):
        read = {program.tensors[i].offset for i in op.inputs if program.tensors[i].region == Region.ARENA}
        for offset in read & current.keys():
            current[offset].last = at
        for index in op.outputs:
            tensor = program.tensors[index]
            if tensor.region != Region.ARENA:
                continue
            if tensor.offset in read:
                continue
            current[tensor.offset] = _Block(tensor, at, at)
            blocks.append(current[tensor.offset])
    return blocks


def _explain(program: ProgramMemory) -> str:
    rows = [("bytes", "dims", "made by", "in")]
    rows += [(f"{t.nbytes:,}", "x".join(map(str, t.dims)), t.op, t.place) for t in program.live[:_LARGEST]]
    more = len(program.live) - _LARGEST
    title = f"{program.name}: {program.lower_bound:,} bytes alive at {program.peak_op}"
    return "\n".join([title, *_table(rows), *([f"and {more} smaller ones"] if more > 0 else [])])


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
