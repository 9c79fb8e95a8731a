"""Secure rounds under a fake clock: whole ones, and what drops out, restarts, comes late or lies in each stage."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from secure_device import METRICS, SecureDevice, all_take_part, cohort, enrolled, secure_plan
from sqlalchemy import select, update
from tiny_device import World, settle

from evensong.coordinator import tables
from evensong.coordinator.errors import StorageError
from evensong.secagg.vector import VectorSum
from evensong.v1 import common_pb2, device_pb2, operator_pb2, secagg_pb2, task_pb2
from evensong.wire.rotation import rotation_seed
from evensong.wire.tensors import decode_tensors

pytestmark = pytest.mark.secagg

DONE = secagg_pb2.SECURE_OUTCOME_DONE
STEPS = ["shares", "masked", "commit", "unmask"]


def sum_of(devices: Sequence[SecureDevice]) -> VectorSum:
    """What the coordinator should come to: the plain lanes added up, without any mask."""
    first = devices[0]
    total = np.zeros_like(first.plain)
    for device in devices:
        total += device.plain
    seed = rotation_seed(
        first.session_fields["bundle_sha256"], first.session_fields["work"], first.session_fields["round"]
    )
    return first.plan.decode(total, len(devices), clip_norm=1.0, seed=seed)


def check_version(world: World, number: int, survivors: Sequence[SecureDevice]) -> None:
    """Version ``number`` started from zeros and is the mean of exactly these devices' updates."""
    version = world.versions()[number]
    assert version.reports == len(survivors)
    blob = world.core.context.blobs.read(version.manifest.parameters.sha256.hex())
    got = np.concatenate([values.reshape(-1) for values in decode_tensors(blob, world.layout).values()])
    expected = sum_of(survivors)
    assert np.array_equal(got, (expected.update / expected.total_weight).astype(np.float32))
    assert version.training == common_pb2.Metrics(
        examples=METRICS.examples * len(survivors),
        loss_sum=METRICS.loss_sum * len(survivors),
        correct=METRICS.correct * len(survivors),
    )


def stages(world: World) -> list[Any]:
    with world.core.context.database.read() as tx:
        return list(tx.execute(select(tables.secure_attempts).order_by(tables.secure_attempts.c.attempt)).all())


def run(test: Any) -> None:
    asyncio.run(test)


# -------------------------------------------------------------------------------------------------------- whole rounds


def test_a_round_commits_the_exact_sum_of_its_cohort(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 5)
            ends = await all_take_part(world, devices)
            assert [end.outcome for end in ends] == [DONE] * 5  # type: ignore[union-attr]
            check_version(world, 1, devices)
            clipped = [device.delta / max(1.0, float(np.linalg.norm(device.delta))) for device in devices]
            blob = world.core.context.blobs.read(world.versions()[1].manifest.parameters.sha256.hex())
            mean = np.concatenate([values.reshape(-1) for values in decode_tensors(blob, world.layout).values()])
            assert np.abs(mean - np.mean(clipped, axis=0)).max() < 0.02
            assert world.task().state == operator_pb2.TASK_STATE_COMPLETE

    run(story())


def test_two_rounds_follow_each_other_and_their_messages_are_forgotten(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 4, rounds=2)
            await all_take_part(world, devices)
            for device in devices:
                await device.start()
                assert device.assignment.round == 2
            await all_take_part(world, devices)
            await settle()
            assert len(world.versions()) == 3
            with world.core.context.database.read() as tx:
                assert tx.execute(select(tables.secure_messages)).all() == []
                assert tx.execute(select(tables.uploads)).all() == []
            assert list((tmp_path / "data" / "uploads").iterdir()) == []

    run(story())


def test_an_evaluation_is_a_secure_sum_too(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 4, evaluate_every=1)
            await all_take_part(world, devices)
            for device in devices:
                await device.start()
                assert device.assignment.work == device_pb2.WORK_EVALUATE
                refused = await device.report(device.assignment.lease)
                assert refused.refusal.reason == common_pb2.REFUSAL_REASON_INVALID_REQUEST
            await all_take_part(world, devices)
            assert world.versions()[1].evaluation == common_pb2.Metrics(examples=40, loss_sum=20.0, correct=28)
            assert world.task().state == operator_pb2.TASK_STATE_COMPLETE

    run(story())


