"""Tests of rsedge; the folders mirror the package."""
