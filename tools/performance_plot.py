"""The plot of docs/performance.md: milliseconds per image by engine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

Bar = tuple[str, str, float, "float | None"]
"""Search, engine, milliseconds per image, and the least that the machine's limits allow."""


def stamp(bars: list[Bar]) -> str:
    """What the plot carries, so that it can be told whether it shows ``bars``; other fonts give other curves."""
    return f"bars {hashlib.sha256(json.dumps(bars).encode()).hexdigest()}"


def draw(path: Path, bars: list[Bar]) -> None:
    """Write the plot as SVG, the same for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    searches = list(dict.fromkeys(search for search, *_ in bars))
    colours = {"transformers": "#9aa0a6", "rsedge fp32": "#3b7dd8", "rsedge int8": "#1f9d73"}
    with matplotlib.rc_context({"svg.hashsalt": "rsedge", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(len(searches), 1, figsize=(7, 1.35 * len(searches) + 0.7), sharex=True)
        for search, axis in zip(searches, [axes] if len(searches) == 1 else list(axes), strict=True):
            rows = [row[1:] for row in reversed(bars) if row[0] == search]
            for place, (engine, taken, least) in enumerate(rows):
                axis.barh(place, taken, color=colours.get(engine, "#555555"), height=0.65)
                axis.text(taken, place, f" {taken:.0f}", va="center")
                if least is not None:
                    axis.plot([least, least], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
            axis.set_yticks(range(len(rows)), [engine for engine, *_ in rows])
            axis.set_title(search, loc="left", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.08)
        figure.supxlabel("milliseconds per image (less is better); line: least at the machine's limits", fontsize=8)
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None, "Description": stamp(bars)})
        pyplot.close(figure)
