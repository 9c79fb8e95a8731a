"""What every benchmark shares: rows, timing in turns, and the table.

A benchmark is a module of this package with one function ``run(only: str) -> Iterator[Row]``: it yields the rows whose
names fit the shell pattern ``only`` (see :func:`wanted`) as they are measured.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Row:
    """One line of the table: a comparison (``ours`` and ``peer``), or with ``peer`` None a plain value.

    ``ratio`` over 1 always means that ours is better, whichever way ``better`` points.
    """

    name: str
    ours: float
    peer: float | None
    unit: str
    better: Better

    @property
    def ratio(self) -> float | None:
        if self.peer is None:
            return None
        return self.peer / self.ours if self.better == "lower" else self.ours / self.peer

    def as_json(self) -> dict[str, object]:
        """``name, ours, peer, ratio, unit, better``, or ``name, value, unit, better`` without a peer."""
        if self.peer is None:
            return {"name": self.name, "value": self.ours, "unit": self.unit, "better": self.better}
        return {
            "name": self.name,
            "ours": self.ours,
            "peer": self.peer,
            "ratio": self.ratio,
            "unit": self.unit,
            "better": self.better,
        }

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.name}: {self.ours:.4g} {self.unit}"
        return (
            f"{self.name}: ours {self.ours:.4g} {self.unit}, peer {self.peer:.4g} {self.unit}, ratio {self.ratio:.2f}"
        )


def wanted(name: str, only: str) -> bool:
    """Whether the row ``name`` was asked for."""
    return fnmatch.fnmatchcase(name, only)


def in_turns(
    ours: Callable[[], object], peer: Callable[[], object], *, seconds: float = 6.0, block_seconds: float = 0.1
) -> tuple[float, float]:
    """Seconds per call of each, from blocks of calls taken in turns.

    Machines are shared and change their clock, so the two run in turns, each in blocks long enough to fill its own
    caches, and the best block of each counts: the one that was disturbed least. The process's CPU time is what is
    measured, all its threads together: equal to the wall clock for one thread on a quiet machine, and still right on a
    busy one.
    """
    for function in (ours, peer):  # warm up: allocations, lazy initialisation, caches
        for _ in range(3):
            function()
    counts = [_calls_per_block(function, block_seconds) for function in (ours, peer)]
    best = [float("inf"), float("inf")]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for which, function in enumerate((ours, peer)):
            best[which] = min(best[which], _seconds_per_call(function, counts[which]))
    return best[0], best[1]


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | ours | peer | ratio (over 1: ours is better) |", "|---|---:|---:|---:|"]
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:.4g} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.name} | {row.ours:.4g} {row.unit} | {peer} | {ratio} |")
    return "\n".join(lines)


def _calls_per_block(function: Callable[[], object], block_seconds: float) -> int:
    once = _seconds_per_call(function, 1)
    return 1 if once > block_seconds else max(1, int(block_seconds / max(_seconds_per_call(function, 10), 1e-6)))


def _seconds_per_call(function: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls
