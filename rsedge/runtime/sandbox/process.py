"""Confinement of this process for good: files as named, no network, no other processes. Linux only.

A belt beside the checks of what an input may name: what a hostile file could make a damaged decoder do stays inside.
Landlock keeps the files, a filter of system calls (seccomp) the rest.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import rsedge
from rsedge.errors import SandboxError
from rsedge.runtime.sandbox.landlock import DEVICE, LIST, READ, WRITE, Files, landlock_abi, restrict_files
from rsedge.runtime.sandbox.seccomp import can_filter, refuse_calls

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # unshare

# What an interpreter and its libraries read besides their own folders: loader, time zone, processor, memory, limits.
_SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store"),
    *("/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime", "/etc/timezone", "/etc/os-release"),
    *("/etc/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf", "/etc/crypto-policies"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm", "/proc/device-tree/model"),
    *("/sys/devices", "/sys/bus/pci", "/sys/class/drm", "/sys/fs/cgroup", "/sys/kernel/mm", "/etc/nv_tegra_release"),
)
_HARMLESS_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_FOLDERS_IN_ENVIRONMENT = ("LD_LIBRARY_PATH", "GDAL_DATA", "GDAL_DRIVER_PATH", "PROJ_DATA", "PROJ_LIB")
_GPU_DEVICES = ("nvidia*", "nvidia-caps/*", "nvhost*", "nvmap", "nvgpu/**/*", "dri/*")  # the last four on a Jetson
_GPU_FACTS = ("/proc/driver/nvidia", "/proc/devices", "/proc/modules", "/sys/bus", "/sys/class", "/sys/module")


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What this machine offers to confine a process with."""

    landlock: int  # version of the kernel's interface to Landlock, 0 where there is none
    seccomp: bool  # whether calls can be filtered

    @property
    def problem(self) -> str | None:
        """Why no process can be confined to files here, or None."""
        if not sys.platform.startswith("linux"):
            return f"it needs Linux, and this is {sys.platform}"
        if self.landlock < 1:
            return "this kernel has no Landlock (Linux 5.13 or newer, with landlock among those in its option lsm=)"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What holds from now on."""

    holds: tuple[str, ...]  # what was given up, and by which means, a phrase each
    missing: tuple[str, ...]  # what this kernel could not take away, a phrase each


def support() -> Support:
    """What this machine offers, found without confining anything."""
    return Support(landlock=landlock_abi(), seccomp=can_filter())


def require_support() -> Support:
    """What this machine offers; SandboxError where no process can be confined to files here."""
    found = support()
    if found.problem:
        raise SandboxError(f"the sandbox cannot be had: {found.problem}; run without --sandbox, or on another machine")
    return found


def confine(
    *,
    read: Iterable[str | os.PathLike[str]] = (),
    write: Iterable[str | os.PathLike[str]] = (),
    listed: Iterable[str | os.PathLike[str]] = (),
    gpu: bool = False,
) -> Confinement:
    """Confine this process, until it ends, to the files named here and those its interpreter needs, without network.

    It holds for every thread started later, whatever code runs, compiled code too. What is open stays open, standard
    input and output among it. After it no process can be started, no socket made, and no mode or owner of a file
    changed. Call it first, before NumPy, rasterio or an engine start threads; it cannot be undone.

    Args:
        read: Files and folders, with all below them, that may be read.
        write: Folders below which files may also be written, replaced and deleted. They exist already.
        listed: Folders of which, and of all below them, names alone may be read.
        gpu: Leave NVIDIA's devices open, and what their driver reads; a driver is a large part of a kernel.

    Links are followed now: what a link leads to later is of no account. Names that do not exist are left out.

    Returns:
        What holds and what is missing.

    Raises:
        SandboxError: This is not Linux, the kernel has no Landlock, it can take the network away by neither of two
            means, it refuses, or other threads run already. The process may then be confined in part: end it.
    """
    found = require_support()
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise SandboxError(
            f"{threads} threads run already, and those would stay outside of the sandbox: call confine() first, before "
            "NumPy, rasterio or an engine are imported"
        )
    rules = [
        *((Path(path), READ) for path in (*of_interpreter(), *_SYSTEM, *read)),
        *((Path(path), LIST) for path in listed),
        *((Path(path), WRITE) for path in write),
        *((Path(path), DEVICE & ~Files.IOCTL_DEV) for path in _HARMLESS_DEVICES),
    ]
    if gpu:
        rules += [(Path(path), READ) for path in _GPU_FACTS]
        rules += [(path, DEVICE) for pattern in _GPU_DEVICES for path in Path("/dev").glob(pattern)]
    holds = [f"files as named (Landlock {found.landlock})"]
    missing = []
    try:
        if not found.seccomp:  # name spaces first: Landlock closes what making them writes to
            _leave_network()
        restrict_files(rules, abi=found.landlock)
        if found.seccomp:
            refuse_calls()
    except OSError as error:
        raise SandboxError(
            f"the sandbox cannot be had: the kernel refuses ({error.strerror}), as it does in some containers; allow "
            "landlock_* and seccomp there, or run without --sandbox"
        ) from error
    if found.seccomp:
        holds.append("no network and no other processes (seccomp)")
    else:
        holds.append("no network (a name space)")
        missing.append(
            "system calls cannot be filtered here: sockets of services on this machine, and modes and owners of the "
            "user's files, stay in reach"
        )
        if found.landlock < 6:
            missing.append("this kernel cannot keep signals to other processes away (Linux 6.12 can)")
    if found.landlock < 3:
        missing.append("this kernel cannot keep files that may be read from being emptied (Linux 6.2 can)")
    return Confinement(holds=tuple(holds), missing=tuple(missing))


def of_interpreter() -> Iterator[str | Path]:
    """Where Python and its packages are, and the libraries and data that the environment names."""
    here = str(Path.cwd())
    yield from (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    # Python may put the working folder there; as that it was not named to be read.
    yield from (entry for entry in sys.path if Path(entry).is_absolute() and entry != here)
    yield Path(rsedge.__file__).parent
    for name in _FOLDERS_IN_ENVIRONMENT:
        yield from filter(None, os.environ.get(name, "").split(os.pathsep))


def _leave_network() -> None:
    """Move into a network of this process's own, in which there is nothing; OSError where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(ctypes.c_int(_NEW_USER | _NEW_NETWORK)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    # Without these the process would be nobody to itself, and what it writes nobody's.
    for name, text in {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}.items():
        Path("/proc/self", name).write_text(text, encoding="ascii")
