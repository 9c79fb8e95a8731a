"""What holds for every test: none fails for being slow on a busy machine, and nothing calls home."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

settings.register_profile("evensong", deadline=None)
settings.load_profile("evensong")
