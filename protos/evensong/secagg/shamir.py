"""Secrets in shares (Shamir 1979) over the integers modulo p = 2^256 + 297, the least prime above every 32-byte secret.

Holder x (from 1) of a secret holds the value at x of a polynomial of degree ``threshold - 1`` whose value at 0 is the
secret. Python's own integers are faster than NumPy at this size. Wrong shares among more than the threshold are found
by decoding a Reed-Solomon code (Gao 2003, *A New Algorithm for Decoding Reed-Solomon Codes*).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

from evensong.secagg.errors import ProtocolError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
#: In place of a share that could not be decrypted.
NO_SHARE = b"\xff" * SHARE_BYTES

_DRAWN_BYTES = 48  # a coefficient: its remainder is uniform but for 2^-127
_LAZY_STEPS = 24  # of Horner's rule between two reductions: the number stays below 1,024 bits for 30-bit holders


# --------------------------------------------------------------------------------------------------------- sharing


def split(secret: bytes, threshold: int, holders: Iterable[int], draw: Callable[[int], bytes]) -> list[int]:
    """The share of each of ``holders`` (numbers from 1 on): any ``threshold`` of them give the 32-byte secret back,
    fewer tell nothing. ``draw(n)`` gives n random bytes."""
    drawn = draw(_DRAWN_BYTES * (threshold - 1))
    coefficients = [
        int.from_bytes(drawn[start : start + _DRAWN_BYTES], "little") % PRIME
        for start in range(0, len(drawn), _DRAWN_BYTES)
    ]
    coefficients.append(int.from_bytes(secret, "little"))
    return [evaluate(coefficients, holder) for holder in holders]


def evaluate(coefficients: Sequence[int], x: int) -> int:
    """The polynomial's value at ``x``, highest coefficient first."""
    value = 0
    for start in range(0, len(coefficients), _LAZY_STEPS):
        for coefficient in coefficients[start : start + _LAZY_STEPS]:
            value = value * x + coefficient
        value %= PRIME
    return value


def encode_share(share: int) -> bytes:
    """33 bytes."""
    return share.to_bytes(SHARE_BYTES, "little")


def decode_share(data: bytes) -> int:
    """:class:`ProtocolError` for a value of p or more, or another length."""
    share = int.from_bytes(data, "little")
    if len(data) != SHARE_BYTES or share >= PRIME:
        raise ProtocolError("a share is out of range", expected=f"{SHARE_BYTES} bytes, below 2^256 + 297")
    return share


# ---------------------------------------------------------------------------------------------------- reconstruction


def reconstruct(shares: Mapping[int, int]) -> bytes | None:
    """The secret from exactly as many shares (holder to value) as the threshold; None if it has more than 32 bytes, so
    that some share is wrong."""
    return _as_secret(sum(map(int.__mul__, lagrange_at_zero(tuple(shares)), shares.values())) % PRIME)


@lru_cache(maxsize=256)
def lagrange_at_zero(holders: tuple[int, ...]) -> tuple[int, ...]:
    """What the share of each holder is to be multiplied with, so that the sum is the secret."""
    product = math.prod(holders)
    divisors = [math.prod(x - holder for x in holders if x != holder) * holder % PRIME for holder in holders]
    return tuple(product * inverse % PRIME for inverse in _inverses(divisors))


def without_one(shares: Mapping[int, int]) -> Iterator[tuple[int, bytes]]:
    """For threshold + 1 shares: each holder that may have sent a wrong one, with the secret that the others give.

    Let F interpolate all. Without holder j, the others lie on F - d * prod over i != j of (x - x_i), d being F's
    highest coefficient: all candidates cost hardly more than one.
    """
    holders = tuple(shares)
    weights = _inverses([math.prod(holder - x for x in holders if x != holder) % PRIME for holder in holders])
    highest = sum(map(int.__mul__, weights, shares.values())) % PRIME
    at_zero = sum(map(int.__mul__, lagrange_at_zero(holders), shares.values())) % PRIME
    product = math.prod(-holder for holder in holders) * highest
    for holder, inverse in zip(holders, _inverses(holders), strict=True):
        secret = _as_secret((at_zero + product * inverse) % PRIME)
        if secret is not None:
            yield holder, secret


