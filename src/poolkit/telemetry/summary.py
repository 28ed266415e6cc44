"""A statement's operations and targets, in a few words: ``INSERT orders SELECT carts``.

By the semantic conventions' rules for ``db.query.summary``: as they were written, in their order,
no more than 255 characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

LONGEST = 255

_HIGH = r"\x80-\U0010ffff"
_NAME = rf'(?:"[^"]*+(?:""[^"]*+)*+"|[A-Za-z_{_HIGH}][A-Za-z0-9_${_HIGH}]*+)'
_PART = re.compile(rf"{_NAME}(?:\.{_NAME})*+|[(),;]")

_CHANGES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE"})
_BEFORE_CHANGES = frozenset({"", ";", "(", ")", "AS", "EXPLAIN", "ANALYZE", "VERBOSE"})
_BODIES = frozenset({"SELECT", "VALUES", "WITH"})
_HAS_FROM = frozenset({"SELECT", "UPDATE", "DELETE"})
_HAS_INTO = frozenset({"SELECT", "INSERT", "MERGE"})
_HAS_USING = frozenset({"DELETE", "MERGE"})
_END_OF_LIST = frozenset(
    {"WHERE", "SET", "GROUP", "ORDER", "HAVING", "LIMIT", "OFFSET", "FETCH", "FOR", "WINDOW"}
    | {"RETURNING", "VALUES", "WHEN", "UNION", "INTERSECT", "EXCEPT"}
)
_BEFORE_TARGET = frozenset(
    {"ONLY", "LATERAL", "ROWS", "FROM", "INTO", "ON", "TABLE", "IF", "NOT", "EXISTS", "LOCAL"}
    | {"SESSION", "VERBOSE", "FULL", "FREEZE", "ANALYZE", "CONCURRENTLY", "TEMP", "TEMPORARY"}
    | {"UNLOGGED"}
)

_TARGETED = frozenset(
    {"CALL", "COPY", "EXECUTE", "LISTEN", "LOCK", "NOTIFY", "SET", "SHOW", "TRUNCATE", "UNLISTEN"}
    | {"VACUUM", "ANALYZE"}
)
_LISTED = frozenset({"TRUNCATE", "LOCK", "DROP", "VACUUM", "ANALYZE"})
_DEFINES = frozenset({"CREATE", "ALTER", "DROP", "REFRESH"})
_MODIFIERS = frozenset(
    {"OR", "REPLACE", "TEMP", "TEMPORARY", "UNLOGGED", "GLOBAL", "LOCAL", "UNIQUE", "RECURSIVE"}
    | {"FOREIGN", "MATERIALIZED", "CONSTRAINT"}
)
_NAMED = frozenset(
    {"TABLE", "INDEX", "VIEW", "SEQUENCE", "SCHEMA", "DATABASE", "TYPE", "DOMAIN", "FUNCTION"}
    | {"PROCEDURE", "TRIGGER", "EXTENSION"}
)
_KINDS = _NAMED | {
    *("ROLE", "USER", "GROUP", "POLICY", "RULE", "SERVER", "AGGREGATE", "CAST", "COLLATION"),
    *("EVENT", "OPERATOR", "PUBLICATION", "SUBSCRIPTION", "STATISTICS", "SYSTEM", "TABLESPACE"),
    *("TEXT", "TRANSFORM", "ACCESS", "CONVERSION", "LANGUAGE", "DEFAULT", "OWNED", "ROUTINE"),
}
_MAY_SELECT = frozenset({"TABLE", "VIEW"})
_OTHERS = frozenset(
    {
        "ABORT",
        "BEGIN",
        "CHECKPOINT",
        "CLOSE",
        "CLUSTER",
        "COMMENT",
        "COMMIT",
        "DEALLOCATE",
        "DECLARE",
    }
    | {"DISCARD", "DO", "END", "EXPLAIN", "FETCH", "GRANT", "IMPORT", "LOAD", "MOVE", "PREPARE"}
    | {"REASSIGN", "REINDEX", "RELEASE", "RESET", "REVOKE", "ROLLBACK", "SAVEPOINT", "SECURITY"}
    | {"START"}
)
_GO_ON = frozenset({"EXPLAIN", "PREPARE", "DECLARE"})
"""A statement follows within; after the others, there is none."""


def summarise(text: str) -> tuple[str, str]:
    """The operation and the summary of a statement without literals; empty where unknown."""
    scan = _Scan()
    for part in _PART.findall(text):
        scan.take(part)
        if scan.is_full:
            break
    return scan.operation or scan.first, " ".join(scan.words)


@dataclass(slots=True)
class _Level:
    """What is known between two parentheses."""

    verb: str = ""
    expects: bool = False  # a target's name comes next
    lists: bool = False  # and one more after a comma
    using: bool = False
    names: bool = False  # of WITH's queries


@dataclass(slots=True)
class _Scan:
    operation: str = ""  # outside of all parentheses
    first: str = ""
    words: list[str] = field(default_factory=list)
    is_full: bool = False
    _length: int = 0
    _levels: list[_Level] = field(default_factory=lambda: [_Level()])
    _before: str = ""
    _queries: set[str] = field(default_factory=set)
    _defines: str = ""  # CREATE, until its kind is known
    _done: bool = False

    def take(self, part: str) -> None:
        """The next word, name, parenthesis, comma or semicolon."""
        upper = part.upper()
        level = self._levels[-1]
        match part:
            case "(":
                self._levels.append(_Level(expects=level.expects and not level.using))
                level.expects = level.using = False
            case ")":
                if len(self._levels) > 1:
                    self._levels.pop()
            case ",":
                level.expects = level.lists
            case ";":
                self._levels, self._done, self._defines = [_Level()], False, ""
            case _ if not self._done:
                self._word(level, part, upper)
        self._before = upper

    def _word(self, level: _Level, word: str, upper: str) -> None:
        if self._defines:
            self._kind(level, word, upper)
        elif level.expects and upper not in _BODIES:
            self._target(level, word, upper)
        elif upper == "WITH" and (level.verb in ("", "INSERT") or self._before == "AS"):
            level.expects, level.names = False, True
        elif upper == "SELECT" or (upper == "VALUES" and not level.verb):
            self._begin(level, word, upper)
        elif upper in _CHANGES and self._before in _BEFORE_CHANGES:
            self._begin(level, word, upper)
            level.expects = upper == "UPDATE"
        else:
            self._other_word(level, word, upper)

    def _other_word(self, level: _Level, word: str, upper: str) -> None:
        if level.names:
            if self._before in ("WITH", "RECURSIVE", ",") and upper != "RECURSIVE":
                self._queries.add(word.lower())
        elif level.verb:
            self._clause(level, upper)
        elif upper == "JOIN":
            level.expects = True
        elif len(self._levels) == 1 and self._before in ("", ";"):
            self._command(level, word, upper)

    def _clause(self, level: _Level, upper: str) -> None:
        if upper == "FROM":
            found = level.verb in _HAS_FROM and self._before != "DISTINCT"
            level.expects = level.lists = found
        elif upper == "JOIN" or (upper == "INTO" and level.verb in _HAS_INTO):
            level.expects = True
        elif upper == "USING" and level.verb in _HAS_USING:
            level.expects = level.lists = level.using = True
        elif upper in _END_OF_LIST:
            level.lists = False

    def _target(self, level: _Level, word: str, upper: str) -> None:
        if upper in _BEFORE_TARGET and self._before != ".":
            return
        level.expects = level.using = False
        if word.lower() not in self._queries:
            self._add(word)
        self._done = level.verb == "definition"

    def _command(self, level: _Level, word: str, upper: str) -> None:
        """The first word of a statement."""
        if upper in _DEFINES:
            self._defines = word
        elif upper in _TARGETED or upper == "TABLE":
            self._begin(level, word, upper)
            level.expects, level.lists = True, upper in _LISTED
        elif upper in _OTHERS:
            self._operation(word)
            self._done = upper not in _GO_ON

    def _kind(self, level: _Level, word: str, upper: str) -> None:
        """What is created, altered or dropped."""
        if upper in _MODIFIERS:
            if upper == "MATERIALIZED":
                self._defines += " " + word
            return
        defines, self._defines = self._defines, ""
        level.verb = upper if upper in _MAY_SELECT and defines[0] in "cC" else "definition"
        level.expects = upper in _NAMED
        level.lists = False
        self._done = not level.expects
        self._operation(f"{defines} {word}" if upper in _KINDS else defines)

    def _begin(self, level: _Level, word: str, upper: str) -> None:
        level.verb, level.names = upper, False
        level.expects = level.lists = False
        self._operation(word)

    def _operation(self, name: str) -> None:
        if len(self._levels) == 1 and not self.operation:
            self.operation = name
        self.first = self.first or name
        self._add(name)

    def _add(self, word: str) -> None:
        self._length += len(word) + 1
        if self._length - 1 > LONGEST:
            self.is_full = True
        else:
            self.words.append(word)
