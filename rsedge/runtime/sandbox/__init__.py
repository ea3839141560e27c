"""Confine this process for good: files by Landlock, system calls by seccomp (Linux)."""

from rsedge.runtime.sandbox.process import confine

__all__ = ["confine"]
