"""A malicious coordinator against a device's machine: survivor sets, quorums, deliveries, and replays.

Each time the device leaves, forgets its secrets, and has revealed nothing. ``test_attack_list.py`` says which test
holds which case; rosters are in ``test_attacks_roster.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from attacks import COUNT, answer, assert_leaves, at, bits_without, place, vectors
from cohort import NOW, POLICY, SESSION, Cohort
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from evensong.secagg import (
    DeviceState,
    Policy,
    ProtocolError,
    SecureError,
    ServerStage,
    SharedPrimitives,
    apply_masks,
    bitmap,
    keys,
    shamir,
)
from evensong.secagg.device import CIPHERTEXT_BYTES
from evensong.secagg.masks import PIECE_BYTES, Mask
from evensong.secagg.server import SENDING
from evensong.secagg.transcript import SIGNATURE_BYTES, WORD_BYTES
from evensong.v1 import secagg_pb2

pytestmark = pytest.mark.secagg


def survivors_without(cohort: Cohort, index: int, gone: int) -> secagg_pb2.SecureSurvivors:
    """A second survivor set for device ``index``, true in all but that device ``gone`` is not in it."""
    message = answer(cohort, index, ServerStage.MASKED)
    around = [other for other in cohort.devices[index]._neighbours if message.survivors[other // 8] >> other % 8 & 1]
    words = [message.neighbours[start : start + WORD_BYTES] for start in range(0, len(message.neighbours), WORD_BYTES)]
    kept = [word for other, word in zip(around, words, strict=True) if other != place(cohort, gone)]
    return secagg_pb2.SecureSurvivors(
        survivors=bits_without(cohort, message.survivors, gone), neighbours=b"".join(kept)
    )


def quorum_of(cohort: Cohort, survivors: bytes, signatures: dict[int, bytes]) -> secagg_pb2.SecureQuorum:
    """What the coordinator can make of these devices' signatures."""
    by_place = {place(cohort, index): signature for index, signature in signatures.items()}
    signers = bitmap.encode(bitmap.from_places(by_place), len(cohort.devices))
    joined = b"".join(by_place[one] for one in sorted(by_place))
    return secagg_pb2.SecureQuorum(survivors=survivors, signers=signers, signatures=joined)


def opened(cohort: Cohort, owner: int, revealed: dict[int, bytes]) -> str:
    """Which secret of a device the shares of the others open: "seed", "mask key" or "nothing"."""
    at_place, shares = place(cohort, owner), dict[int, int]()
    for index, data in revealed.items():
        around = cohort.devices[index]._neighbours  # all shared
        if at_place in around:
            turn = around.index(at_place) * shamir.SHARE_BYTES
            shares[place(cohort, index) + 1] = shamir.decode_share(data[turn : turn + shamir.SHARE_BYTES])
    roster = cohort.devices[0]._known_roster
    assert roster is not None
    some = dict(list(shares.items())[: roster.parameters.threshold])
    secret = shamir.reconstruct(some) if len(some) == roster.parameters.threshold else None
    member = roster.members[at_place]
    if secret is None:
        return "nothing"
    commitment = cohort.sent[owner, ServerStage.SHARES].seed_commitment
    if keys.seed_commitment(secret, roster.binding, member.id) == commitment:
        return "seed"
    key = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    return "mask key" if key == member.mask_key else "nothing"


# ------------------------------------------------------------------------------------------------ survivors and quorums


def test_case_05_both_kinds_of_share_requested() -> None:
    """Whoever has both secrets of a member has its vector: a device gives one of each neighbour's two shares, once."""
    cohort = Cohort(vectors())
    cohort.play({ServerStage.MASKED: {3}})
    revealed = {index: cohort.sent[index, ServerStage.UNMASK].shares for index in range(COUNT) if index != 3}
    for owner in range(COUNT):
        assert opened(cohort, owner, revealed) == ("mask key" if owner == 3 else "seed")
    for index in revealed:  # the other kind is not even there any more
        secrets = cohort.devices[index]._secrets
        assert (secrets.held, secrets.channels_in, secrets.seed, secrets.mask) == ({}, {}, b"", None)
    told = answer(cohort, 0, ServerStage.COMMIT)
    for survivors in (told.survivors, bits_without(cohort, told.survivors, 4)):
        other = secagg_pb2.SecureQuorum(survivors=survivors, signers=told.signers, signatures=told.signatures)
        device = cohort.devices[0]
        with pytest.raises(SecureError):
            device.on_quorum(other)
        assert device._secrets.held == {}


