"""Every way in which a device can be wrong: a typed refusal with a retry window, and nothing else changes."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny_device import POPULATION, TinyDevice, World, settle

from evensong.coordinator import tables
from evensong.v1 import common_pb2, device_pb2, operator_pb2, task_pb2
from evensong.wire.chunks import crc32c, split
from evensong.wire.codecs import UpdateCodec
from evensong.wire.signing import new_request_id, public_key_of, sign_request
from evensong.wire.tensors import encode_tensors
from evensong.wire.transport import DEVICE_SERVICE

Reason = common_pb2.RefusalReason


def everything(world: World) -> dict[str, list[Any]]:
    """All rows of all tables but the notes on a device's last call."""
    with closing(sqlite3.connect(world.settings.database_path)) as connection:
        content = {
            table: connection.execute(f"select * from {table} order by 1, 2").fetchall()
            for table in tables.metadata.tables
            if table != "devices"
        }
        content["devices"] = connection.execute(
            "select device_id, population, accepted_reports, revoked, fencing_token from devices order by 1"
        ).fetchall()
    return content


class Scene:
    """One device that holds a training lease and has uploaded all but the commit; a round of three, nobody reported."""

    def __init__(self, world: World, device: TinyDevice, lease: common_pb2.Lease, update: bytes) -> None:
        self.world, self.device, self.lease, self.update = world, device, lease, update
        self.upload_id = ""


def scene(tmp_path: Path, play: Callable[[Scene], Awaitable[None]], **fields: Any) -> None:
    settings = fields.pop("settings", {})

    async def run() -> None:
        async with World(tmp_path / "data", **settings) as world:
            await world.submit(**fields)
            (device, _) = await world.enrol(2)
            answer = await device.check_in()
            assert answer.assignment.work == device_pb2.WORK_TRAIN
            update = device.make_update(world.layout, world.codec)
            await play(Scene(world, device, answer.assignment.lease, update))

    asyncio.run(run())


async def refused(scene: Scene, reason: Reason, call: Awaitable[Any]) -> Any:
    """The call is refused for this reason with a message, and no row changed."""
    before = everything(scene.world)
    answer = await call
    await settle()
    assert Reason.Name(answer.refusal.reason) == Reason.Name(reason), answer
    assert answer.refusal.message
    assert answer.retry.latest_ms >= answer.retry.earliest_ms
    assert everything(scene.world) == before
    return answer


# ------------------------------------------------------------------------------------------------------- who is calling


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        stranger = TinyDevice(s.world.core.devices, 99, s.world.clock.unix_ms)
        await refused(s, common_pb2.REFUSAL_REASON_UNKNOWN_DEVICE, stranger.check_in())

    scene(tmp_path, play)


