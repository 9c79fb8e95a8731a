"""Malicious devices, and a network that repeats and delays, against the coordinator's machine.

What is wrong is refused and changes nothing, and its sender is blamed if nobody else can have caused it; the sum is
that of the others, exactly, or there is none. ``test_attack_list.py`` says which test holds which case.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attacks import COUNT, advertised_by, answer, at, place, vectors
from cohort import DAY, NOW, POLICY, SESSION, Cohort
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.secagg import AbortedError, DeviceState, Policy, ProtocolError, ServerStage, Session, certificates, shamir
from evensong.secagg.device import CIPHERTEXT_BYTES
from evensong.secagg.server import SENDING
from evensong.v1 import secagg_pb2
from evensong.wire.chunks import sha256
from evensong.wire.signing import public_key_of

pytestmark = pytest.mark.secagg

THRESHOLD = POLICY.parameters(COUNT).threshold
SHARE = shamir.SHARE_BYTES


def total(cohort: Cohort, *gone: int) -> Any:
    kept = [index for index in range(len(cohort.devices)) if index not in gone]
    return cohort.vectors[kept].sum(axis=0, dtype=np.uint64)


def assert_refused(cohort: Cohort, index: int, message: Any, why: str = ".", *, blamed: bool = True) -> None:
    """By the coordinator, which is as it was before."""
    before = cohort.server.stage, cohort.server.arrived, set(cohort.server.blamed)
    with pytest.raises(ProtocolError, match=why) as refused:
        cohort.server.receive(cohort.ids[index], message, vector_sha256=bytes(32), now_unix_ms=NOW)
    assert refused.value.blamed == (cohort.ids[index] if blamed else None)
    assert (cohort.server.stage, cohort.server.arrived, cohort.server.blamed) == before


# ------------------------------------------------------------------------------------------------------------- drop-out


def test_case_03_exactly_t_holders_then_one_fewer() -> None:
    """Holders of the shares of a member that dropped: t + 1, t, and t - 1 of those that are left answer."""
    dropped = 4
    for answering, opens in ((THRESHOLD + 1, True), (THRESHOLD, True), (THRESHOLD - 1, False)):
        cohort = Cohort(vectors())
        cohort.play_until(ServerStage.UNMASK, {ServerStage.MASKED: {dropped}})
        revealing = [index for index in range(COUNT) if index != dropped][:answering]
        for index in revealing:
            cohort.send(index, ServerStage.UNMASK)
        mask_key = cohort.server._reveals[place(cohort, dropped)]
        assert (mask_key.secret is not None) == opens
        if answering <= THRESHOLD:  # of a revealer's own seed one fewer is there
            with pytest.raises(AbortedError, match="cannot be opened"):
                cohort.close()
            with pytest.raises(ProtocolError, match="nothing to unmask"):
                cohort.server.unmasking()
            continue
        cohort.close()
        assert np.array_equal(cohort.unmask(), total(cohort, dropped))


def test_case_04_survivors_one_below_n_min() -> None:
    """Though a quorum is left: seven of ten, and the plan wants eight."""
    policy = Policy(0.0, 0.4, 8, 100)
    for dropped, ends in (({0, 1}, False), ({0, 1, 2}, True)):
        cohort = Cohort(vectors(), policy=policy)
        if not ends:
            assert np.array_equal(cohort.play({ServerStage.MASKED: dropped}), total(cohort, *dropped))
            continue
        with pytest.raises(AbortedError, match="8 are needed"):
            cohort.play({ServerStage.MASKED: dropped})
        assert {device.state for device in cohort.devices} == {DeviceState.MASKED, DeviceState.SHARED}


def test_case_36_survivors_below_n_min_with_discrete_noise() -> None:
    """The noise of n_min devices is what the plan promises. At n_min - 1 no device signs, so nothing is opened, even by
    a coordinator that does not care."""
    policy = Policy(0.0, 0.4, 8, 100)
    cohort = Cohort(vectors(), policy=replace(policy, min_survivors=3))  # the coordinator's
    for device in cohort.devices:
        device.policy = policy
    cohort.play_until(ServerStage.COMMIT, {ServerStage.MASKED: {0, 1, 2}})
    for index in range(3, COUNT):
        with pytest.raises(ProtocolError, match="too few survivors; expected at least 8"):
            cohort.send(index, ServerStage.COMMIT)
    assert cohort.server.signers == () and not cohort.server.can_close()


# ---------------------------------------------------------------------------------------------------------- advertising


def test_case_13_a_certificate_that_does_not_hold_is_turned_away() -> None:
    cohort = Cohort(vectors())
    for signer, population, not_after, why in (
        (cohort.authority, SESSION.population, NOW - 1, "has expired"),
        (cohort.authority, "whistles", NOW + DAY, "a certificate does not hold"),
        (Ed25519PrivateKey.generate(), SESSION.population, NOW + DAY, "a certificate does not hold"),
    ):
        other = certificates.issue(signer, public_key_of(cohort.identities[0]), population, not_after, bytes(16))
        advert = cohort.new_device(0, certificate=other).advertise()
        assert_refused(cohort, 0, advert, why)


def test_case_14_one_identity_twice() -> None:
    cohort = Cohort(vectors())
    cohort.send(0, ServerStage.ADVERTISE)
    again = cohort.new_device(0).advertise()
    assert_refused(cohort, 0, again, "sent another advertise")
    assert_refused(cohort, 1, again, "another identity")
    assert cohort.server.members == (cohort.ids[0],)


def test_case_18_low_order_points_are_turned_away() -> None:
    for u in (0, 1, 2**255 - 20):
        for field in ("channel_key", "mask_key"):
            cohort = Cohort(vectors(3))
            cohort.sent[0, ServerStage.ADVERTISE] = cohort.devices[0].advertise()
            advert = advertised_by(cohort, 0, **{field: u.to_bytes(32, "little")})
            assert_refused(cohort, 0, advert, "gives no agreement")


def test_case_20_duplicate_peer_keys_are_turned_away() -> None:
    cohort = Cohort(vectors())
    cohort.send(0, ServerStage.ADVERTISE)
    first = cohort.sent[0, ServerStage.ADVERTISE]
    cohort.sent[1, ServerStage.ADVERTISE] = own = cohort.devices[1].advertise()
    for changes in (
        {"channel_key": first.channel_key},
        {"mask_key": first.mask_key},
        {"channel_key": first.mask_key},
        {"channel_key": own.mask_key},
    ):
        assert_refused(cohort, 1, advertised_by(cohort, 1, **changes), "was advertised before")


def test_a_device_that_advertises_the_key_of_another() -> None:
    """Keys are signed by an identity, and an identity is who called: nobody can bring another's, signed by either."""
    cohort = Cohort(vectors())
    victim = cohort.devices[1].advertise()
    assert_refused(cohort, 0, victim, "another identity")
    cohort.sent[0, ServerStage.ADVERTISE] = cohort.devices[0].advertise()
    stolen = copy.deepcopy(victim)
    stolen.public_key = public_key_of(cohort.identities[0])
    assert_refused(cohort, 0, stolen, "a certificate does not hold")
    stolen.certificate = cohort.sent[0, ServerStage.ADVERTISE].certificate
    assert_refused(cohort, 0, stolen, "signature of member")


