"""What a statement's text says: its operation, a summary, and the text without its literals.

PostgreSQL's lexical rules, and of its grammar no more than a summary needs. Whatever it is given,
it ends in linear time and raises nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from poolkit.telemetry.summary import summarise

LONGEST = 8192
"""Characters of a statement that are read; the rest is left out of its text, too."""

_REMEMBERED = 512
_CUT = "..."

_HIGH = r"\x80-\U0010ffff"  # of an identifier, whatever they are
_WORD = rf"[A-Za-z_{_HIGH}][A-Za-z0-9_${_HIGH}]*+"
_DOLLAR_QUOTE = rf"\$(?:[A-Za-z_{_HIGH}][A-Za-z0-9_{_HIGH}]*+)?\$"
_NUMBER = rf"(?:\d[\d_]*+(?:\.[\d_]*+)?|\.\d[\d_]*+)(?:[eE][+-]?\d++)?[A-Za-z0-9_{_HIGH}]*+"
_TRUTH = rf"(?i:true|false)(?![A-Za-z0-9_${_HIGH}])"
_ELSE = rf"""
    (?![eEbBxXnN]'|[uU]&'){_WORD}
    | \$\d++
    | "[^"]*+(?:""[^"]*+)*+"
    | [^A-Za-z0-9_{_HIGH}'"$./-]++
    | \.(?!\d) | -(?!-) | /(?!\*) | \$(?!\d)(?!{_DOLLAR_QUOTE[2:]})
"""
_PLAIN = re.compile(rf"(?:{_ELSE} | {_NUMBER})*+", re.VERBOSE)
_PLAIN_BUT_NUMBERS = re.compile(rf"(?:(?!{_TRUTH})(?:{_ELSE}))*+", re.VERBOSE)
_STRING = re.compile(
    r"""
    (?: [eE]'[^'\\]*+(?:(?:''|\\.|\\\Z)[^'\\]*+)*+ | (?:[bBxXnN]|[uU]&)?'[^']*+(?:''[^']*+)*+ )
    (?:'|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
_VALUE = re.compile(f"{_TRUTH}|{_NUMBER}")
_TAG = re.compile(_DOLLAR_QUOTE)
_LINE_COMMENT = re.compile(r"--[^\n\r]*+")
_COMMENT_EDGE = re.compile(r"/\*|\*/")

# Where a value may be written without quotes, and be a secret all the same.
_UNTIL_VALUE = re.compile(
    r"""
    \s* (?: SET\b[^=]*?(?:=|\bTO\b)
          | ALTER\s+(?:ROLE|USER|GROUP|DATABASE|SYSTEM)\b(?>.*?\bSET\b)[^=]*?(?:=|\bTO\b)
          | (?:CREATE|ALTER)\s+(?:ROLE|USER(?!\s+MAPPING)|GROUP)\b.*?\bPASSWORD\b )
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a statement says.

    Attributes:
        text: Without literals and comments.
        operation: Such as ``SELECT`` or ``CREATE TABLE``, as it was written; empty if unknown.
        summary: Its operations and their targets in their order; empty if unknown.
    """

    text: str
    operation: str
    summary: str


def read(text: str, *, parameterised: bool) -> Reading:
    """Read a statement.

    Args:
        text: As it is sent.
        parameterised: Whether it is sent with parameters: then only strings count as literals, and
            numbers stay.
    """
    if len(text) > LONGEST:
        return _read(text[:LONGEST], parameterised, _CUT)
    return _read(text, parameterised, "")


@lru_cache(_REMEMBERED)
def _read(text: str, parameterised: bool, cut: str) -> Reading:  # noqa: FBT001 (a key)
    plain = _without_literals(text, _PLAIN if parameterised else _PLAIN_BUT_NUMBERS)
    operation, summary = summarise(plain)
    return Reading(plain + cut, operation, summary)


def _without_literals(text: str, kept: re.Pattern[str]) -> str:
    parts: list[str] = []
    position = 0
    while position < len(text):
        match = kept.match(text, position)
        if match and match.end() > position:
            parts.append(match[0])
            position = match.end()
        else:
            position, instead = _past(text, position)
            parts.append(instead)
    plain = "".join(parts).strip()
    secret = _UNTIL_VALUE.match(plain)
    return plain if secret is None else secret[0] + " ?"


def _past(text: str, position: int) -> tuple[int, str]:
    """Where a literal or comment ends, and what stands in its place."""
    if text.startswith("--", position):
        comment = _LINE_COMMENT.match(text, position)
        return (comment.end() if comment else len(text)), ""
    if text.startswith("/*", position):
        return _comment_end(text, position), " "
    if tag := _TAG.match(text, position):
        end = text.find(tag[0], tag.end())
        return (len(text) if end < 0 else end + len(tag[0])), "?"
    literal = _STRING.match(text, position) or _VALUE.match(text, position)
    return (literal.end() if literal else len(text)), "?"


def _comment_end(text: str, position: int) -> int:
    depth = 0
    for edge in _COMMENT_EDGE.finditer(text, position):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(text)
