"""Caption sets on disk, read into examples: NumPy, Pillow and rasterio, never torch."""

from rsedge.datasets.examples import SPLITS, BadRecord, CaptionData, Example, ImageSource, Split
from rsedge.datasets.images import FileImage
from rsedge.datasets.layouts import load_examples, load_labelled

__all__ = [
    "SPLITS",
    "BadRecord",
    "CaptionData",
    "Example",
    "FileImage",
    "ImageSource",
    "Split",
    "load_examples",
    "load_labelled",
]
