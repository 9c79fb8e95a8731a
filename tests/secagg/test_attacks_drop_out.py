"""A coordinator that lies about who shared and who dropped out, and members that make honest ones look like liars.

What is said about drop-out decides which secrets are opened: of a survivor its seed, of any other its mask key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from cohort import NOW, POLICY, Cohort
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from evensong.secagg import (
    DeviceState,
    Primitives,
    ProtocolError,
    ServerStage,
    apply_masks,
    bitmap,
    keys,
    shamir,
)
from evensong.secagg.device import CIPHERTEXT_BYTES
from evensong.secagg.roster import Roster
from evensong.secagg.server import SENDING
from evensong.secagg.transcript import SIGNATURE_BYTES, WORD_BYTES
from evensong.v1 import secagg_pb2
from evensong.wire.chunks import sha256

pytestmark = pytest.mark.secagg

Lanes = npt.NDArray[np.uint64]


class Credulous(Primitives):
    """Of a coordinator that takes whatever devices send."""

    def verify(self, public_key: bytes, signature: bytes, message: bytes, what: str) -> None:
        pass


def sparse(stage: ServerStage, count: int = 64, lanes: int = 5) -> Cohort:
    """A cohort before ``stage``, each member of which has 24 neighbours, and 7 shares open a secret."""
    cohort = Cohort(np.random.default_rng(count).integers(0, 2**64, (count, lanes), dtype=np.uint64))
    cohort.play_until(stage)
    return cohort


def roster_of(cohort: Cohort) -> Roster:
    assert cohort.server._cohort is not None
    return cohort.server._cohort


def around(cohort: Cohort, index: int) -> list[int]:
    """The devices that are neighbours of device ``index``, in the order of the roster."""
    roster = roster_of(cohort)
    neighbours = roster.graph.neighbours(roster.places[cohort.ids[index]])
    return [cohort.ids.index(roster.members[at].device_id) for at in neighbours]


def bits(cohort: Cohort, devices: Iterable[int]) -> bytes:
    places = roster_of(cohort).places
    return bitmap.encode(bitmap.from_places(places[cohort.ids[index]] for index in devices), len(cohort.devices))


def mask_as_told(cohort: Cohort, index: int, sharers: Collection[int]) -> tuple[bytes, secagg_pb2.SecureMasked]:
    """Device ``index`` is told that only these of its neighbours shared. Its seed, and its word on the vector."""
    told = cohort.server.answer(cohort.ids[index], ServerStage.SHARES)
    assert isinstance(told, secagg_pb2.SecureDelivery)
    parts = [
        told.ciphertexts[CIPHERTEXT_BYTES * turn : CIPHERTEXT_BYTES * (turn + 1)]
        for turn, other in enumerate(around(cohort, index))
        if other in sharers
    ]
    device, lanes = cohort.devices[index], cohort.vectors[index].copy()
    lie = secagg_pb2.SecureDelivery(sharers=bits(cohort, {index, *sharers}), ciphertexts=b"".join(parts))
    device.on_delivery(lie)
    seed = device._secrets.seed
    device.mask(lanes)
    cohort.masked[index] = lanes
    word = cohort.sent[index, ServerStage.MASKED] = device.masked(sha256(lanes.tobytes()))
    return seed, word


def opened(cohort: Cohort, index: int, seed: bytes, others: Iterable[int]) -> Lanes:
    """The vector of a device, less its own mask and those towards ``others``, which their mask keys tell."""
    roster, lanes = roster_of(cohort), cohort.masked[index].copy()
    this = roster.members[roster.places[cohort.ids[index]]]
    masks = [(keys.self_mask_key(seed, roster.binding, this.id), -1)]
    for other in others:
        mask_key, end = cohort.devices[other]._secrets.mask, roster.members[roster.places[cohort.ids[other]]].mask_end
        assert mask_key is not None
        agreed = Primitives().agree(mask_key, this.mask_key)
        masks.append(
            (keys.pairwise_mask_key(agreed, roster.binding, this.mask_end, end), -1 if end.id > this.id else 1)
        )
    apply_masks(lanes, masks)
    return lanes


def assert_no_neighbour_signs(cohort: Cohort, victims: Collection[int], present: Iterable[int]) -> None:
    """Nor does it give a share, then; and all others hold none."""
    near = {other for victim in victims for other in around(cohort, victim)} - set(victims)
    helpers = near & set(present)
    assert len(helpers) > roster_of(cohort).parameters.threshold
    for helper in helpers:
        with pytest.raises(ProtocolError, match="the word of"):
            cohort.next_message(helper, ServerStage.COMMIT)
        assert cohort.devices[helper].state is DeviceState.ABORTED and not cohort.devices[helper]._secrets.held


# -------------------------------------------------------------------------------------------- two stories of who shared


def test_a_device_is_told_that_few_shared_and_the_others_that_just_those_dropped_out() -> None:
    """The coordinator by itself, with no device of its own: a seed and the mask keys of seven that dropped out open the
    vector of device 0. Of a survivor that was told another story no neighbour opens the seed."""
    cohort = sparse(ServerStage.MASKED)
    few = around(cohort, 0)[: roster_of(cohort).parameters.threshold]
    present = [index for index in range(64) if index not in few]
    seed, _ = mask_as_told(cohort, 0, few)
    assert np.array_equal(opened(cohort, 0, seed, few), cohort.vectors[0])
    with pytest.raises(ProtocolError, match="the signature of the vector"):
        cohort.send(0, ServerStage.MASKED)  # an honest coordinator does not even take it
    cohort.server._primitives = Credulous()
    for index in present:
        cohort.send(index, ServerStage.MASKED)
    cohort.close()
    assert_no_neighbour_signs(cohort, {0}, present)


def test_two_devices_are_told_that_besides_them_only_those_shared_who_dropped_out() -> None:
    """A sum over two, whatever the least number of survivors."""
    cohort = sparse(ServerStage.MASKED)
    one, other = 0, around(cohort, 0)[0]
    gone = set[int]()
    for index in (one, other):
        gone |= set([near for near in around(cohort, index) if near not in (one, other)][:8])
    seeds = {}
    for index, partner in ((one, other), (other, one)):
        seeds[index], _ = mask_as_told(cohort, index, {partner, *gone})
    known = {index: gone & set(around(cohort, index)) for index in (one, other)}
    pair = sum(opened(cohort, index, seeds[index], known[index]) for index in (one, other))
    assert np.array_equal(pair, cohort.vectors[one] + cohort.vectors[other])
    assert not np.array_equal(opened(cohort, one, seeds[one], known[one]), cohort.vectors[one])
    cohort.server._primitives = Credulous()
    present = [index for index in range(64) if index not in gone]
    for index in present:
        cohort.send(index, ServerStage.MASKED)
    cohort.close()
    assert_no_neighbour_signs(cohort, {one, other}, present)


@pytest.mark.parametrize("change", ["missing", "swapped", "another vector", "too many"])
def test_words_of_survivors_that_are_not_theirs(change: str) -> None:
    cohort = sparse(ServerStage.COMMIT, 8)
    told = secagg_pb2.SecureSurvivors()
    told.CopyFrom(cohort.server.answer(cohort.ids[0], ServerStage.MASKED))  # type: ignore[arg-type]
    words = [told.neighbours[start : start + WORD_BYTES] for start in range(0, len(told.neighbours), WORD_BYTES)]
    if change == "missing":
        words.pop()
    elif change == "too many":
        words.append(words[0])
    elif change == "swapped":
        words[:2] = words[1::-1]
    else:
        words[0] = bytes(32) + words[0][-SIGNATURE_BYTES:]
    told.neighbours = b"".join(words)
    with pytest.raises(ProtocolError, match=r"the word of|wrong length"):
        cohort.devices[0].on_survivors(told)
    assert cohort.devices[0].state is DeviceState.ABORTED


# ------------------------------------------------------------------------------------------------ survivors and quorums


def test_a_device_is_told_that_it_did_not_share() -> None:
    cohort = sparse(ServerStage.MASKED, 10)
    told = secagg_pb2.SecureDelivery()
    told.CopyFrom(cohort.server.answer(cohort.ids[0], ServerStage.SHARES))  # type: ignore[arg-type]
    told.sharers = bits(cohort, range(1, 10))
    with pytest.raises(ProtocolError, match="not among the sharers"):
        cohort.devices[0].on_delivery(told)
    assert cohort.devices[0].state is DeviceState.ABORTED


def test_a_survivor_that_never_shared() -> None:
    """A number more in the sum, far from the device on the ring, whose masks nobody has."""
    cohort = sparse(ServerStage.SHARES)
    silent = next(index for index in range(1, 64) if index not in around(cohort, 0))
    for stage in (ServerStage.SHARES, ServerStage.MASKED):
        for index in range(64):
            if index != silent:
                cohort.send(index, stage)
        cohort.close()
    told = cohort.server.answer(cohort.ids[0], ServerStage.MASKED)
    assert isinstance(told, secagg_pb2.SecureSurvivors)
    lie = secagg_pb2.SecureSurvivors(survivors=bits(cohort, range(64)), neighbours=told.neighbours)
    with pytest.raises(ProtocolError, match="never shared"):
        cohort.devices[0].on_survivors(lie)
    assert cohort.devices[1].on_survivors(cohort.server.answer(cohort.ids[1], ServerStage.MASKED)).signature  # type: ignore[arg-type]


def test_survivors_that_leave_a_device_too_few_neighbours() -> None:
    """Enough of them for a quorum and for the plan, but not around this device."""
    cohort = sparse(ServerStage.COMMIT)
    threshold, near = roster_of(cohort).parameters.threshold, around(cohort, 0)
    for kept, enough in ((threshold - 1, False), (threshold, True)):
        survivors = set(range(64)) - set(near[kept:])
        told = secagg_pb2.SecureSurvivors(survivors=bits(cohort, survivors))
        for other in near[:kept]:
            message, digest = cohort.server._received[ServerStage.MASKED][cohort.ids[other]]
            assert isinstance(message, secagg_pb2.SecureMasked) and digest is not None
            told.neighbours += digest + message.signature
        if enough:
            device = sparse(ServerStage.COMMIT).devices[0]  # the same cohort again
            assert device.on_survivors(told).signature
        else:
            with pytest.raises(ProtocolError, match="too few neighbours survived"):
                cohort.devices[0].on_survivors(told)


@pytest.mark.parametrize("forged", ["the first", "the last", "any"])
def test_forged_signatures_in_a_large_quorum_that_hope_to_be_missed(forged: str) -> None:
    """Devices check a sample. Two sets of survivors have at most n + c genuine signatures between them: here one
    set has half of them, the most that both can have, and the rest forged."""
    count = 200
    cohort = Cohort(np.zeros((count, 1), np.uint64), policy=replace(POLICY, corrupted_share=0.05))
    cohort.play_until(ServerStage.UNMASK)
    told = secagg_pb2.SecureQuorum()
    told.CopyFrom(cohort.server.answer(cohort.ids[0], ServerStage.COMMIT))  # type: ignore[arg-type]
    signatures = [told.signatures[start : start + SIGNATURE_BYTES] for start in range(0, 64 * count, SIGNATURE_BYTES)]
    genuine = (count + roster_of(cohort).parameters.corrupted) // 2
    turns = range(count) if forged == "the first" else range(count - 1, -1, -1)
    for turn in cohort.random.sample(turns, count - genuine) if forged == "any" else turns[: count - genuine]:
        signatures[turn] = bytes(SIGNATURE_BYTES)
    told.signatures = b"".join(signatures)
    for device in cohort.devices:
        with pytest.raises(ProtocolError, match="the signature of"):
            device.on_quorum(told)
        assert not device._secrets.held


def test_a_late_vector_stays_closed_whatever_else_is_opened() -> None:
    """Who is late has dropped out: its mask key is opened, but never its seed."""
    cohort = sparse(ServerStage.MASKED, 10)
    late = cohort.next_message(0, ServerStage.MASKED)
    for index in range(1, 10):
        cohort.send(index, ServerStage.MASKED)
    cohort.close()
    with pytest.raises(ProtocolError, match="out of turn"):
        cohort.server.receive(cohort.ids[0], late, vector_sha256=sha256(cohort.masked[0].tobytes()), now_unix_ms=NOW)
    for stage in (ServerStage.COMMIT, ServerStage.UNMASK):
        for index in range(1, 10):
            cohort.send(index, stage)
        cohort.close()
    at = roster_of(cohort).places[cohort.ids[0]]
    secret, member = cohort.server._reveals[at].secret, roster_of(cohort).members[at]
    assert secret is not None and cohort.ids[0] not in cohort.server.survivors
    assert X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == member.mask_key
    for index in range(1, 10):  # the holders' other shares, which would open the seed, are gone
        assert not cohort.devices[index]._secrets.held


# ------------------------------------------------------------------------------------------------------- framed holders


@pytest.mark.parametrize("framed", range(1, 10))
def test_a_share_that_was_dealt_wrong_frames_nobody_out_of_the_sum(
    framed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device 0 deals one holder wrong shares, well encrypted. That holder looks like a liar, but its other shares are
    right, and the sum needs them: only as many reveal as must."""
    cohort = sparse(ServerStage.SHARES, 10)
    threshold, number = POLICY.parameters(10).threshold, roster_of(cohort).places[cohort.ids[framed]] + 1
    split = shamir.split

    def crooked(secret: bytes, threshold: int, holders: Iterable[int], draw: Callable[[int], bytes]) -> list[int]:
        numbers = list(holders)
        shares = split(secret, threshold, numbers, draw)
        shares[numbers.index(number)] ^= 1
        return shares

    with monkeypatch.context() as patched:
        patched.setattr(shamir, "split", crooked)
        cohort.send(0, ServerStage.SHARES)
    for stage in SENDING[1:4]:
        for index in range(10):
            cohort.send(index, stage)
        cohort.close()
    others = [index for index in range(1, 10) if index != framed][:threshold]
    for index in (framed, *others):
        cohort.send(index, ServerStage.UNMASK)
    cohort.close()
    assert np.array_equal(cohort.unmask(), cohort.vectors.sum(axis=0, dtype=np.uint64))
