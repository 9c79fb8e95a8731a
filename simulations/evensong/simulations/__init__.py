"""The harness: a whole fleet in one process under simulated time, and the demo with real processes.

>>> from evensong.simulations import simulate            # doctest: +SKIP
>>> result = simulate(task, clients, seed=0)
>>> result.parameters_sha256                              # the same every time
"""

from __future__ import annotations
