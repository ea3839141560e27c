"""The captioner that ships with rsedge: its training tiles, training, measurement and packaging."""
