from evensong.v1 import common_pb2 as _common_pb2
from evensong.v1 import task_pb2 as _task_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_STATE_UNSPECIFIED: _ClassVar[TaskState]
    TASK_STATE_RUNNING: _ClassVar[TaskState]
    TASK_STATE_COMPLETE: _ClassVar[TaskState]
    TASK_STATE_STOPPED: _ClassVar[TaskState]
    TASK_STATE_FAILED: _ClassVar[TaskState]

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_KIND_UNSPECIFIED: _ClassVar[EventKind]
    EVENT_KIND_TASK_STARTED: _ClassVar[EventKind]
    EVENT_KIND_ROUND_STARTED: _ClassVar[EventKind]
    EVENT_KIND_REPORT_ACCEPTED: _ClassVar[EventKind]
    EVENT_KIND_ROUND_ABANDONED: _ClassVar[EventKind]
    EVENT_KIND_VERSION_COMMITTED: _ClassVar[EventKind]
    EVENT_KIND_VERSION_EVALUATED: _ClassVar[EventKind]
    EVENT_KIND_VERSION_PROMOTED: _ClassVar[EventKind]
    EVENT_KIND_TASK_ENDED: _ClassVar[EventKind]
TASK_STATE_UNSPECIFIED: TaskState
TASK_STATE_RUNNING: TaskState
TASK_STATE_COMPLETE: TaskState
TASK_STATE_STOPPED: TaskState
TASK_STATE_FAILED: TaskState
EVENT_KIND_UNSPECIFIED: EventKind
EVENT_KIND_TASK_STARTED: EventKind
EVENT_KIND_ROUND_STARTED: EventKind
EVENT_KIND_REPORT_ACCEPTED: EventKind
EVENT_KIND_ROUND_ABANDONED: EventKind
EVENT_KIND_VERSION_COMMITTED: EventKind
EVENT_KIND_VERSION_EVALUATED: EventKind
EVENT_KIND_VERSION_PROMOTED: EventKind
EVENT_KIND_TASK_ENDED: EventKind

