"""One assignment from start to end, crash-safe: each stage is stored before the next begins.

    ASSIGNED --train, seal--> SEALED --begin, chunks--> UPLOADED --commit--> done
        |----evaluate-------> MEASURED ----------------------------report--> done
        `----cannot---------> GIVEN_UP -----------------------------abort--> done

For a task with secure sums, SEALED and MEASURED lead into the protocol (:mod:`evensong.client.secure`) instead.
From any stage the end of the lease, or a refusal, drops the work. Network and disk failures leave it where it is.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from evensong.client.callbacks import GaveUp, Refused, RoundStarted, Sealed, StepDone, Uploaded
from evensong.client.context import Context, Result
from evensong.client.enrol import certificate_of, signer_public_key
from evensong.client.errors import (
    AbandonedError,
    ClientError,
    ConditionsChangedError,
    LeaseExpiredError,
    RefusedError,
    StorageFullError,
    UnfitError,
    UntrustedError,
    printable,
)
from evensong.client.evaluate import evaluate
from evensong.client.model import (
    Material,
    obtain,
    open_session,
    open_training_session,
    personal_layout,
    residual_tensors,
    store_personal,
    store_residual,
)
from evensong.client.outcomes import Aborted, Dropped, Evaluated, Outcome, Postponed, Trained
from evensong.client.pacing import draw_wait
from evensong.client.seal import seal, seal_vector
from evensong.client.secure import take_part
from evensong.client.state import Stage, Work
from evensong.client.train import LocalUpdate, learning_rate_of, train
from evensong.client.trust import TrustedModel, trust
from evensong.client.upload import upload
from evensong.mobile_runtime.errors import DivergedError, RuntimeFault
from evensong.mobile_runtime.session import Array, Evaluation, StepResult
from evensong.v1 import common_pb2, device_pb2, task_pb2
from evensong.wire.errors import EvensongError, UnreachableError, UpdateError

_log = logging.getLogger("evensong.client")

_CONDITIONS_EVERY_MS = 1000


async def execute(context: Context, work: Work) -> Outcome:
    """Takes ``work`` from whatever stage it is in to its end.

    Raises :class:`UnreachableError` and :class:`StorageFullError` with the work kept as far as it got.
    """
    assignment = device_pb2.Assignment.FromString(work.assignment)
    try:
        _check_lease(context, work)
        if work.stage == Stage.ASSIGNED:
            work = await _compute(context, work, assignment)
            _check_lease(context, work)
        return await _deliver(context, work, assignment)
    except LeaseExpiredError as error:
        return _drop(context, assignment, "LEASE_EXPIRED", str(error), common_pb2.RetryWindow())
    except AbandonedError as error:
        return _drop(context, assignment, "NO_SUM", str(error), error.retry)
    except RefusedError as error:
        if error.is_passing:
            return Postponed(draw_wait(error.retry, context.randomness), error)
        return _drop(context, assignment, error.name, error.message, error.retry)


# ----------------------------------------------------------------------------------------------------------- computing


async def _compute(context: Context, work: Work, assignment: device_pb2.Assignment) -> Work:
    """The next stage, stored: SEALED, MEASURED or GIVEN_UP."""
    try:
        if work.attempts >= context.limits.attempts:
            raise ClientError(f"the process ended {work.attempts} times during this work")
        model = trust(
            assignment.bundle,
            assignment.version,
            task_id=assignment.task_id,
            signer=signer_public_key(context),
            population=context.population,
            limits=context.limits,
        )
        if model.bundle.HasField("secure"):
            certificate_of(context)  # or all that follows would be in vain
        material = await obtain(context, model)
        work = replace(work, attempts=work.attempts + 1)
        context.state.set_work(work)
        _announce(context, assignment, model)
        if assignment.work == device_pb2.WORK_EVALUATE:
            return await _measure(context, work, assignment, material)
        return await _train_and_seal(context, work, assignment, material)
    except (UnreachableError, StorageFullError, LeaseExpiredError, RefusedError):
        raise
    except UntrustedError as error:
        return _give_up(context, work, device_pb2.ABORT_REASON_UNTRUSTED, error)
    except DivergedError as error:
        return _give_up(context, work, device_pb2.ABORT_REASON_DIVERGED, error)
    except ConditionsChangedError as error:
        return _give_up(context, work, device_pb2.ABORT_REASON_CONDITIONS, error)
    except (UnfitError, RuntimeFault, MemoryError) as error:
        return _give_up(context, work, device_pb2.ABORT_REASON_UNFIT, error)
    except UpdateError as error:  # the delta is not finite although every loss was
        return _give_up(context, work, device_pb2.ABORT_REASON_DIVERGED, error)
    except Exception as error:  # a device in the field goes on living; the coordinator and the log learn about it
        _log.exception("work on %s failed", assignment.task_id)
        return _give_up(context, work, device_pb2.ABORT_REASON_INTERNAL, error)


async def _train_and_seal(context: Context, work: Work, assignment: device_pb2.Assignment, material: Material) -> Work:
    plan = material.model.bundle
    order = context.randomness.generator()
    rounding = context.randomness.generator()
    stop = threading.Event()

    def run() -> LocalUpdate:
        session = open_training_session(context, material, int(order.integers(1 << 63)))
        try:
            return train(
                session,
                plan.local,
                reference=material.reference,
                personal=[spec.name for spec in personal_layout(material)],
                examples=context.examples,
                learning_rate=learning_rate_of(plan.local, assignment.round, plan.round.rounds),
                order=order,
                most_steps=context.limits.training_steps,
                between_steps=watch(context, stop, work.deadline_unix_ms),
                on_step=_step_reporter(context, assignment.task_id),
            )
        finally:
            session.close()

    update = await stoppable(context, run, stop)
    training = update.training
    metrics = common_pb2.Metrics(examples=training.examples, loss_sum=training.loss_sum, correct=training.correct)
    work = replace(work, stage=Stage.SEALED, metrics=metrics.SerializeToString())
    residual = None
    if plan.HasField("secure"):
        work, norm = await _seal_vector(context, work, assignment, material, update.delta, training.distinct)
    else:
        sealed = seal(
            update.delta,
            material.model.layout,
            plan.update,
            examples=training.distinct,
            rounding=rounding,
            clip_norm=material.model.version.clip_norm,
            residual=residual_tensors(context, material),
        )
        work = replace(work, update=sealed.data, weight=sealed.weight, within=sealed.within_clip_norm)
        norm, residual = sealed.norm, sealed.residual
    with context.state.transaction():
        context.state.set_work(work)
        store_personal(context, material, update.personal)
        store_residual(context, material, residual)
    context.callbacks.emit(Sealed(assignment.task_id, assignment.round, len(work.update or b""), norm))
    return work


async def _seal_vector(
    context: Context,
    work: Work,
    assignment: device_pb2.Assignment,
    material: Material,
    delta: Mapping[str, Array],
    examples: int,
) -> tuple[Work, float]:
    """The work with the lanes that it adds to a secure sum, and the delta's norm."""
    metrics = common_pb2.Metrics.FromString(work.metrics)
    sealed = await context.run_blocking(
        lambda: seal_vector(
            delta,
            material.model,
            work=assignment.work,
            round=assignment.round,
            examples=examples,
            metrics=metrics,
            draw=context.randomness.token,
        )
    )
    return replace(work, update=sealed.data), sealed.norm


