"""Prints the measured constants of ditq_kernels/kernels/hopper_costs.py and of the extension's tiles, fitted to the
timings below results/nvidia-h200/, with the error of each fit.

    python benchmarks/fit_costs.py
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "nvidia-h200"
MULTIPROCESSORS = 132
STEP = 128
ALONE = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5)  # steps of a full multiprocessor that one takes that is alone
CLUSTERS = {2: 66, 4: 30}  # that run at once
CONFIG = re.compile(r"(\w+) (\d+)x(\d+)(?:x\d+)? warps=(\d+) stages=(\d+)( descriptors)?")
TILE = re.compile(r"(\d+)x(\d+) cluster (\d) (\w+)")
Shape = tuple[int, int, int]


def up(extent: int, block: int) -> int:
    return -(-extent // block)


def shape_of(text: str) -> Shape:
    rows, outputs, inputs = map(int, text.split("x"))
    return rows, outputs, inputs


def least_squares(features: Iterable[list[float]], microseconds: Iterable[float]) -> tuple[np.ndarray, np.ndarray]:
    """(coefficients, relative errors), each timing weighted by its inverse."""
    a, y = np.array(list(features), float), np.array(list(microseconds))
    found = np.linalg.lstsq(a / y[:, None], np.ones(len(y)), rcond=None)[0]
    return found, a @ found / y - 1


def fit(tile: tuple[int, int], timings: dict[Shape, float]) -> tuple[float, float, float, float]:
    """(start, step, alone, root mean square of the relative errors) of ``start + step * steps * max(alone, tiles of a
    multiprocessor)``.
    """

    def features(alone: float) -> Iterable[list[float]]:
        for rows, outputs, inputs in timings:
            tiles = up(rows, tile[0]) * up(outputs, tile[1])
            yield [1, up(inputs, STEP) * max(alone, up(tiles, MULTIPROCESSORS))]

    found = []
    for alone in ALONE:
        (start, step), error = least_squares(features(alone), timings.values())
        found.append((float(np.sqrt((error**2).mean())), start, step, alone))
    error, start, step, alone = min(found)
    return start, step, alone, error


def print_fits(title: str, timings: dict[str, dict[Shape, float]]) -> None:
    print(f"\n{title}")
    for config, of in timings.items():
        _, rows, outputs, warps, stages, descriptors = CONFIG.fullmatch(config).groups()
        start, step, alone, error = fit((int(rows), int(outputs)), of)
        key = f"({rows}, {outputs}, {warps}, {stages}, {bool(descriptors)})"
        print(f"    {key}: Cost({start:.2f}, {step:.3f}, {alone:g}),  # off by {100 * error:.0f} %, {len(of)} shapes")


def extension_tiles(shapes: dict[str, dict[str, float]]) -> None:
    """Of a tile that is split each round costs a wave; where two warpgroups take turns, the epilogue is hidden."""
    print("\nthe extension's tiles: start, step, wave")
    for name in next(iter(shapes.values())):
        if not (found := TILE.fullmatch(name)) or int(found[3]) not in CLUSTERS:
            continue
        rows, outputs, cluster = map(int, found.groups()[:3])
        features = []
        for m, n, k in map(shape_of, shapes):
            rounds = up(up(m, rows * cluster) * up(n, outputs), CLUSTERS[cluster])
            features.append([1, rounds * up(k, STEP), rounds])
        if found[4] == "ping_pong":
            features = [row[:2] for row in features]
        constants, error = least_squares(features, [of[name] for of in shapes.values()])
        print(f"    {name}: {np.round(constants, 3).tolist()}, off by {100 * np.sqrt((error**2).mean()):.0f} %")


def main() -> None:
    of_tiles = json.loads((RESULTS / "2026-11-27-int8.json").read_text())["shapes"]
    extension_tiles(of_tiles)
    cublas = {shape_of(shape): of["cublas bf16"] for shape, of in of_tiles.items()}
    constants, error = least_squares(([1, m * n * k / 1e6, up(k, STEP)] for m, n, k in cublas), cublas.values())
    print(f"\ncuBLAS bf16: {np.round(constants, 6).tolist()}, off by {100 * np.sqrt((error**2).mean()):.0f} %")
    products = json.loads((RESULTS / "2026-11-27-sweep.json").read_text())["products"]
    by_route: dict[tuple[str, str], dict[str, dict[Shape, float]]] = defaultdict(lambda: defaultdict(dict))
    for product, timings in products.items():
        family, shape = product.split(", ")
        for config, microseconds in timings.items():
            if CONFIG.fullmatch(config):
                by_route[family, config.split()[0]][config][shape_of(shape)] = microseconds
    for (family, route), timings in sorted(by_route.items()):
        if route != "expanded":
            print_fits(f"{family}, {route}", timings)


if __name__ == "__main__":
    main()