# -------------------------------------------------------------------------------------------------------------- replays


@pytest.mark.parametrize(
    "other",
    [
        replace(SESSION, round=SESSION.round - 1),
        replace(SESSION, attempt=SESSION.attempt - 1),
        replace(SESSION, manifest_sha256=sha256(b"another model")),
        replace(SESSION, task_id="f" * 32),
    ],
    ids=["round", "attempt", "model", "task"],
)
def test_messages_of_another_session(other: Session) -> None:
    """From the very same identities with the very same keys: only what they were signed for differs."""
    old = Cohort(vectors(), session=other)
    old.play()
    for stage, why in (
        (ServerStage.ADVERTISE, "signature of member"),
        (ServerStage.MASKED, "of another attempt|signature of the vector"),
        (ServerStage.COMMIT, "signature of the survivors"),
    ):
        assert_refused(at(stage), 0, old.sent[0, stage], why)
    # The other two are not signed. Shares are sealed to keys of another session: they open for nobody.
    new = at(ServerStage.SHARES)
    new.sent[0, ServerStage.SHARES] = old.sent[0, ServerStage.SHARES]
    new.devices[0].on_roster(answer(new, 0, ServerStage.ADVERTISE), NOW)
    with pytest.raises(AbortedError):
        play_on(new, ServerStage.SHARES)
    assert new.server.blamed == {new.ids[0]} and new.server.may_repeat
    # Opened shares are of the secrets of another session: wrong ones here.
    new = Cohort(vectors())
    new.random.seed(1)  # these secrets are others
    new.sent[0, ServerStage.UNMASK] = old.sent[0, ServerStage.UNMASK]
    assert np.array_equal(new.play(), total(new)) and new.server.blamed == {new.ids[0]}


