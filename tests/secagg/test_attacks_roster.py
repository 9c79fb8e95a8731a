"""A malicious coordinator against a device's machine: rosters with other members, other keys, or of another session.

Each time the device leaves, forgets its secrets, and has revealed nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attacks import COUNT, advertised_by, answer, assert_leaves, at, place, vectors
from cohort import DAY, NOW, SESSION, Cohort
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from evensong.secagg import Primitives, ProtocolError, ServerStage, Session, certificates
from evensong.secagg.graph import Graph
from evensong.secagg.primitives import check_agreement_key, check_order
from evensong.secagg.roster import make_roster, read_member, sign_roster
from evensong.v1 import secagg_pb2
from evensong.wire.chunks import sha256
from evensong.wire.signing import public_key_of

pytestmark = pytest.mark.secagg

PRIME = 2**255 - 19
#: All u below p with which X25519 gives zero whatever the secret: on the curve and on its twist (RFC 7748, section 6.1;
#: https://cr.yp.to/ecdh.html#validate; Wycheproof's "LowOrderPublic").
LOW_ORDER = (
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    PRIME - 1,
)
#: The same points in other words, congruent numbers and the bit that X25519 ignores; the last is the base point.
NON_CANONICAL = (*(PRIME + u for u in LOW_ORDER), 2 * PRIME, 2 * PRIME + 1, *(2**255 + u for u in LOW_ORDER), PRIME + 9)


def signed_roster(cohort: Cohort, members: Iterable[Any], **changes: Any) -> secagg_pb2.SecureRoster:
    """The coordinator's own signature under any members, in any order."""
    chosen = list(members)
    session, policy = changes.get("session", cohort.session), changes.get("policy", cohort.policy)
    roster = make_roster([read_member(member) for member in chosen], session, policy)
    return sign_roster(roster, chosen, cohort.signer, Primitives())


def advertised(cohort: Cohort) -> list[secagg_pb2.SecureAdvertise]:
    return list(answer(cohort, 0, ServerStage.ADVERTISE).members)


def assert_roster_refused(cohort: Cohort, members: Iterable[Any], why: str) -> None:
    """By device 0, though the coordinator signed it."""
    roster = signed_roster(cohort, members)
    assert_leaves(cohort.devices[0], lambda: cohort.devices[0].on_roster(roster, NOW), why)


# --------------------------------------------------------------------------------------------------- rosters and graphs


def test_case_10_two_rosters() -> None:
    """Device 0 is shown a cohort without the last member: its keys fit nobody's, so nothing opens and no word holds."""
    cohort = at(ServerStage.SHARES)
    one, gone = cohort.devices[0], place(cohort, COUNT - 1)
    others = signed_roster(cohort, [member for turn, member in enumerate(advertised(cohort)) if turn != gone])
    theirs = one.on_roster(others, NOW)
    padded = theirs.ciphertexts + bytes(82)  # the coordinator makes up for the ninth neighbour
    cohort.sent[0, ServerStage.SHARES] = secagg_pb2.SecureShares(
        ciphertexts=padded, seed_commitment=theirs.seed_commitment
    )
    for index in range(COUNT):
        cohort.send(index, ServerStage.SHARES)
    cohort.close()
    delivery = answer(cohort, 0, ServerStage.SHARES)
    for index in range(1, COUNT):
        cohort.send(index, ServerStage.MASKED)
        named = list(cohort.sent[index, ServerStage.MASKED].complaints)
        assert named == [place(cohort, 0)]
    assert cohort.server.blamed == {cohort.ids[0]}
    cut = secagg_pb2.SecureDelivery(
        sharers=(2**9 - 1).to_bytes(2, "little"), ciphertexts=delivery.ciphertexts[: 8 * 82]
    )
    one.on_delivery(cut)
    assert set(one._secrets.held.values()) == {None}
    lanes = cohort.vectors[0].copy()
    one.mask(lanes)
    with pytest.raises(ProtocolError, match="signature of the vector"):
        cohort.server.receive(
            cohort.ids[0], one.masked(sha256(lanes.tobytes())), vector_sha256=sha256(lanes.tobytes()), now_unix_ms=NOW
        )
    words = secagg_pb2.SecureSurvivors(survivors=cut.sharers, neighbours=bytes(96 * 8))
    assert_leaves(one, lambda: one.on_survivors(words), "the word of .* does not hold")


