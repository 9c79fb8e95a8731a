"""Asks a device's models about its test examples, through the public SDK, at the moments that count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evensong.client.callbacks import Event, ModelServed

Answers = list[int]  #: a class number for each test example


@dataclass(frozen=True)
class Account:
    """What a device's models answered to its test examples, and what its line carried in all its life."""

    federated: Answers
    personalised: Answers
    bytes_up: int
    bytes_down: int


class Witness:
    """A device callback: asks each version when it is first served, before the device has personalised it."""

    def __init__(self, predict: Callable[[], npt.NDArray[np.generic]]) -> None:
        self._predict = predict
        self.answers: dict[int, Answers] = {}  #: by version

    def __call__(self, event: Event) -> None:
        if isinstance(event, ModelServed):
            self.answers[event.version] = self.ask()

    def ask(self) -> Answers:
        """What the served model answers now."""
        return classes_of(self._predict())


def classes_of(scores: npt.NDArray[np.generic]) -> Answers:
    """The class with the highest score in each row of ``scores`` ``[n, classes]``."""
    return [int(label) for label in scores.argmax(axis=1)]
