from evensong.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SecureOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SECURE_OUTCOME_UNSPECIFIED: _ClassVar[SecureOutcome]
    SECURE_OUTCOME_DONE: _ClassVar[SecureOutcome]
    SECURE_OUTCOME_AGAIN: _ClassVar[SecureOutcome]
    SECURE_OUTCOME_ABORTED: _ClassVar[SecureOutcome]
SECURE_OUTCOME_UNSPECIFIED: SecureOutcome
SECURE_OUTCOME_DONE: SecureOutcome
SECURE_OUTCOME_AGAIN: SecureOutcome
SECURE_OUTCOME_ABORTED: SecureOutcome

class SecureRequest(_message.Message):
    __slots__ = ("lease", "attempt", "advertise", "shares", "masked", "commit", "unmask", "wait_ms")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ADVERTISE_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    UNMASK_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.Lease
    attempt: int
    advertise: SecureAdvertise
    shares: SecureShares
    masked: SecureWait
    commit: SecureCommit
    unmask: SecureUnmask
    wait_ms: int
    def __init__(self, lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., attempt: _Optional[int] = ..., advertise: _Optional[_Union[SecureAdvertise, _Mapping]] = ..., shares: _Optional[_Union[SecureShares, _Mapping]] = ..., masked: _Optional[_Union[SecureWait, _Mapping]] = ..., commit: _Optional[_Union[SecureCommit, _Mapping]] = ..., unmask: _Optional[_Union[SecureUnmask, _Mapping]] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class SecureResponse(_message.Message):
    __slots__ = ("refusal", "retry", "attempt", "roster", "delivery", "survivors", "quorum", "end")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    refusal: _common_pb2.Refusal
    retry: _common_pb2.RetryWindow
    attempt: int
    roster: SecureRoster
    delivery: SecureDelivery
    survivors: SecureSurvivors
    quorum: SecureQuorum
    end: SecureEnd
    def __init__(self, refusal: _Optional[_Union[_common_pb2.Refusal, _Mapping]] = ..., retry: _Optional[_Union[_common_pb2.RetryWindow, _Mapping]] = ..., attempt: _Optional[int] = ..., roster: _Optional[_Union[SecureRoster, _Mapping]] = ..., delivery: _Optional[_Union[SecureDelivery, _Mapping]] = ..., survivors: _Optional[_Union[SecureSurvivors, _Mapping]] = ..., quorum: _Optional[_Union[SecureQuorum, _Mapping]] = ..., end: _Optional[_Union[SecureEnd, _Mapping]] = ...) -> None: ...

class SecureAdvertise(_message.Message):
    __slots__ = ("channel_key", "mask_key", "nonce", "signature", "public_key", "certificate")
    CHANNEL_KEY_FIELD_NUMBER: _ClassVar[int]
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    channel_key: bytes
    mask_key: bytes
    nonce: bytes
    signature: bytes
    public_key: bytes
    certificate: bytes
    def __init__(self, channel_key: _Optional[bytes] = ..., mask_key: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class SecureRoster(_message.Message):
    __slots__ = ("members", "signature")
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[SecureAdvertise]
    signature: bytes
    def __init__(self, members: _Optional[_Iterable[_Union[SecureAdvertise, _Mapping]]] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SecureShares(_message.Message):
    __slots__ = ("ciphertexts", "seed_commitment")
    CIPHERTEXTS_FIELD_NUMBER: _ClassVar[int]
    SEED_COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    ciphertexts: bytes
    seed_commitment: bytes
    def __init__(self, ciphertexts: _Optional[bytes] = ..., seed_commitment: _Optional[bytes] = ...) -> None: ...

class SecureDelivery(_message.Message):
    __slots__ = ("sharers", "ciphertexts")
    SHARERS_FIELD_NUMBER: _ClassVar[int]
    CIPHERTEXTS_FIELD_NUMBER: _ClassVar[int]
    sharers: bytes
    ciphertexts: bytes
    def __init__(self, sharers: _Optional[bytes] = ..., ciphertexts: _Optional[bytes] = ...) -> None: ...

class SecureWait(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SecureMasked(_message.Message):
    __slots__ = ("signature", "complaints", "attempt")
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    COMPLAINTS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    signature: bytes
    complaints: _containers.RepeatedScalarFieldContainer[int]
    attempt: int
    def __init__(self, signature: _Optional[bytes] = ..., complaints: _Optional[_Iterable[int]] = ..., attempt: _Optional[int] = ...) -> None: ...

class SecureSurvivors(_message.Message):
    __slots__ = ("survivors", "neighbours")
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    survivors: bytes
    neighbours: bytes
    def __init__(self, survivors: _Optional[bytes] = ..., neighbours: _Optional[bytes] = ...) -> None: ...

class SecureCommit(_message.Message):
    __slots__ = ("signature",)
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    signature: bytes
    def __init__(self, signature: _Optional[bytes] = ...) -> None: ...

class SecureQuorum(_message.Message):
    __slots__ = ("survivors", "signers", "signatures")
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    SIGNERS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    survivors: bytes
    signers: bytes
    signatures: bytes
    def __init__(self, survivors: _Optional[bytes] = ..., signers: _Optional[bytes] = ..., signatures: _Optional[bytes] = ...) -> None: ...

class SecureUnmask(_message.Message):
    __slots__ = ("shares",)
    SHARES_FIELD_NUMBER: _ClassVar[int]
    shares: bytes
    def __init__(self, shares: _Optional[bytes] = ...) -> None: ...

class SecureEnd(_message.Message):
    __slots__ = ("outcome", "message")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    outcome: SecureOutcome
    message: str
    def __init__(self, outcome: _Optional[_Union[SecureOutcome, str]] = ..., message: _Optional[str] = ...) -> None: ...
