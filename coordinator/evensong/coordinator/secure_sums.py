"""From masked vectors to their sum: added up as they lie on disk, one at a time, and unmasked all at once."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import Row, select

from evensong.coordinator import tables
from evensong.coordinator.context import Context
from evensong.coordinator.plan import parse_plan
from evensong.coordinator.privacy.mechanism import Total
from evensong.coordinator.secure_machines import Machines
from evensong.secagg.errors import ProtocolError, SecureError
from evensong.secagg.masks import apply_masks
from evensong.v1 import common_pb2, task_pb2
from evensong.wire.errors import EvensongError, UpdateError
from evensong.wire.rotation import rotation_seed


class UnsoundSumError(EvensongError):
    """A sum that does not check: a member of the cohort sent what the protocol does not allow."""


@dataclass(frozen=True)
class SecureSum:
    """What a cohort comes to. ``update`` is the weighted sum, flat float64 [parameters]; empty for an evaluation."""

    update: npt.NDArray[np.float64]
    total_weight: float
    devices: int
    within: int  #: devices whose norm was within the clip norm
    metrics: common_pb2.Metrics

    def total(self) -> Total:
        """For the server step."""
        return Total(self.update, self.total_weight, self.devices, self.within)


def secure_sum(context: Context, machines: Machines, round: Row[tuple[object, ...]]) -> SecureSum:
    """The sum of a round whose protocol is done. Memory is that of two vectors, however many devices there were.

    Deterministic: after a crash it gives the same bits again. Raises :class:`UnsoundSumError`.
    """
    with context.database.read() as tx:
        base = tx.execute(
            select(tables.versions.c.payload, tables.tasks.c.bundle_sha256, tables.bundles.c.payload.label("bundle"))
            .join(tables.tasks, tables.tasks.c.task_id == tables.versions.c.task_id)
            .join(tables.bundles, tables.bundles.c.sha256 == tables.tasks.c.bundle_sha256)
            .where(tables.versions.c.task_id == round.task_id, tables.versions.c.number == round.version)
        ).one()
        uploads = list(
            tx.execute(
                select(tables.journal.c.upload_id)
                .where(tables.journal.c.round_id == round.round_id)
                .order_by(tables.journal.c.entry)
            ).scalars()
        )
    plan = parse_plan(base.bundle)
    vector = plan.vector(round.work)
    lanes = np.zeros(vector.fields.lanes, np.uint64)
    for upload_id in uploads:
        lanes += np.frombuffer(context.spool.read(upload_id), "<u8")
    started = time.process_time()
    try:
        with machines.open(round.round_id) as machine:
            masks = machine.unmasking().masks
    except SecureError as error:
        raise UnsoundSumError("the messages of a secure round cannot be read back", got=error) from error
    apply_masks(lanes, masks, threads=os.cpu_count() or 1)
    context.telemetry.unmask_seconds.observe(time.process_time() - started)
    try:
        summed = vector.decode(
            lanes,
            len(uploads),
            clip_norm=plan.clip_norm(task_pb2.VersionManifest.FromString(base.payload)),
            seed=rotation_seed(bytes.fromhex(base.bundle_sha256), round.work, round.number),
        )
    except (ProtocolError, UpdateError) as error:
        raise UnsoundSumError(f"the sum of {len(uploads)} devices does not check: {error}") from error
    return SecureSum(
        summed.update, summed.total_weight, summed.devices, summed.within, summed.metrics or common_pb2.Metrics()
    )
