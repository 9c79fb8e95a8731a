from evensong.v1 import common_pb2 as _common_pb2
from evensong.v1 import secagg_pb2 as _secagg_pb2
from evensong.v1 import task_pb2 as _task_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Work(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORK_UNSPECIFIED: _ClassVar[Work]
    WORK_TRAIN: _ClassVar[Work]
    WORK_EVALUATE: _ClassVar[Work]

class AbortReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ABORT_REASON_UNSPECIFIED: _ClassVar[AbortReason]
    ABORT_REASON_CONDITIONS: _ClassVar[AbortReason]
    ABORT_REASON_DIVERGED: _ClassVar[AbortReason]
    ABORT_REASON_UNTRUSTED: _ClassVar[AbortReason]
    ABORT_REASON_UNFIT: _ClassVar[AbortReason]
    ABORT_REASON_INTERNAL: _ClassVar[AbortReason]
WORK_UNSPECIFIED: Work
WORK_TRAIN: Work
WORK_EVALUATE: Work
ABORT_REASON_UNSPECIFIED: AbortReason
ABORT_REASON_CONDITIONS: AbortReason
ABORT_REASON_DIVERGED: AbortReason
ABORT_REASON_UNTRUSTED: AbortReason
ABORT_REASON_UNFIT: AbortReason
ABORT_REASON_INTERNAL: AbortReason

class EnrolRequest(_message.Message):
    __slots__ = ("request_id", "token", "public_key", "population", "certificate")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    token: str
    public_key: bytes
    population: str
    certificate: bytes
    def __init__(self, request_id: _Optional[bytes] = ..., token: _Optional[str] = ..., public_key: _Optional[bytes] = ..., population: _Optional[str] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class EnrolResponse(_message.Message):
    __slots__ = ("refusal", "retry", "device_id", "signer_public_key", "certificate", "authority_public_key")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNER_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    refusal: _common_pb2.Refusal
    retry: _common_pb2.RetryWindow
    device_id: str
    signer_public_key: bytes
    certificate: bytes
    authority_public_key: bytes
    def __init__(self, refusal: _Optional[_Union[_common_pb2.Refusal, _Mapping]] = ..., retry: _Optional[_Union[_common_pb2.RetryWindow, _Mapping]] = ..., device_id: _Optional[str] = ..., signer_public_key: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., authority_public_key: _Optional[bytes] = ...) -> None: ...

class CheckInRequest(_message.Message):
    __slots__ = ("request_id", "population", "runtime_version", "memory_bytes", "training_examples", "evaluation_examples", "wait_ms", "certificate_expires_unix_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINING_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_EXPIRES_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    population: str
    runtime_version: str
    memory_bytes: int
    training_examples: int
    evaluation_examples: int
    wait_ms: int
    certificate_expires_unix_ms: int
    def __init__(self, request_id: _Optional[bytes] = ..., population: _Optional[str] = ..., runtime_version: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., training_examples: _Optional[int] = ..., evaluation_examples: _Optional[int] = ..., wait_ms: _Optional[int] = ..., certificate_expires_unix_ms: _Optional[int] = ...) -> None: ...

class CheckInResponse(_message.Message):
    __slots__ = ("refusal", "retry", "assignment", "serving", "certificate")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    refusal: _common_pb2.Refusal
    retry: _common_pb2.RetryWindow
    assignment: Assignment
    serving: _containers.RepeatedCompositeFieldContainer[Serving]
    certificate: bytes
    def __init__(self, refusal: _Optional[_Union[_common_pb2.Refusal, _Mapping]] = ..., retry: _Optional[_Union[_common_pb2.RetryWindow, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., serving: _Optional[_Iterable[_Union[Serving, _Mapping]]] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class Serving(_message.Message):
    __slots__ = ("task_id", "bundle", "version")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    bundle: _task_pb2.SignedBlob
    version: _task_pb2.SignedBlob
    def __init__(self, task_id: _Optional[str] = ..., bundle: _Optional[_Union[_task_pb2.SignedBlob, _Mapping]] = ..., version: _Optional[_Union[_task_pb2.SignedBlob, _Mapping]] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("lease", "work", "task_id", "round", "bundle", "version")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.Lease
    work: Work
    task_id: str
    round: int
    bundle: _task_pb2.SignedBlob
    version: _task_pb2.SignedBlob
    def __init__(self, lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., work: _Optional[_Union[Work, str]] = ..., task_id: _Optional[str] = ..., round: _Optional[int] = ..., bundle: _Optional[_Union[_task_pb2.SignedBlob, _Mapping]] = ..., version: _Optional[_Union[_task_pb2.SignedBlob, _Mapping]] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    offset: int
    def __init__(self, sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class DownloadResponse(_message.Message):
    __slots__ = ("refusal", "retry", "total_bytes", "chunk")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    refusal: _common_pb2.Refusal
    retry: _common_pb2.RetryWindow
    total_bytes: int
    chunk: _common_pb2.BlobChunk
    def __init__(self, refusal: _Optional[_Union[_common_pb2.Refusal, _Mapping]] = ..., retry: _Optional[_Union[_common_pb2.RetryWindow, _Mapping]] = ..., total_bytes: _Optional[int] = ..., chunk: _Optional[_Union[_common_pb2.BlobChunk, _Mapping]] = ...) -> None: ...

class BeginUploadRequest(_message.Message):
    __slots__ = ("request_id", "lease", "update")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    lease: _common_pb2.Lease
    update: _common_pb2.BlobRef
    def __init__(self, request_id: _Optional[bytes] = ..., lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., update: _Optional[_Union[_common_pb2.BlobRef, _Mapping]] = ...) -> None: ...

class BeginUploadResponse(_message.Message):
    __slots__ = ("refusal", "retry", "upload_id", "received_bytes", "chunk_bytes")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    refusal: _common_pb2.Refusal
    retry: _common_pb2.RetryWindow
    upload_id: str
    received_bytes: int
    chunk_bytes: int
    def __init__(self, refusal: _Optional[_Union[_common_pb2.Refusal, _Mapping]] = ..., retry: _Optional[_Union[_common_pb2.RetryWindow, _Mapping]] = ..., upload_id: _Optional[str] = ..., received_bytes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class UploadChunkRequest(_message.Message):
    __slots__ = ("upload_id", "lease", "chunk")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    lease: _common_pb2.Lease
    chunk: _common_pb2.BlobChunk
    def __init__(self, upload_id: _Optional[str] = ..., lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.BlobChunk, _Mapping]] = ...) -> None: ...

class UploadChunkResponse(_message.Message):
    __slots__ = ("refusal", "retry", "received_bytes")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    refusal: _common_pb2.Refusal
    retry: _common_pb2.RetryWindow
    received_bytes: int
    def __init__(self, refusal: _Optional[_Union[_common_pb2.Refusal, _Mapping]] = ..., retry: _Optional[_Union[_common_pb2.RetryWindow, _Mapping]] = ..., received_bytes: _Optional[int] = ...) -> None: ...

class CommitUploadRequest(_message.Message):
    __slots__ = ("request_id", "upload_id", "lease", "weight", "metrics", "masked", "within_clip_norm")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    WITHIN_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    upload_id: str
    lease: _common_pb2.Lease
    weight: float
    metrics: _common_pb2.Metrics
    masked: _secagg_pb2.SecureMasked
    within_clip_norm: bool
    def __init__(self, request_id: _Optional[bytes] = ..., upload_id: _Optional[str] = ..., lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., weight: _Optional[float] = ..., metrics: _Optional[_Union[_common_pb2.Metrics, _Mapping]] = ..., masked: _Optional[_Union[_secagg_pb2.SecureMasked, _Mapping]] = ..., within_clip_norm: bool = ...) -> None: ...

class CommitUploadResponse(_message.Message):
    __slots__ = ("refusal", "retry")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    refusal: _common_pb2.Refusal
    retry: _common_pb2.RetryWindow
    def __init__(self, refusal: _Optional[_Union[_common_pb2.Refusal, _Mapping]] = ..., retry: _Optional[_Union[_common_pb2.RetryWindow, _Mapping]] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("request_id", "lease", "metrics")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    lease: _common_pb2.Lease
    metrics: _common_pb2.Metrics
    def __init__(self, request_id: _Optional[bytes] = ..., lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., metrics: _Optional[_Union[_common_pb2.Metrics, _Mapping]] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("refusal", "retry")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    refusal: _common_pb2.Refusal
    retry: _common_pb2.RetryWindow
    def __init__(self, refusal: _Optional[_Union[_common_pb2.Refusal, _Mapping]] = ..., retry: _Optional[_Union[_common_pb2.RetryWindow, _Mapping]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id", "lease", "reason", "message")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    lease: _common_pb2.Lease
    reason: AbortReason
    message: str
    def __init__(self, request_id: _Optional[bytes] = ..., lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., reason: _Optional[_Union[AbortReason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("refusal", "retry")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    refusal: _common_pb2.Refusal
    retry: _common_pb2.RetryWindow
    def __init__(self, refusal: _Optional[_Union[_common_pb2.Refusal, _Mapping]] = ..., retry: _Optional[_Union[_common_pb2.RetryWindow, _Mapping]] = ...) -> None: ...
