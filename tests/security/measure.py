"""Run a command with limits and print what it took, as JSON; a process of its own, small, and with no other child.

The peak of a child counts what its parent held when it was started, hence not from the tests themselves.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

_ADDRESS_SPACE = 6 << 30
"""Bytes: a machine that runs tests survives what they find."""


def main() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (8, 8))

    try:
        done = subprocess.run(
            sys.argv[1:], capture_output=True, text=True, errors="replace", timeout=30, preexec_fn=limit, check=False
        )
        code, said = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        code, said = -9, "took more than 30 s"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "code": code,
        "stderr": said[-4000:],
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1024,
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
