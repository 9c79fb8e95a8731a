"""The golden vectors of secure vectors, checked by an implementation that goes value by value and bit by bit."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from evensong.secagg.packing import Fields
from evensong.secagg.vector import VectorPlan
from evensong.v1 import common_pb2

pytestmark = pytest.mark.secagg

FILE = Path(__file__).parents[2] / "protos" / "vectors" / "secagg_vector.json"
VECTORS: dict[str, Any] = json.loads(FILE.read_text())
SEED = bytes.fromhex(VECTORS["rotation_seed"]["seed"])
RANGE = {2: 2.1, 4: 3.6, 6: 4.5, 8: 5.4}


def slow_rotate(values: list[float], seed: bytes) -> list[float]:
    size = len(values)
    if not size:
        return []
    window = 1 << size.bit_length() - 1
    stride = -(-size // 8)
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(16 + 2 * stride))
    if window < size:
        step = 1 + int.from_bytes(stream[:8], "little") % (size - 1)
        while math.gcd(step, size) != 1:
            step += 1
        start = int.from_bytes(stream[8:16], "little") % size
        values = [values[(step * i + start) % size] for i in range(size)]
    for number, first in enumerate([0] if window == size else [0, size - window]):
        signs = stream[16 + number * stride :]
        values = [-value if signs[i // 8] >> i % 8 & 1 else value for i, value in enumerate(values)]
        part = values[first : first + window]
        values[first : first + window] = [
            sum(-x if (i & j).bit_count() & 1 else x for j, x in enumerate(part)) / math.sqrt(window)
            for i in range(window)
        ]
    return values


def slow_pack(values: list[int], width: int) -> bytes:
    per_lane = 64 // width
    lanes = [
        sum(value << width * place for place, value in enumerate(values[start : start + per_lane]))
        for start in range(0, len(values), per_lane)
    ]
    return b"".join(lane.to_bytes(8, "little") for lane in lanes)


def slow_encode(case: dict[str, Any], device: dict[str, Any]) -> bytes:
    plan, clip_norm = case["plan"], case["clip_norm"]
    largest = 2 ** (plan["bits"] - 1) - 1
    bound = largest + plan["noise_bound"]
    step = RANGE[plan["bits"]] * clip_norm / (largest * math.sqrt(max(1, plan["size"])))
    norm = math.sqrt(sum(value**2 for value in device["delta"]))
    scale = device["weight"] / plan["max_weight"] / step
    if norm > clip_norm:
        scale *= clip_norm / norm * (1 - 2**-20)
    fields = []
    for value, word, noise in zip(slow_rotate(device["delta"], SEED), device["words"], device["noise"], strict=True):
        rounded = math.floor(value * scale + word / 2**32)
        fields.append(max(-largest, min(largest, rounded)) + noise + bound)
    width = next(w for w in (8, 10, 12, 16, 21, 32) if plan["max_cohort"] * 2 * bound < 2**w)
    within = int(norm <= clip_norm and not plan["noise_bound"])
    slots = [(1, 1), (within, 1), (device["weight"], plan["max_weight"].bit_length())]
    if not plan["private"]:
        examples, correct, loss = device["metrics"]
        slots += [(examples, 32), (correct, 32), (round(loss * 4096), 48)]
    limb = width - math.ceil(math.log2(plan["max_cohort"]))
    for value, bits in slots:
        fields += [value >> limb * i & (1 << limb) - 1 for i in range(-(-bits // limb))]
    return slow_pack(fields, width)


def test_the_file_is_what_its_maker_writes() -> None:
    maker = runpy.run_path(str(Path(__file__).with_name("make_vector_vectors.py")))
    assert FILE.read_text() == maker["to_json"](maker["build"]())


@pytest.mark.parametrize("case", VECTORS["packing"], ids=lambda case: str(case["width"]))
def test_packing(case: dict[str, Any]) -> None:
    fields = Fields(len(case["values"]), case["width"])
    assert slow_pack(case["values"], case["width"]).hex() == case["lanes"]
    assert fields.pack(np.array(case["values"], np.uint64)).tobytes().hex() == case["lanes"]
    assert fields.unpack(np.frombuffer(bytes.fromhex(case["lanes"]), np.uint64)).tolist() == case["values"]


@pytest.mark.parametrize("case", VECTORS["sums"], ids=lambda case: str(case["plan"]["size"]))
def test_sums(case: dict[str, Any]) -> None:
    plan = VectorPlan(**case["plan"])
    assert (plan.fields.width, plan.step(case["clip_norm"])) == (case["width"], case["step"])
    total = np.zeros(plan.fields.lanes, np.uint64)
    for device in case["devices"]:
        assert slow_encode(case, device).hex() == device["lanes"]
        metrics = None
        if device["metrics"] is not None:
            examples, correct, loss_sum = device["metrics"]
            metrics = common_pb2.Metrics(examples=examples, correct=correct, loss_sum=loss_sum)
        lanes, norm = plan.encode(
            np.array(device["delta"], np.float32),
            clip_norm=case["clip_norm"],
            seed=SEED,
            weight=device["weight"],
            metrics=metrics,
            words=lambda count, device=device: np.array(device["words"][:count], np.uint32),
            noise=lambda count, device=device: np.array(device["noise"][:count], np.int64),
        )
        assert (lanes.tobytes().hex(), norm) == (device["lanes"], device["norm"])
        total += lanes
    assert total.tobytes().hex() == case["sum"]
    decoded = plan.decode(total, 3, clip_norm=case["clip_norm"], seed=SEED)
    np.testing.assert_allclose(decoded.update, case["update"], rtol=1e-9, atol=1e-9)
    assert (decoded.total_weight, decoded.within) == (case["total_weight"], case["within"])
