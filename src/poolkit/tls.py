"""TLS as libpq's ``sslmode`` and its companions demand it, never weaker."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from poolkit.errors import ConfigurationError

MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_VERSIONS = {
    "TLSv1": ssl.TLSVersion.TLSv1,
    "TLSv1.1": ssl.TLSVersion.TLSv1_1,
    "TLSv1.2": ssl.TLSVersion.TLSv1_2,
    "TLSv1.3": ssl.TLSVersion.TLSv1_3,
}


@dataclass(frozen=True, slots=True)
class TLSOptions:
    """What the URL says about TLS; None where it says nothing.

    Attributes:
        mode: One of ``MODES``.
        root: A file of trusted certificates, or ``system``.
        demand: The parameter that raised the mode to ``verify-full``, if one did.
        direct: Begin with the TLS handshake at once (``sslnegotiation=direct``).
    """

    mode: str | None = None
    root: str | None = None
    certificate: str | None = None
    key: str | None = None
    key_password: str | None = field(default=None, repr=False)
    crl: str | None = None
    crl_directory: str | None = None
    minimum: str | None = None
    maximum: str | None = None
    channel_binding: str | None = None
    send_certificate: bool = True
    direct: bool = False


def resolve(options: TLSOptions, environ: Mapping[str, str] = os.environ) -> TLSOptions:
    """Fill in libpq's defaults (``PGSSL*``, ``~/.postgresql``) and settle the mode.

    Raises:
        ConfigurationError: Two demands contradict each other.
    """
    options = replace(
        options,
        root=options.root or environ.get("PGSSLROOTCERT") or None,
        certificate=options.certificate or environ.get("PGSSLCERT") or None,
        key=options.key or environ.get("PGSSLKEY") or None,
        crl=options.crl or environ.get("PGSSLCRL") or None,
        channel_binding=options.channel_binding or environ.get("PGCHANNELBINDING") or None,
    )
    return replace(options, mode=_mode(options, options.mode or environ.get("PGSSLMODE") or None))


def _mode(options: TLSOptions, asked: str | None) -> str:
    if asked is not None and asked not in MODES:
        raise ConfigurationError(f"sslmode={asked!r} is not one of {', '.join(MODES)}")
    if options.channel_binding == "require":
        if asked == "disable":
            raise ConfigurationError(
                "channel_binding=require contradicts sslmode=disable: it needs TLS"
            )
        # asyncpg has no channel binding. What it protects against is an impostor server, and
        # that is met by checking the certificate and the host name.
        return "verify-full"
    if options.root == "system":
        if asked not in (None, "verify-full"):
            raise ConfigurationError(
                f"sslrootcert=system with sslmode={asked} would trust any server with a public"
                " certificate: write sslmode=verify-full"
            )
        return "verify-full"
    mode = asked or "prefer"
    if options.direct and MODES.index(mode) < MODES.index("require"):
        raise ConfigurationError(
            f"sslnegotiation=direct with sslmode={mode} cannot fall back: write sslmode=require"
            " or stronger"
        )
    return mode


def create_context(options: TLSOptions) -> ssl.SSLContext | None:
    """One context for all of an engine's connections; None for ``sslmode=disable``.

    Args:
        options: As ``resolve`` returned them.

    Raises:
        ConfigurationError: A file is missing or cannot be used; names the parameter.
    """
    if options.mode == "disable":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = options.mode == "verify-full"
    root = _root(options)
    context.verify_mode = ssl.CERT_REQUIRED if root else ssl.CERT_NONE
    context.minimum_version = _version("ssl_min_protocol_version", options.minimum or "TLSv1.2")
    if options.maximum:
        context.maximum_version = _version("ssl_max_protocol_version", options.maximum)
    if root == "system":
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    elif root:
        _load("sslrootcert", root, lambda: context.load_verify_locations(cafile=root))
    _load_revocations(context, options)
    if options.send_certificate:
        _load_certificate(context, options)
    if options.direct:
        context.set_alpn_protocols(["postgresql"])
    return context


def _root(options: TLSOptions) -> str | None:
    if options.root:
        return options.root
    default = _dot_postgresql("root.crt")
    if default.exists() and options.mode not in ("allow", "prefer"):
        return str(default)  # as in libpq, where it turns `require` into `verify-ca`
    if options.mode == "verify-ca":
        raise ConfigurationError(
            "sslmode=verify-ca needs the authority's certificate: add sslrootcert=<file>, or"
            " write sslmode=verify-full to trust the system's authorities"
        )
    return "system" if options.mode == "verify-full" else None


def _load_revocations(context: ssl.SSLContext, options: TLSOptions) -> None:
    crl, directory = options.crl, options.crl_directory
    if crl:
        _load("sslcrl", crl, lambda: context.load_verify_locations(cafile=crl))
    if directory:
        _load("sslcrldir", directory, lambda: context.load_verify_locations(capath=directory))
    if crl or directory:
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN


def _load_certificate(context: ssl.SSLContext, options: TLSOptions) -> None:
    certificate = options.certificate or _existing("postgresql.crt")
    key = options.key or _existing("postgresql.key")
    if options.key and not certificate:
        raise ConfigurationError("sslkey is given without sslcert: add sslcert=<file>")
    if certificate:
        _load(
            "sslcert or sslkey",
            f"{certificate}, {key}" if key else certificate,
            lambda: context.load_cert_chain(certificate, key, lambda: options.key_password or ""),
        )


def _load(parameter: str, path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except FileNotFoundError:
        raise ConfigurationError(f"{parameter}={path}: there is no such file") from None
    except OSError as error:  # ssl.SSLError too: what is there is no certificate
        reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
        raise ConfigurationError(f"{parameter}={path} cannot be used: {reason}") from None


def _version(parameter: str, name: str) -> ssl.TLSVersion:
    if name not in _VERSIONS:
        raise ConfigurationError(f"{parameter}={name!r} is not one of {', '.join(_VERSIONS)}")
    return _VERSIONS[name]


def _dot_postgresql(name: str) -> Path:
    # Not Path.expanduser, which raises where a container's user has no home.
    return Path(os.path.expanduser("~/.postgresql")) / name  # noqa: PTH111


def _existing(name: str) -> str | None:
    path = _dot_postgresql(name)
    return str(path) if path.exists() else None
