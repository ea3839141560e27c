"""One family each: its layout, its graphs, its plan."""