def test_case_11_wrong_graph_or_neighbour_list() -> None:
    """Nothing that a coordinator sends says who neighbours are; they follow from the roster's hash and nothing else."""
    assert [field.name for field in secagg_pb2.SecureRoster.DESCRIPTOR.fields] == ["members", "signature"]
    cohort = at(ServerStage.MASKED, 70)
    for device in cohort.devices:
        roster = device._known_roster
        assert roster is not None
        digest = sha256(b"evensong/v1/secagg/roster\0" + roster.context + (70).to_bytes(4, "little") + encoded(roster))
        graph = Graph(digest, [member.id for member in roster.members], roster.parameters.degree)
        assert device._neighbours == graph.neighbours(device._place)
        assert device._place not in device._neighbours and len(device._neighbours) == roster.parameters.degree < 69


def encoded(roster: Any) -> bytes:
    return b"".join(member.encode() for member in roster.members)


@pytest.mark.parametrize("field", ["channel_key", "mask_key"])
def test_case_12_keys_substituted_by_the_server(field: str) -> None:
    own_key = X25519PrivateKey.from_private_bytes(b"\x07" * 32).public_key().public_bytes_raw()
    for victim, why in ((4, "signature of member"), (0, "shows this device changed")):
        cohort = at(ServerStage.SHARES)
        members = advertised(cohort)
        setattr(members[place(cohort, victim)], field, own_key)
        assert_roster_refused(cohort, members, why)


def test_case_12_a_member_signed_by_the_server_itself() -> None:
    """A whole identity of the coordinator's own, with true signatures, in a member's stead: it has no certificate."""
    cohort = at(ServerStage.SHARES)
    members = advertised(cohort)
    cohort.identities[4] = cohort.new_key()
    members[place(cohort, 4)] = advertised_by(cohort, 4, public_key=public_key_of(cohort.identities[4]))
    members.sort(key=lambda member: sha256(member.public_key))
    assert_roster_refused(cohort, members, "a certificate does not hold")


def test_case_13_revoked_or_expired_certificate() -> None:
    """A certificate that ended or is another fleet's is refused by devices; who is revoked gets no new one, nor a place
    from the coordinator (test_device_protocol.py)."""
    cohort = at(ServerStage.SHARES)
    roster = answer(cohort, 0, ServerStage.ADVERTISE)
    assert_leaves(cohort.devices[0], lambda: cohort.devices[0].on_roster(roster, NOW + DAY + 1), "has expired")
    for changes, why in (
        ({"not_after": NOW - 1}, "has expired"),
        ({"population": "whistles"}, "a certificate does not hold"),
        ({"signer": Ed25519PrivateKey.generate()}, "a certificate does not hold"),
    ):
        cohort = at(ServerStage.SHARES)
        members = advertised(cohort)
        members[place(cohort, 3)] = advertised_by(cohort, 3, certificate=certificate(cohort, 3, **changes))
        assert_roster_refused(cohort, members, why)


def certificate(cohort: Cohort, index: int, **changes: Any) -> bytes:
    return certificates.issue(
        changes.get("signer", cohort.authority),
        public_key_of(cohort.identities[index]),
        changes.get("population", SESSION.population),
        changes.get("not_after", NOW + DAY),
        bytes(16),
    )


def test_case_14_one_identity_twice() -> None:
    """The very same member twice, or one identity with two pairs of keys: it would hold two shares of each secret."""
    fresh = [X25519PrivateKey.from_private_bytes(bytes([n]) * 32).public_key().public_bytes_raw() for n in (1, 2)]
    for keys in ({}, {"channel_key": fresh[0], "mask_key": fresh[1]}):
        cohort = at(ServerStage.SHARES)
        members = advertised(cohort)
        members.insert(place(cohort, 3), advertised_by(cohort, 3, **keys))
        assert_roster_refused(cohort, members, "not in the order of ids, each once")


