"""an index that finds a tenant's next job without reading the others"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("job_claim", table_name="job")
    op.create_index("job_claim", "job", ["status", "tenant", "priority", "id"])


def downgrade() -> None:
    op.drop_index("job_claim", table_name="job")
    op.create_index("job_claim", "job", ["status", "id"])
