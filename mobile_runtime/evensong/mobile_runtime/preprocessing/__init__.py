"""Layers between raw data and a model, which become part of its artifact.

They are ordinary modules: put them in front of a model, train and evaluate with them, and compile all of it. What
learns from data (a vocabulary, a mean) has ``adapt(data)`` and keeps it in the ``state_dict``. A device then takes what
an app has (text, bytes of an image, numbers, categories) and does exactly what the author's model did; integers are
exact. Needs torch: ``pip install "evensong[compile]"``.

>>> model = nn.Sequential(TextVectorization(2000, mode="multi_hot"), nn.Linear(2000 - 1, 2))   # doctest: +SKIP
>>> model[0].adapt(messages)                                                                   # doctest: +SKIP
>>> artifact = compile(model, encode_text(messages[:1], 256))                                  # doctest: +SKIP
>>> load(artifact).predict(["Win a prize!"])                                                   # doctest: +SKIP
"""

from __future__ import annotations

from evensong.mobile_runtime.preprocessing.categories import Hashing, IntegerLookup, StringLookup
from evensong.mobile_runtime.preprocessing.images import CenterCrop, RandomCrop, RandomFlip, Resizing
from evensong.mobile_runtime.preprocessing.numbers import CategoryEncoding, Discretization, Normalization, Rescaling
from evensong.mobile_runtime.preprocessing.text import TextVectorization
from evensong.mobile_runtime.text import encode_text

__all__ = [
    "CategoryEncoding",
    "CenterCrop",
    "Discretization",
    "Hashing",
    "IntegerLookup",
    "Normalization",
    "RandomCrop",
    "RandomFlip",
    "Rescaling",
    "Resizing",
    "StringLookup",
    "TextVectorization",
    "encode_text",
]
