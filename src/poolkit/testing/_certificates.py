"""Certificates for a throwaway server with TLS."""

from dataclasses import dataclass

from poolkit.testing._errors import PostgresServerError

_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Certificates:
    """A certificate authority made for one server, and the certificate that it issued; all PEM."""

    ca: bytes
    chain: bytes
    key: bytes


def make_certificates() -> Certificates:
    """Make a certificate authority and a certificate for the names of this machine."""
    try:
        import trustme  # noqa: PLC0415 - needed, and installed, for TLS only
    except ImportError as error:
        raise PostgresServerError(
            "tls=True needs the package trustme: pip install 'poolkit[postgres]'"
        ) from error
    authority = trustme.CA()
    issued = authority.issue_cert(*_NAMES)
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    return Certificates(authority.cert_pem.bytes(), chain, issued.private_key_pem.bytes())
