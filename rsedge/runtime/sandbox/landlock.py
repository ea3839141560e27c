"""Landlock, with which a process gives up all files but those it names; by system calls, as no C library has them."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_VERSION = 1
_PATH_BENEATH = 1
_SET_NO_NEW_PRIVS = 38  # prctl

_NET = 0b11  # bind and connect of TCP, from ABI 4
_SCOPES = 0b11  # abstract UNIX sockets and signals, from ABI 6


class Files(IntFlag):
    """What may be done with a file, or with all below a folder; the values are the kernel's."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15

    @classmethod
    def known(cls, abi: int) -> Files:
        """All rights that a kernel of this ABI can refuse."""
        count = 16 if abi >= 5 else 15 if abi >= 3 else 14 if abi >= 2 else 13
        return cls((1 << count) - 1)


LIST = Files.READ_DIR
READ = Files.READ_FILE | Files.READ_DIR
_CHANGE = Files.WRITE_FILE | Files.TRUNCATE | Files.MAKE_REG | Files.MAKE_DIR | Files.REMOVE_FILE | Files.REMOVE_DIR
WRITE = READ | _CHANGE
DEVICE = Files.READ_FILE | Files.WRITE_FILE | Files.IOCTL_DEV
_OF_FILES = Files.EXECUTE | Files.WRITE_FILE | Files.READ_FILE | Files.TRUNCATE | Files.IOCTL_DEV


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"  # what packing means; Python 3.14 wants it said
    _fields_ = (("allowed", ctypes.c_uint64), ("handle", ctypes.c_int32))


def landlock_abi() -> int:
    """Version of Landlock's interface that the running kernel has; 0 where it has none, or where it is switched off."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    except OSError:
        return 0


def restrict_files(rules: Iterable[tuple[Path, Files]], *, abi: int) -> None:
    """Give up, for good, all access to files but what ``rules`` allow, and TCP, as far as the kernel can refuse them.

    It holds for this thread, threads it starts later, and processes it starts. What is open already stays open.

    Args:
        rules: Existing files or folders, and what may be done with each or with all below it. Links are followed.
            What does not exist or cannot be opened is left out; of a file, rights that only folders have are too.
        abi: What :func:`landlock_abi` gave, at least 1.

    Raises:
        OSError: The kernel refused.
    """
    known = Files.known(abi)
    ruleset = _Ruleset(files=known, net=_NET, scopes=_SCOPES)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8  # bytes of the structure that this ABI has
    handle = _call(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for path, access in rules:
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                rights = known if stat.S_ISDIR(os.fstat(place).st_mode) else known & _OF_FILES
                if granted := access & rights:
                    rule = ctypes.byref(_Beneath(allowed=granted, handle=place))
                    _call(_ADD_RULE, ctypes.c_int(handle), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0))
            except OSError as error:
                # Pipes and sockets have no path that a rule could name; open descriptors are not restricted anyway.
                if error.errno != errno.EBADFD:
                    raise
            finally:
                os.close(place)
        no_new_privileges()
        _call(_RESTRICT_SELF, ctypes.c_int(handle), ctypes.c_uint32(0))
    finally:
        os.close(handle)


def no_new_privileges() -> None:
    """Give up, for good, what set-user-id programs would add: only then may a process confine itself."""
    prctl(_SET_NO_NEW_PRIVS, 1, 0)


def prctl(option: int, first: int, second: int | object) -> None:
    """Linux's call of this name, with its remaining arguments 0; OSError where the kernel refuses."""
    library = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    value = ctypes.c_ulong(second) if isinstance(second, int) else second
    if library.prctl(ctypes.c_int(option), ctypes.c_ulong(first), value, zero, zero) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _call(number: int, *arguments: object) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    result = library.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)
