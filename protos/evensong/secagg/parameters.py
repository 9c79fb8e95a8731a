"""How many neighbours a member has, how many of them open its secrets, and how many must agree on the survivors.

Both sides compute these numbers from the size of the cohort and the signed plan, so that nobody can propose others.
The rules stand in ``docs/secagg.md``; the conditions on degree and threshold are those of Bell et al. 2020, *Secure
Single-Server Aggregation with (Poly)Logarithmic Overhead*, sections 3 and 4: privacy error 2^-40, failure 2^-20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from evensong.secagg.errors import ParameterError

MIN_MEMBERS = 3
#: Up to here the graph is complete: a sparse one saves little, and both shares of so few round to hardly anyone.
COMPLETE_UP_TO = 32

_LOG_INSECURE = -41 * math.log(2)
_LOG_FAILURE = -20 * math.log(2)

_LogFactorials = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Parameters:
    """Of one cohort."""

    members: int
    degree: int  #: neighbours of each member
    threshold: int  #: shares that open a secret
    quorum: int  #: members that must share, survive and sign
    min_survivors: int  #: of a sum
    corrupted: int  #: members that may collude with the coordinator


@lru_cache(maxsize=1024)
def parameters_for(
    members: int, *, corrupted_share: float, dropout_share: float, min_survivors: int, semi_malicious: bool = False
) -> Parameters:
    """The parameters of a cohort of ``members``; :class:`ParameterError` says why there are none.

    ``corrupted_share`` and ``dropout_share`` lie in [0, 0.5). ``semi_malicious`` asks for thresholds that hold even if
    the coordinator tells devices different stories about who dropped out.
    """
    _check(members, corrupted_share, dropout_share, min_survivors)
    corrupted = math.floor(corrupted_share * members)
    dropped = math.floor(dropout_share * members)
    quorum = (members + corrupted) // 2 + 1
    if members - dropped < quorum:
        raise ParameterError(
            f"a cohort of {members} with {dropped} dropped and {corrupted} corrupted has no quorum",
            expected=f"at least {quorum} members that stay",
            got=members - dropped,
            fix="Lower dropout_share or corrupted_share.",
        )
    degree, threshold = _sparse(members, corrupted, dropped, semi_malicious) or _complete(
        members, corrupted, dropped, semi_malicious
    )
    return Parameters(members, degree, threshold, quorum, min_survivors, corrupted)


def check_shares(corrupted_share: float, dropout_share: float) -> None:
    """:class:`ParameterError` unless both lie in [0, 0.5)."""
    for name, share in (("corrupted_share", corrupted_share), ("dropout_share", dropout_share)):
        if not 0 <= share < 0.5:  # false for NaN as well
            raise ParameterError(f"{name} is out of range", expected="0 to below 0.5", got=share)


def _check(members: int, corrupted_share: float, dropout_share: float, min_survivors: int) -> None:
    check_shares(corrupted_share, dropout_share)
    if min_survivors < MIN_MEMBERS:
        raise ParameterError("min_survivors is too low", expected=f"at least {MIN_MEMBERS}", got=min_survivors)
    if members < max(MIN_MEMBERS, min_survivors):
        raise ParameterError(
            "the cohort is too small", expected=f"at least {max(MIN_MEMBERS, min_survivors)} members", got=members
        )


# -------------------------------------------------------------------------------------------------------- sparse graph


def _sparse(members: int, corrupted: int, dropped: int, semi_malicious: bool) -> tuple[int, int] | None:
    """The least even degree below ``members - 1`` that fits, and its threshold."""
    if members <= COMPLETE_UP_TO:
        return None
    table = _log_factorials(members)
    log_members = math.log(members)
    for degree in range(_least_connected(members, corrupted + dropped, table), members - 1, 2):
        tolerated = _tail_quantile(members, corrupted, degree, _LOG_INSECURE - log_members, table)
        if semi_malicious:
            tolerated = math.ceil((tolerated + degree - 1.25) / 2)
        threshold = max(tolerated + 1, 2)
        if _too_few_stay(members, dropped, degree, threshold, _LOG_FAILURE - log_members, table):
            return degree, threshold
    return None


def _least_connected(members: int, bad: int, table: _LogFactorials) -> int:
    """The least even degree at which the honest members stay connected; what is bounded falls with the degree."""

    def connected(degree: int) -> bool:
        if bad < degree or degree >= members - 1:
            return True
        log_cut = table[bad] + table[members - degree] - table[members] - table[bad - degree]
        return bool(math.log(members) + math.log((members - degree - 1) / 2) + log_cut < _LOG_INSECURE)

    low, high = 0, (members + 1) // 2  # half the degree: not connected at low, connected at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if connected(2 * middle) else (middle, high)
    return 2 * high


def _tail_quantile(members: int, marked: int, draws: int, log_limit: float, table: _LogFactorials) -> int:
    """The least x with Pr[X > x] <= exp(log_limit), X being how many of ``draws`` members are ``marked``."""
    first, masses = _hypergeometric(members, marked, draws, table)
    above = np.cumsum(masses[::-1])[::-1]  # above[i] = Pr[X >= first + i]
    return int(first + np.count_nonzero(above > math.exp(log_limit)) - 1)


def _too_few_stay(
    members: int, dropped: int, degree: int, threshold: int, log_limit: float, table: _LogFactorials
) -> bool:
    """Whether fewer than ``threshold`` of a member's neighbours stay with at most the probability exp(log_limit)."""
    first, masses = _hypergeometric(members, members - dropped, degree, table)
    return bool(masses[: max(threshold - first, 0)].sum() <= math.exp(log_limit))


def _hypergeometric(
    members: int, marked: int, draws: int, table: _LogFactorials
) -> tuple[int, npt.NDArray[np.float64]]:
    """The least possible count of marked ones among the draws, and the probabilities from there on."""
    first, last = max(0, draws + marked - members), min(draws, marked)
    hits = np.arange(first, last + 1)
    log_mass = (
        (table[marked] - table[hits] - table[marked - hits])
        + (table[members - marked] - table[draws - hits] - table[members - marked - draws + hits])
        - (table[members] - table[draws] - table[members - draws])
    )
    return first, np.exp(log_mass)


@lru_cache(maxsize=8)
def _log_factorials(largest: int) -> _LogFactorials:
    return np.array([math.lgamma(number + 1) for number in range(largest + 1)])


# ------------------------------------------------------------------------------------------------------ complete graph


def _complete(members: int, corrupted: int, dropped: int, semi_malicious: bool) -> tuple[int, int]:
    degree = members - 1
    # Two stories need 2t shares; corrupted neighbours tell both, all others one.
    least = max((degree + corrupted) // 2 + 1 if semi_malicious else corrupted + 1, 2)
    holders = members - dropped - 1  # sure to be left
    threshold = min(max(least, 2 * degree // 3 + 1), holders)
    if threshold < least:
        raise ParameterError(
            f"a cohort of {members} with {dropped} dropped and {corrupted} corrupted cannot keep a secret",
            expected=f"at least {least} holders of a secret that stay",
            got=holders,
            fix="Lower dropout_share or corrupted_share, or ask for larger cohorts.",
        )
    return degree, threshold
