"""The choice of a configuration: by a table of winners measured on this GPU where one has the problem, else by the
heuristic.

A table is one JSON file per GPU model, written by ``ditq tune``. Tables are looked for in :func:`user_directory` and
then among those that the package ships (``measured/``; none yet). Nothing is measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import written_whole
from .config import EXTENSION_ROUTES, ROW_CLASSES, Config, Problem, is_valid
from .estimates import heuristic

SHIPPED = Path(__file__).parent / "measured"
DIRECTORY_VARIABLE = "DITQ_TABLES"
PRINT_VARIABLE = "DITQ_PRINT_CONFIG"
FORMAT_VERSION = 2  # 1 numbered other tiles of the extension


@dataclass(frozen=True)
class Entry:
    """One measured winner.

    Attributes:
        weights: name of the weight format.
        activation_bytes, rows, out_features, in_features: as in :class:`~.config.Problem`.
        microseconds: median of one product with ``config``.
        heuristic_microseconds: of one with the heuristic's choice, in the same run; None where that one failed.
    """

    weights: str
    activation_bytes: int
    rows: int
    out_features: int
    in_features: int
    config: Config
    microseconds: float
    heuristic_microseconds: float | None

    @property
    def key(self) -> tuple[str, int, int, int, int]:
        return self.weights, self.activation_bytes, self.rows, self.out_features, self.in_features


def user_directory() -> Path:
    """Where ``ditq tune`` writes and a process looks first: ``DITQ_TABLES``, else a folder in the user's cache."""
    if os.environ.get(DIRECTORY_VARIABLE):
        return Path(os.environ[DIRECTORY_VARIABLE])
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ditq_kernels" / "tables"


def table_path(directory: Path, gpu_name: str) -> Path:
    """The file of the table for ``gpu_name``, as the driver spells it."""
    return directory / (re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json")


def write(path: Path, gpu_name: str, entries: Iterable[Entry], runs: Iterable[dict[str, Any]]) -> None:
    """Write a table to ``path``, whole or not at all.

    Args:
        runs: versions, commit and date of the measurements that it was made from, oldest first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict(
        version=FORMAT_VERSION,
        gpu=gpu_name,
        runs=list(runs),
        entries=[dataclasses.asdict(entry) for entry in entries],
    )
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> tuple[list[dict[str, Any]], list[Entry]]:
    """(runs, entries) of a table.

    Raises:
        ValueError: if the file is not a table of this version, naming it.
    """
    try:
        content = json.loads(path.read_text())
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version {content['version']}")
        entries = [Entry(**{**entry, "config": Config(**entry["config"])}) for entry in content["entries"]]
        return content["runs"], entries
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a table of measured configurations of version {FORMAT_VERSION} ({error}); "
            "remove it, or write it anew with ditq tune"
        ) from error


@functools.cache
def _winners(directory: Path, gpu_name: str) -> dict[tuple[str, int, int, int, int], Config]:
    path = table_path(directory, gpu_name)
    return {entry.key: entry.config for entry in read(path)[1]} if path.exists() else {}


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, gpu_name: str, extension: bool = True) -> Config:
    """The measured winner for ``problem`` if a table has one that is valid, else the heuristic's choice. With
    ``DITQ_PRINT_CONFIG=1`` each choice is printed once, to standard error.

    Args:
        extension: whether the CUDA extension may be chosen.
    """
    key = (
        problem.fmt.name,
        problem.activation_bytes,
        problem.rows,
        problem.out_features,
        problem.in_features,
    )
    found, source = None, "heuristic"
    for directory in (user_directory(), SHIPPED):
        found = _winners(directory, gpu_name).get(key)
        if found is not None and (extension or found.route not in EXTENSION_ROUTES) and is_valid(found, problem):
            source = str(table_path(directory, gpu_name))
            break
        found = None
    config = found or heuristic(problem, extension)
    if os.environ.get(PRINT_VARIABLE) == "1":
        rows = f"M <= {problem.rows}" if problem.rows < ROW_CLASSES[-1] else f"M > {ROW_CLASSES[-2]}"
        print(
            f"ditq: {problem.fmt.name} weights, {8 * problem.activation_bytes}-bit activations, {rows}, "
            f"N = {problem.out_features}, K = {problem.in_features}: {config} ({source})",
            file=sys.stderr,
        )
    return config
