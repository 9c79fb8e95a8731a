from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RefusalReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_REASON_UNSPECIFIED: _ClassVar[RefusalReason]
    REFUSAL_REASON_TOO_LATE: _ClassVar[RefusalReason]
    REFUSAL_REASON_STALE: _ClassVar[RefusalReason]
    REFUSAL_REASON_NOT_NEEDED: _ClassVar[RefusalReason]
    REFUSAL_REASON_LEASE_EXPIRED: _ClassVar[RefusalReason]
    REFUSAL_REASON_INVALID_UPDATE: _ClassVar[RefusalReason]
    REFUSAL_REASON_INELIGIBLE: _ClassVar[RefusalReason]
    REFUSAL_REASON_UNKNOWN_DEVICE: _ClassVar[RefusalReason]
    REFUSAL_REASON_BAD_TOKEN: _ClassVar[RefusalReason]
    REFUSAL_REASON_BAD_SIGNATURE: _ClassVar[RefusalReason]
    REFUSAL_REASON_REPLAY: _ClassVar[RefusalReason]
    REFUSAL_REASON_BAD_CHUNK: _ClassVar[RefusalReason]
    REFUSAL_REASON_NOT_FOUND: _ClassVar[RefusalReason]
    REFUSAL_REASON_INVALID_REQUEST: _ClassVar[RefusalReason]
    REFUSAL_REASON_UNAVAILABLE: _ClassVar[RefusalReason]
    REFUSAL_REASON_QUOTA: _ClassVar[RefusalReason]
    REFUSAL_REASON_ALREADY_REPORTED: _ClassVar[RefusalReason]
REFUSAL_REASON_UNSPECIFIED: RefusalReason
REFUSAL_REASON_TOO_LATE: RefusalReason
REFUSAL_REASON_STALE: RefusalReason
REFUSAL_REASON_NOT_NEEDED: RefusalReason
REFUSAL_REASON_LEASE_EXPIRED: RefusalReason
REFUSAL_REASON_INVALID_UPDATE: RefusalReason
REFUSAL_REASON_INELIGIBLE: RefusalReason
REFUSAL_REASON_UNKNOWN_DEVICE: RefusalReason
REFUSAL_REASON_BAD_TOKEN: RefusalReason
REFUSAL_REASON_BAD_SIGNATURE: RefusalReason
REFUSAL_REASON_REPLAY: RefusalReason
REFUSAL_REASON_BAD_CHUNK: RefusalReason
REFUSAL_REASON_NOT_FOUND: RefusalReason
REFUSAL_REASON_INVALID_REQUEST: RefusalReason
REFUSAL_REASON_UNAVAILABLE: RefusalReason
REFUSAL_REASON_QUOTA: RefusalReason
REFUSAL_REASON_ALREADY_REPORTED: RefusalReason

class RetryWindow(_message.Message):
    __slots__ = ("earliest_ms", "latest_ms")
    EARLIEST_MS_FIELD_NUMBER: _ClassVar[int]
    LATEST_MS_FIELD_NUMBER: _ClassVar[int]
    earliest_ms: int
    latest_ms: int
    def __init__(self, earliest_ms: _Optional[int] = ..., latest_ms: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: RefusalReason
    message: str
    def __init__(self, reason: _Optional[_Union[RefusalReason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class BlobRef(_message.Message):
    __slots__ = ("sha256", "size_bytes")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    size_bytes: int
    def __init__(self, sha256: _Optional[bytes] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class BlobChunk(_message.Message):
    __slots__ = ("offset", "data", "crc32c")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    crc32c: int
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("lease_id", "fencing_token", "expires_unix_ms")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    fencing_token: int
    expires_unix_ms: int
    def __init__(self, lease_id: _Optional[str] = ..., fencing_token: _Optional[int] = ..., expires_unix_ms: _Optional[int] = ...) -> None: ...

class Metrics(_message.Message):
    __slots__ = ("examples", "loss_sum", "correct")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    CORRECT_FIELD_NUMBER: _ClassVar[int]
    examples: int
    loss_sum: float
    correct: int
    def __init__(self, examples: _Optional[int] = ..., loss_sum: _Optional[float] = ..., correct: _Optional[int] = ...) -> None: ...
