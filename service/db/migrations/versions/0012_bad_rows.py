"""what bad rows of a dataset do, how many were left out, and why the first was"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("dataset", sa.Column("bad_rows", sa.String(), nullable=False, server_default="stop"))
    op.add_column("dataset", sa.Column("skipped", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("dataset", sa.Column("skipped_reason", sa.String(), nullable=True))


def downgrade() -> None:
    for column in ("skipped_reason", "skipped", "bad_rows"):
        op.drop_column("dataset", column)
