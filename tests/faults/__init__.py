"""Real faults: killed processes, full disks, damaged files."""
