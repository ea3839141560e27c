"""A filter of system calls: no sockets, no other processes, no keys to the kernel; a BPF program written out.

It refuses what a run over scenes never needs and Landlock does not cover. Calls it does not name pass: it makes the
kernel that a damaged reader could reach smaller, and is no list of everything harmless.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

from rsedge.runtime.sandbox.landlock import no_new_privileges, prctl

_SET_SECCOMP, _MODE_FILTER = 22, 2  # prctl

# Call → its numbers on x86-64 and aarch64 (from the kernel's tables); None where the architecture lacks it.
# fmt: off
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # The network, and sockets of this machine's services, which Landlock does not keep (Docker, D-Bus, X11).
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
    # Other processes: new ones, and those that run already.
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "mq_unlink": (241, 181),
    # What files look like from outside; Landlock leaves it alone, and it holds for every file of the user's.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "file_setattr": (469, 469), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    # Ways around paths, and other name spaces.
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "open_tree_attr": (467, 467), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97),
    "setns": (308, 268),
    # Parts of the kernel that are large, privileged, or have often been broken.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "syslog": (103, 116), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "personality": (135, 92),
}
# fmt: on
_CLONE, _CLONE3, _KILL, _TGKILL, _IOCTL = (56, 220), (435, 435), (62, 129), (234, 131), (16, 29)
_LAST_KNOWN = 469  # calls that later kernels add are not there, and so are the numbers of x32
_CLONE_THREAD = 0x10000
# Of a terminal that was inherited: typing into it (TIOCSTI, TIOCLINUX) would have the user's shell run commands.
_TYPING = (0x5412, 0x541C, 0x5423)

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_…

# BPF: load a word of seccomp_data, jump on the accumulator (if so, if not), return.
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24  # offsets; of arguments the lower half, both machines being little-endian
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def can_filter() -> bool:
    """Whether this kernel takes filters of system calls, and this module has one for the processor."""
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32 or platform.machine() not in _ARCHITECTURES:
        return False
    try:
        prctl(_SET_SECCOMP, _MODE_FILTER, 0)
    except OSError as error:
        return error.errno == errno.EFAULT  # it wanted to read the program, which is none
    return False


def refuse_calls() -> None:
    """Refuse, for good, sockets, new processes and the other calls listed above, with EPERM.

    It holds for this thread, threads it starts later, and processes it starts. OSError where the kernel refuses.
    """
    code = program(platform.machine(), os.getpid())
    no_new_privileges()
    prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(_Program(len(code) // 8, code)))


def program(machine: str, pid: int) -> bytes:
    """The filter, 8 bytes an instruction.

    Args:
        machine: ``x86_64`` or ``aarch64``.
        pid: Of the process, which may send signals to itself.
    """
    column, architecture = _ARCHITECTURES[machine]
    lines = [
        *[(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL_PROCESS)],
        *[(_LOAD, 0, 0, _NR), (_ABOVE, 0, 1, _LAST_KNOWN), (_RETURN, 0, 0, _ENOSYS)],
        # Its flags lie in memory, which a filter cannot read; C libraries then fall back to clone.
        *[(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ENOSYS)],
    ]
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    # Each of these ends in a return, so that what follows finds the number of the call still loaded.
    lines += [
        *[(_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _ARG0), (_ANY_BIT, 1, 0, _CLONE_THREAD)],
        *[(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)],
        *[(_EQUAL, 1, 0, _KILL[column]), (_EQUAL, 0, 4, _TGKILL[column]), (_LOAD, 0, 0, _ARG0), (_EQUAL, 1, 0, pid)],
        *[(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)],
        *[(_EQUAL, 0, 4, _IOCTL[column]), (_LOAD, 0, 0, _ARG1)],
        *[(_EQUAL, 3 - index, 0, request) for index, request in enumerate(_TYPING)],
        *[(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)],
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
