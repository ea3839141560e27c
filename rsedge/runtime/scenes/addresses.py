"""Which hosts may be reached: no address of this machine or its network, unless the user names the host.

A STAC item or a redirect could otherwise make rsedge ask services that only this machine can reach, such as those that
hand out the credentials of a cloud instance. The address is judged that a connection is made to, so that a name cannot
have another one by then.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

from rsedge.errors import SceneError

_PORTS = {"http": 80, "https": 443, "ftp": 21}
HOST = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\.?|\[?[0-9A-Fa-f:.]+\]?)(?::[0-9]{1,5})?")
"""What ``--allow-host`` takes: a name or an address, and a port where only that one is meant."""
# A host in letters that no two programs read differently, and a port.
_PLACE = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\.?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_USER = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:%-]*")
_THIS_MACHINE = re.compile(r"(?:.*\.)?(?:localhost|localhost\.localdomain|ip6-localhost|ip6-loopback)", re.IGNORECASE)
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))  # NAT64


def host_of(url: str) -> str:
    """Return the host and port of a URL, such as ``example.com:443``.

    Raises:
        SceneError: It has none that is understood.
    """
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    try:
        port = parts.port or _PORTS.get(parts.scheme.lower(), 0)
    except ValueError:
        port = 0
    user = parts.netloc.rpartition("@")[0]
    if not _PLACE.fullmatch(place) or not _USER.fullmatch(user) or not port or not parts.hostname:
        raise SceneError(f"{place!r} is no host: expected letters, digits, dots and hyphens, and a port where needed")
    return f"[{parts.hostname}]:{port}" if ":" in parts.hostname else f"{parts.hostname}:{port}"


def is_inner(address: str) -> bool:
    """Whether an IP address is not one of the public network: loopback, link-local, private, unspecified, multicast."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return True
    if isinstance(found, ipaddress.IPv6Address):
        inside = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if any(found in network for network in _TRANSLATED) or (int(found) >> 32 == 0 and int(found) > 1):
            inside = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inside:
            return is_inner(str(inside))
        if found.is_site_local:
            return True
    return not found.is_global or found.is_multicast or found.is_reserved


def refuse_literal(place: str, hosts: Sequence[str]) -> None:
    """Refuse a host that is by its spelling of this machine or its network; no name is looked up.

    Args:
        place: See :func:`host_of`.
        hosts: What may be reached whatever its address, as ``host`` or ``host:port``.

    Raises:
        SceneError: It is one, and ``hosts`` does not have it.
    """
    host = _split(place).hostname or ""
    address = _literal(host)
    if (address and is_inner(address)) or _THIS_MACHINE.fullmatch(host.rstrip(".")):
        _refuse(place, address or host, hosts)


def refuse_inner(place: str, hosts: Sequence[str]) -> list[Any]:
    """Look a host up, and refuse it where one of its addresses is of this machine or its network.

    Args:
        place, hosts: See :func:`refuse_literal`.

    Returns:
        What ``socket.getaddrinfo`` found.

    Raises:
        SceneError: It has such an address, and ``hosts`` does not have it.
        OSError: It is not known.
    """
    parts = _split(place)
    refuse_literal(place, hosts)
    found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    for *_, address in found:
        if is_inner(str(address[0])):
            _refuse(place, str(address[0]), hosts)
    return found


def checked_opener(url: str, hosts: Sequence[str]) -> urllib.request.OpenerDirector:
    """Return what asks for a URL of http or https, and follows no redirect.

    A connection is made to an address that :func:`refuse_inner` accepts. Behind a proxy of the environment the names
    are the proxy's to look up, so that spellings alone are judged there.

    Raises:
        SceneError: As :func:`refuse_literal`.
    """
    refuse_literal(host_of(url), hosts)
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    behind = parts.scheme.lower() in proxies and not urllib.request.proxy_bypass(parts.netloc)
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(proxies if behind else {}),
        _Http(None if behind else hosts),
        _Https(None if behind else hosts),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


class _Http(urllib.request.HTTPHandler):
    def __init__(self, hosts: Sequence[str] | None) -> None:
        super().__init__()
        self._hosts = hosts

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_checked(http.client.HTTPConnection, self._hosts), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, hosts: Sequence[str] | None) -> None:
        super().__init__()
        self._hosts = hosts

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_checked(http.client.HTTPSConnection, self._hosts), request)


def _checked(kind: type[http.client.HTTPConnection], hosts: Sequence[str] | None) -> Callable[..., Any]:
    """Make connections of a kind that judge the address they connect to; None for those to a proxy."""

    def make(host: str, **options: Any) -> http.client.HTTPConnection:
        connection = kind(host, **options)
        if hosts is not None:
            # The one place of http.client where a name becomes an address; a test sees it used.
            connection._create_connection = partial(_connect, hosts)  # type: ignore[attr-defined]
        return connection

    return make


def _connect(hosts: Sequence[str], address: tuple[str, int], timeout: Any = None, _source: Any = None) -> socket.socket:
    """Connect to a host, at an address that was judged."""
    host, port = address
    failed: OSError = OSError("it has no address")
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    for family, kind, protocol, _, found in refuse_inner(place, hosts):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            connection.connect(found)
        except OSError as error:
            connection.close()
            failed = error
        else:
            return connection
    raise failed


def _split(place: str) -> SplitResult:
    return urlsplit(f"//{place}")


def _literal(host: str) -> str | None:
    """The address that a host spells: IPv6, or IPv4 in decimal, hexadecimal or octal numbers, one to four of them."""
    if ":" in host:
        return host
    bare = host.rstrip(".")
    if not re.fullmatch(r"(?:0[xX][0-9a-fA-F]*|[0-9]+)(?:\.(?:0[xX][0-9a-fA-F]*|[0-9]+)){0,3}", bare):
        return None
    try:
        return socket.inet_ntoa(socket.inet_aton(bare))
    except OSError:
        return bare  # no address after all: refused as one


def _refuse(place: str, address: str, hosts: Sequence[str]) -> None:
    """Refuse a host unless the user named it."""
    wanted = _split(place)
    for host in hosts:
        named = _split(host if host.count(":") < 2 or host.startswith("[") else f"[{host}]")
        same = (named.hostname or "").rstrip(".") == (wanted.hostname or "").rstrip(".")
        if same and named.port in (None, wanted.port):
            return
    called = "" if address == wanted.hostname else f" ({address})"
    raise SceneError(
        f"the host {wanted.hostname}{called} is of this machine or its network, and only the user may name one: allow "
        f"it with --allow-host {place}"
    )
