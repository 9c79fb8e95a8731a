"""What every step of a round needs: stores, keys, and the injected clock, randomness, threads and faults."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.coordinator.blobs import BlobStore
from evensong.coordinator.config import Settings
from evensong.coordinator.database import Database
from evensong.coordinator.fault import Fault, no_fault
from evensong.coordinator.privacy.keys import NoiseKey
from evensong.coordinator.pulse import Pulse
from evensong.coordinator.spool import Spool
from evensong.coordinator.telemetry import Log, Telemetry, make_logger
from evensong.wire.clock import Clock
from evensong.wire.signing import public_key_of

T = TypeVar("T")


class RunBlocking(Protocol):
    """Runs a function that may block: on a pool of threads in production, at once in the simulator."""

    def __call__(self, function: Callable[..., T], /, *arguments: Any) -> Awaitable[T]: ...


async def run_inline(function: Callable[..., T], /, *arguments: Any) -> T:
    """For simulations: everything happens in one thread, in one order."""
    return function(*arguments)


@dataclass
class Context:
    """One coordinator's world. Mutable only where a field says so."""

    settings: Settings
    database: Database
    blobs: BlobStore
    spool: Spool
    signer: Ed25519PrivateKey  #: signs bundles and versions
    noise_key: NoiseKey  #: of the coordinator's noise, and its draw of devices
    clock: Clock
    rng: random.Random  #: ids, and nothing secret
    run_blocking: RunBlocking
    fault: Fault = no_fault
    telemetry: Telemetry = field(default_factory=Telemetry)
    log: Log = field(default_factory=make_logger)
    work: Pulse = field(default_factory=Pulse)  #: places may be free: held check-ins look again
    due: Pulse = field(default_factory=Pulse)  #: a round has something to do: the conductor looks again
    secure: Pulse = field(default_factory=Pulse)  #: a stage of a secure round closed: held steps look again
    news: Pulse = field(default_factory=Pulse)  #: a task has a new event: watchers look again
    ended: deque[int] = field(default_factory=deque)  #: rounds whose files and memory the conductor frees
    draining: bool = False  #: no new work is given; set once, at the end

    def __post_init__(self) -> None:
        self.signer_public_key = public_key_of(self.signer)
        given = bytes.fromhex(self.settings.authority_public_key)
        #: Who certifies devices: the signer's own key, unless the operator keeps another one offline.
        self.authority_public_key = given or self.signer_public_key
        self.is_own_authority = self.authority_public_key == self.signer_public_key
        self._id_lock = threading.Lock()

    def now(self) -> int:
        """Milliseconds since the Unix epoch."""
        return self.clock.unix_ms()

    def new_id(self) -> str:
        """32 hexadecimal digits."""
        with self._id_lock:
            return f"{self.rng.getrandbits(128):032x}"
