"""Masked vectors on their way, and who may send one: what is cut, late, sent twice, or of too many identities."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from secure_device import METRICS, SecureDevice, cohort
from tiny_device import POPULATION, World, settle

from evensong.secagg import bitmap
from evensong.secagg.transcript import masked_bytes
from evensong.v1 import common_pb2, device_pb2, operator_pb2, secagg_pb2
from evensong.wire.chunks import split
from evensong.wire.rotation import rotation_seed
from evensong.wire.signing import new_request_id
from evensong.wire.tensors import decode_tensors

pytestmark = pytest.mark.secagg

COUNT = 5


class Masked:
    """A device that has masked its vector and sent nothing of it."""

    def __init__(self, device: SecureDevice, delivery: secagg_pb2.SecureDelivery) -> None:
        self.device = device
        device.machine.on_delivery(delivery)
        lanes = device.plain.copy()
        device.machine.mask(lanes)
        self.data = lanes.astype("<u8").tobytes()
        self.word = device.machine.masked(hashlib.sha256(self.data).digest())

    def sign(self, data: bytes) -> bytes:
        """What a modified device signs: any vector."""
        machine = self.device.machine
        roster = machine._known_roster
        assert roster is not None
        this, sharers = roster.members[machine._place], bitmap.encode(machine._sharers, machine.members)
        digest = hashlib.sha256(data).digest()
        return self.device.key.sign(masked_bytes(roster.context, roster.hash, this.id, sharers, digest))

    async def upload(self, data: bytes | None = None) -> str:
        return await self.device.upload(self.device.assignment.lease, self.data if data is None else data)

    async def commit(self, upload_id: str, **fields: Any) -> device_pb2.CommitUploadResponse:
        values: dict[str, Any] = {"weight": 0.0, "metrics": None, "masked": self.word} | fields
        return await self.device.commit(upload_id, self.device.assignment.lease, **values)


def story(tmp_path: Path, play: Callable[[World, list[Masked]], Awaitable[None]]) -> None:
    """A round whose devices have all shared and masked."""

    async def run() -> None:
        async with World(tmp_path / "data") as world:
            devices = await cohort(world, COUNT)
            for device in devices:
                await device.advertise(wait_ms=0)
            for device in devices:
                await device.share((await device.again()).roster, wait_ms=0)
            await play(world, [Masked(device, (await device.again()).delivery) for device in devices])

    asyncio.run(run())


async def finish(world: World, masked: list[Masked]) -> None:
    """What is left of the round, by these devices; it ends with the sum of their vectors."""
    await until_survivors(world, masked[0])
    for one in masked:
        await one.device.commit_survivors((await one.device.wait(wait_ms=0)).survivors, wait_ms=0)
    for one in masked:
        answer = await one.device.again()
        if answer.HasField("quorum"):  # else enough shares are there
            await one.device.unmask(answer.quorum, wait_ms=0)
    await settle()
    check_sum(world, [one.device for one in masked])


async def until_survivors(world: World, one: Masked) -> None:
    """Until the coordinator has named them, at the end of the stage at the latest."""
    for _ in range(10):
        if (await one.device.wait(wait_ms=0)).HasField("survivors"):
            return
        await world.clock.advance(500)
    raise AssertionError("the stage never closed")


def check_sum(world: World, survivors: list[SecureDevice]) -> None:
    """The first version is made of exactly these devices' vectors."""
    version, first = world.versions()[1], survivors[0]
    assert version.reports == len(survivors)
    assert version.training.examples == METRICS.examples * len(survivors)
    fields = first.session_fields
    total = np.add.reduce([device.plain for device in survivors])
    seed = rotation_seed(fields["bundle_sha256"], fields["work"], fields["round"])
    expected = first.plan.decode(total, len(survivors), clip_norm=1.0, seed=seed)
    blob = world.core.context.blobs.read(version.manifest.parameters.sha256.hex())
    got = np.concatenate([values.reshape(-1) for values in decode_tensors(blob, world.layout).values()])
    assert np.array_equal(got, (expected.update / expected.total_weight).astype(np.float32))


