"""Secure rounds: attempts, and the messages of their members."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "secure_attempts",
        sa.Column("round_id", _SERIAL, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("deadline_ms", sa.BigInteger(), nullable=True),
        sa.Column("excluded", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.round_id"], name=op.f("fk_secure_attempts_round_id")),
        sa.PrimaryKeyConstraint("round_id", "attempt", name=op.f("pk_secure_attempts")),
    )
    op.create_table(
        "secure_messages",
        sa.Column("entry", _SERIAL, autoincrement=True, nullable=False),
        sa.Column("round_id", _SERIAL, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("device_id", sa.String(length=32), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("upload_id", sa.String(length=32), nullable=True),
        sa.Column("accepted_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.device_id"], name=op.f("fk_secure_messages_device_id")),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.round_id"], name=op.f("fk_secure_messages_round_id")),
        sa.PrimaryKeyConstraint("entry", name=op.f("pk_secure_messages")),
        sa.UniqueConstraint(
            "round_id",
            "attempt",
            "stage",
            "device_id",
            name=op.f("uq_secure_messages_round_id_attempt_stage_device_id"),
        ),
        sa.UniqueConstraint("upload_id", name=op.f("uq_secure_messages_upload_id")),
        sqlite_autoincrement=True,
    )


def downgrade() -> None:
    op.drop_table("secure_messages")
    op.drop_table("secure_attempts")