def test_case_06_two_survivor_sets_to_two_devices() -> None:
    """Five are shown everybody and four all but one, and the corrupted member signs both: only one set has a quorum."""
    cohort = at(ServerStage.COMMIT)
    corrupted, gone = 9, 0
    everybody, one_less = answer(cohort, 0, ServerStage.MASKED), survivors_without(cohort, 5, gone)
    signed, signed_less = dict[int, bytes](), dict[int, bytes]()
    for index in (*range(5), corrupted):
        device, told = cohort.devices[index], answer(cohort, index, ServerStage.MASKED)
        signed[index] = device.on_survivors(told).signature
    cohort.devices[corrupted].state = DeviceState.MASKED  # it keeps to no table
    for index in (*range(5, 9), corrupted):
        signed_less[index] = cohort.devices[index].on_survivors(survivors_without(cohort, index, gone)).signature
    assert len(signed) == POLICY.parameters(COUNT).quorum == len(signed_less) + 1
    cohort.devices[1].on_quorum(quorum_of(cohort, everybody.survivors, signed))
    few = quorum_of(cohort, one_less.survivors, signed_less)
    assert_leaves(cohort.devices[5], lambda: cohort.devices[5].on_quorum(few), "no quorum")
    borrowed = quorum_of(cohort, one_less.survivors, signed_less | {1: signed[1]})  # signed for the other set
    assert_leaves(cohort.devices[6], lambda: cohort.devices[6].on_quorum(borrowed), "signature of .* does not hold")
    other = quorum_of(cohort, everybody.survivors, signed)
    assert_leaves(cohort.devices[7], lambda: cohort.devices[7].on_quorum(other), "other survivors")


def test_case_07_survivor_set_signed_twice_across_a_restart() -> None:
    """A process that starts anew has no keys of the cohort that it was in, and nothing makes it sign for that."""
    cohort = at(ServerStage.UNMASK)
    other = survivors_without(cohort, 0, 1)
    for advertises in (False, True):
        restarted = cohort.new_device(0)
        if advertises:
            restarted.advertise()
        assert_leaves(restarted, lambda machine=restarted: machine.on_survivors(other), "out of turn")
    restarted = cohort.new_device(0)
    assert restarted.advertise() != cohort.sent[0, ServerStage.ADVERTISE]
    roster = answer(cohort, 0, ServerStage.ADVERTISE)  # nor does it come back into the cohort
    assert_leaves(restarted, lambda: restarted.on_roster(roster, NOW), "shows this device changed")
    with pytest.raises(ProtocolError, match="another advertise"):
        cohort.server.receive(cohort.ids[0], cohort.new_device(0).advertise(), now_unix_ms=NOW)


def fewer(quorum: secagg_pb2.SecureQuorum) -> str:
    quorum.signers, quorum.signatures = bitmap.encode(0b11111, COUNT), quorum.signatures[: 5 * SIGNATURE_BYTES]
    return "no quorum"


def one_signature_for_many(quorum: secagg_pb2.SecureQuorum) -> str:
    first = quorum.signatures[:SIGNATURE_BYTES]
    quorum.signatures = quorum.signatures[: 5 * SIGNATURE_BYTES] + first * (COUNT - 5)
    return "signature of .* does not hold"


def one_signature_too_few(quorum: secagg_pb2.SecureQuorum) -> str:
    quorum.signatures = quorum.signatures[:-SIGNATURE_BYTES]
    return "signatures have a wrong length"


