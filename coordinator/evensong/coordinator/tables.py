"""The tables of the database; ``migrations/`` creates the same ones step by step, and a test compares the two.

Times are milliseconds since the Unix epoch, hashes lower-case hex, enumerations the numbers of the protobuf enums.
Plain SQL types only, so that PostgreSQL can stand where SQLite stands.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: SQLite counts up only a column that it calls INTEGER.
_Serial = BigInteger().with_variant(Integer, "sqlite")

enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("token_id", String(64), primary_key=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("population", String(200), nullable=False),
    Column("uses_left", Integer, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
)

devices = Table(
    "devices",
    metadata,
    Column("device_id", String(32), primary_key=True),
    Column("public_key", LargeBinary, nullable=False),
    Column("population", String(200), nullable=False, index=True),
    Column("enrolled_ms", BigInteger, nullable=False),
    Column("last_seen_ms", BigInteger, nullable=False),
    Column("accepted_reports", BigInteger, nullable=False, default=0),
    Column("revoked", Boolean, nullable=False, default=False),
    # Of the newest lease: every new one gets a higher number, so that an older holder is told apart.
    Column("fencing_token", BigInteger, nullable=False, default=0),
    Column("refusal_reason", Integer, nullable=False, default=0),
    Column("refusal_message", Text, nullable=False, default=""),
)

bundles = Table(
    "bundles",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("payload", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("public_key", LargeBinary, nullable=False),
)

tasks = Table(
    "tasks",
    metadata,
    Column("task_id", String(32), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("population", String(200), nullable=False, index=True),
    Column("bundle_sha256", String(64), ForeignKey("bundles.sha256"), nullable=False),
    Column("artifact_sha256", String(64), nullable=False),
    Column("state", Integer, nullable=False),
    Column("message", Text, nullable=False, default=""),
    Column("created_ms", BigInteger, nullable=False, index=True),
    # The last training round that was opened; evaluations bear the round that made their version.
    Column("round", BigInteger, nullable=False, default=0),
    # Training goes on from this version; it is also the one that devices predict with.
    Column("serving_version", BigInteger, nullable=False, default=0),
    Column("latest_version", BigInteger, nullable=False, default=0),
    Column("last_sequence", BigInteger, nullable=False, default=0),
)

versions = Table(
    "versions",
    metadata,
    Column("task_id", String(32), ForeignKey("tasks.task_id"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("parent", BigInteger, nullable=False),
    Column("round", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("public_key", LargeBinary, nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("parameters_sha256", String(64), nullable=False, index=True),
    Column("parameters_bytes", BigInteger, nullable=False),
    # Of the parameters against the parent's: a blob, if there is one.
    Column("delta_sha256", String(64), nullable=True, index=True),
    # Of the server optimiser after this version's step: a blob.
    Column("strategy_state_sha256", String(64), nullable=False),
    Column("reports", BigInteger, nullable=False),
    Column("total_weight", Double, nullable=False),
    Column("training_examples", BigInteger, nullable=False, default=0),
    Column("training_loss_sum", Double, nullable=False, default=0.0),
    Column("training_correct", BigInteger, nullable=False, default=0),
    Column("evaluation_examples", BigInteger, nullable=False, default=0),
    Column("evaluation_loss_sum", Double, nullable=False, default=0.0),
    Column("evaluation_correct", BigInteger, nullable=False, default=0),
    Column("created_ms", BigInteger, nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("round_id", _Serial, primary_key=True, autoincrement=True),
    Column("task_id", String(32), ForeignKey("tasks.task_id"), nullable=False),
    Column("work", Integer, nullable=False),
    Column("number", BigInteger, nullable=False),
    # Training starts from it, or it is what is evaluated.
    Column("version", BigInteger, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    # The trigger that closed it: why late devices are refused.
    Column("closed_by", String(32), nullable=False, default=""),
    Column("places", Integer, nullable=False),
    Column("goal", Integer, nullable=False),
    Column("minimum", Integer, nullable=False),
    Column("opened_ms", BigInteger, nullable=False),
    # Of training: set by the first lease, so that a round without devices is not abandoned again and again.
    Column("deadline_ms", BigInteger, nullable=True),
    Column("closed_ms", BigInteger, nullable=True),
    Column("reports", Integer, nullable=False, default=0),
    Column("bytes_up", BigInteger, nullable=False, default=0),
    Column("bytes_down", BigInteger, nullable=False, default=0),
    UniqueConstraint("task_id", "work", "number"),
)

leases = Table(
    "leases",
    metadata,
    Column("lease_id", String(32), primary_key=True),
    Column("round_id", _Serial, ForeignKey("rounds.round_id"), nullable=False),
    Column("device_id", String(32), ForeignKey("devices.device_id"), nullable=False),
    Column("fencing_token", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Index(None, "round_id", "state"),
    Index(None, "device_id", "state"),
)

uploads = Table(
    "uploads",
    metadata,
    Column("upload_id", String(32), primary_key=True),
    Column("lease_id", String(32), ForeignKey("leases.lease_id"), nullable=False),
    Column("round_id", _Serial, ForeignKey("rounds.round_id"), nullable=False, index=True),
    Column("device_id", String(32), ForeignKey("devices.device_id"), nullable=False, index=True),
    Column("sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    UniqueConstraint("lease_id", "sha256"),
)

#: What was accepted, in the order in which it is added up: one row a device and round, never changed.
journal = Table(
    "journal",
    metadata,
    Column("entry", _Serial, primary_key=True, autoincrement=True),
    Column("round_id", _Serial, ForeignKey("rounds.round_id"), nullable=False),
    Column("device_id", String(32), ForeignKey("devices.device_id"), nullable=False),
    # Of an update; empty for the report of an evaluation.
    Column("upload_id", String(32), nullable=True, unique=True),
    Column("update_sha256", String(64), nullable=False, default=""),
    Column("weight", Double, nullable=False, default=0.0),
    Column("examples", BigInteger, nullable=False),
    Column("loss_sum", Double, nullable=False),
    Column("correct", BigInteger, nullable=False),
    Column("accepted_ms", BigInteger, nullable=False),
    # With adaptive clipping: the norm was at most the round's clip norm.
    Column("within_clip_norm", Boolean, nullable=False, default=False, server_default=false()),
    UniqueConstraint("round_id", "device_id"),
    sqlite_autoincrement=True,
)

#: What tasks have spent of their privacy: a row for each version of a task with a privacy plan, committed with it, and
#: for each noised sum that the coordinator saw and made no version of (its version is 0).
privacy_ledger = Table(
    "privacy_ledger",
    metadata,
    Column("entry", _Serial, primary_key=True, autoincrement=True),
    Column("task_id", String(32), ForeignKey("tasks.task_id"), nullable=False),
    Column("population", String(200), nullable=False, index=True),
    Column("round", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("mechanism", Integer, nullable=False),
    # Noise over sensitivity, as the accountant counts it.
    Column("noise_multiplier", Double, nullable=False),
    Column("clip_norm", Double, nullable=False),
    Column("devices", BigInteger, nullable=False),
    Column("sampling", Integer, nullable=False),
    Column("sampling_probability", Double, nullable=False),
    # Spent by the task with this release, and what one more would make of it; at the plan's delta.
    Column("epsilon", Double, nullable=False),
    Column("next_epsilon", Double, nullable=False),
    Column("delta", Double, nullable=False),
    # From it and the secret noise key the release's noise is made; empty where devices add it.
    Column("noise_tag", String(64), nullable=False, default=""),
    Column("created_ms", BigInteger, nullable=False),
    UniqueConstraint("task_id", "round"),
    sqlite_autoincrement=True,
)

#: Tries of a secure round to get its sum; the newest counts.
secure_attempts = Table(
    "secure_attempts",
    metadata,
    Column("round_id", _Serial, ForeignKey("rounds.round_id"), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    # evensong.secagg.states.ServerStage
    Column("stage", String(16), nullable=False),
    # Of the stage; absent while nobody has come.
    Column("deadline_ms", BigInteger, nullable=True),
    # Ids of devices that are kept out, because they were blamed in an earlier attempt; separated by spaces.
    Column("excluded", Text, nullable=False, default=""),
)

#: What members of a cohort sent, in the order in which it was accepted: the state machine is a function of it.
secure_messages = Table(
    "secure_messages",
    metadata,
    Column("entry", _Serial, primary_key=True, autoincrement=True),
    Column("round_id", _Serial, ForeignKey("rounds.round_id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("stage", String(16), nullable=False),
    Column("device_id", String(32), ForeignKey("devices.device_id"), nullable=False),
    # The serialised SecureAdvertise, SecureShares, SecureMasked, SecureCommit or SecureUnmask.
    Column("payload", LargeBinary, nullable=False),
    # Of a masked vector.
    Column("upload_id", String(32), nullable=True, unique=True),
    Column("accepted_ms", BigInteger, nullable=False),
    UniqueConstraint("round_id", "attempt", "stage", "device_id"),
    sqlite_autoincrement=True,
)

#: The answer to each call that changed something, for the same call coming again.
requests = Table(
    "requests",
    metadata,
    # The device, or "operator".
    Column("caller", String(32), primary_key=True),
    Column("request_id", LargeBinary, primary_key=True),
    Column("method", String(100), nullable=False),
    Column("body_sha256", String(64), nullable=False),
    Column("response", LargeBinary, nullable=False),
    Column("created_ms", BigInteger, nullable=False, index=True),
)

events = Table(
    "events",
    metadata,
    Column("task_id", String(32), ForeignKey("tasks.task_id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    # evensong.v1.TaskEvent
    Column("payload", LargeBinary, nullable=False),
)
