"""the same tables in Postgres: files of more than two gigabytes, and no constraint that repeats a primary key"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table in ("dataset", "artifact"):
            op.alter_column(table, "bytes", type_=sa.BigInteger(), existing_type=sa.Integer())
    else:
        with op.batch_alter_table("idempotency") as batch_op:
            batch_op.drop_constraint("idempotency_key", type_="unique")


def downgrade() -> None:
    raise NotImplementedError("What was measured in 64 bits may not go into 32: restore the backup from before the update.")
