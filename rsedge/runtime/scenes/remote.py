"""What may be opened over the network, and how: GDAL's names and settings, documents, and what tells one state of a
file from the next.

Nothing remote is touched unless the user allows it. GDAL reads pixels by byte ranges; documents and states are asked
for with urllib, so that a dead host, a refusal or a missing file is told in our words before GDAL says "not recognized"
and remembers so for the life of the process. Redirects are followed there, each host is judged
(:mod:`rsedge.runtime.scenes.access`), and GDAL opens what they lead to. GDAL 3.10 follows up to 10 redirects itself
and has no setting against it: what a host answers GDAL after it answered us is not judged.

Object stores are read as GDAL reads them, with its own chain of credentials (``AWS_ACCESS_KEY_ID`` …, ``AWS_PROFILE``,
instance roles), never rasterio's, which needs boto3. Public buckets need ``AWS_NO_SIGN_REQUEST=YES``, buckets that
charge the reader ``AWS_REQUEST_PAYER=requester``, those outside us-east-1 often ``AWS_REGION``.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import math
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import parse_qs, quote, unquote, urldefrag, urljoin, urlsplit, urlunsplit

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes.access import checked_opener, host_of, refuse_inner
from rsedge.texts import SECRET_FIELD, redact

_FILE_SYSTEMS = {"s3": "/vsis3/", "gs": "/vsigs/", "az": "/vsiaz/", "oss": "/vsioss/", "swift": "/vsiswift/"}
_NETWORK = re.compile(
    r"[a-z][a-z0-9+.-]*://"  # anywhere: drivers such as WMTS: take URLs too
    r"|/vsi(?:curl|s3|gs|az|adls|oss|swift|hdfs|webhdfs)(?:_streaming)?[/?]"
    r"|^(?:wms|wmts|wcs|ogcapi|stacit|stacta|eedai?|plmosaic|plscenes|ngw|daas):",
    re.IGNORECASE,
)
_LOCAL_URL = re.compile(r"file://(?:localhost)?/", re.IGNORECASE)

_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]*")  # nothing that could end the host in a URL that GDAL makes of it

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 30.0  # seconds a host may ask us to wait
_DOCUMENT_LIMIT = 64 * 2**20
_MOST_DIGITS = 19  # of a size in bytes; Python refuses to read numbers of thousands
# A request for a document may take so many times the timeout before it is given up although bytes trickle in.
_TRICKLE = 6
_LARGE_READ = 30  # the same for pixels: a row of blocks of a whole scene is 10 MB and more

_BUCKETS = (
    "set AWS_NO_SIGN_REQUEST=YES for a public bucket, AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for a "
    "private one, AWS_REQUEST_PAYER=requester where the reader pays"
)
_SIGNATURE = re.compile(SECRET_FIELD, re.IGNORECASE)
_AZURE = frozenset(
    {"se", "sp", "sv", "sr", "st", "spr", "sip", "skoid", "sktid", "skt", "ske", "sks", "skv", "ss", "srt"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for a host.

    attempts: How often something is asked for, at least once; again after HTTP 408, 429, 500, 502, 503, 504, and
        connections that fail.
    delay: Seconds before the second attempt; doubled before each further one.
    timeout: Seconds without an answer, or with less than 1 kB/s, after which an attempt has failed.
    """

    attempts: int = 3
    delay: float = 0.5
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.delay < 0 or not self.timeout > 0:
            raise OptionError(f"{self} is no patience: expected attempts >= 1, delay >= 0 and timeout > 0 seconds")


PATIENCE = Patience()
"""Gives a dead host up after half a minute, a refusing one after two seconds."""


def is_remote(name: str) -> bool:
    """Whether opening ``name`` goes to the network: a URL but ``file:``, or a name of GDAL's that does."""
    if _LOCAL_URL.match(name):
        return False
    return _NETWORK.search(name) is not None


