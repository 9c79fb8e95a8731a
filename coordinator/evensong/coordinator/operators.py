"""What operators and engineers may ask: tasks, versions, devices, blobs. Plain functions; :mod:`server` puts them
behind gRPC."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message
from sqlalchemy import Row, insert, select, update

from evensong.coordinator import events, requests, rounds, tables
from evensong.coordinator.admit import Registry
from evensong.coordinator.bundle import check_bundle
from evensong.coordinator.commit import abandon_round, end_task, insert_version
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.coordinator.errors import OperatorError
from evensong.coordinator.plan import parse_plan
from evensong.coordinator.privacy import ledger
from evensong.coordinator.requests import OPERATOR, RequestKey
from evensong.coordinator.rounds import Trigger
from evensong.coordinator.step import NextVersion
from evensong.coordinator.strategies import Optimizers
from evensong.v1 import common_pb2, device_pb2, operator_pb2, task_pb2
from evensong.wire.artifact import decode_artifact
from evensong.wire.errors import EvensongError, WireError
from evensong.wire.signing import EnrolmentToken, sign_blob
from evensong.wire.tensors import decode_tensors
from evensong.wire.transport import OPERATOR_SERVICE

Response = TypeVar("Response", bound=Message)

DEFAULT_TOKEN_LIFETIME_MS = 24 * 3_600_000
MAX_DEVICES = 1_000
DEFAULT_DEVICES = 100
MAX_NAME = 200

#: Task states in which nothing changes any more.
ENDED = (operator_pb2.TASK_STATE_COMPLETE, operator_pb2.TASK_STATE_STOPPED, operator_pb2.TASK_STATE_FAILED)


class Operators:
    """Every unary call of OperatorService as a blocking method: request in, response out, :class:`OperatorError`
    on refusal."""

    def __init__(self, context: Context, registry: Registry, optimizers: Optimizers) -> None:
        self._context = context
        self._registry = registry
        self._optimizers = optimizers

    # ---------------------------------------------------------------------------------------------------------- tasks

    def submit_task(self, request: operator_pb2.SubmitTaskRequest) -> operator_pb2.SubmitTaskResponse:
        """Checks, signs and starts a task; version 0 is its initial parameters."""
        payload = request.bundle.SerializeToString(deterministic=True)
        # Before the transaction: reading an artifact and building a strategy take their time.
        state = self._check_submission(request.bundle, payload, request.initial_parameters)
        submit = partial(self._submit, payload, self._context.blobs.put(state))
        return self._once("SubmitTask", request, operator_pb2.SubmitTaskResponse, submit)

    def _submit(
        self, payload: bytes, state_sha256: str, tx: Transaction, request: operator_pb2.SubmitTaskRequest
    ) -> operator_pb2.SubmitTaskResponse:
        context, bundle, now = self._context, request.bundle, self._context.now()
        plan = parse_plan(payload)
        bundle_sha256, task_id = hashlib.sha256(payload).hexdigest(), context.new_id()
        known = tx.execute(select(tables.bundles.c.sha256).where(tables.bundles.c.sha256 == bundle_sha256)).first()
        if known is None:
            signed = sign_blob("bundle", payload, context.signer)
            tx.execute(
                insert(tables.bundles).values(
                    sha256=bundle_sha256, payload=payload, signature=signed.signature, public_key=signed.public_key
                )
            )
        tx.execute(
            insert(tables.tasks).values(
                task_id=task_id,
                name=bundle.name,
                population=bundle.population,
                bundle_sha256=bundle_sha256,
                artifact_sha256=bundle.artifact.sha256.hex(),
                state=operator_pb2.TASK_STATE_RUNNING,
                created_ms=now,
            )
        )
        insert_version(
            context,
            tx,
            task_pb2.VersionManifest(
                task_id=task_id,
                bundle_sha256=bytes.fromhex(bundle_sha256),
                number=0,
                parent=0,
                parameters=request.initial_parameters,
                clip_norm=bundle.update.adaptive_clipping.initial,
            ),
            NextVersion(
                request.initial_parameters.sha256.hex(),
                request.initial_parameters.size_bytes,
                state_sha256,
                reports=0,
                total_weight=0.0,
                metrics=common_pb2.Metrics(),
            ),
            round=0,
        )
        events.append(context, tx, task_id, operator_pb2.EVENT_KIND_TASK_STARTED, message=bundle.name)
        rounds.open_round(context, tx, task_id, plan, device_pb2.WORK_TRAIN, 1, 0)
        context.log.info("task submitted", task=task_id, name=bundle.name, population=bundle.population)
        return operator_pb2.SubmitTaskResponse(task_id=task_id)

    def _check_submission(self, bundle: task_pb2.TaskBundle, payload: bytes, initial: common_pb2.BlobRef) -> bytes:
        """Everything that could go wrong in a later round goes wrong here. Returns the strategy's first state."""
        try:
            check_bundle(bundle)
            if max(len(bundle.name), len(bundle.population)) > MAX_NAME:
                raise WireError("the task's name or population is too long", expected=f"at most {MAX_NAME} characters")
            ledger.check_budget(bundle)
            plan = parse_plan(payload)
            if plan.update_bytes > self._context.settings.max_update_bytes:
                raise WireError(
                    "an update of this task is too large",
                    expected=f"at most {self._context.settings.max_update_bytes} bytes",
                    got=plan.update_bytes,
                )
            artifact = decode_artifact(self._blob(bundle.artifact, "the artifact"))
            shapes = {variable.name: variable.shape for variable in artifact.variables}
            for spec in plan.layout:
                if shapes.get(spec.name) != spec.shape:
                    raise WireError(
                        f"tensor {spec.name!r} of the layout is not in the artifact",
                        expected=spec.shape,
                        got=shapes.get(spec.name),
                    )
            parameters = decode_tensors(self._blob(initial, "the initial parameters"), plan.layout)
            return self._optimizers.create(bundle.server).init(parameters)
        except OperatorError:
            raise
        except EvensongError as error:
            raise OperatorError("INVALID_ARGUMENT", str(error)) from error

    def _blob(self, reference: common_pb2.BlobRef, what: str) -> bytes:
        sha256 = reference.sha256.hex()
        size = self._context.blobs.size(sha256) if len(reference.sha256) == 32 else None
        if size is None or size != reference.size_bytes:
            raise OperatorError(
                "FAILED_PRECONDITION",
                f"{what} is not here",
                expected=f"blob {sha256} of {reference.size_bytes} bytes",
                got="none" if size is None else f"{size} bytes",
                fix="Upload it first.",
            )
        return self._context.blobs.read(sha256)

    def list_tasks(self, _: operator_pb2.ListTasksRequest) -> operator_pb2.ListTasksResponse:
        with self._context.database.read() as tx:
            rows = tx.execute(_select_tasks().order_by(tables.tasks.c.created_ms, tables.tasks.c.task_id)).all()
        return operator_pb2.ListTasksResponse(tasks=[_status(row) for row in rows])

    def get_task(self, request: operator_pb2.GetTaskRequest) -> operator_pb2.GetTaskResponse:
        with self._context.database.read() as tx:
            return operator_pb2.GetTaskResponse(task=_status(_find_task(tx, request.task_id)))

    def stop_task(self, request: operator_pb2.StopTaskRequest) -> operator_pb2.StopTaskResponse:
        """No new rounds; what is open is abandoned. A task that has ended stays as it is."""
        return self._once("StopTask", request, operator_pb2.StopTaskResponse, self._stop)

    def _stop(self, tx: Transaction, request: operator_pb2.StopTaskRequest) -> operator_pb2.StopTaskResponse:
        task = _find_task(tx, request.task_id)
        if task.state == operator_pb2.TASK_STATE_RUNNING:
            for round in rounds.read_live(tx, task.task_id):
                abandon_round(self._context, tx, round, Trigger.STOPPED, "stopped by an operator", reopen=False)
            end_task(self._context, tx, task, operator_pb2.TASK_STATE_STOPPED)
        return operator_pb2.StopTaskResponse()

    def read_events(self, task_id: str, after: int) -> tuple[list[operator_pb2.TaskEvent], bool]:
        """The next events of a task, and whether no more will come."""
        with self._context.database.read() as tx:
            task = _find_task(tx, task_id)
            found = events.after(tx, task_id, after)
            last = found[-1].sequence if found else after
            return found, task.state in ENDED and last >= task.last_sequence

    # ------------------------------------------------------------------------------------------------------- versions

    def list_versions(self, request: operator_pb2.ListVersionsRequest) -> operator_pb2.ListVersionsResponse:
        with self._context.database.read() as tx:
            task = _find_task(tx, request.task_id)
            rows = tx.execute(
                select(tables.versions)
                .where(tables.versions.c.task_id == task.task_id)
                .order_by(tables.versions.c.number)
            ).all()
        return operator_pb2.ListVersionsResponse(
            versions=[_version_info(row, row.number == task.serving_version) for row in rows]
        )

    def promote_version(self, request: operator_pb2.PromoteVersionRequest) -> operator_pb2.PromoteVersionResponse:
        """Devices predict with this version, and training goes on from it: the open round is abandoned."""
        return self._once("PromoteVersion", request, operator_pb2.PromoteVersionResponse, self._promote)

    def _promote(
        self, tx: Transaction, request: operator_pb2.PromoteVersionRequest
    ) -> operator_pb2.PromoteVersionResponse:
        context, task = self._context, _find_task(tx, request.task_id)
        if request.version > task.latest_version:
            raise OperatorError("NOT_FOUND", f"task {task.task_id} has no version {request.version}")
        if request.version == task.serving_version:
            return operator_pb2.PromoteVersionResponse()
        tx.execute(
            update(tables.tasks).where(tables.tasks.c.task_id == task.task_id).values(serving_version=request.version)
        )
        events.append(
            context,
            tx,
            task.task_id,
            operator_pb2.EVENT_KIND_VERSION_PROMOTED,
            round=task.round,
            version=request.version,
        )
        for round in rounds.read_live(tx, task.task_id):
            if round.work == device_pb2.WORK_TRAIN:
                abandon_round(context, tx, round, Trigger.PROMOTED, f"version {request.version} was promoted")
        return operator_pb2.PromoteVersionResponse()

    # -------------------------------------------------------------------------------------------------------- privacy

    def read_privacy_ledger(
        self, request: operator_pb2.ReadPrivacyLedgerRequest
    ) -> operator_pb2.ReadPrivacyLedgerResponse:
        """What a task, or all tasks of a population, have spent."""
        if bool(request.task_id) == bool(request.population):
            raise OperatorError("INVALID_ARGUMENT", "the ledger is read for a task or for a population")
        response = operator_pb2.ReadPrivacyLedgerResponse()
        with self._context.database.read() as tx:
            if request.task_id:
                bundle = task_pb2.TaskBundle.FromString(_find_task(tx, request.task_id).bundle)
                if bundle.HasField("privacy"):
                    response.plan.CopyFrom(bundle.privacy)
            response.entries.extend(ledger.read(tx, task_id=request.task_id, population=request.population))
        return response

    # -------------------------------------------------------------------------------------------------------- devices

    def create_enrolment_token(
        self, request: operator_pb2.CreateEnrolmentTokenRequest
    ) -> operator_pb2.CreateEnrolmentTokenResponse:
        """A token for ``uses`` devices. Only a hash of its secret is stored, so a repeated request makes a new
        token."""
        if not 0 < len(request.population) <= MAX_NAME:
            raise OperatorError(
                "INVALID_ARGUMENT", "the population is missing or too long", got=request.population[:80]
            )
        context, now = self._context, self._context.now()
        token = EnrolmentToken.create(context.signer_public_key)
        expires = now + (request.lifetime_ms or DEFAULT_TOKEN_LIFETIME_MS)
        if expires >= 1 << 62:
            raise OperatorError("INVALID_ARGUMENT", "the token's lifetime is too long", got=request.lifetime_ms)
        with context.database.transaction() as tx:
            tx.execute(
                insert(tables.enrolment_tokens).values(
                    token_id=token.token_id,
                    secret_sha256=token.secret_hash().hex(),
                    population=request.population,
                    uses_left=min(request.uses or 1, 2**31 - 1),
                    expires_ms=expires,
                )
            )
        return operator_pb2.CreateEnrolmentTokenResponse(token=str(token), expires_unix_ms=expires)

    def list_devices(self, request: operator_pb2.ListDevicesRequest) -> operator_pb2.ListDevicesResponse:
        limit = min(request.limit or DEFAULT_DEVICES, MAX_DEVICES)
        with self._context.database.transaction() as tx:
            self._registry.flush(tx)
            rows = tx.execute(
                select(tables.devices)
                .where(tables.devices.c.device_id > request.after_device_id)
                .order_by(tables.devices.c.device_id)
                .limit(limit)
            ).all()
        return operator_pb2.ListDevicesResponse(devices=[_device_info(row) for row in rows])

    def revoke_device(self, request: operator_pb2.RevokeDeviceRequest) -> operator_pb2.RevokeDeviceResponse:
        """The device's calls are refused from now on, and its place is free; what was accepted stays."""
        return self._once("RevokeDevice", request, operator_pb2.RevokeDeviceResponse, self._revoke)

    def _revoke(self, tx: Transaction, request: operator_pb2.RevokeDeviceRequest) -> operator_pb2.RevokeDeviceResponse:
        changed = tx.execute(
            update(tables.devices).where(tables.devices.c.device_id == request.device_id).values(revoked=True)
        ).rowcount
        if not changed:
            raise OperatorError("NOT_FOUND", "there is no such device", got=request.device_id[:64])
        tx.execute(
            update(tables.leases)
            .where(tables.leases.c.device_id == request.device_id, tables.leases.c.state == rounds.LeaseState.ACTIVE)
            .values(state=rounds.LeaseState.DECLINED)
        )
        tx.after_commit(lambda: self._registry.forget(request.device_id))
        tx.after_commit(lambda: self._context.spool.dismiss(device_id=request.device_id))
        tx.after_commit(self._context.work.beat)
        return operator_pb2.RevokeDeviceResponse()

    # --------------------------------------------------------------------------------------------------- at most once

    def _once(
        self, method: str, request: Any, response_type: type[Response], change: Callable[[Transaction, Any], Response]
    ) -> Response:
        """One transaction, whose answer is stored under the request's id; the same request again gets the same
        answer."""
        body = request.SerializeToString(deterministic=True)
        key = RequestKey.of(OPERATOR, request.request_id, OPERATOR_SERVICE + method, body)
        with self._context.database.transaction() as tx:
            if (stored := requests.recall(tx, key)) is not None:
                return response_type.FromString(stored)
            response = change(tx, request)
            requests.remember(tx, key, response, self._context.now())
            return response


