"""URLs: what psql accepts, what SQLAlchemy spells differently, and what services print."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from poolkit import ConfigurationError
from poolkit.url import Address, DatabaseUrl, parse_hosts, parse_url

H = Address


def parts(text: str) -> tuple:
    url = parse_url(text)
    return url.addresses, url.user, url.password, url.database, dict(url.query)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://", ((), None, None, None, {})),
        ("postgresql://localhost", ((H("localhost"),), None, None, None, {})),
        ("postgresql://localhost:5433", ((H("localhost", 5433),), None, None, None, {})),
        ("postgresql://localhost/mydb", ((H("localhost"),), None, None, "mydb", {})),
        ("postgresql://user@localhost", ((H("localhost"),), "user", None, None, {})),
        ("postgresql://user:secret@localhost", ((H("localhost"),), "user", "secret", None, {})),
        ("postgres://u:@h/d", ((H("h"),), "u", "", "d", {})),
        ("POSTGRESQL+ASYNCPG://u@h/d", ((H("h"),), "u", None, "d", {})),
        ("postgresql:///mydb?host=localhost&port=5433", ((H("localhost", 5433),), None, None, "mydb", {})),
        ("postgresql://[2001:db8::1234]/d", ((H("2001:db8::1234"),), None, None, "d", {})),
        ("postgresql://u@[::1]:6543/d", ((H("::1", 6543),), "u", None, "d", {})),
        ("postgresql:///d?host=/var/lib/pg", ((H("/var/lib/pg"),), None, None, "d", {})),
        ("postgresql://%2Fvar%2Flib%2Fpg/d", ((H("/var/lib/pg"),), None, None, "d", {})),
        ("postgresql://u@%2Ftmp:5433/d", ((H("/tmp", 5433),), "u", None, "d", {})),
        (
            "postgresql://u@h1:123,h2:456/d?target_session_attrs=any",
            ((H("h1", 123), H("h2", 456)), "u", None, "d", {"target_session_attrs": "any"}),
        ),
        ("postgresql://h1,h2/d", ((H("h1"), H("h2")), None, None, "d", {})),
        ("postgresql://[::1]:1,[::2]:2/d", ((H("::1", 1), H("::2", 2)), None, None, "d", {})),
        (
            "postgresql+asyncpg://u:p@/d?host=h1:1&host=h2:2",
            ((H("h1", 1), H("h2", 2)), "u", "p", "d", {}),
        ),
        ("postgresql:///d?host=h1,h2&port=1,2", ((H("h1", 1), H("h2", 2)), None, None, "d", {})),
        ("postgresql:///d?host=h1,h2&port=7", ((H("h1", 7), H("h2", 7)), None, None, "d", {})),
        ("postgresql:///d?host=::1&port=7", ((H("::1", 7),), None, None, "d", {})),
        ("postgresql://h/d?user=u&password=p%26q", ((H("h"),), "u", "p&q", "d", {})),
        ("postgresql://h?dbname=x", ((H("h"),), None, None, "x", {})),
        ("postgresql://u:p%40ss%3Aw%2Fd%25@h/d%20b", ((H("h"),), "u", "p@ss:w/d%", "d b", {})),
        ("postgresql://u:p@ss:w@h/d", ((H("h"),), "u", "p@ss:w", "d", {})),
        ("postgresql://h/d?application_name=a+b%20c", ((H("h"),), None, None, "d", {"application_name": "a+b c"})),
        ("  postgresql://h/d\n", ((H("h"),), None, None, "d", {})),
    ],
)  # fmt: skip
def test_reads_every_spelling(text: str, expected: tuple) -> None:
    """libpq's documented examples, SQLAlchemy's hosts in the query, sockets, IPv6, escapes."""
    assert parts(text) == expected


@pytest.mark.parametrize(
    ("text", "host", "user", "database"),
    [
        (
            "postgresql://alex:AbC123dEf@ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech/dbname?sslmode=require&channel_binding=require",
            "ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech",
            "alex",
            "dbname",
        ),
        (
            "postgresql://postgres:[YOUR-PASSWORD]@db.abcdefghijklmnopqrst.supabase.co:5432/postgres",
            "db.abcdefghijklmnopqrst.supabase.co",
            "postgres",
            "postgres",
        ),
        (
            "postgres://postgres.abcdefghijklmnopqrst:[YOUR-PASSWORD]@aws-0-us-east-1.pooler.supabase.com:6543/postgres",
            "aws-0-us-east-1.pooler.supabase.com",
            "postgres.abcdefghijklmnopqrst",
            "postgres",
        ),
        (
            "postgresql://admin:pw@mydb.123456789012.us-east-1.rds.amazonaws.com:5432/app?sslmode=require",
            "mydb.123456789012.us-east-1.rds.amazonaws.com",
            "admin",
            "app",
        ),
        (
            "postgres://ubqxyzabc:p0123456789abcdef@ec2-54-1-2-3.compute-1.amazonaws.com:5432/d4abcdefgh",
            "ec2-54-1-2-3.compute-1.amazonaws.com",
            "ubqxyzabc",
            "d4abcdefgh",
        ),
        (
            "postgres://my_app:secret@my-app-db.flycast:5432/my_app?sslmode=disable",
            "my-app-db.flycast",
            "my_app",
            "my_app",
        ),
    ],
    ids=["neon", "supabase", "supabase-pooler", "rds", "heroku", "fly"],
)
def test_reads_what_services_print(text: str, host: str, user: str, database: str) -> None:
    """The connection strings of Neon, Supabase, RDS, Heroku and Fly are read as they stand."""
    url = parse_url(text)

    assert (url.addresses[0].host, url.user, url.database) == (host, user, database)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a URL"),
        ("localhost/db", "not a URL"),
        ("host=localhost dbname=x", "not a URL"),
        ("mysql://u:s3cret@h/d", "'mysql', and poolkit is for PostgreSQL"),
        ("sqlite:///x.db", "'sqlite'"),
        ("postgresql+psycopg://u:s3cret@h/d", "driver 'psycopg'.*write postgresql://"),
        ("postgresql+psycopg2://h/d", "driver 'psycopg2'"),
        ("postgresql://u:s3cret/x@h/d", "percent-encode"),
        ("postgresql://h:54x32/d", "port '54x32' is not a number from 1 to 65535"),
        ("postgresql://h:70000/d", "port '70000'"),
        ("postgresql://::1:5432/d", "brackets"),
        ("postgresql://h/d?sslmode", "'sslmode' has no value"),
        ("postgresql://h/d?sslmode=require&sslmode=disable", "'sslmode' twice"),
        ("postgresql:///d?host=a,b,c&port=1,2", "3 hosts and 2 ports"),
    ],
)
def test_refuses_with_the_remedy(text: str, says: str) -> None:
    """A malformed or foreign URL is refused in one sentence that never shows the password."""
    with pytest.raises(ConfigurationError, match=says) as caught:
        parse_url(text)
    assert "s3cret" not in str(caught.value)


def test_shows_everything_but_the_password() -> None:
    """str and repr mask the password, and sslpassword with it."""
    url = parse_url("postgresql://u:s3cret@h:1,[::1]:2/d?sslmode=require&sslpassword=t0p")

    assert str(url) == "postgresql://u:***@h:1,[::1]:2/d?sslmode=require&sslpassword=***"
    assert "s3cret" not in repr(url)
    assert "t0p" not in repr(url)


awkward = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(user=awkward, password=awkward, database=awkward)
def test_hands_awkward_parts_to_sqlalchemy_unchanged(user, password, database) -> None:
    """Any user, password and database survive the way to SQLAlchemy's URL and back as text."""
    url = DatabaseUrl((Address("h", 5432),), user, password, database).sqlalchemy()

    assert url.database == database
    rendered = url.set(database="d").render_as_string(hide_password=False)
    for again in (make_url(rendered), parse_url(rendered).sqlalchemy()):
        assert (again.username, again.password) == (user, password)


def test_names_where_it_connects_for_sqlalchemy() -> None:
    """One host stands in the URL, several and sockets in its query, parameters nowhere."""
    assert parse_url("postgresql://u@h:1/d?sslmode=require").sqlalchemy().render_as_string() == (
        "postgresql+asyncpg://u@h:1/d"
    )
    several = parse_url("postgresql://h1:1,h2:2/d").sqlalchemy()
    assert several.query["host"] == ("h1:1", "h2:2")
    assert parse_url("postgresql:///d?host=/run").sqlalchemy().query["host"] == "/run"


def test_reads_a_host_list() -> None:
    """DATABASE_HOST may name several hosts; a port of their own wins over the common one."""
    assert parse_hosts("a,b:2,/run", 1) == (H("a", 1), H("b", 2), H("/run", 1))
