"""sweeps"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sweep",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "outcome",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("outcome", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id"),
    )
    # As SQL: Alembic would add the foreign key in a second step, for which SQLite needs the whole table anew, and its check
    # constraint would be lost.
    op.execute("ALTER TABLE job ADD COLUMN sweep VARCHAR REFERENCES sweep (id)")
    op.execute("ALTER TABLE job ADD COLUMN method VARCHAR")
    op.create_index("job_sweep", "job", ["sweep"])
    with op.batch_alter_table("idempotency") as batch_op:
        batch_op.alter_column("job_id", existing_type=sa.String(), nullable=True)
        batch_op.add_column(sa.Column("sweep_id", sa.String(), nullable=True))
        batch_op.create_foreign_key("idempotency_sweep", "sweep", ["sweep_id"], ["id"], ondelete="CASCADE")


def downgrade() -> None:
    raise NotImplementedError("Jobs of sweeps have no place in the tables before: restore the backup from before the update.")
