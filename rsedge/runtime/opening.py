"""Opening rasters with GDAL, and saying it well where that fails."""

from __future__ import annotations

import os
import re
import threading
import warnings
from typing import Any

import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from rsedge.errors import SceneError
from rsedge.runtime import remote

_WARNING_FILTERS = threading.Lock()
_SHOWN = 200  # characters of a name; a VRT in memory is its own


def open_dataset(target: str) -> Any:
    """An open rasterio dataset, for the thread that calls.

    Raises:
        SceneError: GDAL cannot open it.
    """
    try:
        # Scene.warnings says it; catch_warnings changes the whole process, hence one thread at a time.
        with _WARNING_FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(target)
    except UnicodeEncodeError as error:
        name = os.fsencode(target).decode("utf-8", "replace")
        raise SceneError(f"{name} is a name that is not UTF-8, and rasterio opens none: rename the file") from error
    except RasterioError as error:
        if remote.is_remote(target):
            raise remote.read_problem(target, error) from error
        name = target if len(target) <= _SHOWN else "a composite of its bands"
        reason = re.sub(r"\s+", " ", str(error))[: 2 * _SHOWN]
        raise SceneError(f"{name} cannot be opened as a raster: {reason} (gdalinfo says more)") from error
