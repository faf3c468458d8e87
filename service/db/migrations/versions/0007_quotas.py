"""quotas and priorities: what is kept and used is counted, and tenants have limits"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

BYTES = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "tenant",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("max_jobs", sa.Integer(), nullable=True),
        sa.Column("max_bytes", BYTES, nullable=True),
        sa.Column("max_hours", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("name"),
    )
    for table in ("model", "dataset"):
        op.add_column(table, sa.Column("stored", BYTES, server_default="0", nullable=False))
    op.add_column("job", sa.Column("priority", sa.Integer(), server_default="0", nullable=False))
    op.add_column("job", sa.Column("seconds", sa.Float(), server_default="0", nullable=False))
    op.add_column("job", sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True))
    # Of datasets only the text was measured; of models their weights.
    op.execute("UPDATE dataset SET stored = bytes")
    connection = op.get_bind()
    for identifier, info in connection.execute(sa.text("SELECT id, info FROM model")).all():
        size = (json.loads(info) if isinstance(info, str) else info).get("bytes", 0)
        connection.execute(sa.text("UPDATE model SET stored = :size WHERE id = :id"), {"size": size, "id": identifier})


def downgrade() -> None:
    op.drop_table("tenant")
    for table, columns in (("model", ["stored"]), ("dataset", ["stored"]), ("job", ["priority", "seconds", "claimed_at"])):
        for column in columns:
            op.drop_column(table, column)
