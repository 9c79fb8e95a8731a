"""Step 5 of a round: the sealed update in chunks, resumed where a connection or the process broke, committed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from evensong.client.calls import raise_refusal
from evensong.client.context import Context
from evensong.client.errors import RefusedError
from evensong.client.state import Stage, Work
from evensong.v1 import common_pb2, device_pb2, secagg_pb2
from evensong.wire.chunks import sha256, split
from evensong.wire.errors import UnreachableError

_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 1 << 10, 4 << 20
_PATIENCE = 8  # answers in a row that bring nothing forward

#: Takes down how far the upload is: stage, id of the request that begins it, name of the upload.
_Keep = Callable[[Context, Work, Stage, bytes, str], Work]

#: The coordinator has lost the upload, or part of it: it is opened anew.
_LOST = (common_pb2.REFUSAL_REASON_NOT_FOUND, common_pb2.REFUSAL_REASON_BAD_CHUNK)


async def upload(
    context: Context, work: Work, lease: common_pb2.Lease, *, masked: secagg_pb2.SecureMasked | None = None
) -> tuple[device_pb2.CommitUploadResponse, int]:
    """Sends ``work.update`` and commits it; also says how many of its bytes were sent this time.

    Every request id was stored before it is sent, so a repetition is recognised. ``masked`` is the last word on a
    vector for a secure sum, in place of weight and metrics; such work exists in this process only, and nothing of it is
    stored. Raises :class:`RefusedError` and :class:`UnreachableError`; after either, calling again goes on from what
    the coordinator has.
    """
    keep = _store if masked is None else _only_here
    sent = 0
    for _ in range(_PATIENCE):
        try:
            if work.stage != Stage.UPLOADED:
                work, count = await _send(context, work, lease, keep)
                sent += count
            return await _commit(context, work, lease, masked), sent
        except RefusedError as error:
            if error.reason not in _LOST:
                raise
        work = keep(context, work, Stage.SEALED, context.randomness.token(16), "")
    raise UnreachableError("the coordinator keeps losing the upload")


async def _send(context: Context, work: Work, lease: common_pb2.Lease, keep: _Keep) -> tuple[Work, int]:
    """Opens the upload and sends what is missing; the work is UPLOADED then."""
    data = work.update or b""
    begun = await context.calls.begin_upload(
        device_pb2.BeginUploadRequest(
            request_id=work.begin_request_id,
            lease=lease,
            update=common_pb2.BlobRef(sha256=sha256(data), size_bytes=len(data)),
        )
    )
    if not 1 <= len(begun.upload_id) <= 256:
        raise UnreachableError("the coordinator opened an upload without a usable name")
    chunk_bytes = min(max(begun.chunk_bytes, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES)
    received = _checked(begun.received_bytes, data)
    sent = fruitless = 0
    while received < len(data):
        chunk = next(split(data, chunk_bytes, received))
        answer = await context.calls.upload_chunk(
            device_pb2.UploadChunkRequest(upload_id=begun.upload_id, lease=lease, chunk=chunk)
        )
        if answer.refusal.reason != common_pb2.REFUSAL_REASON_BAD_CHUNK:  # it says itself where to go on
            raise_refusal(answer)
        sent += len(chunk.data)
        fruitless = 0 if answer.received_bytes > received else fruitless + 1
        if fruitless == _PATIENCE:
            raise UnreachableError("the coordinator takes no chunk", got=f"{received} of {len(data)} bytes received")
        received = _checked(answer.received_bytes, data)
    return keep(context, work, Stage.UPLOADED, work.begin_request_id, begun.upload_id), sent


async def _commit(
    context: Context, work: Work, lease: common_pb2.Lease, masked: secagg_pb2.SecureMasked | None
) -> device_pb2.CommitUploadResponse:
    return await context.calls.commit_upload(
        device_pb2.CommitUploadRequest(
            request_id=work.request_id,
            upload_id=work.upload_id,
            lease=lease,
            weight=work.weight,
            metrics=None if masked else common_pb2.Metrics.FromString(work.metrics),
            within_clip_norm=work.within,
            masked=masked,
        )
    )


def _store(context: Context, work: Work, stage: Stage, begin_request_id: bytes, upload_id: str) -> Work:
    return context.state.set_upload(work, stage, begin_request_id=begin_request_id, upload_id=upload_id)


def _only_here(context: Context, work: Work, stage: Stage, begin_request_id: bytes, upload_id: str) -> Work:
    return replace(work, stage=stage, begin_request_id=begin_request_id, upload_id=upload_id)


def _checked(received: int, data: bytes) -> int:
    if received > len(data):
        raise UnreachableError(
            "the coordinator claims more than was sent", expected=f"at most {len(data)} bytes", got=received
        )
    return received