def test_members_out_of_order() -> None:
    cohort = at(ServerStage.SHARES)
    assert_roster_refused(cohort, advertised(cohort)[::-1], "not in the order of ids")


# -------------------------------------------------------------------------------------------------------------- replays


def assert_replays_refused(session: Session) -> None:
    """Everything that was said in another session, which had the very same identities and keys, in every stage."""
    for stage, why in (
        (ServerStage.ADVERTISE, "the coordinator's signature on the roster"),
        (ServerStage.SHARES, ""),
        (ServerStage.MASKED, "the word of .* does not hold"),
        (ServerStage.COMMIT, "the signature of .* does not hold"),
    ):
        old, new = Cohort(vectors(), session=session), Cohort(vectors())
        old.play_until(None)
        message = answer(old, 0, stage)
        stages = list(ServerStage)
        new.play_until(stages[stages.index(stage) + 1])
        device = new.devices[0]
        if stage is ServerStage.ADVERTISE:
            assert_leaves(device, lambda d=device, m=message: d.on_roster(m, NOW), why)
            assert_members_refused(session)
        elif stage is ServerStage.SHARES:
            device.on_delivery(message)
            assert set(device._secrets.held.values()) == {None}  # not one opens
        elif stage is ServerStage.MASKED:
            assert_leaves(device, lambda d=device, m=message: d.on_survivors(m), why)
        else:
            assert_leaves(device, lambda d=device, m=message: d.on_quorum(m), why)


def assert_members_refused(session: Session) -> None:
    """Members' old keys under a new signature of the coordinator, with only the device's own as they are."""
    old, new = at(ServerStage.SHARES, session=session), at(ServerStage.SHARES)
    members, own = advertised(old), place(new, 0)
    members[own] = advertised(new)[own]
    assert_roster_refused(new, members, "signature of member")


def test_case_15_replay_from_an_earlier_round() -> None:
    assert_replays_refused(replace(SESSION, round=SESSION.round - 1))


def test_case_16_replay_from_an_earlier_attempt() -> None:
    assert_replays_refused(replace(SESSION, attempt=SESSION.attempt - 1))


def test_case_17_other_model_digest() -> None:
    """Two devices that trained from two models, or by two plans, are in no cohort together."""
    assert_replays_refused(replace(SESSION, manifest_sha256=sha256(b"another model")))
    assert_replays_refused(replace(SESSION, bundle_sha256=sha256(b"another plan")))


def test_messages_of_another_task() -> None:
    assert_replays_refused(replace(SESSION, task_id="f" * 32))


def test_messages_of_another_kind_of_work() -> None:
    assert_replays_refused(replace(SESSION, work=SESSION.work + 1))


# ----------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("u", LOW_ORDER)
def test_case_18_low_order_point(u: int) -> None:
    """From a corrupted member, truly signed: refused as soon as the key is used, before anything hides behind zero."""
    key = u.to_bytes(32, "little")
    check_agreement_key(key, "the key")
    with pytest.raises(ProtocolError, match="no agreement"):
        check_order(key, "the key")
    cohort = at(ServerStage.SHARES)
    members = advertised(cohort)
    members[place(cohort, 3)] = advertised_by(cohort, 3, channel_key=key)
    assert_roster_refused(cohort, members, "gives no agreement")
    with pytest.raises(ProtocolError, match="no agreement"):
        Primitives().agree(X25519PrivateKey.generate(), key)


