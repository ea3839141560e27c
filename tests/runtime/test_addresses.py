"""Which hosts may be reached: spellings, names that resolve inwards, redirects, proxies, and where credentials go."""

from __future__ import annotations

import base64
import json
import socket

import numpy as np
import pytest
import rasterio

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes import access, remote
from rsedge.runtime.scenes.access import Access, host_of, is_inner, refuse_inner, refuse_literal
from rsedge.runtime.scenes.products.stac import read_stac
from rsedge.runtime.scenes.remote import Patience
from rsedge.runtime.scenes.scene import Scene
from tests import scenes
from tests.range_server import serve

QUICK = Patience(attempts=1, timeout=2)
HERE = ("127.0.0.1",)


@pytest.fixture
def server(tmp_path):
    scenes.write(tmp_path / "a.tif", scenes.pixels(3, 40, 50), driver="COG")
    with serve(tmp_path) as server:
        yield server


@pytest.fixture
def other(tmp_path):
    """Another port, so another host to rsedge, of the same files."""
    with serve(tmp_path) as server:
        yield server


def resolving(monkeypatch, **names):
    """Let names resolve to addresses without asking anybody."""
    real = socket.getaddrinfo

    def resolve(host, port, *args, **options):
        if host in names:
            return [
                answer for address in names[host].split() for answer in real(address, port, type=socket.SOCK_STREAM)
            ]
        if host.replace(".", "").isdecimal() or ":" in host:
            return real(host, port, *args, **options)
        raise AssertionError(f"{host} was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


# ---- addresses ----


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "100.64.0.1", "192.0.2.1", "198.18.0.1", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1", "2001:db8::1", "fe80::1%eth0"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "no address"),
    ],
)
def test_inner_addresses(address):
    assert is_inner(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_of_the_public_network(address):
    assert not is_inner(address)


SPELLINGS = [
    *(
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "127.0.0.1.",
    ),
    *("0", "0x0", "00", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[fe80::1]"),
    *("localhost", "LOCALHOST", "localhost.", "a.localhost", "ip6-localhost", "localhost.localdomain"),
    *("169.254.169.254", "0xA9FEA9FE", "2852039166", "0251.0376.0251.0376", "10.1", "999.0.0.1"),
]


@pytest.mark.parametrize("host", SPELLINGS)
def test_every_spelling_is_refused_without_a_look_up(host, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(SceneError, match=r"of this machine or its network.*--allow-host"):
        refuse_literal(host_of(f"http://{host}/a.tif"), ())
    with pytest.raises(SceneError, match="--allow-host"):
        remote.fetch_bytes(f"http://{host}:8080/a.json", patience=QUICK)
    with pytest.raises(SceneError, match="--allow-host"):
        remote.gdal_target(f"/vsicurl/https://{host}/a.tif", patience=QUICK)


def test_other_alphabets_spell_numbers_too():
    with pytest.raises(SceneError, match=r"of this machine.*--allow-host 127\.0\.0\.1:80"):
        remote.fetch_bytes("http://\uff11\uff12\uff17.0.0.1/a.json", patience=QUICK)


@pytest.mark.parametrize(
    "host", ["example.com", "1.1.1.1", "localhost.example.com", "notlocalhost", "127.0.0.1.nip.io"]
)
def test_other_hosts_pass_by_their_spelling(host):
    refuse_literal(host_of(f"https://{host}/a.tif"), ())


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://a@b@127.0.0.1/x",
            "http://127.0.0.1%00.example.com/x",
            "http://exa mple.com/",
            "http://a\\@127.0.0.1/x",
        ),
        *("http:///x", "http://host:99999/x", "http://host:x/x", "http://[fe80::1%25eth0]/x", "http://127%2e0.0.1/x"),
    ],
)
def test_hosts_that_two_programs_could_read_differently_are_refused(url, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(SceneError, match="is no host"):
        host_of(url)
    with pytest.raises(SceneError, match=r"is no host|--allow-host"):
        remote.fetch_bytes(url, patience=QUICK)


@pytest.mark.parametrize(
    ("named", "place", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1:80", True),
        ("127.0.0.1:8080", "127.0.0.1:8080", True),
        ("127.0.0.1:8080", "127.0.0.1:80", False),
        ("LocalHost", "localhost:80", True),
        ("localhost", "127.0.0.1:80", False),
        ("::1", "[::1]:80", True),
        ("[::1]:8080", "[::1]:80", False),
        ("[::1]:8080", "[::1]:8080", True),
        ("example.com", "localhost:80", False),
    ],
)
def test_hosts_that_the_user_named(named, place, allowed):
    Access(hosts=[named])
    if allowed:
        refuse_literal(place, [named])
    else:
        with pytest.raises(SceneError, match="--allow-host"):
            refuse_literal(place, [named])


@pytest.mark.parametrize("host", ["http://127.0.0.1", "a b", "", "host:port", "host/path"])
def test_hosts_that_are_none_are_refused(host):
    with pytest.raises(OptionError, match=r"is no host.*--allow-host"):
        Access(hosts=[host])


def test_a_name_is_judged_by_all_its_addresses(monkeypatch):
    resolving(monkeypatch, inner="10.1.2.3", mixed="93.184.216.34 127.0.0.1", outer="93.184.216.34")
    with pytest.raises(SceneError, match=r"the host inner \(10\.1\.2\.3\) is of this machine.*--allow-host inner:80"):
        refuse_inner("inner:80", ())
    with pytest.raises(SceneError, match=r"mixed \(127\.0\.0\.1\)"):
        refuse_inner("mixed:80", ())
    assert refuse_inner("outer:80", ())[0][4] == ("93.184.216.34", 80)
    assert refuse_inner("inner:80", ["inner"])[0][4] == ("10.1.2.3", 80)


# ---- connections ----


def test_the_address_that_is_connected_to_is_the_one_that_was_judged(server, monkeypatch):
    port = server.base.rpartition(":")[2]
    answers = ["93.184.216.34", "127.0.0.1"]
    asked = []

    def rebinding(host, port, *args, **options):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[len(asked) - 1], port))]

    connected = []
    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: connected.append(address) or exec("raise OSError"))
    with pytest.raises(SceneError, match="connection failed"):
        remote.fetch_bytes(f"http://rebind.test:{port}/a.tif", patience=QUICK)
    assert asked == ["rebind.test"]
    assert connected == [("93.184.216.34", int(port))]
    with pytest.raises(SceneError, match=r"the host rebind\.test \(127\.0\.0\.1\) is of this machine"):
        remote.fetch_bytes(f"http://rebind.test:{port}/a.tif", patience=QUICK)
    assert len(connected) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nothing_is_connected_to_where_a_name_resolves_inwards(server, monkeypatch, scheme):
    port = server.base.rpartition(":")[2]
    resolving(monkeypatch, **{"inner.test": "127.0.0.1"})
    monkeypatch.setattr(socket.socket, "connect", None)
    with pytest.raises(SceneError, match=r"inner\.test \(127\.0\.0\.1\)"):
        remote.fetch_bytes(f"{scheme}://inner.test:{port}/a.tif", patience=QUICK)
    assert server.requests == []


