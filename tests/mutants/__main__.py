"""``python -m mutants``: draws, tests and counts; what has been tested already is not tested again."""

import argparse
import collections
import dataclasses
import json
import queue
import sys
import tempfile
import threading
from pathlib import Path

from tqdm import tqdm

from . import planted, sampling, trial
from .mutant import Mutant
from .strata import STRATA
from .table import table

PACKAGE = trial.REPOSITORY / "ditq_kernels"
SLOWER = 4.0  # times as long as the tests take without a mutant: it does not end
AT_LEAST = 120.0  # seconds


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("mutants", description="How many faults the tests let through.")
    parser.add_argument("--count", type=int, default=40, help="mutants of each stratum (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn depends on it (default 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes that test side by side (default 2)")
    parser.add_argument("--stratum", nargs="*", metavar="NAME", help="of these only; 'planted' are those by hand")
    parser.add_argument("--out", type=Path, default=Path("out/mutants.json"), help="the record, and where to go on")
    parser.add_argument("--again", action="store_true", help="test those once more that were left")
    return parser.parse_args(argv)


def drawn(options: argparse.Namespace) -> list[tuple[Mutant, tuple[str, ...]]]:
    """All mutants that are asked for, with the tests that should notice them."""
    wanted = options.stratum or [planted.NAME, *(stratum.name for stratum in STRATA)]
    found = planted.mutants(PACKAGE) if planted.NAME in wanted else []
    for stratum in STRATA:
        if stratum.name in wanted:
            mutants = sampling.draw(stratum, PACKAGE, options.count, options.seed)
            found += [(mutant, stratum.tests) for mutant in mutants]
    return found


def run(
    found: list[tuple[Mutant, tuple[str, ...]]], record: Path, workers: int, again: bool = False
) -> dict[str, dict]:
    """Outcomes by the mutants' names; each is written to ``record`` when it is there."""
    outcomes = json.loads(record.read_text()) if record.exists() else {}
    left: queue.SimpleQueue = queue.SimpleQueue()
    done = {name for name, outcome in outcomes.items() if not (again and outcome["verdict"] == trial.LEFT)}
    todo = [(mutant, tests) for mutant, tests in found if mutant.name not in done]
    for entry in todo:
        left.put(entry)
    lock, limits, failures = threading.Lock(), {}, []
    lock_of = collections.defaultdict(threading.Lock)
    record.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, tqdm(total=len(todo), unit="mutant") as bar:

        def work(number: int) -> None:
            copy = trial.make_copy(Path(directory) / f"copy{number}")
            while not failures:
                try:
                    mutant, tests = left.get_nowait()
                except queue.Empty:
                    return
                with lock_of[tests]:  # the tests run without a mutant once, first
                    if tests not in limits:
                        whole = trial.run_tests(copy, tests, 3600.0)
                        if whole.verdict != trial.LEFT:
                            failures.append(f"without a mutant, {whole.by} fails")
                            return
                        limits[tests] = max(SLOWER * whole.seconds, AT_LEAST)
                outcome = trial.try_mutant(copy, mutant, tests, limits[tests])
                with lock:
                    values = dataclasses.asdict(mutant) | dataclasses.asdict(outcome)
                    outcomes[mutant.name] = {key: value for key, value in values.items() if key != "text"}
                    record.with_suffix(".part").write_text(json.dumps(outcomes, indent=1))
                    record.with_suffix(".part").replace(record)
                    bar.update()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise SystemExit(f"mutants: {failures[0]}")
    return outcomes


def main(argv: list[str]) -> None:
    options = parse(argv)
    found = drawn(options)
    outcomes = run(found, options.out, options.workers, options.again)
    print(table([outcomes[mutant.name] | {"name": mutant.name} for mutant, _ in found]))


if __name__ == "__main__":
    main(sys.argv[1:])
