"""Is what the coordinator sent genuine, and reasonable? Everything here is hostile until these checks have passed.

The chain: the key that was pinned at enrolment signs the bundle and the version; the version names the bundle by its
hash; the bundle names artifact and layout, the version its parameters, both by hash.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from evensong.client.context import Limits
from evensong.client.errors import UnfitError, UntrustedError
from evensong.secagg.errors import SecureError
from evensong.secagg.session import Policy
from evensong.secagg.vector import VectorPlan
from evensong.v1 import common_pb2, device_pb2, task_pb2
from evensong.wire.codec import codec_from_plan
from evensong.wire.errors import UpdateError, WireError
from evensong.wire.program import Artifact
from evensong.wire.signing import verify_blob
from evensong.wire.tensors import Layout, layout_from_proto, layout_of, layout_size

_MOST_RATE = 1e6
_FRAME_BYTES = 1 << 16  # what encoded parameters may weigh beyond their values: names and shapes


@dataclass(frozen=True)
class TrustedModel:
    """A verified bundle and version. ``layout`` lists the tensors that travel."""

    task_id: str
    bundle: task_pb2.TaskBundle
    version: task_pb2.VersionManifest
    version_sha256: bytes
    layout: Layout


def trust(
    bundle: task_pb2.SignedBlob,
    version: task_pb2.SignedBlob,
    *,
    task_id: str,
    signer: bytes,
    population: str,
    limits: Limits,
) -> TrustedModel:
    """Verifies signatures and the hash chain, and every number of the plan.

    Raises :class:`UntrustedError` for what no honest coordinator sends and :class:`UnfitError` for what is more than
    this device is willing to do.
    """
    try:
        plan = task_pb2.TaskBundle.FromString(verify_blob("bundle", bundle, signer))
        manifest = task_pb2.VersionManifest.FromString(verify_blob("version", version, signer))
        layout = layout_from_proto(plan.layout)
    except (WireError, DecodeError) as error:
        raise UntrustedError("the task does not verify", got=error) from error
    _expect(manifest.bundle_sha256 == hashlib.sha256(bundle.payload).digest(), "the version belongs to another bundle")
    _expect(manifest.task_id == task_id, "the version belongs to another task")
    _expect(plan.population == population, "the task is meant for another population")
    _check_local_plan(plan.local)
    _check_update_plan(plan.update)
    _check_secure(plan, manifest, limits)
    _check_size(plan.artifact, limits)
    _check_size(manifest.parameters, limits)
    _expect(
        manifest.parameters.size_bytes <= 4 * layout_size(layout) + len(layout) * 512 + _FRAME_BYTES,
        "the parameters are larger than their layout",
    )
    if manifest.HasField("delta"):
        _check_size(manifest.delta, limits)
        _expect(plan.update.download_bits > 0, "the task has no differences")
        _expect(manifest.delta.size_bytes <= manifest.parameters.size_bytes, "a difference is larger than the whole")
        _expect(len(manifest.parent_parameters_sha256) == 32, "the parent's address has the wrong length")
    if len(layout) > limits.tensors:
        raise UnfitError("the task has too many tensors", expected=f"at most {limits.tensors}", got=len(layout))
    return TrustedModel(task_id, plan, manifest, hashlib.sha256(version.payload).digest(), layout)


def check_artifact(artifact: Artifact, model: TrustedModel) -> None:
    """The artifact must have exactly the tensors that the signed layout says, besides the personal ones."""
    actual = layout_of(artifact.variables, list(model.bundle.local.personal))
    _expect(actual == model.layout, "the layout is not that of the artifact")


def check_training_fits(artifact: Artifact, model: TrustedModel, memory_bytes: int) -> None:
    """UnfitError unless the device is willing to give the memory that training takes."""
    needed = training_bytes(artifact)
    if needed > memory_bytes:
        raise UnfitError(
            f"training {model.bundle.name!r} takes too much memory",
            expected=f"at most {memory_bytes} bytes",
            got=f"{needed} bytes",
            fix="Raise memory_bytes, or compile the model with a smaller batch or a frozen body.",
        )


def training_bytes(artifact: Artifact) -> int:
    """State, slots, arena and workspace together, of the program ``train``; UnfitError if there is none."""
    for program in artifact.programs:
        if program.name == "train":
            return len(artifact.state) + artifact.slot_bytes + program.arena_bytes + program.workspace_bytes
    raise UnfitError("the artifact has no training program", fix="Compile it with a loss.")


def _check_local_plan(plan: task_pb2.LocalPlan) -> None:
    _expect(1 <= plan.epochs <= 10_000, "epochs out of range", plan.epochs)
    _expect(_is_rate(plan.learning_rate) and plan.learning_rate > 0, "learning rate out of range", plan.learning_rate)
    _expect(_is_rate(plan.final_learning_rate), "final learning rate out of range", plan.final_learning_rate)
    _expect(len(plan.personal) <= 1000, "too many personal patterns", len(plan.personal))
    personalization = plan.personalization
    _expect(personalization.epochs <= 10_000, "personalization epochs out of range", personalization.epochs)
    _expect(_is_rate(personalization.learning_rate), "personalization rate out of range", personalization.learning_rate)


def _check_update_plan(plan: task_pb2.UpdatePlan) -> None:
    if plan.codec != task_pb2.CODEC_FIELDS:
        try:
            codec_from_plan(plan)
        except UpdateError as error:
            raise UntrustedError("the task does not verify", got=error) from error
    _expect(plan.download_bits == 0 or 2 <= plan.download_bits <= 8, "download bits", plan.download_bits)
    _expect(math.isfinite(plan.clip_norm) and plan.clip_norm >= 0, "clip norm out of range", plan.clip_norm)
    weightings = (task_pb2.WEIGHTING_EXAMPLES, task_pb2.WEIGHTING_UNIFORM)
    _expect(plan.weighting in weightings, "unknown weighting", plan.weighting)
    _expect(math.isfinite(plan.max_weight) and plan.max_weight > 0, "largest weight out of range", plan.max_weight)


def _check_secure(bundle: task_pb2.TaskBundle, version: task_pb2.VersionManifest, limits: Limits) -> None:
    """A sum that hides this device: of enough devices, with parameters that give security, bounded by a clip norm."""
    secure = bundle.HasField("secure")
    _expect((bundle.update.codec == task_pb2.CODEC_FIELDS) == secure, "the codec goes with a secure sum, or neither")
    _expect(math.isfinite(version.clip_norm) and version.clip_norm >= 0, "clip norm out of range", version.clip_norm)
    if not secure:
        return
    plan = bundle.secure
    _expect(0 <= plan.corrupted_share < 0.5, "corrupted share out of range", plan.corrupted_share)
    _expect(0 <= plan.dropout_share < 0.5, "drop-out share out of range", plan.dropout_share)
    _expect(plan.min_survivors <= plan.max_cohort <= 1_000_000, "cohort out of range", plan.max_cohort)
    _expect((version.clip_norm or bundle.update.clip_norm) > 0, "a secure sum without a clip norm")
    noise = bundle.privacy.noise_multiplier
    _expect(math.isfinite(noise) and noise >= 0, "noise multiplier out of range", noise)
    if plan.min_survivors < limits.least_survivors:
        raise UnfitError(
            "the task sums fewer devices than this one is willing to hide among",
            expected=f"min_survivors of at least {limits.least_survivors}",
            got=plan.min_survivors,
        )
    try:
        Policy.from_plan(plan).parameters(plan.max_cohort)
        VectorPlan.from_bundle(bundle, device_pb2.WORK_TRAIN)
    except (SecureError, UpdateError) as error:
        raise UntrustedError("the task does not verify: its secure sums cannot be", got=error) from error


def _check_size(blob: common_pb2.BlobRef, limits: Limits) -> None:
    _expect(
        len(blob.sha256) == hashlib.sha256().digest_size, "a content address has the wrong length", len(blob.sha256)
    )
    if blob.size_bytes > limits.blob_bytes:
        raise UnfitError("the task is too large", expected=f"at most {limits.blob_bytes} bytes", got=blob.size_bytes)


def _is_rate(value: float) -> bool:
    return math.isfinite(value) and 0 <= value <= _MOST_RATE


def _expect(holds: bool, what: str, got: object = None) -> None:
    if not holds:
        raise UntrustedError(f"the task does not verify: {what}", got=got)