def test_weights_travel_inside_the_sum(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            await world.submit(
                secure=secure_plan(3), goal=3, rounds=1, weighting=task_pb2.WEIGHTING_EXAMPLES, max_weight=20
            )
            devices = await enrolled(world, 3)
            for device, weight in zip(devices, (20, 5, 1), strict=True):
                device.weight = weight
                await device.start()
            await all_take_part(world, devices)
            check_version(world, 1, devices)
            assert world.versions()[1].total_weight == 26
            blob = world.core.context.blobs.read(world.versions()[1].manifest.parameters.sha256.hex())
            got = np.concatenate([v.reshape(-1) for v in decode_tensors(blob, world.layout).values()])
            expected = sum(d.weight * d.delta / max(1.0, float(np.linalg.norm(d.delta))) for d in devices) / 26
            assert np.abs(got - expected).max() < 0.03  # the grid resolves parts of the largest weight

    run(story())


# ------------------------------------------------------------------------------------------------------------ drop-out


@pytest.mark.parametrize("step", STEPS)
def test_devices_that_leave_in_a_stage_are_survived(tmp_path: Path, step: str) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 8)
            await all_take_part(world, devices, {0: step, 5: step})
            survivors = devices if step in ("commit", "unmask") else [*devices[1:5], *devices[6:]]
            check_version(world, 1, survivors)

    run(story())


def test_devices_that_leave_in_every_stage_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 16)
            await all_take_part(world, devices, {0: "shares", 1: "masked", 2: "commit", 3: "unmask"})
            check_version(world, 1, devices[2:])

    run(story())


@pytest.mark.parametrize("step", ["shares", "masked"])
def test_too_many_that_leave_before_survivors_are_signed_are_one_more_attempt_under_new_keys(
    tmp_path: Path, step: str
) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 8, minimum=3)
            gone = dict.fromkeys(range(4), step)
            ends = await all_take_part(world, devices, gone)
            assert ends[:4] == ["left"] * 4
            assert [attempt.stage for attempt in stages(world)] == ["aborted", "done"]
            check_version(world, 1, devices[4:])

    run(story())


@pytest.mark.parametrize(("step", "leaving"), [("commit", 4), ("unmask", 5)])
def test_too_many_that_leave_once_survivors_are_signed_end_the_round(tmp_path: Path, step: str, leaving: int) -> None:
    """What a device signed may be in a sum that it does not see: it brings that update to no other."""

    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 8, minimum=3)
            ends = await all_take_part(world, devices, dict.fromkeys(range(leaving), step))
            aborted = secagg_pb2.SECURE_OUTCOME_ABORTED
            assert [end.outcome for end in ends[leaving:]] == [aborted] * (8 - leaving)  # type: ignore[union-attr]
            assert len(world.versions()) == 1 and world.task().round == 2
            kinds = [event.kind for event in world.events()]
            assert operator_pb2.EVENT_KIND_ROUND_ABANDONED in kinds

    run(story())


def test_a_cohort_that_never_fills_is_abandoned_at_the_deadline(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 3, goal=6, deadline_ms=5_000, secure=secure_plan(6, min_survivors=5))
            ends = await all_take_part(world, devices)
            assert [end.outcome for end in ends] == [secagg_pb2.SECURE_OUTCOME_ABORTED] * 3  # type: ignore[union-attr]
            assert world.task().round == 2

    run(story())


def test_enough_devices_are_not_kept_waiting_for_places_that_nobody_takes(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 4, over_selection=2.0, secure=secure_plan(4, places=8))
            await all_take_part(world, devices, patience_ms=500)
            check_version(world, 1, devices)

    run(story())


