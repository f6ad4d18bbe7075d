"""A process without network: the guard against connections, of the server, of its decoders and of a batch."""

import ipaddress
import sys
from collections.abc import Container
from typing import Any

# Python's names of what looks a name or an address up, which asks other machines.
_LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}


def forbid(names: Container[str] = ()) -> None:
    """No Python code of this process opens a connection, sends a datagram or looks a name up from now on: whatever tries is an error.

    Libraries in C are not held back by this; the unit and the image do that (IPAddressDeny, a network of its own).

    Args:
        names: that may be looked up, as the one that the server listens on; addresses of this machine always may.
    """

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if not event.startswith("socket."):
            return
        if event == "socket.connect":
            raise PermissionError("this server opens no connections")
        # Without an address it goes to a client that has connected.
        if event in ("socket.sendto", "socket.sendmsg") and arguments[1] is not None:
            raise PermissionError("this server sends no datagrams")
        if event in _LOOKUPS and not (named(arguments[0]) in names or is_own(named(arguments[0]))):
            raise PermissionError("this server looks no names up")

    sys.addaudithook(refuse)


def named(host: Any) -> str:
    """The host of a lookup's first argument: text, bytes, None for every address of this machine, or an address (host, port)."""
    if isinstance(host, tuple):
        host = host[0]
    return host.decode(errors="replace") if isinstance(host, bytes) else host or ""


def is_own(host: str) -> bool:
    """Whether looking it up asks nobody: no name at all, localhost, or a loopback or unspecified address."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host in ("", "localhost")
    return address.is_loopback or address.is_unspecified
