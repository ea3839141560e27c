"""Many scenes: read a catalogue, plan, run each scene into a file of its own, continue what is missing."""