def test_case_26_chunk_missing_repeated_reordered_short(tmp_path: Path) -> None:
    """Every fault is refused and leaves the upload where it was; then it is completed, and the sum is exact."""

    async def play(world: World, masked: list[Masked]) -> None:
        one, bad = masked[0], common_pb2.REFUSAL_REASON_BAD_CHUNK
        device, lease = one.device, one.device.assignment.lease
        for data in (one.data[:-8], one.data + bytes(8), b""):  # a vector of another length is not even begun
            begun = await device.begin(lease, data)
            assert begun.refusal.reason in (
                common_pb2.REFUSAL_REASON_INVALID_UPDATE,
                common_pb2.REFUSAL_REASON_INVALID_REQUEST,
            )
        begun = await device.begin(lease, one.data)
        chunks = list(split(one.data, 16))
        assert len(chunks) > 3
        cut = next(split(chunks[1].data[:-1], 16))
        short = common_pb2.BlobChunk(offset=chunks[1].offset, data=cut.data, crc32c=chunks[1].crc32c)

        async def send(chunk: common_pb2.BlobChunk) -> Any:
            return await device.chunk(begun.upload_id, lease, chunk)

        assert (await send(chunks[0])).received_bytes == 16
        assert (await send(chunks[0])).received_bytes == 16  # repeated
        for chunk in (chunks[2], short):  # reordered, or the one between is missing; cut short
            answer = await send(chunk)
            assert (answer.refusal.reason, answer.received_bytes) == (bad, 16)
        early = await one.commit(begun.upload_id)
        assert early.HasField("refusal")  # the rest is missing
        for chunk in chunks[1:]:
            assert not (await send(chunk)).HasField("refusal")
        assert not (await one.commit(begun.upload_id)).HasField("refusal")
        for other in masked[1:]:
            assert not (await other.commit(await other.upload())).HasField("refusal")
        await finish(world, masked)

    story(tmp_path, play)


def test_case_27_disconnect_in_mid_vector(tmp_path: Path) -> None:
    """One resumes where its connection broke; one never comes back, and the sum is that of the others."""

    async def play(world: World, masked: list[Masked]) -> None:
        back, gone, *others = masked
        for one in (back, gone):
            lease = one.device.assignment.lease
            begun = await one.device.begin(lease, one.data)
            await one.device.chunk(begun.upload_id, lease, next(split(one.data, 16)))
        begun = await back.device.begin(back.device.assignment.lease, back.data)
        assert begun.received_bytes == 16
        for one in (back, *others):
            assert not (await one.commit(await one.upload())).HasField("refusal")
        await finish(world, [back, *others])

    story(tmp_path, play)


def test_case_28_late_vector(tmp_path: Path) -> None:
    """Complete, but committed after the survivors were named: refused, and in no sum."""

    async def play(world: World, masked: list[Masked]) -> None:
        late, *others = masked
        upload_id = await late.upload()
        for one in others:
            assert not (await one.commit(await one.upload())).HasField("refusal")
        await until_survivors(world, others[0])
        answer = await late.commit(upload_id)
        assert answer.HasField("refusal"), answer
        await finish(world, others)

    story(tmp_path, play)


def test_case_29_two_vectors_from_one_device(tmp_path: Path) -> None:
    async def play(world: World, masked: list[Masked]) -> None:
        one = masked[0]
        first = await one.upload()
        other = np.frombuffer(one.data, "<u8") + np.uint64(1)
        second = await one.upload(other.tobytes())
        word = one.word  # the machine signs once; a modified device would sign the second as well
        assert not (await one.commit(first)).HasField("refusal")
        signed = secagg_pb2.SecureMasked(signature=one.sign(other.tobytes()), attempt=word.attempt)
        for message in (word, signed):
            refusal = (await one.commit(second, masked=message)).refusal
            assert (refusal.reason, refusal.message) == (
                common_pb2.REFUSAL_REASON_INVALID_REQUEST,
                "the device sent another masked before",
            )
        for rest in masked[1:]:
            assert not (await rest.commit(await rest.upload())).HasField("refusal")
        await finish(world, masked)

    story(tmp_path, play)


def test_a_vector_that_is_not_the_signed_one(tmp_path: Path) -> None:
    """The word of a device is about these bytes; the coordinator takes no others in their place."""

    async def play(world: World, masked: list[Masked]) -> None:
        one = masked[0]
        other = await one.upload(bytes(len(one.data)))
        assert (await one.commit(other)).HasField("refusal")
        assert (await one.commit(await one.upload(), masked=masked[1].word)).HasField("refusal")
        for each in masked:
            assert not (await each.commit(await each.upload())).HasField("refusal")
        await finish(world, masked)

    story(tmp_path, play)


def test_a_token_of_n_uses_enrols_n_identities(tmp_path: Path) -> None:
    """Whoever has one token makes no more members of a cohort with it than its operator meant."""

    async def run() -> None:
        async with World(tmp_path / "data") as world:
            request = operator_pb2.CreateEnrolmentTokenRequest(
                request_id=new_request_id(), population=POPULATION, uses=3
            )
            token = world.core.operators.create_enrolment_token(request).token
            devices = [SecureDevice(world.core.devices, seed, world.clock.unix_ms) for seed in range(5)]
            answers = [await device.enrol(token) for device in devices]
            assert [bool(answer.certificate) for answer in answers] == [True] * 3 + [False] * 2
            assert {answer.refusal.reason for answer in answers[3:]} == {common_pb2.REFUSAL_REASON_BAD_TOKEN}
            assert (await devices[3].check_in()).refusal.reason == common_pb2.REFUSAL_REASON_UNKNOWN_DEVICE

    asyncio.run(run())