def test_a_device_that_gives_its_place_back_is_not_waited_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 5, goal=4, over_selection=1.25, secure=secure_plan(4, places=5))
            await devices[4].abort(devices[4].assignment.lease, device_pb2.ABORT_REASON_UNFIT)
            await all_take_part(world, devices[:4], patience_ms=500)
            check_version(world, 1, devices[:4])

    run(story())


# ------------------------------------------------------------------------------------------------------------- restart


@pytest.mark.parametrize("stage", ["advertise", "shares", "masked", "commit", "unmask"])
def test_a_coordinator_that_restarts_in_a_stage_goes_on_with_the_same_cohort(tmp_path: Path, stage: str) -> None:
    async def story() -> None:
        folder = tmp_path / "data"
        async with World(folder) as world:
            devices = await cohort(world, 5)
            await reach(devices, stage)
        async with World(folder, clock=world.clock) as second:
            second.task_id = world.task_id
            for device in devices:
                device.dispatcher = second.core.devices
            await finish(devices, stage)
            await settle()
            check_version(second, 1, devices)
            assert len(stages(second)) == 1

    async def reach(devices: list[SecureDevice], stage: str) -> None:
        """All but the last device have sent what ``stage`` asks for; all are told nothing yet."""
        for name in ["advertise", *STEPS]:
            last = name == stage
            await send(devices[:-1] if last else devices, name)
            if last:
                return

    async def finish(devices: list[SecureDevice], stage: str) -> None:
        names = ["advertise", *STEPS]
        await send(devices[-1:], stage)
        for name in names[names.index(stage) + 1 :]:
            await send(devices, name)

    async def send(devices: list[SecureDevice], name: str) -> None:
        for device in devices:
            answer = await ask(device, name)
            assert not answer.HasField("refusal"), (name, answer)

    async def ask(device: SecureDevice, name: str) -> Any:
        if name == "advertise":
            return await device.advertise(wait_ms=0)
        if name == "shares":
            return await device.share((await device.again()).roster, wait_ms=0)
        if name == "masked":
            return await device.mask((await device.again()).delivery)
        if name == "commit":
            return await device.commit_survivors((await device.wait(wait_ms=0)).survivors, wait_ms=0)
        answer = await device.again()
        if answer.HasField("end"):  # its share was not needed any more
            return answer
        return await device.unmask(answer.quorum, wait_ms=0)

    run(story())


# --------------------------------------------------------------------------------------------------- what is not taken


def test_what_is_not_the_protocol_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 4)
            ada, ben = devices[0], devices[1]
            advert = ada.machine.advertise()
            wrong = common_pb2.REFUSAL_REASON_INVALID_REQUEST

            async def refusal(device: SecureDevice, **step: Any) -> int:
                return (await device.step(wait_ms=0, **step)).refusal.reason

            assert await refusal(ben, advertise=advert) == wrong  # another's keys
            assert await refusal(ada) == wrong  # no step
            assert await refusal(ada, shares=secagg_pb2.SecureShares()) == wrong  # a stage too early
            spoilt = secagg_pb2.SecureAdvertise.FromString(advert.SerializeToString())
            spoilt.signature = bytes(64)
            assert await refusal(ada, advertise=spoilt) == wrong
            assert (await ada.step(advertise=advert, wait_ms=0)).refusal.reason == 0
            assert (await ada.again()).refusal.reason == 0  # the same again
            ada.join(1)
            assert await refusal(ada, advertise=ada.machine.advertise()) == wrong  # one identity twice
            ada.attempt = 2
            assert await refusal(ada, advertise=advert) == wrong  # no such attempt
            with world.core.context.database.read() as tx:
                assert len(tx.execute(select(tables.secure_messages)).all()) == 1

    run(story())


@pytest.mark.parametrize("fields", [{"weight": 1.0}, {"metrics": METRICS}, {"within_clip_norm": True}])
def test_weights_and_metrics_in_the_clear_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 4)
            for device in devices:
                await device.advertise(wait_ms=0)
            for device in devices:
                await device.share((await device.again()).roster, wait_ms=0)
            answer = await devices[0].mask((await devices[0].again()).delivery, **fields)
            assert answer.refusal.reason == common_pb2.REFUSAL_REASON_INVALID_UPDATE

    run(story())


