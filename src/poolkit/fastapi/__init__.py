"""FastAPI: sessions that end before the response is sent; needs ``poolkit[fastapi]``."""

import inspect

from poolkit.errors import ConfigurationError

try:
    import fastapi
except ModuleNotFoundError as error:
    raise ConfigurationError(
        f"poolkit.fastapi needs the package {error.name}: pip install 'poolkit[fastapi]'"
    ) from error
if "scope" not in inspect.signature(fastapi.Depends).parameters:
    raise ConfigurationError(
        f"poolkit.fastapi needs FastAPI 0.121, and this is {fastapi.__version__}: pip install"
        " 'poolkit[fastapi]'"
    )

from poolkit.fastapi.dependencies import (
    AutocommitSessionDep,
    ConnectionDep,
    SessionDep,
    get_autocommit_session,
    get_connection,
    get_session,
)
from poolkit.fastapi.install import install
from poolkit.fastapi.lifespan import lifespan
from poolkit.fastapi.status import Guard

__all__ = [
    "AutocommitSessionDep",
    "ConnectionDep",
    "Guard",
    "SessionDep",
    "get_autocommit_session",
    "get_connection",
    "get_session",
    "install",
    "lifespan",
]
