"""Confinement, tried from inside: every attempt is made once unconfined (and works) and once confined (and fails)."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rsedge.errors import SandboxError
from rsedge.runtime.sandbox import landlock, seccomp
from rsedge.runtime.sandbox import process as sandbox
from rsedge.runtime.sandbox.landlock import Files, landlock_abi
from tests import scenes

needs_landlock = pytest.mark.skipif(landlock_abi() < 1, reason="this kernel has no Landlock")
needs_seccomp = pytest.mark.skipif(not seccomp.can_filter(), reason="this kernel takes no filter of system calls")

PRELUDE = """
import ctypes, errno, json, os, signal, socket, subprocess, sys, threading
from pathlib import Path
inside, outside, port, confined, read, write = json.loads(sys.argv[1])
inside, outside = Path(inside), Path(outside)
libc = ctypes.CDLL(None, use_errno=True)
if confined:
    from rsedge.runtime.sandbox.process import confine
    confine(read=read, write=write)
def failed():
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    """A folder that will be in reach, and one that will not, with a file each."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "file").write_text("content")
    return inside, outside


def attempt(place: tuple[Path, Path], code: str, *, confined: bool, port: int = 0, writable: bool = True) -> str:
    """``done``, or the name of the errno with which ``code`` fails; anything else is a fault of the test."""
    inside, outside = map(str, place)
    body = textwrap.indent(textwrap.dedent(code).strip(), "    ")
    program = f"{PRELUDE}\ntry:\n{body}\nexcept OSError as error:\n    print(errno.errorcode[error.errno])\nelse:\n"
    given = json.dumps([inside, outside, port, confined, [inside], [inside] if writable else []])
    result = subprocess.run(
        [sys.executable, "-c", f"{program}    print('done')", given], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


OUT_OF_REACH = {
    "open": "(outside / 'file').read_bytes()",
    "open in C": "libc.open(os.fsencode(outside / 'file'), os.O_RDONLY) >= 0 or failed()",
    "open in a thread started later": """
        found = []
        def look():
            try:
                (outside / "file").read_bytes()
            except OSError as error:
                found.append(error)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        if found:
            raise found[0]""",
    "list": "os.listdir(outside)",
    "through a link": "(inside / 'link').symlink_to(outside); (inside / 'link' / 'file').read_bytes()",
    "through the root of a process": "Path(f'/proc/self/root{outside}/file').read_bytes()",
    "through a process's folder": "os.chdir(outside); Path('/proc/self/cwd/file').read_bytes()",
    "memory of the parent": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "write": "(outside / 'file').write_text('x')",
    "append": "(outside / 'file').open('a')",
    "create": "(outside / 'new').write_text('x')",
    "delete": "(outside / 'file').unlink()",
    "rename out": "(inside / 'file').rename(outside / 'new')",
    "rename in": "(outside / 'file').rename(inside / 'new')",
    "hard link in": "os.link(outside / 'file', inside / 'new')",
    "make a folder": "(outside / 'new').mkdir()",
    "make a link": "(inside / 'new').symlink_to('file')",
    "make a pipe": "os.mkfifo(inside / 'new')",
    "make a device": "os.mknod(outside / 'new', 0o600 | 0o020000, os.makedev(1, 3))",
    "empty": "os.truncate(outside / 'file', 0)",
}


@needs_landlock
@pytest.mark.parametrize("code", OUT_OF_REACH.values(), ids=OUT_OF_REACH)
def test_files_not_named_are_out_of_reach(place, code):
    free = attempt(place, code, confined=False)
    if free == "EPERM" and "mknod" in code:
        pytest.skip("only root makes devices")
    assert free == "done"
    for made in ("link", "new"):
        for folder in place:
            (folder / made).is_dir() and not (folder / made).is_symlink() and (folder / made).rmdir()
            (folder / made).unlink(missing_ok=True)
    for folder in place:
        (folder / "file").write_text("content")
    assert attempt(place, code, confined=True) in ("EACCES", "EPERM", "EXDEV")
    assert (place[1] / "file").read_text() == "content"
    assert [path.name for path in place[1].iterdir()] == ["file"]


@needs_landlock
@pytest.mark.parametrize(
    "code",
    [
        "assert (inside / 'file').read_text() == 'content'; os.listdir(inside)",
        "(inside / 'new').write_text('x'); (inside / 'new').replace(inside / 'file'); (inside / 'file').unlink()",
        "(inside / 'below').mkdir(); (inside / 'below' / 'new').write_text('x'); os.truncate(inside / 'file', 0)",
        "import numpy, rasterio, onnxruntime, pyarrow, PIL.Image, zoneinfo; zoneinfo.ZoneInfo('Europe/Berlin')",
        "open('/dev/null', 'w').write('x'); os.getloadavg(); open('/proc/self/status').read(); os.urandom(8)",
    ],
)
def test_what_is_named_and_what_python_needs_works(place, code):
    assert attempt(place, code, confined=True) == "done"


@needs_landlock
@pytest.mark.parametrize("code", ["(inside / 'file').write_text('x')", "os.truncate(inside / 'file', 0)"])
def test_what_may_be_read_cannot_be_changed(place, code):
    if landlock_abi() < 3 and "truncate" in code:
        pytest.skip("Landlock of this kernel does not know of truncation")
    assert attempt(place, code, confined=False) == "done"
    (place[0] / "file").write_text("content")
    assert attempt(place, code, confined=True, writable=False) == "EACCES"
    assert (place[0] / "file").read_text() == "content"


@needs_landlock
def test_gdal_follows_nothing_out(place):
    """A VRT inside names a raster outside; GDAL itself is asked to open it."""
    inside, outside = place
    scenes.write(outside / "secret.tif", scenes.pixels(1, 8, 8))
    (inside / "scene.vrt").write_text(
        '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="0">{outside / "secret.tif"}</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    code = """
    import rasterio
    try:
        with rasterio.open(inside / 'scene.vrt') as dataset:
            dataset.read(1)
    except rasterio.errors.RasterioError as error:
        raise OSError(errno.EIO, str(error))"""
    assert attempt(place, code, confined=False) == "done"
    assert attempt(place, code, confined=True) == "EIO"


@needs_landlock
def test_names_alone_of_a_listed_folder(tmp_path):
    (tmp_path / "file").write_text("content")
    code = f"""
    import os
    from rsedge.runtime.sandbox.process import confine
    confine(listed=[{str(tmp_path)!r}])
    print(os.listdir({str(tmp_path)!r}))
    open({str(tmp_path / "file")!r})
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "['file']"
    assert "PermissionError" in result.stderr


