"""A coordinator that breaks the protocol of secure sums: the device leaves, reveals nothing, and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from lying_coordinator import ABORTED, AGAIN, Secrets, SecureCoordinator, end, secure, seen_sealed
from scripted import FakeClock, device_for

from evensong.client import Aborted, Dropped, Idle, Limits, Trained
from evensong.secagg import DeviceMachine, DeviceState, bitmap
from evensong.secagg.primitives import Primitives
from evensong.secagg.roster import make_roster, read_member, sign_roster
from evensong.secagg.transcript import masked_bytes
from evensong.v1 import device_pb2, secagg_pb2, task_pb2
from evensong.wire.chunks import sha256
from evensong.wire.signing import public_key_of

pytestmark = pytest.mark.secagg

TRAIN = device_pb2.WORK_TRAIN
MEMBERS = 5  # the device and four peers

Lie = Callable[[SecureCoordinator, secagg_pb2.SecureResponse], None]


def give(**fields: object) -> SecureCoordinator:
    return SecureCoordinator(FakeClock(), give=[TRAIN], **fields)  # type: ignore[arg-type]


def steps(coordinator: SecureCoordinator) -> list[str]:
    return [step for step, _ in coordinator.steps]


# --------------------------------------------------------------------------------------------------------------- honest


def test_a_device_adds_exactly_what_it_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = give()
    with device_for(coordinator, tmp_path) as device:
        sealed = seen_sealed(device, monkeypatch)
        outcome = device.step()
        assert isinstance(outcome, Trained) and isinstance(device.step(), Idle)
    assert steps(coordinator) == ["advertise", "shares", "masked", "commit", "unmask"]
    [total] = coordinator.sums()
    assert np.array_equal(total, sealed[0]) and coordinator.vectors[0] != sealed[0].tobytes()


# --------------------------------------------------------------------------------------------------------------- roster


def resigned(
    coordinator: SecureCoordinator,
    response: secagg_pb2.SecureResponse,
    *,
    keep: Callable[[secagg_pb2.SecureAdvertise], bool] = lambda member: True,
    attempt: int = 1,
    signer: Ed25519PrivateKey | None = None,
) -> None:
    """The coordinator signs another roster, of some members or for another attempt."""
    members = [member for member in response.roster.members if keep(member)]
    real = next(iter(coordinator.attempts.values()))
    session = replace(real.session, attempt=attempt)
    roster = make_roster([read_member(member) for member in members], session, real.policy)
    response.roster.CopyFrom(sign_roster(roster, members, signer or coordinator.signer, Primitives()))


def without_the_device(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    [own] = coordinator.devices.values()
    resigned(coordinator, response, keep=lambda member: member.public_key != own)


def of_another_attempt(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    resigned(coordinator, response, attempt=2)


def signed_by_another(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    resigned(coordinator, response, signer=Ed25519PrivateKey.generate())


def with_too_few(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    [own] = coordinator.devices.values()
    other = next(member.public_key for member in response.roster.members if member.public_key != own)
    resigned_two = [member for member in response.roster.members if member.public_key in (own, other)]
    del response.roster.members[:]
    response.roster.members.extend(resigned_two)


def with_the_devices_key_changed(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    [own] = coordinator.devices.values()
    for member in response.roster.members:
        if member.public_key == own:
            member.nonce = bytes(16)
    resigned(coordinator, response)


def with_a_stranger(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    """Whom no authority has certified: the coordinator's own invention."""
    [own] = coordinator.devices.values()
    other = next(member for member in response.roster.members if member.public_key != own)
    other.certificate = bytes(88)
    resigned(coordinator, response)


