"""What opening a scene may touch: the one policy behind ``--allow-remote``, ``--allow-host``, ``--allow-root``,
``--allow-vrt`` and ``--max-pixels``.

A raster, a STAC item or a product comes from strangers, and GDAL follows what a file names. So an input may name files
of its own folder only, and nothing at all on the network, unless the user says otherwise.

No address of this machine or its network is reached unless the user names the host. A STAC item or a redirect could
otherwise make rsedge ask services that only this machine can reach, such as those that hand out the credentials of a
cloud instance. The address is judged that a connection is made to, so that a name cannot have another one by then.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import socket
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rsedge.errors import OptionError, SceneError
from rsedge.texts import plain

MAX_PIXELS = 20_000_000_000
"""Default limit: the pixels of about 160 whole Sentinel-2 tiles at 10 m."""

# Names that make GDAL open something other than a file of that name: virtual file systems, inline documents, and
# prefixes such as GTIFF_DIR:, JPEG_SUBFILE:, WMS:.
_GDAL_NAME = re.compile(r"/vsi[a-z0-9_]+[/?]|<\s*[A-Za-z]|^[A-Za-z][A-Za-z0-9_+.-]+:(?!//)", re.IGNORECASE)

_NETWORK_HANDLER = re.compile(
    r"/vsi(?:curl|s3|gs|az|adls|oss|swift)(?:_streaming)?[/?](?!.*/vsi[a-z0-9_]+[/?]).*", re.IGNORECASE | re.DOTALL
)

_PORTS = {"http": 80, "https": 443, "ftp": 21}
# What --allow-host takes: a name or an address, and a port where only that one is meant.
_HOST = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\.?|\[?[0-9A-Fa-f:.]+\]?)(?::[0-9]{1,5})?")
# A host in letters that no two programs read differently, and a port.
_PLACE = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\.?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_USER = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:%-]*")
_THIS_MACHINE = re.compile(r"(?:.*\.)?(?:localhost|localhost\.localdomain|ip6-localhost|ip6-loopback)", re.IGNORECASE)
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))  # NAT64


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What inputs may reach; OptionError where ``max_pixels`` is below 1, a root is no folder, or a host is none."""

    remote: bool = False  # whether anything may be read over the network
    hosts: Sequence[str] = ()  # with local, loopback, link-local or private addresses that redirects and items may name
    roots: Sequence[Path] = ()  # folders beside an input's own that it may name files of
    vrt: bool = False  # whether a VRT may be opened
    max_pixels: int = MAX_PIXELS  # pixels that a raster may declare

    def __post_init__(self) -> None:
        problems = []
        if self.max_pixels < 1:
            problems.append(f"max_pixels is {self.max_pixels}, expected at least 1")
        problems += [f"root {root} is no folder" for root in self.roots if not Path(root).is_dir()]
        problems += [
            f"{host!r} is no host, such as example.com or 10.0.0.1:8080"
            for host in self.hosts
            if not _HOST.fullmatch(host)
        ]
        if problems:
            raise OptionError("; ".join(problems) + ": correct --max-pixels, --allow-root or --allow-host")

    def confine(self, path: Path, home: Path, *, what: str) -> Path:
        """Return the real path of a file that an input names, if it lies below the input's folder or a root.

        The path is judged as it is written first, so that nothing elsewhere is touched, and again after symbolic links
        are followed.

        Args:
            path: The file.
            home: Folder of the input.
            what: How a message calls the file, such as ``asset red of item.json``.

        Raises:
            SceneError: It lies elsewhere.
        """
        folders = [home, *map(Path, self.roots)]
        allowed = [folder.resolve() for folder in folders]
        written = Path(os.path.normpath(path.absolute()))
        real = written
        if any(written.is_relative_to(folder) for folder in (*allowed, *(each.absolute() for each in folders))):
            try:
                real = path.resolve()
            except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is none
                raise SceneError(f"{what} leads nowhere: {error}; pass files, not links in a circle") from error
            if any(real.is_relative_to(folder) for folder in allowed):
                return real
        raise SceneError(
            f"{what} leads to {real}, outside of {allowed[0]}: move the file there, or allow its folder with "
            f"--allow-root {real.parent}"
        )


LOCAL = Access()
"""Files alone, within the default limits."""


def shortened(name: str, most: int = 200) -> str:
    """A name for a message, cut off behind ``most`` characters."""
    return name if len(name) <= most else f"{name[:most]}…"


