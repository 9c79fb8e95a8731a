"""One HTML file that shows a run. Nothing in it comes from elsewhere; it reads in light, dark and without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from evensong.coordinator import svg
from evensong.simulations.results import DeviceOutcome, Results, Sample


def write_report(results: Results, path: Path) -> None:
    """Writes the report."""
    path.write_text(render(results), encoding="utf-8")


def render(results: Results) -> str:
    """The whole page."""
    sections = [
        _headline(results),
        _learning(results),
        _devices("Each device, on examples that it never trained on", results.devices),
        _devices("People who never took part", results.newcomers) if results.newcomers else "",
        _samples(results.samples, results.classes),
        _traffic(results),
        _memory(results),
        _holdings(results),
        _figures(results),
    ]
    return _PAGE.format(title=escape(results.title), style=_STYLE, body="\n".join(filter(None, sections)))


def _headline(results: Results) -> str:
    accuracy, traffic = results.accuracy(), results.traffic
    ratio = traffic.float32_per_device_round / max(traffic.up_per_device_round, 1)
    tiles = [
        (f"{accuracy['federated']:.1%}", "federated model, mean over devices", f"before: {accuracy['before']:.1%}"),
        (
            f"{accuracy['personalised_mean']:.1%}",
            "personalised on each device",
            f"worst device: {accuracy['personalised_worst']:.1%} (federated {accuracy['federated_worst']:.1%})",
        ),
        (f"{ratio:.1f}×", "fewer bytes up than float32", f"{size(traffic.up_per_device_round)} per device and round"),
        (size(results.arena_bytes), "working memory to train", f"{results.parameters:,} parameters"),
        (f"{results.seconds:.0f} s", "in all", f"{len(results.devices)} devices, {len(results.rounds)} rounds"),
    ]
    cells = "".join(
        f"<li><b>{big}</b><span>{escape(what)}</span><small>{escape(more)}</small></li>" for big, what, more in tiles
    )
    saw = f"<p>{escape(results.coordinator_saw)}</p>" if results.coordinator_saw else ""
    return f'<ul class="tiles">{cells}</ul>{saw}'


def _learning(results: Results) -> str:
    points = [(float(each.number), each.accuracy) for each in results.rounds if each.accuracy is not None]
    if not points:
        return ""
    start = [(0.0, results.accuracy()["before"])]
    picture = svg.line_chart("Accuracy of the federated model over rounds", [*start, *points], x_label="round")
    note = "Each version is measured by the devices themselves, on examples that they hold back."
    if results.global_test:
        note += (
            f" On held-out examples of no device, the model went from {results.global_test['before']:.1%}"
            f" to {results.global_test['federated']:.1%}."
        )
    return _section("Learning together", picture, note)


def _devices(heading: str, devices: Sequence[DeviceOutcome]) -> str:
    rows = [(d.name, d.before, d.federated, d.personalised) for d in sorted(devices, key=lambda d: d.federated)]
    before, federated, personalised = (fmean(column) for column in zip(*(row[1:] for row in rows), strict=True))
    least = min(value for row in rows for value in row[2:])
    lowest = max(0.0, math.floor(least * 10 - 1e-9) / 10)
    picture = svg.dumbbells(heading, rows, (before, federated, personalised), lowest=lowest)
    legend = (
        '<p class="legend"><span class="key before">before</span><span class="key federated">federated</span>'
        '<span class="key personalised">personalised on the device</span></p>'
    )
    worst = min(rows, key=lambda row: row[3])
    note = (
        f"Sorted by the federated model. Personalisation takes the mean from {federated:.1%} to {personalised:.1%}; "
        f"the worst after it is {worst[0]} with {worst[3]:.1%}."
    )
    return _section(heading, legend + picture, note)


def _samples(samples: Sequence[Sample], classes: Sequence[str]) -> str:
    if not samples:
        return ""
    cards = []
    for sample in samples:
        verdicts = "".join(
            f'<li class="{"right" if guess == sample.label else "wrong"}">{escape(stage)}: {escape(classes[guess])} '
            f"{'✓' if guess == sample.label else '✗'}</li>"
            for stage, guess in (("federated", sample.federated), ("personalised", sample.personalised))
        )
        label = classes[sample.label]
        picture = svg.gray_picture(f"test example of {sample.device}: {label}", sample.picture)
        cards.append(
            f"<figure>{picture}<figcaption>{escape(label)}, {escape(sample.device)}"
            f"<ul>{verdicts}</ul></figcaption></figure>"
        )
    return _section(
        "Where personalisation changed an answer",
        f'<div class="samples">{"".join(cards)}</div>',
        "Test examples on which the federated and the personalised model disagree.",
    )


def _traffic(results: Results) -> str:
    traffic = results.traffic
    float32 = float(traffic.float32_per_device_round)
    rows = [
        (
            "up, as sent",
            traffic.up_per_device_round,
            _compared(traffic.up_per_device_round, float32),
            "fill-personalised",
        ),
        (
            "down, as received",
            traffic.down_per_device_round,
            _compared(traffic.down_per_device_round, float32),
            "fill-federated",
        ),
        ("float32, one way", float32, size(float32), "fill-plain"),
    ]
    note = "Counted by the devices: every byte of every message, check-ins, signatures and the artifact included."
    return _section("Bytes per device and round", svg.bars("Bytes per device and round", rows), note)


def _memory(results: Results) -> str:
    rows = [(name, float(count), size(count), "fill-federated") for name, count in results.memory.items()]
    note = "Known before anything runs: the compiler plans every tensor into one arena."
    return _section("Memory on a device", svg.bars("Memory on a device", rows), note) if rows else ""


def _holdings(results: Results) -> str:
    picture = svg.heat_map(
        "Training examples of each class on each device",
        [device.name for device in results.devices],
        results.classes,
        [device.class_counts for device in results.devices],
    )
    return _section(
        "What each device holds", picture, "Training examples of each class. They never leave their device."
    )


def _figures(results: Results) -> str:
    """Everything that the pictures show, as tables."""
    head = ("device", "trained on", "tested on", "before", "federated", "personalised")
    rows = [
        (
            d.name,
            str(d.train_examples),
            str(d.test_examples),
            *(f"{x:.1%}" for x in (d.before, d.federated, d.personalised)),
        )
        for d in (*results.devices, *results.newcomers)
    ]
    devices = _table(head, rows)
    rounds = _table(
        ("round", "seconds", "reports", "training loss", "accuracy", "updates up", "models down"),
        [
            (
                str(each.number),
                f"{each.seconds:.1f}",
                str(each.reports),
                f"{each.training_loss:.4f}",
                "" if each.accuracy is None else f"{each.accuracy:.1%}",
                size(each.bytes_up),
                size(each.bytes_down),
            )
            for each in results.rounds
        ],
    )
    notes = _table(("", ""), [("seed", str(results.seed)), *results.notes.items()])
    tables = f"<h3>Devices</h3>{devices}<h3>Rounds</h3>{rounds}<h3>Run</h3>{notes}"
    return f"<details><summary>All figures</summary>{tables}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) if any(head) else ""
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(heading: str, content: str, note: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}<p>{escape(note)}</p></section>"


def _compared(value: float, float32: float) -> str:
    return f"{size(value)} ({value / float32:.0%})"


def size(count: float) -> str:
    """Bytes as a person reads them: "14.3 kB" (powers of 1,000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


_STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --ink: #1d1d1f; --quiet: #5f6168; --rule: #d9d6ce; --card: #fff;
  --federated: #2257c4; --personalised: #b4530a; --before: #6f7178; --loss: #a01733; }
@media (prefers-color-scheme: dark) { :root { --page: #16171b; --ink: #eceae4; --quiet: #a5a6ad; --rule: #383a42;
  --card: #1f2026; --federated: #8db4ff; --personalised: #ffae66; --before: #a5a6ad; --loss: #ff8fa3; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 780px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; } p { color: var(--quiet); margin: .6rem 0 0; }
section, details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1.1rem 1.2rem;
  margin-top: 1.2rem; }
summary { cursor: pointer; font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: .8rem; padding: 0;
  margin: 1.4rem 0 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: .8rem .9rem;
  display: flex; flex-direction: column; }
.tiles b { font-size: 1.35rem; line-height: 1.2; } .tiles small { color: var(--quiet); margin-top: .3rem; }
.tiles span { font-size: .9rem; }
section { overflow-x: auto; }
.plot { width: 100%; min-width: 540px; height: auto; display: block;
  font: 13px system-ui, sans-serif; } .plot text { fill: var(--ink); }
.plot .quiet { fill: var(--quiet); } .plot .strong { font-weight: 650; } .plot .small { font-size: 11.5px; }
.plot .federated-text { fill: var(--federated); } .plot .on-dark { fill: var(--card); }
.grid { stroke: var(--rule); stroke-width: 1; } .rule { stroke: var(--quiet); stroke-width: 1; }
.curve { fill: none; stroke: var(--federated); stroke-width: 2.5; stroke-linejoin: round; }
circle.federated { fill: var(--federated); } circle.before { fill: var(--card); stroke: var(--before); stroke-width: 2;
} polygon.personalised { fill: var(--personalised); stroke: var(--card); stroke-width: 1.5; }
.learned { stroke: var(--rule); stroke-width: 2; } .gain { stroke: var(--personalised); stroke-width: 4; stroke-opacity:
.5; } .loss { stroke: var(--loss); stroke-width: 3; stroke-dasharray: 4 3; }
.fill-federated, .cell { fill: var(--federated); } .fill-personalised { fill: var(--personalised); }
.fill-plain { fill: var(--before); }
.legend { display: flex; flex-wrap: wrap; gap: 1.2rem; margin: 0 0 .3rem; font-size: .9rem; color: var(--ink); }
.key::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 50%; }
.key.before::before { border: 2px solid var(--before); width: .55em; height: .55em; }
.key.federated::before { background: var(--federated); }
.key.personalised::before { background: var(--personalised); border-radius: 0; transform: rotate(45deg) scale(.9); }
.samples { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; width: 150px; }
.ink { fill: var(--ink); border: 1px solid var(--rule); border-radius: 6px; }
figcaption { font-size: .85rem; } figcaption ul { list-style: none; margin: 0; padding: 0; }
.right { color: var(--quiet); } .wrong { color: var(--loss); font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--rule); font-weight: 400; }
thead th { color: var(--quiet); } th[scope=row] { text-align: left; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main><h1>{title}</h1>
<p>Devices learn where the data lives: no example left its device.</p>
{body}
</main></body></html>
"""
