"""``python -m ditq_kernels.demo.experiments NAME``: carry an experiment out, or write the page."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import MODEL_DIRECTORY
from . import (
    calibration,
    combinations,
    distribution,
    layers,
    moment_steps,
    moments,
    page,
    peers,
    positions,
    remedies,
    semistatic,
    weights,
)

EXPERIMENTS = {
    "calibration": calibration,
    "weights": weights,
    "moments": moments,
    "positions": positions,
    "moment_steps": moment_steps,
    "combinations": combinations,
    "layers": layers,
    "semistatic": semistatic,
    "remedies": remedies,
    "peers": peers,
}
DIRECTORY = Path("docs/experiments")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ditq_kernels.demo.experiments",
        description="Carry experiments on the embedded model out, or write the page about them. An experiment that was "
        "interrupted goes on where it stopped; one that is complete starts anew.",
    )
    parser.add_argument(
        "names",
        nargs="+",
        choices=[*EXPERIMENTS, "distribution", "pictures", "page"],
        metavar="NAME",
        help="%(choices)s",
    )
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of the JSON (default: %(default)s)")
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL_DIRECTORY,
        help="directory of another model than the embedded one, whose name the JSON's name then ends in",
    )
    args = parser.parse_args()
    from .lab import Lab
    from .records import Records

    for name in args.names:
        if name == "page":
            print(page.write(args.out))
        elif name == "distribution":
            distribution.carry_out(args.out)
        elif name == "pictures":
            combinations.draw_pictures(Lab(combinations.PROTOCOL), args.out / "pictures.png")
        else:
            experiment = EXPERIMENTS[name]
            lab = Lab(experiment.PROTOCOL, args.model)
            stem = name if args.model == MODEL_DIRECTORY else f"{name}-{args.model.name}"
            lab.carry_out(experiment.cases(lab), Records(args.out / f"{stem}.json"))


if __name__ == "__main__":
    main()
