"""The text that docs/performance.md is made of: paragraphs, tables, and where figures come from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

YOUR_MACHINE = """
```sh
rsedge bench -m blip.rsedge                                          # half a minute, on a generated scene
rsedge bench -m blip.rsedge --scene S2A_….SAFE --beams 3 -o bench.json   # your scene and options, the report as JSON
```

*model alone*: tiles/s at each batch size, with images in memory. *stage*: milliseconds per tile at the fastest batch
size: `encode` runs the vision graph, `decode steps` the step graph, `caches` moves keys and values, `search and text`
is the rest. `read` and `resize` run beside the model and cost nothing while they take less; `wait for tiles` and
`write` are the remaining time in a whole run. *with reading and writing*: the whole run, and the ratio of its time to
that of the model alone with the same batches, in pairs. *peak memory*: of the process, over all batch sizes. The JSON
report contains these values with medians, lowest and highest of the rounds, the machine, versions and options;
`BenchmarkReport` documents them.
"""


def missing(script: str, said: str = "Not measured yet") -> Iterable[str]:
    """What stands where a benchmark has not been run."""
    yield f"{said}: `python {script}` measures it."


def where(values: dict[str, Any]) -> str:
    """The machine, the date, the rounds and the load of a benchmark."""
    machine = values["machine"]
    text = f"{machine['cores']} cores of an {machine['cpu']} ({', '.join(machine['instructions'])}), {machine['date']}"
    text += f", {values['rounds']} rounds" if "rounds" in values else ""
    load = next((values[name] for name in ("load_before_each_round", "load_before", "load") if name in values), None)
    if load is None:
        return f"{text}."
    loads = load if isinstance(load, list) else [load]
    loads = [value[0] if isinstance(value, list) else value for value in loads]  # 1, 5 and 15 minutes
    return f"{text}, load before {', '.join(f'{value:.3g}' for value in loads)}."


def paragraph(text: str) -> list[str]:
    """Lines of at most 120 characters."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], *, text: int, last_is_text: bool = False
) -> Iterable[str]:
    """A table whose first ``text`` columns are words."""
    words = [place < text or (last_is_text and place == len(titles) - 1) for place in range(len(titles))]
    yield f"| {' | '.join(titles)} |"
    yield f"| {' | '.join('---' if word else '---:' for word in words)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