def check_allowed(names: Iterable[str], *, allow: bool) -> None:
    """Refuse what is remote where the user has not allowed it; OptionError names all of it."""
    remote = [] if allow else [unsigned(name) for name in names if is_remote(name)]
    if remote:
        verb = "is" if len(remote) == 1 else "are"
        raise OptionError(
            f"{', '.join(dict.fromkeys(remote))} {verb} remote, and rsedge opens local files unless told otherwise: "
            "pass --allow-remote (in Python, allow_remote=True), or download it first"
        )


def gdal_path(url: str) -> str:
    """What GDAL opens for a URL; a name that is GDAL's already stays as it is.

    Query strings stay, as signed URLs need them; spaces and letters beyond ASCII are escaped, which libcurl asks for.
    SceneError where the scheme is not one of http, https, ftp, s3, gs, az, oss and swift, or a bucket has no such name.
    """
    if "://" not in url or url.startswith("/vsi"):
        return url
    scheme, rest = url.split("://", 1)
    scheme = scheme.lower()
    if scheme in _FILE_SYSTEMS:
        if not _BUCKET.fullmatch(rest.split("/")[0]):
            raise SceneError(f"{url} names no bucket: expected {scheme}://BUCKET/KEY, with letters, digits, ., - and _")
        return _FILE_SYSTEMS[scheme] + rest  # keys as they are: GDAL escapes them
    if scheme not in ("http", "https", "ftp"):
        known = ", ".join(("http", "https", "ftp", *_FILE_SYSTEMS))
        raise SceneError(f"{unsigned(url)} has the scheme {scheme}://, and rsedge reads {known}: download it first")
    url = _escaped(url)
    if re.search(r"[?&](?:x-goog-)?signature=", url, re.IGNORECASE):
        # What is signed for GET refuses HEAD; GDAL knows that of Amazon's signatures only.
        return f"/vsicurl?use_head=no&url={quote(url, safe='')}"
    return f"/vsicurl/{url}"


def gdal_options(patience: Patience = PATIENCE) -> dict[str, str]:
    """Settings of ``rasterio.Env`` for reading over the network; names and defaults are those of GDAL 3.10.

    Only for scenes that are remote: files beside a local raster (masks, world files) are not seen under them. They hold
    for the thread that enters the ``Env``, so each that reads needs them.
    """
    seconds = str(max(1, math.ceil(patience.timeout)))
    return {
        # Default FALSE: lists the folder and looks for files beside each raster, several requests per band.
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        # Default 16384: headers of whole scenes are longer, and a second request costs more than the bytes.
        "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
        # Default 1.1: with HTTP/2, where a host speaks it over TLS, blocks come over one connection.
        "GDAL_HTTP_VERSION": "2TLS",
        # Default 0: no retry. GDAL doubles the delay, whose default is 30 s.
        "GDAL_HTTP_MAX_RETRY": str(patience.attempts - 1),
        "GDAL_HTTP_RETRY_DELAY": str(patience.delay),
        # Since 3.10; 0 stands for connections that ended without an answer, which the default leaves out.
        "GDAL_HTTP_RETRY_CODES": ",".join(map(str, (0, *sorted(_AGAIN)))),
        # Defaults: 300 s to connect, and nothing against a host that stops in the middle of an answer.
        "GDAL_HTTP_CONNECTTIMEOUT": seconds,
        "GDAL_HTTP_LOW_SPEED_TIME": seconds,
        "GDAL_HTTP_LOW_SPEED_LIMIT": "1000",
        # Default none; for a whole request.
        "GDAL_HTTP_TIMEOUT": str(_LARGE_READ * int(seconds)),
        # Left alone: GDAL_HTTP_MULTIPLEX and GDAL_HTTP_MERGE_CONSECUTIVE_RANGES are on by default; VSI_CACHE (off) and
        # a CPL_VSIL_CURL_CACHE_SIZE beyond 16 MB save no byte of COG or JP2 read row by row by two threads.
    }


