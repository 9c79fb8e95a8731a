"""The committed golden vectors, read as another language would read them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.v1 import common_pb2, task_pb2
from evensong.wire import (
    EnrolmentToken,
    RotatedCodec,
    TensorSpec,
    TopKCodec,
    UpdateCodec,
    WireError,
    check_chunk,
    crc32c,
    decode_tensors,
    device_id_of,
    encode_tensors,
    public_key_of,
    sha256,
    sign_blob,
    sign_request,
    verify_blob,
    verify_request,
)
from evensong.wire.download import apply_download, download_words, encode_download
from evensong.wire.rotation import rotate, unrotate

FOLDER = Path(__file__).parents[2] / "protos" / "vectors"


def load(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


def read_tensors(entries: list[dict[str, Any]]) -> tuple[tuple[TensorSpec, ...], dict[str, npt.NDArray[np.float32]]]:
    layout = tuple(TensorSpec(entry["name"], tuple(entry["shape"])) for entry in entries)
    return layout, {e["name"]: np.array(e["values"], np.float32).reshape(e["shape"]) for e in entries}


@pytest.mark.parametrize("name", ["tensors", "codecs", "chunks", "signing"])
def test_the_files_are_what_their_maker_writes(name: str) -> None:
    maker = runpy.run_path(str(Path(__file__).with_name("make_wire_vectors.py")))
    assert (FOLDER / f"{name}.json").read_text() == maker["to_json"](maker["build"]()[name])


def test_tensors() -> None:
    vector = load("tensors")
    layout, tensors = read_tensors(vector["tensors"])
    encoded = bytes.fromhex(vector["encoded"])
    assert encode_tensors(tensors, layout) == encoded
    decoded = decode_tensors(encoded, layout)
    assert all((decoded[name] == tensors[name]).all() for name in tensors)
    for invalid in vector["invalid"]:
        with pytest.raises(WireError):
            decode_tensors(bytes.fromhex(invalid["encoded"]), layout)


@pytest.mark.parametrize("case", load("codecs")["cases"], ids=lambda case: f"{case['bits']}-{case['block_size']}")
def test_codecs(case: dict[str, Any]) -> None:
    vector = load("codecs")
    layout, tensors = read_tensors(vector["tensors"])
    words = np.array(vector["words"], np.uint32)
    codec = UpdateCodec(case["bits"], case["block_size"])
    taken = 0

    def next_words(count: int) -> npt.NDArray[np.uint32]:
        nonlocal taken
        taken += count
        return words[taken - count : taken]

    encoded = bytes.fromhex(case["encoded"])
    assert codec.encode_with(tensors, layout, next_words) == encoded
    decoded = codec.decode(encoded, layout)
    flat = np.concatenate([decoded[spec.name].reshape(-1) for spec in layout])
    assert flat.astype("<f4").tobytes().hex() == case["decoded_f32"]


@pytest.mark.parametrize("case", load("codecs")["rotations"], ids=lambda case: str(len(case["values"])))
def test_rotations(case: dict[str, Any]) -> None:
    values, seed = np.array(case["values"], np.float32), bytes.fromhex(case["seed"])
    rotated = rotate(values, seed)
    assert rotated.astype("<f4").tobytes().hex() == case["rotated_f32"]
    assert (unrotate(rotated, seed) == values).all()


@pytest.mark.parametrize("kind", ["rotated", "sparse"])
def test_flat_codecs(kind: str) -> None:
    vector = load("codecs")
    layout, tensors = read_tensors(vector[kind]["tensors"])
    words = np.array(vector["words"], np.uint32)
    for case in vector[kind]["cases"]:
        codec = RotatedCodec(case["bits"]) if kind == "rotated" else TopKCodec(case["keep_fraction"], case["bits"])
        encoded = bytes.fromhex(case["encoded"])
        assert codec.encode_with(tensors, layout, lambda count: words[:count]) == encoded
        decoded = codec.decode(encoded, layout)
        flat = np.concatenate([decoded[spec.name].reshape(-1) for spec in layout])
        assert flat.astype("<f4").tobytes().hex() == case["decoded_f32"]


def test_downloads() -> None:
    vector = load("codecs")
    layout, _ = read_tensors(vector["tensors"])
    parent, target = (decode_tensors(bytes.fromhex(vector["download"][name]), layout) for name in ("parent", "target"))
    assert download_words(bytes(range(32)), 7)(4).tolist() == vector["download"]["first_words"]
    for case in vector["download"]["cases"]:
        taken = iter(vector["words"])
        version, difference = encode_download(
            parent,
            target,
            layout,
            case["bits"],
            lambda count, taken=taken: np.array([next(taken) for _ in range(count)], np.uint32),
        )
        assert difference.hex() == case["difference"]
        applied = apply_download(parent, difference, layout, case["bits"])
        assert encode_tensors(applied, layout) == encode_tensors(version, layout) == bytes.fromhex(case["version"])


def test_chunks() -> None:
    vector = load("chunks")
    for entry in vector["crc32c"]:
        assert crc32c(bytes.fromhex(entry["data"])) == entry["crc32c"]
    assert crc32c(b"123456789") == 0xE3069283  # the check value of every CRC catalogue
    blob, received = bytes.fromhex(vector["blob"]), bytearray()
    for entry in vector["chunks"]:
        data = blob[entry["offset"] : entry["offset"] + entry["bytes"]]
        chunk = common_pb2.BlobChunk(offset=entry["offset"], data=data, crc32c=entry["crc32c"])
        received += check_chunk(chunk, len(received), len(blob), vector["chunk_bytes"])  # type: ignore[arg-type]
    assert received == blob
    assert sha256(received).hex() == vector["sha256"]


def test_signing() -> None:
    vector = load("signing")
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vector["private_seed"]))
    public_key = public_key_of(key)
    assert public_key.hex() == vector["public_key"]
    assert device_id_of(public_key) == vector["device_id"]

    request = vector["request"]
    body, unix_ms = bytes.fromhex(request["body"]), request["unix_ms"]
    metadata: list[tuple[str, str | bytes]] = [
        ("evensong-device", request["evensong-device"]),
        ("evensong-time", request["evensong-time"]),
        ("evensong-signature-bin", bytes.fromhex(request["evensong-signature-bin"])),
    ]
    assert sign_request(key, request["method"], body, unix_ms) == metadata
    assert verify_request(metadata, request["method"], body, public_key, unix_ms).device_id == vector["device_id"]

    for blob in vector["blobs"]:
        payload, signature = bytes.fromhex(blob["payload"]), bytes.fromhex(blob["signature"])
        assert sign_blob(blob["kind"], payload, key).signature == signature
        signed = task_pb2.SignedBlob(payload=payload, signature=signature, public_key=public_key)
        assert verify_blob(blob["kind"], signed, public_key) == payload

    token = EnrolmentToken.parse(vector["token"]["text"])
    assert (token.token_id, token.secret, token.fingerprint) == tuple(
        vector["token"][name] for name in ("token_id", "secret", "fingerprint")
    )
    assert token.secret_hash().hex() == vector["token"]["secret_sha256"]
    token.check_signer(public_key)