def signers_that_do_not_exist(quorum: secagg_pb2.SecureQuorum) -> str:
    quorum.signers = b"\xff\xff"
    return "do not exist"


@pytest.mark.parametrize("lie", [fewer, one_signature_for_many, one_signature_too_few, signers_that_do_not_exist])
def test_case_08_fewer_than_q_or_duplicated_signers(lie: Callable[[secagg_pb2.SecureQuorum], str]) -> None:
    cohort = at(ServerStage.UNMASK)
    for index in range(COUNT):  # whichever sample the device draws
        quorum = answer(cohort, index, ServerStage.COMMIT)
        why = lie(quorum)
        assert_leaves(cohort.devices[index], lambda d=cohort.devices[index], q=quorum: d.on_quorum(q), why)


def test_case_08_a_signer_that_is_no_survivor() -> None:
    cohort = Cohort(vectors())
    cohort.play_until(ServerStage.UNMASK, {ServerStage.MASKED: {3}})
    quorum = answer(cohort, 0, ServerStage.COMMIT)
    told = bitmap.decode(quorum.signers, COUNT, "signers") | 1 << place(cohort, 3)
    quorum.signers = bitmap.encode(told, COUNT)
    quorum.signatures += bytes(SIGNATURE_BYTES)
    assert_leaves(cohort.devices[0], lambda: cohort.devices[0].on_quorum(quorum), "no survivor")


def test_case_09_neighbours_told_dropped_device_told_alive() -> None:
    """All others open the victim's mask key; its seed would now open its vector, but only the victim thinks so."""
    cohort = at(ServerStage.COMMIT)
    victim = 0
    commits = {}
    for index in range(1, COUNT):
        commits[index] = cohort.devices[index].on_survivors(survivors_without(cohort, index, victim)).signature
    told = answer(cohort, victim, ServerStage.MASKED)
    commits_of_all = {victim: cohort.devices[victim].on_survivors(told).signature}
    bits = bits_without(cohort, told.survivors, victim)
    revealed = {i: cohort.devices[i].on_quorum(quorum_of(cohort, bits, commits)).shares for i in range(1, COUNT)}
    assert opened(cohort, victim, revealed) == "mask key"
    device, forged = cohort.devices[victim], quorum_of(cohort, told.survivors, commits | commits_of_all)
    assert_leaves(device, lambda: device.on_quorum(forged), "signature of .* does not hold")


def test_a_device_that_is_told_it_dropped_signs_nothing() -> None:
    cohort = at(ServerStage.COMMIT)
    gone = survivors_without(cohort, 0, 0)
    assert_leaves(cohort.devices[0], lambda: cohort.devices[0].on_survivors(gone), "not among the survivors")


def test_neighbours_that_masked_towards_other_sharers() -> None:
    """Who thinks that fewer shared has fewer masks: the coordinator could peel those that only one side added."""
    cohort = at(ServerStage.MASKED)
    for index in range(COUNT):
        device, delivery = cohort.devices[index], answer(cohort, index, ServerStage.SHARES)
        if index == 1:  # is told that device 2 did not share
            turn = device._neighbours.index(place(cohort, 2)) * CIPHERTEXT_BYTES
            delivery.sharers = bits_without(cohort, delivery.sharers, 2)
            delivery.ciphertexts = delivery.ciphertexts[:turn] + delivery.ciphertexts[turn + CIPHERTEXT_BYTES :]
        device.on_delivery(delivery)
        device.mask(cohort.vectors[index].copy())
    told = bitmap.encode((1 << COUNT) - 1, COUNT)
    words = {place(cohort, i): bytes(32) + cohort.devices[i].masked(bytes(32)).signature for i in range(COUNT)}
    device = cohort.devices[0]
    around = b"".join(words[other] for other in device._neighbours)
    message = secagg_pb2.SecureSurvivors(survivors=told, neighbours=around)
    assert_leaves(device, lambda: device.on_survivors(message), f"the word of {cohort.ids[1]}")


