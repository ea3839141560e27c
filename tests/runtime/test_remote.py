from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import numpy as np
import pytest
import rasterio
from rasterio.errors import RasterioIOError
from rasterio.windows import Window

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import Access
from rsedge.runtime.scenes.products.stac import read_stac
from rsedge.runtime.scenes.remote import Patience
from tests import scenes
from tests.range_server import serve

HERE = ("127.0.0.1",)  # the server of the tests; without it loopback addresses are refused
QUICK = Patience(attempts=3, delay=0.01, timeout=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    scenes.write(
        folder / "a.tif", scenes.pixels(1, 700, 900, "uint16"), driver="COG", compress="DEFLATE", blocksize=128
    )
    (folder / "ü b.tif").write_bytes((folder / "a.tif").read_bytes())
    (folder / "item.json").write_text('{"type": "Feature"}')
    (folder / "page.json").write_text("<html>log in</html>")
    return folder


@pytest.fixture
def server(folder):
    with serve(folder) as server:
        yield server


def open_over(server, name="a.tif", patience=QUICK):
    with rasterio.Env(**remote.gdal_options(patience)):
        return rasterio.open(remote.gdal_path(server.url(name)))


# ---- what is remote ----


@pytest.mark.parametrize(
    "name",
    [
        "https://host/a.tif",
        "HTTP://host/a.tif",
        "s3://bucket/key.tif",
        "gs://bucket/key.tif",
        "az://container/key.tif",
        "/vsicurl/https://host/a.tif",
        "/vsicurl?use_head=no&url=https%3A%2F%2Fhost%2Fa.tif",
        "/vsis3/bucket/key.tif",
        "/vsis3_streaming/bucket/key.tif",
        "/vsizip//vsicurl/https://host/a.zip/a.tif",
        "/vsizip/{/vsigs/bucket/a.zip}/a.tif",
        "WMTS:https://host/capabilities.xml",
        "EEDAI:image",
        "file://server/share/a.tif",
    ],
)
def test_remote_names(name):
    assert remote.is_remote(name)


@pytest.mark.parametrize(
    "name",
    [
        "a.tif",
        "/data/a.tif",
        "file:///data/a.tif",
        "/vsizip/a.zip/a.tif",
        "SENTINEL2_L2A:/d/MTD.xml:10m:EPSG_32632",
        "-",
    ],
)
def test_local_names(name):
    assert not remote.is_remote(name)
    remote.check_allowed([name], allow=False)


def test_all_that_is_not_allowed_is_named_without_its_secrets():
    names = ["a.tif", "https://me:pw@host/a.tif?X-Amz-Signature=abc&v=1", "s3://bucket/key.tif"]
    with pytest.raises(OptionError, match="--allow-remote") as caught:
        remote.check_allowed(names, allow=False)
    assert "https://host/a.tif?v=1, s3://bucket/key.tif are remote" in str(caught.value)
    assert "abc" not in str(caught.value)
    remote.check_allowed(names, allow=True)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://host/a.tif", "/vsicurl/https://host/a.tif"),
        ("https://host/a b/ü.tif#part", "/vsicurl/https://host/a%20b/%C3%BC.tif"),
        ("https://host/a%20b.tif?sig=x%2By%3D&se=1", "/vsicurl/https://host/a%20b.tif?sig=x%2By%3D&se=1"),
        ("https://bücher.example/a.tif", "/vsicurl/https://xn--bcher-kva.example/a.tif"),
        ("https://h/a?X-Goog-Signature=a", "/vsicurl?use_head=no&url=https%3A%2F%2Fh%2Fa%3FX-Goog-Signature%3Da"),
        ("S3://bucket/some key.tif", "/vsis3/bucket/some key.tif"),
        ("gs://bucket/key", "/vsigs/bucket/key"),
        ("az://container/key", "/vsiaz/container/key"),
        ("/vsis3/bucket/key", "/vsis3/bucket/key"),
        ("/data/a.tif", "/data/a.tif"),
    ],
)
def test_names_for_gdal(url, path):
    assert remote.gdal_path(url) == path


