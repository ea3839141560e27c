"""What a machine, a scene or a bundle is, and how fast: doctor, info, bench, self test."""