# ----------------------------------------------------------------------------------------------------------- deliveries


def pieces(delivery: secagg_pb2.SecureDelivery) -> list[bytes]:
    data = delivery.ciphertexts
    return [data[start : start + CIPHERTEXT_BYTES] for start in range(0, len(data), CIPHERTEXT_BYTES)]


def complaints(cohort: Cohort, index: int, ciphertexts: list[bytes]) -> list[int]:
    """Whom a device names that was delivered these instead."""
    device, delivery = cohort.devices[index], answer(cohort, index, ServerStage.SHARES)
    delivery.ciphertexts = b"".join(ciphertexts)
    device.on_delivery(delivery)
    device.mask(cohort.vectors[index].copy())
    return list(device.masked(bytes(32)).complaints)


def test_case_21_ciphertext_rerouted() -> None:
    """A ciphertext opens for one receiver and as coming from one sender: in no other place, and not sent back."""
    cohort = at(ServerStage.MASKED)
    device = cohort.devices[0]
    around = list(device._neighbours)
    parts = pieces(answer(cohort, 0, ServerStage.SHARES))
    of_another = pieces(answer(cohort, 1, ServerStage.SHARES))
    own = cohort.sent[0, ServerStage.SHARES].ciphertexts
    parts[0], parts[1] = parts[1], parts[0]  # another sender's
    parts[2] = of_another[2]  # another receiver's
    parts[3] = own[3 * CIPHERTEXT_BYTES : 4 * CIPHERTEXT_BYTES]  # the device's own to that neighbour
    assert complaints(cohort, 0, parts) == around[:4]


def test_case_22_bit_flip_in_ciphertext_or_tag() -> None:
    """Every one of the 82 bytes: 9 in each delivery."""
    cohort = at(ServerStage.MASKED)
    for index in range(COUNT):
        parts = pieces(answer(cohort, index, ServerStage.SHARES))
        for turn, part in enumerate(parts):
            changed = bytearray(part)
            changed[min(index * len(parts) + turn, CIPHERTEXT_BYTES - 1)] ^= 1 << turn % 8
            parts[turn] = bytes(changed)
        assert complaints(cohort, index, parts) == list(cohort.devices[index]._neighbours)


def test_case_25_x_of_zero_or_a_share_of_p_or_more() -> None:
    """No holder has the number 0, whose share is the secret; a sealed number that is no share is complained about."""
    cohort = at(ServerStage.MASKED)
    device = cohort.devices[0]
    roster = device._known_roster
    assert roster is not None
    assert 0 not in {neighbour + 1 for member in range(COUNT) for neighbour in roster.graph.neighbours(member)}
    delivery, good = answer(cohort, 0, ServerStage.SHARES), shamir.encode_share(shamir.PRIME - 1)
    parts, around, this = pieces(delivery), device._neighbours, roster.members[device._place]
    for turn, pair in enumerate(
        [
            good + good,
            good + shamir.encode_share(shamir.PRIME),
            shamir.encode_share(shamir.PRIME) + good,
            shamir.NO_SHARE + good,
            good + shamir.NO_SHARE,
        ]
    ):
        source = around[turn]
        associated = keys.share_associated_data(roster.binding, roster.members[source].id, this.id)
        parts[turn] = cohort.primitives.seal(device._secrets.channels_in[source], pair, associated)
    assert complaints(cohort, 0, parts) == list(around[1:5])


