"""What a piece of code costs, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

_PROGRAM = """
import json, pathlib, resource, time
from rsedge.errors import RsedgeError
{setup}
start = time.process_time()
try:
    {code}
    said = None
except (RsedgeError, ValueError) as error:
    said = str(error)
seconds = time.process_time() - start
# getrusage counts from the fork on, when the child still had the memory of its parent; Linux tells it from the start.
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = pathlib.Path("/proc/self/status")
if status.exists():
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
print(json.dumps([said, seconds, peak / 1024]))
"""


def measure(setup: str, code: str) -> tuple[str | None, float, float]:
    """Run a statement and return what its error said, its seconds of CPU time, and the peak of memory in MiB.

    Args:
        setup: Statements that are not timed, such as imports; their memory counts.
        code: The statement.
    """
    program = _PROGRAM.format(setup=setup, code=code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    said, seconds, memory = json.loads(done.stdout)
    return said, seconds, memory