def _select_tasks() -> Any:
    return select(tables.tasks, tables.bundles.c.payload.label("bundle")).join(
        tables.bundles, tables.bundles.c.sha256 == tables.tasks.c.bundle_sha256
    )


def _find_task(tx: Transaction, task_id: str) -> Row[Any]:
    row: Row[Any] | None = tx.execute(_select_tasks().where(tables.tasks.c.task_id == task_id)).one_or_none()
    if row is None:
        raise OperatorError("NOT_FOUND", "there is no such task", got=task_id[:64])
    return row


def _status(row: Row[Any]) -> operator_pb2.TaskStatus:
    return operator_pb2.TaskStatus(
        task_id=row.task_id,
        bundle=task_pb2.TaskBundle.FromString(row.bundle),
        state=row.state,
        round=row.round,
        version=row.serving_version,
        created_unix_ms=row.created_ms,
        message=row.message,
    )


def _version_info(row: Row[Any], serving: bool) -> operator_pb2.VersionInfo:
    return operator_pb2.VersionInfo(
        manifest=task_pb2.VersionManifest.FromString(row.payload),
        manifest_sha256=bytes.fromhex(row.manifest_sha256),
        round=row.round,
        reports=row.reports,
        total_weight=row.total_weight,
        training=common_pb2.Metrics(
            examples=row.training_examples, loss_sum=row.training_loss_sum, correct=row.training_correct
        ),
        evaluation=common_pb2.Metrics(
            examples=row.evaluation_examples, loss_sum=row.evaluation_loss_sum, correct=row.evaluation_correct
        ),
        created_unix_ms=row.created_ms,
        serving=serving,
    )


def _device_info(row: Row[Any]) -> operator_pb2.DeviceInfo:
    refusal = common_pb2.Refusal(reason=row.refusal_reason, message=row.refusal_message)
    return operator_pb2.DeviceInfo(
        device_id=row.device_id,
        population=row.population,
        enrolled_unix_ms=row.enrolled_ms,
        last_seen_unix_ms=row.last_seen_ms,
        accepted_reports=row.accepted_reports,
        revoked=row.revoked,
        last_refusal=refusal if row.refusal_reason else None,
    )