def test_case_11_a_delivery_of_other_neighbours() -> None:
    """The graph is the device's own computation: ciphertexts from others do not fit it, nor does a part of them."""
    count = 70
    for lie, why in (
        (lambda d: setattr(d, "ciphertexts", d.ciphertexts[:-CIPHERTEXT_BYTES]), "wrong length"),
        (lambda d: setattr(d, "ciphertexts", d.ciphertexts + bytes(CIPHERTEXT_BYTES)), "wrong length"),
        (lambda d: setattr(d, "sharers", d.sharers + b"\0"), "wrong length"),
        (lambda d: setattr(d, "sharers", b"\xff" * len(d.sharers)), "do not exist"),
    ):
        cohort = at(ServerStage.MASKED, count)
        device, delivery = cohort.devices[0], answer(cohort, 0, ServerStage.SHARES)
        assert len(device._neighbours) < count - 1
        lie(delivery)
        assert_leaves(device, lambda d=device, m=delivery: d.on_delivery(m), why)
    cohort = at(ServerStage.MASKED, count)
    device, delivery = cohort.devices[0], answer(cohort, 0, ServerStage.SHARES)
    gone = [cohort.ids.index(cohort.server.members[neighbour]) for neighbour in device._neighbours]
    delivery.sharers, delivery.ciphertexts = bits_without(cohort, delivery.sharers, *gone), b""
    assert_leaves(device, lambda: device.on_delivery(delivery), "too few neighbours shared")


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        (ServerStage.SHARES, "sharers"),
        (ServerStage.SHARES, "ciphertexts"),
        (ServerStage.MASKED, "survivors"),
        (ServerStage.MASKED, "neighbours"),
        (ServerStage.COMMIT, "survivors"),
        (ServerStage.COMMIT, "signers"),
        (ServerStage.COMMIT, "signatures"),
    ],
)
@pytest.mark.parametrize("change", [lambda value: value[:-1], lambda value: value + b"\0", lambda value: b""])
def test_answers_of_wrong_length(stage: ServerStage, field: str, change: Callable[[bytes], bytes]) -> None:
    cohort = at(SENDING[SENDING.index(stage) + 1])
    device, message = cohort.devices[0], answer(cohort, 0, stage)
    setattr(message, field, change(getattr(message, field)))
    calls = {
        ServerStage.SHARES: device.on_delivery,
        ServerStage.MASKED: device.on_survivors,
        ServerStage.COMMIT: device.on_quorum,
    }
    assert_leaves(device, lambda: calls[stage](message), "wrong length|other survivors")


# ----------------------------------------------------------------------------------------------- parameters, keystreams


def test_case_34_thresholds_lowered_by_the_coordinator() -> None:
    """No message carries a parameter: a coordinator that goes by weaker ones is left, whatever it says."""
    weak = Policy(corrupted_share=0.0, dropout_share=0.4, min_survivors=3, max_cohort=100)
    for honest, dropped, why in (
        (replace(weak, min_survivors=9), 2, "too few survivors; expected at least 9"),
        (
            replace(weak, corrupted_share=0.3, dropout_share=0.2),
            4,
            "too few survivors; expected at least 7",
        ),  # a quorum
        (replace(weak, dropout_share=0.1), 4, "too few neighbours survived; expected at least 7"),  # the threshold
    ):
        cohort = Cohort(vectors(), policy=weak)
        for device in cohort.devices:
            device.policy = honest
        with pytest.raises(ProtocolError, match=why):
            cohort.play_until(ServerStage.UNMASK, {ServerStage.MASKED: range(dropped)})
        device = cohort.devices[dropped]
        assert device.parameters == honest.parameters(COUNT) and device.state is DeviceState.ABORTED