@needs_landlock
def test_devices_of_a_gpu_can_be_driven_only_where_asked(place):
    if landlock_abi() < 5:
        pytest.skip("Landlock of this kernel does not know of devices")
    code = """
    import fcntl
    from rsedge.runtime.sandbox import process as sandbox
    sandbox._GPU_DEVICES = ("full",)
    sandbox.confine(gpu={})
    fcntl.ioctl(os.open("/dev/full", os.O_RDWR), 0x5401)"""
    assert attempt(place, code.format(True), confined=False) == "ENOTTY"  # the device itself said no
    assert attempt(place, code.format(False), confined=False) == "EACCES"


OUTSIDE_WORLD = {
    "TCP": "socket.create_connection(('127.0.0.1', port)).close()",
    "TCP in C": "libc.socket(2, 1, 0) >= 0 or failed()",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "IPv6": "socket.socket(socket.AF_INET6)",
    "UNIX": "socket.socket(socket.AF_UNIX)",
    "pair": "socket.socketpair()",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "program": "subprocess.run([sys.executable, '-c', ''], check=True)",
    "program in place of this one": "os.execv(sys.executable, [sys.executable, '-c', 'print(\"done\")'])",
    "fork": "os.fork() or os._exit(0)",
    "spawn": "os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {})",
    "signal to the parent": "os.kill(os.getppid(), 0)",
    "mode": "os.chmod(inside / 'file', 0o777)",
    "mode of an open file": "os.fchmod(os.open(inside / 'file', os.O_RDONLY), 0o777)",
    "owner": "os.chown(inside / 'file', os.getuid(), os.getgid())",
    "attribute": "os.utime(inside / 'file', (0, 0))",
    "name space": "libc.unshare(0) == 0 or failed()",
    "shared memory": "libc.shmget(0, 4096, 0o1600) >= 0 or failed()",
}


