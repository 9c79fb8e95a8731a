"""Where each scratch tensor lies: lifetimes, in-place results, and offsets in one arena.

Offline storage allocation is NP-hard; greedy-by-size with best fit (Pisarchyk and Lee, *Efficient memory management
for deep neural net inference*, MLSys 2020) usually reaches the lower bound, the largest sum of live bytes. Several
orders are tried and the best is mended by local search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from evensong.mobile_runtime.compiler.ir import Graph, Node, Value, nbytes
from evensong.wire.artifact import align
from evensong.wire.program import OPS, Region

_TRIES, _WORK = 2000, 4_000_000  #: moves of the local search, and a limit on moves times tensors squared


@dataclass(frozen=True)
class Lifetime:
    """``nbytes`` needed from step ``first`` to step ``last``, both included."""

    nbytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Plan:
    """Offsets of the scratch values (by root), the arena's size, and the bound that no plan can beat."""

    offsets: dict[Value, int]
    arena_bytes: int
    lower_bound: int


def plan(graph: Graph, batch: int) -> Plan:
    """Places every ARENA value of ``graph`` for runs of at most ``batch`` examples."""
    buffers, owners = _buffers(graph, batch)
    lifetimes = list(buffers.values())
    placed = dict(zip(buffers, place(lifetimes), strict=True))
    arena = max((placed[owner] + align(span.nbytes) for owner, span in buffers.items()), default=0)
    offsets = {value: placed[owner] for value, owner in owners.items()}
    return Plan(offsets, arena, lower_bound(lifetimes))


def peak(graph: Graph, batch: int) -> int:
    """The bound on the arena that :func:`plan` would have, without looking for offsets."""
    return lower_bound(_buffers(graph, batch)[0].values())


def place(lifetimes: Sequence[Lifetime]) -> list[int]:
    """An offset for each lifetime such that no two that meet overlap; multiples of the alignment."""
    sizes = [align(item.nbytes) for item in lifetimes]
    orders: list[Callable[[int], tuple[int, ...]]] = [
        lambda i: (-sizes[i], lifetimes[i].first, i),
        lambda i: (-sizes[i] * (lifetimes[i].last - lifetimes[i].first + 1), i),
        lambda i: (-(lifetimes[i].last - lifetimes[i].first), -sizes[i], i),
        lambda i: (lifetimes[i].first, -sizes[i], i),
        lambda i: (-lifetimes[i].last, -sizes[i], i),
    ]
    bound = lower_bound(lifetimes)
    starts = [sorted(range(len(lifetimes)), key=key) for key in orders]
    tried = [(_greedy(sizes, lifetimes, order), order) for order in starts]
    best, order = min(tried, key=lambda found: _height(found[0], sizes))
    random = Random(0)  # random() of a given seed is the same in every version of Python
    for _ in range(min(_TRIES, _WORK // max(1, len(order) ** 2))):
        if _height(best, sizes) == bound:
            break
        changed = order.copy()
        changed.insert(int(random.random() * len(order)), changed.pop(int(random.random() * len(order))))
        offsets = _greedy(sizes, lifetimes, changed)
        if _height(offsets, sizes) <= _height(best, sizes):
            best, order = offsets, changed
    return best


def _height(offsets: Sequence[int], sizes: Sequence[int]) -> int:
    return max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)


def lower_bound(lifetimes: Iterable[Lifetime]) -> int:
    """The largest sum of aligned bytes alive at one step."""
    changes: dict[int, int] = {}
    for item in lifetimes:
        size = align(item.nbytes)
        changes[item.first] = changes.get(item.first, 0) + size
        changes[item.last + 1] = changes.get(item.last + 1, 0) - size
    live = peak = 0
    for step in sorted(changes):
        live += changes[step]
        peak = max(peak, live)
    return peak


def _greedy(sizes: Sequence[int], lifetimes: Sequence[Lifetime], order: Sequence[int]) -> list[int]:
    """Best fit: each in turn goes into the smallest gap between those placed that meet it, else on top."""
    offsets = [-1] * len(sizes)
    for index in order:
        neighbours = sorted(
            (offsets[other], sizes[other])
            for other in range(len(sizes))
            if offsets[other] >= 0 and lifetimes[other].meets(lifetimes[index])
        )
        best, best_gap, end = -1, -1, 0
        for offset, size in neighbours:
            gap = offset - end
            if gap >= sizes[index] and (best_gap < 0 or gap < best_gap):
                best, best_gap = end, gap
            end = max(end, offset + size)
        offsets[index] = best if best >= 0 else end
    return offsets


def _buffers(graph: Graph, batch: int) -> tuple[dict[Value, Lifetime], dict[Value, Value]]:
    """The lifetime of each stretch of memory, by the value that owns it, and the owner of every scratch value."""
    spans = _spans(graph, batch)
    shared = _share_in_place(graph, spans, batch)
    buffers: dict[Value, Lifetime] = {}
    owners: dict[Value, Value] = {}
    for value, span in spans.items():
        owner = owners[value] = _owner(shared, value)
        known = buffers.get(owner)
        if known is not None:
            span = Lifetime(max(known.nbytes, span.nbytes), min(known.first, span.first), max(known.last, span.last))
        buffers[owner] = span
    return buffers, owners


def _spans(graph: Graph, batch: int) -> dict[Value, Lifetime]:
    spans: dict[Value, Lifetime] = {}
    for step, node in enumerate(graph.nodes):
        for value in (*node.inputs, *node.outputs):
            root = value.root
            if root.region == Region.ARENA:
                first = spans[root].first if root in spans else step
                spans[root] = Lifetime(nbytes(root, batch), first, step)
    return spans


def _share_in_place(graph: Graph, spans: dict[Value, Lifetime], batch: int) -> dict[Value, Value]:
    """Results that take over the memory of an operand that nobody reads later: result -> operand (roots)."""
    shared: dict[Value, Value] = {}
    for step, node in enumerate(graph.nodes):
        taken: set[Value] = set()
        for source_at, result_at in OPS[node.op].inplace:
            if result_at >= len(node.outputs) or source_at >= len(node.inputs):
                continue
            source, result = node.inputs[source_at].root, node.outputs[result_at].root
            if result in shared or source in taken or result not in spans or source not in spans:
                continue
            if spans[source].last == step and _fits(node, source_at, source, result, batch):
                shared[result] = source
                taken.add(source)
    return shared


def _fits(node: Node, source_at: int, source: Value, result: Value, batch: int) -> bool:
    alone = all(value.root is not source for at, value in enumerate(node.inputs) if at != source_at)
    same = source.dtype == result.dtype and source.batched == result.batched
    return alone and same and nbytes(source, batch) == nbytes(result, batch)


def _owner(shared: dict[Value, Value], value: Value) -> Value:
    while value in shared:
        value = shared[value]
    return value
