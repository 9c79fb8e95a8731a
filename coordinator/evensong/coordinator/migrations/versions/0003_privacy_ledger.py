"""The privacy ledger, and whether an update's norm was within the clip norm."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "privacy_ledger",
        sa.Column("entry", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("population", sa.String(length=200), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("mechanism", sa.Integer(), nullable=False),
        sa.Column("noise_multiplier", sa.Double(), nullable=False),
        sa.Column("clip_norm", sa.Double(), nullable=False),
        sa.Column("devices", sa.BigInteger(), nullable=False),
        sa.Column("sampling", sa.Integer(), nullable=False),
        sa.Column("sampling_probability", sa.Double(), nullable=False),
        sa.Column("epsilon", sa.Double(), nullable=False),
        sa.Column("next_epsilon", sa.Double(), nullable=False),
        sa.Column("delta", sa.Double(), nullable=False),
        sa.Column("noise_tag", sa.String(length=64), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_privacy_ledger_task_id")),
        sa.PrimaryKeyConstraint("entry", name=op.f("pk_privacy_ledger")),
        sa.UniqueConstraint("task_id", "round", name=op.f("uq_privacy_ledger_task_id_round")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_privacy_ledger_population"), "privacy_ledger", ["population"], unique=False)
    op.add_column("journal", sa.Column("within_clip_norm", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("journal", "within_clip_norm")
    op.drop_index(op.f("ix_privacy_ledger_population"), "privacy_ledger")
    op.drop_table("privacy_ledger")
