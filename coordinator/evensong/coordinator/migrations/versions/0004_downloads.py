"""Versions as differences to their parents."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("versions", sa.Column("delta_sha256", sa.String(length=64), nullable=True))
    op.create_index(op.f("ix_versions_delta_sha256"), "versions", ["delta_sha256"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_versions_delta_sha256"), table_name="versions")
    op.drop_column("versions", "delta_sha256")