@needs_landlock
@needs_seccomp
@pytest.mark.parametrize("code", OUTSIDE_WORLD.values(), ids=OUTSIDE_WORLD)
def test_no_network_and_no_other_processes(place, code):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        free = attempt(place, code, confined=False, port=port)
        if free in ("EAFNOSUPPORT", "EPROTONOSUPPORT", "ENOSYS"):
            pytest.skip(f"this machine has none: {free}")
        assert free == "done"
        assert attempt(place, code, confined=True, port=port) == "EPERM"


@needs_landlock
@needs_seccomp
def test_names_are_not_looked_up_and_a_process_may_signal_itself(place):
    lookup = "socket.getaddrinfo('localhost', 80) if sys.argv else 0"
    assert attempt(place, lookup, confined=False) == "done"
    with pytest.raises(AssertionError, match="gaierror"):  # not an OSError with a number of the kernel's
        attempt(place, lookup.replace("socket.get", "errno.errorcode.pop(-3, 0); socket.get"), confined=True)
    itself = "signal.signal(signal.SIGUSR1, lambda *_: 0); os.kill(os.getpid(), 10); signal.raise_signal(10)"
    assert attempt(place, itself, confined=True) == "done"


@needs_seccomp
def test_no_typing_into_the_terminal_that_was_inherited():
    code = """
    import fcntl, os, pty, sys
    from rsedge.runtime.sandbox.seccomp import refuse_calls
    _, terminal = pty.openpty()
    os.setsid()
    fcntl.ioctl(terminal, 0x540E, 0)  # TIOCSCTTY: it is this process's own
    if "confined" in sys.argv:
        refuse_calls()
    for request in (0x5412, 0x541C, 0x5423):
        try:
            fcntl.ioctl(terminal, request, b"x" + bytes(7))
        except OSError as error:
            print(error.errno)
        else:
            print("done")
    print(os.get_terminal_size(terminal).columns)
    """

    def words(*arguments: str) -> list[str]:
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert words("confined") == [str(errno.EPERM)] * 3 + ["0"]
    assert str(errno.EPERM) not in words()  # kernels may refuse TIOCSTI themselves, with EIO


def run_filter(code: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What a seccomp filter says to a call: classic BPF, as Linux's documentation defines it."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    lines = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    at = accumulator = 0
    while True:
        operation, yes, no, value = lines[at]
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return value
        else:
            true = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x45: accumulator & value != 0,
            }[operation]
            at += yes if true else no
        at += 1


ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_of_each_architecture(machine):
    column, architecture = MACHINES[machine]
    code = seccomp.program(machine, pid=1234)

    def answer(number: int, *arguments: int) -> int:
        return run_filter(code, architecture, number, *arguments)

    refused = {numbers[column] for numbers in seccomp._REFUSED.values()} - {None}
    clone, kill, tgkill, ioctl = ((56, 62, 234, 16), (220, 129, 131, 29))[column]
    special = {clone, kill, tgkill, ioctl, 435}
    assert {number for number in range(470) if answer(number) != ALLOW} == refused | special - {ioctl}
    assert {answer(number) for number in refused} == {EPERM}
    assert answer(435) == ENOSYS
    assert {answer(number) for number in (470, 999, 0x40000000 + 41, 0xFFFFFFFF)} == {ENOSYS}
    thread = 0x3D0F00  # CLONE_VM … as the C library starts a thread
    assert [answer(clone, flags) for flags in (thread, thread - 0x10000, 17, 0x4111)] == [ALLOW, EPERM, EPERM, EPERM]
    assert [answer(kill, pid, 9) for pid in (1234, 1, 0, 2**32 - 1)] == [ALLOW, EPERM, EPERM, EPERM]
    assert [answer(tgkill, pid, 1234, 9) for pid in (1234, 1)] == [ALLOW, EPERM]
    assert [answer(ioctl, 0, request) for request in (0x5412, 0x541C, 0x5423, 0x5413)] == [EPERM] * 3 + [ALLOW]
    assert run_filter(code, 0x40000003, 1) == KILL  # i386, whose numbers are others


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_are_those_of_the_kernel_headers(column, header):
    if not Path(header).exists():
        pytest.skip(f"no kernel headers here: {header}")
    text = Path(header).read_text()
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    table = {**seccomp._REFUSED, "clone": seccomp._CLONE, "clone3": seccomp._CLONE3, "kill": seccomp._KILL}
    table |= {"tgkill": seccomp._TGKILL, "ioctl": seccomp._IOCTL}
    newest = max(numbers.values())  # headers may be older than the table
    wrong = {
        name: (entry[column], numbers.get(name))
        for name, entry in table.items()
        if numbers.get(name) != entry[column] and (entry[column] or 0) <= newest
    }
    assert wrong == {}