async def _measure(context: Context, work: Work, assignment: device_pb2.Assignment, material: Material) -> Work:
    stop = threading.Event()
    between = watch(context, stop, work.deadline_unix_ms)

    def run() -> Evaluation:
        session = open_session(context, material)
        try:
            return evaluate(session, context.examples, between_batches=between)
        finally:
            session.close()

    result = await stoppable(context, run, stop)
    metrics = common_pb2.Metrics(
        examples=result.examples, loss_sum=result.loss * result.examples, correct=result.correct
    )
    work = replace(work, stage=Stage.MEASURED, metrics=metrics.SerializeToString())
    if material.model.bundle.HasField("secure"):
        work, _ = await _seal_vector(context, work, assignment, material, {}, result.examples)
    context.state.set_work(work)
    return work


async def stoppable(context: Context, run: Callable[[], Result], stop: threading.Event) -> Result:
    """Runs off the event loop; when the caller is cancelled, the computation ends at its next step."""
    try:
        return await context.run_blocking(run)
    except asyncio.CancelledError:
        stop.set()
        raise


def watch(context: Context, stop: threading.Event, deadline_unix_ms: int | None = None) -> Callable[[], None]:
    """What is asked between two steps: was the work cancelled, is the lease over, do the conditions still hold?"""
    asked_at: int | None = None

    def between_steps() -> None:
        nonlocal asked_at
        if stop.is_set():
            raise ConditionsChangedError("the work was stopped")
        now = context.clock.unix_ms()
        if deadline_unix_ms is not None and now >= deadline_unix_ms:
            raise LeaseExpiredError("the lease ran out during the work")
        if asked_at is None or now - asked_at >= _CONDITIONS_EVERY_MS:
            asked_at = now
            unmet = context.conditions.check(training=True)
            if unmet:
                raise ConditionsChangedError("; ".join(f"{item.condition}: {item.detail}" for item in unmet))

    return between_steps


def _give_up(context: Context, work: Work, reason: int, error: BaseException) -> Work:
    """What is told to the coordinator names the failure only: the rest of an error may quote examples or paths."""
    told = error.what if isinstance(error, EvensongError) else type(error).__name__
    _log.info("work is given back: %s", error)
    work = replace(work, stage=Stage.GIVEN_UP, reason=reason, message=printable(told))
    context.state.set_work(work)
    return work


def _announce(context: Context, assignment: device_pb2.Assignment, model: TrustedModel) -> None:
    kind = "evaluate" if assignment.work == device_pb2.WORK_EVALUATE else "train"
    context.callbacks.emit(RoundStarted(assignment.task_id, assignment.round, model.version.number, kind))


