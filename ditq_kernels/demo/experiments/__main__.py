"""``python -m ditq_kernels.demo.experiments NAME``: carry an experiment out."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import calibration, combinations, layers, moments, peers, positions, remedies, weights

EXPERIMENTS = {
    "calibration": calibration,
    "weights": weights,
    "moments": moments,
    "positions": positions,
    "combinations": combinations,
    "layers": layers,
    "remedies": remedies,
    "peers": peers,
}
DIRECTORY = Path("docs/experiments")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ditq_kernels.demo.experiments",
        description="Carry an experiment on the embedded model out. One that was interrupted goes on where it stopped.",
    )
    parser.add_argument("names", nargs="+", choices=[*EXPERIMENTS], metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of the JSON (default: %(default)s)")
    args = parser.parse_args()
    from .lab import Lab
    from .records import Records

    for name in args.names:
        experiment = EXPERIMENTS[name]
        lab = Lab(experiment.PROTOCOL)
        lab.carry_out(experiment.cases(lab), Records(args.out / f"{name}.json"))


if __name__ == "__main__":
    main()
