"""jobs can be paused"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

STATUSES = "('queued', 'running', 'pausing', 'paused', 'cancelling', 'succeeded', 'failed', 'cancelled')"


def upgrade() -> None:
    with op.batch_alter_table("job") as batch_op:
        batch_op.drop_constraint("status_known", type_="check")
        batch_op.create_check_constraint("status_known", f"status IN {STATUSES}")


def downgrade() -> None:
    raise NotImplementedError("Jobs that are paused have no status before: restore the backup from before the update.")
