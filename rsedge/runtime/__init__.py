"""Torch-free inference: scenes, tiles, decoding, outputs. Never imports torch, transformers, training or export."""
