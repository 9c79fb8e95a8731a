from evensong.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_FLOAT32: _ClassVar[Codec]
    CODEC_QUANTIZED: _ClassVar[Codec]
    CODEC_ROTATED: _ClassVar[Codec]
    CODEC_TOP_K: _ClassVar[Codec]
    CODEC_FIELDS: _ClassVar[Codec]

class Weighting(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHTING_UNSPECIFIED: _ClassVar[Weighting]
    WEIGHTING_EXAMPLES: _ClassVar[Weighting]
    WEIGHTING_UNIFORM: _ClassVar[Weighting]

class PrivacyMechanism(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIVACY_MECHANISM_UNSPECIFIED: _ClassVar[PrivacyMechanism]
    PRIVACY_MECHANISM_CENTRAL_GAUSSIAN: _ClassVar[PrivacyMechanism]
    PRIVACY_MECHANISM_BANDED_MATRIX: _ClassVar[PrivacyMechanism]
    PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN: _ClassVar[PrivacyMechanism]
    PRIVACY_MECHANISM_DISTRIBUTED_SKELLAM: _ClassVar[PrivacyMechanism]

class Sampling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SAMPLING_UNSPECIFIED: _ClassVar[Sampling]
    SAMPLING_NONE: _ClassVar[Sampling]
    SAMPLING_POISSON: _ClassVar[Sampling]
CODEC_UNSPECIFIED: Codec
CODEC_FLOAT32: Codec
CODEC_QUANTIZED: Codec
CODEC_ROTATED: Codec
CODEC_TOP_K: Codec
CODEC_FIELDS: Codec
WEIGHTING_UNSPECIFIED: Weighting
WEIGHTING_EXAMPLES: Weighting
WEIGHTING_UNIFORM: Weighting
PRIVACY_MECHANISM_UNSPECIFIED: PrivacyMechanism
PRIVACY_MECHANISM_CENTRAL_GAUSSIAN: PrivacyMechanism
PRIVACY_MECHANISM_BANDED_MATRIX: PrivacyMechanism
PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN: PrivacyMechanism
PRIVACY_MECHANISM_DISTRIBUTED_SKELLAM: PrivacyMechanism
SAMPLING_UNSPECIFIED: Sampling
SAMPLING_NONE: Sampling
SAMPLING_POISSON: Sampling

class SignedBlob(_message.Message):
    __slots__ = ("payload", "signature", "public_key")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signature: bytes
    public_key: bytes
    def __init__(self, payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., public_key: _Optional[bytes] = ...) -> None: ...

class TaskBundle(_message.Message):
    __slots__ = ("name", "population", "artifact", "layout", "local", "update", "round", "server", "training_bytes", "secure", "privacy")
    NAME_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    TRAINING_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    name: str
    population: str
    artifact: _common_pb2.BlobRef
    layout: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    local: LocalPlan
    update: UpdatePlan
    round: RoundPolicy
    server: ServerPlan
    training_bytes: int
    secure: SecurePlan
    privacy: PrivacyPlan
    def __init__(self, name: _Optional[str] = ..., population: _Optional[str] = ..., artifact: _Optional[_Union[_common_pb2.BlobRef, _Mapping]] = ..., layout: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., local: _Optional[_Union[LocalPlan, _Mapping]] = ..., update: _Optional[_Union[UpdatePlan, _Mapping]] = ..., round: _Optional[_Union[RoundPolicy, _Mapping]] = ..., server: _Optional[_Union[ServerPlan, _Mapping]] = ..., training_bytes: _Optional[int] = ..., secure: _Optional[_Union[SecurePlan, _Mapping]] = ..., privacy: _Optional[_Union[PrivacyPlan, _Mapping]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class LocalPlan(_message.Message):
    __slots__ = ("epochs", "batch_size", "learning_rate", "final_learning_rate", "max_steps", "min_examples", "personal", "personalization")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    FINAL_LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    MIN_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    PERSONALIZATION_FIELD_NUMBER: _ClassVar[int]
    epochs: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    max_steps: int
    min_examples: int
    personal: _containers.RepeatedScalarFieldContainer[str]
    personalization: Personalization
    def __init__(self, epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., final_learning_rate: _Optional[float] = ..., max_steps: _Optional[int] = ..., min_examples: _Optional[int] = ..., personal: _Optional[_Iterable[str]] = ..., personalization: _Optional[_Union[Personalization, _Mapping]] = ...) -> None: ...

class Personalization(_message.Message):
    __slots__ = ("epochs", "learning_rate", "trainable")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    epochs: int
    learning_rate: float
    trainable: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epochs: _Optional[int] = ..., learning_rate: _Optional[float] = ..., trainable: _Optional[_Iterable[str]] = ...) -> None: ...

class UpdatePlan(_message.Message):
    __slots__ = ("codec", "bits", "block_size", "clip_norm", "weighting", "max_weight", "adaptive_clipping", "keep_fraction", "download_bits")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    WEIGHTING_FIELD_NUMBER: _ClassVar[int]
    MAX_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ADAPTIVE_CLIPPING_FIELD_NUMBER: _ClassVar[int]
    KEEP_FRACTION_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_BITS_FIELD_NUMBER: _ClassVar[int]
    codec: Codec
    bits: int
    block_size: int
    clip_norm: float
    weighting: Weighting
    max_weight: float
    adaptive_clipping: AdaptiveClipping
    keep_fraction: float
    download_bits: int
    def __init__(self, codec: _Optional[_Union[Codec, str]] = ..., bits: _Optional[int] = ..., block_size: _Optional[int] = ..., clip_norm: _Optional[float] = ..., weighting: _Optional[_Union[Weighting, str]] = ..., max_weight: _Optional[float] = ..., adaptive_clipping: _Optional[_Union[AdaptiveClipping, _Mapping]] = ..., keep_fraction: _Optional[float] = ..., download_bits: _Optional[int] = ...) -> None: ...

class AdaptiveClipping(_message.Message):
    __slots__ = ("initial", "quantile", "rate")
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    QUANTILE_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    initial: float
    quantile: float
    rate: float
    def __init__(self, initial: _Optional[float] = ..., quantile: _Optional[float] = ..., rate: _Optional[float] = ...) -> None: ...

class SecurePlan(_message.Message):
    __slots__ = ("corrupted_share", "dropout_share", "min_survivors", "max_cohort", "stage_ms", "semi_malicious")
    CORRUPTED_SHARE_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_SHARE_FIELD_NUMBER: _ClassVar[int]
    MIN_SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    MAX_COHORT_FIELD_NUMBER: _ClassVar[int]
    STAGE_MS_FIELD_NUMBER: _ClassVar[int]
    SEMI_MALICIOUS_FIELD_NUMBER: _ClassVar[int]
    corrupted_share: float
    dropout_share: float
    min_survivors: int
    max_cohort: int
    stage_ms: int
    semi_malicious: bool
    def __init__(self, corrupted_share: _Optional[float] = ..., dropout_share: _Optional[float] = ..., min_survivors: _Optional[int] = ..., max_cohort: _Optional[int] = ..., stage_ms: _Optional[int] = ..., semi_malicious: bool = ...) -> None: ...

class PrivacyPlan(_message.Message):
    __slots__ = ("mechanism", "epsilon", "delta", "noise_multiplier", "sampling", "population", "max_participations", "min_separation", "bands")
    MECHANISM_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    MAX_PARTICIPATIONS_FIELD_NUMBER: _ClassVar[int]
    MIN_SEPARATION_FIELD_NUMBER: _ClassVar[int]
    BANDS_FIELD_NUMBER: _ClassVar[int]
    mechanism: PrivacyMechanism
    epsilon: float
    delta: float
    noise_multiplier: float
    sampling: Sampling
    population: int
    max_participations: int
    min_separation: int
    bands: int
    def __init__(self, mechanism: _Optional[_Union[PrivacyMechanism, str]] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., sampling: _Optional[_Union[Sampling, str]] = ..., population: _Optional[int] = ..., max_participations: _Optional[int] = ..., min_separation: _Optional[int] = ..., bands: _Optional[int] = ...) -> None: ...

class RoundPolicy(_message.Message):
    __slots__ = ("goal_reports", "min_reports", "over_selection", "deadline_ms", "rounds", "evaluate_every", "evaluation_reports")
    GOAL_REPORTS_FIELD_NUMBER: _ClassVar[int]
    MIN_REPORTS_FIELD_NUMBER: _ClassVar[int]
    OVER_SELECTION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_EVERY_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_REPORTS_FIELD_NUMBER: _ClassVar[int]
    goal_reports: int
    min_reports: int
    over_selection: float
    deadline_ms: int
    rounds: int
    evaluate_every: int
    evaluation_reports: int
    def __init__(self, goal_reports: _Optional[int] = ..., min_reports: _Optional[int] = ..., over_selection: _Optional[float] = ..., deadline_ms: _Optional[int] = ..., rounds: _Optional[int] = ..., evaluate_every: _Optional[int] = ..., evaluation_reports: _Optional[int] = ...) -> None: ...

class ServerPlan(_message.Message):
    __slots__ = ("strategy", "arguments")
    class ArgumentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    strategy: str
    arguments: _containers.ScalarMap[str, float]
    def __init__(self, strategy: _Optional[str] = ..., arguments: _Optional[_Mapping[str, float]] = ...) -> None: ...

class VersionManifest(_message.Message):
    __slots__ = ("task_id", "bundle_sha256", "number", "parent", "parameters", "clip_norm", "delta", "parent_parameters_sha256")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    PARENT_PARAMETERS_SHA256_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    bundle_sha256: bytes
    number: int
    parent: int
    parameters: _common_pb2.BlobRef
    clip_norm: float
    delta: _common_pb2.BlobRef
    parent_parameters_sha256: bytes
    def __init__(self, task_id: _Optional[str] = ..., bundle_sha256: _Optional[bytes] = ..., number: _Optional[int] = ..., parent: _Optional[int] = ..., parameters: _Optional[_Union[_common_pb2.BlobRef, _Mapping]] = ..., clip_norm: _Optional[float] = ..., delta: _Optional[_Union[_common_pb2.BlobRef, _Mapping]] = ..., parent_parameters_sha256: _Optional[bytes] = ...) -> None: ...
