"""Mutants drawn from a stratum. Cosmic Ray (https://cosmic-ray.readthedocs.io) says where the source can be changed and
how; here is drawn which of it is, first the place and then the change, so that places with many changes are not drawn
more often than others.
"""

from __future__ import annotations

import ast
import collections
import random
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

from .mutant import Mutant, changed_lines
from .strata import Stratum

# Variables are replaced and inserted by names that have to be listed; all else needs no arguments. A decorator that is
# taken away from a kernel says nothing about the kernel.
_LEFT_OUT = ("core/VariableReplacer", "core/VariableInserter", "core/RemoveDecorator")


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where types stand, which nothing computes with: (line, column) of the beginning and the end of each."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            found = getattr(node, name, None)
            if found is not None:
                spans.append(((found.lineno, found.col_offset), (found.end_lineno, found.end_col_offset)))
    return spans


def _changes(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """For each place, the (operator, occurrence) that change something there."""
    types = _annotations(source)
    nodes = list(ast_nodes(get_ast(source)))
    found = collections.defaultdict(list)
    for name in cosmic_ray.plugins.operator_names():
        if name in _LEFT_OUT:
            continue
        operator = cosmic_ray.plugins.get_operator(name)()
        places = (start for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, place in enumerate(places):
            if not any(start <= place < end for start, end in types):
                found[tuple(place)].append((name, occurrence))
    return found


def draw(stratum: Stratum, package: Path, count: int, seed: int) -> list[Mutant]:
    """``count`` mutants of different places, the same for the same source and seed."""
    sources = {file: (package / file).read_text() for file in stratum.files}
    changes = {file: _changes(source) for file, source in sources.items()}
    places = [(file, place) for file in sources for place in sorted(changes[file])]
    rng = random.Random(f"{seed} {stratum.name}")
    rng.shuffle(places)
    mutants = []
    for file, place in places:
        name, occurrence = rng.choice(changes[file][place])
        text = mutate_code(sources[file], cosmic_ray.plugins.get_operator(name)(), occurrence)
        mutants.append(Mutant(stratum.name, file, *changed_lines(sources[file], text), text))
        if len(mutants) == count:
            return mutants
    raise ValueError(f"{stratum.name} has {len(mutants)} places to change, not {count}")