def fetch_bytes(
    url: str, *, hosts: Sequence[str] = (), limit: int = _DOCUMENT_LIMIT, patience: Patience = PATIENCE
) -> bytes:
    """The document at an http or https URL.

    Args:
        url: Where it is.
        hosts: Hosts that may have an address of this machine or its network, as ``host`` or ``host:port``.
        limit: Bytes it may have.
        patience: For the host.

    Raises:
        SceneError: It cannot be had, has more bytes, or its host or one in a redirect is not allowed.
    """
    return _ask(url, limit, patience, hosts).body


def named_hosts(names: Iterable[str]) -> tuple[str, ...]:
    """The hosts of URLs, which the user named by naming these."""
    return tuple(dict.fromkeys(host_of(_escaped(url)) for url in map(_web_url, names) if url))


def gdal_target(path: str, *, hosts: Sequence[str] = (), patience: Patience = PATIENCE) -> str:
    """What GDAL opens for a remote file after redirects, all of whose hosts were judged; see :func:`fetch_bytes`.

    Where redirects lead to a URL with a signature, it is the name of ``path``: signatures end while a scene is read,
    and GDAL asks for a new one in time.
    """
    if re.match(r"ftp://|/vsicurl/ftp://", path, re.IGNORECASE):  # not ours to ask
        url = re.sub(r"^/vsicurl/", "", path)
        try:
            refuse_inner(host_of(url), hosts)
        except OSError as error:
            raise _problem(url, f"its host is not known ({error.strerror})", "check the address") from error
    if (web := _web_url(path)) is None:
        return gdal_path(path)
    final = _first_byte(web, hosts, patience).url
    signed = urlsplit(unsigned(final)).query != urlsplit(final).query
    return gdal_path(path if signed or final == _escaped(web) else final)


def remote_state(path: str, *, hosts: Sequence[str] = (), patience: Patience = PATIENCE) -> list[Any]:
    """What identifies a remote file as it is now, as JSON values without secrets: name, ETag or time, bytes.

    Asked for with a range of one byte and not with HEAD: signed URLs refuse HEAD, and this tells too whether the host
    answers ranges at all. Of an object store GDAL alone has the credentials; its name has to do there.
    SceneError where the file cannot be had, the host does not answer ranges, or a host is not allowed.
    """
    url = _web_url(path)
    if url is None:
        return [unsigned(path), None, None]
    answer = _first_byte(url, hosts, patience)
    total = (answer.headers.get("Content-Range") or "").rpartition("/")[2]
    changed = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    return [unsigned(url), changed, int(total) if total.isdecimal() and len(total) <= _MOST_DIGITS else None]


def _first_byte(url: str, hosts: Sequence[str], patience: Patience) -> _Answer:
    answer = _ask(url, 1, patience, hosts, {"Range": "bytes=0-0"})
    if answer.status != 206:
        raise _problem(url, "its host does not answer byte ranges", "download the file first, then pass the file")
    return answer


def unsigned(name: str) -> str:
    """A URL, or GDAL's name with one in it, without signatures, tokens and passwords: for messages and outputs, and to
    know a file again whose signature was renewed.
    """
    url = _web_url(name)
    if url is None:
        return redact(name)
    try:
        parts = urlsplit(url)
    except ValueError:  # no URL after all; what could be secret is left out all the same
        return re.sub(r"//[^/]*@", "//", url.partition("?")[0])
    fields = [(field.partition("=")[0].lower(), field) for field in parts.query.split("&") if field]
    azure = any(key == "sig" for key, _ in fields)
    kept = [field for key, field in fields if not (_SIGNATURE.fullmatch(key) or (azure and key in _AZURE))]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "&".join(kept), ""))


def read_problem(path: str, error: Exception) -> SceneError:
    """The error for a remote file that GDAL could not open or read (what rasterio raised), with what to do about it."""
    said = " ".join(str(error).split())
    if match := re.search(r"HTTP response code: (\d{3})", said):
        return _refused(path, int(match[1]))
    if "/vsis3" in path and ("AWS_" in said or "Credential" in said or "AccessDenied" in said):
        return _problem(path, "there are no credentials for it", _BUCKETS)
    if "Range downloading not supported" in said:
        return _problem(path, "its host does not answer byte ranges", "download the file first, then pass the file")
    return _problem(path, said, "check the address and the network")


