"""The error of the throwaway PostgreSQL."""


class PostgresServerError(RuntimeError):
    """No usable PostgreSQL was found, or the server could not be started, reached or driven."""
