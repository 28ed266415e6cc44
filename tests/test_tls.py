"""TLS demands: libpq's modes, its defaults, and what contradicts itself."""

import ssl
from pathlib import Path

import pytest
import trustme

from poolkit import ConfigurationError
from poolkit.tls import TLSOptions, create_context, resolve


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A certificate authority, a client certificate with its key, and a file that is neither."""
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("client")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(directory / "client.pem")
    certificate.private_key_pem.write_to_path(directory / "client.key")
    (directory / "junk.pem").write_text("no certificate")
    return {
        path.stem if path.suffix != ".key" else "key": str(path) for path in directory.iterdir()
    }


@pytest.mark.parametrize(
    ("options", "environ", "mode"),
    [
        (TLSOptions(), {}, "prefer"),
        (TLSOptions(), {"PGSSLMODE": "require"}, "require"),
        (TLSOptions(mode="disable"), {"PGSSLMODE": "require"}, "disable"),
        (TLSOptions(root="system"), {}, "verify-full"),
        (TLSOptions(channel_binding="require"), {}, "verify-full"),
        (TLSOptions(mode="require", channel_binding="require"), {}, "verify-full"),
        (TLSOptions(mode="prefer", channel_binding="require"), {}, "verify-full"),
        (TLSOptions(mode="require", channel_binding="prefer"), {}, "require"),
        (TLSOptions(mode="require"), {"PGCHANNELBINDING": "require"}, "verify-full"),
        (TLSOptions(mode="require", direct=True), {}, "require"),
    ],
)
def test_the_mode(options: TLSOptions, environ: dict[str, str], mode: str) -> None:
    """The URL, then libpq's variables, then `prefer`; demands raise the mode, nothing lowers it."""
    assert resolve(options, environ).mode == mode


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (TLSOptions(mode="disable", channel_binding="require"), "contradicts sslmode=disable"),
        (TLSOptions(mode="require", root="system"), "sslmode=verify-full"),
        (TLSOptions(mode="prefer", direct=True), "sslnegotiation=direct"),
        (TLSOptions(mode="tls"), "'tls' is not one of"),
    ],
)
def test_contradictions(options: TLSOptions, says: str) -> None:
    """Demands that cannot both be met are refused."""
    with pytest.raises(ConfigurationError, match=says):
        resolve(options, {})


@pytest.mark.parametrize(
    ("mode", "root", "verify", "hostname"),
    [
        ("allow", None, ssl.CERT_NONE, False),
        ("prefer", None, ssl.CERT_NONE, False),
        ("require", None, ssl.CERT_NONE, False),
        ("require", "ca", ssl.CERT_REQUIRED, False),
        ("verify-ca", "ca", ssl.CERT_REQUIRED, False),
        ("verify-full", "ca", ssl.CERT_REQUIRED, True),
        ("verify-full", None, ssl.CERT_REQUIRED, True),
        ("verify-full", "system", ssl.CERT_REQUIRED, True),
    ],
)
def test_what_a_mode_verifies(files, mode, root, verify, hostname) -> None:
    """Each mode checks what libpq's does; a root certificate turns `require` into `verify-ca`."""
    context = create_context(TLSOptions(mode=mode, root=files.get(root, root)))

    assert (context.verify_mode, context.check_hostname) == (verify, hostname)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_disable_needs_no_context() -> None:
    """sslmode=disable makes none."""
    assert create_context(TLSOptions(mode="disable")) is None


def test_client_certificates_and_versions(files) -> None:
    """A client certificate loads, and the protocol versions are kept to."""
    context = create_context(
        TLSOptions(
            mode="require", certificate=files["client"], key=files["key"],
            minimum="TLSv1.3", maximum="TLSv1.3",
        )
    )  # fmt: skip
    assert (context.minimum_version, context.maximum_version) == (ssl.TLSVersion.TLSv1_3,) * 2


def test_certificates_in_their_default_place(files, tmp_path: Path) -> None:
    """~/.postgresql/root.crt is found, as by libpq."""
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / ".postgresql" / "root.crt").write_text(Path(files["ca"]).read_text())

    assert create_context(TLSOptions(mode="require")).verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"root": "/nowhere.pem"}, "sslrootcert=/nowhere.pem: there is no such file"),
        ({"root": "junk"}, "sslrootcert=.*junk.pem cannot be used"),
        ({"certificate": "/nowhere.pem"}, "sslcert or sslkey=/nowhere.pem: there is no such file"),
        ({"certificate": "junk"}, "sslcert or sslkey=.* cannot be used"),
        ({"key": "key"}, "sslkey is given without sslcert"),
        ({"crl": "/nowhere.crl"}, "sslcrl=/nowhere.crl"),
        ({"minimum": "TLSv9"}, "ssl_min_protocol_version='TLSv9'"),
    ],
)
def test_files_that_cannot_be_used(files, options, says) -> None:
    """A missing or broken file is named with its parameter when the engine is made."""
    given = {name: files.get(value, value) for name, value in options.items()}
    with pytest.raises(ConfigurationError, match=says):
        create_context(TLSOptions(mode="require", **given))


def test_verify_ca_needs_an_authority() -> None:
    """Trusting any public certificate without checking the host would be no check."""
    with pytest.raises(ConfigurationError, match="sslmode=verify-ca needs"):
        create_context(TLSOptions(mode="verify-ca"))
