"""The models that ``predict`` answers with: taken over from check-ins, kept for offline use, loaded when asked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

import numpy.typing as npt

from evensong.client.callbacks import ModelServed
from evensong.client.context import Context
from evensong.client.enrol import signer_public_key
from evensong.client.errors import NoModelError, RefusedError, UnfitError, UntrustedError
from evensong.client.evaluate import evaluate
from evensong.client.model import Material, blobs_of, check_material, obtain, open_session
from evensong.client.state import ServedRow
from evensong.client.trust import TrustedModel, trust
from evensong.mobile_runtime.errors import RuntimeFault
from evensong.mobile_runtime.session import Array, Evaluation, Session
from evensong.v1 import device_pb2, task_pb2
from evensong.wire.errors import UnreachableError, WireError
from evensong.wire.tensors import decode_tensors, layout_of

_log = logging.getLogger("evensong.client")


class Serving:
    """Answers ``predict`` from any thread, also while training runs: it has sessions of its own."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.RLock()
        self._sessions: dict[str, Session] = {}  # by task id
        self._asked: dict[str | None, str] = {}  # what predict was asked for, and the id of the task that it means

    async def adopt(self, offers: Iterable[device_pb2.Serving]) -> None:
        """Takes over each offered version that verifies; the old one answers until the new one is here completely.

        What does not verify or does not arrive is logged and offered again at the next check-in.
        """
        for offer in offers:
            try:
                await self._adopt(offer)
            except (UntrustedError, UnfitError, RuntimeFault, RefusedError, UnreachableError) as error:
                _log.warning("the served version of task %.64s was not taken over: %s", offer.task_id, error)

    def predict(self, *inputs: npt.ArrayLike, task: str | None = None) -> Array:
        """The served model's output ``[n, ...]``; NoModelError before there is one."""
        with self._lock:
            return self._session(task).predict(*inputs)

    def evaluate(self, *, task: str | None = None) -> Evaluation:
        """Of what ``predict`` serves, on the local test examples."""
        with self._lock:
            return evaluate(self._session(task), self._context.examples)

    def material(self, task: str | None = None) -> Material:
        """The served version, from the local cache alone."""
        model = self._verified(self._row(task))
        artifact, parameters = map(self._context.cache.get, blobs_of(model.bundle, model.version))
        if artifact is None or parameters is None:
            raise NoModelError("files of the model are missing here", fix="The next check-in fetches them again.")
        return check_material(model, artifact, parameters)

    def tasks(self) -> list[TrustedModel]:
        """The versions served, by task."""
        return [self._verified(row) for row in self._context.state.served()]

    def refresh(self) -> None:
        """Forgets the loaded sessions: what they serve has changed."""
        with self._lock:
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()
            self._asked.clear()

    async def _adopt(self, offer: device_pb2.Serving) -> None:
        context = self._context
        row = ServedRow(offer.task_id, offer.bundle.SerializeToString(), offer.version.SerializeToString())
        model = self._verified(row)
        is_known = row in context.state.served()
        if is_known and all(context.cache.has(blob) for blob in blobs_of(model.bundle, model.version)):
            return
        material = await obtain(context, model)
        if is_known:  # only its files had been lost
            return
        open_session(context, material).close()  # it runs here, or the old version stays
        # Of tasks that share a name, the newest counts: it replaces what the same application served before.
        same_name = [
            each.task_id
            for each in self.tasks()
            if each.bundle.name == model.bundle.name and each.task_id != model.task_id
        ]
        context.state.set_served(row, replaces=same_name)
        self.refresh()
        context.callbacks.emit(ModelServed(model.task_id, model.version.number))

    def _verified(self, row: ServedRow) -> TrustedModel:
        return trust(
            task_pb2.SignedBlob.FromString(row.bundle),
            task_pb2.SignedBlob.FromString(row.version),
            task_id=row.task_id,
            signer=signer_public_key(self._context),
            population=self._context.population,
            limits=self._context.limits,
        )

    def _row(self, task: str | None) -> ServedRow:
        rows = self._context.state.served()
        if task is not None:
            rows = [row for row in rows if task in (row.task_id, _name(row))]
        if not rows:
            raise NoModelError(
                f"there is no model for task {task!r} yet" if task else "there is no model yet",
                fix="The first check-in that finds a published version fetches it: device.run() or device.step().",
            )
        if len(rows) > 1:
            raise NoModelError(
                "several tasks serve a model here",
                got=[_name(row) for row in rows],
                fix="Choose one: predict(x, task=...).",
            )
        return rows[0]

    def _session(self, task: str | None) -> Session:
        task_id = self._asked.get(task)
        if task_id is None:
            task_id = self._asked[task] = self._row(task).task_id
        if task_id not in self._sessions:
            self._sessions[task_id] = open_personalized(self._context, self.material(task_id))
        return self._sessions[task_id]


def open_personalized(context: Context, material: Material) -> Session:
    """A session with the version's tensors and this device's overlay for this very version, if there is one."""
    session = open_session(context, material)
    stored = context.state.overlay(material.model.task_id, material.model.version_sha256)
    if stored is not None:
        try:
            session.set(decode_tensors(stored, layout_of(material.artifact.variables)))
        except (WireError, RuntimeFault) as error:  # damage: the global model is better than none
            _log.warning("the personalised tensors of %s are unusable: %s", material.model.task_id, error)
    return session


def _name(row: ServedRow) -> str:
    return task_pb2.TaskBundle.FromString(task_pb2.SignedBlob.FromString(row.bundle).payload).name
