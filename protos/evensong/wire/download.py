"""New versions as differences: what a device that has the parent fetches instead of all parameters.

A version is *defined* as its parent plus the decoded difference, value by value in float32, so that both ways lead to
the very same bytes, and the manifest's hash of the parameters judges both. The difference travels as an update does, in
b bits a value (:class:`~evensong.wire.codecs.UpdateCodec` with blocks of 512), Huffman-coded where that is shorter.

The body after the frame (:mod:`evensong.wire.frame`, magic ``EVDL``, version 1): ``u8`` 1 if what follows is coded
(:mod:`evensong.wire.deflate`), three zero bytes, the encoded difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from evensong.wire.codecs import RandomWords, UpdateCodec
from evensong.wire.deflate import deflate_if_smaller, inflate
from evensong.wire.errors import CorruptError
from evensong.wire.frame import HEADER_BYTES, open_frame, seal
from evensong.wire.tensors import FloatArray, Layout, check_tensors

MAGIC = b"EVDL"
VERSION = 1

_BLOCK = 512
_LABEL = b"evensong/v1/download\0"

Parameters = Mapping[str, npt.ArrayLike]


def encode_download(
    parent: Parameters, target: Parameters, layout: Layout, bits: int, random_words: RandomWords
) -> tuple[dict[str, FloatArray], bytes]:
    """The parameters nearest to ``target`` that a difference to ``parent`` reaches, and that difference's bytes.

    Raises :class:`UpdateError` where the difference cannot be quantised.
    """
    before, after = check_tensors(parent, layout), check_tensors(target, layout)
    with np.errstate(over="ignore"):  # the codec refuses what is not finite
        difference = {spec.name: after[spec.name] - before[spec.name] for spec in layout}
    codec = UpdateCodec(bits, _BLOCK)
    encoded = codec.encode_with(difference, layout, random_words)
    is_coded, content = deflate_if_smaller(encoded)
    blob = seal(bytearray(bytes(HEADER_BYTES) + bytes([is_coded, 0, 0, 0]) + content), MAGIC, VERSION)
    return check_tensors(_add(before, codec.decode(encoded, layout), layout), layout), blob


def apply_download(parent: Parameters, data: bytes, layout: Layout, bits: int) -> dict[str, FloatArray]:
    """The version that ``data`` makes of its parent, to be encoded and checked against the version's hash.

    Raises :class:`CorruptError` for damaged bytes and :class:`UpdateError` for the difference of another task.
    """
    body = open_frame(data, MAGIC, VERSION, "a version's difference")
    if len(body) < 4 or body[0] > 1 or any(body[1:4]):
        raise CorruptError("the head of a version's difference is malformed")
    codec = UpdateCodec(bits, _BLOCK)
    encoded = inflate(body[4:], codec.encoded_bytes(layout)) if body[0] else body[4:]
    return _add(check_tensors(parent, layout), codec.decode(encoded, layout), layout)


def download_words(parent_manifest_sha256: bytes, round: int) -> RandomWords:
    """The words that round the version made by ``round`` from a parent: the same again after a crash.

    The AES-128-CTR keystream (initial block zero), as little-endian words, under the first 16 bytes of SHA-256 over the
    label, the hash and the round (u64).
    """
    key = hashlib.sha256(_LABEL + parent_manifest_sha256 + round.to_bytes(8, "little")).digest()[:16]
    keystream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(count: int) -> npt.NDArray[np.uint32]:
        return np.frombuffer(keystream.update(bytes(4 * count)), "<u4")

    return words


def _add(
    parent: Mapping[str, FloatArray], difference: Mapping[str, FloatArray], layout: Layout
) -> dict[str, FloatArray]:
    return {spec.name: parent[spec.name] + difference[spec.name] for spec in layout}
