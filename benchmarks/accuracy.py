"""What compression, secrecy and noise cost in accuracy, on real data and three paired seeds.

Under one seed all variants of a setting share the split, the initial weights, the cohorts and the batch orders; what
counts is the difference to the reference of the same seed, since splits differ by more than any encoder does. An
accuracy is the mean over the last ten versions, in percent; differences are in points, and below zero the variant is
worse. ``nudged`` is the reference again from initial weights that are off by a millionth: its differences are what
chance alone makes of a run.

- ``har``: 21 people, all in every round, and 9 who never take part (``new``); accuracies are means over people.
- ``fashion``: 100 devices with Dirichlet(0.3) labels and 39 to 1,800 examples each, 10 a round; judged on the 10,000
  official test pictures.
- ``private200``: 6,000 devices with 10 pictures each, 200 a round, each in two of 60 rounds; epsilon 8 and delta 1e-5
  for whole devices. Central noise is added to float32 updates; distributed noise inside secure sums of 6 bits, as much
  as a sum of three quarters of the cohort needs of which 5 % add none: what the task's defaults promise. Nothing is
  amplified by sampling.
- ``private50``: 50 a round, each in one of 120 rounds.

Runs are those of :mod:`benchmarks.federated`. Needs EVENSONG_DATA, and ``pip install "evensong[bench]"``.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.federated import Draw, Outcome, Population, federate, random
from benchmarks.harness import Row, wanted
from evensong.coordinator import LocalTraining, Privacy, SecureAggregation, Task
from evensong.coordinator.task import AdaptiveClipping
from evensong.mobile_runtime import load
from evensong.mobile_runtime.session import Session
from evensong.simulations.data import Dataset, Indices, load_dataset
from evensong.simulations.demo.scenarios import scenario_named
from evensong.simulations.fleet import Examples, Shard, make_fleet
from evensong.simulations.partition import divide_by, label_skew
from evensong.wire.codecs import UpdateCodec
from evensong.wire.rotated import RotatedCodec

SEEDS = (0, 1, 2)
PROCESSES = 2
NUDGE = 1e-6


@dataclass(frozen=True)
class Variant:
    """One way to carry updates: what it changes of the setting's task. ``reference`` is what it is compared with, and
    ``target`` the least difference in points. ``max_weight`` becomes the examples of the largest device."""

    changes: Mapping[str, Any]
    reference: str | None = None
    target: float | None = None
    by_examples: bool = False
    nudge: float = 0.0
    int8: str = ""  #: "training": devices train in int8; "judged": every judged version is quantised first


@dataclass(frozen=True)
class Setting:
    """A task for a population that a seed makes."""

    scenario: str
    population: Callable[[int], Population]
    task: Mapping[str, Any]
    variants: Mapping[str, Variant]
    judges: Sequence[str]


def run(only: str) -> Iterator[Row]:
    """Rows ``accuracy/SETTING/VARIANT`` (``*/new``: on people who took no part), ``*/difference``, ``*/bytes``."""
    jobs = [
        (setting, variant, seed)
        for setting, variants in ((name, _wanted_variants(name, only)) for name in SETTINGS)
        for seed in SEEDS
        for variant in variants
    ]
    outcomes: dict[tuple[str, str, int], Outcome] = {}
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes to come: one core each
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context) as pool:
        futures = {pool.submit(_run_job, *job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            outcomes[job] = future.result()
            _tell(job, outcomes[job], len(outcomes), len(jobs))
    for name, setting in SETTINGS.items():
        ran = [variant for variant in setting.variants if (name, variant, SEEDS[0]) in outcomes]
        for variant in ran:
            yield from (row for row in _rows(name, variant, outcomes) if wanted(row.name, only))
        for judge in setting.judges if ran else ():
            print(f"\n{name}, {judge}:\n\n{_table(name, judge, ran, outcomes)}\n")


def _wanted_variants(name: str, only: str) -> list[str]:
    """In order; with every variant its reference."""
    setting = SETTINGS[name]
    asked: set[str] = set()
    for variant in setting.variants:
        if any(wanted(row, only) for row in _row_names(name, variant)):
            reference: str | None = variant
            while reference is not None:
                asked.add(reference)
                reference = setting.variants[reference].reference
    return [variant for variant in setting.variants if variant in asked]


# ----------------------------------------------------------------------------------------------------------------- runs


def _run_job(name: str, variant_name: str, seed: int) -> Outcome:
    setting = SETTINGS[name]
    variant, population = setting.variants[variant_name], _population(name, seed)
    scenario = scenario_named(setting.scenario)
    changes = dict(variant.changes)
    if variant.by_examples:
        changes |= {"weighting": "examples", "max_weight": max(map(len, population.devices))}
    initial = _initial(scenario.model, seed, variant.nudge)
    artifact = scenario.artifact()
    if variant.int8 == "training":
        artifact = _quantized(scenario.model, initial, population, training=True)
    task = Task(name, artifact, **{**setting.task, **changes})
    judge = None
    if variant.int8 == "judged":

        def judge(parameters: Mapping[str, Any]) -> Session:
            return load(_quantized(scenario.model, parameters, population, training=False))

    return federate(task, population, initial, seed, judge)


def _quantized(model: str, parameters: Mapping[str, Any], population: Population, *, training: bool) -> Any:
    """The model with these parameters, in int8, calibrated on some examples of the first devices."""
    import torch

    from evensong.mobile_runtime import Int8Training, PostTrainingInt8, compile
    from evensong.mobile_runtime.compiler import zoo

    made = getattr(zoo, model)(0)
    made.load_state_dict({name: torch.from_numpy(np.array(parameters[name])) for name in made.state_dict()})
    examples = np.concatenate([device.inputs[:64] for device in population.devices[:4]]).astype(np.float32)
    if training:
        return compile(made, examples, quantize=Int8Training(examples), batch_size=32, predict_batch=32)
    return compile(made, examples, trainable="none", quantize=PostTrainingInt8(examples), predict_batch=32)


@lru_cache(maxsize=1)
def _population(name: str, seed: int) -> Population:
    return SETTINGS[name].population(seed)


def _initial(model: str, seed: int, nudge: float) -> dict[str, Any]:
    from evensong.mobile_runtime.compiler import zoo

    state = getattr(zoo, model)(seed).state_dict()
    return {key: value.numpy() * np.float32(1 + nudge) for key, value in state.items()}


def _people(seed: int) -> Population:
    fleet = make_fleet(load_dataset("har"), HAR_PEOPLE, seed=seed)
    return Population(
        [shard.train for shard in fleet.participants],
        [np.arange(HAR_PEOPLE)] * HAR_ROUNDS,
        {"people": [shard.test for shard in fleet.participants], "new": [_all(shard) for shard in fleet.newcomers]},
    )


def _all(shard: Shard) -> Examples:
    inputs = np.concatenate([shard.train.inputs, shard.test.inputs])
    return Examples(inputs, np.concatenate([shard.train.labels, shard.test.labels]))


def _dirichlet(seed: int) -> Population:
    labels = _fashion().labels[:FASHION_TRAIN]
    parts = divide_by("dirichlet:0.3")(labels, FASHION_DEVICES, np.random.default_rng(seed))
    cohorts = [
        random(seed, Draw.COHORT, number).choice(FASHION_DEVICES, FASHION_GOAL, replace=False)
        for number in range(FASHION_ROUNDS)
    ]
    return _of_fashion(parts, cohorts)


def _many_small(goal: int, rounds: int, seed: int) -> Population:
    """Every device in every so manieth round."""
    labels = _fashion().labels[:FASHION_TRAIN]
    parts = label_skew(PRIVATE_SKEW)(labels, PRIVATE_DEVICES, np.random.default_rng(seed))
    order = random(seed, Draw.COHORT).permutation(PRIVATE_DEVICES).reshape(-1, goal)
    return _of_fashion(parts, [order[number % len(order)] for number in range(rounds)])


def _of_fashion(parts: Sequence[Indices], cohorts: Sequence[Indices]) -> Population:
    data = _fashion()
    test = Examples(data.inputs[FASHION_TRAIN:], data.labels[FASHION_TRAIN:])
    devices = [Examples(data.inputs[part], data.labels[part]) for part in parts]
    return Population(devices, cohorts, {"test": [test]})


@cache
def _fashion() -> Dataset:
    return load_dataset("fashion")


# ------------------------------------------------------------------------------------------------------------- settings

HAR_PEOPLE, HAR_ROUNDS = 21, 40
FASHION_TRAIN, FASHION_DEVICES, FASHION_GOAL, FASHION_ROUNDS = 60_000, 100, 10, 70
PRIVATE_DEVICES, PRIVATE_SKEW, PRIVATE_BITS = 6_000, 1.0, 6

FLOAT32 = {"secure": None, "update": UpdateCodec(None)}
_UNIFORM = {**FLOAT32, "weighting": "uniform"}
_ONE_BIT = {"secure": None, "update": RotatedCodec(1)}
_FOUR_BITS = {"secure": SecureAggregation(bits=4)}

#: Secure sums weigh alike unless asked; what is not secret weighs by examples.
COMPRESSED = {
    "float32": Variant(_UNIFORM),
    "nudged": Variant(_UNIFORM, "float32", nudge=NUDGE),
    "clipped": Variant({**_UNIFORM, "clip_norm": AdaptiveClipping()}, "float32"),
    "secure8": Variant({}, "float32", -0.3),
    "secure4": Variant(_FOUR_BITS, "float32", -0.3),
    "int8_training": Variant(_UNIFORM, "float32", -1.0, int8="training"),
    "int8_judged": Variant(_UNIFORM, "float32", -0.5, int8="judged"),
    "float32_by_examples": Variant(FLOAT32, by_examples=True),
    "secure8_by_examples": Variant({}, "float32_by_examples", -0.3, by_examples=True),
    "secure4_by_examples": Variant(_FOUR_BITS, "float32_by_examples", -0.3, by_examples=True),
    "rotated1_by_examples": Variant(_ONE_BIT, "float32_by_examples", -1.0, by_examples=True),
}


def _private(goal: int, rounds: int) -> Setting:
    def noise(mechanism: Any) -> Privacy:
        return Privacy(8.0, 1e-5, mechanism, max_participations=rounds * goal // PRIVATE_DEVICES)

    secure = {"secure": SecureAggregation(bits=PRIVATE_BITS)}
    return Setting(
        "fashion",
        partial(_many_small, goal, rounds),
        {
            "rounds": rounds,
            "goal": goal,
            "over_selection": 1.0,
            "local": LocalTraining(learning_rate=0.04, batch_size=2),
            "clip_norm": 0.4,
            "weighting": "uniform",
        },
        {
            "no_noise": Variant(FLOAT32),
            "central": Variant({**FLOAT32, "privacy": noise("gaussian")}, "no_noise"),
            "gaussian": Variant({**secure, "privacy": noise("distributed-gaussian")}, "central", -0.5),
            "skellam": Variant({**secure, "privacy": noise("distributed-skellam")}, "central", -0.5),
        },
        ("test",),
    )


SETTINGS = {
    "har": Setting(
        "har",
        _people,
        {
            "rounds": HAR_ROUNDS,
            "goal": HAR_PEOPLE,
            "over_selection": 1.0,
            "local": LocalTraining(learning_rate=0.1, final_learning_rate=0.03, batch_size=32),
        },
        COMPRESSED,
        ("people", "new"),
    ),
    "fashion": Setting(
        "fashion",
        _dirichlet,
        {"rounds": FASHION_ROUNDS, "goal": FASHION_GOAL, "local": LocalTraining(learning_rate=0.05, batch_size=20)},
        COMPRESSED,
        ("test",),
    ),
    "private200": _private(goal=200, rounds=60),
    "private50": _private(goal=50, rounds=120),
}


# -------------------------------------------------------------------------------------------------------------- reports

Outcomes = Mapping[tuple[str, str, int], Outcome]


def _row_names(name: str, variant: str) -> list[str]:
    base = f"accuracy/{name}/{variant}"
    others = [f"{base}/{judge}" for judge in SETTINGS[name].judges[1:]]
    return [row for each in (base, *others) for row in (each, f"{each}/difference")] + [f"{base}/bytes"]


def _rows(name: str, variant: str, outcomes: Outcomes) -> Iterator[Row]:
    """An update's bytes stand beside those of the reference."""
    setting, reference = SETTINGS[name], SETTINGS[name].variants[variant].reference
    for place, judge in enumerate(setting.judges):
        base = f"accuracy/{name}/{variant}" + (f"/{judge}" if place else "")
        yield Row(base, fmean(_accuracies(name, variant, judge, outcomes)), None, "%", "higher")
        if reference is not None:
            difference = fmean(_differences(name, variant, reference, judge, outcomes))
            yield Row(f"{base}/difference", difference, None, "points", "higher")
    sizes = [None if each is None else outcomes[name, each, SEEDS[0]].bytes_up for each in (variant, reference)]
    yield Row(f"accuracy/{name}/{variant}/bytes", sizes[0] or 0, sizes[1], "B", "lower")


