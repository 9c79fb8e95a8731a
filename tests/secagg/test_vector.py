"""The vector of a secure sum: exact sums of what devices rounded, no overflow in the largest cohort, bounded errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evensong.secagg import ParameterError, ProtocolError
from evensong.secagg.packing import Fields, width_for
from evensong.secagg.vector import RANGE, VectorPlan, conditional_norm_bound
from evensong.v1 import common_pb2, device_pb2, task_pb2
from evensong.wire import UpdateError
from evensong.wire.rotation import rotate

pytestmark = pytest.mark.secagg

SEED = bytes(range(16))


def random_words(seed: int = 0):
    rng = np.random.default_rng(seed)
    return lambda count: rng.integers(0, 1 << 32, count, dtype=np.uint32)


def constant_words(word: int):
    return lambda count: np.full(count, word, np.uint32)


def metrics(examples: int = 20, correct: int = 15, loss: float = 12.25) -> common_pb2.Metrics:
    return common_pb2.Metrics(examples=examples, correct=correct, loss_sum=loss)


def gaussian(size: int, norm: float = 1.0, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(size)
    return (values * (norm / np.linalg.norm(values))).astype(np.float32)


def encode(plan: VectorPlan, delta: np.ndarray, **changed):
    arguments = {
        "clip_norm": 1.0,
        "seed": SEED,
        "weight": 1,
        "metrics": None if plan.private else metrics(),
        "words": random_words(),
    }
    return plan.encode(delta, **(arguments | changed))


# ------------------------------------------------------------------------------------------------------------- the sum


@given(
    st.integers(0, 70),
    st.sampled_from([2, 3, 5, 8, 16]),
    st.integers(1, 12),
    st.integers(1, 1000),
    st.booleans(),
    st.integers(0, 5),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_a_sum_is_that_of_its_devices(size, bits, devices, max_weight, private, noise_bound, seed):
    plan = VectorPlan(size, bits, devices, max_weight, private, noise_bound)
    rng = np.random.default_rng(seed)
    lanes, expected = np.zeros(plan.fields.lanes, np.uint64), np.zeros(size)
    weights, within, totals = [], 0, common_pb2.Metrics()
    for device in range(devices):
        delta = gaussian(size, rng.uniform(0.1, 2.0), device) if size else np.zeros(0, np.float32)
        weight, own = (
            int(rng.integers(1, max_weight + 1)),
            metrics(int(rng.integers(2**32)), 1, rng.integers(9999) / 4096),
        )
        noise = rng.integers(-noise_bound, noise_bound + 1, size)
        added, norm = encode(
            plan,
            delta,
            weight=weight,
            metrics=None if private else own,
            words=random_words(device),
            noise=lambda count, noise=noise: noise,
        )
        lanes += added
        weights.append(weight)
        within += norm <= 1.0 and not noise_bound
        totals.examples += own.examples
        totals.correct += own.correct
        totals.loss_sum += own.loss_sum
        alone = plan.decode(added, 1, clip_norm=1.0, seed=SEED)
        expected += alone.update
        assert alone.total_weight == weight and norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    total = plan.decode(lanes, devices, clip_norm=1.0, seed=SEED)
    np.testing.assert_allclose(total.update, expected, atol=1e-9 * max_weight)
    assert (total.total_weight, total.devices, total.within) == (sum(weights), devices, within)
    assert total.metrics == (None if private else totals)


@pytest.mark.parametrize("bits", RANGE)
def test_the_error_is_below_a_step_and_its_mean_is_none(bits):
    plan = VectorPlan(size=1500, bits=bits, max_cohort=4)
    delta = gaussian(1500, 0.999)
    reach = RANGE[bits] / math.sqrt(1500)
    clamped = np.clip(rotate(delta, SEED), -reach, reach)
    errors = []
    for device in range(64):
        lanes, _ = encode(plan, delta, words=random_words(device))
        errors.append(rotate(plan.decode(lanes, 1, clip_norm=1.0, seed=SEED).update, SEED) - clamped)
    step = plan.step(1.0)
    assert np.abs(errors).max() < step * (1 + 1e-4)
    assert np.mean(np.square(errors)) <= step**2 / 4
    # 64 draws of variance up to step^2 / 4: six standard deviations of the mean
    assert np.abs(np.mean(errors, axis=0)).max() < 6 * step / 2 / math.sqrt(64)


@pytest.mark.parametrize(("bits", "relative_error"), [(2, 0.75), (4, 0.05), (6, 0.004), (8, 3.2e-4)])
def test_the_error_of_one_device_is_the_documented_one(bits, relative_error):
    plan = VectorPlan(size=20_000, bits=bits, max_cohort=100)
    delta = gaussian(20_000)
    lanes, _ = encode(plan, delta)
    error = plan.decode(lanes, 1, clip_norm=1.0, seed=SEED).update - delta
    assert 0.8 * relative_error < np.dot(error, error) < relative_error


def test_a_delta_over_the_clip_norm_is_clipped_and_not_within():
    plan = VectorPlan(size=1000, bits=16, max_cohort=2)
    lanes, norm = encode(plan, gaussian(1000, 50.0))
    total = plan.decode(lanes, 1, clip_norm=1.0, seed=SEED)
    assert norm == pytest.approx(50.0, rel=1e-5) and total.within == 0
    assert np.linalg.norm(total.update) == pytest.approx(1.0, rel=1e-3)
    np.testing.assert_allclose(total.update, gaussian(1000), atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- the largest


@pytest.mark.parametrize(
    ("bits", "cohort", "noise", "width"),
    [
        (8, 250, 0, 16),
        (8, 258, 0, 16),
        (8, 259, 0, 21),
        (6, 1000, 0, 16),
        (2, 127, 0, 8),
        (4, 73, 0, 10),
        (8, 64, 384, 16),
        (8, 64, 385, 21),
    ],
)
def test_lane_overflow_at_n_max(bits, cohort, noise, width):
    """The largest cohort of devices that all send the largest value, and nothing carries; case 30."""
    plan = VectorPlan(size=9, bits=bits, max_cohort=cohort, max_weight=7, noise_bound=noise)
    assert plan.fields.width == width
    most = metrics(2**32 - 1, 2**32 - 1, (2**48 - 1) / 4096)
    for word, sign in ((0xFFFF_FFFF, 1), (0, -1)):
        delta = np.full(9, sign * 1e9, np.float32)
        rotated = rotate(delta, SEED)
        largest = np.where(rotated == 0, 0, np.sign(rotated))  # far beyond the grid: all clamped
        lanes, _ = encode(
            plan,
            delta,
            clip_norm=1.0,
            weight=7,
            metrics=most,
            words=constant_words(word),
            noise=lambda count, sign=sign: np.full(count, sign * noise),
        )
        total = plan.decode(lanes * np.uint64(cohort), cohort, clip_norm=1.0, seed=SEED)
        alone = plan.decode(lanes, 1, clip_norm=1.0, seed=SEED)
        np.testing.assert_allclose(total.update, cohort * alone.update, rtol=1e-9, atol=1e-9)
        assert (total.total_weight, total.metrics.examples) == (7 * cohort, cohort * (2**32 - 1))
        assert total.metrics.loss_sum == cohort * most.loss_sum
        assert np.abs(largest).max() == 1


@given(st.integers(2, 16), st.integers(1, 70_000), st.integers(0, 1 << 18))
def test_no_field_can_overflow(bits, cohort, noise):
    try:
        plan = VectorPlan(size=3, bits=bits, max_cohort=cohort, noise_bound=noise)
    except ParameterError:
        assert cohort * 2 * ((1 << bits - 1) - 1 + noise) >= 1 << 32
        return
    width = plan.fields.width
    assert cohort * 2 * plan.bound < 1 << width
    limb = width - (cohort - 1).bit_length()
    assert limb >= 1 and cohort * ((1 << limb) - 1) < 1 << width


def test_one_device_more_than_n_max_is_refused():
    plan = VectorPlan(size=3, bits=8, max_cohort=2)
    lanes, _ = encode(plan, gaussian(3))
    with pytest.raises(ProtocolError, match="impossible number"):
        plan.decode(lanes * np.uint64(3), 3, clip_norm=1.0, seed=SEED)


def test_upload_is_two_bytes_a_parameter():
    for bits, cohort in ((8, 250), (6, 1000)):
        assert VectorPlan(1 << 20, bits, cohort, max_weight=10_000).nbytes <= 2.05 * (1 << 20)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_nan_inf_and_overflow_never_leave_the_device(bad):
    """Case 31."""
    delta = gaussian(100)
    delta[17] = bad
    with pytest.raises(UpdateError, match="finite"):
        encode(VectorPlan(100, 8, 4), delta)


@pytest.mark.parametrize("weight", [0, -1, 8, 1.5, math.nan, math.inf])
def test_a_weight_over_the_largest_is_refused(weight):
    """Case 32."""
    with pytest.raises(UpdateError, match="weight"):
        encode(VectorPlan(3, 8, 4, max_weight=7), gaussian(3), weight=weight)


@pytest.mark.parametrize("lied", [-1, 1])
def test_a_count_that_differs_from_the_survivors_is_refused(lied):
    """Case 33."""
    plan = VectorPlan(3, 8, 4)
    lanes = sum(encode(plan, gaussian(3))[0] for _ in range(2))
    assert plan.decode(lanes, 2, clip_norm=1.0, seed=SEED).devices == 2
    with pytest.raises(ProtocolError, match="count"):
        plan.decode(lanes, 2 + lied, clip_norm=1.0, seed=SEED)


def test_a_wrong_unmasking_is_noticed():
    plan = VectorPlan(1000, 8, 4)
    lanes = np.random.default_rng(0).integers(0, 1 << 64, plan.fields.lanes, dtype=np.uint64)
    with pytest.raises(ProtocolError):
        plan.decode(lanes, 3, clip_norm=1.0, seed=SEED)


def test_a_field_beyond_what_its_devices_can_send_is_refused():
    plan = VectorPlan(1, 8, 4)
    values = plan.fields.unpack(encode(plan, np.zeros(1, np.float32))[0])
    values[0] = 255
    with pytest.raises(ProtocolError, match="too large"):
        plan.decode(plan.fields.pack(values), 1, clip_norm=1.0, seed=SEED)


@pytest.mark.parametrize(
    "bad", [metrics(1 << 32), metrics(loss=math.nan), metrics(loss=-1.0), metrics(loss=2.0**36), None]
)
def test_metrics_that_fit_no_slot_are_refused(bad):
    with pytest.raises(UpdateError):
        encode(VectorPlan(3, 8, 4), gaussian(3), metrics=bad)


def test_metrics_stay_at_home_under_privacy():
    with pytest.raises(UpdateError, match="metrics"):
        encode(VectorPlan(3, 8, 4, private=True), gaussian(3), metrics=metrics())


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf, 1e-40])
def test_a_clip_norm_is_needed(clip_norm):
    with pytest.raises(UpdateError, match="clip norm"):
        encode(VectorPlan(3, 8, 4), gaussian(3), clip_norm=clip_norm)


def test_noise_beyond_its_bound_is_refused():
    with pytest.raises(UpdateError, match="noise"):
        encode(VectorPlan(3, 8, 4, noise_bound=5), gaussian(3), noise=lambda count: np.full(count, 6))


# ------------------------------------------------------------------------------------------------ conditional rounding


def test_rounding_is_repeated_until_the_norm_is_below_its_bound():
    plan = VectorPlan(5000, 4, 4)
    delta, step = gaussian(5000), plan.step(1.0)

    def rounded_norm(**changed) -> float:
        lanes, _ = encode(plan, delta, words=words, **changed)
        return float(np.linalg.norm(plan.decode(lanes, 1, clip_norm=1.0, seed=SEED).update))

    words = random_words(1)
    free = [rounded_norm() for _ in range(9)]
    bound = sorted(free)[4]
    assert min(free) < bound < max(free)
    assert max(rounded_norm(norm_bound=bound) for _ in range(9)) <= bound * (1 + 1e-9)
    assert rounded_norm(norm_bound=conditional_norm_bound(1.0, step, 5000)) > 0
    with pytest.raises(UpdateError, match="never stayed below"):
        encode(VectorPlan(50, 4, 4), gaussian(50), norm_bound=0.1)


def test_the_norm_bound_is_the_papers():
    # few coordinates: the certain bound; many: 1 + 0.01^2 * 10^6 / 4 + 0.01 * (1 + 0.01 * 1000 / 2)
    assert conditional_norm_bound(1.0, 0.01, 1) == pytest.approx(math.sqrt(1 + 0.000025 + 0.01005))
    assert conditional_norm_bound(1.0, 0.01, 10**6) == pytest.approx(math.sqrt(1 + 25 + 0.06))
    assert conditional_norm_bound(0.001, 1.0, 1) == pytest.approx(math.sqrt(1e-6 + 0.25 + 0.501))


# ----------------------------------------------------------------------------------------------------------- the plan


def bundle(**changed) -> task_pb2.TaskBundle:
    made = task_pb2.TaskBundle(
        layout=[task_pb2.TensorSpec(name="weight", shape=[4, 6]), task_pb2.TensorSpec(name="bias", shape=[5])],
        update=task_pb2.UpdatePlan(
            codec=task_pb2.CODEC_FIELDS, bits=8, clip_norm=1, weighting=task_pb2.WEIGHTING_EXAMPLES, max_weight=50
        ),
        secure=task_pb2.SecurePlan(max_cohort=250, min_survivors=100, corrupted_share=0.1),
    )
    for name, value in changed.items():
        setattr(made.update, name, value)
    return made


def test_the_plan_follows_from_the_bundle():
    assert VectorPlan.from_bundle(bundle(), device_pb2.WORK_TRAIN) == VectorPlan(29, 8, 250, 50)
    assert VectorPlan.from_bundle(bundle(), device_pb2.WORK_EVALUATE).size == 0
    uniform = VectorPlan.from_bundle(bundle(weighting=task_pb2.WEIGHTING_UNIFORM), device_pb2.WORK_TRAIN)
    assert uniform.max_weight == 1


def test_the_plan_makes_room_for_the_noise_of_devices():
    private = bundle(weighting=task_pb2.WEIGHTING_UNIFORM, bits=12)
    private.privacy.mechanism = task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN
    private.privacy.noise_multiplier = 1.0
    plan = VectorPlan.from_bundle(private, device_pb2.WORK_TRAIN)
    sigma = 1.0 / math.sqrt(100 - 25) / plan.step(1.0)  # 25 of 250 may collude, and all be among 100 survivors
    assert plan.private and 11 * sigma < plan.noise_bound < 11 * sigma + 20
    assert plan.fields.width == width_for(250 * 2 * plan.bound)
    assert VectorPlan.from_bundle(private, device_pb2.WORK_EVALUATE).noise_bound == 0


@pytest.mark.parametrize(
    "changed", [{"codec": task_pb2.CODEC_QUANTIZED}, {"bits": 1}, {"bits": 17}, {"max_weight": 1.5}]
)
def test_a_bundle_without_a_vector_is_refused(changed):
    with pytest.raises(ParameterError):
        VectorPlan.from_bundle(bundle(**changed), device_pb2.WORK_TRAIN)


def test_evaluations_have_slots_only():
    plan = VectorPlan(0, 8, 250)
    lanes, _ = encode(plan, np.zeros(0, np.float32), metrics=metrics(30, 20, 1.5))
    total = plan.decode(lanes, 1, clip_norm=1.0, seed=SEED)
    assert total.update.shape == (0,) and total.metrics == metrics(30, 20, 1.5)
    assert plan.fields == Fields(plan.fields.count, 16) and plan.nbytes < 100
