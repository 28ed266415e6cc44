"""Which servers are on this machine."""

from ipaddress import ip_address

from poolkit.url import Address, DatabaseUrl

REMEDY = (
    "Tests write and delete, so poolkit's fixtures use servers of this machine only: localhost,"
    " 127.0.0.0/8, ::1 and Unix sockets. Name another by --poolkit-url or by overriding"
    " poolkit_settings; or, if it is there for tests, give --poolkit-allow-remote, the ini option"
    " poolkit_allow_remote = true, or POOLKIT_ALLOW_REMOTE=1"
)


def remote_host(url: DatabaseUrl) -> str | None:
    """The first host of the URL that is not this machine."""
    return next((a.host for a in url.addresses if not _is_local(a)), None)


def _is_local(address: Address) -> bool:
    if address.is_socket or address.host.lower() == "localhost":
        return True
    try:
        return ip_address(address.host).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return False
