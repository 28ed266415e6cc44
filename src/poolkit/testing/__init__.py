"""What tests and demos of a service need: a throwaway PostgreSQL, and a network that fails."""

from poolkit.testing._databases import PostgresDatabase
from poolkit.testing._dialogue import Message
from poolkit.testing._errors import PostgresServerError
from poolkit.testing._moments import At, FaultProxyError, Signal
from poolkit.testing._proxied import ProxiedConnection
from poolkit.testing._proxy import FaultProxy
from poolkit.testing._record import ProxyStats
from poolkit.testing._recorder import EventRecorder
from poolkit.testing._server import PostgresServer, ThrowawayPostgres, postgres, standby
from poolkit.testing._traps import Hold, Trap

__all__ = [
    "At",
    "EventRecorder",
    "FaultProxy",
    "FaultProxyError",
    "Hold",
    "Message",
    "PostgresDatabase",
    "PostgresServer",
    "PostgresServerError",
    "ProxiedConnection",
    "ProxyStats",
    "Signal",
    "ThrowawayPostgres",
    "Trap",
    "postgres",
    "standby",
]