def test_a_cohort_whose_count_does_not_add_up_is_thrown_away(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 4)
            devices[2].plain = devices[2].plain + devices[2].plain  # counts itself twice
            ends = await all_take_part(world, devices)
            assert [end.outcome for end in ends] == [DONE] * 4  # type: ignore[union-attr]
            await settle()
            assert len(world.versions()) == 1 and world.task().round == 2
            message = next(e.message for e in world.events() if e.kind == operator_pb2.EVENT_KIND_ROUND_ABANDONED)
            assert "does not check" in message

    run(story())


def test_strangers_get_no_place_once_the_roster_is_closed(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 4, over_selection=2.0, secure=secure_plan(4, places=8))
            for device in devices:
                await device.advertise(wait_ms=0)
            (late,) = await enrolled(world, 1)
            assert not (await late.check_in()).HasField("assignment")

    run(story())


def test_a_blamed_device_is_kept_out_of_the_next_attempt(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 6, minimum=3)
            liar = devices[0]
            honest = liar.machine.on_roster

            def garbage(roster: secagg_pb2.SecureRoster, now_unix_ms: int) -> secagg_pb2.SecureShares:
                shares = honest(roster, now_unix_ms)
                shares.ciphertexts = bytes(len(shares.ciphertexts))
                return shares

            liar.machine.on_roster = garbage  # type: ignore[method-assign]
            await all_take_part(world, devices)
            version = world.versions()[-1]
            assert version.manifest.number == 1
            # Either nobody needed the liar's secrets to be shared, or the cohort went on without it.
            assert version.reports in (5, 6) or len(stages(world)) == 2

    run(story())


# ----------------------------------------------------------------------------------------------------- who is admitted


def test_an_offline_authority_certifies_devices(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from evensong.secagg import certificates
    from evensong.wire.signing import public_key_of

    authority = Ed25519PrivateKey.generate()

    async def story() -> None:
        key = public_key_of(authority).hex()
        async with World(tmp_path / "data", authority_public_key=key) as world:
            token = world.core.operators.create_enrolment_token(
                operator_pb2.CreateEnrolmentTokenRequest(request_id=bytes(16), population="testers", uses=3)
            ).token
            device = SecureDevice(world.core.devices, 0, world.clock.unix_ms)
            plain = await device.enrol(token)
            assert (plain.certificate, plain.authority_public_key.hex()) == (b"", key)
            not_after = world.clock.unix_ms() + 1_000
            good = certificates.issue(authority, public_key_of(device.key), "testers", not_after, bytes(16))
            for certificate, reason in (
                (good[:-1], common_pb2.REFUSAL_REASON_INVALID_REQUEST),
                (
                    certificates.issue(authority, public_key_of(device.key), "others", not_after, bytes(16)),
                    common_pb2.REFUSAL_REASON_INVALID_REQUEST,
                ),
                (good, 0),
            ):
                request = device_pb2.EnrolRequest(
                    request_id=device.rng.bytes(16),
                    token=token,
                    public_key=public_key_of(device.key),
                    population="testers",
                    certificate=certificate,
                )
                answer = await device.send("Enrol", request, device_pb2.EnrolResponse)
                assert answer.refusal.reason == reason
            assert answer.certificate == good

    run(story())


def test_a_certificate_is_renewed_at_check_in_before_it_ends(tmp_path: Path) -> None:
    from evensong.secagg import certificates

    async def story() -> None:
        async with World(tmp_path / "data", certificate_days=1) as world:
            (device,) = await enrolled(world, 1)
            ends = certificates.expires_unix_ms(device.certificate)
            assert (await device.check_in(certificate_expires_unix_ms=ends)).certificate == b""
            await world.clock.advance(17 * 3_600_000)
            renewed = (await device.check_in(certificate_expires_unix_ms=ends)).certificate
            assert certificates.expires_unix_ms(renewed) == world.clock.unix_ms() + 24 * 3_600_000

    run(story())


# ------------------------------------------------------------------------------------------------- tasks that cannot be


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"min_survivors": 2}, "three devices"),
        ({"min_survivors": 9}, "three devices"),
        ({"max_cohort": 7}, "max_cohort"),
        ({"corrupted_share": 0.5}, "corrupted_share"),
        ({"dropout_share": -0.1}, "dropout_share"),
        ({"corrupted_share": 0.45, "dropout_share": 0.45}, "cannot be"),
        ({"stage_ms": 0}, "stage_ms"),
    ],
)
def test_plans_that_give_no_security_are_refused(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            with pytest.raises(Exception, match=why):
                await world.submit(goal=8, minimum=4, secure=secure_plan(8, **fields))

    run(story())


def test_a_secure_sum_without_a_clip_norm_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path / "data") as world:
            with pytest.raises(Exception, match="clip norm"):
                await world.submit(goal=4, secure=secure_plan(4), clip_norm=0.0)

    run(story())


