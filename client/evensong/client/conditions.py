"""May the device work now? A protocol with one method, and its Linux implementation."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

_METERED_FOR_S = 60.0
_MOBILE_INTERFACES = ("wwan", "ppp", "rmnet", "wwp")


@dataclass(frozen=True)
class Unmet:
    """One condition that does not hold, and what was found."""

    condition: Literal["power", "network", "load", "memory", "host"]
    detail: str


class Conditions(Protocol):
    """Asked before each check-in and, about once a second, between training steps."""

    def check(self, *, training: bool = False) -> list[Unmet]:
        """Why the device should not work now; empty when it may. ``training``: part of the load is its own."""
        ...


class AlwaysReady:
    """For servers, tests and demonstrations."""

    def check(self, *, training: bool = False) -> list[Unmet]:
        return []


@dataclass
class LinuxConditions:
    """Plugged in, on an unmetered network, not busy, and with memory to spare, as far as Linux tells.

    - power: a battery (``/sys/class/power_supply``) that discharges means no; a machine without battery is plugged in.
    - network: NetworkManager's verdict on the default interface where ``nmcli`` is installed; otherwise only mobile
      interfaces (wwan, ppp, rmnet) count as metered, and everything else as free.
    - load: the one-minute load average for each core; not looked at while training, which is load of our own.
    - memory: ``MemAvailable``.
    """

    require_power: bool = True
    require_unmetered: bool = True
    max_load_per_core: float = 0.8
    min_free_memory_bytes: int = 256 << 20
    root: Path = Path("/")  #: where /sys and /proc are; another place in tests

    def __post_init__(self) -> None:
        self._metered: tuple[float, str | None] | None = None

    def check(self, *, training: bool = False) -> list[Unmet]:
        unmet = []
        if self.require_power and (supply := self._discharging()):
            unmet.append(Unmet("power", f"{supply} is discharging"))
        if self.require_unmetered and (metered := self._metered_network()):
            unmet.append(Unmet("network", metered))
        load = self._load_per_core()
        if not training and load > self.max_load_per_core:
            unmet.append(Unmet("load", f"{load:.2f} a core, at most {self.max_load_per_core:.2f}"))
        free = self._free_memory_bytes()
        if free is not None and free < self.min_free_memory_bytes:
            unmet.append(Unmet("memory", f"{free >> 20} MiB free, at least {self.min_free_memory_bytes >> 20} MiB"))
        return unmet

    def _discharging(self) -> str | None:
        """The name of a system battery that is being drained."""
        supplies = self.root / "sys/class/power_supply"
        for supply in sorted(supplies.iterdir()) if supplies.is_dir() else []:
            is_battery = _read(supply / "type") == "Battery"
            if is_battery and _read(supply / "scope") != "Device" and _read(supply / "status") == "Discharging":
                return supply.name
        return None

    def _metered_network(self) -> str | None:
        now = time.monotonic()
        if self._metered is None or now - self._metered[0] > _METERED_FOR_S:
            self._metered = (now, self._ask_metered())
        return self._metered[1]

    def _ask_metered(self) -> str | None:
        interface = self._default_interface()
        if interface is None:
            return None  # no way out: the check-in itself will find out, and a coordinator on this machine still works
        if interface.startswith(_MOBILE_INTERFACES):
            return f"{interface} is a mobile connection"
        nmcli = shutil.which("nmcli")
        if nmcli is None:
            return None
        try:
            answer = subprocess.run(
                [nmcli, "-g", "GENERAL.METERED", "device", "show", interface],
                capture_output=True,
                text=True,
                timeout=5,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return f"{interface} is metered" if answer.stdout.strip().startswith("yes") else None

    def _default_interface(self) -> str | None:
        for line in (_read(self.root / "proc/net/route") or "").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 1 and fields[1] == "00000000":
                return fields[0]
        return None

    def _load_per_core(self) -> float:
        fields = (_read(self.root / "proc/loadavg") or "").split()
        return float(fields[0]) / (os.cpu_count() or 1) if fields else 0.0

    def _free_memory_bytes(self) -> int | None:
        for line in (_read(self.root / "proc/meminfo") or "").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
