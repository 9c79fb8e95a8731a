"""Shares: any threshold of them open the secret, fewer tell nothing, wrong ones are found where that can be."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evensong.secagg import ProtocolError
from evensong.secagg.reveal import Reveal
from evensong.secagg.shamir import (
    NO_SHARE,
    PRIME,
    decode,
    decode_share,
    encode_share,
    evaluate,
    lagrange_at_zero,
    reconstruct,
    split,
    without_one,
)

pytestmark = pytest.mark.secagg

secrets = st.binary(min_size=32, max_size=32)


@given(
    secret=st.one_of(secrets, st.sampled_from([bytes(32), b"\xff" * 32])),
    threshold=st.integers(2, 40),
    spare=st.integers(0, 20),
    seed=st.integers(0, 1 << 30),
)
def test_any_threshold_of_shares_open_the_secret(secret: bytes, threshold: int, spare: int, seed: int) -> None:
    chance = random.Random(seed)
    holders = chance.sample(range(1, 10_001), threshold + spare)
    shares = split(secret, threshold, holders, chance.randbytes)
    chosen = chance.sample(range(len(holders)), threshold)
    assert reconstruct({holders[turn]: shares[turn] for turn in chosen}) == secret


def test_every_subset_of_a_small_sharing() -> None:
    secret = bytes(range(32))
    shares = dict(zip(range(1, 7), split(secret, 3, range(1, 7), random.Random(1).randbytes), strict=True))
    for chosen in combinations(shares, 3):
        assert reconstruct({holder: shares[holder] for holder in chosen}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """Threshold - 1 shares and any secret at all lie on one polynomial of the right degree: so they tell nothing."""
    shares = dict(zip((5, 9), split(b"s" * 32, 3, (5, 9), random.Random(2).randbytes), strict=True))
    for guess in (0, 1, PRIME - 1):
        weights = lagrange_at_zero((5, 9, 11))
        third = (guess - weights[0] * shares[5] - weights[1] * shares[9]) * pow(weights[2], -1, PRIME) % PRIME
        total = sum(weight * share for weight, share in zip(weights, (shares[5], shares[9], third), strict=True))
        assert total % PRIME == guess


def test_lazy_reduction_changes_no_value() -> None:
    chance = random.Random(3)
    coefficients = [chance.randrange(PRIME) for _ in range(100)]
    for x in (1, 2, 9_999, 2**31):
        assert evaluate(coefficients, x) == sum(c * x**i for i, c in enumerate(reversed(coefficients))) % PRIME


@given(st.integers(0, PRIME - 1))
def test_shares_travel_as_33_bytes(share: int) -> None:
    assert decode_share(encode_share(share)) == share


@pytest.mark.parametrize("data", [NO_SHARE, encode_share(PRIME), b"", bytes(32), bytes(34)])
def test_values_beyond_the_field_and_wrong_lengths_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_share(data)


def test_a_secret_of_more_than_32_bytes_is_none() -> None:
    assert reconstruct({1: 2**256, 2: 2**256}) is None
    assert reconstruct({1: 2**256 - 1, 2: 2**256 - 1}) == b"\xff" * 32


# ------------------------------------------------------------------------------------------------------- wrong shares


@given(threshold=st.integers(2, 12), beyond=st.integers(0, 9), data=st.data(), seed=st.integers(0, 1 << 30))
def test_decoding_corrects_half_of_what_is_beyond_the_threshold(
    threshold: int, beyond: int, data: st.DataObject, seed: int
) -> None:
    chance = random.Random(seed)
    secret = chance.randbytes(32)
    holders = chance.sample(range(1, 1_000), threshold + beyond)
    shares = dict(zip(holders, split(secret, threshold, holders, chance.randbytes), strict=True))
    wrong = chance.sample(holders, data.draw(st.integers(0, beyond)))
    for holder in wrong:
        shares[holder] = (shares[holder] + chance.randrange(1, PRIME)) % PRIME
    decoded = decode(shares, threshold)
    if 2 * len(wrong) <= beyond:
        assert decoded is not None
        assert decoded[0] == secret and set(decoded[1]) == set(wrong)
    elif decoded is not None:  # another polynomial is as near: never is a secret invented that more shares contradict
        assert 2 * len(decoded[1]) <= beyond


@given(threshold=st.integers(2, 12), seed=st.integers(0, 1 << 30))
def test_one_wrong_share_beyond_the_threshold_is_among_the_candidates(threshold: int, seed: int) -> None:
    chance = random.Random(seed)
    secret = chance.randbytes(32)
    holders = chance.sample(range(1, 1_000), threshold + 1)
    shares = dict(zip(holders, split(secret, threshold, holders, chance.randbytes), strict=True))
    wrong = chance.choice(holders)
    shares[wrong] = (shares[wrong] + 1) % PRIME
    assert (wrong, secret) in list(without_one(shares))
    others = {holder: {other: shares[other] for other in holders if other != holder} for holder in holders}
    expected = [(holder, found) for holder in holders if (found := reconstruct(others[holder])) is not None]
    assert list(without_one(shares)) == expected


@given(threshold=st.integers(2, 8), beyond=st.integers(1, 8), data=st.data(), seed=st.integers(0, 1 << 30))
def test_a_secret_opens_as_soon_as_wrong_shares_are_outweighed(
    threshold: int, beyond: int, data: st.DataObject, seed: int
) -> None:
    chance = random.Random(seed)
    secret = chance.randbytes(32)
    holders = chance.sample(range(1, 1_000), threshold + beyond)
    shares = split(secret, threshold, holders, chance.randbytes)
    wrong = set(chance.sample(holders, data.draw(st.integers(0, max(1, beyond // 2)))))
    reveal = Reveal(0, threshold, lambda candidate: candidate == secret)
    for holder, share in zip(holders, shares, strict=True):
        reveal.add(holder, share ^ 1 if holder in wrong else share, set())
    reveal.finish(set())
    assert reveal.secret == secret
    assert reveal.wrong <= wrong


def test_holders_that_were_wrong_before_are_asked_last() -> None:
    chance = random.Random(4)
    secret = chance.randbytes(32)
    shares = split(secret, 3, range(1, 6), chance.randbytes)
    reveal = Reveal(0, 3, lambda candidate: candidate == secret)
    for holder in (1, 2):
        reveal.add(holder, 7, {1, 2})
    for holder in (3, 4, 5):
        reveal.add(holder, shares[holder - 1], {1, 2})
    assert reveal.secret == secret
