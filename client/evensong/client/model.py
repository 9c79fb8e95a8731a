"""From verified blobs to a session that holds a version, with this device's personal tensors in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from evensong.client.context import Context
from evensong.client.errors import UntrustedError
from evensong.client.fetch import fetch, fetch_parameters
from evensong.client.trust import TrustedModel, check_artifact, check_training_fits
from evensong.mobile_runtime.session import Array, Session
from evensong.v1 import task_pb2
from evensong.wire.artifact import decode_artifact
from evensong.wire.errors import WireError
from evensong.wire.program import Artifact
from evensong.wire.tensors import FloatArray, Layout, decode_tensors, encode_tensors, layout_of

_log = logging.getLogger("evensong.client")


@dataclass(frozen=True)
class Material:
    """All that a session of one version needs. ``reference`` are the version's tensors, in the author's shapes."""

    model: TrustedModel
    artifact: Artifact
    artifact_bytes: bytes
    reference: dict[str, Array]


async def obtain(context: Context, model: TrustedModel) -> Material:
    """Artifact and parameters, fetched as needed and checked against the signed layout."""
    artifact_bytes = await fetch(context, model.bundle.artifact, "artifact")
    parameters = await fetch_parameters(context, model)
    context.cache.trim({*blobs_of(model.bundle, model.version), *_served_blobs(context)})
    return check_material(model, artifact_bytes, parameters)


def blobs_of(bundle: task_pb2.TaskBundle, version: task_pb2.VersionManifest) -> tuple[bytes, bytes]:
    """The content addresses that a version needs."""
    return bundle.artifact.sha256, version.parameters.sha256


def check_material(model: TrustedModel, artifact_bytes: bytes, parameters: bytes) -> Material:
    """Parses both; :class:`UntrustedError` where they are not what the bundle's layout says."""
    try:
        artifact = decode_artifact(artifact_bytes)
        check_artifact(artifact, model)
        reference = decode_tensors(parameters, model.layout)
    except WireError as error:
        raise UntrustedError("the model does not verify", got=error) from error
    return Material(model, artifact, artifact_bytes, dict(reference))


def open_training_session(context: Context, material: Material, seed: int) -> Session:
    """:func:`open_session`, if training takes no more memory than the device gives; else :class:`UnfitError`.

    ``seed`` (unsigned 64 bits) drives dropout.
    """
    check_training_fits(material.artifact, material.model, context.memory_bytes)
    return open_session(context, material, seed)


def open_session(context: Context, material: Material, seed: int = 0) -> Session:
    """A session with the version's tensors and the personal ones; the caller closes it."""
    session = context.load(material.artifact_bytes)
    try:
        session.reset(seed=seed)  # personal tensors that were never trained here are the artifact's
        session.set({**material.reference, **personal_tensors(context, material)})
    except BaseException:
        session.close()
        raise
    return session


def personal_layout(material: Material) -> Layout:
    """The float32 tensors that stay on the device."""
    travelling = set(material.reference)
    return tuple(spec for spec in layout_of(material.artifact.variables) if spec.name not in travelling)


def personal_tensors(context: Context, material: Material) -> dict[str, Array]:
    """The personal tensors as trained here; none before the first training."""
    stored = context.state.personal(material.model.task_id)
    if stored is None:
        return {}
    try:
        return dict(decode_tensors(stored, personal_layout(material)))
    except WireError as error:  # a task's artifact never changes, so this is damage
        _log.warning("personal tensors of %s are unusable: %s", material.model.task_id, error)
        return {}


def store_personal(context: Context, material: Material, tensors: dict[str, Array]) -> None:
    """Keeps the personal tensors for every later version."""
    layout = personal_layout(material)
    if layout:
        context.state.set_personal(material.model.task_id, encode_tensors(tensors, layout))


def residual_tensors(context: Context, material: Material) -> dict[str, FloatArray] | None:
    """What the task's last update from here left out, if updates are sparse."""
    stored = context.state.residual(material.model.task_id)
    if stored is None:
        return None
    try:
        return decode_tensors(stored, material.model.layout)
    except WireError as error:  # a task's layout never changes, so this is damage
        _log.warning("the residual of %s is unusable: %s", material.model.task_id, error)
        return None


def store_residual(context: Context, material: Material, tensors: dict[str, FloatArray] | None) -> None:
    """Keeps what an update left out, for the next one."""
    if tensors is not None:
        context.state.set_residual(material.model.task_id, encode_tensors(tensors, material.model.layout))


def _served_blobs(context: Context) -> Iterator[bytes]:
    """What ``predict`` needs; the rows were verified before they were stored."""
    for row in context.state.served():
        bundle, version = (task_pb2.SignedBlob.FromString(blob).payload for blob in (row.bundle, row.version))
        yield from blobs_of(task_pb2.TaskBundle.FromString(bundle), task_pb2.VersionManifest.FromString(version))
