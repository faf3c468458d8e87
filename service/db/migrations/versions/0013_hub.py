"""from where on a hub a model is"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in ("hub", "hub_commit"):
        op.add_column("model", sa.Column(column, sa.String(), nullable=True))
    op.create_index("model_hub", "model", ["tenant", "hub", "hub_commit"], unique=True)


def downgrade() -> None:
    op.drop_index("model_hub", "model")
    for column in ("hub_commit", "hub"):
        op.drop_column("model", column)