def test_case_18_low_order_mask_key() -> None:
    cohort = at(ServerStage.SHARES)
    members = advertised(cohort)
    members[place(cohort, 3)] = advertised_by(cohort, 3, mask_key=LOW_ORDER[2].to_bytes(32, "little"))
    roster = signed_roster(cohort, members)
    cohort.devices[3]._advertised = members[place(cohort, 3)]
    for index in range(COUNT):
        cohort.sent[index, ServerStage.SHARES] = cohort.devices[index].on_roster(roster, NOW)
    device = cohort.devices[0]
    held = [
        cohort.sent[cohort.ids.index(cohort.server.members[source]), ServerStage.SHARES]
        for source in device._neighbours
    ]
    ciphertexts = b""
    for source, message in zip(device._neighbours, held, strict=True):
        turn = [n for n in range(COUNT) if n != source].index(device._place)
        ciphertexts += message.ciphertexts[82 * turn : 82 * (turn + 1)]
    device.on_delivery(secagg_pb2.SecureDelivery(sharers=(2**COUNT - 1).to_bytes(2, "little"), ciphertexts=ciphertexts))
    lanes = cohort.vectors[0].copy()
    assert_leaves(device, lambda: device.mask(lanes), "gives no agreement")
    assert np.array_equal(lanes, cohort.vectors[0])  # no half of the masks was added


@pytest.mark.parametrize("u", NON_CANONICAL)
def test_case_18_point_that_is_not_canonical(u: int) -> None:
    key = u.to_bytes(32, "little")
    with pytest.raises(ProtocolError, match="canonical"):
        check_agreement_key(key, "the key")
    for field in ("channel_key", "mask_key"):
        with pytest.raises(ProtocolError, match="canonical"):
            read_member(advertised_by(at(ServerStage.SHARES, 3), 0, **{field: key}))


def test_case_18_points_on_the_twist_agree_as_others_do() -> None:
    """X25519 is secure on the twist as well: its points of large order are neither refused nor of any use."""
    twist = [u for u in range(2, 40) if pow(u**3 + 486662 * u**2 + u, (PRIME - 1) // 2, PRIME) == PRIME - 1]
    assert len(twist) > 10
    agreed = set()
    for u in twist:
        key = u.to_bytes(32, "little")
        check_agreement_key(key, "the key")
        check_order(key, "the key")
        agreed |= {Primitives().agree(X25519PrivateKey.from_private_bytes(bytes([n]) * 32), key) for n in (1, 2)}
    assert len(agreed) == 2 * len(twist) and bytes(32) not in agreed


def test_case_19_own_key_missing_or_duplicated() -> None:
    for lie, why in (
        (lambda members, own: members.pop(own), "changed, or not at all"),
        (lambda members, own: members.insert(own, copy.deepcopy(members[own])), "each once"),
        (lambda members, own: setattr(members[own - 1], "mask_key", members[own].mask_key), "repeats a key"),
        (lambda members, own: setattr(members[own - 1], "channel_key", members[own].mask_key), "repeats a key"),
        (lambda members, own: setattr(members[own], "nonce", bytes(16)), "shows this device changed"),
        (lambda members, own: setattr(members[own], "certificate", members[own - 1].certificate), "certificate"),
    ):
        cohort = at(ServerStage.SHARES)
        members = advertised(cohort)
        lie(members, place(cohort, 0))
        assert_roster_refused(cohort, members, why)


def test_case_20_duplicate_peer_keys() -> None:
    """Truly signed by a corrupted member: another's key, or one key for both purposes."""
    for changes in (
        lambda other: {"channel_key": other.channel_key},
        lambda other: {"mask_key": other.mask_key},
        lambda other: {"channel_key": other.mask_key},
        lambda other: {"channel_key": bytes([9]) + bytes(31), "mask_key": bytes([9]) + bytes(31)},
    ):
        cohort = at(ServerStage.SHARES)
        members = advertised(cohort)
        members[place(cohort, 3)] = advertised_by(cohort, 3, **changes(members[place(cohort, 5)]))
        assert_roster_refused(cohort, members, "repeats a key")


# -------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("field", ["channel_key", "mask_key", "nonce", "signature", "public_key", "certificate"])
@pytest.mark.parametrize("change", [b"", b"one more"])
def test_members_fields_of_wrong_length(field: str, change: bytes) -> None:
    cohort = at(ServerStage.SHARES)
    roster = answer(cohort, 0, ServerStage.ADVERTISE)
    member = roster.members[3]
    setattr(member, field, getattr(member, field) + change if change else b"")
    assert_leaves(cohort.devices[0], lambda: cohort.devices[0].on_roster(roster, NOW), "malformed")
