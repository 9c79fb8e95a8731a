"""One run of federated averaging (McMahan et al. 2017), with everything that changes an update as the product does it.

Devices train with the engine (:func:`evensong.client.train.train`) and encode with the task's encoder; the coordinator
adds, decodes, noises and adapts the clip norm (:func:`evensong.coordinator.privacy.mechanism.release`). What does not
change a number is left out: the network, and the masks of a secure sum. They cancel exactly in the sum modulo 2^64, as
``tests/secagg`` proves; here the lanes are added without them.

Every random choice has a generator of its own, from the seed, the round and the device. So two tasks under one seed
share batch orders, cohorts and initial weights, whatever else they draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from evensong.client import ArrayExamples, Batch
from evensong.client.train import LocalUpdate, learning_rate_of, train
from evensong.coordinator import Task
from evensong.coordinator.aggregate import Accumulator
from evensong.coordinator.privacy.keys import NoiseKey
from evensong.coordinator.privacy.mechanism import Total, release
from evensong.mobile_runtime import load
from evensong.mobile_runtime.session import Session
from evensong.secagg.noise import DISTRIBUTED, Keystream, local_noise
from evensong.secagg.vector import VectorPlan, conditional_norm_bound
from evensong.simulations.fleet import Examples
from evensong.v1 import common_pb2, device_pb2, task_pb2
from evensong.wire.codec import codec_from_plan
from evensong.wire.codecs import clip_to_norm
from evensong.wire.rotation import rotation_seed
from evensong.wire.tensors import FloatArray, split_tensors

JUDGED = 10  # versions at the end that are judged: one alone swings from round to round
_MOST_STEPS = 10_000

Parameters = Mapping[str, FloatArray]


class Draw(IntEnum):
    """What a generator is for."""

    COHORT, ORDER, WORDS, NOISE, KEY = range(5)


@dataclass(frozen=True)
class Population:
    """``devices``: what each trains on. ``cohorts``: who takes part, for each round. ``judges``: test sets by name; an
    accuracy is the mean over a name's sets."""

    devices: Sequence[Examples]
    cohorts: Sequence[npt.NDArray[np.int64]]
    judges: Mapping[str, Sequence[Examples]]


@dataclass(frozen=True)
class Outcome:
    """``accuracy``: in percent, of each of the last :data:`JUDGED` versions, by judge. ``bytes_up``: of an update."""

    accuracy: dict[str, list[float]]
    bytes_up: int
    noise_multiplier: float  #: 0 without noise
    clipped: float  #: share of updates over the clip norm; 1 where devices do not tell
    clip_norm: float  #: after the last round; 0 without clipping


def federate(
    task: Task,
    population: Population,
    initial: Parameters,
    seed: int,
    judge: Callable[[Parameters], Session] | None = None,
) -> Outcome:
    """All rounds of ``task`` from ``initial``. The server step is FedAvg's: the version plus the mean update.

    ``judge`` makes the session that a version is judged with; by default it is the one that trains.
    """
    bundle, parameters = task.to_bundle(), {**task.initial_parameters(), **initial}
    clip_norm = bundle.update.adaptive_clipping.initial or bundle.update.clip_norm
    encoder = (_SecureSum if task.secure else _PlainSum)(task, bundle)
    key = NoiseKey(random(seed, Draw.KEY).bytes(32))
    accuracy: dict[str, list[float]] = {judge: [] for judge in population.judges}
    devices = within = 0
    with load(task.artifact_bytes) as session:
        for number in range(1, task.rounds + 1):
            learning_rate = learning_rate_of(bundle.local, number, task.rounds)
            encoder.start(number, clip_norm)
            for device in population.cohorts[number - 1]:
                draws = partial(random, seed, round=number, device=device)
                examples = population.devices[device]
                update = _train(session, bundle, parameters, examples, learning_rate, draws(Draw.ORDER))
                encoder.add(update, draws)
            total = encoder.total()
            released = release(bundle, total, clip_norm=clip_norm, key=key, task_id="accuracy", round=number)
            clip_norm = released.clip_norm or clip_norm
            devices, within = devices + total.devices, within + total.within
            mean = split_tensors(released.mean, task.layout)
            parameters = {name: (value + mean[name]).astype(np.float32) for name, value in parameters.items()}
            if number > task.rounds - JUDGED:
                session.set(parameters)
                judged = session if judge is None else judge(parameters)
                for name, sets in population.judges.items():
                    accuracy[name].append(_accuracy(judged, sets))
    is_clipped = clip_norm > 0
    return Outcome(
        accuracy,
        encoder.bytes_up,
        bundle.privacy.noise_multiplier,
        1 - within / devices if is_clipped else 0.0,
        clip_norm,
    )


