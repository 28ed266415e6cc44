"""What the benchmark of web applications and the processes that it starts have in common."""

SESSION = "SessionDep"
AUTOCOMMIT = "AutocommitSessionDep"
USUAL = "get_db"
"""With ``pool_pre_ping``, as tutorials have it."""
BARE = "get_db, no pre-ping"
SIZE = 10
"""Connections in each pool."""
