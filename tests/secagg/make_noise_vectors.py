"""Writes ``protos/vectors/noise.json``; only for a new version of the samplers.

Run ``python tests/secagg/make_noise_vectors.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

from evensong.secagg import noise

SAMPLERS = {"discrete_gaussian": noise.discrete_gaussian, "skellam": noise.skellam}
TABLES = {"discrete_gaussian": noise._gaussian_table, "skellam": noise._skellam_table}
KEYS = ("000102030405060708090a0b0c0d0e0f", "ff" * 32)


def main() -> None:
    content = {"draws": list(_draws()), "tables": list(_tables())}
    path = Path(__file__).parents[2] / "protos" / "vectors" / "noise.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


def _draws():  # type: ignore[no-untyped-def]
    for name, sigmas in (("discrete_gaussian", (0.5, 3.0, 777.7, 5000.0, 1e8)), ("skellam", (0.5, 3.0, 777.7, 5000.0))):
        for sigma in sigmas:
            for key in KEYS:
                draws = SAMPLERS[name](noise.Keystream(bytes.fromhex(key)), sigma, 16)
                yield {"sampler": name, "key": key, "sigma": sigma, "draws": draws.tolist()}


def _tables():  # type: ignore[no-untyped-def]
    """``threshold_after[i]``: 2^128 times the probability of a draw of at most ``values[i]``, in hex."""
    for name, table_of in TABLES.items():
        for sigma in (3.0, 777.7):
            table = table_of(sigma)
            values = [-int(4 * sigma), -int(sigma), -1, 0, 1, int(2 * sigma)]
            after = [f"{int(table.high[v - table.least]):016x}{int(table.low[v - table.least]):016x}" for v in values]
            yield {
                "sampler": name,
                "sigma": sigma,
                "least": table.least,
                "thresholds": int(table.high.size),
                "values": values,
                "threshold_after": after,
            }


if __name__ == "__main__":
    main()
