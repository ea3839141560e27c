"""Products of several files: SAFE, STAC items, bands beside each other."""