def play_on(cohort: Cohort, first: ServerStage) -> None:
    for stage in SENDING[SENDING.index(first) :]:
        for index in range(len(cohort.devices)):
            cohort.send(index, stage)
        cohort.close()


def test_case_28_late_vector() -> None:
    """After the stage was closed without it: it is in no sum, and its sender neither blamed nor asked for anything."""
    cohort = Cohort(vectors())
    cohort.play_until(ServerStage.MASKED)
    for index in range(COUNT - 1):
        cohort.send(index, ServerStage.MASKED)
    cohort.close()
    with pytest.raises(ProtocolError, match="out of turn") as late:
        cohort.send(COUNT - 1, ServerStage.MASKED)
    assert late.value.blamed is None and cohort.ids[COUNT - 1] not in cohort.server.survivors
    for stage in (ServerStage.COMMIT, ServerStage.UNMASK):
        for index in range(COUNT - 1):
            cohort.send(index, stage)
        cohort.close()
    assert np.array_equal(cohort.unmask(), total(cohort, COUNT - 1))


def test_case_29_two_vectors_from_one_device() -> None:
    cohort = Cohort(vectors())
    cohort.play_until(ServerStage.MASKED)
    for index in range(COUNT):
        cohort.send(index, ServerStage.MASKED)
    word = cohort.sent[0, ServerStage.MASKED]
    assert not cohort.send(0, ServerStage.MASKED)  # the same again is no second one
    for other, hashed in ((word, sha256(b"another vector")), (secagg_pb2.SecureMasked(), bytes(32))):
        with pytest.raises(ProtocolError, match="another masked before"):
            cohort.server.receive(cohort.ids[0], other, vector_sha256=hashed, now_unix_ms=NOW)
    assert len(cohort.server.survivors) == COUNT


# --------------------------------------------------------------------------------------------------------------- shares


def test_case_23_corrupt_share() -> None:
    """Every single one of a revealer's shares, of seeds and of the mask key of who dropped: out, blamed, sum exact."""
    cohort = Cohort(vectors())
    turns = iter(range(COUNT - 1))

    def corrupt(index: int, message: Any) -> Any:
        if index != 2 or not isinstance(message, secagg_pb2.SecureUnmask):
            return message
        data = bytearray(message.shares)
        for turn in turns:
            data[SHARE * turn] ^= 1
        return secagg_pb2.SecureUnmask(shares=bytes(data))

    cohort.to_server = corrupt
    assert np.array_equal(cohort.play({ServerStage.MASKED: {4}}), total(cohort, 4))
    assert cohort.server.blamed == {cohort.ids[2]}