@dataclass(frozen=True, slots=True)
class _Answer:
    url: str  # after redirects
    status: int
    headers: Message
    body: bytes


class _AttemptError(Exception):
    """An attempt failed; ``wait`` is what the host asked for, in seconds, or None."""

    def __init__(self, problem: SceneError, *, again: bool, wait: float | None = None) -> None:
        super().__init__(str(problem))
        self.problem, self.again, self.wait = problem, again, wait


def _ask(
    url: str, limit: int, patience: Patience, hosts: Sequence[str], headers: dict[str, str] | None = None
) -> _Answer:
    """The first ``limit`` bytes of a ranged answer, or a whole document of at most so many."""
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        raise SceneError(f"{unsigned(url)} cannot be fetched, only http and https can: download it, then pass the file")
    delay = patience.delay
    for attempt in range(1, patience.attempts + 1):
        try:
            at = _escaped(url)
            for _ in range(_MOST_REDIRECTS + 1):
                answer = _attempt(at, limit, patience.timeout, hosts, headers or {})
                if isinstance(answer, _Answer):
                    return answer
                at = answer
            raise _problem(url, f"it redirects more than {_MOST_REDIRECTS} times", "pass the address it is really at")
        except _AttemptError as failed:
            if not failed.again or attempt == patience.attempts:
                raise failed.problem from failed.__cause__
            time.sleep(max(delay, failed.wait or 0))
        delay *= 2
    raise AssertionError("there is at least one attempt")


def _attempt(url: str, limit: int, timeout: float, hosts: Sequence[str], headers: dict[str, str]) -> _Answer | str:
    """What a host answers, or the URL it redirects to."""
    end = time.monotonic() + _TRICKLE * timeout
    connections: list[http.client.HTTPConnection] = []
    # Headers may trickle too, and http.client reads them at one go.
    cut = threading.Timer(_TRICKLE * timeout, _shut_down, (connections,))
    cut.daemon = True
    cut.start()
    parts = urlsplit(url)
    user, _, place = parts.netloc.rpartition("@")
    login = {"Authorization": "Basic " + base64.b64encode(unquote(user).encode()).decode()} if user else {}
    try:
        request = urllib.request.Request(
            urlunsplit(parts._replace(netloc=place)),
            headers={"User-Agent": "rsedge", "Accept-Encoding": "identity", **login, **headers},
        )
        with checked_opener(url, hosts, connections).open(request, timeout=timeout) as response:
            if time.monotonic() > end:  # headers that were cut off look whole
                raise TimeoutError
            body = b""
            while len(body) <= limit and (piece := response.read1(min(65536, limit + 1 - len(body)))):
                body += piece
                if time.monotonic() > end:
                    raise TimeoutError
            length = response.headers.get("Content-Length") or ""
            if len(body) <= limit and length.isdecimal() and len(body) < int(length):
                raise ConnectionError(f"the answer ended after {len(body)} of {length} bytes")
            if "Range" not in headers and len(body) > limit:
                remedy = "download it, and pass a part of it"
                raise _AttemptError(_problem(url, f"it has more than {limit} bytes", remedy), again=False)
            return _Answer(url, response.status, response.headers, body[:limit])
    except SceneError as error:
        raise SceneError(f"{unsigned(url)} is not asked for: {error}") from error
    except HTTPError as error:
        error.close()
        if error.code in _REDIRECTS and (target := error.headers.get("Location")):
            return _redirected(url, target)
        asked = error.headers.get("Retry-After") or ""
        wait = min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else None
        raise _AttemptError(_refused(url, error.code), again=error.code in _AGAIN, wait=wait) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        raise _failed(url, TimeoutError() if time.monotonic() > end else reason, timeout) from error
    finally:
        cut.cancel()