def test_a_revoked_device_is_refused_and_its_place_is_free(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        s.world.core.operators.revoke_device(
            operator_pb2.RevokeDeviceRequest(request_id=new_request_id(), device_id=s.device.device_id)
        )
        await refused(s, common_pb2.REFUSAL_REASON_UNKNOWN_DEVICE, s.device.check_in())
        assert (await s.world.devices[1].check_in()).HasField("assignment")

    scene(tmp_path, play, goal=1, minimum=1)


def test_a_signature_by_another_key_of_another_call_or_time_is_refused(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        device, path = s.device, DEVICE_SERVICE + "CheckIn"
        request = device_pb2.CheckInRequest(request_id=new_request_id(), runtime_version="0.1.0")
        body = request.SerializeToString()

        async def send(metadata: Any, sent: bytes = body) -> Any:
            return device_pb2.CheckInResponse.FromString(await device.dispatcher.call(path, sent, metadata))

        good = dict(sign_request(device.key, path, body, device.now()))
        other = dict(sign_request(Ed25519PrivateKey.generate(), path, body, device.now()))
        for metadata in (
            [],
            [*({**good, "evensong-signature-bin": other["evensong-signature-bin"]}.items())],
            sign_request(device.key, DEVICE_SERVICE + "Abort", body, device.now()),
            sign_request(device.key, path, body, device.now() - 600_000),
            sign_request(device.key, path, body, device.now() + 600_000),
            [*good.items(), *good.items()],
            [("evensong-device", "x" * 32), *list(good.items())[1:]],
        ):
            await refused(s, common_pb2.REFUSAL_REASON_BAD_SIGNATURE, send(metadata))
        await refused(s, common_pb2.REFUSAL_REASON_BAD_SIGNATURE, send([*good.items()], body + b"\x10\x01"))

    scene(tmp_path, play)


@pytest.mark.parametrize("fault", ["unknown", "secret", "garbage", "population"])
def test_a_wrong_enrolment_token_is_refused(tmp_path: Path, fault: str) -> None:
    async def play(s: Scene) -> None:
        good = s.world.core.operators.create_enrolment_token(
            operator_pb2.CreateEnrolmentTokenRequest(request_id=new_request_id(), population=POPULATION)
        ).token
        kind, token_id, secret, fingerprint = good.split(".")
        token = {
            "unknown": f"{kind}.{'0' * 16}.{secret}.{fingerprint}",
            "secret": f"{kind}.{token_id}.{'A' * len(secret)}.{fingerprint}",
            "garbage": "evt1.nonsense",
            "population": good,
        }[fault]
        stranger = TinyDevice(s.world.core.devices, 99, s.world.clock.unix_ms)
        population = "others" if fault == "population" else POPULATION
        await refused(s, common_pb2.REFUSAL_REASON_BAD_TOKEN, stranger.enrol(token, population))
        assert not (await stranger.enrol(good)).HasField("refusal"), "a failed attempt must not use the token up"

    scene(tmp_path, play)


def test_an_enrolment_token_serves_once_and_expires(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        operators, new = (
            s.world.core.operators,
            [TinyDevice(s.world.core.devices, seed, s.world.clock.unix_ms) for seed in (98, 99)],
        )
        request = operator_pb2.CreateEnrolmentTokenRequest(
            request_id=new_request_id(), population=POPULATION, lifetime_ms=1_000
        )
        first, second = (operators.create_enrolment_token(request).token for _ in range(2))
        assert first != second
        assert not (await new[0].enrol(first)).HasField("refusal")
        await refused(s, common_pb2.REFUSAL_REASON_BAD_TOKEN, new[1].enrol(first))
        await s.world.clock.advance(1_000)
        await refused(s, common_pb2.REFUSAL_REASON_BAD_TOKEN, new[1].enrol(second))

    scene(tmp_path, play)


def test_an_enrolment_is_signed_by_the_key_that_it_registers(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        thief = TinyDevice(s.world.core.devices, 99, s.world.clock.unix_ms)
        request = device_pb2.EnrolRequest(
            request_id=new_request_id(), token="evt1.x", public_key=public_key_of(s.device.key)
        )
        await refused(
            s, common_pb2.REFUSAL_REASON_BAD_SIGNATURE, thief.send("Enrol", request, device_pb2.EnrolResponse)
        )
        request.public_key = b"short"
        await refused(
            s, common_pb2.REFUSAL_REASON_INVALID_REQUEST, thief.send("Enrol", request, device_pb2.EnrolResponse)
        )

    scene(tmp_path, play)


# ------------------------------------------------------------------------------------------------- malformed requests


def test_bytes_that_are_no_message_and_methods_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        reason = common_pb2.REFUSAL_REASON_INVALID_REQUEST
        await refused(s, reason, s.device.send("CheckIn", b"\xff\xff\xff", device_pb2.CheckInResponse))
        await refused(s, reason, s.device.send("Steal", b"", device_pb2.AbortResponse))
        await refused(s, reason, s.device.send("Download", b"", device_pb2.AbortResponse))
        too_large = bytes(s.world.settings.max_message_bytes + 1)
        await refused(s, reason, s.device.send("UploadChunk", too_large, device_pb2.UploadChunkResponse))

    scene(tmp_path, play)


@pytest.mark.parametrize(
    "fields",
    [
        {"request_id": b"short"},
        {"runtime_version": "new"},
        {"runtime_version": "1.2"},
        {"runtime_version": "-1.0.0"},
        {"population": "others"},
    ],
)
def test_a_malformed_check_in_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    async def play(s: Scene) -> None:
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_REQUEST, s.world.devices[1].check_in(**fields))

    scene(tmp_path, play)


@pytest.mark.parametrize(
    ("fields", "number"),
    [({"memory_bytes": 999}, "999"), ({"training_examples": 4}, "5"), ({"runtime_version": "0.0.9"}, "0.1.0")],
)
def test_a_device_that_fits_no_task_is_told_the_numbers(tmp_path: Path, fields: dict[str, Any], number: str) -> None:
    async def play(s: Scene) -> None:
        answer = await refused(
            s, common_pb2.REFUSAL_REASON_INELIGIBLE, s.world.devices[1].check_in(wait_ms=60_000, **fields)
        )
        assert number in answer.refusal.message
        assert answer.retry.earliest_ms > s.world.settings.retry_earliest_ms
        if "runtime_version" not in fields:
            assert answer.serving[0].task_id == s.world.task_id, "it still predicts with the committed model"

    scene(tmp_path, play, min_examples=5)


def test_a_request_id_with_other_content_is_a_replay(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        other = s.world.devices[1]
        request_id = new_request_id()
        first = await other.check_in(request_id=request_id)
        assert first.HasField("assignment")
        await refused(s, common_pb2.REFUSAL_REASON_REPLAY, other.check_in(request_id=request_id, training_examples=11))
        request = device_pb2.AbortRequest(request_id=request_id, lease=first.assignment.lease)
        await refused(s, common_pb2.REFUSAL_REASON_REPLAY, other.send("Abort", request, device_pb2.AbortResponse))
        again = await other.check_in(request_id=request_id)
        assert again.assignment == first.assignment

    scene(tmp_path, play)


def test_ids_of_different_devices_do_not_collide(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        third = (await s.world.enrol(1))[0]
        request_id = new_request_id()
        for device in (s.world.devices[1], third):
            answer = await device.check_in(request_id=request_id)
            assert answer.HasField("assignment")

    scene(tmp_path, play)


# ------------------------------------------------------------------------------------------------------------- uploads


def test_an_update_of_the_wrong_length_or_without_a_hash_is_refused_before_a_byte_is_sent(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_UPDATE, s.device.begin(s.lease, s.update + b"\0"))
        reference = common_pb2.BlobRef(sha256=b"short", size_bytes=len(s.update))
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_REQUEST, s.device.begin(s.lease, s.update, update=reference))

    scene(tmp_path, play)


def test_chunks_may_repeat_but_not_leave_gaps_overlap_or_lie(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        begun = await s.device.begin(s.lease, s.update)
        chunks = list(split(s.update, 30))

        async def send(chunk: common_pb2.BlobChunk) -> Any:
            return await s.device.chunk(begun.upload_id, s.lease, chunk)

        def chunk(source: common_pb2.BlobChunk, **fields: Any) -> common_pb2.BlobChunk:
            copy = common_pb2.BlobChunk(offset=source.offset, data=source.data, crc32c=source.crc32c)
            copy.MergeFrom(common_pb2.BlobChunk(**fields))
            return copy

        bad = common_pb2.REFUSAL_REASON_BAD_CHUNK
        assert (await refused(s, bad, send(chunks[1]))).received_bytes == 0
        assert (await send(chunks[0])).received_bytes == 30
        assert (await send(chunks[0])).received_bytes == 30, "a repeated chunk is acknowledged"
        assert (await refused(s, bad, send(chunks[2]))).received_bytes == 30
        assert (await refused(s, bad, send(chunk(chunks[1], offset=15)))).received_bytes == 30
        assert (await refused(s, bad, send(chunk(chunks[1], crc32c=1)))).received_bytes == 30
        assert (await refused(s, bad, send(common_pb2.BlobChunk(offset=30)))).received_bytes == 30
        huge = next(split(bytes(len(s.update) + 1), 1 << 20))
        assert (await refused(s, bad, send(huge))).received_bytes == 30
        assert (await s.device.begin(s.lease, s.update)).received_bytes == 30, "an upload resumes"
        for rest in chunks[1:]:
            assert not (await send(rest)).HasField("refusal")
        assert not (await s.device.commit(begun.upload_id, s.lease)).HasField("refusal")

    scene(tmp_path, play)


def test_an_upload_that_nobody_began_or_another_device_began_is_not_found(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        await refused(s, common_pb2.REFUSAL_REASON_NOT_FOUND, s.device.commit("0" * 32, s.lease))
        other = s.world.devices[1]
        lease = (await other.check_in()).assignment.lease
        upload_id = await s.device.upload(s.lease, s.update)
        await refused(s, common_pb2.REFUSAL_REASON_NOT_FOUND, other.commit(upload_id, lease))
        chunk = next(split(s.update, 30))
        await refused(s, common_pb2.REFUSAL_REASON_NOT_FOUND, other.chunk(upload_id, lease, chunk))

    scene(tmp_path, play)


def test_the_number_of_open_uploads_is_limited(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        for seed in range(2):
            update = np.random.default_rng(seed).bytes(len(s.update))
            assert not (await s.device.begin(s.lease, update)).HasField("refusal")
        await refused(s, common_pb2.REFUSAL_REASON_QUOTA, s.device.begin(s.lease, s.update))

    scene(tmp_path, play)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 100.5])
def test_a_weight_out_of_bounds_is_refused(tmp_path: Path, weight: float) -> None:
    async def play(s: Scene) -> None:
        upload_id = await s.device.upload(s.lease, s.update)
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_UPDATE, s.device.commit(upload_id, s.lease, weight=weight))
        assert not (await s.device.commit(upload_id, s.lease, weight=100.0)).HasField("refusal")

    scene(tmp_path, play)


def test_under_uniform_weighting_every_update_weighs_one(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        upload_id = await s.device.upload(s.lease, s.update)
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_UPDATE, s.device.commit(upload_id, s.lease, weight=2.0))
        assert not (await s.device.commit(upload_id, s.lease, weight=1.0)).HasField("refusal")

    scene(tmp_path, play, weighting=task_pb2.WEIGHTING_UNIFORM)


@pytest.mark.parametrize(
    "metrics",
    [
        {"examples": 0},
        {"examples": 10, "loss_sum": float("nan")},
        {"examples": 10, "loss_sum": float("inf")},
        {"examples": 10, "correct": 11},
        {"examples": 1 << 63},
    ],
)
def test_metrics_that_cannot_be_are_refused(tmp_path: Path, metrics: dict[str, Any]) -> None:
    async def play(s: Scene) -> None:
        upload_id = await s.device.upload(s.lease, s.update)
        call = s.device.commit(upload_id, s.lease, metrics=common_pb2.Metrics(**metrics))
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_UPDATE, call)

    scene(tmp_path, play)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_refused_and_does_not_touch_the_sum(tmp_path: Path, value: float) -> None:
    async def play(s: Scene) -> None:
        good = [await s.world.train(s.world.devices[1])]
        raw = bytearray(s.update)
        raw[-4:] = np.float32(value).tobytes()
        raw[16:20] = crc32c(bytes(raw[20:])).to_bytes(4, "little")
        upload_id = await s.device.upload(s.lease, bytes(raw))
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_UPDATE, s.device.commit(upload_id, s.lease))
        assert not good[0].HasField("refusal")
        upload_id = await s.device.upload(s.lease, s.update)
        assert not (await s.device.commit(upload_id, s.lease)).HasField("refusal")
        await settle()
        assert s.world.versions()[1].total_weight == 20.0

    scene(tmp_path, play, goal=2)


def test_an_update_of_another_layout_or_codec_is_refused(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        forged = bytes(len(s.update))
        upload_id = await s.device.upload(s.lease, forged)
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_UPDATE, s.device.commit(upload_id, s.lease))

    scene(tmp_path, play, codec=UpdateCodec(bits=8))


def test_an_update_that_is_not_the_announced_one_or_not_complete_is_refused(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        announced = common_pb2.BlobRef(sha256=hashlib.sha256(b"other").digest(), size_bytes=len(s.update))
        begun = await s.device.begin(s.lease, s.update, update=announced)
        first, *rest = split(s.update, 30)
        await s.device.chunk(begun.upload_id, s.lease, first)
        await refused(s, common_pb2.REFUSAL_REASON_BAD_CHUNK, s.device.commit(begun.upload_id, s.lease))
        for chunk in rest:
            await s.device.chunk(begun.upload_id, s.lease, chunk)
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_UPDATE, s.device.commit(begun.upload_id, s.lease))

    scene(tmp_path, play)


# ------------------------------------------------------------------------------------------------- leases and deadlines


def test_an_expired_lease_is_refused_and_its_place_given_away(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        upload_id = await s.device.upload(s.lease, s.update)
        held = asyncio.ensure_future(s.world.devices[1].check_in(wait_ms=20_000))
        await s.world.clock.advance(9_999)
        assert not held.done()
        await s.world.clock.advance(1)
        assert (await held).HasField("assignment"), "a held device gets the place as soon as it is free"
        reason = common_pb2.REFUSAL_REASON_LEASE_EXPIRED
        await refused(s, reason, s.device.commit(upload_id, s.lease))
        await refused(s, reason, s.device.chunk(upload_id, s.lease, next(split(s.update, 30))))
        await refused(s, reason, s.device.begin(s.lease, s.update))
        await refused(s, reason, s.device.abort(s.lease))

    scene(tmp_path, play, goal=1, minimum=1, settings={"lease_ms": 10_000})


def test_a_newer_lease_of_the_same_device_fences_the_older_out(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        upload_id = await s.device.upload(s.lease, s.update)
        again = (await s.device.check_in()).assignment
        assert again.round == 1 and again.lease.fencing_token > s.lease.fencing_token
        reason = common_pb2.REFUSAL_REASON_LEASE_EXPIRED
        await refused(s, reason, s.device.commit(upload_id, s.lease))
        forged = common_pb2.Lease(lease_id=again.lease.lease_id, fencing_token=s.lease.fencing_token)
        await refused(s, reason, s.device.commit(upload_id, forged))
        await refused(s, reason, s.world.devices[1].commit(upload_id, again.lease))

    scene(tmp_path, play)


def test_late_stale_and_superfluous_updates_are_told_apart(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        upload_id = await s.device.upload(s.lease, s.update)
        await s.world.clock.advance(60_000)
        await refused(s, common_pb2.REFUSAL_REASON_TOO_LATE, s.device.commit(upload_id, s.lease))

        lease = (await s.device.check_in()).assignment.lease
        upload_id = await s.device.upload(lease, s.update)
        other, third = s.world.devices[1], (await s.world.enrol(1))[0]
        await s.world.train(other)
        assert s.world.task().version == 1
        await refused(s, common_pb2.REFUSAL_REASON_NOT_NEEDED, s.device.commit(upload_id, lease))

        answer = await third.check_in()
        upload_id = await third.upload(answer.assignment.lease, third.make_update(s.world.layout, s.world.codec))
        s.world.core.operators.promote_version(
            operator_pb2.PromoteVersionRequest(request_id=new_request_id(), task_id=s.world.task_id, version=0)
        )
        await settle()
        await refused(s, common_pb2.REFUSAL_REASON_STALE, third.commit(upload_id, answer.assignment.lease))

    scene(tmp_path, play, goal=1, minimum=1, over_selection=2.0, rounds=5)


def test_a_second_report_in_one_round_is_refused(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        upload_id = await s.device.upload(s.lease, s.update)
        assert not (await s.device.commit(upload_id, s.lease)).HasField("refusal")
        await refused(s, common_pb2.REFUSAL_REASON_ALREADY_REPORTED, s.device.commit(upload_id, s.lease))
        await refused(s, common_pb2.REFUSAL_REASON_ALREADY_REPORTED, s.device.begin(s.lease, s.update))
        assert not (await s.device.check_in()).HasField("assignment")

    scene(tmp_path, play)


def test_a_training_lease_is_no_evaluation_lease(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_REQUEST, s.device.report(s.lease))

    scene(tmp_path, play)


def test_an_abort_frees_the_place_for_another_device_and_may_be_repeated(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        assert not (await s.world.devices[1].check_in()).HasField("assignment")
        request = device_pb2.AbortRequest(
            request_id=new_request_id(), lease=s.lease, reason=device_pb2.ABORT_REASON_DIVERGED
        )
        for _ in range(2):
            answer = await s.device.send("Abort", request, device_pb2.AbortResponse)
            assert not answer.HasField("refusal")
        assert not (await s.device.check_in()).HasField("assignment"), "it cannot do this round's work"
        assert (await s.world.devices[1].check_in()).HasField("assignment")

    scene(tmp_path, play, goal=1, minimum=1)


# ------------------------------------------------------------------------------------------------------------ downloads


def test_devices_download_what_their_tasks_need_and_nothing_else(tmp_path: Path) -> None:
    async def play(s: Scene) -> None:
        world = s.world
        artifact = hashlib.sha256(world.artifact).digest()
        assert await s.device.download(artifact) == world.artifact
        assert await s.device.download(artifact, 100) == world.artifact[100:], "a download resumes"
        assert await s.device.download(artifact, len(world.artifact)) == b""
        zeros = encode_tensors({spec.name: np.zeros(spec.shape, np.float32) for spec in world.layout}, world.layout)
        assert await s.device.download(hashlib.sha256(zeros).digest()) == zeros
        secret = world.core.context.blobs.put(b"of another population")

        async def first(**fields: Any) -> Any:
            path, body = DEVICE_SERVICE + "Download", device_pb2.DownloadRequest(**fields).SerializeToString()
            metadata = sign_request(s.device.key, path, body, s.device.now())
            answers = [part async for part in s.device.dispatcher.stream(path, body, metadata)]
            assert len(answers) == 1
            return device_pb2.DownloadResponse.FromString(answers[0])

        await refused(s, common_pb2.REFUSAL_REASON_NOT_FOUND, first(sha256=bytes.fromhex(secret)))
        await refused(s, common_pb2.REFUSAL_REASON_NOT_FOUND, first(sha256=b"../../signer.key"))
        await refused(s, common_pb2.REFUSAL_REASON_INVALID_REQUEST, first(sha256=artifact, offset=1 << 40))

    scene(tmp_path, play, settings={"chunk_bytes": 1024})
