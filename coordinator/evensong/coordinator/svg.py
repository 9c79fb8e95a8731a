"""Pictures as SVG strings, for a page that gives colours and fonts by class; :func:`standalone` makes one a file.

Every picture carries a title for screen readers; marks differ by shape as well as by colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

WIDTH = 720
_LEFT, _RIGHT = 92, 24


def line_chart(title: str, points: Sequence[tuple[float, float]], *, x_label: str, lowest: float = 0.0) -> str:
    """A curve of fractions (y in [``lowest``, 1], shown as per cent) over rounds, with its last value written out."""
    height, top, bottom = 260, 16, 44
    last = max((x for x, _ in points), default=1.0) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (WIDTH - _LEFT - _RIGHT - 44) * x / last,
            top + (height - top - bottom) * (1 - (y - lowest) / (1 - lowest)),
        )

    parts = []
    for value in _percentages(lowest):
        _, y = place(0, value)
        parts.append(_line(_LEFT, y, WIDTH - _RIGHT - 44, y, "grid"))
        parts.append(_text(_LEFT - 8, y + 4, f"{value:.0%}", "end"))
    for value in _ticks(last):
        x, _ = place(value, lowest)
        parts.append(_text(x, height - bottom + 18, f"{value:g}", "middle"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT - 44) / 2, height - 6, x_label, "middle", "quiet"))
    places = [place(x, max(y, lowest)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline points="{path}" class="curve federated"/>')
    for (x, y), (number, value) in zip(places, points, strict=True):
        parts.append(_dot(x, y, "federated", f"{x_label} {number:g}: {value:.1%}", radius=2.5))
    if points:
        x, y = places[-1]
        parts.append(_text(x + 8, y + 4, f"{points[-1][1]:.1%}", "start", "strong federated-text"))
    return _picture(title, height, parts)


def rising_chart(
    title: str, points: Sequence[tuple[float, float]], *, x_label: str, y_label: str, limit: float | None = None
) -> str:
    """A curve from 0 on, with its last value written out, and a line at ``limit``."""
    height, top, bottom, right = 260, 22, 44, WIDTH - _RIGHT - 44
    last = max((x for x, _ in points), default=1.0) or 1.0
    largest = 1.08 * max([y for _, y in points] + ([limit] if limit else []), default=1.0) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (right - _LEFT) * x / last, top + (height - top - bottom) * (1 - y / largest)

    step = 10.0 ** math.floor(math.log10(largest))
    step *= next(factor for factor in (0.2, 0.5, 1.0, 2.0) if largest / (step * factor) <= 6)
    parts = [_text(_LEFT, 12, y_label, "middle", "quiet")]
    for index in range(int(largest / step) + 1):
        _, y = place(0, index * step)
        parts.append(_line(_LEFT, y, right, y, "grid"))
        parts.append(_text(_LEFT - 8, y + 4, f"{index * step:g}", "end"))
    parts += [_text(place(x, 0)[0], height - bottom + 18, f"{x:g}", "middle") for x in _ticks(last)]
    parts.append(_text((_LEFT + right) / 2, height - 6, x_label, "middle", "quiet"))
    if limit is not None:
        _, y = place(0, limit)
        parts.append(_line(_LEFT, y, right, y, "rule limit"))
        parts.append(_text(right + 6, y + 4, f"{limit:g}", "start", "quiet"))
    places = [place(x, y) for x, y in points]
    parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" class="curve federated"/>')
    if points:
        x, y = places[-1]
        parts.append(_dot(x, y, "federated", f"{x_label} {points[-1][0]:g}: {points[-1][1]:.4g}", radius=3))
        parts.append(_text(x + 6, y + 16, f"{points[-1][1]:.3g}", "start", "strong"))
    return _picture(title, height, parts)


def standalone(picture: str) -> str:
    """A picture as a file of its own, with plain colours that read on light and dark."""
    return picture.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" ', 1).replace(
        "</title>", f"</title><style>{_PLAIN}</style>", 1
    )


_PLAIN = """
text { font: 13px system-ui, sans-serif; fill: #777 } .strong { font-weight: 600; fill: #3b6ea5 }
.grid { stroke: #8884; } .rule { stroke: #888; } .limit { stroke: #b5493b; stroke-dasharray: 5 4 }
.curve { fill: none; stroke: #3b6ea5; stroke-width: 2 } .federated { fill: #3b6ea5 } polyline.federated { fill: none }
"""


def dumbbells(
    title: str,
    rows: Sequence[tuple[str, float, float, float]],
    means: tuple[float, float, float],
    *,
    lowest: float = 0.0,
) -> str:
    """One row a device: before (ring), federated (dot) and personalised (diamond), with a bar over the gain; means
    below.

    ``rows`` are (name, before, federated, personalised), drawn in the given order.
    """
    row_height, top = 24, 26
    height = top + row_height * (len(rows) + 1) + 34

    def place(value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (max(value, lowest) - lowest) / (1 - lowest)

    parts = []
    for value in _percentages(lowest):
        parts.append(_line(place(value), top - 8, place(value), height - 34, "grid"))
        parts.append(_text(place(value), height - 16, f"{value:.0%}", "middle"))
    for index, (name, *values) in enumerate([*rows, ("mean", *means)]):
        y = top + row_height * index + row_height / 2 - 4
        is_mean = index == len(rows)
        if is_mean:
            parts.append(_line(_LEFT - 84, y - row_height / 2, WIDTH - _RIGHT, y - row_height / 2, "rule"))
        before, federated, personalised = values
        parts.append(_text(_LEFT - 10, y + 4, name, "end", "strong" if is_mean else ""))
        parts.append(_line(place(before), y, place(federated), y, "learned"))
        gained = "gain" if personalised >= federated else "loss"
        parts.append(_line(place(federated), y, place(personalised), y, gained))
        parts.append(_ring(place(before), y, f"{name}, before: {before:.1%}"))
        if before < lowest:
            parts.append(_text(place(before) + 10, y - 3, f"{before:.0%}", "start", "small quiet"))
        parts.append(_dot(place(federated), y, "federated", f"{name}, federated: {federated:.1%}", radius=5))
        parts.append(_diamond(place(personalised), y, f"{name}, personalised: {personalised:.1%}"))
    return _picture(title, height, parts)


def bars(title: str, rows: Sequence[tuple[str, float, str, str]]) -> str:
    """Horizontal bars: (name, value, text at the end, class)."""
    row_height, left = 30, 190
    height = row_height * len(rows) + 8
    largest = max((value for _, value, _, _ in rows), default=1.0) or 1.0
    parts = []
    for index, (name, value, note, kind) in enumerate(rows):
        y = 4 + row_height * index
        length = (WIDTH - left - 130) * value / largest
        parts.append(_text(left - 10, y + 19, name, "end"))
        parts.append(
            f'<rect x="{left}" y="{y + 4}" width="{max(length, 1):.1f}" height="{row_height - 10}" class="{kind}">'
            f"<title>{escape(name)}: {escape(note)}</title></rect>"
        )
        parts.append(_text(left + length + 8, y + 19, note, "start"))
    return _picture(title, height, parts)


def heat_map(title: str, names: Sequence[str], classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """How many examples of each class (columns) each device (rows) holds: as a number, and the darker the more."""
    row_height, top = 24, 40
    height = top + row_height * len(names) + 4
    column = (WIDTH - _LEFT - _RIGHT) / max(len(classes), 1)
    largest = max((count for row in counts for count in row), default=1) or 1
    parts = [
        _text(_LEFT + column * (index + 0.5), top - 8 - 14 * (len(words) - 1 - line), word, "middle", "small")
        for index, words in enumerate(name.split() for name in classes)
        for line, word in enumerate(words)
    ]
    for row, (name, values) in enumerate(zip(names, counts, strict=True)):
        y = top + row_height * row
        parts.append(_text(_LEFT - 10, y + 16, name, "end"))
        for index, count in enumerate(values):
            x, share = _LEFT + column * index, count / largest
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y + 1}" width="{column - 2:.1f}" height="{row_height - 2}" class="cell" '
                f'fill-opacity="{share:.3f}"><title>{escape(name)}, {escape(classes[index])}: {count}</title></rect>'
            )
            if count:
                contrast = "on-dark" if share > 0.55 else ""
                parts.append(_text(x + column / 2, y + 16, str(count), "middle", f"small {contrast}"))
    return _picture(title, height, parts)


def gray_picture(title: str, pixels: Sequence[Sequence[float]], size: int = 64) -> str:
    """A small picture of grey values in [0, 1], 1 being ink."""
    rows, columns = len(pixels), len(pixels[0])
    cells = "".join(
        f'<rect x="{x}" y="{y}" width="1.02" height="1.02" fill-opacity="{value:.2f}"/>'
        for y, row in enumerate(pixels)
        for x, value in enumerate(row)
        if value > 0.01
    )
    return (
        f'<svg viewBox="0 0 {columns} {rows}" width="{size}" height="{size}" role="img" class="ink">'
        f"<title>{escape(title)}</title>{cells}</svg>"
    )


# -------------------------------------------------------------------------------------------------------------- marks


def _picture(title: str, height: float, parts: Sequence[str]) -> str:
    content = f"<title>{escape(title)}</title>{''.join(parts)}"
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" class="plot">{content}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _dot(x: float, y: float, kind: str, title: str, *, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"><title>{escape(title)}</title></circle>'


def _ring(x: float, y: float, title: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="before"><title>{escape(title)}</title></circle>'


def _diamond(x: float, y: float, title: str) -> str:
    corners = f"{x:.1f},{y - 7:.1f} {x + 7:.1f},{y:.1f} {x:.1f},{y + 7:.1f} {x - 7:.1f},{y:.1f}"
    return f'<polygon points="{corners}" class="personalised"><title>{escape(title)}</title></polygon>'


def _percentages(lowest: float) -> list[float]:
    """Four to seven round fractions from ``lowest``, a multiple of 0.1, to 1."""
    span = round(100 * (1 - lowest))
    step = next(step for step in (2, 5, 10, 20) if span / step <= 6)
    return [(100 - value) / 100 for value in range(0, span + 1, step)]


def _ticks(last: float) -> list[float]:
    """About eight round numbers from 0 to ``last``."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
    step = next((step for step, larger in pairwise(steps) if last / step <= 8 and larger), steps[-1])
    return [float(value) for value in range(0, int(last) + 1, step)]