def random(seed: int, draw: Draw, round: int = 0, device: int = 0) -> np.random.Generator:
    """The generator of one purpose: independent of all others, and of what they were used for."""
    return np.random.default_rng([seed, draw, round, device])


def _train(
    session: Session,
    bundle: task_pb2.TaskBundle,
    parameters: Parameters,
    examples: Examples,
    learning_rate: float,
    order: np.random.Generator,
) -> LocalUpdate:
    session.set(parameters)
    return train(
        session,
        bundle.local,
        reference=parameters,
        personal=(),
        examples=ArrayExamples(Batch((examples.inputs,), examples.labels)),
        learning_rate=learning_rate,
        order=order,
        most_steps=_MOST_STEPS,
        between_steps=lambda: None,
        on_step=lambda step, steps, result: None,
    )


def _accuracy(session: Session, sets: Sequence[Examples]) -> float:
    return float(np.mean([100 * session.evaluate(each.inputs, each.labels).accuracy for each in sets]))


# ------------------------------------------------------------------------------------------------------------- encoders


class _PlainSum:
    """Updates that the coordinator sees one by one."""

    def __init__(self, task: Task, bundle: task_pb2.TaskBundle) -> None:
        self._bundle, self._layout, self._codec = bundle, task.layout, codec_from_plan(bundle.update)
        self.bytes_up = self._codec.encoded_bytes(self._layout)

    def start(self, number: int, clip_norm: float) -> None:
        bound = clip_norm if self._bundle.HasField("privacy") else 0.0
        self._clip_norm, self._within = clip_norm, 0
        self._sum = Accumulator(self._layout, self._codec, clip_norm=bound)

    def add(self, update: LocalUpdate, draws: partial[np.random.Generator]) -> None:
        delta, norm = clip_to_norm(update.delta, self._clip_norm)
        self._within += norm <= self._clip_norm
        data = self._codec.encode(delta, self._layout, draws(Draw.WORDS))
        self._sum.add(data, _weight(self._bundle, update))

    def total(self) -> Total:
        return Total(self._sum.total(), self._sum.total_weight, self._sum.count, self._within)


class _SecureSum:
    """The vectors of a secure sum, without their masks."""

    def __init__(self, task: Task, bundle: task_pb2.TaskBundle) -> None:
        self._bundle, self._layout = bundle, task.layout
        self._vector = VectorPlan.from_bundle(bundle, device_pb2.WORK_TRAIN)
        self.bytes_up = self._vector.nbytes

    def start(self, number: int, clip_norm: float) -> None:
        digest = sha256(self._bundle.SerializeToString(deterministic=True)).digest()
        self._seed = rotation_seed(digest, device_pb2.WORK_TRAIN, number)
        self._clip_norm, self._devices = clip_norm, 0
        self._lanes = np.zeros(self._vector.fields.lanes, np.uint64)

    def add(self, update: LocalUpdate, draws: partial[np.random.Generator]) -> None:
        words, step = draws(Draw.WORDS), self._vector.step(self._clip_norm)
        training, noise, norm_bound = update.training, None, None
        if self._bundle.privacy.mechanism in DISTRIBUTED:
            keystream = Keystream(draws(Draw.NOISE).bytes(32))
            noise = partial(local_noise, self._bundle, self._clip_norm, step, keystream=keystream)
            norm_bound = conditional_norm_bound(self._clip_norm, step, self._vector.size)
        metrics = common_pb2.Metrics(examples=training.examples, correct=training.correct, loss_sum=training.loss_sum)
        lanes, _ = self._vector.encode(
            np.concatenate([np.asarray(update.delta[spec.name], np.float32).reshape(-1) for spec in self._layout]),
            clip_norm=self._clip_norm,
            seed=self._seed,
            weight=_weight(self._bundle, update),
            metrics=None if self._vector.private else metrics,
            words=lambda count: words.integers(0, 1 << 32, count, dtype=np.uint32),
            noise=noise,
            norm_bound=norm_bound,
        )
        self._lanes += lanes
        self._devices += 1

    def total(self) -> Total:
        summed = self._vector.decode(self._lanes, self._devices, clip_norm=self._clip_norm, seed=self._seed)
        return Total(summed.update, summed.total_weight, summed.devices, summed.within)


def _weight(bundle: task_pb2.TaskBundle, update: LocalUpdate) -> float:
    if bundle.update.weighting == task_pb2.WEIGHTING_UNIFORM:
        return 1.0
    return min(float(update.training.distinct), bundle.update.max_weight)