def test_the_codec_of_secure_sums_goes_with_them_only(tmp_path: Path) -> None:
    from evensong.coordinator.bundle import TaskError, check_bundle

    async def story() -> None:
        async with World(tmp_path / "data") as world:
            from tiny_device import make_bundle

            bundle = make_bundle(world.artifact, world.layout, goal=4, secure=secure_plan(4), strategy="fedavg")
            bundle.update.codec = task_pb2.CODEC_FLOAT32
            with pytest.raises(TaskError, match="CODEC_FIELDS"):
                check_bundle(bundle)

    run(story())


def test_a_refused_message_does_not_cost_the_coordinator_its_machine(tmp_path: Path) -> None:
    """Building it anew takes every signature of the round: no device may ask for that with a bad message."""

    async def story() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, 4)
            await devices[0].advertise(wait_ms=0)
            machines = world.core.secure.machines
            before = machines._machines.copy()
            refused = await devices[1].step(shares=secagg_pb2.SecureShares(), wait_ms=0)
            assert refused.refusal.reason == common_pb2.REFUSAL_REASON_INVALID_REQUEST
            assert machines._machines == before and before

    run(story())


@pytest.mark.parametrize("stage", ["advertise", "shares", "masked", "commit", "unmask"])
def test_a_message_that_could_not_be_stored_is_forgotten_and_taken_when_it_comes_again(
    tmp_path: Path, stage: str
) -> None:
    failures = 2

    def fail(point: str) -> None:
        nonlocal failures
        if point == f"secure.{stage}.before_commit" and failures:
            failures -= 1
            raise StorageError("the disk is full")

    async def story() -> None:
        async with World(tmp_path / "data", fault=fail) as world:
            devices = await cohort(world, 4)
            for device in devices:
                device.patient = True
            ends = await all_take_part(world, devices)
            assert [end.outcome for end in ends] == [DONE] * 4  # type: ignore[union-attr]
            assert failures == 0
            check_version(world, 1, devices)

    run(story())


@pytest.mark.parametrize("payload", [b"", b"\xff"], ids=["empty", "garbage"])
def test_a_round_whose_messages_are_damaged_is_abandoned_and_holds_up_nobody(tmp_path: Path, payload: bytes) -> None:
    async def story() -> None:
        folder = tmp_path / "data"
        async with World(folder) as world:
            devices = await cohort(world, 4)
            await devices[0].advertise(wait_ms=0)
            with world.core.context.database.transaction() as tx:
                tx.execute(update(tables.secure_messages).values(payload=payload))
        async with World(folder, clock=world.clock) as second:
            second.task_id = world.task_id
            await settle()
            assert second.task().round == 2
            message = next(e.message for e in second.events() if e.kind == operator_pb2.EVENT_KIND_ROUND_ABANDONED)
            assert "cannot be read back" in message
            for device in devices:
                device.dispatcher = second.core.devices
                await device.start()
            await all_take_part(second, devices)
            check_version(second, 1, devices)

    run(story())
