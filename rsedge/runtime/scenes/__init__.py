"""Any raster → tiles of pixels in map coordinates."""
