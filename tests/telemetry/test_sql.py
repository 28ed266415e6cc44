"""What is read in a statement's text."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolkit.telemetry.sql import LONGEST, read
from poolkit.telemetry.summary import summarise

SUMMARIES = {
    # The semantic conventions' own examples, as PostgreSQL has it.
    "SELECT * FROM wuser_table WHERE username = 'x'": "SELECT wuser_table",
    """INSERT INTO shipping_details (order_id, address)
       SELECT order_id, address FROM orders WHERE order_id = 1""": (
        "INSERT shipping_details SELECT orders"
    ),
    "SELECT * FROM songs, artists WHERE songs.artist_id = artists.id": "SELECT songs artists",
    """SELECT order_date FROM (SELECT * FROM orders o
       JOIN customers c ON o.customer_id = c.customer_id) x""": "SELECT SELECT orders customers",
    """SELECT * FROM "song list", public."artists" """: 'SELECT "song list" public."artists"',
    "CALL some_stored_procedure(1)": "CALL some_stored_procedure",
    # And further.
    "": "",
    "gibberish FROM t": "",
    "select 1": "select",
    "/* a 'note' */ -- and another\nUPDATE ONLY a.t SET x = 1": "UPDATE a.t",
    "UPDATE t SET x = o.x FROM other o WHERE o.id = t.id": "UPDATE t other",
    "DELETE FROM a USING b JOIN c USING (id) WHERE true": "DELETE a b c",
    "SELECT EXTRACT(year FROM d), TRIM(BOTH FROM s) FROM t": "SELECT t",
    "SELECT 1 FROM t WHERE a IS NOT DISTINCT FROM b": "SELECT t",
    "SELECT * FROM t WHERE id IN (SELECT id FROM u) FOR UPDATE": "SELECT t SELECT u",
    "SELECT * FROM a LEFT JOIN LATERAL (SELECT * FROM b) x ON true": "SELECT a SELECT b",
    "SELECT * FROM (a JOIN b ON true), c": "SELECT a b c",
    "SELECT * FROM generate_series(1, 3) WITH ORDINALITY": "SELECT generate_series",
    "SELECT a FROM b UNION ALL SELECT c FROM d": "SELECT b SELECT d",
    "WITH RECURSIVE r(n) AS (SELECT 1 FROM a), q AS MATERIALIZED (SELECT * FROM b) SELECT * FROM r JOIN q USING (n), c": (
        "SELECT a SELECT b SELECT c"
    ),
    "WITH gone AS (DELETE FROM a RETURNING *) INSERT INTO b SELECT * FROM gone": (
        "DELETE a INSERT b SELECT"
    ),
    "INSERT INTO t (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET x = 1": "INSERT t",
    "MERGE INTO t USING s ON s.id = t.id WHEN MATCHED THEN UPDATE SET x = 1": "MERGE t s",
    "CREATE TABLE IF NOT EXISTS a.b (id int REFERENCES c)": "CREATE TABLE a.b",
    "CREATE TABLE a AS SELECT * FROM b": "CREATE TABLE a SELECT b",
    "create or replace view v as select * from t": "create view v select t",
    "CREATE UNIQUE INDEX CONCURRENTLY ON t USING btree (a)": "CREATE INDEX t",
    "CREATE TRIGGER g AFTER INSERT OR UPDATE ON t EXECUTE FUNCTION f()": "CREATE TRIGGER g",
    "ALTER TABLE t ADD COLUMN c int": "ALTER TABLE t",
    "DROP TABLE IF EXISTS a": "DROP TABLE a",
    "REFRESH MATERIALIZED VIEW CONCURRENTLY v": "REFRESH MATERIALIZED VIEW v",
    "GRANT SELECT, INSERT ON t TO somebody": "GRANT",
    "TRUNCATE TABLE a, b": "TRUNCATE a b",
    "COPY t FROM STDIN": "COPY t",
    "COPY (SELECT * FROM t) TO STDOUT": "COPY SELECT t",
    "EXPLAIN (ANALYZE, BUFFERS) SELECT * FROM t": "EXPLAIN SELECT t",
    "SET LOCAL work_mem = '1MB'": "SET work_mem",
    "SAVEPOINT sa_savepoint_1": "SAVEPOINT",
}


@pytest.mark.parametrize("text", SUMMARIES)
def test_summaries(text: str) -> None:
    """Operations and their targets, as they were written and in their order."""
    assert read(text, parameterised=False).summary == SUMMARIES[text]


@pytest.mark.parametrize(
    ("text", "operation"),
    [
        ("WITH a AS (DELETE FROM t RETURNING *) SELECT * FROM a", "SELECT"),
        ("INSERT INTO t SELECT * FROM u", "INSERT"),
        ("(SELECT 1) UNION (SELECT 2)", "SELECT"),
        ("create  table t (a int)", "create table"),
        ("CREATE gibberish", "CREATE"),
        ("EXPLAIN DELETE FROM t", "EXPLAIN"),
        ("gibberish", ""),
    ],
)
def test_operations(text: str, operation: str) -> None:
    """One for a statement, out of a known few; none where it is none of them."""
    assert read(text, parameterised=False).operation == operation


TEXTS = {
    "SELECT 1, -2.5e10, .5, 0x1F, 1_000 FROM t1 WHERE a::int = 3 AND b2": (
        "SELECT ?, -?, ?, ?, ? FROM t1 WHERE a::int = ? AND b2"
    ),
    "SELECT TRUE, false, truest": "SELECT ?, ?, truest",
    "SELECT 'it''s', E'it\\'s', U&'d\\0061', b'01', X'1F', n'x'": "SELECT ?, ?, ?, ?, ?, ?",
    "SELECT 'a' 'b', DATE '2020-01-01'": "SELECT ? ?, DATE ?",
    "SELECT $$it's$$, $a$ $$ $b$ $a$, t1$$x$$": "SELECT ?, ?, t1$$x$$",
    'SELECT "it\'s", "a""b", t."1" FROM "x"': 'SELECT "it\'s", "a""b", t."1" FROM "x"',
    "SELECT 1 -- it's\n, 2 /* it's /* nested */ all */ + 3": "SELECT ? \n, ?   + ?",
    "SELECT data ? 'key', data ->> 'key'": "SELECT data ? ?, data ->> ?",
}


@pytest.mark.parametrize("text", TEXTS)
def test_literals_become_question_marks(text: str) -> None:
    """By PostgreSQL's lexical rules; comments go."""
    assert read(text, parameterised=False).text == TEXTS[text]


