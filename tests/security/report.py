"""Print what each kind of hostile input does: ``python -m tests.security.report [--raw] [--full] [PART OF A NAME]…``.

``--raw`` shows what GDAL does with nothing in its way, ``--full`` every command of every input.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from tests.security.catalog import CASES
from tests.security.runner import Outcome, run_all


def verdict(outcome: Outcome, *, raw: bool) -> str:
    """One word for what happened, the worst first."""
    faults = outcome.touched if raw else outcome.faults
    for word, signs in (
        ("WROTE", ("made ", "changed ", "removed ", "deleted ", "moved ")),
        ("ASKED", ("asked for", "connections", "traced socket")),
        ("READ", ("read ", "opened /", "traced ")),
        ("DIED", ("the process died",)),
        ("FAULT", ("ended in a fault",)),
        ("OTHER PIXELS", ("its captions",)),
        ("OPENED", ("opened it",)),
        ("UNNAMED", ("the message",)),
    ):
        if any(sign in fault[:45] for fault in faults for sign in signs):
            return word
    return {0: "own pixels", 3: "unreadable"}.get(outcome.code if outcome.code is not None else -1, "refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("parts", nargs="*")
    asked = parser.parse_args()
    chosen = [case for name, case in CASES.items() if not asked.parts or any(part in name for part in asked.parts)]
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(chosen, Path(folder), uses=("raw",) if asked.raw else None)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    order = [
        "refused",
        "own pixels",
        "unreadable",
        "UNNAMED",
        "OPENED",
        "OTHER PIXELS",
        "FAULT",
        "DIED",
        "READ",
        "ASKED",
        "WROTE",
    ]
    for outcomes in found.values():
        words = [verdict(outcome, raw=asked.raw) for outcome in outcomes]
        kinds[outcomes[0].case.kind][max(words, key=order.index)] += 1
        if asked.full:
            for outcome, word in zip(outcomes, words, strict=True):
                faults = outcome.touched if asked.raw else outcome.faults
                _say(f"{outcome.case.name:34} {outcome.use:8} {word:12} {' '.join('; '.join(faults)[:200].split())}")
    for kind, words in kinds.items():
        _say(
            f"{kind:26} {sum(words.values()):4}  " + ", ".join(f"{words[word]} {word}" for word in order if words[word])
        )
    slowest = max((outcome for outcomes in found.values() for outcome in outcomes), key=lambda outcome: outcome.seconds)
    _say(f"slowest: {slowest.case.name} {slowest.use} {slowest.seconds:.1f} s")


def _say(text: str) -> None:
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