def test_an_unknown_scheme_is_refused():
    with pytest.raises(SceneError, match=r"scheme sftp://.*https"):
        remote.gdal_path("sftp://host/a.tif")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://u:p@host:81/a?b=1&sig=s&se=2&sv=3", "https://host:81/a?b=1"),
        ("https://host/a?se=2&x-amz-date=1&X-Amz-Signature=2", "https://host/a?se=2"),
        ("/vsicurl/https://host/a?access_token=1", "https://host/a"),
        ("/vsicurl?use_head=no&url=https%3A%2F%2Fh%2Fa%3FX-Goog-Signature%3Da", "https://h/a"),
        ("/vsis3/bucket/key", "/vsis3/bucket/key"),
    ],
)
def test_secrets_are_left_out(name, shown):
    assert remote.unsigned(name) == shown


# ---- pixels over GDAL ----


def test_a_window_needs_less_than_the_file(folder, server):
    window = Window(100, 300, 64, 64)
    with rasterio.Env(**remote.gdal_options()), open_over(server) as dataset:
        values = dataset.read(1, window=window)
    with rasterio.open(folder / "a.tif") as dataset:
        np.testing.assert_array_equal(values, dataset.read(1, window=window))
    assert server.sent < (folder / "a.tif").stat().st_size / 3
    assert {request.path for request in server.requests} == {"a.tif"}  # nothing beside it was looked for


def test_a_busy_host_is_asked_again(server):
    server.fail(503, times=2)
    with open_over(server) as dataset:
        assert dataset.width == 900
    server.fail(429, times=2)
    with open_over(server, "ü b.tif") as dataset, rasterio.Env(**remote.gdal_options(QUICK)):
        assert dataset.read(1).shape == (700, 900)


def test_a_dropped_connection_is_asked_again(server):
    server.drop()
    with open_over(server) as dataset, rasterio.Env(**remote.gdal_options(QUICK)):
        server.drop()
        assert dataset.read(1).any()


def test_a_stalled_host_is_given_up(server):
    server.stall(60)
    start = time.monotonic()
    with pytest.raises(RasterioIOError) as caught:
        open_over(server, patience=Patience(attempts=2, delay=0.01, timeout=1))
    assert time.monotonic() - start < 20
    assert server.base in str(remote.read_problem(remote.gdal_path(server.url("a.tif")), caught.value))


def test_signed_urls_that_refuse_head(server):
    server.head, server.query = False, "X-Goog-Signature=a%2Fb%3D&X-Goog-Expires=9"
    with open_over(server) as dataset:
        assert dataset.width == 900


def test_what_gdal_says_becomes_an_error_with_a_remedy(server):
    path = remote.gdal_path(server.url("missing.tif"))
    with pytest.raises(RasterioIOError) as caught:
        open_over(server, "missing.tif")
    assert "HTTP 404 (Not Found); check the address" in str(remote.read_problem(path, caught.value))
    error = RasterioIOError("AWS_SECRET_ACCESS_KEY and AWS_NO_SIGN_REQUEST configuration options not defined")
    assert "AWS_NO_SIGN_REQUEST=YES" in str(remote.read_problem("/vsis3/bucket/key.tif", error))
    error = RasterioIOError("HTTP response code: 403")
    assert "AWS_REQUEST_PAYER" in str(remote.read_problem("/vsis3/bucket/key.tif", error))
    assert "alternate hrefs" in str(remote.read_problem("/vsicurl/https://host/key.tif", error))


# ---- documents and states ----


def unknown_host(*args, **options):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_documents(server):
    assert json.loads(remote.fetch_bytes(server.url("item.json"), hosts=HERE, patience=QUICK)) == {"type": "Feature"}
    with pytest.raises(SceneError, match=r"page\.json is no JSON document.*log in"):
        read_stac(server.url("page.json"), access=Access(remote=True))
    with pytest.raises(SceneError, match="more than 10 bytes"):
        remote.fetch_bytes(server.url("item.json"), hosts=HERE, limit=10, patience=QUICK)
    size = len(remote.fetch_bytes(server.url("item.json"), hosts=HERE))
    assert len(remote.fetch_bytes(server.url("item.json"), hosts=HERE, limit=size)) == size
    with pytest.raises(SceneError, match="http and https"):
        remote.fetch_bytes("file:///etc/hostname")