def test_a_parameterised_statement_keeps_its_numbers() -> None:
    """It stays as it was sent; strings are literals even so."""
    text = "SELECT x'1F', 10 FROM t WHERE a = $1 AND b = 'secret' LIMIT 5"
    expected = "SELECT ?, 10 FROM t WHERE a = $1 AND b = ? LIMIT 5"
    assert read(text, parameterised=True).text == expected


@pytest.mark.parametrize("parameterised", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "ALTER ROLE x PASSWORD 'hunter2'",
        "ALTER USER x WITH LOGIN PASSWORD hunter2",
        "CREATE ROLE x LOGIN PASSWORD E'hunter2'",
        "CREATE USER MAPPING FOR x SERVER s OPTIONS (user 'u', password 'hunter2')",
        "CREATE SUBSCRIPTION s CONNECTION 'password=hunter2' PUBLICATION p",
        "COPY t FROM PROGRAM 'curl -u me:hunter2'",
        "DO $$ BEGIN PERFORM dblink('password=hunter2'); END $$",
        "DO $body$ BEGIN EXECUTE $$ hunter2 $$; END $body$",
        "SELECT dblink('password=hunter2')",
        "SELECT 1 /* password: hunter2 */ -- hunter2",
        "SET my.token = hunter2",
        "SET LOCAL my.token TO hunter2",
        "ALTER ROLE x SET my.token = hunter2",
        "SELECT 'hunter2",
        "SELECT E'\\'hunter2",
        "SELECT $x$hunter2",
        "SELECT 1$$hunter2$$",
        'SELECT "hunter2',
        "SELECT /* /* */ hunter2",
        "SELECT u&'hunter2' UESCAPE '!'",
    ],
)
def test_no_password_survives(text: str, *, parameterised: bool) -> None:
    """Whichever way it is written, in a statement that may be cut off too."""
    reading = read(text, parameterised=parameterised)
    assert "hunter2" not in f"{reading}"


WORDS = r"""SELECT FROM WITH AS SET E U& $ $$ $a$ ' '' " "" \ -- /* */ ( ) , ; . = 1 é x"""
PIECES = st.sampled_from([*WORDS.split(), " ", "\n"])


@given(st.lists(PIECES | st.text(max_size=4), max_size=40).map("".join), st.booleans())
def test_nothing_makes_it_fail(text: str, parameterised: bool) -> None:  # noqa: FBT001
    """Any text is read, and its summary is short."""
    reading = read(text, parameterised=parameterised)
    assert len(reading.summary) <= 255


@given(
    st.text(st.characters(exclude_characters="'\\", codec="utf-8")),
    st.sampled_from(["", "E", "U&", "X"]),
    st.booleans(),
)
def test_no_content_of_a_string_survives(content: str, prefix: str, parameterised: bool) -> None:  # noqa: FBT001
    """Whatever is between the quotes."""
    reading = read(f"SELECT {prefix}'{content}' FROM t", parameterised=parameterised)
    assert reading.text == "SELECT ? FROM t"


@given(st.text(st.characters(exclude_characters="$", codec="utf-8")))
def test_no_content_of_a_dollar_quoted_string_survives(content: str) -> None:
    """Quotes and comments within it are its content."""
    assert read(f"SELECT $q${content}$q$, 1", parameterised=True).text == "SELECT ?, 1"


HOSTILE = r"""' " $a $a$ /* */ -- ( a. 1e E'\ \ '' SET_ a_SET_b_ SELECT_ WITH_a_AS_( 0 $"""


@pytest.mark.parametrize("piece", [piece.replace("_", " ") for piece in HOSTILE.split()])
def test_time_is_bounded(piece: str) -> None:
    """However long and hostile, it is read within a few hundredths of a second."""
    text = "ALTER ROLE a" + piece * (100_000 // len(piece))
    began = time.process_time()
    read(text, parameterised=False)
    assert time.process_time() - began < 0.5


def test_a_long_text_is_cut() -> None:
    """And says so; a literal that is cut through is none the more visible."""
    text = "SELECT 1 FROM t WHERE x = 'secret" + "y" * LONGEST + "'"
    assert read(text, parameterised=True).text == "SELECT 1 FROM t WHERE x = ?..."


def test_a_long_summary_ends_with_a_whole_name() -> None:
    """No operation or name is cut through."""
    names = [f"table_{n:04}" for n in range(100)]
    _, summary = summarise("SELECT * FROM " + ", ".join(names))
    assert len(summary) <= 255
    assert summary.split() == ["SELECT", *names][: len(summary.split())]
    assert len(summary.split()) > 20
