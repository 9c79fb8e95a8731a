"""Both machines through whole attempts: the exact sum or a typed end, whatever drops out, repeats or comes late."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import numpy.typing as npt
import pytest
from cohort import DAY, NOW, POLICY, SESSION, Cohort
from hypothesis import given, settings
from hypothesis import strategies as st

from evensong import secagg
from evensong.secagg import (
    AbortedError,
    DeviceState,
    ParameterError,
    Policy,
    Primitives,
    ProtocolError,
    SecureError,
    ServerMachine,
    ServerStage,
    Session,
    certificates,
    shamir,
)
from evensong.secagg.server import SENDING
from evensong.secagg.states import (
    DEVICE_TRANSITIONS,
    SERVER_TRANSITIONS,
    DeviceTrigger,
    ServerTrigger,
    following,
)
from evensong.v1 import secagg_pb2
from evensong.wire.signing import public_key_of

pytestmark = pytest.mark.secagg


def vectors(count: int, lanes: int = 5) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(count).integers(0, 2**64, (count, lanes), dtype=np.uint64)


def total(inputs: npt.NDArray[np.uint64], without: set[int] | frozenset[int] = frozenset()) -> npt.NDArray[np.uint64]:
    kept = [index for index in range(len(inputs)) if index not in without]
    return inputs[kept].sum(axis=0, dtype=np.uint64)


# ------------------------------------------------------------------------------------------------------- whole attempts


@pytest.mark.parametrize("count", [3, 4, 10, 64, 70])
def test_the_sum_is_exact(count: int) -> None:
    inputs = vectors(count)
    cohort = Cohort(inputs)
    assert np.array_equal(cohort.play(), total(inputs))
    assert cohort.server.stage is ServerStage.DONE
    assert {device.state for device in cohort.devices} == {DeviceState.REVEALED}


@pytest.mark.parametrize("threads", [1, 3])
def test_the_sum_is_exact_without_shared_work(threads: int) -> None:
    inputs = vectors(6)
    cohort = Cohort(inputs, primitives=Primitives())
    cohort.devices = [cohort.new_device(index, threads=threads) for index in range(6)]
    assert np.array_equal(cohort.play(), total(inputs))


@pytest.mark.parametrize("stage", SENDING)
def test_drop_out_in_one_stage(stage: ServerStage) -> None:
    inputs = vectors(80)
    dropped = set(range(5, 25))
    cohort = Cohort(inputs)
    early = stage in (ServerStage.ADVERTISE, ServerStage.SHARES, ServerStage.MASKED)
    assert np.array_equal(cohort.play({stage: dropped}), total(inputs, dropped if early else set()))


def test_drop_out_in_every_stage() -> None:
    inputs = vectors(90)
    dropped = {stage: {4 * turn, 4 * turn + 1} for turn, stage in enumerate(SENDING)}
    cohort = Cohort(inputs)
    assert np.array_equal(cohort.play(dropped), total(inputs, {0, 1, 4, 5, 8, 9}))
    assert len(cohort.server.revealers) == 80


@settings(max_examples=60)
@given(
    data=st.data(), count=st.integers(3, 20), seed=st.integers(0, 1 << 30), dropout=st.sampled_from([0.0, 0.2, 0.45])
)
def test_any_history_ends_in_the_exact_sum_or_a_typed_abort(
    data: st.DataObject, count: int, seed: int, dropout: float
) -> None:
    """Devices drop out in any stage, messages come in any order, repeated at once and in later stages."""
    chance = random.Random(seed)
    inputs = vectors(count)
    cohort = Cohort(inputs, seed=seed, policy=Policy(0.1, dropout, 3, 20))
    present, said = list(range(count)), list[tuple[int, ServerStage]]()
    rate = data.draw(st.sampled_from([0.0, 0.05, 0.15, 0.4]))
    try:
        for stage in SENDING:
            present = [index for index in present if chance.random() >= rate]
            chance.shuffle(present)
            for index in present:
                assert cohort.send(index, stage)
                said.append((index, stage))
                again = chance.choice(said)
                assert not cohort.send(*again)
                assert cohort.server.answer(cohort.ids[index], stage) is None
            closes = cohort.server.can_close()
            assert (cohort.server.close() is not ServerStage.ABORTED) == closes
            if not closes:
                raise AbortedError(cohort.server.reason)
    except AbortedError:
        assert cohort.server.stage is ServerStage.ABORTED and cohort.server.reason
        with pytest.raises(ProtocolError):
            cohort.server.unmasking()
    except ProtocolError:  # a device found that too few of its neighbours are there
        assert any(device.state is DeviceState.ABORTED for device in cohort.devices)
    else:
        survivors = {cohort.ids.index(device_id) for device_id in cohort.server.survivors}
        assert np.array_equal(cohort.unmask(), total(inputs, set(range(count)) - survivors))
    assert_no_member_bared(cohort)


def assert_no_member_bared(cohort: Cohort) -> None:
    """From all that the coordinator got: of no member both secrets can be opened."""
    roster = cohort.server._cohort
    if roster is None:
        return
    places = {index: roster.places.get(device_id) for index, device_id in enumerate(cohort.ids)}
    kinds: dict[int, set[bool]] = {}
    for (index, stage), message in cohort.sent.items():
        if stage is not ServerStage.UNMASK:
            continue
        survivors = cohort.devices[index]._survivors
        sharers = {roster.places[device_id] for device_id in cohort.server.sharers}
        place = places[index]
        assert place is not None
        around = [other for other in roster.graph.neighbours(place) if other in sharers]
        assert len(message.shares) == shamir.SHARE_BYTES * len(around)
        for owner in around:
            kinds.setdefault(owner, set()).add(bool(survivors >> owner & 1))
    assert all(len(of_one) == 1 for of_one in kinds.values())


def test_too_few_left_for_a_quorum_end_the_attempt() -> None:
    cohort = Cohort(vectors(10))
    with pytest.raises(AbortedError):
        cohort.play({ServerStage.MASKED: set(range(5))})
    assert cohort.server.may_repeat
    with pytest.raises(AbortedError):
        cohort.server.answer(cohort.ids[9], ServerStage.MASKED)


def test_exactly_threshold_holders_open_the_secrets_and_one_fewer_do_not() -> None:
    inputs = vectors(10)
    parameters = POLICY.parameters(10)  # 9 holders a secret
    for revealers, opens in ((parameters.threshold + 1, True), (parameters.threshold, False)):
        cohort = Cohort(inputs)  # a revealer holds no share of its own secrets, so threshold + 1 are needed for those
        silent = set(range(10 - revealers))
        if opens:
            assert np.array_equal(cohort.play({ServerStage.UNMASK: silent}), total(inputs))
            continue
        with pytest.raises(AbortedError):
            cohort.play({ServerStage.UNMASK: silent})
        assert not cohort.server.may_repeat


# ------------------------------------------------------------------------------------------------------ the coordinator


def test_a_stage_is_complete_when_all_who_can_send_have() -> None:
    cohort = Cohort(vectors(8), policy=Policy(0.1, 0.3, 3, 8))
    for stage in SENDING[:-1]:
        for index in range(8):
            assert not cohort.server.is_complete()
            cohort.send(index, stage)
        assert cohort.server.is_complete()
        cohort.close()
    threshold = POLICY.parameters(8).threshold
    for index in range(threshold + 1):
        assert not cohort.server.is_complete()
        cohort.send(index, ServerStage.UNMASK)
    assert cohort.server.is_complete() and cohort.server.can_close()  # every secret is open: nobody else need come


def test_a_machine_that_is_rebuilt_from_its_messages_is_the_same() -> None:
    inputs = vectors(8)
    cohort = Cohort(inputs)
    cohort.play_until(ServerStage.UNMASK, {ServerStage.MASKED: {2}})
    first = cohort.server
    cohort.server = ServerMachine(
        SESSION, POLICY, signer=cohort.signer, authority_public_key=public_key_of(cohort.authority)
    )
    for stage in SENDING[:-1]:
        for index in range(8):
            if (index, stage) in cohort.sent:
                cohort.send(index, stage)
        cohort.close()
        for index in range(8):
            if (index, stage) in cohort.sent:
                answer = cohort.server.answer(cohort.ids[index], stage)
                assert answer == first.answer(cohort.ids[index], stage)
    for index in (0, 1, 3, 4, 5, 6, 7):
        cohort.send(index, ServerStage.UNMASK)
    cohort.close()
    assert np.array_equal(cohort.unmask(), total(inputs, {2}))


@pytest.mark.parametrize("stage", SENDING)
def test_other_bytes_for_a_stage_that_was_done_are_refused(stage: ServerStage) -> None:
    cohort = Cohort(vectors(5))
    cohort.play()
    changed = copy.deepcopy(cohort.sent[0, stage])
    field = changed.DESCRIPTOR.fields[0].name
    setattr(changed, field, bytes(len(getattr(changed, field))))
    cohort.sent[0, stage] = changed
    with pytest.raises(ProtocolError):
        cohort.send(0, stage)


def test_a_vector_that_names_another_attempt_is_refused() -> None:
    """Its signature is of this attempt; so are the keys that hide it."""
    cohort = Cohort(vectors(4))
    cohort.play_until(ServerStage.MASKED)
    cohort.sent[0, ServerStage.MASKED] = cohort.next_message(0, ServerStage.MASKED)
    cohort.sent[0, ServerStage.MASKED].attempt += 1
    with pytest.raises(ProtocolError, match="another attempt"):
        cohort.send(0, ServerStage.MASKED)


@pytest.mark.parametrize("stage", SENDING[1:])
def test_messages_out_of_turn_and_late_ones_change_nothing(stage: ServerStage) -> None:
    inputs = vectors(8)
    cohort = Cohort(inputs)
    cohort.play_until(stage)
    for message in (
        secagg_pb2.SecureAdvertise(),
        secagg_pb2.SecureShares(),
        secagg_pb2.SecureMasked(),
        secagg_pb2.SecureCommit(),
        secagg_pb2.SecureUnmask(),
    ):
        for device_id in (cohort.ids[0], "0" * 32):
            with pytest.raises(ProtocolError):
                cohort.server.receive(device_id, message, vector_sha256=bytes(32), now_unix_ms=NOW)
    for later in SENDING[SENDING.index(stage) :]:
        for index in range(8):
            cohort.send(index, later)
        cohort.close()
    assert np.array_equal(cohort.unmask(), total(inputs))


def test_a_device_that_missed_a_stage_gets_no_answer() -> None:
    cohort = Cohort(vectors(8))
    cohort.play_until(ServerStage.MASKED, {ServerStage.SHARES: {3}})
    with pytest.raises(ProtocolError):
        cohort.server.answer(cohort.ids[3], ServerStage.SHARES)
    assert cohort.server.answer(cohort.ids[3], secagg_pb2.SecureAdvertise) is not None


def test_a_corrupt_share_is_left_out_and_its_sender_blamed() -> None:
    inputs = vectors(10)
    cohort = Cohort(inputs)

    def corrupt(index: int, message: object) -> object:
        if index == 0 and isinstance(message, secagg_pb2.SecureUnmask):
            return secagg_pb2.SecureUnmask(shares=bytes(len(message.shares)))
        return message

    cohort.to_server = corrupt
    assert np.array_equal(cohort.play({ServerStage.MASKED: {4}}), total(inputs, {4}))
    assert cohort.server.blamed == {cohort.ids[0]}


@pytest.mark.parametrize("kind", ["seed", "mask key"])
def test_secrets_that_nobody_can_open_end_the_round(kind: str) -> None:
    """A member whose ciphertexts open for nobody: blamed, and nothing is unmasked."""
    cohort = Cohort(vectors(10))

    def spoil(index: int, message: object) -> object:
        if index == 0 and isinstance(message, secagg_pb2.SecureShares):
            return secagg_pb2.SecureShares(
                ciphertexts=bytes(len(message.ciphertexts)), seed_commitment=message.seed_commitment
            )
        return message

    cohort.to_server = spoil
    with pytest.raises(AbortedError):
        cohort.play({} if kind == "seed" else {ServerStage.MASKED: {0}})
    assert cohort.server.blamed == {cohort.ids[0]}
    assert cohort.server.may_repeat  # the complaints came with the vectors: before anybody revealed anything


def test_a_ciphertext_that_does_not_open_for_one_is_complained_about() -> None:
    inputs = vectors(10)
    cohort = Cohort(inputs)

    def spoil(index: int, message: object) -> object:
        if index == 0 and isinstance(message, secagg_pb2.SecureShares):
            ciphertexts = bytes([message.ciphertexts[0] ^ 1]) + message.ciphertexts[1:]
            return secagg_pb2.SecureShares(ciphertexts=ciphertexts, seed_commitment=message.seed_commitment)
        return message

    cohort.to_server = spoil
    assert np.array_equal(cohort.play(), total(inputs))
    complaints = [list(cohort.sent[index, ServerStage.MASKED].complaints) for index in range(10)]
    places = cohort.server.members
    assert sorted(complaints, key=len)[-2:] == [[], [places.index(cohort.ids[0])]]
    assert cohort.server.blamed == set()  # one accuser may lie


def test_the_excluded_and_the_surplus_are_turned_away_without_blame() -> None:
    cohort = Cohort(vectors(5), policy=Policy(0.1, 0.3, 3, 4))
    cohort.server._excluded = frozenset({cohort.ids[0]})
    for index in (1, 2, 3, 4):
        cohort.send(index, ServerStage.ADVERTISE)
    assert cohort.server.is_complete()
    with pytest.raises(ProtocolError, match="excluded") as refused:
        cohort.send(0, ServerStage.ADVERTISE)
    assert refused.value.blamed is None
    cohort.server._excluded = frozenset()
    with pytest.raises(ProtocolError, match="full"):
        cohort.send(0, ServerStage.ADVERTISE)


# ----------------------------------------------------------------------------------------------------------- the device


def test_the_same_survivors_get_the_same_signature_and_others_end_the_attempt() -> None:
    cohort = Cohort(vectors(10))
    cohort.play_until(ServerStage.UNMASK)
    device, shown = cohort.devices[0], cohort.server.answer(cohort.ids[0], ServerStage.MASKED)
    assert isinstance(shown, secagg_pb2.SecureSurvivors)
    assert device.on_survivors(shown) == cohort.sent[0, ServerStage.COMMIT]
    other = secagg_pb2.SecureSurvivors(survivors=bytes([shown.survivors[0] & 0xFE]) + shown.survivors[1:])
    with pytest.raises(ProtocolError):
        device.on_survivors(other)
    assert device.state is DeviceState.ABORTED


def test_a_vector_is_masked_once() -> None:
    cohort = Cohort(vectors(4))
    cohort.play_until(ServerStage.MASKED)
    device = cohort.devices[0]
    delivery = cohort.server.answer(cohort.ids[0], ServerStage.SHARES)
    assert isinstance(delivery, secagg_pb2.SecureDelivery)
    device.on_delivery(delivery)
    lanes = cohort.vectors[0].copy()
    device.mask(lanes)
    with pytest.raises(ProtocolError):
        device.mask(lanes)
    assert device.state is DeviceState.ABORTED


def test_every_call_out_of_turn_ends_the_attempt_and_forgets_the_secrets() -> None:
    calls = {
        "advertise": lambda device: device.advertise(),
        "on_roster": lambda device: device.on_roster(secagg_pb2.SecureRoster(), NOW),
        "on_delivery": lambda device: device.on_delivery(secagg_pb2.SecureDelivery()),
        "mask": lambda device: device.mask(np.zeros(1, np.uint64)),
        "masked": lambda device: device.masked(bytes(32)),
        "on_survivors": lambda device: device.on_survivors(secagg_pb2.SecureSurvivors()),
        "on_quorum": lambda device: device.on_quorum(secagg_pb2.SecureQuorum()),
    }
    for before in (None, *SENDING):
        for name, call in calls.items():
            if before is None and name == "advertise":
                continue
            cohort = Cohort(vectors(3))
            for stage in SENDING:
                if before is None:
                    break
                for index in range(3):
                    cohort.send(index, stage)
                if stage is before:
                    break
                cohort.close()
            device = cohort.devices[0]
            with pytest.raises(SecureError):
                call(device)
            assert device.state is DeviceState.ABORTED, (before, name)
            secrets = device._secrets
            assert (secrets.channel, secrets.mask, secrets.seed) == (None, None, b"")
            assert not secrets.held and not secrets.channels_in
            with pytest.raises(SecureError):
                call(device)


def test_secrets_leave_a_machine_by_no_back_door() -> None:
    cohort = Cohort(vectors(3))
    cohort.play_until(ServerStage.COMMIT)
    device = cohort.devices[0]
    assert repr(device) == "DeviceMachine(state=masked)" and repr(device._secrets) == "_Secrets()"
    for store in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            store(device)
    assert device._secrets.seed == b"" and device._secrets.mask is None  # masking was their last use
    assert device._secrets.channel is None and device._secrets.channels_in == {}


def test_a_cohort_without_security_is_left() -> None:
    cohort = Cohort(vectors(3))
    cohort.play_until(ServerStage.SHARES)
    cohort.devices[0].policy = Policy(0.1, 0.3, 4, 10)
    roster = cohort.server.answer(cohort.ids[0], ServerStage.ADVERTISE)
    assert isinstance(roster, secagg_pb2.SecureRoster)
    with pytest.raises(ParameterError):
        cohort.devices[0].on_roster(roster, NOW)
    assert cohort.devices[0].state is DeviceState.ABORTED


# ------------------------------------------------------------------------------------------------------- sessions, ids


@pytest.mark.parametrize("change", ["bundle_sha256", "manifest_sha256", "task_id", "work", "round", "attempt"])
def test_every_part_of_a_session_changes_its_context(change: str) -> None:
    values = dict(vars(SESSION))
    values.pop("context", None)
    other = {bytes: bytes(32), str: "f" * 32, int: 2}[type(values[change])]
    assert Session(**(values | {change: other})).context != SESSION.context


@pytest.mark.parametrize(
    "change", [{"bundle_sha256": b"short"}, {"task_id": "XYZ"}, {"work": 256}, {"attempt": -1}, {"round": 2**64}]
)
def test_malformed_sessions_are_refused(change: dict[str, object]) -> None:
    values = dict(vars(SESSION))
    values.pop("context", None)
    with pytest.raises(ParameterError):
        Session(**(values | change))


def test_a_certificate_holds_for_one_identity_one_population_and_a_time() -> None:
    cohort = Cohort(vectors(2))
    authority, (one, other) = cohort.authority, map(public_key_of, cohort.identities)
    certificate = certificates.issue(authority, one, "bells", NOW, b"s" * 16)
    assert len(certificate) == certificates.CERTIFICATE_BYTES
    assert certificates.expires_unix_ms(certificate) == NOW
    certificates.check(certificate, one, "bells", public_key_of(authority), NOW)
    later = certificate[:16] + (NOW + DAY).to_bytes(8, "little") + certificate[24:]
    for changed, key, population, signer, now in (
        (certificate, other, "bells", authority, NOW),
        (certificate, one, "whistles", authority, NOW),
        (certificate, one, "bells", cohort.signer, NOW),
        (certificate, one, "bells", authority, NOW + 1),
        (later, one, "bells", authority, NOW),
        (b"t" + certificate[1:], one, "bells", authority, NOW),
        (certificate[:-1], one, "bells", authority, NOW),
    ):
        with pytest.raises(ProtocolError):
            certificates.check(changed, key, population, public_key_of(signer), now)


def test_a_certificate_that_held_says_nothing_about_another() -> None:
    """What was checked once is remembered: with all that it says."""
    cohort, primitives = Cohort(vectors(2)), Primitives()
    authority, (one, other) = public_key_of(cohort.authority), map(public_key_of, cohort.identities)
    certificate = certificates.issue(cohort.authority, one, "bells", NOW, b"s" * 16)
    for _ in range(2):
        certificates.check(certificate, one, "bells", authority, NOW, primitives)
    for changed, key, population, signer in (
        (certificate[:-1] + bytes([certificate[-1] ^ 1]), one, "bells", authority),
        (b"t" + certificate[1:], one, "bells", authority),
        (certificate, other, "bells", authority),
        (certificate, one, "whistles", authority),
        (certificate, one, "bells", public_key_of(cohort.signer)),
    ):
        with pytest.raises(ProtocolError):
            certificates.check(changed, key, population, signer, NOW, primitives)


# --------------------------------------------------------------------------------------------------------------- tables


def test_every_state_can_be_left_and_only_along_the_table() -> None:
    for state in DeviceState:
        assert following(DEVICE_TRANSITIONS, state, DeviceTrigger.STOP) is DeviceState.ABORTED
        for trigger in DeviceTrigger:
            if (state, trigger) not in DEVICE_TRANSITIONS:
                with pytest.raises(ProtocolError):
                    following(DEVICE_TRANSITIONS, state, trigger)
    for stage in (ServerStage.DONE, ServerStage.ABORTED):
        for end in ServerTrigger:
            with pytest.raises(ProtocolError):
                following(SERVER_TRANSITIONS, stage, end)


def test_the_public_names_are_there() -> None:
    assert secagg.__all__ == sorted(secagg.__all__)
    assert all(hasattr(secagg, name) for name in secagg.__all__)
