"""Counts, without a CPU that has AMX, which lines of memory the int8 product for such CPUs takes from which cache.

The product of csrc/cpu is compiled with instructions that touch the lines of their tiles and compute nothing, and runs
in valgrind's cachegrind as one of two threads, with the first two caches of Xeons that have AMX: 48 KB and 2 MB, least
recently used first out. No prefetcher, nothing timed. Needs g++ (AVX2) and valgrind.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "csrc" / "cpu"
CACHES = ("--I1=32768,8,64", "--D1=49152,12,64", "--LL=2097152,16,64")
THREADS = 2
TILE, CYCLES = 16 * 16 * 64, 16  # multiply-adds of an instruction, and how long it keeps the matrix unit
SHAPES = ((1024, 1152, 1152), (1024, 1152, 4608), (1024, 4608, 1152))  # M, K, N of DiT-XL/2's layers
TASKS = ((1024, 64), (1024, 192), (512, 192))  # rows and outputs of a task


def compiled(folder: Path) -> Path:
    """The program of cpu_traffic/product.cpp."""
    program = folder / "product"
    subprocess.run(
        [
            *("g++", "-std=c++17", "-O2", "-march=x86-64-v3", "-ffp-contract=off", "-Wno-psabi", f"-I{SOURCE}"),
            *("-DDITQ_LEVEL=amx", '-DDITQ_TILE="tile_amx.h"', "-DDITQ_LANES=16"),
            f'-DDITQ_INSTRUCTIONS="{HERE / "cpu_traffic" / "amx_instructions.h"}"',
            *(HERE / "cpu_traffic" / "product.cpp", SOURCE / "int8_product.cpp", "-o", program),
        ],
        check=True,
    )
    return program


def misses(program: Path, *arguments: object) -> tuple[int, int]:
    """Lines of data that the first cache does not have, and those that the second has not either."""
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=yes", *CACHES, "--cachegrind-out-file=/dev/null"]
    done = subprocess.run([*command, str(program), *map(str, arguments)], check=True, capture_output=True, text=True)
    first, second = (
        int(re.search(rf"{name}\s+misses:\s+([\d,]+)", done.stderr)[1].replace(",", "")) for name in ("D1 ", "LLd")
    )
    return first, second


def main() -> None:
    """Prints a line for each shape and size of tasks."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| M, K, N | a task | from the 2nd cache | from beyond | bytes a cycle, from beyond |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(Path(folder))
        for shape in SHAPES:
            for rows, outputs in TASKS:
                with_product, idle = (
                    misses(program, *shape, rows, outputs, THREADS, run) for run in ("product", "idle")
                )
                m, k, n = shape
                tasks = -(-m // rows) * -(-n // outputs)
                tiles = m * k * n / TILE * (tasks // THREADS) / tasks
                first, second = ((some - none) / tiles for some, none in zip(with_product, idle, strict=True))
                counted = f"{first - second:.1f} | {second:.1f} | {64 * second / CYCLES:.1f}"
                print(f"| {m}, {k}, {n} | {rows} x {outputs} | {counted} |")


if __name__ == "__main__":
    main()
