"""What the daemon tells about itself: structured log lines and Prometheus metrics. Never tokens, keys or updates."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Log = structlog.typing.FilteringBoundLogger


def make_logger(form: Literal["console", "json"] = "console", level: str = "warning") -> Log:
    """Lines on standard error: for people, or one JSON object each. Tracebacks never show local variables."""
    rendering: list[structlog.typing.Processor]
    if form == "json":
        rendering = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        rendering = [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    log: Log = structlog.wrap_logger(
        structlog.WriteLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *rendering,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
    )
    return log


class Telemetry:
    """The metrics of one coordinator; each has its own registry, so that several can live in one process."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.seconds = Histogram(
            "evensong_call_seconds",
            "Time to answer, without the time a check-in is held",
            ["method"],
            registry=registry,
        )
        self.refusals = Counter("evensong_refusals", "Refused calls", ["method", "reason"], registry=registry)
        self.check_ins = Counter("evensong_check_ins", "Answered check-ins", ["answer"], registry=registry)
        self.held = Gauge("evensong_held_check_ins", "Check-ins that wait for work", registry=registry)
        self.accepted = Counter("evensong_accepted_reports", "Reports counted", ["work"], registry=registry)
        self.bytes_in = Counter("evensong_received_update_bytes", "Bytes of updates received", registry=registry)
        self.bytes_out = Counter("evensong_sent_blob_bytes", "Bytes of blobs sent to devices", registry=registry)
        self.rounds = Counter("evensong_rounds", "Rounds that entered a state", ["work", "state"], registry=registry)
        self.round_seconds = Histogram(
            "evensong_round_seconds",
            "From a round's opening to its end",
            ["work"],
            buckets=(0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600),
            registry=registry,
        )
        self.secure_messages = Counter(
            "evensong_secure_messages", "Messages of secure rounds accepted", ["stage"], registry=registry
        )
        self.secure_stages = Counter(
            "evensong_secure_stages", "Stages of secure rounds that closed", ["stage", "next"], registry=registry
        )
        self.secure_aborts = Counter(
            "evensong_secure_aborts", "Attempts at a secure sum that came to none", ["stage"], registry=registry
        )
        self.secure_dropped = Counter(
            "evensong_secure_dropped", "Devices that left a secure round", ["stage"], registry=registry
        )
        self.unmask_seconds = Histogram(
            "evensong_unmask_seconds", "CPU time to remove the masks from a sum", registry=registry
        )
        self._of_method: dict[str, Histogram] = {}

    def observe_call(self, method: str, seconds: float) -> None:
        """Counts one answered call; the children are kept, since looking one up costs more than the count."""
        child = self._of_method.get(method)
        if child is None:
            child = self._of_method[method] = self.seconds.labels(method)
        child.observe(seconds)