def _shut_down(connections: Sequence[http.client.HTTPConnection]) -> None:
    for connection in connections:
        with contextlib.suppress(OSError, AttributeError):  # it has no socket before it is open, or after its headers
            connection.sock.shutdown(socket.SHUT_RDWR)


def _redirected(url: str, target: str) -> str:
    """The URL that a ``Location`` stands for; user and password stay with the host they were for."""
    try:
        before, after = urlsplit(url), urlsplit(_escaped(urljoin(url, target)))
    except ValueError as error:
        raise _problem(url, "it redirects to what is no URL", "pass the address it is really at") from error
    if after.scheme not in ("http", "https") or (before.scheme, after.scheme) == ("https", "http"):
        raise _problem(
            url,
            f"it redirects to {after.scheme}://, and rsedge follows redirects to https, and from http to http",
            "pass the address it is really at",
        )
    user = before.netloc.rpartition("@")[0]
    if user and "@" not in after.netloc and before[:2] == (after.scheme, f"{user}@{after.netloc}"):
        after = after._replace(netloc=before.netloc)
    return urlunsplit(after)


def _failed(url: str, reason: Exception, timeout: float) -> _AttemptError:
    """What went wrong short of an answer."""
    remedy, again = "check the address and the network (proxies come from HTTPS_PROXY and NO_PROXY)", True
    if isinstance(reason, TimeoutError):
        what = f"its host did not answer within {timeout:g} s"
    elif isinstance(reason, ssl.SSLCertVerificationError):
        what, again = f"its certificate is not trusted ({reason.verify_message})", False
        remedy = "check the address; SSL_CERT_FILE names certificates to trust"
    elif isinstance(reason, socket.gaierror):
        what, again = f"its host is not known ({reason.strerror})", reason.errno == socket.EAI_AGAIN
    else:
        again = isinstance(reason, (OSError, http.client.RemoteDisconnected, http.client.IncompleteRead))
        told = reason.strerror if isinstance(reason, OSError) else None
        what = f"the connection failed ({told or str(reason) or type(reason).__name__})"
    return _AttemptError(_problem(url, what, remedy), again=again)


def _refused(path: str, status: int) -> SceneError:
    meaning = http.client.responses.get(status, "")
    remedy = "open the address in a browser, or download the file first"
    if status in (401, 403):
        remedy = (
            "pass a URL that is signed, or a STAC item whose hrefs are (planetary_computer.sign does so for Planetary "
            "Computer); rsedge signs nothing and takes no alternate hrefs"
        )
        if "/vsis3" in path or path.startswith("s3:"):
            remedy = _BUCKETS
    elif status in (404, 410):
        remedy = "check the address"
    elif status in _AGAIN:
        remedy = "the host is busy or down: try again later"
    return _problem(path, f"its host answered HTTP {status}{f' ({meaning})' if meaning else ''}", remedy)


def _problem(path: str, what: str, remedy: str) -> SceneError:
    return SceneError(f"{unsigned(path)} cannot be read: {redact(what)}; {remedy}")


def _web_url(path: str) -> str | None:
    """The http or https URL of a name, or None."""
    if path.startswith(("/vsicurl?", "/vsicurl_streaming?")):
        path = parse_qs(path.partition("?")[2]).get("url", [""])[0]
    else:
        path = re.sub(r"^/vsicurl(_streaming)?/", "", path)
    return path if re.match(r"https?://", path, re.IGNORECASE) else None


def _escaped(url: str) -> str:
    """A URL in ASCII without its fragment; what is escaped stays so. SceneError where it is none."""
    try:
        parts = urlsplit(urldefrag(url).url)
        host = parts.netloc if parts.netloc.isascii() else unquote(parts.netloc).encode("idna").decode("ascii")
    except ValueError as error:
        raise SceneError(f"{unsigned(url)} is no URL: {error}; check the address") from error
    return quote(urlunsplit((parts.scheme, host, parts.path, parts.query, "")), safe="%/:=&?~+!$,;'@()*[]")
