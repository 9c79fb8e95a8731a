"""Writes ``protos/vectors/secagg_vector.json``: fields in lanes, and whole vectors of secure sums.

Run ``python tests/secagg/make_vector_vectors.py``; only for a new version of the protocol.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from evensong.secagg.packing import WIDTHS, Fields
from evensong.secagg.vector import VectorPlan
from evensong.v1 import common_pb2
from evensong.wire.rotation import rotation_seed

FILE = Path(__file__).parents[2] / "protos" / "vectors" / "secagg_vector.json"


def main() -> None:
    FILE.write_text(to_json(build()))


def to_json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"


def build() -> object:
    seed = rotation_seed(bytes(range(32)), 1, 7)
    return {
        "packing": [_packing(width) for width in WIDTHS],
        "rotation_seed": {"bundle_sha256": bytes(range(32)).hex(), "work": 1, "round": 7, "seed": seed.hex()},
        "sums": [
            _sum(VectorPlan(16, 8, 250, max_weight=50), seed),
            _sum(VectorPlan(24, 4, 10, max_weight=50), seed),
            _sum(VectorPlan(16, 6, 1000), seed),
            _sum(VectorPlan(20, 2, 30, max_weight=3, private=True), seed),
            _sum(VectorPlan(16, 8, 5, private=True, noise_bound=40), seed),
            _sum(VectorPlan(0, 8, 250), seed),
        ],
    }


def _packing(width: int) -> object:
    rng = np.random.default_rng(width)
    values = rng.integers(0, 1 << width, 2 * (64 // width) + 1, dtype=np.uint64)
    values[:2] = 0, (1 << width) - 1
    return {"width": width, "values": values.tolist(), "lanes": Fields(values.size, width).pack(values).tobytes().hex()}


def _sum(plan: VectorPlan, seed: bytes) -> object:
    """Three devices: one within the clip norm, one beyond, one with nothing."""
    rng = np.random.default_rng(plan.size)
    clip_norm, devices, total = 8.0, [], np.zeros(plan.fields.lanes, np.uint64)
    for device in range(3):
        # multiples of 1/8, so that every machine rotates them to the same bits
        delta = (rng.integers(-8, 9, plan.size) / 8 * (1, 16, 0)[device]).astype(np.float32)
        weight = min(plan.max_weight, 1 + 20 * device)
        metrics = None if plan.private else common_pb2.Metrics(examples=100 + device, correct=device, loss_sum=1.5)
        words = rng.integers(0, 1 << 32, plan.size, dtype=np.uint32)
        noise = rng.integers(-plan.noise_bound, plan.noise_bound + 1, plan.size)
        lanes, norm = plan.encode(
            delta,
            clip_norm=clip_norm,
            seed=seed,
            weight=weight,
            metrics=metrics,
            words=lambda count, words=words: words[:count],
            noise=lambda count, noise=noise: noise[:count],
        )
        total += lanes
        devices.append(
            {
                "delta": delta.astype(float).tolist(),
                "weight": weight,
                "metrics": None if metrics is None else [metrics.examples, metrics.correct, metrics.loss_sum],
                "words": words.tolist(),
                "noise": noise.tolist(),
                "norm": norm,
                "lanes": lanes.tobytes().hex(),
            }
        )
    decoded = plan.decode(total, 3, clip_norm=clip_norm, seed=seed)
    return {
        "plan": {
            "size": plan.size,
            "bits": plan.bits,
            "max_cohort": plan.max_cohort,
            "max_weight": plan.max_weight,
            "private": plan.private,
            "noise_bound": plan.noise_bound,
        },
        "clip_norm": clip_norm,
        "step": plan.step(clip_norm),
        "width": plan.fields.width,
        "devices": devices,
        "sum": total.tobytes().hex(),
        "total_weight": decoded.total_weight,
        "within": decoded.within,
        "update": [float(f"{value:.12g}") for value in decoded.update],
    }


if __name__ == "__main__":
    main()
