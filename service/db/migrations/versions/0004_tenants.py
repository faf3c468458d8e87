"""tenants and API keys: what was there before belongs to the tenant `default`"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

OWNED = ("model", "dataset", "sweep", "job")


def upgrade() -> None:
    op.create_table(
        "api_key",
        sa.Column("tenant", sa.String(), server_default="default", nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("hint", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("role IN ('read', 'write', 'admin')", name="role_known"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_api_key_sha256", "api_key", ["sha256"], unique=True)
    op.create_index("api_key_tenant", "api_key", ["tenant", "id"])
    for table in OWNED:
        op.add_column(table, sa.Column("tenant", sa.String(), server_default="default", nullable=False))
        op.create_index(f"{table}_tenant", table, ["tenant", "id"])
    # Two tenants may send the same Idempotency-Key. A primary key is changed by a new table, in both databases.
    op.rename_table("idempotency", "idempotency_before")
    op.create_table(
        "idempotency",
        sa.Column("tenant", sa.String(), server_default="default", nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("body_sha256", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("sweep_id", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweep.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tenant", "key"),
    )
    op.execute(
        "INSERT INTO idempotency (key, body_sha256, job_id, sweep_id, created_at) "
        "SELECT key, body_sha256, job_id, sweep_id, created_at FROM idempotency_before"
    )
    op.drop_table("idempotency_before")


def downgrade() -> None:
    raise NotImplementedError("Tenants have no place in the tables before: restore the backup from before the update.")