def two_devices_with_one_key(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    [own] = coordinator.devices.values()
    first, second = [member for member in response.roster.members if member.public_key != own][:2]
    second.mask_key = first.mask_key
    resigned(coordinator, response)


# ------------------------------------------------------------------------------------------ delivery, survivors, quorum


def place_of(coordinator: SecureCoordinator, *, own: bool) -> int:
    """In the roster: of the device, or of the first peer."""
    [device_id] = coordinator.devices
    members = next(iter(coordinator.attempts.values())).server.members
    return next(place for place, member in enumerate(members) if (member == device_id) == own)


def without(coordinator: SecureCoordinator, bits: bytes, *, own: bool) -> bytes:
    known = bitmap.decode(bits, MEMBERS, "bits")
    return bitmap.encode(known & ~(1 << place_of(coordinator, own=own)), MEMBERS)


def device_did_not_share(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.delivery.sharers = without(coordinator, response.delivery.sharers, own=True)


def a_share_is_missing(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.delivery.ciphertexts = response.delivery.ciphertexts[:-1]


def nobody_shared(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.delivery.sharers = bitmap.encode(1 << place_of(coordinator, own=True), MEMBERS)
    response.delivery.ciphertexts = b""


def device_did_not_survive(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.survivors.survivors = without(coordinator, response.survivors.survivors, own=True)


def two_survivors(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    both = 1 << place_of(coordinator, own=True) | 1 << place_of(coordinator, own=False)
    response.survivors.survivors = bitmap.encode(both, MEMBERS)


def words_of_another_cohort(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    """The neighbours masked towards one sharer less than the device did: what they sign then."""
    [attempt] = coordinator.attempts.values()
    roster, bits = attempt.server._roster(), response.survivors.survivors
    last = [place for place in range(MEMBERS) if roster.members[place].device_id not in coordinator.devices][-1]
    fewer = bitmap.encode(bitmap.decode(bits, MEMBERS, "bits") & ~(1 << last), MEMBERS)
    identities = {sha256(public_key_of(key))[:16]: key for key in coordinator.identities}
    peers = [member.id for member in roster.members if member.id in identities]
    told = response.survivors.neighbours
    words = []
    for turn, peer in enumerate(peers):
        vector_sha256 = told[96 * turn : 96 * turn + 32]
        signed = masked_bytes(roster.context, roster.hash, peer, fewer, vector_sha256)
        words.append(vector_sha256 + identities[peer].sign(signed))
    response.survivors.neighbours = b"".join(words)
    assert len(response.survivors.neighbours) == len(told)


def a_word_is_missing(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.survivors.neighbours = response.survivors.neighbours[:-96]


def a_forged_word(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.survivors.neighbours = bytes(32) + response.survivors.neighbours[32:]


def bits_beyond_the_roster(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.survivors.survivors = b"\xff"


def a_second_survivor_set(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.quorum.survivors = without(coordinator, response.quorum.survivors, own=False)


def forged_signatures(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    """Two genuine ones are left, one less than a quorum of five."""
    response.quorum.signatures = response.quorum.signatures[:128] + bytes(3 * 64)


def too_few_signers(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.quorum.signers = bitmap.encode(0b11, MEMBERS)
    response.quorum.signatures = response.quorum.signatures[:128]


def another_steps_answer(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.quorum.CopyFrom(secagg_pb2.SecureQuorum())


def an_unknown_end(coordinator: SecureCoordinator, response: secagg_pb2.SecureResponse) -> None:
    response.roster.CopyFrom(secagg_pb2.SecureRoster())


@pytest.mark.parametrize(
    ("step", "lie"),
    [
        ("advertise", without_the_device),
        ("advertise", of_another_attempt),
        ("advertise", signed_by_another),
        ("advertise", with_too_few),
        ("advertise", with_the_devices_key_changed),
        ("advertise", with_a_stranger),
        ("advertise", two_devices_with_one_key),
        ("advertise", another_steps_answer),
        ("shares", device_did_not_share),
        ("shares", a_share_is_missing),
        ("shares", nobody_shared),
        ("shares", another_steps_answer),
        ("masked", device_did_not_survive),
        ("masked", two_survivors),
        ("masked", bits_beyond_the_roster),
        ("masked", words_of_another_cohort),
        ("masked", a_word_is_missing),
        ("masked", a_forged_word),
        ("masked", another_steps_answer),
        ("commit", a_second_survivor_set),
        ("commit", forged_signatures),
        ("commit", too_few_signers),
        ("unmask", an_unknown_end),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_lie_ends_untrusted_and_reveals_nothing(
    step: str, lie: Lie, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    coordinator, secrets = give(), Secrets(monkeypatch)
    coordinator.lie = lambda at, response: lie(coordinator, response) if at == step else None
    machines = seen_machines(monkeypatch)
    with device_for(coordinator, tmp_path, primitives=secrets.primitives) as device:
        secrets.watch(device)
        outcome = device.step()
        assert isinstance(outcome, Aborted) and outcome.reason == "UNTRUSTED", outcome
        assert device._state.work() is None
    assert [vars(machine._secrets) for machine in machines] == [vars(type(machines[0]._secrets)())]  # all forgotten
    [(reason, message)] = coordinator.aborts
    assert reason == device_pb2.ABORT_REASON_UNTRUSTED
    assert ("unmask" in steps(coordinator)) == (step == "unmask") and steps(coordinator)[-1] == step
    secrets.assert_absent("what was told", (caplog.text + message + repr(outcome)).encode())
    assert len(secrets.all) >= 3


def seen_machines(monkeypatch: pytest.MonkeyPatch) -> list[DeviceMachine]:
    """Grows with each machine that the device makes."""
    machines: list[DeviceMachine] = []

    def make(*arguments: Any, **options: Any) -> DeviceMachine:
        machines.append(DeviceMachine(*arguments, **options))
        return machines[-1]

    monkeypatch.setattr("evensong.client.secure.DeviceMachine", make)
    return machines


@pytest.mark.parametrize("step", ["advertise", "shares", "masked"])
def test_however_an_attempt_ends_its_secrets_are_forgotten(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = seen_machines(monkeypatch)
    with device_for(give(ends=[(step, end(AGAIN, 2)), (step, end(ABORTED, 2))])) as device:
        assert isinstance(device.step(), Dropped)
    empty = vars(type(machines[0]._secrets)())
    assert [vars(machine._secrets) for machine in machines] == [empty, empty]
    assert {machine.state for machine in machines} == {DeviceState.ABORTED}


# ----------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("attempt", [0, 1, 101, (1 << 32) - 1], ids=["none", "same", "huge", "largest"])
def test_an_attempt_that_cannot_follow_is_refused(attempt: int) -> None:
    coordinator = give(ends=[("masked", end(AGAIN, attempt))])
    with device_for(coordinator) as device:
        outcome = device.step()
    assert isinstance(outcome, Aborted) and outcome.reason == "UNTRUSTED"
    assert {request.attempt for _, request in coordinator.steps} == {1}


@pytest.mark.parametrize("step", ["advertise", "shares", "masked"])
def test_again_masks_the_same_update_anew_under_fresh_keys(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = give(ends=[(step, end(AGAIN, 2)), (step, end(AGAIN, 5))])
    with device_for(coordinator, tmp_path) as device:
        sealed = seen_sealed(device, monkeypatch)
        assert isinstance(device.step(), Trained)
    assert len(sealed) == 1
    [total] = coordinator.sums()
    assert np.array_equal(total, sealed[0])
    advertised = [request for at, request in coordinator.steps if at == "advertise"]
    assert [request.attempt for request in advertised] == [1, 2, 5]
    assert len({request.advertise.nonce for request in advertised}) == 3
    assert len({key for r in advertised for key in (r.advertise.channel_key, r.advertise.mask_key)}) == 6
    commitments = [request.shares.seed_commitment for at, request in coordinator.steps if at == "shares"]
    assert len(set(commitments)) == len(commitments)
    masked = [np.frombuffer(vector, "<u8") for vector in coordinator.vectors]
    for first, second in pairwise([*masked, sealed[0]]):  # the same lanes beneath: other masks on every one of them
        assert (first != second).all()


def test_a_spent_update_joins_no_other_cohort(tmp_path: Path) -> None:
    """Two sums that differ by one device tell that device's update: the coordinator asks for just that."""
    for step in ("commit", "unmask"):
        coordinator = give(ends=[(step, end(AGAIN, 2))])
        with device_for(coordinator, tmp_path / step) as device:
            outcome = device.step()
            assert isinstance(outcome, Aborted) and outcome.reason == "UNTRUSTED" and "second sum" in outcome.message
        assert {request.attempt for _, request in coordinator.steps} == {1}


def test_an_update_is_spent_before_its_signature_on_the_survivors_leaves(tmp_path: Path) -> None:
    coordinator = give()
    known = []
    with device_for(coordinator, tmp_path) as device:
        coordinator.before = lambda number, method: known.append(
            (method, device._state.cohort(coordinator.task_id, TRAIN))
        )
        device.step()
    spent = [bool(cohort and cohort.spent) for method, cohort in known if method == "Secure"]
    assert spent == [False, False, False, True, True]
    assert all(cohort and cohort.attempt == 1 for method, cohort in known if method == "Secure")


def test_a_round_that_is_given_up_is_dropped_and_the_device_comes_back_when_told() -> None:
    given_up = end(ABORTED, 1, "no quorum\x1b[2J")
    given_up.retry.earliest_ms = given_up.retry.latest_ms = 90_000
    coordinator = give(ends=[("commit", given_up)])
    with device_for(coordinator) as device:
        outcome = device.step()
        assert isinstance(outcome, Dropped) and outcome.reason == "NO_SUM" and outcome.wait_s == 90.0
        assert "no quorum" in outcome.message and outcome.message.isprintable()
        assert isinstance(device.step(), Idle) and not coordinator.aborts


def test_an_end_of_no_known_kind_is_a_round_without_a_sum() -> None:
    with device_for(give(ends=[("shares", end(77))])) as device:
        outcome = device.step()
        assert isinstance(outcome, Dropped) and outcome.reason == "NO_SUM"


def test_a_stage_that_never_closes_ends_with_the_lease() -> None:
    coordinator = give(lease_ms=60_000)
    coordinator.lie = lambda step, response: response.Clear() if step == "shares" else None
    with device_for(coordinator) as device:
        outcome = device.step()
        assert isinstance(outcome, Dropped) and outcome.reason == "LEASE_EXPIRED"
    bodies = {body for name, body in coordinator.requests if name == "Secure"}
    assert len(bodies) == 2 < steps(coordinator).count("shares")  # the very same request, again and again


@pytest.mark.parametrize("round", [1 << 63, (1 << 64) - 1])
def test_a_round_number_that_no_database_holds_is_refused(round: int, tmp_path: Path) -> None:
    coordinator = give()

    def tamper(method: str, response: object) -> None:
        if isinstance(response, device_pb2.CheckInResponse) and response.HasField("assignment"):
            response.assignment.round = round

    coordinator.tamper = tamper
    with device_for(coordinator, tmp_path) as device:
        outcome = device.step()
        assert isinstance(outcome, Aborted) and outcome.reason == "UNTRUSTED"
        coordinator.tamper, coordinator.give = lambda method, response: None, [TRAIN]
        assert isinstance(device.step(), Trained)


def test_a_task_id_of_another_form_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureCoordinator, "task_id", "task-1")
    coordinator = give()
    with device_for(coordinator, tmp_path) as device:
        outcome = device.step()
    assert isinstance(outcome, Aborted) and outcome.reason == "UNTRUSTED" and not coordinator.steps


def test_an_older_round_is_never_joined_again(tmp_path: Path) -> None:
    """Its keys would be new, but the coordinator could take one round's update off another's sum."""
    coordinator = give()
    with device_for(coordinator, tmp_path) as device:
        assert isinstance(device.step(), Trained)
        for told, reason in ((secagg_pb2.SecureResponse(), "UNFIT"), (end(AGAIN, 2), "UNTRUSTED")):
            coordinator.round -= 1  # the next assignment is of the same round
            coordinator.give, coordinator.told = [TRAIN], told
            outcome = device.step()
            assert isinstance(outcome, Aborted) and outcome.reason == reason
        coordinator.round -= 2
        coordinator.give = [TRAIN]
        outcome = device.step()
        assert isinstance(outcome, Aborted) and outcome.reason == "UNFIT"
        coordinator.round += 1
        assert len(coordinator.steps) == 5 and len(coordinator.asked) == 2
        coordinator.give = [TRAIN]
        assert isinstance(device.step(), Trained)


# ---------------------------------------------------------------------------------------------------------------- plans


def weak(**fields: object) -> Callable[[task_pb2.TaskBundle], None]:
    def plan(bundle: task_pb2.TaskBundle) -> None:
        secure(bundle)
        for name, value in fields.items():
            setattr(bundle.secure, name, value)

    return plan


def without_clip_norm(bundle: task_pb2.TaskBundle) -> None:
    secure(bundle)
    bundle.update.clip_norm = 0


def with_another_codec(bundle: task_pb2.TaskBundle) -> None:
    secure(bundle)
    bundle.update.codec = task_pb2.CODEC_FLOAT32


def fields_without_a_sum(bundle: task_pb2.TaskBundle) -> None:
    secure(bundle)
    bundle.ClearField("secure")


def endless_noise(bundle: task_pb2.TaskBundle) -> None:
    secure(bundle)
    bundle.privacy.mechanism = task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN
    bundle.privacy.noise_multiplier = float("inf")


def fields_that_overflow(bundle: task_pb2.TaskBundle) -> None:
    secure(bundle)
    bundle.update.bits, bundle.secure.max_cohort = 16, 1_000_000


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (weak(min_survivors=2), "UNFIT"),
        (weak(min_survivors=0), "UNFIT"),
        (weak(corrupted_share=0.5), "UNTRUSTED"),
        (weak(corrupted_share=float("nan")), "UNTRUSTED"),
        (weak(corrupted_share=-0.1), "UNTRUSTED"),
        (weak(dropout_share=0.7), "UNTRUSTED"),
        (weak(corrupted_share=0.4, dropout_share=0.45), "UNTRUSTED"),
        (weak(max_cohort=2), "UNTRUSTED"),
        (weak(max_cohort=4_000_000_000), "UNTRUSTED"),
        (without_clip_norm, "UNTRUSTED"),
        (with_another_codec, "UNTRUSTED"),
        (fields_without_a_sum, "UNTRUSTED"),
        (endless_noise, "UNTRUSTED"),
        (fields_that_overflow, "UNTRUSTED"),
    ],
)
def test_a_plan_without_security_is_not_even_trained(plan: Callable[[task_pb2.TaskBundle], None], reason: str) -> None:
    coordinator = give(plan=plan)
    with device_for(coordinator) as device:
        outcome = device.step()
    assert isinstance(outcome, Aborted) and outcome.reason == reason, outcome
    assert "Download" not in coordinator.calls and not coordinator.steps


def test_least_survivors_is_the_devices_own_choice() -> None:
    for least, kind in ((5, Aborted), (3, Trained)):
        with device_for(give(), limits=Limits(least_survivors=least)) as device:
            assert isinstance(device.step(), kind)
    with device_for(give(plan=weak(min_survivors=2)), limits=Limits(least_survivors=1)) as device:
        outcome = device.step()
        assert isinstance(outcome, Aborted) and outcome.reason == "UNTRUSTED"  # two are no sum, whoever is willing
