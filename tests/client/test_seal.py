"""Sealing an update: what is clipped, what a sparse update leaves behind, and that it is there for the next one."""

from __future__ import annotations

import numpy as np
import pytest

from evensong.client.seal import seal
from evensong.client.state import State
from evensong.v1 import task_pb2
from evensong.wire import RotatedCodec, TensorSpec, TopKCodec, UpdateCodec, UpdateError, codec_from_plan

LAYOUT = (TensorSpec("weight", (40, 5)), TensorSpec("bias", (5,)))


def plan(codec, **changed) -> task_pb2.UpdatePlan:
    made = codec.to_plan()
    made.weighting, made.max_weight = task_pb2.WEIGHTING_EXAMPLES, 50.0
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def delta(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in LAYOUT}


def sealed(update_plan: task_pb2.UpdatePlan, **changed):
    arguments = {"examples": 70, "rounding": np.random.default_rng(1)} | changed
    return seal(delta(), LAYOUT, update_plan, **arguments)


@pytest.mark.parametrize("codec", [UpdateCodec(8), RotatedCodec(2), TopKCodec(0.2)], ids=str)
def test_every_codec_of_a_plan_seals(codec):
    update = sealed(plan(codec))
    assert set(codec_from_plan(plan(codec)).decode(update.data, LAYOUT)) == {"weight", "bias"}
    assert update.weight == 50.0
    assert (update.residual is not None) == isinstance(codec, TopKCodec)


def test_what_a_sparse_update_leaves_out_comes_with_the_next():
    update_plan = plan(TopKCodec(0.2))
    first = sealed(update_plan)
    sent = TopKCodec(0.2).decode(first.data, LAYOUT)
    for name, values in delta().items():
        np.testing.assert_array_equal(first.residual[name], values - sent[name])
    second = sealed(update_plan, residual=first.residual)
    wanted = {name: values + first.residual[name] for name, values in delta().items()}
    arrived = TopKCodec(0.2).decode(second.data, LAYOUT)
    for name, values in wanted.items():
        np.testing.assert_array_equal(second.residual[name], values - arrived[name])


def test_a_residual_never_holds_what_was_clipped():
    update = sealed(
        plan(TopKCodec(0.2), clip_norm=0.5), residual={name: 100 * values for name, values in delta(1).items()}
    )
    assert update.norm > 100 and not update.within_clip_norm
    assert np.sqrt(sum(np.square(values).sum() for values in update.residual.values())) < 0.5


def test_residuals_survive_a_restart(tmp_path):
    state = State(tmp_path)
    assert state.residual("task") is None
    state.set_residual("task", b"first")
    state.set_residual("task", b"second")
    state.close()
    state = State(tmp_path)
    assert state.residual("task") == b"second" and state.residual("other") is None
    state.close()


def test_a_delta_that_is_not_finite_never_leaves():
    broken = delta()
    broken["bias"][0] = np.nan
    with pytest.raises(UpdateError):
        seal(broken, LAYOUT, plan(TopKCodec(0.2)), examples=1, rounding=np.random.default_rng(0))