def test_faults_that_pass_are_waited_out(server):
    server.fail(503, times=1)
    server.drop(times=1)
    assert json.loads(remote.fetch_bytes(server.url("item.json"), hosts=HERE, patience=QUICK)) == {"type": "Feature"}
    server.drop(after=5, times=2)
    assert json.loads(remote.fetch_bytes(server.url("item.json"), hosts=HERE, patience=QUICK)) == {"type": "Feature"}
    server.fail(429, headers={"Retry-After": "1"})
    start = time.monotonic()
    remote.fetch_bytes(server.url("item.json"), hosts=HERE, patience=QUICK)
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize(
    ("status", "requests", "says"),
    [(503, 3, r"HTTP 503 .*try again later"), (404, 1, "check the address"), (403, 1, "signed"), (418, 1, "HTTP 418")],
)
def test_what_does_not_pass_is_told_with_status_and_host(server, status, requests, says):
    server.fail(status, times=9)
    with pytest.raises(SceneError, match=says) as caught:
        remote.fetch_bytes(server.url("item.json"), hosts=HERE, patience=QUICK)
    assert "127.0.0.1" in str(caught.value)
    assert len(server.requests) == requests


def test_a_dead_host_ends_in_an_error(server, monkeypatch):
    server.stall(60)
    start = time.monotonic()
    with pytest.raises(SceneError, match=r"did not answer within 0\.2 s"):
        remote.fetch_bytes(server.url("item.json"), hosts=HERE, patience=Patience(attempts=2, delay=0.01, timeout=0.2))
    with pytest.raises(SceneError, match=r"127\.0\.0\.1:1/a\.tif .* connection failed \(Connection refused\); check"):
        remote.remote_state("http://127.0.0.1:1/a.tif", hosts=HERE, patience=QUICK)
    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    with pytest.raises(SceneError, match="host is not known"):
        remote.fetch_bytes("http://nowhere.invalid/a.json", patience=Patience(attempts=1, timeout=2))
    assert time.monotonic() - start < 20


def test_an_answer_that_trickles_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote, "_TRICKLE", 0)
    with pytest.raises(SceneError, match="did not answer"):
        remote.fetch_bytes(server.url("item.json"), hosts=HERE, patience=Patience(attempts=1))


def test_a_size_of_thousands_of_digits_is_unknown(tmp_path, monkeypatch):
    (tmp_path / "a.tif").write_bytes(b"abc")
    first = remote._first_byte

    def answer(*arguments):
        found = first(*arguments)
        found.headers.replace_header("Content-Range", "bytes 0-0/" + "9" * 5000)
        return found

    monkeypatch.setattr(remote, "_first_byte", answer)
    with serve(tmp_path) as server:
        assert remote.remote_state(server.url("a.tif"), hosts=HERE, patience=QUICK)[2] is None


def test_states_change_with_the_file_and_not_with_the_signature(tmp_path):
    file = tmp_path / "a.tif"
    file.write_bytes(b"abc")
    with serve(tmp_path) as server:
        server.head = False
        server.query = "Signature=1"
        first = remote.remote_state(remote.gdal_path(server.url("a.tif")), hosts=HERE, patience=QUICK)
        assert first[0] == f"{server.base}/a.tif"
        assert first[2] == 3
        assert server.sent == 1
        server.query = "Signature=2"
        assert remote.remote_state(server.url("a.tif"), hosts=HERE, patience=QUICK) == first
        file.write_bytes(b"abcd")
        assert remote.remote_state(server.url("a.tif"), hosts=HERE, patience=QUICK) != first
    assert json.loads(json.dumps(first)) == first
    assert remote.remote_state("/vsis3/bucket/key") == ["/vsis3/bucket/key", None, None]


def test_a_host_without_ranges_is_named(server):
    server.ranges = False
    with pytest.raises(SceneError, match=r"byte ranges; download the file"):
        remote.remote_state(server.url("a.tif"), hosts=HERE, patience=QUICK)


@pytest.mark.parametrize("options", [{"attempts": 0}, {"delay": -1}, {"timeout": 0}, {"timeout": float("nan")}])
def test_patience_is_checked(options):
    with pytest.raises(OptionError, match="patience"):
        Patience(**options)


def test_headers_that_trickle_are_given_up(monkeypatch):
    monkeypatch.setattr(remote, "_TRICKLE", 0.5)
    closing = threading.Event()

    def trickle() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not closing.wait(0.1):
                connection.sendall(b"a")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=trickle)
        server.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/item.json"
            with pytest.raises(SceneError, match="did not answer"):
                remote.fetch_bytes(url, hosts=HERE, patience=Patience(attempts=1, timeout=1))
        finally:
            closing.set()
            server.join()
