"""Which codec a task's updates travel in."""

from __future__ import annotations

from evensong.v1 import task_pb2
from evensong.wire.codecs import UpdateCodec
from evensong.wire.errors import UpdateError
from evensong.wire.rotated import RotatedCodec
from evensong.wire.top_k import TopKCodec

#: All have ``encode``, ``encode_with``, ``decode``, ``accumulate``, ``encoded_bytes``, ``is_fixed`` and ``to_plan``.
Codec = UpdateCodec | RotatedCodec | TopKCodec


def codec_from_plan(plan: task_pb2.UpdatePlan) -> Codec:
    """The codec of a task without secure sums; :class:`UpdateError` if the plan names none or is out of range."""
    if plan.codec == task_pb2.CODEC_ROTATED and not (plan.block_size or plan.keep_fraction):
        return RotatedCodec(plan.bits)
    if plan.codec == task_pb2.CODEC_TOP_K and not plan.block_size:
        return TopKCodec(plan.keep_fraction, plan.bits or None)
    if plan.keep_fraction:
        raise UpdateError("keep_fraction goes with CODEC_TOP_K", got=f"codec {plan.codec}")
    return UpdateCodec.from_plan(plan)
