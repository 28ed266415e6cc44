"""What is said of every execution of a statement, by the semantic conventions for databases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from poolkit.telemetry.catalogue import OPERATION
from poolkit.telemetry.recorder import Recorder
from poolkit.telemetry.sql import LONGEST, read

TEXT = "db.query.text"
SUMMARY = "db.query.summary"
BATCH_SIZE = "db.operation.batch.size"
PARAMETER = "db.query.parameter."

_LONGEST_PARAMETER = 1024
_BATCH = "BATCH"
_SYSTEM = "postgresql"

# They surround statements, as a pool's pings do: only where one fails is it seen.
_CONTROL = frozenset(
    {"BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT", "SAVEPOINT", "RELEASE"}
)


@dataclass(frozen=True, slots=True)
class Known:
    """What is said of every execution of a statement.

    Attributes:
        name: The span's.
        attributes: The span's.
        measured: The duration's attributes.
        quiet: Whether only its failure is of interest.
        duration: Takes the seconds that it took; None if nobody wants them.
    """

    name: str
    attributes: Mapping[str, Any]
    measured: Mapping[str, Any]
    quiet: bool
    duration: Recorder | None = None

    def within(self, limit: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Known:
        """The same, with the span's attributes as the function gives them."""
        return replace(self, attributes=limit(self.attributes))


def know(
    statement: str,
    own: Mapping[str, Any],
    *,
    parameterised: bool,
    batch: bool,
    literals: bool,
) -> Known:
    """Read a statement.

    Args:
        statement: As it is sent; of a batch, what each of its operations would be.
        own: The engine's attributes.
        parameterised: Whether it is sent with parameters.
        batch: Whether it is more than one operation.
        literals: Whether its text may have literals.
    """
    reading = read(statement, parameterised=parameterised)
    operation, summary = reading.operation, reading.summary
    quiet = operation.upper() in _CONTROL
    if batch:
        operation, summary = f"{_BATCH} {operation}".rstrip(), f"{_BATCH} {summary}".rstrip()
    measured = {**own, OPERATION: operation} if operation else own
    attributes = {**measured, TEXT: statement[:LONGEST] if literals else reading.text}
    if summary:
        attributes[SUMMARY] = summary
    name = summary or operation or own.get("db.namespace") or _SYSTEM
    return Known(name, attributes, measured, quiet)


def rows(context: Any, parameters: Any) -> int:
    """How many rows an insert sends that SQLAlchemy has made of many parameter sets.

    Leans on ``ExecutionContext.execute_style`` and on what the compiler counts in such an insert;
    ``tests/telemetry/test_spans.py`` fails where that changes.
    """
    made = getattr(context.compiled, "_insertmanyvalues", None)
    counted = made.num_positional_params_counted if made is not None else 0
    sets = context.parameters
    if context.execute_style.name != "INSERTMANYVALUES" or not counted or not sets:
        return 1
    others = len(sets[0]) - counted
    return max(1, (len(parameters) - others) // counted)


def named(parameters: Any) -> dict[str, str]:
    """Parameters as attributes; one without a name by its index."""
    pairs = parameters.items() if isinstance(parameters, Mapping) else enumerate(parameters)
    return {f"{PARAMETER}{key}": str(value)[:_LONGEST_PARAMETER] for key, value in pairs}