def decode(shares: Mapping[int, int], threshold: int) -> tuple[bytes, list[int]] | None:
    """The secret and the holders whose shares are wrong, if those are at most half of what goes beyond the threshold;
    else None."""
    holders = list(shares)
    everything = [1]  # coefficients here: lowest first
    for holder in holders:
        everything = _times_root(everything, holder)
    interpolant = _interpolate(shares, everything)
    remainder, locator = _half_gcd(everything, interpolant, (len(holders) + threshold + 1) // 2)
    quotient, rest = _divide(remainder, locator)
    if any(rest) or len(quotient) > threshold:
        return None
    secret = _as_secret(quotient[0] if quotient else 0)
    wrong = [holder for holder, value in shares.items() if evaluate(quotient[::-1], holder) != value]
    return None if secret is None or 2 * len(wrong) > len(holders) - threshold else (secret, wrong)


def _as_secret(number: int) -> bytes | None:
    return number.to_bytes(SECRET_BYTES, "little") if number < 1 << 8 * SECRET_BYTES else None


def _inverses(numbers: Sequence[int]) -> list[int]:
    """All at the price of one inversion (Montgomery's trick)."""
    running, products = 1, []
    for number in numbers:
        products.append(running)
        running = running * number % PRIME
    inverse = pow(running, -1, PRIME)
    inverses = []
    for number, product in zip(reversed(numbers), reversed(products), strict=True):
        inverses.append(inverse * product % PRIME)
        inverse = inverse * number % PRIME
    return inverses[::-1]


# ------------------------------------------------------------------------------- polynomials, lowest coefficient first


def _times_root(polynomial: list[int], root: int) -> list[int]:
    """Times (x - root)."""
    shifted, scaled = [0, *polynomial], [*polynomial, 0]
    return [(high - root * low) % PRIME for high, low in zip(shifted, scaled, strict=True)]


def _interpolate(shares: Mapping[int, int], everything: list[int]) -> list[int]:
    """Through all shares; ``everything`` is the product of all (x - holder)."""
    holders = tuple(shares)
    weights = _inverses([math.prod(holder - x for x in holders if x != holder) % PRIME for holder in holders])
    total = [0] * len(holders)
    for holder, weight, value in zip(holders, weights, shares.values(), strict=True):
        scale, carried = weight * value % PRIME, 0
        for power in range(len(holders), 0, -1):  # synthetic division of everything by (x - holder)
            carried = (everything[power] + holder * carried) % PRIME
            total[power - 1] += carried * scale
    return _trim([coefficient % PRIME for coefficient in total])


def _half_gcd(larger: list[int], smaller: list[int], stop: int) -> tuple[list[int], list[int]]:
    """Euclid's algorithm until the remainder has fewer than ``stop`` coefficients' degree: it and its factor of
    ``smaller``."""
    factor, next_factor = [], [1]
    while len(smaller) > stop:
        quotient, rest = _divide(larger, smaller)
        factor, next_factor = next_factor, _minus_product(factor, quotient, next_factor)
        larger, smaller = smaller, rest
    return smaller, next_factor


def _divide(dividend: list[int], divisor: list[int]) -> tuple[list[int], list[int]]:
    rest, inverse = list(dividend), pow(divisor[-1], -1, PRIME)
    quotient = [0] * max(len(dividend) - len(divisor) + 1, 0)
    for shift in range(len(quotient) - 1, -1, -1):
        scale = quotient[shift] = rest[shift + len(divisor) - 1] * inverse % PRIME
        for power, coefficient in enumerate(divisor):
            rest[shift + power] = (rest[shift + power] - scale * coefficient) % PRIME
    return _trim(quotient), _trim(rest[: len(divisor) - 1] if quotient else rest)


def _minus_product(base: list[int], one: list[int], other: list[int]) -> list[int]:
    result = base + [0] * (len(one) + len(other) - 1 - len(base))
    for shift, left in enumerate(one):
        for power, right in enumerate(other):
            result[shift + power] = (result[shift + power] - left * right) % PRIME
    return _trim(result)


def _trim(polynomial: list[int]) -> list[int]:
    while polynomial and not polynomial[-1]:
        polynomial.pop()
    return polynomial
