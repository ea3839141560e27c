"""``python -m rsedge``."""

from rsedge.cli.main import main

main()
