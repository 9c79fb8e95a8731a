"""Each combination that would break the promise is refused, with its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tiny_device import make_artifact, make_bundle

from evensong.coordinator.bundle import TaskError, check_bundle
from evensong.v1 import task_pb2

ARTIFACT, LAYOUT = make_artifact({"weight": (30, 40), "bias": (30,)})
CENTRAL = task_pb2.PRIVACY_MECHANISM_CENTRAL_GAUSSIAN
BANDED = task_pb2.PRIVACY_MECHANISM_BANDED_MATRIX
DISTRIBUTED = (
    task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN,
    task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_SKELLAM,
)
SECURE = task_pb2.SecurePlan(corrupted_share=0.05, dropout_share=0.1, min_survivors=30, max_cohort=60, stage_ms=1_000)


def bundle(
    mechanism: task_pb2.PrivacyMechanism = CENTRAL, secure: task_pb2.SecurePlan | None = None, **plan: float
) -> task_pb2.TaskBundle:
    values = {"epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 1.0, "sampling": task_pb2.SAMPLING_NONE} | plan
    return make_bundle(
        ARTIFACT,
        LAYOUT,
        goal=40,
        minimum=30,
        strategy="fedavg",
        weighting=task_pb2.WEIGHTING_UNIFORM,
        max_weight=1.0,
        secure=secure,
        privacy=task_pb2.PrivacyPlan(mechanism=mechanism, **values),  # type: ignore[arg-type]
    )


ADAPTIVE = task_pb2.AdaptiveClipping(initial=1.0, quantile=0.5, rate=0.2)


def adaptive(made: task_pb2.TaskBundle) -> None:
    made.update.clip_norm = 0
    made.update.adaptive_clipping.CopyFrom(ADAPTIVE)


@pytest.mark.parametrize(
    "made",
    [
        bundle(),
        bundle(sampling=task_pb2.SAMPLING_POISSON, population=50_000),
        bundle(BANDED, min_separation=8, bands=8, max_participations=3),
        *(bundle(mechanism, SECURE) for mechanism in DISTRIBUTED),
        bundle(secure=SECURE),
    ],
    ids=["central", "sampled", "banded", "discrete", "skellam", "central in a secure sum"],
)
def test_what_keeps_its_promise_is_accepted(made: task_pb2.TaskBundle) -> None:
    check_bundle(made)


def test_adaptive_clipping_is_accepted_where_its_count_is_noised() -> None:
    made = bundle()
    adaptive(made)
    check_bundle(made)


def no_clipping(made: task_pb2.TaskBundle) -> None:
    made.update.clip_norm = 0


def weights(made: task_pb2.TaskBundle) -> None:
    made.update.weighting, made.update.max_weight = task_pb2.WEIGHTING_EXAMPLES, 100.0


def unbounded_adaptive(made: task_pb2.TaskBundle) -> None:
    adaptive(made)
    made.update.adaptive_clipping.initial = 0


def small_goal(made: task_pb2.TaskBundle) -> None:
    adaptive(made)
    made.round.goal_reports = made.round.min_reports = 10


REFUSED: list[tuple[str, task_pb2.TaskBundle, Callable[[task_pb2.TaskBundle], None] | None, str]] = [
    ("noise without clipping", bundle(), no_clipping, "noise without clipping hides nothing"),
    ("weights by examples", bundle(), weights, "every update weighs the same"),
    ("adaptive clipping without bounds", bundle(), unbounded_adaptive, "adaptive_clipping.initial is out of range"),
    ("adaptive clipping with a small goal", bundle(), small_goal, "goal is too small for adaptive clipping"),
    ("adaptive banded", bundle(BANDED, min_separation=2, bands=2), adaptive, "adaptive clipping goes with central"),
    ("adaptive distributed", bundle(DISTRIBUTED[0], SECURE), adaptive, "adaptive clipping goes with central"),
    ("devices' noise in the clear", bundle(DISTRIBUTED[0]), None, "needs a secure sum"),
    ("Skellam in the clear", bundle(DISTRIBUTED[1]), None, "needs a secure sum"),
    ("a grid too coarse", bundle(DISTRIBUTED[0], SECURE, noise_multiplier=0.01), None, "too coarse"),
    ("sampled distributed", bundle(DISTRIBUTED[0], SECURE, sampling=2, population=500), None, "amplifies central"),
    (
        "sampled banded",
        bundle(BANDED, sampling=2, population=500, min_separation=2, bands=2),
        None,
        "amplifies central",
    ),
    ("sampling of nobody", bundle(sampling=2), None, "from a larger population"),
    ("sampling of all", bundle(sampling=2, population=40), None, "from a larger population"),
    ("sampling with limits", bundle(sampling=2, population=400, min_separation=3), None, "another sampling"),
    ("sampled secure cohort", bundle(secure=SECURE, sampling=2, population=400), None, "draw the whole population"),
    ("sampling unknown", bundle(sampling=0), None, "privacy.sampling is unknown"),
    ("mechanism unknown", bundle(task_pb2.PRIVACY_MECHANISM_UNSPECIFIED), None, "privacy.mechanism is unknown"),
    ("more bands than separation", bundle(BANDED, min_separation=3, bands=4), None, "noise is still being taken back"),
    ("no bands", bundle(BANDED, min_separation=3), None, "bands is out of range"),
    ("bands without the mechanism", bundle(bands=2, min_separation=3), None, "only the banded mechanism"),
    ("epsilon 0", bundle(epsilon=0), None, "epsilon is out of range"),
    ("epsilon that promises nothing", bundle(epsilon=1e3), None, "epsilon is out of range"),
    ("epsilon NaN", bundle(epsilon=float("nan")), None, "epsilon is out of range"),
    ("delta 0", bundle(delta=0), None, "delta is out of range"),
    ("delta of one device of the goal", bundle(delta=1 / 40), None, "revealing one device in full"),
    ("delta of one of the population", bundle(delta=1e-3, sampling=2, population=1_000), None, "revealing one device"),
    ("no noise", bundle(noise_multiplier=0), None, "noise_multiplier is out of range"),
    ("noise NaN", bundle(noise_multiplier=float("nan")), None, "noise_multiplier is out of range"),
]


@pytest.mark.parametrize(
    ("made", "change", "reason"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_is_refused(
    made: task_pb2.TaskBundle, change: Callable[[task_pb2.TaskBundle], None] | None, reason: str
) -> None:
    if change is not None:
        change(made)
    with pytest.raises(TaskError, match=reason):
        check_bundle(made)