class UploadBlobRequest(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: _common_pb2.BlobChunk
    def __init__(self, chunk: _Optional[_Union[_common_pb2.BlobChunk, _Mapping]] = ...) -> None: ...

class UploadBlobResponse(_message.Message):
    __slots__ = ("blob",)
    BLOB_FIELD_NUMBER: _ClassVar[int]
    blob: _common_pb2.BlobRef
    def __init__(self, blob: _Optional[_Union[_common_pb2.BlobRef, _Mapping]] = ...) -> None: ...

class DownloadBlobRequest(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    offset: int
    def __init__(self, sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class DownloadBlobResponse(_message.Message):
    __slots__ = ("total_bytes", "chunk")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    chunk: _common_pb2.BlobChunk
    def __init__(self, total_bytes: _Optional[int] = ..., chunk: _Optional[_Union[_common_pb2.BlobChunk, _Mapping]] = ...) -> None: ...

class SubmitTaskRequest(_message.Message):
    __slots__ = ("request_id", "bundle", "initial_parameters")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    INITIAL_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    bundle: _task_pb2.TaskBundle
    initial_parameters: _common_pb2.BlobRef
    def __init__(self, request_id: _Optional[bytes] = ..., bundle: _Optional[_Union[_task_pb2.TaskBundle, _Mapping]] = ..., initial_parameters: _Optional[_Union[_common_pb2.BlobRef, _Mapping]] = ...) -> None: ...

class SubmitTaskResponse(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class TaskStatus(_message.Message):
    __slots__ = ("task_id", "bundle", "state", "round", "version", "created_unix_ms", "message")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    bundle: _task_pb2.TaskBundle
    state: TaskState
    round: int
    version: int
    created_unix_ms: int
    message: str
    def __init__(self, task_id: _Optional[str] = ..., bundle: _Optional[_Union[_task_pb2.TaskBundle, _Mapping]] = ..., state: _Optional[_Union[TaskState, str]] = ..., round: _Optional[int] = ..., version: _Optional[int] = ..., created_unix_ms: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class ListTasksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTasksResponse(_message.Message):
    __slots__ = ("tasks",)
    TASKS_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[TaskStatus]
    def __init__(self, tasks: _Optional[_Iterable[_Union[TaskStatus, _Mapping]]] = ...) -> None: ...

class GetTaskRequest(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class GetTaskResponse(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: TaskStatus
    def __init__(self, task: _Optional[_Union[TaskStatus, _Mapping]] = ...) -> None: ...

class StopTaskRequest(_message.Message):
    __slots__ = ("request_id", "task_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    task_id: str
    def __init__(self, request_id: _Optional[bytes] = ..., task_id: _Optional[str] = ...) -> None: ...

class StopTaskResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchTaskRequest(_message.Message):
    __slots__ = ("task_id", "after_sequence")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    after_sequence: int
    def __init__(self, task_id: _Optional[str] = ..., after_sequence: _Optional[int] = ...) -> None: ...

class TaskEvent(_message.Message):
    __slots__ = ("sequence", "time_unix_ms", "kind", "round", "version", "reports", "metrics", "bytes_up", "bytes_down", "message")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time_unix_ms: int
    kind: EventKind
    round: int
    version: int
    reports: int
    metrics: _common_pb2.Metrics
    bytes_up: int
    bytes_down: int
    message: str
    def __init__(self, sequence: _Optional[int] = ..., time_unix_ms: _Optional[int] = ..., kind: _Optional[_Union[EventKind, str]] = ..., round: _Optional[int] = ..., version: _Optional[int] = ..., reports: _Optional[int] = ..., metrics: _Optional[_Union[_common_pb2.Metrics, _Mapping]] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class WatchTaskResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: TaskEvent
    def __init__(self, event: _Optional[_Union[TaskEvent, _Mapping]] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class VersionInfo(_message.Message):
    __slots__ = ("manifest", "manifest_sha256", "round", "reports", "total_weight", "training", "evaluation", "created_unix_ms", "serving")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    manifest: _task_pb2.VersionManifest
    manifest_sha256: bytes
    round: int
    reports: int
    total_weight: float
    training: _common_pb2.Metrics
    evaluation: _common_pb2.Metrics
    created_unix_ms: int
    serving: bool
    def __init__(self, manifest: _Optional[_Union[_task_pb2.VersionManifest, _Mapping]] = ..., manifest_sha256: _Optional[bytes] = ..., round: _Optional[int] = ..., reports: _Optional[int] = ..., total_weight: _Optional[float] = ..., training: _Optional[_Union[_common_pb2.Metrics, _Mapping]] = ..., evaluation: _Optional[_Union[_common_pb2.Metrics, _Mapping]] = ..., created_unix_ms: _Optional[int] = ..., serving: bool = ...) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[VersionInfo]
    def __init__(self, versions: _Optional[_Iterable[_Union[VersionInfo, _Mapping]]] = ...) -> None: ...

class PromoteVersionRequest(_message.Message):
    __slots__ = ("request_id", "task_id", "version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    task_id: str
    version: int
    def __init__(self, request_id: _Optional[bytes] = ..., task_id: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class PromoteVersionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CreateEnrolmentTokenRequest(_message.Message):
    __slots__ = ("request_id", "population", "uses", "lifetime_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    population: str
    uses: int
    lifetime_ms: int
    def __init__(self, request_id: _Optional[bytes] = ..., population: _Optional[str] = ..., uses: _Optional[int] = ..., lifetime_ms: _Optional[int] = ...) -> None: ...

class CreateEnrolmentTokenResponse(_message.Message):
    __slots__ = ("token", "expires_unix_ms")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    token: str
    expires_unix_ms: int
    def __init__(self, token: _Optional[str] = ..., expires_unix_ms: _Optional[int] = ...) -> None: ...

class ListDevicesRequest(_message.Message):
    __slots__ = ("after_device_id", "limit")
    AFTER_DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after_device_id: str
    limit: int
    def __init__(self, after_device_id: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class DeviceInfo(_message.Message):
    __slots__ = ("device_id", "population", "enrolled_unix_ms", "last_seen_unix_ms", "accepted_reports", "revoked", "last_refusal")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_REPORTS_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    LAST_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    population: str
    enrolled_unix_ms: int
    last_seen_unix_ms: int
    accepted_reports: int
    revoked: bool
    last_refusal: _common_pb2.Refusal
    def __init__(self, device_id: _Optional[str] = ..., population: _Optional[str] = ..., enrolled_unix_ms: _Optional[int] = ..., last_seen_unix_ms: _Optional[int] = ..., accepted_reports: _Optional[int] = ..., revoked: bool = ..., last_refusal: _Optional[_Union[_common_pb2.Refusal, _Mapping]] = ...) -> None: ...

class ListDevicesResponse(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[DeviceInfo]
    def __init__(self, devices: _Optional[_Iterable[_Union[DeviceInfo, _Mapping]]] = ...) -> None: ...

class RevokeDeviceRequest(_message.Message):
    __slots__ = ("request_id", "device_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    device_id: str
    def __init__(self, request_id: _Optional[bytes] = ..., device_id: _Optional[str] = ...) -> None: ...

class RevokeDeviceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadPrivacyLedgerRequest(_message.Message):
    __slots__ = ("task_id", "population")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    population: str
    def __init__(self, task_id: _Optional[str] = ..., population: _Optional[str] = ...) -> None: ...

class PrivacyLedgerEntry(_message.Message):
    __slots__ = ("entry", "task_id", "population", "round", "version", "mechanism", "noise_multiplier", "clip_norm", "devices", "sampling", "sampling_probability", "epsilon", "delta", "created_unix_ms")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MECHANISM_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    entry: int
    task_id: str
    population: str
    round: int
    version: int
    mechanism: _task_pb2.PrivacyMechanism
    noise_multiplier: float
    clip_norm: float
    devices: int
    sampling: _task_pb2.Sampling
    sampling_probability: float
    epsilon: float
    delta: float
    created_unix_ms: int
    def __init__(self, entry: _Optional[int] = ..., task_id: _Optional[str] = ..., population: _Optional[str] = ..., round: _Optional[int] = ..., version: _Optional[int] = ..., mechanism: _Optional[_Union[_task_pb2.PrivacyMechanism, str]] = ..., noise_multiplier: _Optional[float] = ..., clip_norm: _Optional[float] = ..., devices: _Optional[int] = ..., sampling: _Optional[_Union[_task_pb2.Sampling, str]] = ..., sampling_probability: _Optional[float] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., created_unix_ms: _Optional[int] = ...) -> None: ...

class ReadPrivacyLedgerResponse(_message.Message):
    __slots__ = ("entries", "plan")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[PrivacyLedgerEntry]
    plan: _task_pb2.PrivacyPlan
    def __init__(self, entries: _Optional[_Iterable[_Union[PrivacyLedgerEntry, _Mapping]]] = ..., plan: _Optional[_Union[_task_pb2.PrivacyPlan, _Mapping]] = ...) -> None: ...
