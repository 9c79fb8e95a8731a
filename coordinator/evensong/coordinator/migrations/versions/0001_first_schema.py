"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "bundles",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_bundles")),
    )
    op.create_table(
        "devices",
        sa.Column("device_id", sa.String(length=32), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("population", sa.String(length=200), nullable=False),
        sa.Column("enrolled_ms", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_ms", sa.BigInteger(), nullable=False),
        sa.Column("accepted_reports", sa.BigInteger(), nullable=False),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("refusal_reason", sa.Integer(), nullable=False),
        sa.Column("refusal_message", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("device_id", name=op.f("pk_devices")),
    )
    op.create_index(op.f("ix_devices_population"), "devices", ["population"], unique=False)
    op.create_table(
        "enrolment_tokens",
        sa.Column("token_id", sa.String(length=64), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("population", sa.String(length=200), nullable=False),
        sa.Column("uses_left", sa.Integer(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("token_id", name=op.f("pk_enrolment_tokens")),
    )
    op.create_table(
        "requests",
        sa.Column("caller", sa.String(length=32), nullable=False),
        sa.Column("request_id", sa.LargeBinary(), nullable=False),
        sa.Column("method", sa.String(length=100), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("response", sa.LargeBinary(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("caller", "request_id", name=op.f("pk_requests")),
    )
    op.create_index(op.f("ix_requests_created_ms"), "requests", ["created_ms"], unique=False)
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("population", sa.String(length=200), nullable=False),
        sa.Column("bundle_sha256", sa.String(length=64), nullable=False),
        sa.Column("artifact_sha256", sa.String(length=64), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("serving_version", sa.BigInteger(), nullable=False),
        sa.Column("latest_version", sa.BigInteger(), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["bundle_sha256"], ["bundles.sha256"], name=op.f("fk_tasks_bundle_sha256")),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_tasks")),
    )
    op.create_index(op.f("ix_tasks_created_ms"), "tasks", ["created_ms"], unique=False)
    op.create_index(op.f("ix_tasks_population"), "tasks", ["population"], unique=False)
    op.create_table(
        "events",
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_events_task_id")),
        sa.PrimaryKeyConstraint("task_id", "sequence", name=op.f("pk_events")),
    )
    op.create_table(
        "rounds",
        sa.Column("round_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("work", sa.Integer(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("closed_by", sa.String(length=32), nullable=False),
        sa.Column("places", sa.Integer(), nullable=False),
        sa.Column("goal", sa.Integer(), nullable=False),
        sa.Column("minimum", sa.Integer(), nullable=False),
        sa.Column("opened_ms", sa.BigInteger(), nullable=False),
        sa.Column("deadline_ms", sa.BigInteger(), nullable=True),
        sa.Column("closed_ms", sa.BigInteger(), nullable=True),
        sa.Column("reports", sa.Integer(), nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), nullable=False),
        sa.Column("bytes_down", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_rounds_task_id")),
        sa.PrimaryKeyConstraint("round_id", name=op.f("pk_rounds")),
        sa.UniqueConstraint("task_id", "work", "number", name=op.f("uq_rounds_task_id_work_number")),
    )
    op.create_index(op.f("ix_rounds_state"), "rounds", ["state"], unique=False)
    op.create_table(
        "versions",
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("parent", sa.BigInteger(), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("parameters_sha256", sa.String(length=64), nullable=False),
        sa.Column("parameters_bytes", sa.BigInteger(), nullable=False),
        sa.Column("strategy_state_sha256", sa.String(length=64), nullable=False),
        sa.Column("reports", sa.BigInteger(), nullable=False),
        sa.Column("total_weight", sa.Double(), nullable=False),
        sa.Column("training_examples", sa.BigInteger(), nullable=False),
        sa.Column("training_loss_sum", sa.Double(), nullable=False),
        sa.Column("training_correct", sa.BigInteger(), nullable=False),
        sa.Column("evaluation_examples", sa.BigInteger(), nullable=False),
        sa.Column("evaluation_loss_sum", sa.Double(), nullable=False),
        sa.Column("evaluation_correct", sa.BigInteger(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_versions_task_id")),
        sa.PrimaryKeyConstraint("task_id", "number", name=op.f("pk_versions")),
    )
    op.create_index(op.f("ix_versions_parameters_sha256"), "versions", ["parameters_sha256"], unique=False)
    op.create_table(
        "journal",
        sa.Column("entry", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("round_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("device_id", sa.String(length=32), nullable=False),
        sa.Column("upload_id", sa.String(length=32), nullable=True),
        sa.Column("update_sha256", sa.String(length=64), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("examples", sa.BigInteger(), nullable=False),
        sa.Column("loss_sum", sa.Double(), nullable=False),
        sa.Column("correct", sa.BigInteger(), nullable=False),
        sa.Column("accepted_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.device_id"], name=op.f("fk_journal_device_id")),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.round_id"], name=op.f("fk_journal_round_id")),
        sa.PrimaryKeyConstraint("entry", name=op.f("pk_journal")),
        sa.UniqueConstraint("round_id", "device_id", name=op.f("uq_journal_round_id_device_id")),
        sa.UniqueConstraint("upload_id", name=op.f("uq_journal_upload_id")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "leases",
        sa.Column("lease_id", sa.String(length=32), nullable=False),
        sa.Column("round_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("device_id", sa.String(length=32), nullable=False),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.device_id"], name=op.f("fk_leases_device_id")),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.round_id"], name=op.f("fk_leases_round_id")),
        sa.PrimaryKeyConstraint("lease_id", name=op.f("pk_leases")),
    )
    op.create_index(op.f("ix_leases_device_id_state"), "leases", ["device_id", "state"], unique=False)
    op.create_index(op.f("ix_leases_round_id_state"), "leases", ["round_id", "state"], unique=False)
    op.create_table(
        "uploads",
        sa.Column("upload_id", sa.String(length=32), nullable=False),
        sa.Column("lease_id", sa.String(length=32), nullable=False),
        sa.Column("round_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("device_id", sa.String(length=32), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.device_id"], name=op.f("fk_uploads_device_id")),
        sa.ForeignKeyConstraint(["lease_id"], ["leases.lease_id"], name=op.f("fk_uploads_lease_id")),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.round_id"], name=op.f("fk_uploads_round_id")),
        sa.PrimaryKeyConstraint("upload_id", name=op.f("pk_uploads")),
        sa.UniqueConstraint("lease_id", "sha256", name=op.f("uq_uploads_lease_id_sha256")),
    )
    op.create_index(op.f("ix_uploads_device_id"), "uploads", ["device_id"], unique=False)
    op.create_index(op.f("ix_uploads_round_id"), "uploads", ["round_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_uploads_round_id"), table_name="uploads")
    op.drop_index(op.f("ix_uploads_device_id"), table_name="uploads")
    op.drop_table("uploads")
    op.drop_index(op.f("ix_leases_round_id_state"), table_name="leases")
    op.drop_index(op.f("ix_leases_device_id_state"), table_name="leases")
    op.drop_table("leases")
    op.drop_table("journal")
    op.drop_index(op.f("ix_versions_parameters_sha256"), table_name="versions")
    op.drop_table("versions")
    op.drop_index(op.f("ix_rounds_state"), table_name="rounds")
    op.drop_table("rounds")
    op.drop_table("events")
    op.drop_index(op.f("ix_tasks_population"), table_name="tasks")
    op.drop_index(op.f("ix_tasks_created_ms"), table_name="tasks")
    op.drop_table("tasks")
    op.drop_index(op.f("ix_requests_created_ms"), table_name="requests")
    op.drop_table("requests")
    op.drop_table("enrolment_tokens")
    op.drop_index(op.f("ix_devices_population"), table_name="devices")
    op.drop_table("devices")
    op.drop_table("bundles")
