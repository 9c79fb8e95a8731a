"""Writes the golden vectors of ``protos/vectors``; only for a new version of a format.

Run ``python tests/wire/make_wire_vectors.py``. ``protos/vectors/README.md`` explains the fields.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.wire import Codec, EnrolmentToken, RotatedCodec, TensorSpec, TopKCodec, UpdateCodec, crc32c, sha256, split
from evensong.wire.download import download_words, encode_download
from evensong.wire.rotation import rotate
from evensong.wire.signing import device_id_of, public_key_of, sign_blob, sign_request
from evensong.wire.tensors import Layout, encode_tensors

FOLDER = Path(__file__).parents[2] / "protos" / "vectors"

LAYOUT: Layout = (TensorSpec("body.weight", (3, 7)), TensorSpec("head.bias", (2,)), TensorSpec("größe", ()))


def main() -> None:
    for name, content in build().items():
        (FOLDER / f"{name}.json").write_text(to_json(content))


def build() -> dict[str, object]:
    """Every vector file's content by its name."""
    return {"tensors": _tensors(), "codecs": _codecs(), "chunks": _chunks(), "signing": _signing()}


def to_json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _values() -> dict[str, npt.NDArray[np.float32]]:
    """A dense tensor with both signs and a zero, one that is all positive, and a scalar."""
    weight = np.linspace(-1.25, 0.75, 21, dtype=np.float32).reshape(3, 7)
    weight[1] = 0
    return {
        "body.weight": weight,
        "head.bias": np.array([1 / 3, 2.5], np.float32),
        "größe": np.float32(-1e-3).reshape(()),
    }


def _described(values: dict[str, npt.NDArray[np.float32]]) -> list[dict[str, object]]:
    return [
        {"name": name, "shape": list(array.shape), "values": array.reshape(-1).astype(float).tolist()}
        for name, array in values.items()
    ]


def _tensors() -> object:
    encoded = encode_tensors(_values(), LAYOUT)
    damaged = bytearray(encoded)
    damaged[-1] ^= 1
    return {
        "tensors": _described(_values()),
        "encoded": encoded.hex(),
        "invalid": [
            {"why": "one bit of the last value is flipped", "encoded": damaged.hex()},
            {"why": "the last byte is missing", "encoded": encoded[:-1].hex()},
            {"why": "a byte follows the last value", "encoded": (encoded + b"\0").hex()},
            {"why": "the order is not the layout's", "encoded": encode_tensors(_values(), LAYOUT[::-1]).hex()},
            {"why": "a tensor is missing", "encoded": encode_tensors({"größe": 0.0}, LAYOUT[2:]).hex()},
        ],
    }


def _codecs() -> object:
    words = np.random.default_rng(20261123).integers(0, 1 << 32, 24, dtype=np.uint32)
    cases = []
    for bits in (None, 1, 2, 3, 4, 8, 12, 16):
        for block_size in (0, 8) if bits else (0,):
            codec = UpdateCodec(bits, block_size)
            left = iter(words)
            encoded = codec.encode_with(
                _values(), LAYOUT, lambda count, left=left: np.array([next(left) for _ in range(count)], np.uint32)
            )
            decoded = codec.decode(encoded, LAYOUT)
            flat = np.concatenate([decoded[spec.name].reshape(-1) for spec in LAYOUT])
            cases.append(
                {
                    "bits": bits,
                    "block_size": block_size,
                    "encoded": encoded.hex(),
                    "decoded_f32": flat.astype("<f4").tobytes().hex(),
                }
            )
    return {
        "tensors": _described(_values()),
        "words": words.tolist(),
        "cases": cases,
        "rotations": _rotations(),
        "rotated": _flat_cases([RotatedCodec(bits) for bits in (1, 2, 3, 4)], words),
        "sparse": _flat_cases([TopKCodec(0.2), TopKCodec(0.5), TopKCodec(0.2, None)], words),
        "download": _download(words),
    }


def _short_values(size: int) -> npt.NDArray[np.float32]:
    """Multiples of 1/8: sums of them are exact in float32, so that every machine rotates them to the same bits."""
    return ((np.arange(size) * 37 % 61 - 30) / 8).astype(np.float32)


