"""Degree, threshold and quorum: the published values, the exact rule, and refusals instead of weaker parameters."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evensong.secagg import ParameterError, Policy, parameters_for
from evensong.secagg.quorum import draw_sample, sample_size
from evensong.v1 import task_pb2

pytestmark = pytest.mark.secagg

SIZES = (100, 1_000, 10_000)
# Corrupted share, drop-out share, semi-malicious: degree/threshold, as google-parfait/federated-compute has them.
# At n = 10,000, .33, .1, semi-malicious it has 314/245; by exact arithmetic 310/242 is the least that fits.
PUBLISHED = [
    (0.05, 0.05, False, "12/6 30/17 34/20"),
    (0.1, 0.1, False, "22/11 48/27 54/31"),
    (0.05, 0.3, False, "26/6 66/23 80/29"),
    (0.2, 0.2, False, "40/21 98/54 122/67"),
    (0.33, 0.1, False, "42/32 102/72 126/88"),
    (0.05, 0.05, True, "16/11 52/37 62/44"),
    (0.1, 0.1, True, "32/22 96/67 122/85"),
    (0.05, 0.3, True, "66/36 314/179 522/299"),
    (0.2, 0.2, True, "62/42 302/206 482/328"),
    (0.33, 0.1, True, "54/44 218/171 310/242"),
]


@pytest.mark.parametrize(("corrupted", "dropout", "semi_malicious", "expected"), PUBLISHED)
def test_published_degrees_and_thresholds(
    corrupted: float, dropout: float, semi_malicious: bool, expected: str
) -> None:
    found = [
        parameters_for(
            size, corrupted_share=corrupted, dropout_share=dropout, min_survivors=3, semi_malicious=semi_malicious
        )
        for size in SIZES
    ]
    assert " ".join(f"{cohort.degree}/{cohort.threshold}" for cohort in found) == expected


@given(
    members=st.integers(65, 180),
    corrupted=st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.33]),
    dropout=st.sampled_from([0.0, 0.05, 0.1, 0.3]),
    semi_malicious=st.booleans(),
)
def test_the_rule_in_exact_fractions(members: int, corrupted: float, dropout: float, semi_malicious: bool) -> None:
    expected = _by_fractions(members, math.floor(corrupted * members), math.floor(dropout * members), semi_malicious)
    try:
        found = parameters_for(
            members, corrupted_share=corrupted, dropout_share=dropout, min_survivors=3, semi_malicious=semi_malicious
        )
    except ParameterError:
        assert expected is None  # neither is there a sparse graph
        return
    if expected is None:
        assert found.degree == members - 1
    else:
        assert (found.degree, found.threshold) == expected


@given(st.integers(3, 32), st.floats(0, 0.49), st.floats(0, 0.49), st.booleans())
def test_small_cohorts_have_complete_graphs_or_are_refused(
    members: int, corrupted: float, dropout: float, semi_malicious: bool
) -> None:
    try:
        found = parameters_for(
            members, corrupted_share=corrupted, dropout_share=dropout, min_survivors=3, semi_malicious=semi_malicious
        )
    except ParameterError:
        return
    dropped = math.floor(dropout * members)
    assert found.degree == members - 1
    assert max(2, found.corrupted + 1) <= found.threshold <= members - dropped - 1
    assert 2 * found.quorum > members + found.corrupted  # two quorums share an honest member
    assert found.quorum <= members - dropped
    if semi_malicious:
        assert 2 * found.threshold > found.degree + found.corrupted


@pytest.mark.parametrize(
    ("members", "changes"),
    [
        (2, {}),
        (4, {"min_survivors": 5}),
        (100, {"min_survivors": 2}),
        (100, {"corrupted_share": 0.5}),
        (100, {"corrupted_share": -0.1}),
        (100, {"dropout_share": math.nan}),
        (100, {"corrupted_share": 0.33, "dropout_share": 0.4}),  # no quorum
        (21, {"corrupted_share": 0.4, "dropout_share": 0.3, "semi_malicious": True}),  # 14 holders are left of 15
    ],
)
def test_what_gives_no_security_is_refused(members: int, changes: dict[str, float]) -> None:
    plan = {"corrupted_share": 0.1, "dropout_share": 0.1, "min_survivors": 3, "semi_malicious": False} | changes
    with pytest.raises(ParameterError):
        parameters_for(members, **plan)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{"corrupted_share": 0.5}, {"dropout_share": 0.7}, {"min_survivors": 2}, {"max_cohort": 3}]
)
def test_a_plan_without_security_is_refused(changes: dict[str, float]) -> None:
    plan = {"corrupted_share": 0.1, "dropout_share": 0.1, "min_survivors": 5, "max_cohort": 100} | changes
    with pytest.raises(ParameterError):
        Policy.from_plan(task_pb2.SecurePlan(**plan))  # type: ignore[arg-type]


def test_more_members_than_the_plan_allows_are_refused() -> None:
    policy = Policy.from_plan(task_pb2.SecurePlan(corrupted_share=0.1, min_survivors=3, max_cohort=100))
    assert policy.parameters(100).members == 100
    with pytest.raises(ParameterError):
        policy.parameters(101)


# -------------------------------------------------------------------------------------------------------------- quorum


def test_a_sample_stands_for_a_quorum() -> None:
    assert sample_size(1_000, 50, 700) == 121
    assert sample_size(64, 6, 50) == 36  # as many as a quorum are one
    assert sample_size(1_000, 100, 551) == 551  # a bare quorum: all


@given(members=st.integers(65, 20_000), corrupted_share=st.floats(0, 0.33), more=st.floats(0, 1))
def test_a_sample_misses_a_forged_quorum_with_less_than_2_to_the_minus_40(
    members: int, corrupted_share: float, more: float
) -> None:
    corrupted = math.floor(corrupted_share * members)
    quorum = (members + corrupted) // 2 + 1
    signatures = quorum + math.floor(more * (members - quorum))
    size = sample_size(members, corrupted, signatures)
    genuine = (members + corrupted) // 2  # of one of two sets at most
    assert genuine < signatures
    if size < signatures:
        missed = math.prod(Fraction(genuine - turn, signatures - turn) for turn in range(size))
        assert missed * 2**40 * members < 1


@given(st.integers(1, 300), st.integers(0, 300), st.randoms(use_true_random=False))
def test_a_sample_has_no_member_twice(count: int, size: int, chance: random.Random) -> None:
    sample = draw_sample(count, size, chance.randbytes)
    assert len(set(sample)) == len(sample) == min(count, size)
    assert all(0 <= number < count for number in sample)


def _by_fractions(members: int, corrupted: int, dropped: int, semi_malicious: bool) -> tuple[int, int] | None:
    """The text of docs/secagg.md, without logarithms or floating point."""
    bad, insecure, failure = corrupted + dropped, Fraction(1, 2**41), Fraction(1, 2**20)
    for degree in range(2, members - 1, 2):
        cut = Fraction(members * (members - degree - 1), 2)
        cut *= Fraction(math.comb(bad, degree), math.comb(members, degree))
        if cut >= insecure:
            continue
        tolerated = 0
        while _mass(members, corrupted, degree, tolerated + 1, degree) > insecure / members:
            tolerated += 1
        if semi_malicious:
            tolerated = math.ceil((tolerated + degree - Fraction(5, 4)) / 2)
        threshold = max(tolerated + 1, 2)
        if _mass(members, members - dropped, degree, 0, threshold - 1) <= failure / members:
            return degree, threshold
    return None


def _mass(members: int, marked: int, draws: int, first: int, last: int) -> Fraction:
    ways = sum(
        math.comb(marked, hits) * math.comb(members - marked, draws - hits)
        for hits in range(first, min(last, draws) + 1)
    )
    return Fraction(ways, math.comb(members, draws))