def test_a_named_host_is_reached(server, monkeypatch):
    port = server.base.rpartition(":")[2]
    resolving(monkeypatch, **{"inner.test": "127.0.0.1"})
    monkeypatch.setenv("no_proxy", "inner.test")
    url = f"http://inner.test:{port}/a.tif"
    assert remote.remote_state(url, hosts=[f"inner.test:{port}"], patience=QUICK)[2]
    assert remote.remote_state(url, hosts=["inner.test"], patience=QUICK)[2]


def test_behind_a_proxy_names_are_the_proxys_to_look_up(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, server.base)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    resolving(monkeypatch)
    with pytest.raises(SceneError, match="HTTP 404"):  # the server is asked for all of the URL, as a proxy is
        remote.fetch_bytes("http://example.test/b.tif", patience=QUICK)
    assert server.requests[0].path.endswith("b.tif")
    for host in ("127.0.0.1:1", "localhost", "0x7f.1"):
        with pytest.raises(SceneError, match="--allow-host"):
            remote.fetch_bytes(f"http://{host}/a.tif", patience=QUICK)
    assert len(server.requests) == 1


def test_ftp_is_judged_too(monkeypatch):
    resolving(monkeypatch, **{"inner.test": "127.0.0.1", "outer.test": "93.184.216.34"})
    for url in ("ftp://127.0.0.1/a.tif", "ftp://inner.test/a.tif", "/vsicurl/FTP://inner.test/a.tif"):
        with pytest.raises(SceneError, match="--allow-host"):
            remote.gdal_target(url, patience=QUICK)
    assert remote.gdal_target("ftp://outer.test/a.tif", patience=QUICK) == "/vsicurl/ftp://outer.test/a.tif"