def test_case_24_duplicate_x_coordinates() -> None:
    """x is the sender's place and stands in no message: a share that two devices send is wrong at one of the places."""
    cohort = Cohort(vectors())
    copied = {}

    def copying(index: int, message: Any) -> Any:
        if not isinstance(message, secagg_pb2.SecureUnmask) or index > 1:
            return message
        copied[index] = message.shares
        if index == 0:
            return message
        # Device 1 repeats what device 0 said, but for the one share that it has of device 0 and not of itself.
        own, other = place(cohort, 1), place(cohort, 0)
        data = bytearray(message.shares)
        for owner in range(COUNT):
            if owner not in (own, other):
                mine, theirs = owner - (owner > own), owner - (owner > other)
                data[SHARE * mine : SHARE * (mine + 1)] = copied[0][SHARE * theirs : SHARE * (theirs + 1)]
        return secagg_pb2.SecureUnmask(shares=bytes(data))

    cohort.to_server = copying
    assert np.array_equal(cohort.play(), total(cohort))
    assert cohort.server.blamed == {cohort.ids[1]}


@pytest.mark.parametrize("bad", [shamir.PRIME, 2**264 - 2])
def test_case_25_share_of_p_or_more(bad: int) -> None:
    cohort = at(ServerStage.UNMASK)
    good = cohort.next_message(0, ServerStage.UNMASK)
    message = secagg_pb2.SecureUnmask(shares=good.shares[:-SHARE] + bad.to_bytes(SHARE, "little"))
    assert_refused(cohort, 0, message, "a share is out of range")


def test_shares_that_do_not_match_the_commitment() -> None:
    """Two holders lie about every share that they have: blamed, and the sum is exact, as enough others are true."""
    cohort = Cohort(vectors(), policy=Policy(0.2, 0.3, 3, 100))
    liars = {3, 6}

    def lie(index: int, message: Any) -> Any:
        if index not in liars or not isinstance(message, secagg_pb2.SecureUnmask):
            return message
        parts = [message.shares[start : start + SHARE] for start in range(0, len(message.shares), SHARE)]
        return secagg_pb2.SecureUnmask(shares=b"".join(sha256(bytes([index]) + part) + b"\0" for part in parts))

    cohort.to_server = lie
    assert np.array_equal(cohort.play(), total(cohort))
    assert cohort.server.blamed == {cohort.ids[liar] for liar in liars}


@pytest.mark.parametrize("corrupt_holders", [0, 1])
def test_a_commitment_that_no_shares_match_is_blamed_on_its_owner(corrupt_holders: int) -> None:
    """There is no sum, as its mask stays: but the owner is named, and no holder whatever else one of them sends."""
    cohort = Cohort(vectors(), policy=Policy(0.1, 0.3, 3, 100))
    liars = set(range(1, 1 + corrupt_holders))

    def lie(index: int, message: Any) -> Any:
        if index == 0 and isinstance(message, secagg_pb2.SecureShares):
            return secagg_pb2.SecureShares(ciphertexts=message.ciphertexts, seed_commitment=bytes(32))
        if index in liars and isinstance(message, secagg_pb2.SecureUnmask):
            parts = [message.shares[start : start + SHARE] for start in range(0, len(message.shares), SHARE)]
            return secagg_pb2.SecureUnmask(shares=b"".join(sha256(part) + b"\0" for part in parts))
        return message

    cohort.to_server = lie
    with pytest.raises(AbortedError, match="of 1 members cannot be opened"):
        cohort.play()
    assert cohort.server.blamed == {cohort.ids[index] for index in (0, *liars)} and not cohort.server.may_repeat


def test_nobody_is_blamed_because_too_few_shares_came() -> None:
    """Nor an honest owner for what a corrupted holder sends, as long as the truth could be among the rest."""
    parameters = POLICY.parameters(COUNT)
    cohort = Cohort(vectors())
    cohort.play_until(ServerStage.UNMASK)
    for index in range(parameters.threshold):  # of each of these themselves there is one share less than enough
        cohort.send(index, ServerStage.UNMASK)
    with pytest.raises(AbortedError):
        cohort.close()
    assert cohort.server.blamed == set()

    def lie(index: int, message: Any) -> Any:
        if index == 0 and isinstance(message, secagg_pb2.SecureUnmask):
            return secagg_pb2.SecureUnmask(shares=bytes(len(message.shares)))
        return message

    cohort = Cohort(vectors())
    cohort.to_server = lie
    with pytest.raises(AbortedError):
        cohort.play({ServerStage.UNMASK: set(range(parameters.threshold + 1, COUNT))})
    assert cohort.server.blamed <= {cohort.ids[0]}


