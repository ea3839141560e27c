"""The command line: parsing and printing over the Python API."""
