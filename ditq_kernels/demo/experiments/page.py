"""``docs/experiments.md`` and its plots, from the records alone."""

from __future__ import annotations

import json
import re
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from ...files import written_whole
from . import combinations, distribution, plots, tables
from .records import Records

TEMPLATE = "experiments.md.jinja"
OTHER_SIZE = "moment_steps-fashion_dit_small"
NAMES = (
    "calibration",
    "weights",
    "moments",
    "positions",
    "moment_steps",
    OTHER_SIZE,
    "combinations",
    "layers",
    "semistatic",
    "remedies",
    "peers",
)


def load(directory: Path) -> dict[str, Records]:
    """The records of every experiment.

    Raises:
        ValueError: if one is missing or incomplete.
    """
    found = {}
    for name in NAMES:
        path = directory / f"{name}.json"
        if not path.exists():
            raise ValueError(f"{path} is missing; carry the experiment {name} out first")
        found[name] = Records.load(path)
        if not found[name].complete:
            raise ValueError(f"{path} is not complete; carry the experiment {name} out to its end")
    return found


def _filled(text: str) -> str:
    """Paragraphs filled again after values took their places; tables, lists and code as they are."""
    fill = partial(textwrap.fill, width=120, break_long_words=False, break_on_hyphens=False)
    blocks = text.strip().split("\n\n")
    return "\n\n".join(fill(block) if re.match(r"[^#|!\s-]", block) else block for block in blocks) + "\n"


def render(directory: Path) -> str:
    """The page's text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    records = load(directory)
    results: dict[str, Any] = json.loads((directory / distribution.NAME).read_text())
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )

    def psnr(experiment: str, **facts: Any) -> float:
        """Mean PSNR over the records with these facts."""
        rows = list(records[experiment].all(**facts))
        if not rows:
            raise ValueError(f"{experiment} has no record with {facts}")
        return float(tables.over_sets(rows).mean())

    evaluated = {row["name"]: row for row in results["rows"]}

    def excess(name: str) -> str:
        row = evaluated[name]
        low, high = row["frechet_excess_interval"]
        return f"{row['frechet_excess']:+.4f} ({low:+.4f} to {high:+.4f})"

    text = environment.get_template(TEMPLATE).render(
        records=records,
        tables=tables,
        results=results,
        command=" ".join(distribution.command()),
        psnr=psnr,
        other_size=OTHER_SIZE,
        excess=excess,
        evaluated=evaluated,
        shown=[variant.name for variant in combinations.shown()],
    )
    return _filled(text)


def write(directory: Path) -> Path:
    """Write the page beside ``directory``, and the plots into it; where the page is."""
    text = render(directory)
    for name, plot in plots.PLOTS.items():
        plot(Records.load(directory / f"{name}.json"), directory / f"{name}.png")
    path = directory.with_suffix(".md")
    with written_whole(path) as unfinished:
        unfinished.write_text(text)
    return path
