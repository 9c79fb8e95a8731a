"""A device that takes part in secure rounds step by step, and what a coordinator under attack could look at."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_device import POPULATION, RefusedUploadError, TinyDevice, World, settle

from evensong.secagg.device import DeviceMachine
from evensong.secagg.session import Policy, Session
from evensong.secagg.vector import VectorPlan
from evensong.v1 import common_pb2, device_pb2, secagg_pb2, task_pb2
from evensong.wire.rotation import rotation_seed
from evensong.wire.signing import verify_blob

Lanes = npt.NDArray[np.uint64]
METRICS = common_pb2.Metrics(examples=10, loss_sum=5.0, correct=7)


def secure_plan(goal: int, *, places: int | None = None, **fields: Any) -> task_pb2.SecurePlan:
    values: dict[str, Any] = {
        "corrupted_share": 0.05,
        "dropout_share": 0.3,
        "min_survivors": 3,
        "max_cohort": places or goal,
        "stage_ms": 1_000,
    } | fields
    return task_pb2.SecurePlan(**values)


class SecureDevice(TinyDevice):
    """Each step is a method; ``step`` sends any request, and what a machine would not send too."""

    certificate = b""
    authority = b""
    weight = 1
    patient = False  #: repeats a call, byte for byte, while the coordinator cannot store

    async def send(self, method: str, request: Any, response_type: type[Any], *, time: int | None = None) -> Any:
        response = await super().send(method, request, response_type, time=time)
        while self.patient and response.refusal.reason == common_pb2.REFUSAL_REASON_UNAVAILABLE:
            response = await super().send(method, request, response_type, time=time)
        return response

    async def enrol(self, token: str, population: str = POPULATION) -> device_pb2.EnrolResponse:
        response = await super().enrol(token, population)
        self.certificate, self.authority = response.certificate, response.authority_public_key
        return response

    async def start(self, **fields: Any) -> device_pb2.Assignment:
        """Checks in; what it would have learnt is drawn at random."""
        answer = await self.check_in(**fields)
        assert answer.HasField("assignment"), answer
        self.take(answer.assignment)
        return answer.assignment

    def take(self, assignment: device_pb2.Assignment) -> None:
        self.assignment = assignment
        bundle = task_pb2.TaskBundle.FromString(verify_blob("bundle", assignment.bundle, self.signer))
        manifest = self.manifest(assignment)
        self.plan = VectorPlan.from_bundle(bundle, assignment.work)
        bundle_sha256 = hashlib.sha256(assignment.bundle.payload).digest()
        self.delta = self.rng.normal(0, 0.1, self.plan.size).astype(np.float32)
        self.plain: Lanes = self.plan.encode(
            self.delta,
            clip_norm=manifest.clip_norm or bundle.update.clip_norm,
            seed=rotation_seed(bundle_sha256, assignment.work, assignment.round),
            weight=self.weight,
            metrics=METRICS,
            words=lambda count: self.rng.integers(0, 1 << 32, count, dtype=np.uint32),
        )[0]
        self.policy = Policy.from_plan(bundle.secure)
        self.session_fields: dict[str, Any] = {
            "bundle_sha256": bundle_sha256,
            "manifest_sha256": hashlib.sha256(assignment.version.payload).digest(),
            "task_id": assignment.task_id,
            "work": assignment.work,
            "round": assignment.round,
            "population": POPULATION,
        }
        self.join(1)

    def join(self, attempt: int) -> None:
        self.attempt = attempt
        self.machine = DeviceMachine(
            Session(attempt=attempt, **self.session_fields),
            self.policy,
            identity=self.key,
            certificate=self.certificate,
            authority_public_key=self.authority,
            coordinator_public_key=self.signer,
            draw=self.rng.bytes,
        )

    async def step(self, **step: Any) -> secagg_pb2.SecureResponse:
        wait_ms = step.pop("wait_ms", 60_000)
        self.last = step
        request = secagg_pb2.SecureRequest(lease=self.assignment.lease, attempt=self.attempt, wait_ms=wait_ms, **step)
        response: secagg_pb2.SecureResponse = await self.send("Secure", request, secagg_pb2.SecureResponse)
        return response

    async def again(self) -> secagg_pb2.SecureResponse:
        """The last step once more: what a device does that has no answer yet."""
        return await self.step(wait_ms=0, **self.last)

    async def advertise(self, **fields: Any) -> secagg_pb2.SecureResponse:
        return await self.step(advertise=self.machine.advertise(), **fields)

    async def share(self, roster: secagg_pb2.SecureRoster, **fields: Any) -> secagg_pb2.SecureResponse:
        return await self.step(shares=self.machine.on_roster(roster, self.now()), **fields)

    async def mask(self, delivery: secagg_pb2.SecureDelivery, **fields: Any) -> device_pb2.CommitUploadResponse:
        """Masks and uploads; the answer to the commit."""
        self.machine.on_delivery(delivery)
        self.masked = self.plain.copy()
        self.machine.mask(self.masked)
        data = self.masked.astype("<u8").tobytes()
        try:
            upload_id = await self.upload(self.assignment.lease, data)
        except RefusedUploadError as late:
            return device_pb2.CommitUploadResponse(refusal=late.refusal)
        word = self.machine.masked(hashlib.sha256(data).digest())
        values: dict[str, Any] = {"weight": 0.0, "metrics": None, "masked": word} | fields
        return await self.commit(upload_id, self.assignment.lease, **values)

    async def wait(self, **fields: Any) -> secagg_pb2.SecureResponse:
        return await self.step(masked=secagg_pb2.SecureWait(), **fields)

    async def commit_survivors(self, survivors: secagg_pb2.SecureSurvivors, **fields: Any) -> secagg_pb2.SecureResponse:
        return await self.step(commit=self.machine.on_survivors(survivors), **fields)

    async def unmask(self, quorum: secagg_pb2.SecureQuorum, **fields: Any) -> secagg_pb2.SecureResponse:
        return await self.step(unmask=self.machine.on_quorum(quorum), **fields)

    async def take_part(self, leave_before: str = "") -> secagg_pb2.SecureEnd | str:
        """The whole protocol, through every attempt, or until the step before which the device leaves."""
        while True:
            outcome = await self._attempt(leave_before)
            if isinstance(outcome, str) or outcome.outcome != secagg_pb2.SECURE_OUTCOME_AGAIN:
                return outcome
            self.join(self.newest)

    async def _attempt(self, leave_before: str) -> secagg_pb2.SecureEnd | str:
        answer: Any = None
        for name, send in (
            ("advertise", lambda _: self.advertise()),
            ("shares", lambda answer: self.share(answer.roster)),
            ("masked", lambda answer: self._mask_and_wait(answer.delivery)),
            ("commit", lambda answer: self.commit_survivors(answer.survivors)),
            ("unmask", lambda answer: self.unmask(answer.quorum)),
        ):
            if name == leave_before:
                return "left"
            answer = await send(answer)
            if answer.HasField("refusal"):
                return str(common_pb2.RefusalReason.Name(answer.refusal.reason))
            if answer.HasField("end"):
                end: secagg_pb2.SecureEnd = answer.end
                if end.outcome == secagg_pb2.SECURE_OUTCOME_AGAIN:
                    assert answer.attempt > self.attempt
                self.newest = answer.attempt
                return end
            assert answer.WhichOneof("next"), f"{name} was not answered"
        raise AssertionError("the protocol has no end")

    async def _mask_and_wait(self, delivery: secagg_pb2.SecureDelivery) -> secagg_pb2.SecureResponse:
        committed = await self.mask(delivery)
        if committed.HasField("refusal"):
            return secagg_pb2.SecureResponse(refusal=committed.refusal)
        return await self.wait()


async def cohort(world: World, count: int, **plan: Any) -> list[SecureDevice]:
    """A secure task, and devices that have a place in its first round."""
    fields: dict[str, Any] = {"goal": count, "rounds": 1} | plan
    secure = fields.pop("secure", None) or secure_plan(fields["goal"])
    await world.submit(secure=secure, **fields)
    devices = await enrolled(world, count)
    for device in devices:
        await device.start()
    return devices


async def enrolled(world: World, count: int) -> list[SecureDevice]:
    devices = await world.enrol(count, SecureDevice)
    assert all(isinstance(device, SecureDevice) for device in devices)
    return devices  # type: ignore[return-value]


async def all_take_part(
    world: World, devices: list[SecureDevice], leaving: Mapping[int, str] | None = None, patience_ms: int = 20_000
) -> list[secagg_pb2.SecureEnd | str]:
    """Everybody at once, while time passes."""
    running = [
        asyncio.ensure_future(device.take_part((leaving or {}).get(index, ""))) for index, device in enumerate(devices)
    ]
    for _ in range(patience_ms // 500):
        await settle()
        if all(task.done() for task in running):
            break
        await world.clock.advance(500)
    return [await task for task in running]
