"""What tests and demos of a service need: a throwaway PostgreSQL."""

from poolkit.testing._errors import PostgresServerError
from poolkit.testing._server import PostgresServer, ThrowawayPostgres, postgres

__all__ = ["PostgresServer", "PostgresServerError", "ThrowawayPostgres", "postgres"]