def test_inconsistent_ciphertexts_are_blamed_and_excluded_from_the_next_attempt() -> None:
    """To t of its neighbours a member sends what does not open: nobody reveals anything, and it is not there again."""
    cohort = Cohort(vectors())

    def spoil(index: int, message: Any) -> Any:
        if index != 0 or not isinstance(message, secagg_pb2.SecureShares):
            return message
        bad = bytes(CIPHERTEXT_BYTES * THRESHOLD)
        return secagg_pb2.SecureShares(
            ciphertexts=bad + message.ciphertexts[len(bad) :], seed_commitment=message.seed_commitment
        )

    cohort.to_server = spoil
    with pytest.raises(AbortedError):
        cohort.play()
    assert cohort.server.blamed == {cohort.ids[0]} and cohort.server.may_repeat
    again = Cohort(cohort.vectors, session=replace(SESSION, attempt=2), excluded=frozenset(cohort.server.blamed))
    assert_refused(again, 0, again.devices[0].advertise(), "excluded", blamed=False)
    assert np.array_equal(again.play({ServerStage.ADVERTISE: {0}}), total(again, 0))


# -------------------------------------------------------------------------------------------------------------- lengths


def longer(value: bytes) -> bytes:
    return value + b"\0"


def shorter(value: bytes) -> bytes:
    return value[:-1]


def empty(value: bytes) -> bytes:
    return b""


FIELDS = [
    *((ServerStage.ADVERTISE, name) for name in ("channel_key", "mask_key", "nonce", "signature", "public_key")),
    (ServerStage.ADVERTISE, "certificate"),
    (ServerStage.SHARES, "ciphertexts"),
    (ServerStage.SHARES, "seed_commitment"),
    (ServerStage.MASKED, "signature"),
    (ServerStage.COMMIT, "signature"),
    (ServerStage.UNMASK, "shares"),
]


def test_the_fields_below_are_all_bytes_that_devices_send() -> None:
    cohort = Cohort(vectors(3))
    cohort.play()
    kinds = {stage: cohort.sent[0, stage].DESCRIPTOR for stage in SENDING}
    every = {(stage, f.name) for stage, kind in kinds.items() for f in kind.fields if f.type == f.TYPE_BYTES}
    assert every == set(FIELDS)


@pytest.mark.parametrize("change", [longer, shorter, empty])
@pytest.mark.parametrize(("stage", "field"), FIELDS)
def test_wrong_length_fields(stage: ServerStage, field: str, change: Callable[[bytes], bytes]) -> None:
    cohort = at(stage, 5)
    message = cohort.next_message(0, stage)
    setattr(message, field, change(getattr(message, field)))
    assert_refused(cohort, 0, message)


@pytest.mark.parametrize("complaints", [[9], [2**32 - 1], [3, 1], [1, 1], [0, 1, 2, 3, 4]])
def test_complaints_that_cannot_be(complaints: list[int]) -> None:
    """About nobody, out of order, twice, or about the device itself."""
    cohort = at(ServerStage.MASKED, 5)
    message = cohort.next_message(0, ServerStage.MASKED)
    message.complaints.extend(complaints)
    assert_refused(cohort, 0, message, "complaints")


def test_case_39_secrets_in_no_error_and_no_repr() -> None:
    cohort = Cohort(vectors())
    cohort.play({ServerStage.MASKED: {3}})
    unmasking = cohort.server.unmasking()
    told = repr(unmasking) + repr(cohort.server) + str(cohort.server.__dict__.keys()) + cohort.server.reason
    for key, _ in unmasking.masks:
        assert key.hex() not in told and repr(key) not in told
    assert repr(unmasking) == "Unmasking()"
