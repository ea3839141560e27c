"""Records of tiles → files: GeoJSON, GeoPackage, GeoParquet, CSV, rasters, styles, STAC items."""
