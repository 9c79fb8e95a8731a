"""What an engineer asks for, as one immutable object. Needs neither flwr nor a database: it is part of the light
handle."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from evensong.coordinator.bundle import STRATEGIES, TaskError, check_bundle, check_server_plan, largest_cohort
from evensong.coordinator.privacy.accounting import Accounting
from evensong.coordinator.privacy.rules import check_privacy
from evensong.v1 import common_pb2, task_pb2
from evensong.wire.artifact import decode_artifact
from evensong.wire.chunks import sha256
from evensong.wire.codecs import UpdateCodec
from evensong.wire.program import Artifact, DType, Program, VariableFlag
from evensong.wire.rotated import RotatedCodec
from evensong.wire.tensors import FloatArray, Layout, encode_tensors, layout_of, layout_to_proto
from evensong.wire.top_k import TopKCodec
from evensong.wire.variables import initial_values

__all__ = [
    "AdaptiveClipping",
    "Compression",
    "LocalTraining",
    "Personalization",
    "Privacy",
    "SecureAggregation",
    "Strategy",
    "Task",
    "TaskError",
    "check_bundle",
    "check_server_plan",
]


_MECHANISMS: dict[str, task_pb2.PrivacyMechanism] = {
    "gaussian": task_pb2.PRIVACY_MECHANISM_CENTRAL_GAUSSIAN,
    "banded": task_pb2.PRIVACY_MECHANISM_BANDED_MATRIX,
    "distributed-gaussian": task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN,
    "distributed-skellam": task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_SKELLAM,
}
_SAMPLINGS: dict[str, task_pb2.Sampling] = {"none": task_pb2.SAMPLING_NONE, "poisson": task_pb2.SAMPLING_POISSON}


class SupportsToBytes(Protocol):
    """A compiled artifact."""

    def to_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class LocalTraining:
    """What a device does with its own examples in a round."""

    epochs: int = 1
    learning_rate: float = 0.1
    final_learning_rate: float | None = None  #: reached linearly in the last round; None keeps ``learning_rate``
    batch_size: int | None = None  #: None takes the artifact's
    max_steps: int | None = None  #: optimiser steps in a round; None: no limit
    min_examples: int = 1  #: a device with fewer is not asked to train
    personal: Sequence[str] = ()  #: patterns (fnmatch) of tensors that stay on the device and never travel


@dataclass(frozen=True)
class Personalization:
    """How a device adapts the committed model to its own examples for ``predict``."""

    epochs: int = 1
    learning_rate: float = 0.1
    trainable: Sequence[str] = ()  #: patterns of the tensors to adapt; empty adapts all trainable ones


@dataclass(frozen=True)
class AdaptiveClipping:
    """A clip norm that follows a quantile of the devices' update norms from round to round (Andrew et al. 2021)."""

    initial: float = 1.0  #: of the first round
    quantile: float | None = None  #: share of devices that shall not be clipped; None: 0.9, under ``privacy`` 0.5
    rate: float | None = None  #: how fast it follows; None: 1.0, under ``privacy``, where counts are noisy, 0.2


@dataclass(frozen=True)
class SecureAggregation:
    """The coordinator learns the sum of a cohort's updates and nothing else of them: ``docs/secagg.md``.

    The protocol's degree, threshold and quorum follow from these assumptions; where they give no security the task is
    refused.
    """

    bits: int = 8  #: of a value, 2 to 16; a parameter takes 1.6 to 4 bytes, by the size of the cohort
    corrupted: float = 0.05  #: share of a cohort that may collude with the coordinator, below 0.5
    dropout: float = 0.2  #: share that may be lost during the protocol (training comes before), below 0.5
    min_survivors: int | None = None  #: a sum of fewer is never revealed; None: the task's ``min_reports``, at least 3
    stage_seconds: float = 30.0  #: how long each of the five stages waits for devices
    #: False: a third of the neighbours in large cohorts, against a coordinator that does not lie about who dropped out
    semi_malicious: bool = True