def _rotations() -> object:
    """Sizes whose window is a power of four, so that its square root is exact too; windows alone and overlapping."""
    return [
        {
            "seed": seed.hex(),
            "values": _short_values(size).astype(float).tolist(),
            "rotated_f32": rotate(_short_values(size), seed).astype("<f4").tobytes().hex(),
        }
        for size in (1, 4, 5, 7, 16, 24, 31, 64, 100)
        for seed in (bytes(16), bytes(range(16)))
    ]


def _flat_cases(codecs: list[Codec], words: npt.NDArray[np.uint32]) -> object:
    layout = (TensorSpec("body", (5, 4)), TensorSpec("bias", (4,)))
    values = _short_values(24)
    tensors = {"body": values[:20].reshape(5, 4), "bias": values[20:]}
    cases = []
    for codec in codecs:
        encoded = codec.encode_with(tensors, layout, lambda count: words[:count])
        decoded = codec.decode(encoded, layout)
        flat = np.concatenate([decoded[spec.name].reshape(-1) for spec in layout])
        cases.append(
            {
                "bits": codec.bits,
                **({"keep_fraction": codec.keep_fraction} if isinstance(codec, TopKCodec) else {}),
                "encoded": encoded.hex(),
                "decoded_f32": flat.astype("<f4").tobytes().hex(),
            }
        )
    return {"tensors": _described(tensors), "cases": cases}


def _download(words: npt.NDArray[np.uint32]) -> object:
    parent = _values()
    target = {name: array + np.float32(0.25) * array**2 for name, array in parent.items()}
    cases = []
    for bits in (2, 4, 5):  # where Huffman codes do not pay: libraries differ in theirs
        left = iter(words)
        version, difference = encode_download(
            parent,
            target,
            LAYOUT,
            bits,
            lambda count, left=left: np.array([next(left) for _ in range(count)], np.uint32),
        )
        cases.append({"bits": bits, "difference": difference.hex(), "version": encode_tensors(version, LAYOUT).hex()})
    return {
        "parent": encode_tensors(parent, LAYOUT).hex(),
        "target": encode_tensors(target, LAYOUT).hex(),
        "first_words": download_words(bytes(range(32)), 7)(4).tolist(),
        "cases": cases,
    }


def _chunks() -> object:
    blob = bytes(range(256)) * 4 + b"evensong"
    return {
        "crc32c": [
            {"data": data.hex(), "crc32c": crc32c(data)}
            for data in (b"", b"123456789", bytes(32), b"\xff" * 32, bytes(range(32)))
        ],
        "blob": blob.hex(),
        "sha256": sha256(blob).hex(),
        "chunk_bytes": 500,
        "chunks": [{"offset": c.offset, "bytes": len(c.data), "crc32c": c.crc32c} for c in split(blob, 500)],
    }


def _signing() -> object:
    seed = bytes(range(32))
    key = Ed25519PrivateKey.from_private_bytes(seed)
    public_key = public_key_of(key)
    method, body, unix_ms = "/evensong.v1.DeviceService/CheckIn", b"evensong", 1_795_392_000_000
    metadata = dict(sign_request(key, method, body, unix_ms))
    signature = metadata["evensong-signature-bin"]
    assert isinstance(signature, bytes)
    token = EnrolmentToken("0011223344556677", "A" * 42 + "_", sha256(public_key)[:8].hex())
    return {
        "private_seed": seed.hex(),
        "public_key": public_key.hex(),
        "device_id": device_id_of(public_key),
        "request": {
            "method": method,
            "body": body.hex(),
            "unix_ms": unix_ms,
            "evensong-device": metadata["evensong-device"],
            "evensong-time": metadata["evensong-time"],
            "evensong-signature-bin": signature.hex(),
        },
        "blobs": [
            {"kind": kind, "payload": body.hex(), "signature": sign_blob(kind, body, key).signature.hex()}
            for kind in ("bundle", "version")
        ],
        "token": {
            "text": str(token),
            "token_id": token.token_id,
            "secret": token.secret,
            "secret_sha256": token.secret_hash().hex(),
            "fingerprint": token.fingerprint,
        },
    }


if __name__ == "__main__":
    main()
