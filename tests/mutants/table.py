"""What came of all mutants, as text."""

from __future__ import annotations

import json
from pathlib import Path

from .trial import LEFT

# Changes that no test can notice, by name, and why not.
EQUIVALENT: dict[str, str] = json.loads((Path(__file__).parent / "equivalent.json").read_text())


def table(rows: list[dict]) -> str:
    """What was tried, noticed and left, by stratum; then each that was left."""
    lines = [f"{'stratum':12}{'tried':>7}{'noticed':>9}{'equivalent':>12}{'left':>6}{'noticed of the rest':>21}"]
    names = dict.fromkeys(row["stratum"] for row in rows)
    for name in [*names, "all"]:
        of = [row for row in rows if name in (row["stratum"], "all")]
        noticed = sum(row["verdict"] != LEFT for row in of)
        equivalent = sum(row["verdict"] == LEFT and row["name"] in EQUIVALENT for row in of)
        share = noticed / max(len(of) - equivalent, 1)
        left = len(of) - noticed - equivalent
        lines.append(f"{name:12}{len(of):7}{noticed:9}{equivalent:12}{left:6}{share:21.1%}")
    for row in rows:
        if row["verdict"] == LEFT:
            said = EQUIVALENT.get(row["name"])
            lines.append(f"{'equivalent' if said else 'LEFT'} {row['file']}:{row['line']}: {row['before']}")
            lines.append(f"    -> {row['after']}" + (f" ({said})" if said else ""))
    return "\n".join(lines)