@dataclass(frozen=True)
class Privacy:
    """What the task promises about any one device: (epsilon, delta)-differential privacy of all its versions together.

    The coordinator stops the task before it overspends: ``docs/privacy.md``. Without ``noise_multiplier`` the noise is
    the least for which ``rounds`` rounds keep the promise; that takes ``pip install "evensong[privacy]"``.
    """

    epsilon: float = 8.0
    delta: float = 1e-5  #: well below one over the number of devices that may take part
    #: "gaussian": the coordinator noises the sum. "banded": with noise that later rounds take back, for devices that
    #: pause ``min_separation`` rounds. "distributed-gaussian" and "distributed-skellam": devices noise the secure sum.
    mechanism: Literal["gaussian", "banded", "distributed-gaussian", "distributed-skellam"] = "gaussian"
    noise_multiplier: float | None = None  #: standard deviation of the noise on the sum, over the clip norm
    #: "none": who takes part is left to availability, and no amplification is claimed. "poisson": the coordinator
    #: draws each device of the population for each round with probability ``goal / population``.
    sampling: Literal["none", "poisson"] = "none"
    population: int | None = None  #: devices that are enrolled at least, for "poisson"
    max_participations: int | None = None  #: rounds that one device takes part in at most
    min_separation: int | None = None  #: a device takes part in every so manieth round at most
    bands: int | None = None  #: rounds over which "banded" noise is correlated; None: ``min_separation``


@dataclass(frozen=True)
class Compression:
    """Fewer bytes, up and down. The defaults cost no accuracy that can be measured: 8 bits a value both ways.

    ``update`` goes without ``secure``, whose sums have their own packing (``SecureAggregation(bits=...)``):
    :class:`UpdateCodec` for stochastic integers, :class:`RotatedCodec` for 1 to 4 bits a value at the least error,
    :class:`TopKCodec` for the largest values only, the rest of them later.
    """

    update: UpdateCodec | RotatedCodec | TopKCodec | None = None  #: None: 8-bit integers
    #: 2 to 8: a device that has the version before fetches the difference, in so many bits a value; None: always all
    download_bits: int | None = 8


@dataclass(frozen=True, init=False)
class Strategy:
    """A server strategy with its arguments: ``Strategy("fedadam", eta=0.01)``. Absent ones take Flower's defaults."""

    name: str
    arguments: Mapping[str, float]

    def __init__(self, name: str, **arguments: float) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "arguments", dict(arguments))


