"""Real messages: raw text in, a spam filter out, trained on the engine."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evensong.mobile_runtime import Adam, compile, load
from evensong.mobile_runtime.preprocessing import TextVectorization, encode_text

MESSAGES = Path(os.environ.get("EVENSONG_DATA", "")) / "sms" / "SMSSpamCollection"

pytestmark = [
    pytest.mark.torch,
    pytest.mark.data,
    pytest.mark.skipif(
        "EVENSONG_DATA" not in os.environ or not MESSAGES.exists(),
        reason="EVENSONG_DATA names no sms/SMSSpamCollection",
    ),
]


@pytest.mark.parametrize("words", [{"max_ids": 2000}, {"hash_bins": 4000}], ids=["vocabulary", "hash"])
def test_a_spam_filter_is_trained_from_raw_text(words: dict[str, int]) -> None:
    lines = MESSAGES.read_text(encoding="utf-8").splitlines()[1:]
    labels, texts = (np.array(column) for column in zip(*(line.split("\t", 1) for line in lines), strict=True))
    is_spam = (labels == "spam").astype(np.int32)
    order = np.random.default_rng(0).permutation(len(texts))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    test = test[~np.isin(texts[test], texts[train])]  # some messages stand there twice

    torch.manual_seed(0)
    bag = TextVectorization(mode="multi_hot", **words)
    if "max_ids" in words:
        bag.adapt(texts[train])
    model = nn.Sequential(bag, nn.Linear(bag.ids - 1, 16), nn.ReLU(), nn.Linear(16, 2))
    session = load(compile(model, encode_text([""], 256), optimizer=Adam(), predict_batch=32))
    for start in range(0, 5 * len(train), 32):
        batch = np.take(train, range(start, start + 32), mode="wrap")
        session.train_step(texts[batch], is_spam[batch], learning_rate=0.001)
    accuracy = session.evaluate(texts[test], is_spam[test]).accuracy
    print(f"{words}: {accuracy:.2%} of {len(test)} messages that are new")
    assert accuracy >= 0.97
    trained = {name: torch.from_numpy(value) for name, value in session.get().items()}
    model.load_state_dict({**model.state_dict(), **trained})
    some = texts[test[:100]]
    scores = model(torch.from_numpy(encode_text(some, 256))).detach().numpy()
    np.testing.assert_allclose(session.predict(some), scores, atol=1e-4)
