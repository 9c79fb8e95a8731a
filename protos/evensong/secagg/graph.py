"""Who is whose neighbour: a ring in an order that nobody chooses, and the members next to each other on it.

Members in the order of HMAC-SHA256(R, id) form a ring; the neighbours of a member are the ``degree / 2`` before and
behind it (a Harary graph: Bell et al. 2020, section 3). With ``degree = members - 1`` everyone is everyone's neighbour.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt


class Graph:
    """Of the members with these ids, who are known by their place in that sequence."""

    def __init__(self, roster_hash: bytes, ids: Sequence[bytes], degree: int) -> None:
        self.members = len(ids)
        self.degree = degree
        self._complete = degree == self.members - 1
        self._known: dict[int, tuple[int, ...]] = {}
        tags = [hmac.digest(roster_hash, identifier, "sha256") for identifier in ids]
        self.ring = sorted(range(self.members), key=tags.__getitem__)  #: places in the order of the ring
        self._turn = [0] * self.members  # where on the ring a place is
        for turn, place in enumerate(self.ring):
            self._turn[place] = turn

    def neighbours(self, place: int) -> tuple[int, ...]:
        """The places of its ``degree`` neighbours, ascending."""
        known = self._known.get(place)
        if known is None:
            if self._complete:
                known = (*range(place), *range(place + 1, self.members))
            else:
                turn, half = self._turn[place], self.degree // 2
                steps = (*range(-half, 0), *range(1, half + 1))
                known = tuple(sorted(self.ring[(turn + step) % self.members] for step in steps))
            self._known[place] = known
        return known

    @cached_property
    def table(self) -> npt.NDArray[np.int32]:
        """Shape (members, degree): the neighbours of all."""
        return np.array([self.neighbours(place) for place in range(self.members)], np.int32)
