"""Step 2 of a round, ``task``: blobs by content address, resumed where a connection broke, verified before use."""

from __future__ import annotations

import logging
from contextlib import aclosing

from evensong.client.callbacks import Downloaded
from evensong.client.calls import raise_refusal
from evensong.client.context import Context
from evensong.client.errors import RefusedError, UnfitError, UntrustedError
from evensong.client.trust import TrustedModel
from evensong.v1 import common_pb2, device_pb2
from evensong.wire.chunks import crc32c, sha256
from evensong.wire.download import apply_download
from evensong.wire.errors import CorruptError, UnreachableError, WireError
from evensong.wire.tensors import decode_tensors, encode_tensors

_log = logging.getLogger("evensong.client")


async def fetch(context: Context, blob: common_pb2.BlobRef, what: str) -> bytes:
    """The blob, from the cache or from the coordinator; what arrived before a failure is kept for the next try.

    Raises :class:`UntrustedError` if the coordinator sends other bytes than the signed hash names, RefusedError if it
    does not have the blob, and UnreachableError if the connection broke or a chunk was damaged on the way.
    """
    data = context.cache.get(blob.sha256)
    if data is None:
        data = await _download(context, blob, what)
    if len(data) != blob.size_bytes:
        raise UntrustedError(f"the {what} has another size than it should", expected=blob.size_bytes, got=len(data))
    return data


async def fetch_parameters(context: Context, model: TrustedModel) -> bytes:
    """The version's parameters: from the cache, by the difference to a parent that is there, or whole.

    A difference is only a shorter way to bytes whose hash is signed: one that is not there, damaged, or leads elsewhere
    is a reason to fetch the whole, and no more. Raises what :func:`fetch` raises.
    """
    version = model.version
    wanted, parent = version.parameters, version.parent_parameters_sha256
    if version.HasField("delta") and not context.cache.has(wanted.sha256) and context.cache.has(parent):
        try:
            difference = await fetch(context, version.delta, "difference to the version before")
            _keep(context, wanted, _apply(context, model, difference))
        except (WireError, UntrustedError, RefusedError) as error:
            if isinstance(error, RefusedError) and error.is_passing:
                raise
            _log.info("version %s of %s is fetched whole: %s", version.number, model.task_id, error)
    return await fetch(context, wanted, "parameters")


def _apply(context: Context, model: TrustedModel, difference: bytes) -> bytes:
    before = context.cache.get(model.version.parent_parameters_sha256)
    if before is None:
        raise CorruptError("the version before was damaged in the cache")
    parent = decode_tensors(before, model.layout)
    after = apply_download(parent, difference, model.layout, model.bundle.update.download_bits)
    return encode_tensors(after, model.layout)


def _keep(context: Context, blob: common_pb2.BlobRef, data: bytes) -> None:
    """Puts into the cache what was made here instead of fetched; :class:`UntrustedError` if it is not that blob."""
    if sha256(data) != blob.sha256:
        raise UntrustedError("the difference leads to another version than the signed one")
    received = context.cache.received(blob.sha256)  # the whole may have begun to arrive
    context.cache.append(blob.sha256, received, data[received:])
    context.cache.finish(blob.sha256)


async def _download(context: Context, blob: common_pb2.BlobRef, what: str) -> bytes:
    if blob.size_bytes > context.limits.blob_bytes:
        raise UnfitError(
            f"the {what} is too large", expected=f"at most {context.limits.blob_bytes} bytes", got=blob.size_bytes
        )
    start = context.cache.received(blob.sha256)
    received = start
    if received < blob.size_bytes:
        request = device_pb2.DownloadRequest(sha256=blob.sha256, offset=received)
        async with aclosing(context.calls.download(request)) as answers:
            async for answer in answers:
                raise_refusal(answer)
                _check(answer, received, blob, what)
                context.cache.append(blob.sha256, received, answer.chunk.data)
                received += len(answer.chunk.data)
                if received == blob.size_bytes:
                    break
    if received < blob.size_bytes:
        raise UnreachableError(f"the download of the {what} ended early", expected=blob.size_bytes, got=received)
    try:
        data = context.cache.finish(blob.sha256)
    except CorruptError as error:
        raise UntrustedError(f"the coordinator sent another {what} than the signed one", got=error) from error
    context.callbacks.emit(Downloaded(what, received - start))
    return data


def _check(answer: device_pb2.DownloadResponse, received: int, blob: common_pb2.BlobRef, what: str) -> None:
    chunk = answer.chunk
    if answer.total_bytes != blob.size_bytes:
        raise UntrustedError(
            f"the {what} has another size than it should", expected=blob.size_bytes, got=answer.total_bytes
        )
    if chunk.offset != received or not chunk.data or len(chunk.data) > blob.size_bytes - received:
        raise UntrustedError(
            f"a chunk of the {what} does not fit",
            expected=f"offset {received}",
            got=f"{chunk.offset}+{len(chunk.data)}",
        )
    if crc32c(chunk.data) != chunk.crc32c:
        raise UnreachableError(f"a chunk of the {what} was damaged on the way", fix="It is fetched again.")
