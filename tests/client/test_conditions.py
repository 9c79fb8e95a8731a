"""When a device may work, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from evensong.client import LinuxConditions


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A desktop: no battery, idle, wired, with free memory."""
    write(tmp_path / "proc/loadavg", "0.01 0.05 0.10 1/100 12345\n")
    write(tmp_path / "proc/meminfo", "MemTotal: 8000000 kB\nMemFree: 10 kB\nMemAvailable: 4000000 kB\n")
    write(tmp_path / "proc/net/route", "Iface\tDestination\tGateway\neth0\t00000000\t0100A8C0\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def unmet(machine: Path, *, training: bool = False, **options: object) -> list[str]:
    return [item.condition for item in LinuxConditions(root=machine, **options).check(training=training)]


def test_an_idle_desktop_is_ready(machine: Path) -> None:
    assert unmet(machine) == []


@pytest.mark.parametrize(
    ("kind", "status", "scope", "ready"),
    [
        ("Battery", "Discharging", None, False),
        ("Battery", "Charging", None, True),
        ("Battery", "Full", None, True),
        ("Battery", "Not charging", None, True),
        ("Battery", "Discharging", "Device", True),  # the mouse's
        ("Mains", "Discharging", None, True),
    ],
)
def test_a_battery_that_is_being_drained_means_no(machine: Path, kind: str, status: str, scope, ready: bool) -> None:
    supply = machine / "sys/class/power_supply/BAT0"
    write(supply / "type", kind)
    write(supply / "status", status)
    if scope:
        write(supply / "scope", scope)
    assert (unmet(machine) == []) == ready
    assert unmet(machine, require_power=False) == []


@pytest.mark.parametrize("interface", ["wwan0", "ppp0", "rmnet_data0"])
def test_a_mobile_connection_counts_as_metered(machine: Path, interface: str) -> None:
    write(machine / "proc/net/route", f"Iface\tDestination\tGateway\n{interface}\t00000000\t0100A8C0\n")
    assert unmet(machine) == ["network"] and unmet(machine, require_unmetered=False) == []


def test_network_manager_is_asked_where_there_is_one(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = machine / "bin"
    for answer, expected in {"yes": ["network"], "yes (guessed)": ["network"], "no": [], "unknown": []}.items():
        write(tools / "nmcli", f'#!/bin/sh\n[ "$5" = eth0 ] && echo "{answer}"\n')
        (tools / "nmcli").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
        assert unmet(machine) == expected, answer


def test_load_counts_before_work_and_not_during_it(machine: Path) -> None:
    write(machine / "proc/loadavg", "1000.0 0 0 1/1 1")
    assert unmet(machine) == ["load"] and unmet(machine, training=True) == []


def test_memory_and_everything_unmet_are_listed(machine: Path) -> None:
    write(machine / "proc/meminfo", "MemAvailable: 1000 kB\n")
    write(machine / "proc/loadavg", "1000.0 0 0 1/1 1")
    assert unmet(machine) == ["load", "memory"]
    assert unmet(machine, min_free_memory_bytes=1_000_000, max_load_per_core=1e6) == []


def test_a_machine_that_tells_nothing_is_ready(tmp_path: Path) -> None:
    assert unmet(tmp_path) == []


def test_this_machine_can_be_asked() -> None:
    assert isinstance(LinuxConditions().check(), list)