@pytest.mark.parametrize("bucket", ["169.254.169.254:80?x", "localhost:80#", "a@b", "", "..", "a\\b"])
def test_a_bucket_cannot_name_a_host(bucket):
    with pytest.raises(SceneError, match="names no bucket"):
        remote.gdal_path(f"s3://{bucket}/key.tif")


# ---- redirects ----


def redirect(server, target, status=302, times=1, on="old"):
    server.fail(status, headers={"Location": target}, times=times, on=on)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server, status):
    redirect(server, "/a.tif", status)
    state = remote.remote_state(server.url("old.tif"), hosts=HERE, patience=QUICK)
    assert state[2] == (server.folder / "a.tif").stat().st_size
    assert [request.path for request in server.requests] == ["old.tif", "a.tif"]


def test_gdal_opens_what_redirects_lead_to(server, other):
    redirect(server, f"{other.base}/a.tif", times=9)
    hosts = [server.base.removeprefix("http://"), other.base.removeprefix("http://")]
    target = remote.gdal_target(remote.gdal_path(server.url("old.tif")), hosts=hosts, patience=QUICK)
    assert target == f"/vsicurl/{other.base}/a.tif"
    scene = Scene.open(server.url("old.tif"), allow_remote=True, allow_hosts=hosts, bands=(1, 2, 3))
    assert {request.path for request in server.requests} == {"old.tif"}
    window = np.empty((3, 40, 50), np.uint8)
    with scene.environment(), rasterio.open(scene.path) as dataset:
        dataset.read(out=window)
    np.testing.assert_array_equal(window, scenes.pixels(3, 40, 50))
    assert scene.identity()["remote"][0][0] == f"{other.base}/a.tif"
    assert {request.path for request in server.requests} == {"old.tif"}


def test_where_the_last_url_is_signed_gdal_opens_the_first(server):
    server.query = "X-Amz-Signature=1"
    redirect(server, "/a.tif?X-Amz-Signature=1")
    first = f"{server.base}/old.tif"
    assert remote.gdal_target(first, hosts=HERE, patience=QUICK) == f"/vsicurl/{first}"
    assert len(server.requests) == 2


def test_redirects_to_hosts_that_the_user_did_not_name_are_refused(server, other):
    named = [server.base.removeprefix("http://")]
    redirect(server, f"{other.base}/a.tif", times=3)
    port = other.base.rpartition(":")[2]
    for ask in (remote.fetch_bytes, remote.remote_state, remote.gdal_target):
        with pytest.raises(
            SceneError, match=rf"host 127\.0\.0\.1 is of this machine.*--allow-host 127\.0\.0\.1:{port}"
        ):
            ask(server.url("old.tif"), hosts=named, patience=QUICK)
    assert other.requests == []
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file:///etc/passwd", "redirects to file://"),
        ("ftp://example.com/a", "redirects to ftp://"),
        ("http://[/", "no URL"),
        ("http://a@b@127.0.0.1/", "is no host"),
        ("//169.254.169.254/latest/meta-data/", "--allow-host 169.254.169.254:80"),
        ("http://2130706433/", "--allow-host 2130706433:80"),
    ],
)
def test_redirects_that_lead_elsewhere(server, target, message):
    redirect(server, target)
    named = [server.base.removeprefix("http://")]
    with pytest.raises(SceneError, match=message):
        remote.fetch_bytes(server.url("old.json"), hosts=named, patience=QUICK)
    assert len(server.requests) == 1


