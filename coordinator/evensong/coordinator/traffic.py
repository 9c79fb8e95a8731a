"""How many bytes a round's devices were sent. Kept in memory: a restart loses the count of the open round, nothing
else."""

from __future__ import annotations

import threading


class Traffic:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._round_of: dict[str, int] = {}
        self._bytes: dict[int, int] = {}

    def assigned(self, device_id: str, round_id: int) -> None:
        """What the device downloads from now on is for this round."""
        with self._lock:
            self._round_of[device_id] = round_id

    def add(self, device_id: str, count: int) -> None:
        with self._lock:
            round_id = self._round_of.get(device_id)
            if round_id is not None:
                self._bytes[round_id] = self._bytes.get(round_id, 0) + count

    def take(self, round_id: int) -> int:
        """The bytes of the round; it is counted no longer."""
        with self._lock:
            self._round_of = {device: other for device, other in self._round_of.items() if other != round_id}
            return self._bytes.pop(round_id, 0)
