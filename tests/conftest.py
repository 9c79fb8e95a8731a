"""What holds for every test: none fails for being slow on a busy machine, and nothing calls home.

In CI hypothesis draws the same examples each time, so that a change is judged by what it changed; elsewhere it goes on
looking for new ones.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

settings.register_profile("evensong", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("evensong")