def _table(name: str, judge: str, variants: Sequence[str], outcomes: Outcomes) -> str:
    """Per seed and on average: the last ten versions, and of the differences the last version alone."""
    seeds = "/".join(map(str, SEEDS))
    lines = [
        f"| variant | bytes up | %, seeds {seeds} | mean | against | by seed | mean | last version | target |",
        "|---|---:|---|---:|---|---|---:|---:|---:|",
    ]
    for variant_name in variants:
        variant = SETTINGS[name].variants[variant_name]
        accuracies = _accuracies(name, variant_name, judge, outcomes)
        cells = [
            variant_name,
            f"{outcomes[name, variant_name, SEEDS[0]].bytes_up:,}",
            " / ".join(f"{value:.2f}" for value in accuracies),
            f"{fmean(accuracies):.2f}",
        ]
        if variant.reference is None:
            cells += [""] * 5
        else:
            every = _differences(name, variant_name, variant.reference, judge, outcomes)
            last = fmean(_differences(name, variant_name, variant.reference, judge, outcomes, versions=1))
            is_missed = variant.target is not None and fmean(every) < variant.target
            cells += [variant.reference, " / ".join(f"{value:+.2f}" for value in every), f"{fmean(every):+.2f}"]
            cells += [f"{last:+.2f}", _target(variant.target, is_missed)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _target(target: float | None, is_missed: bool) -> str:
    return "" if target is None else f"{target:+.1f}" + (": **missed**" if is_missed else "")


def _accuracies(name: str, variant: str, judge: str, outcomes: Outcomes, versions: int = 0) -> list[float]:
    """Of each seed, over the last so many versions, or all that were judged."""
    return [fmean(outcomes[name, variant, seed].accuracy[judge][-versions:]) for seed in SEEDS]


def _differences(
    name: str, variant: str, reference: str, judge: str, outcomes: Outcomes, versions: int = 0
) -> list[float]:
    pairs = zip(
        _accuracies(name, variant, judge, outcomes, versions),
        _accuracies(name, reference, judge, outcomes, versions),
        strict=True,
    )
    return [ours - theirs for ours, theirs in pairs]


def _tell(job: tuple[str, str, int], outcome: Outcome, done: int, jobs: int) -> None:
    name, variant, seed = job
    figures = ", ".join(f"{judge} {fmean(values):.2f} %" for judge, values in outcome.accuracy.items())
    extra = f", clip norm {outcome.clip_norm:.3g}, {outcome.clipped:.0%} clipped" if 0 < outcome.clipped < 1 else ""
    extra += f", noise multiplier {outcome.noise_multiplier:.3f}" if outcome.noise_multiplier else ""
    print(f"[{done}/{jobs}] {name} seed {seed} {variant}: {figures}{extra}", flush=True)
