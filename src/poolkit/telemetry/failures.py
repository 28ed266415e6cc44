"""What telemetry says of a failure: nothing that came from a statement, a parameter or a row.

Never the message, for the server's own quotes what it was given, and its detail quotes rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import Span, Status, StatusCode

from poolkit.errors import causes, find_sqlstate
from poolkit.faults import FaultKind, kind_of
from poolkit.moments import Moment
from poolkit.telemetry.catalogue import ERROR_TYPE, STATUS_CODE

_SCHEMA = (("constraint", "constraint_name"), ("table", "table_name"), ("column", "column_name"))


@dataclass(frozen=True, slots=True)
class Failed:
    """A failure in the semantic conventions' words.

    Attributes:
        type: The SQLSTATE; where no server answered, a ``FaultKind``, or the exception's class.
        sqlstate: The server's, or None.
        description: The exception's class, its SQLSTATE, and what of the schema it is about.
    """

    type: str
    sqlstate: str | None
    description: str

    @property
    def attributes(self) -> dict[str, str]:
        """For spans and metrics."""
        found = {ERROR_TYPE: self.type}
        if self.sqlstate is not None:
            found[STATUS_CODE] = self.sqlstate
        return found

    def mark(self, span: Span) -> None:
        """Have a span say it."""
        span.set_attributes(self.attributes)
        span.set_status(Status(StatusCode.ERROR, self.description))


def failed(error: BaseException, moment: Moment) -> Failed:
    """Read an exception that was raised at that moment."""
    chain = list(causes(error))
    sqlstate = find_sqlstate(error)
    origin = next((e for e in reversed(chain) if getattr(e, "sqlstate", None)), chain[-1])
    name = type(origin).__qualname__
    if sqlstate is not None:
        return Failed(sqlstate, sqlstate, f"{name} ({sqlstate}){_schema(origin)}")
    kind = kind_of(chain, moment)
    return Failed(name if kind is FaultKind.OTHER else kind.value, None, name)


def _schema(origin: Any) -> str:
    found = ((word, getattr(origin, attribute, None)) for word, attribute in _SCHEMA)
    words = " ".join(f"{word} {name}" for word, name in found if name)
    return f": {words}" if words else ""
