"""Forty phones with real messages: raw text stays on them, a spam filter comes out of their secure sums."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from evensong.coordinator import LocalTraining, Task
from evensong.mobile_runtime import compile, load
from evensong.simulations import Examples, Shard, simulate

MESSAGES = Path(os.environ.get("EVENSONG_DATA", "")) / "sms" / "SMSSpamCollection"


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.data
@pytest.mark.skipif(
    "EVENSONG_DATA" not in os.environ or not MESSAGES.exists(), reason="EVENSONG_DATA names no sms/SMSSpamCollection"
)
def test_a_fleet_learns_to_filter_spam_from_raw_text() -> None:
    import torch
    from torch import nn

    from evensong.mobile_runtime.preprocessing import TextVectorization, encode_text

    lines = MESSAGES.read_text(encoding="utf-8").splitlines()[1:]
    labels, texts = (np.array(column) for column in zip(*(line.split("\t", 1) for line in lines), strict=True))
    is_spam = (labels == "spam").astype(np.int32)
    train, test = np.split(np.random.default_rng(0).permutation(len(texts)), [len(texts) * 4 // 5])
    test = test[~np.isin(texts[test], texts[train])]  # some messages stand there twice

    torch.manual_seed(0)
    words = TextVectorization(hash_bins=4000, mode="multi_hot")  # a hash: nobody has to learn a vocabulary first
    model = nn.Sequential(words, nn.Linear(4000, 2))
    artifact = compile(model, encode_text([""], 256), batch_size=16)
    phones = []
    for number, part in enumerate(np.array_split(train, 40)):
        held, kept = Examples(texts[part[:-10]], is_spam[part[:-10]]), Examples(texts[part[-10:]], is_spam[part[-10:]])
        phones.append(Shard(f"phone {number}", held, kept))
    local = LocalTraining(epochs=2, batch_size=16, learning_rate=2.0)
    result = simulate(Task("sms", artifact, rounds=12, goal=20, evaluate_every=0, local=local), phones, seed=1)

    session = load(artifact)
    session.set(result.parameters)
    accuracy = session.evaluate(texts[test], is_spam[test]).accuracy
    print(f"forty phones: {accuracy:.2%} of {len(test)} messages that are new")
    assert accuracy >= 0.97
