"""What a failed connect means: its typed error, and whether another attempt may do better."""

from __future__ import annotations

import socket
import ssl

import asyncpg

from poolkit import errors
from poolkit.errors import Attempt, ConnectError

_NOT_READY = frozenset({"57P01", "57P02", "57P03"})
_LOST = frozenset({"08000", "08001", "08003", "08004", "08006"})

_BY_SQLSTATE = {
    "53300": errors.TooManyConnections,
    "3D000": errors.DatabaseNotFound,
    "08P01": errors.StartupParameterRefused,
    **dict.fromkeys(_NOT_READY, errors.ServerNotReady),
    **dict.fromkeys(_LOST, errors.ServerUnreachable),
}
_BY_TYPE: tuple[tuple[type[BaseException], type[ConnectError]], ...] = (
    (ssl.SSLCertVerificationError, errors.CertificateNotTrusted),
    (ssl.SSLError, errors.TLSRefused),
    (socket.gaierror, errors.HostNotFound),
    (TimeoutError, errors.ConnectTimeout),
    (ConnectionRefusedError, errors.ConnectRefused),
    (OSError, errors.ServerUnreachable),
    (asyncpg.exceptions.TargetServerAttributeNotMatched, errors.ServerNotReady),
)


def failure(attempt: Attempt, cause: Exception) -> ConnectError:
    """The typed error for what the driver or the operating system raised at a connect."""
    return _failure_type(cause)(attempt, cause)


def is_transient(error: BaseException) -> bool:
    """Whether the same connect may well succeed a little later."""
    state = errors.find_sqlstate(error)
    if state is not None:
        return state[:2] == "53" or state in _NOT_READY or state in _LOST
    if isinstance(error, asyncpg.exceptions.TargetServerAttributeNotMatched):
        return True
    return isinstance(error, OSError) and not isinstance(error, ssl.SSLError | PermissionError)


def speaks_against_address(error: BaseException) -> bool:
    """Whether other addresses should be tried before this one for a while.

    Not where the server is well and only not the kind that ``target_session_attrs`` asks for.
    """
    return is_transient(error) and not isinstance(
        error, asyncpg.exceptions.TargetServerAttributeNotMatched
    )


def other_transport_may_do(error: Exception, *, plain: bool) -> bool:
    """As in libpq: a refusal by pg_hba.conf (28000), and with TLS also a failed negotiation."""
    if errors.find_sqlstate(error) == "28000":
        return True
    return not plain and (type(error) is ConnectionError or isinstance(error, ssl.SSLError))


def _failure_type(cause: Exception) -> type[ConnectError]:
    state = errors.find_sqlstate(cause)
    if state is not None:
        if state[:2] == "28":
            return errors.AuthenticationFailed
        return _BY_SQLSTATE.get(state, ConnectError)
    return next((ours for theirs, ours in _BY_TYPE if isinstance(cause, theirs)), ConnectError)
