"""An index, made while the table is in use."""

from alembic import op

revision = "0002"
down_revision = "0001"

INDEX = "ix_orders_customer"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # An attempt that failed has left one that is not valid.
        op.drop_index(INDEX, if_exists=True, postgresql_concurrently=True)
        op.create_index(INDEX, "orders", ["customer"], postgresql_concurrently=True)


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.drop_index(INDEX, if_exists=True, postgresql_concurrently=True)
