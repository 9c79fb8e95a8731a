"""Step 2 of a round, ``task``: blobs by content address, resumed where a connection broke, verified before use."""

from __future__ import annotations

from contextlib import aclosing

from evensong.client.callbacks import Downloaded
from evensong.client.calls import raise_refusal
from evensong.client.context import Context
from evensong.client.errors import UnfitError, UntrustedError
from evensong.v1 import common_pb2, device_pb2
from evensong.wire.chunks import crc32c
from evensong.wire.errors import CorruptError, UnreachableError


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
