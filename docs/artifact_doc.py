"""Fills in the generated parts of ``docs/artifact.md``: ``python docs/artifact_doc.py``."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from evensong.mobile_runtime.signatures import SIGNATURES
from evensong.wire.program import OPS, DType, Region

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "artifact.md"
SMALLEST = ROOT / "protos" / "vectors" / "artifact" / "smallest.evsg"


def main() -> None:
    DOCUMENT.write_text(filled_in(DOCUMENT.read_text()))
    print(f"wrote {DOCUMENT.name}")


def filled_in(text: str) -> str:
    """``text`` with its generated parts made anew."""
    for part, content in {"bytes": annotated(SMALLEST.read_bytes()), "operations": operations_table()}.items():
        before, _, rest = text.partition(f"<!-- {part}: begin")
        remark, _, rest = rest.partition("-->")
        _, _, after = rest.partition(f"<!-- {part}: end -->")
        text = f"{before}<!-- {part}: begin{remark}-->\n{content}\n<!-- {part}: end -->{after}"
    return text


def operations_table() -> str:
    """One Markdown row an operation."""
    titles = ("code", "operation", "operands", "attributes", "signature", "in place", "meaning")
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, spec in OPS.items():
        operands = " ".join(
            f"**{operand}**" if position in spec.updates else operand for position, operand in enumerate(spec.inputs)
        )
        if spec.variadic:
            operands += " ..."
        cells = (
            str(spec.code),
            name,
            f"{operands} → {' '.join(spec.outputs)}".strip(),
            " ".join(attr.partition(":")[0] for attr in spec.attrs),
            f"`{SIGNATURES[name]}`",
            " ".join(spec.inputs[source] for source, _ in spec.inplace),
            spec.doc,
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    rows.append("\nBold operands are updated.")
    return "\n".join(rows)


# ------------------------------------------------------------------------------------------- the annotated example


def annotated(data: bytes) -> str:
    """A Markdown code block: every byte of the artifact ``data``, field by field."""
    lines = ["```text"]
    for offset, length, meaning in _fields(data):
        shown = data[offset : offset + length]
        digits = shown[:12].hex(" ") + (" ..." if length > 12 else "")
        lines.append(f"{offset:5d}  {digits:<39} {meaning}".rstrip())
    return "\n".join([*lines, "```"])


def _fields(data: bytes) -> Iterator[tuple[int, int, str]]:
    """``(offset, length, meaning)``. Written against the specification and not with :mod:`evensong.wire.artifact`."""
    walk = _Walk(data)
    yield walk.text(4, "magic")
    for layout, meaning in (("H", "major"), ("H", "minor"), ("Q", "bytes of the file")):
        yield walk.number(layout, meaning)
    yield walk.raw(4, "CRC32C of everything from byte 64")
    yield walk.number("I", "sections")
    sections = walk.value
    yield walk.raw(40, "zero")
    places = []
    for _ in range(sections):
        kind, _, offset, length = struct.unpack_from("<IIQQ", data, walk.offset)
        name = _SECTIONS.get(kind, "unknown")
        yield walk.raw(24, f"section {kind} {name}: at {offset}, {length} bytes")
        places.append((offset, length, name))
    for offset, length, name in places:
        if walk.offset < offset:
            yield walk.raw(offset - walk.offset, f"padding to a multiple of 64 before {name}")
        if name == "VARIABLES":
            yield from _variables(walk)
        elif name == "PROGRAMS":
            yield from _programs(walk)
        elif name == "MANIFEST":
            yield walk.raw(length, f"{name}: {data[offset : offset + length].decode()}")
        elif length:
            yield walk.raw(length, f"{name}, as float32: {list(struct.unpack_from(f'<{length // 4}f', data, offset))}")


_SECTIONS = {1: "MANIFEST", 2: "VARIABLES", 3: "PROGRAMS", 4: "CONST", 5: "STATE"}


class _Walk:
    """A position in the bytes that moves on with every field."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0
        self.value = 0  #: the last number

    def raw(self, length: int, meaning: str) -> tuple[int, int, str]:
        field = (self.offset, length, meaning)
        self.offset += length
        return field

    def text(self, length: int, meaning: str) -> tuple[int, int, str]:
        return self.raw(length, f"{meaning} {self.data[self.offset : self.offset + length].decode()!r}")

    def number(self, layout: str, meaning: str) -> tuple[int, int, str]:
        (self.value,) = struct.unpack_from("<" + layout, self.data, self.offset)
        return self.raw(struct.calcsize("<" + layout), f"{meaning}: {self.value}")

    def numbers(self, layout: str, meaning: str) -> tuple[int, int, str]:
        values = struct.unpack_from("<" + layout, self.data, self.offset)
        return self.raw(struct.calcsize("<" + layout), f"{meaning}: {', '.join(map(str, values))}")

    def name(self, meaning: str) -> Iterator[tuple[int, int, str]]:
        yield self.number("H", f"length of the {meaning}'s name")
        yield self.text(self.value, f"{meaning}'s name")


def _variables(walk: _Walk) -> Iterator[tuple[int, int, str]]:
    yield walk.number("I", "VARIABLES, count")
    count = walk.value
    yield walk.number("Q", "bytes of STATE")
    yield walk.number("Q", "bytes of SLOTS")
    for _ in range(count):
        yield from walk.name("variable")
        rank = walk.data[walk.offset + 2]
        yield walk.numbers("BBBB", "dtype, flags, rank, zero")
        yield walk.numbers(f"{rank}I", "dimensions")
        yield walk.numbers(f"{rank}B", "permutation")
        yield walk.number("Q", "offset in STATE")


def _programs(walk: _Walk) -> Iterator[tuple[int, int, str]]:
    yield walk.number("I", "PROGRAMS, count")
    for _ in range(walk.value):
        yield from walk.name("program")
        yield walk.number("I", "max_batch")
        yield walk.number("Q", "bytes of ARENA")
        yield walk.number("Q", "bytes of workspace")
        for side in ("input port", "output port"):
            yield walk.number("B", f"{side}s")
            for _ in range(walk.value):
                yield from walk.name(side)
                yield walk.number("I", f"{side}'s tensor")
        yield walk.number("I", "tensors")
        for index in range(walk.value):
            dtype, region, rank, _ = walk.data[walk.offset : walk.offset + 4]
            title = f"tensor {index} ({DType(dtype).name}, {Region(region).name}): dtype, region, rank, batched"
            yield walk.numbers("BBBB", title)
            yield walk.numbers(f"{rank}I", "dimensions")
            yield walk.number("Q", "offset")
            yield walk.numbers("fi", "scale, zero point")
        yield walk.number("I", "operations")
        for _ in range(walk.value):
            code, inputs, outputs, attributes = struct.unpack_from("<HBBB", walk.data, walk.offset)
            name = next(name for name, spec in OPS.items() if spec.code == code)
            yield walk.numbers("HBBBB", f"{name}: code, inputs, outputs, attributes, zero")
            yield walk.numbers(f"{inputs + outputs}I", "tensors of inputs, then outputs")
            if attributes:
                yield walk.raw(4 * attributes, "attributes")


if __name__ == "__main__":
    main()
