"""How it is packed: the bytes of artifacts, parameters, updates and chunks, and the signatures on them.

The names below are the public ones. ``docs/wire.md`` tells the formats and ``protos/vectors`` pins their bytes for
every language.
"""

from evensong.wire.artifact import artifact_hash, decode_artifact, encode_artifact
from evensong.wire.chunks import ALREADY_THERE, check_chunk, crc32c, sha256, split
from evensong.wire.clock import Clock, SystemClock
from evensong.wire.codec import Codec, codec_from_plan
from evensong.wire.codecs import UpdateCodec, clip_to_norm
from evensong.wire.errors import (
    ArtifactError,
    CorruptError,
    EvensongError,
    SignatureError,
    UnreachableError,
    UpdateError,
    WireError,
)
from evensong.wire.rotated import RotatedCodec
from evensong.wire.signing import (
    Caller,
    EnrolmentToken,
    device_id_of,
    new_request_id,
    parse_caller,
    public_key_of,
    sign_blob,
    sign_request,
    verify_blob,
    verify_request,
)
from evensong.wire.tensors import (
    Layout,
    TensorSpec,
    decode_tensors,
    encode_tensors,
    layout_from_proto,
    layout_of,
    layout_size,
    layout_to_proto,
)
from evensong.wire.top_k import TopKCodec
from evensong.wire.transport import Dispatcher, Transport

__all__ = [
    "ALREADY_THERE",
    "ArtifactError",
    "Caller",
    "Clock",
    "Codec",
    "CorruptError",
    "Dispatcher",
    "EnrolmentToken",
    "EvensongError",
    "Layout",
    "RotatedCodec",
    "SignatureError",
    "SystemClock",
    "TensorSpec",
    "TopKCodec",
    "Transport",
    "UnreachableError",
    "UpdateCodec",
    "UpdateError",
    "WireError",
    "artifact_hash",
    "check_chunk",
    "clip_to_norm",
    "codec_from_plan",
    "crc32c",
    "decode_artifact",
    "decode_tensors",
    "device_id_of",
    "encode_artifact",
    "encode_tensors",
    "layout_from_proto",
    "layout_of",
    "layout_size",
    "layout_to_proto",
    "new_request_id",
    "parse_caller",
    "public_key_of",
    "sha256",
    "sign_blob",
    "sign_request",
    "split",
    "verify_blob",
    "verify_request",
]
