"""The report stands on its own and says what the figures say; results.json has the keys that others read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evensong.simulations.report import render, size, write_report
from evensong.simulations.results import DeviceOutcome, Results, RoundOutcome, Sample, Traffic, write_json

RESULTS = Results(
    title="Two devices",
    dataset="digits",
    classes=("zero", "one"),
    devices=(
        DeviceOutcome("left", 30, 10, (30, 0), before=0.1, federated=0.9, personalised=1.0),
        DeviceOutcome("right", 30, 10, (2, 28), before=0.3, federated=0.8, personalised=0.7),
    ),
    rounds=(
        RoundOutcome(1, 0.5, 2, 2.25, 2_000, 8_000, 0.5),
        RoundOutcome(2, 1.0, 2, 0.75, 2_000, 8_000, None),
        RoundOutcome(3, 1.5, 2, 0.25, 2_000, 8_000, 0.85),
    ),
    traffic=Traffic(1_000.0, 4_100.0, 4_000),
    parameters=1_000,
    arena_bytes=12_345,
    memory={"training": 20_000, "inference": 5_000},
    seconds=12.5,
    seed=3,
    global_test={"before": 0.1, "federated": 0.84},
    samples=(Sample("left", ((0.0, 1.0), (0.5, 0.0)), 1, 0, 0, 1),),
    notes={"engine": "native"},
)


def test_results_json_has_the_agreed_keys(tmp_path: Path) -> None:
    write_json(RESULTS, tmp_path / "results.json")
    document = json.loads((tmp_path / "results.json").read_text())
    accuracy = document["accuracy"]
    assert accuracy["before"] == pytest.approx(0.2)
    assert accuracy["federated"] == pytest.approx(0.85)
    assert accuracy["personalised_mean"] == pytest.approx(0.85)
    assert accuracy["personalised_worst"] == 0.7
    assert document["bytes"] == {
        "up_per_device_round": 1_000.0,
        "down_per_device_round": 4_100.0,
        "float32_per_device_round": 4_000,
    }
    assert (document["arena_bytes"], document["rounds"], document["devices"], document["seconds"]) == (
        12_345,
        3,
        2,
        12.5,
    )
    assert document["global_test"]["federated"] == 0.84
    assert "newcomers" not in document


def test_newcomers_are_reported_apart() -> None:
    late = DeviceOutcome("late", 30, 10, (15, 15), before=0.0, federated=0.5, personalised=0.9)
    results = replace(RESULTS, newcomers=(late,))
    document = results.to_json()
    assert document["accuracy"] == RESULTS.to_json()["accuracy"]
    assert isinstance(document["newcomers"], dict)
    assert document["newcomers"]["accuracy"]["personalised_mean"] == 0.9
    assert "never took part" in render(results)


def test_the_report_needs_nothing_but_itself(tmp_path: Path) -> None:
    write_report(RESULTS, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script", page)
    _Balanced().check(page)


def test_every_picture_has_a_title_and_every_figure_stands_in_the_text() -> None:
    page = render(RESULTS)
    assert page.count('role="img"') == len(re.findall(r'role="img"[^>]*><title>[^<]+</title>', page)) >= 5
    for figure in ("85.0%", "before: 20.0%", "1.0 kB", "12.3 kB", "84.0%", "0.2500"):
        assert figure in page, figure


def test_text_from_outside_cannot_become_markup() -> None:
    hostile = replace(RESULTS.devices[0], name="<script>alert(1)</script>&")
    page = render(replace(RESULTS, title="<b>&", devices=(hostile, RESULTS.devices[1]), notes={"<i>": "<u>"}))
    assert "<script" not in page and "<i>" not in page and "<u>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page
    _Balanced().check(page)


def test_parts_without_data_are_left_out() -> None:
    page = render(replace(RESULTS, rounds=(), samples=(), memory={}))
    for heading in ("Learning together", "Where personalisation", "Memory on a device"):
        assert heading not in page
    _Balanced().check(page)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (14_206, "14.2 kB"), (153_128, "153 kB"), (2.5e9, "2.5 GB")],
)
def test_sizes_are_written_for_people(count: float, text: str) -> None:
    assert size(count) == text


class _Balanced(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def check(self, page: str) -> None:
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "rect", "polyline")
