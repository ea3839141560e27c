"""RSDiX's published checkpoints, read without running pickle code."""