@dataclass(frozen=True, eq=False)
class Task:
    """A federated training task. ``artifact`` is a compiled model: its bytes, its file, or what ``compile`` returned.

    The defaults are FedAvg (McMahan et al., AISTATS 2017) over secure sums of 8-bit updates, clipped adaptively and
    weighted alike, and the round policy of Bonawitz et al., *Towards federated learning at scale* (SysML 2019):
    over-selection by 1.3, and a round that has three quarters of its goal at the deadline counts. What cannot be raises
    :class:`TaskError`, at once and not when a round runs.
    """

    name: str
    artifact: bytes | str | Path | SupportsToBytes = field(repr=False)
    _: KW_ONLY
    population: str = "default"  #: the group of devices that the task is meant for
    rounds: int = 10
    goal: int = 8  #: reports that close a round
    min_reports: int | None = None  #: with fewer the round is abandoned; None: three quarters of ``goal``, rounded up
    over_selection: float = 1.3  #: at most ``goal * over_selection`` devices work at once
    deadline: float = 600.0  #: of a round, in seconds
    evaluate_every: int = 1  #: rounds between evaluations on devices; 0: never
    evaluation_reports: int | None = None  #: reports wanted for an evaluation; None: ``goal``
    local: LocalTraining = field(default_factory=LocalTraining)
    personalization: Personalization | None = None
    secure: SecureAggregation | None = field(default_factory=SecureAggregation)  #: None: each update is seen singly
    compression: Compression | None = None
    update: UpdateCodec | RotatedCodec | TopKCodec | None = None  #: short for ``Compression(update, None)``
    privacy: Privacy | None = None  #: differential privacy for whole devices
    clip_norm: float | AdaptiveClipping | None = None  #: L2 norm of an update; None: adaptive if ``secure``, else none
    #: None: "uniform" if ``secure`` or ``privacy``, else "examples"
    weighting: Literal["examples", "uniform"] | None = None
    #: of one update; None: 10,000, or 1 if uniform. A secure sum resolves weights in parts of it: choose it near the
    #: largest number of examples that a device really has.
    max_weight: float | None = None
    strategy: str | Strategy = "fedavg"

    def __post_init__(self) -> None:
        try:
            bundle = self.to_bundle()
        except TypeError as error:  # protobuf's, for what no type checker saw
            raise TaskError("a field of the task has the wrong type", got=error) from None
        check_bundle(bundle)
        if bundle.server.strategy in STRATEGIES:
            check_server_plan(bundle.server)
        self._check_against_artifact()

    @cached_property
    def artifact_bytes(self) -> bytes:
        """The artifact's file, as devices fetch it."""
        if isinstance(self.artifact, bytes):
            return self.artifact
        if isinstance(self.artifact, str | Path):
            try:
                return Path(self.artifact).read_bytes()
            except OSError as error:
                raise TaskError("the artifact's file cannot be read", got=error) from error
        return self.artifact.to_bytes()

    @cached_property
    def layout(self) -> Layout:
        """The tensors that travel: all but the personal ones."""
        return layout_of(self._decoded.variables, self.local.personal)

    def initial_parameters(self) -> dict[str, FloatArray]:
        """Version 0: the artifact's initial values of the tensors that travel, in the author's shapes."""
        travelling = {spec.name for spec in self.layout}
        return {name: value for name, value in initial_values(self._decoded).items() if name in travelling}

    def encoded_parameters(self) -> bytes:
        """Version 0 as the blob that devices fetch."""
        return encode_tensors(self.initial_parameters(), self.layout)

    def to_bundle(self) -> task_pb2.TaskBundle:
        """The task as it is signed and sent."""
        bundle = self._bundle()
        if self.privacy is not None and self.privacy.noise_multiplier is None:
            bundle.privacy.noise_multiplier = self._least_noise
        return bundle

    @cached_property
    def _least_noise(self) -> float:
        """The noise multiplier for which all rounds of the task keep its promise; may take seconds."""
        bundle = self._bundle()
        check_privacy(bundle, noise_is_open=True)
        return Accounting.of(bundle).noise_for(bundle.privacy.epsilon, bundle.round.rounds)

    def _bundle(self) -> task_pb2.TaskBundle:
        strategy = Strategy(self.strategy) if isinstance(self.strategy, str) else self.strategy
        return task_pb2.TaskBundle(
            name=self.name,
            population=self.population,
            artifact=common_pb2.BlobRef(sha256=sha256(self.artifact_bytes), size_bytes=len(self.artifact_bytes)),
            layout=layout_to_proto(self.layout),
            local=self._local_plan(),
            update=self._update_plan(),
            round=self._round_policy(),
            server=task_pb2.ServerPlan(strategy=strategy.name, arguments=strategy.arguments),
            training_bytes=self._training_bytes(),
            secure=self._secure_plan(),
            privacy=self._privacy_plan(),
        )

    def _local_plan(self) -> task_pb2.LocalPlan:
        local, personalization = self.local, self.personalization
        return task_pb2.LocalPlan(
            epochs=_whole("local.epochs", local.epochs),
            batch_size=_whole("local.batch_size", local.batch_size, least=1),
            learning_rate=local.learning_rate,
            final_learning_rate=_positive("local.final_learning_rate", local.final_learning_rate),
            max_steps=_whole("local.max_steps", local.max_steps, least=1),
            min_examples=_whole("local.min_examples", local.min_examples),
            personal=_patterns("local.personal", local.personal),
            personalization=None if personalization is None else _personalization_plan(personalization),
        )

    def _update_plan(self) -> task_pb2.UpdatePlan:
        weightings = {"examples": task_pb2.WEIGHTING_EXAMPLES, "uniform": task_pb2.WEIGHTING_UNIFORM}
        weighting = self.weighting or ("uniform" if self.secure or self.privacy else "examples")
        if weighting not in weightings:
            raise TaskError("weighting is unknown", expected=" or ".join(weightings), got=self.weighting)
        if self.secure and weighting == "examples" and self.max_weight is None:
            raise TaskError(
                "weights inside a secure sum need a bound",
                expected="max_weight=...",
                fix="Choose it near the largest number of examples that a device has: the sum resolves parts of it.",
            )
        plan = self._codec_plan()
        clip = AdaptiveClipping() if self.secure and self.clip_norm is None else self.clip_norm
        if isinstance(clip, AdaptiveClipping):
            quantile, rate = (0.5, 0.2) if self.privacy else (0.9, 1.0)
            plan.adaptive_clipping.CopyFrom(
                task_pb2.AdaptiveClipping(
                    initial=clip.initial,
                    quantile=quantile if clip.quantile is None else clip.quantile,
                    rate=rate if clip.rate is None else clip.rate,
                )
            )
        else:
            plan.clip_norm = _positive("clip_norm", clip)
        plan.weighting = weightings[weighting]
        plan.max_weight = (1.0 if weighting == "uniform" else 10_000.0) if self.max_weight is None else self.max_weight
        return plan

    def _codec_plan(self) -> task_pb2.UpdatePlan:
        compression = Compression(self.update, None) if self.compression is None else self.compression
        if self.update not in (None, compression.update):
            raise TaskError("update and compression name two codecs", expected="one of them", got=self.update)
        if self.secure and compression.update is not None:
            raise TaskError(
                "a secure sum packs updates itself",
                got=compression.update,
                fix="Say SecureAggregation(bits=...), or secure=None for another codec.",
            )
        if self.secure:
            bits = _whole("secure.bits", self.secure.bits, least=2)
            plan = task_pb2.UpdatePlan(codec=task_pb2.CODEC_FIELDS, bits=bits)
        else:
            plan = (compression.update or UpdateCodec()).to_plan()
        plan.download_bits = _whole("compression.download_bits", compression.download_bits, least=2)
        return plan

    def _secure_plan(self) -> task_pb2.SecurePlan | None:
        secure, policy = self.secure, self._round_policy()
        if secure is None:
            return None
        if not (math.isfinite(secure.stage_seconds) and secure.stage_seconds > 0):
            raise TaskError(
                "secure.stage_seconds is out of range", expected="a number above 0", got=secure.stage_seconds
            )
        survivors = max(3, policy.min_reports) if secure.min_survivors is None else secure.min_survivors
        return task_pb2.SecurePlan(
            corrupted_share=secure.corrupted,
            dropout_share=secure.dropout,
            min_survivors=_whole("secure.min_survivors", survivors),
            max_cohort=max(largest_cohort(policy), (self.privacy and self.privacy.population) or 0),
            stage_ms=max(1, round(secure.stage_seconds * 1000)),
            semi_malicious=secure.semi_malicious,
        )

    def _privacy_plan(self) -> task_pb2.PrivacyPlan | None:
        """The noise is left out where it is to be computed."""
        privacy = self.privacy
        if privacy is None:
            return None
        for name, value, known in (
            ("mechanism", privacy.mechanism, _MECHANISMS),
            ("sampling", privacy.sampling, _SAMPLINGS),
        ):
            if value not in known:
                raise TaskError(f"privacy.{name} is unknown", expected=" or ".join(known), got=value)
        bands = privacy.bands
        if bands is None and privacy.mechanism == "banded":
            bands = privacy.min_separation
        return task_pb2.PrivacyPlan(
            mechanism=_MECHANISMS[privacy.mechanism],
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            noise_multiplier=_positive("privacy.noise_multiplier", privacy.noise_multiplier),
            sampling=_SAMPLINGS[privacy.sampling],
            population=_whole("privacy.population", privacy.population, least=1),
            max_participations=_whole("privacy.max_participations", privacy.max_participations, least=1),
            min_separation=_whole("privacy.min_separation", privacy.min_separation, least=1),
            bands=_whole("privacy.bands", bands, least=1),
        )

    def _round_policy(self) -> task_pb2.RoundPolicy:
        goal = _whole("goal", self.goal, least=1)
        if not (math.isfinite(self.deadline) and self.deadline > 0):
            raise TaskError(
                "deadline is out of range", expected="a finite number of seconds above 0", got=self.deadline
            )
        return task_pb2.RoundPolicy(
            goal_reports=goal,
            min_reports=-(-3 * goal // 4) if self.min_reports is None else _whole("min_reports", self.min_reports),
            over_selection=self.over_selection,
            deadline_ms=max(1, round(self.deadline * 1000)),
            rounds=_whole("rounds", self.rounds),
            evaluate_every=_whole("evaluate_every", self.evaluate_every),
            evaluation_reports=_whole("evaluation_reports", self.evaluation_reports, least=1),
        )

    # ------------------------------------------------------------------------------------------ against the artifact

    @cached_property
    def _decoded(self) -> Artifact:
        return decode_artifact(self.artifact_bytes)

    def _program(self) -> Program:
        try:
            return self._decoded.program("train")
        except KeyError:
            raise TaskError(
                "the artifact cannot be trained: it has no program 'train'",
                got=[program.name for program in self._decoded.programs],
                fix="Compile the model with a loss and at least one trainable tensor.",
            ) from None

    def _training_bytes(self) -> int:
        program = self._program()
        return len(self._decoded.state) + self._decoded.slot_bytes + program.arena_bytes + program.workspace_bytes

    def _check_against_artifact(self) -> None:
        """Patterns that match nothing are typing errors, and a batch larger than the program's cannot run."""
        max_batch = self._program().max_batch
        if self.local.batch_size is not None and self.local.batch_size > max_batch:
            raise TaskError(
                "local.batch_size is larger than the artifact's batch",
                expected=f"at most {max_batch}",
                got=self.local.batch_size,
                fix="Compile the model with example inputs of a larger batch.",
            )
        floats = [v for v in self._decoded.variables if v.value_dtype == DType.F32 and not v.is_scale]
        trainable = [variable.name for variable in floats if variable.flags == VariableFlag.TRAINABLE]
        _require_matches("local.personal", self.local.personal, [variable.name for variable in floats])
        if self.personalization is not None:
            _require_matches("personalization.trainable", self.personalization.trainable, trainable)


def _personalization_plan(personalization: Personalization) -> task_pb2.Personalization:
    return task_pb2.Personalization(
        epochs=_whole("personalization.epochs", personalization.epochs, least=1),
        learning_rate=personalization.learning_rate,
        trainable=_patterns("personalization.trainable", personalization.trainable),
    )


def _whole(name: str, value: int | None, least: int = 0) -> int:
    """A whole number that fits the message's field; None becomes the field's 0."""
    if value is None:
        return 0
    try:
        whole = operator.index(value)
    except TypeError:
        whole = -1
    if not least <= whole < 1 << 32:
        raise TaskError(f"{name} is out of range", expected=f"a whole number of at least {least}", got=value)
    return whole


def _positive(name: str, value: float | None) -> float:
    """None becomes the field's 0."""
    if value is None:
        return 0.0
    if not value > 0:
        raise TaskError(f"{name} is out of range", expected="a number above 0, or None", got=value)
    return value


def _patterns(name: str, patterns: Sequence[str]) -> list[str]:
    if isinstance(patterns, str):
        raise TaskError(
            f"{name} is one text", expected="a sequence of patterns", got=patterns, fix=f"Write [{patterns!r}]."
        )
    return list(patterns)


def _require_matches(name: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(candidate, pattern) for candidate in names):
            raise TaskError(
                f"{name} has a pattern that matches no tensor", expected=f"one of {list(names)}", got=pattern
            )
