"""Checkpoint to bundle: the export side. Needs the ``export`` extra."""