def refuse_handler(name: str) -> None:
    """Refuse, with SceneError, a name of GDAL's that a user typed, but those that read over the network, nothing
    inside.
    """
    if re.match(r"/vsi", name, re.IGNORECASE) and not _NETWORK_HANDLER.fullmatch(name):
        raise SceneError(
            f"{name} is a name of GDAL's own, and rsedge opens files, and over the network URLs, /vsicurl/, /vsis3/, "
            "/vsigs/, /vsiaz/, /vsioss/ and /vsiswift/: unpack what the file is in, or pass a .SAFE.zip as it is"
        )


def refuse_gdal_name(name: str, *, what: str) -> None:
    """Refuse, with SceneError, a name in an input that GDAL takes for other than a file or a URL; ``what`` is shown."""
    if match := _GDAL_NAME.search(name):
        shown = plain(match[0])
        raise SceneError(f"{what} holds {shown!r}, a name of GDAL's own, and an input may name files only: pass a file")


def is_plain_xml(data: bytes) -> bool:
    """Whether XML has no document type, so no entities that could grow, and is in UTF-8, as all that is read is.

    Parsers refuse encodings with other ASCII letters, and those of two bytes have zeros: so bytes can be compared.
    """
    return b"<!DOCTYPE" not in data and b"\0" not in data


# Hosts


def host_of(url: str) -> str:
    """Return the host and port of a URL, such as ``example.com:443``; SceneError where it has none that is
    understood.
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
    """Refuse, with SceneError, a host that is by its spelling of this machine or its network; no name is looked up.

    Args:
        place: See :func:`host_of`.
        hosts: What may be reached whatever its address, as ``host`` or ``host:port``.
    """
    host = urlsplit(f"//{place}").hostname or ""
    bare = host.rstrip(".")
    # An address may be spelled as IPv6, or as IPv4 in decimal, hexadecimal or octal numbers, one to four of them.
    address = host if ":" in host else None
    if not address and re.fullmatch(r"(?:0[xX][0-9a-fA-F]*|[0-9]+)(?:\.(?:0[xX][0-9a-fA-F]*|[0-9]+)){0,3}", bare):
        try:
            address = socket.inet_ntoa(socket.inet_aton(bare))
        except OSError:
            address = bare  # no address after all: refused as one
    if (address and is_inner(address)) or _THIS_MACHINE.fullmatch(bare):
        _refuse(place, address or host, hosts)


def refuse_inner(place: str, hosts: Sequence[str]) -> list[Any]:
    """Look a host up, and refuse it where one of its addresses is of this machine or its network.

    Returns what ``socket.getaddrinfo`` found; OSError where the host is not known. See :func:`refuse_literal`.
    """
    parts = urlsplit(f"//{place}")
    refuse_literal(place, hosts)
    found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    for *_, address in found:
        if is_inner(str(address[0])):
            _refuse(place, str(address[0]), hosts)
    return found


def checked_opener(
    url: str, hosts: Sequence[str], connections: list[http.client.HTTPConnection]
) -> urllib.request.OpenerDirector:
    """Return what asks for a URL of http or https, and follows no redirect. ``connections`` gets those it makes.

    A connection is made to an address that :func:`refuse_inner` accepts. Behind a proxy of the environment the names
    are the proxy's to look up, so that spellings alone are judged there.
    """
    refuse_literal(host_of(url), hosts)
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    behind = parts.scheme.lower() in proxies and not urllib.request.proxy_bypass(parts.netloc)
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(proxies if behind else {}),
        _Checked(None if behind else hosts, connections),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


class _Checked(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Connects to addresses that were judged; ``hosts`` is None where a proxy is asked."""

    def __init__(self, hosts: Sequence[str] | None, connections: list[http.client.HTTPConnection]) -> None:
        super().__init__()
        self._hosts, self._connections = hosts, connections

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._checked(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._checked(http.client.HTTPSConnection), request)

    def _checked(self, kind: type[http.client.HTTPConnection]) -> Callable[..., Any]:
        def make(host: str, **options: Any) -> http.client.HTTPConnection:
            connection = kind(host, **options)
            self._connections.append(connection)
            if self._hosts is not None:
                # The one place of http.client where a name becomes an address; a test sees it used.
                connection._create_connection = partial(_connect, self._hosts)  # type: ignore[attr-defined]
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


def _refuse(place: str, address: str, hosts: Sequence[str]) -> None:
    """Refuse a host unless the user named it."""
    wanted = urlsplit(f"//{place}")
    for host in hosts:
        named = urlsplit("//" + (host if host.count(":") < 2 or host.startswith("[") else f"[{host}]"))
        same = (named.hostname or "").rstrip(".") == (wanted.hostname or "").rstrip(".")
        if same and named.port in (None, wanted.port):
            return
    called = "" if address == wanted.hostname else f" ({address})"
    raise SceneError(
        f"the host {wanted.hostname}{called} is of this machine or its network, and only the user may name one: allow "
        f"it with --allow-host {place}"
    )
