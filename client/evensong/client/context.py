"""What the verbs of the device share: its parts, each replaceable, none global."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from evensong.client.cache import Cache
from evensong.client.callbacks import Callbacks
from evensong.client.calls import Calls
from evensong.client.conditions import Conditions
from evensong.client.examples import Examples
from evensong.client.identity import Identity
from evensong.client.randomness import Randomness
from evensong.client.state import State
from evensong.mobile_runtime.session import Session
from evensong.secagg.primitives import Primitives
from evensong.wire.clock import Clock

Result = TypeVar("Result")


class RunBlocking(Protocol):
    """Runs a long computation without holding the event loop."""

    def __call__(self, function: Callable[[], Result], /) -> Awaitable[Result]: ...


async def in_thread(function: Callable[[], Result]) -> Result:
    """In a worker thread: what production uses."""
    return await asyncio.to_thread(function)


async def inline(function: Callable[[], Result]) -> Result:
    """Right here: what a simulator uses, because it is deterministic."""
    return function()


@dataclass(frozen=True)
class Limits:
    """What this device never exceeds, whatever a signed plan asks for."""

    blob_bytes: int = 256 << 20  #: an artifact or a version's parameters
    cache_bytes: int = 512 << 20
    training_steps: int = 1_000_000
    lease_ms: int = 24 * 3600 * 1000
    tensors: int = 10_000
    attempts: int = 3  #: an assignment that ends the process this often is given back
    least_survivors: int = 3  #: a secure sum over fewer devices is refused, whatever the task says
    hold_ms: int = 30_000  #: how long a check-in may be held by the coordinator, at most 60,000


@dataclass
class Context:
    """One device's parts."""

    state: State
    identity: Identity
    calls: Calls
    cache: Cache
    examples: Examples
    conditions: Conditions
    clock: Clock
    randomness: Randomness
    callbacks: Callbacks
    population: str
    memory_bytes: int
    run_blocking: RunBlocking
    load: Callable[[bytes], Session]
    primitives: Primitives = field(default_factory=Primitives)  #: of secure sums; a simulation's remember what they did
    limits: Limits = field(default_factory=Limits)
