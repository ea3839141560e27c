"""``python -m rsedge``."""

import sys

# With -m, Python looks for modules in the working folder first: a stranger's folder may hold a numpy.py.
if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]

from rsedge.cli.main import main

main()