def _step_reporter(context: Context, task_id: str) -> Callable[[int, int, StepResult], None]:
    return lambda step, steps, result: context.callbacks.emit(StepDone(task_id, step, steps, result.loss))


# ---------------------------------------------------------------------------------------------------------- delivering


async def _deliver(context: Context, work: Work, assignment: device_pb2.Assignment) -> Outcome:
    """The call or calls that end the work; then it is forgotten."""
    if work.stage == Stage.GIVEN_UP:
        return await _abort(context, work, assignment)
    if task_pb2.TaskBundle.FromString(assignment.bundle.payload).HasField("secure"):
        return await _sum(context, work, assignment)
    if work.stage == Stage.MEASURED:
        return await _report(context, work, assignment)
    return await _commit(context, work, assignment)


async def _sum(context: Context, work: Work, assignment: device_pb2.Assignment) -> Outcome:
    """The protocol of secure sums; what the device cannot or must not do is given back."""
    try:
        taken = await take_part(context, work, assignment)
    except (UnreachableError, StorageFullError, LeaseExpiredError, AbandonedError, RefusedError):
        raise
    except UntrustedError as error:
        work = _give_up(context, work, device_pb2.ABORT_REASON_UNTRUSTED, error)
    except UnfitError as error:
        work = _give_up(context, work, device_pb2.ABORT_REASON_UNFIT, error)
    except Exception as error:  # as in _compute
        _log.exception("the secure sum of %s failed", assignment.task_id)
        work = _give_up(context, work, device_pb2.ABORT_REASON_INTERNAL, error)
    if work.stage == Stage.GIVEN_UP:
        return await _abort(context, work, assignment)
    if work.stage == Stage.MEASURED:
        return _evaluated(context, work, assignment, taken.retry)
    return _trained(context, work, assignment, taken.retry, taken.sent)


async def _commit(context: Context, work: Work, assignment: device_pb2.Assignment) -> Trained:
    committed, sent = await upload(context, work, assignment.lease)
    return _trained(context, work, assignment, committed.retry, sent)


def _trained(
    context: Context, work: Work, assignment: device_pb2.Assignment, retry: common_pb2.RetryWindow, sent: int
) -> Trained:
    context.state.clear_work()
    context.callbacks.emit(Uploaded(assignment.task_id, assignment.round, sent))
    metrics = common_pb2.Metrics.FromString(work.metrics)
    return Trained(
        draw_wait(retry, context.randomness),
        assignment.task_id,
        assignment.round,
        _version_of(assignment),
        metrics.examples,
        metrics.loss_sum / metrics.examples,
        len(work.update or b""),
    )


async def _report(context: Context, work: Work, assignment: device_pb2.Assignment) -> Evaluated:
    metrics = common_pb2.Metrics.FromString(work.metrics)
    reported = await context.calls.report(
        device_pb2.ReportRequest(request_id=work.request_id, lease=assignment.lease, metrics=metrics)
    )
    return _evaluated(context, work, assignment, reported.retry)


def _evaluated(
    context: Context, work: Work, assignment: device_pb2.Assignment, retry: common_pb2.RetryWindow
) -> Evaluated:
    context.state.clear_work()
    metrics = common_pb2.Metrics.FromString(work.metrics)
    return Evaluated(
        draw_wait(retry, context.randomness),
        assignment.task_id,
        _version_of(assignment),
        metrics.examples,
        metrics.loss_sum / metrics.examples,
        metrics.correct,
    )


async def _abort(context: Context, work: Work, assignment: device_pb2.Assignment) -> Outcome:
    request = device_pb2.AbortRequest(
        request_id=work.request_id,
        lease=assignment.lease,
        reason=device_pb2.AbortReason.Name(work.reason),
        message=work.message,
    )
    try:
        retry = (await context.calls.abort(request)).retry
    except RefusedError as error:  # the lease is gone already, which is what was asked for
        if error.is_passing:
            raise
        retry = error.retry
    context.state.clear_work()
    reason = device_pb2.AbortReason.Name(work.reason).removeprefix("ABORT_REASON_")
    context.callbacks.emit(GaveUp(assignment.task_id, reason, work.message))
    return Aborted(draw_wait(retry, context.randomness), assignment.task_id, reason, work.message)


def _drop(
    context: Context, assignment: device_pb2.Assignment, reason: str, message: str, retry: common_pb2.RetryWindow
) -> Dropped:
    context.state.clear_work()
    context.callbacks.emit(Refused(assignment.task_id, reason, message))
    return Dropped(draw_wait(retry, context.randomness), assignment.task_id, reason, message)


def _version_of(assignment: device_pb2.Assignment) -> int:
    """Of work that was verified when it was computed."""
    return task_pb2.VersionManifest.FromString(assignment.version.payload).number


def _check_lease(context: Context, work: Work) -> None:
    if context.clock.unix_ms() >= work.deadline_unix_ms:
        raise LeaseExpiredError(f"the lease ran out while the work was {work.stage}")