def test_redirects_from_https_to_http_are_refused():
    assert remote._redirected("https://example.com/a", "/b") == "https://example.com/b"
    assert remote._redirected("http://example.com/a", "https://example.com/b") == "https://example.com/b"
    with pytest.raises(SceneError, match="redirects to http://"):
        remote._redirected("https://example.com/a", "http://example.com/b")


def test_five_redirects_are_followed_and_no_more(server):
    redirect(server, "/old.tif", times=5)
    with pytest.raises(SceneError, match="HTTP 404"):
        remote.fetch_bytes(server.url("old.tif"), hosts=HERE, patience=QUICK)
    assert len(server.requests) == 6
    redirect(server, "/old.tif", times=99)
    with pytest.raises(SceneError, match="redirects more than 5 times"):
        remote.fetch_bytes(server.url("old.tif"), hosts=HERE, patience=QUICK)
    assert len(server.requests) == 12


def test_credentials_stay_with_their_host(server, other, monkeypatch):
    sent = []
    real = access.urllib.request.Request

    def request(url, headers):
        sent.append((url, headers.get("Authorization")))
        return real(url, headers=headers)

    monkeypatch.setattr(remote.urllib.request, "Request", request)
    login = "Basic " + base64.b64encode(b"me:p@ss").decode()
    with_user = server.base.replace("http://", "http://me:p%40ss@")
    redirect(server, "/again.tif", on="old")
    redirect(server, f"{other.base}/a.tif", on="again")
    target = remote.gdal_target(f"{with_user}/old.tif", hosts=HERE, patience=QUICK)
    assert sent == [
        (f"{server.base}/old.tif", login),
        (f"{server.base}/again.tif", login),
        (f"{other.base}/a.tif", None),
    ]
    assert target == f"/vsicurl/{other.base}/a.tif"
    with pytest.raises(SceneError, match="HTTP 404") as caught:
        remote.fetch_bytes(f"{with_user}/none.tif", hosts=HERE, patience=QUICK)
    assert "p%40ss" not in str(caught.value)


# ---- items ----


def items(folder, *hrefs):
    assets = {band: {"href": href} for band, href in zip(("B04", "B03", "B02"), hrefs * 3, strict=False)}
    item = {"type": "Feature", "stac_version": "1.0.0", "id": "i", "properties": {}, "links": [], "assets": assets}
    (folder / "item.json").write_text(json.dumps(item))
    return folder / "item.json"


def test_a_local_item_may_not_name_hosts_of_this_network(server, tmp_path):
    elsewhere = tmp_path / "elsewhere"  # with no file of the same name beside it
    elsewhere.mkdir()
    path = items(elsewhere, server.url("a.tif"))
    with pytest.raises(OptionError, match="--allow-remote"):
        Scene.open(path)
    with pytest.raises(SceneError, match="--allow-host"):
        Scene.open(path, allow_remote=True)
    assert server.requests == []
    scene = Scene.open(path, allow_remote=True, allow_hosts=["127.0.0.1"])
    assert (scene.width, scene.height) == (50, 40)


def test_a_remote_item_may_name_its_own_host_and_no_other(server, other, tmp_path):
    items(tmp_path, "a.tif")
    scene = Scene.open(server.url("item.json"), allow_remote=True)
    assert np.all(np.isfinite(scene.transform[:6]))
    assert scene.identity()["remote"]
    items(tmp_path, f"{other.base}/a.tif")
    with pytest.raises(SceneError, match="--allow-host"):
        Scene.open(server.url("item.json"), allow_remote=True)
    items(tmp_path, f"//{other.base.removeprefix('http://')}/a.tif")
    with pytest.raises(SceneError, match="--allow-host"):
        Scene.open(server.url("item.json"), allow_remote=True)
    assert other.requests == []


@pytest.mark.parametrize(
    "href", ["gopher://h/a.tif", "zip+https://h/a.zip!a.tif", "sftp://h/a.tif", "https://[x/a.tif"]
)
def test_a_remote_item_may_name_known_schemes_only(server, tmp_path, href):
    items(tmp_path, href)
    with pytest.raises(SceneError, match=r"scheme|is none|no URL"):
        read_stac(server.url("item.json"), access=Access(remote=True))
