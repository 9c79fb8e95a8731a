"""A signature stands for one call, one time, one purpose; everything else is refused with the reason."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from evensong.wire import (
    EnrolmentToken,
    SignatureError,
    device_id_of,
    new_request_id,
    parse_caller,
    public_key_of,
    sign_blob,
    sign_request,
    verify_blob,
    verify_request,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes([1] * 32))
PUBLIC = public_key_of(KEY)
METHOD = "/evensong.v1.DeviceService/CheckIn"
NOW = 1_795_392_000_000

Pair = tuple[str, str | bytes]


def signed(body: bytes = b"body") -> list[Pair]:
    return sign_request(KEY, METHOD, body, NOW)


@given(st.binary(max_size=50), st.integers(-300_000, 300_000))
def test_a_signed_request_verifies_within_the_tolerance(body: bytes, drift: int) -> None:
    caller = verify_request(signed(body), METHOD, body, PUBLIC, NOW + drift)
    assert caller.device_id == device_id_of(PUBLIC)
    assert caller.unix_ms == NOW


def test_other_metadata_is_left_alone() -> None:
    verify_request([("user-agent", "grpc"), *signed(), ("x-bin", b"1")], METHOD, b"body", PUBLIC, NOW)


@pytest.mark.parametrize("drift", [-300_001, 300_001])
def test_a_request_from_another_time_is_refused(drift: int) -> None:
    with pytest.raises(SignatureError, match="clock"):
        verify_request(signed(), METHOD, b"body", PUBLIC, NOW + drift)


def test_a_signature_is_bound_to_method_body_time_and_key() -> None:
    with pytest.raises(SignatureError, match="does not verify"):
        verify_request(signed(), "/evensong.v1.DeviceService/Abort", b"body", PUBLIC, NOW)
    with pytest.raises(SignatureError, match="does not verify"):
        verify_request(signed(), METHOD, b"bodY", PUBLIC, NOW)
    later = [(k, str(NOW + 1) if k == "evensong-time" else v) for k, v in signed()]
    with pytest.raises(SignatureError, match="does not verify"):
        verify_request(later, METHOD, b"body", PUBLIC, NOW)
    with pytest.raises(SignatureError, match="another device"):
        verify_request(signed(), METHOD, b"body", public_key_of(OTHER), NOW)


@given(st.integers(0, 511))
def test_every_flipped_bit_of_a_signature_is_refused(bit: int) -> None:
    *claims, (key, signature) = signed()
    assert isinstance(signature, bytes)
    damaged = bytearray(signature)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureError):
        verify_request([*claims, (key, bytes(damaged))], METHOD, b"body", PUBLIC, NOW)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evensong-device", None),
        ("evensong-device", "0" * 31),
        ("evensong-device", "G" * 32),
        ("evensong-device", b"0" * 32),
        ("evensong-time", None),
        ("evensong-time", "-1"),
        ("evensong-time", "9" * 30),
        ("evensong-time", "1e3"),
        ("evensong-signature-bin", None),
        ("evensong-signature-bin", b"short"),
        ("evensong-signature-bin", "text"),
    ],
)
def test_missing_or_malformed_claims_are_named(key: str, value: str | bytes | None) -> None:
    metadata: list[Pair] = [(k, v) for k, v in signed() if k != key]
    if value is not None:
        metadata.append((key, value))
    with pytest.raises(SignatureError, match=key):
        parse_caller(metadata)


def test_a_repeated_claim_is_refused() -> None:
    with pytest.raises(SignatureError, match="two values of evensong-device"):
        parse_caller([*signed(), signed()[0]])


def test_a_blob_is_bound_to_kind_payload_and_key() -> None:
    blob = sign_blob("bundle", b"payload", KEY)
    assert verify_blob("bundle", blob, PUBLIC) == b"payload"
    with pytest.raises(SignatureError, match="does not verify"):
        verify_blob("version", blob, PUBLIC)
    with pytest.raises(SignatureError, match="another key"):
        verify_blob("bundle", blob, public_key_of(OTHER))
    blob.payload = b"Payload"
    with pytest.raises(SignatureError, match="does not verify"):
        verify_blob("bundle", blob, PUBLIC)


@pytest.mark.parametrize("signature", [b"", b"short", bytes(64), bytes(65)])
def test_a_malformed_blob_signature_is_refused(signature: bytes) -> None:
    blob = sign_blob("bundle", b"payload", KEY)
    blob.signature = signature
    with pytest.raises(SignatureError):
        verify_blob("bundle", blob, PUBLIC)


@pytest.mark.parametrize("public_key", [b"", b"short", bytes(33)])
def test_a_malformed_public_key_is_refused(public_key: bytes) -> None:
    blob = sign_blob("bundle", b"payload", KEY)
    blob.public_key = public_key
    with pytest.raises(SignatureError):
        verify_blob("bundle", blob, public_key)


def test_tokens_round_trip_and_name_their_coordinator() -> None:
    token = EnrolmentToken.create(PUBLIC)
    assert EnrolmentToken.parse(f" {token}\n") == token
    assert len({EnrolmentToken.create(PUBLIC).secret for _ in range(10)}) == 10
    token.check_signer(PUBLIC)
    with pytest.raises(SignatureError, match="not the one that made the token"):
        token.check_signer(public_key_of(OTHER))


def test_a_token_never_shows_its_secret_by_accident() -> None:
    token = EnrolmentToken.create(PUBLIC)
    assert token.secret not in repr(token)
    with pytest.raises(SignatureError) as error:
        EnrolmentToken.parse(f"{token}x")
    assert token.secret not in str(error.value)


@given(st.text(max_size=100))
def test_other_text_is_no_token(text: str) -> None:
    with pytest.raises(SignatureError):
        EnrolmentToken.parse(text)


def test_request_ids_are_fresh() -> None:
    assert len({new_request_id() for _ in range(100)}) == 100
    assert len(new_request_id()) == 16
