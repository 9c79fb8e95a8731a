"""A device: examples stay on it, models come to it, sealed updates leave it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy.typing as npt

from evensong.client.cache import Cache, FolderCache, MemoryCache
from evensong.client.callbacks import Callback, Callbacks
from evensong.client.calls import Calls
from evensong.client.checkin import check_in
from evensong.client.conditions import Conditions, LinuxConditions
from evensong.client.context import Context, Limits, RunBlocking, in_thread
from evensong.client.enrol import enrol, is_enrolled
from evensong.client.errors import (
    ClientError,
    ConditionsChangedError,
    EnrolmentError,
    NoModelError,
    StateError,
    StorageFullError,
    UnfitError,
)
from evensong.client.examples import Examples, ExampleStore
from evensong.client.identity import open_identity
from evensong.client.outcomes import Idle, NotReady, Outcome, Postponed
from evensong.client.pacing import LEAST_WAIT_S, Backoff, draw_wait
from evensong.client.personalize import personalize, recipe_for_new_version, recipe_of
from evensong.client.randomness import Randomness
from evensong.client.serving import Serving
from evensong.client.state import State
from evensong.client.train import Training
from evensong.client.work import execute, stoppable, watch
from evensong.mobile_runtime.errors import RuntimeFault
from evensong.mobile_runtime.loading import load
from evensong.mobile_runtime.memory import MemoryReport, memory_report
from evensong.mobile_runtime.session import Array, Evaluation
from evensong.secagg.primitives import Primitives
from evensong.v1 import common_pb2
from evensong.wire.clock import Clock, SystemClock
from evensong.wire.errors import UnreachableError
from evensong.wire.transport import Transport

if TYPE_CHECKING:
    from evensong.client.grpc_transport import Tls

Result = TypeVar("Result")

_log = logging.getLogger("evensong.client")

_NOT_READY_WAIT_S = 60.0


class Device:
    """One member of a fleet. ``state_dir`` is all that it remembers; one process may use it at a time.

    >>> device = Device("state", coordinator="coordinator.example:8470", token="evt1...")   # doctest: +SKIP
    >>> device.examples.add(x, y)      # stays here
    >>> device.run()                   # checks in, trains when the conditions allow, uploads sealed updates
    >>> device.predict(x)              # the personalised model, at any time, offline too

    ``coordinator`` and ``token`` are needed once: address and population are kept with the enrolment. Every other part
    has a default and can be replaced by an object: ``conditions`` (when to work), ``callbacks`` (progress), ``tls``,
    ``limits``, ``examples``, ``cache``. ``authority`` (a public key, 32 bytes) and ``certificate`` are for a fleet
    whose enrolment authority is not the coordinator (``docs/threat-model.md``). A simulator injects ``transport``,
    ``clock``, ``seed``, ``run_blocking`` and ``primitives``, and ``state_dir=None`` keeps everything in memory.
    """

    def __init__(
        self,
        state_dir: str | Path | None,
        *,
        coordinator: str | None = None,
        token: str | None = None,
        population: str | None = None,
        conditions: Conditions | None = None,
        callbacks: Sequence[Callback] = (),
        memory_bytes: int = 256 << 20,
        limits: Limits | None = None,
        tls: Tls | None = None,
        authority: bytes | None = None,
        certificate: bytes | None = None,
        transport: Transport | None = None,
        examples: Examples | None = None,
        cache: Cache | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
        run_blocking: RunBlocking = in_thread,
        primitives: Primitives | None = None,
    ) -> None:
        folder = None if state_dir is None else Path(state_dir)
        limits, clock = limits or Limits(), clock or SystemClock()
        self._state = State(folder)
        try:
            randomness = Randomness(seed, self._state.boots)
            identity = open_identity(folder, randomness)
            self.device_id = identity.device_id
            self.public_key = identity.public_key
            self.coordinator = self._remember("coordinator", coordinator)
            self.population = self._remember("population", population) or "default"
            self._token = token
            self._authority = authority
            self._certificate = certificate
            self._tls = tls
            self._transport = transport
            if cache is None:
                cache = (
                    MemoryCache(limits.cache_bytes)
                    if folder is None
                    else FolderCache(folder / "cache", limits.cache_bytes)
                )
            if examples is None:
                examples = ExampleStore(None if folder is None else folder / "examples.sqlite", clock=clock)
        except BaseException:
            self._state.close()
            raise
        self._examples = examples
        self._context = Context(
            state=self._state,
            identity=identity,
            calls=Calls(self._open_transport, identity, clock),
            cache=cache,
            examples=examples,
            conditions=conditions or LinuxConditions(),
            clock=clock,
            randomness=randomness,
            callbacks=Callbacks(callbacks),
            population=self.population,
            memory_bytes=memory_bytes,
            run_blocking=run_blocking,
            load=load,
            primitives=primitives or Primitives(),
            limits=limits,
        )
        self._backoff = Backoff(randomness)
        self._serving = Serving(self._context)
        self._runner: asyncio.Runner | None = None
        self._hopeless: set[bytes] = set()  # versions on which personalisation failed

    # ------------------------------------------------------------------------------------------------ the check-in loop

    def enrol(self) -> None:
        """Registers this device with its token, once; a later call only takes up a newer ``certificate``.

        Raises :class:`EnrolmentError`.
        """
        self._sync(self._enrol())

    def step(self) -> Outcome:
        """One check-in and, if there was work, all of it."""
        return self._sync(self.step_async())

    def run(self, until: Callable[[Outcome], bool] | None = None) -> Outcome:
        """Steps and waits as told, for ever or until ``until`` is true of an outcome, which is returned."""
        return self._sync(self.run_async(until))

    async def run_async(self, until: Callable[[Outcome], bool] | None = None) -> Outcome:
        """:meth:`run` inside an event loop; cancel it to stop."""
        while True:
            outcome = await self.step_async()
            if until is not None and until(outcome):
                return outcome
            await self._context.clock.sleep(outcome.wait_s)

    async def step_async(self) -> Outcome:
        """:meth:`step` inside an event loop.

        Network and disk failures are outcomes (:class:`Postponed`). Raised are only what needs a person: no or a
        refused enrolment (:class:`EnrolmentError`), an unreadable state (:class:`StateError`).
        """
        context = self._context
        unmet = await context.run_blocking(context.conditions.check)
        if unmet:
            return NotReady(context.randomness.uniform(_NOT_READY_WAIT_S / 2, _NOT_READY_WAIT_S), tuple(unmet))
        try:
            outcome = await self._step()
        except (UnreachableError, StorageFullError) as error:
            return Postponed(self._before_lease_ends(self._backoff.next()), error)
        self._backoff.reset()
        return outcome

    async def _enrol(self) -> None:
        await enrol(self._context, self._token, authority=self._authority, certificate=self._certificate)

    async def _step(self) -> Outcome:
        context = self._context
        await self._enrol()
        work = context.state.work()
        if work is not None:  # a former step or a former life did not finish it
            return await execute(context, work)
        answer = await check_in(context, hold_ms=context.limits.hold_ms)
        if answer.refused and answer.refused.reason == common_pb2.REFUSAL_REASON_UNKNOWN_DEVICE:
            raise EnrolmentError(
                "the coordinator does not know this device, or has revoked it",
                got=answer.refused.message or None,
                fix="`evensong device reset`, then enrol with a new token.",
            )
        if answer.work is None:
            await self._serving.adopt(answer.serving)
            await self._personalize_new_versions()
            wait_s = draw_wait(answer.retry, context.randomness)
            return Idle(wait_s, answer.refused.name, answer.refused.message) if answer.refused else Idle(wait_s)
        outcome = await execute(context, answer.work)
        self._serving.refresh()  # training may have changed the personal tensors
        await self._serving.adopt(answer.serving)
        return outcome

    # --------------------------------------------------------------------------------------------------- the local side

    @property
    def examples(self) -> ExampleStore:
        """The local examples: ``add``, ``add_many``, ``count``. (What was passed as ``examples``, if anything was.)"""
        return self._examples  # type: ignore[return-value]

    def predict(self, *inputs: npt.ArrayLike, task: str | None = None) -> Array:
        """The output ``[n, ...]`` of the personalised model, or of the global one before it was personalised.

        ``task`` (id or name) chooses where several are served. Works offline, from any thread and while training runs.
        Raises :class:`NoModelError` before the first version arrived, :class:`ExampleError` for wrong inputs.
        """
        return self._serving.predict(*inputs, task=task)

    def evaluate(self, *, task: str | None = None) -> Evaluation:
        """Loss and accuracy of what ``predict`` serves, on the local test examples."""
        return self._serving.evaluate(task=task)

    def personalize(
        self,
        *,
        epochs: int | None = None,
        learning_rate: float | None = None,
        trainable: Sequence[str] | None = None,
        task: str | None = None,
    ) -> Training:
        """Adapts the served version to the local training examples; what is not given is as the task says.

        Nothing of it leaves the device. It runs now, whatever the conditions, and is repeated in the same way in a
        quiet moment after a new version is served.
        Raises :class:`NoModelError`, :class:`UnfitError`, :class:`DivergedError`.
        """
        material = self._serving.material(task)
        training = personalize(self._context, material, recipe_of(material.model, epochs, learning_rate, trainable))
        self._serving.refresh()
        return training

    def memory(self, *, task: str | None = None) -> MemoryReport:
        """What predicting and training with the served model take at most, known before anything runs."""
        return memory_report(self._serving.material(task).artifact)

    @property
    def is_enrolled(self) -> bool:
        return is_enrolled(self._context)

    def status(self) -> dict[str, object]:
        """For a person or a log: who, where, what is stored, what is under way."""
        work = self._state.work()
        served = self._serving.tasks() if self.is_enrolled else []
        return {
            "device_id": self.device_id,
            "enrolled": self.is_enrolled,
            "coordinator": self.coordinator,
            "population": self.population,
            "examples": {"train": self._examples.count("train"), "test": self._examples.count("test")},
            "work": work.stage.value if work else None,
            "models": [
                {
                    "task": model.bundle.name,
                    "task_id": model.task_id,
                    "version": model.version.number,
                    "personalized": self._state.overlay(model.task_id, model.version_sha256) is not None,
                }
                for model in served
            ],
        }

    def close(self) -> None:
        """Closes connection, models and state; the device can be opened again from its directory."""
        self._sync(self.close_async())
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    async def close_async(self) -> None:
        """:meth:`close` inside an event loop."""
        await self._context.calls.close()
        self._serving.refresh()
        if isinstance(self._examples, ExampleStore):
            self._examples.close()
        self._state.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------------- helpers

    async def _personalize_new_versions(self) -> None:
        """In a quiet moment: versions that arrived since are adapted as the task or the user wants."""
        for model in self._serving.tasks():
            recipe = recipe_for_new_version(self._context, model)
            if recipe is None or model.version_sha256 in self._hopeless:
                continue
            stop = threading.Event()
            try:
                material = self._serving.material(model.task_id)
                adapt = partial(personalize, self._context, material, recipe, watch(self._context, stop))
                await stoppable(self._context, adapt, stop)
            except (ConditionsChangedError, NoModelError):  # the next quiet moment may be better
                return
            except (RuntimeFault, UnfitError) as error:
                _log.warning("version %d of %s is served as it is: %s", model.version.number, model.task_id, error)
                self._hopeless.add(model.version_sha256)
            self._serving.refresh()

    def _before_lease_ends(self, wait_s: float) -> float:
        """Work that waits for the network is tried again while it still counts."""
        work = self._state.work()
        if work is None:
            return wait_s
        left_s = (work.deadline_unix_ms - self._context.clock.unix_ms()) / 1000
        return max(LEAST_WAIT_S, min(wait_s, left_s / 2))

    def _remember(self, name: str, given: str | None) -> str | None:
        """``given``, or what was given in a former life."""
        stored = self._state.fact(name)
        if name == "population" and stored and given and given != stored.decode():
            raise StateError(
                f"this device is enrolled in population {stored.decode()!r}",
                got=given,
                fix="Use a state directory of its own for each population, or reset this one.",
            )
        if given and name == "coordinator":
            self._state.set_facts(coordinator=given.encode())
        return given or (stored.decode() if stored else None)

    def _open_transport(self) -> Transport:
        if self._transport is not None:
            return self._transport
        if not self.coordinator:
            raise EnrolmentError(
                "no coordinator is known", fix='Pass its address: Device(..., coordinator="host:8470").'
            )
        from evensong.client.grpc_transport import GrpcTransport

        return GrpcTransport(self.coordinator, tls=self._tls)

    def _sync(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Runs in this device's own event loop, which stays between calls, because the connection belongs to it."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._runner = self._runner or asyncio.Runner()
            return self._runner.run(coroutine)
        coroutine.close()
        raise ClientError(
            "this is called inside an event loop", fix="Await step_async(), run_async() or close_async()."
        )