def test_case_38_no_keystream_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two attempts: a mask key belongs to one member or one pair, a channel key seals one message, and no block
    of a long keystream comes twice."""
    masks, sealing = list[bytes](), list[bytes]()

    def watch(lanes: np.ndarray, some: list[tuple[bytes, int]], threads: int = 1) -> None:
        masks.extend(key for key, _ in some)
        apply_masks(lanes, some, threads)

    class Watching(SharedPrimitives):
        def seal(self, key: bytes, plaintext: bytes, associated: bytes) -> bytes:
            sealing.append(key)
            return super().seal(key, plaintext, associated)

    monkeypatch.setattr("evensong.secagg.device.apply_masks", watch)
    for attempt in (1, 2):
        # The same seed gives the same keys: only the attempt differs.
        Cohort(vectors(), session=replace(SESSION, attempt=attempt), primitives=Watching()).play()
    uses = Counter(masks)
    assert len(uses) == 2 * (COUNT + COUNT * (COUNT - 1) // 2)
    assert sorted(uses.values()) == [1] * (2 * COUNT) + [2] * (COUNT * (COUNT - 1))  # a pair's: once at each end
    assert len(set(sealing)) == len(sealing) == 2 * COUNT * (COUNT - 1) and not set(sealing) & set(masks)
    lanes = np.zeros(3 * PIECE_BYTES // 8 + 6, np.uint64)  # chunks of an upload are cut from this one row
    apply_masks(lanes, [(masks[0], 1)], 2)
    blocks = lanes.reshape(-1, 2)
    assert len(np.unique(blocks, axis=0)) == len(blocks)


def test_case_40_the_same_cohort_minus_one_run_again() -> None:
    """Two sums that differ by one device would tell its vector: nobody signs a second set, and another attempt needs
    other keys, under which what was revealed opens nothing."""
    cohort = Cohort(vectors())
    cohort.play_until(None)
    revealed = {key for key, _ in cohort.server.unmasking().masks}
    for index in range(COUNT - 1):
        device = cohort.devices[index]
        less = survivors_without(cohort, index, COUNT - 1)
        assert_leaves(device, lambda d=device, m=less: d.on_survivors(m), "out of turn")
    again = Cohort(vectors(), session=replace(SESSION, attempt=2))
    again.play_until(None, {ServerStage.ADVERTISE: {COUNT - 1}})
    assert not revealed & {key for key, _ in again.server.unmasking().masks}


def test_fewer_than_the_threshold_see_random_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator and any t - 1 neighbours of a survivor: a vector of zeros less all masks that they share with it
    is still uniform. Chi-square over its bytes; one false alarm in 10^8 looks, were the seed not fixed."""
    keys_of = list[set[bytes]]()  # of each device's masks

    def watch(lanes: np.ndarray, some: list[Mask], threads: int = 1) -> None:
        keys_of.append({key for key, _ in some})
        apply_masks(lanes, some, threads)

    monkeypatch.setattr("evensong.secagg.device.apply_masks", watch)
    cohort = Cohort(np.zeros((COUNT, 8_192), np.uint64))
    cohort.play_until(ServerStage.COMMIT)
    victim, threshold = 0, POLICY.parameters(COUNT).threshold
    signs = {next(iter(keys_of[0] & keys_of[i])): 1 if cohort.ids[i] > cohort.ids[0] else -1 for i in range(1, COUNT)}
    at_place = place(cohort, victim)
    for colluding in combinations(signs, threshold - 1):
        seen = cohort.masked[victim].copy()
        apply_masks(seen, [(key, -signs[key]) for key in colluding])
        assert chi_square(seen) < 255 + 7 * np.sqrt(2 * 255)
    seen = cohort.masked[victim].copy()  # the measure itself: with all masks off, nothing is left to hide
    apply_masks(seen, [(key, -signs.get(key, 1)) for key in keys_of[victim]])
    assert not seen.any() and chi_square(seen) > 1e6
    holders = [device for device in cohort.devices if at_place in device._secrets.held][: threshold - 1]
    shares = {device._place + 1: shamir.decode_share(device._secrets.held[at_place][0]) for device in holders}
    roster = cohort.devices[victim]._known_roster
    assert len(shares) == threshold - 1 and roster is not None
    guess = shamir.reconstruct(shares) or bytes(32)
    commitment = cohort.sent[victim, ServerStage.SHARES].seed_commitment
    assert keys.seed_commitment(guess, roster.binding, roster.members[at_place].id) != commitment


def chi_square(lanes: npt.NDArray[np.uint64]) -> float:
    """Of its bytes against the uniform distribution; 255 on average, with a variance of 510."""
    counts, expected = np.bincount(lanes.view(np.uint8), minlength=256), lanes.nbytes / 256
    return float(((counts - expected) ** 2 / expected).sum())