@needs_landlock
@pytest.mark.parametrize("abi", range(1, 8))
def test_older_kernels_get_the_rights_they_know(place, abi):
    """The newer kernel takes what an older one would be given, and keeps to it."""
    if abi > landlock_abi():
        pytest.skip("this kernel is older")
    code = f"""
    from rsedge.runtime.sandbox.landlock import READ, WRITE, restrict_files
    restrict_files([(inside, WRITE), (Path(sys.prefix), READ)], abi={abi})
    (inside / 'new').write_text('x')
    (outside / 'file').read_bytes()"""
    assert attempt(place, code, confined=False) == "EACCES"
    assert (place[0] / "new").exists()
    known = {1: Files.MAKE_SYM, 2: Files.REFER, 3: Files.TRUNCATE, 4: Files.TRUNCATE}.get(abi, Files.IOCTL_DEV)
    assert Files.known(abi) == (known << 1) - 1


@pytest.mark.parametrize(("abi", "size"), [(1, 8), (3, 8), (4, 16), (5, 16), (6, 24), (7, 24)])
def test_older_kernels_get_the_structure_they_know(monkeypatch, abi, size):
    """A kernel refuses bytes that it has no meaning for; this one may know all of them."""
    calls: list[tuple[int, ...]] = []

    def record(number: int, *arguments: object) -> int:
        calls.append((number, *(getattr(argument, "value", 0) for argument in arguments)))
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(landlock, "_call", record)
    monkeypatch.setattr(landlock, "no_new_privileges", lambda: None)
    landlock.restrict_files([], abi=abi)
    assert [call[0] for call in calls] == [444, 446]
    assert calls[0][2] == size


def test_threads_that_run_already_are_an_error():
    if landlock_abi() < 1:
        pytest.skip("this kernel has no Landlock")
    wait = threading.Event()
    thread = threading.Thread(target=wait.wait)
    thread.start()
    try:
        with pytest.raises(SandboxError, match=r"\d+ threads run already.*call confine\(\) first"):
            sandbox.confine()
    finally:
        wait.set()
        thread.join()


def test_where_nothing_can_be_had_it_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "landlock_abi", lambda: 0)
    with pytest.raises(SandboxError, match=r"no Landlock \(Linux 5\.13 or newer.*run without --sandbox"):
        sandbox.confine()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="needs Linux, and this is darwin"):
        sandbox.confine()
    assert landlock_abi() == 0


@needs_landlock
@pytest.mark.parametrize(("abi", "gaps"), [(6, 0), (5, 0), (2, 1)])
def test_what_an_older_kernel_lacks_is_said(abi, gaps):
    code = f"""
    from rsedge.runtime.sandbox import process as sandbox
    sandbox.landlock_abi = lambda: {abi}
    print(len(sandbox.confine().missing))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == gaps


@needs_landlock
def test_without_seccomp_a_name_space_takes_the_network(place):
    code = """
    from rsedge.runtime.sandbox import process as sandbox
    if os.environ.get("NAME_SPACE"):
        sandbox.can_filter = lambda: False
        found = sandbox.confine(write=[inside])
        assert "no network (a name space)" in found.holds and len(found.missing) >= 1
    (inside / "new").write_text("x")
    assert (inside / "new").stat().st_uid == os.getuid()
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port))"""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:  # UDP: Landlock alone refuses TCP
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert attempt(place, code, confined=False, port=port) == "done"
        told = "os.environ['NAME_SPACE'] = '1'\n" + textwrap.dedent(code)
        try:
            assert attempt(place, told, confined=False, port=port) == "ENETUNREACH"
        except AssertionError as error:
            if "SandboxError" not in str(error):
                raise
            pytest.skip("this machine allows no name spaces, and confine() says so")
