"""Bounds of counted kernels beside what a GPU took, as Markdown.

    python benchmarks/bounds_and_times.py benchmarks/results/counted/DATE-sm_90.json \
        benchmarks/results/nvidia-h200/DATE-bench.json

The first file is what ``ditq inspect --execute --counters --out`` writes, the second what ``ditq bench --out`` does. A
product that needs several launches has the sum of their bounds. Their clock is the one that the vendor's peak rates are
given at; a GPU that runs at a higher one may stay below them by as much.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

FORMATS = {"w8": "w8a8", "w4_g128": "w4a8_g128"}
MODULATION = {"w8": "w8a16", "w4_g128": "w4a16_g128"}


def bounds(counted: dict) -> dict[str, tuple[float, str]]:
    """By the subject's name: (the sum over its launches, what sets the largest of them)."""
    found: dict[str, list[tuple[float, str]]] = {}
    for one in counted["counts"]:
        term, bound = max(one["bounds_us"].items(), key=lambda entry: entry[1])
        found.setdefault(one["subject"]["name"], []).append((bound, term))
    return {name: (sum(bound for bound, _ in parts), max(parts)[1]) for name, parts in found.items()}


def times(benched: dict) -> Iterator[tuple[str, str, float]]:
    """(the subject that was timed, how, µs) of our own contenders."""
    for case in benched["cases"]:
        rows, outputs, inputs = case["rows"], case["out_features"], case["in_features"]
        for result in case["results"]:
            if result["failure"] is not None or not result.get("median_us"):
                continue
            contender, config = result["contender"], result["config"]
            if case["kind"] == "pass":
                if contender == "quantize":
                    yield f"quantization {rows} x {inputs}", "", result["median_us"]
                continue
            entering, names = ("bf16", MODULATION) if case["modulation"] else ("int8", FORMATS)
            for fmt, scheme in names.items():
                wanted = scheme if case["modulation"] else f"{scheme} product"
                csrc = " csrc" if config and config.startswith("cuda") else ""
                if contender == wanted and not (config or "").startswith("expanded_cuda"):
                    yield f"{fmt} x {entering} {rows} x {outputs} x {inputs}{csrc}", config, result["median_us"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counted", type=Path)
    parser.add_argument("benched", type=Path)
    args = parser.parse_args()
    known = bounds(json.loads(args.counted.read_text()))
    print("| M x N x K | bound, µs (what sets it) | took, µs | took / bound |\n|---|---|---|---|")
    for name, _, took in times(json.loads(args.benched.read_text())):
        if name in known:
            bound, term = known[name]
            print(f"| {name} | {bound:.1f} ({term}) | {took:.1f} | {took / bound:.1f} |")


if __name__ == "__main__":
    main()
