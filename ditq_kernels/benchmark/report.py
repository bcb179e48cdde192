"""What a run found: one JSON file, a table to read, and the verdicts on the targets. Derived figures (rates, ratios)
are computed here and nowhere else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import written_whole
from .contenders import BASELINE
from .run import CHECK_FAILED, CaseResults, Result, Run, with_timing
from .targets import TARGETS, Verdict, judge
from .timing import GRAPH, Timing

FORMAT_VERSION = 1
MADE_BY = "ditq bench"
RESULTS_FILE = "results.json"


def durations(run: Run) -> dict[str, dict[tuple[int, int, int], float]]:
    """Microseconds of every checked result, by contender and shape; of graphs' replays only, which alone compare."""
    found: dict[str, dict[tuple[int, int, int], float]] = {}
    for case, result in with_timing(run):
        if result.timing.how == GRAPH:
            found.setdefault(result.contender, {})[case.case.shape] = result.timing.microseconds
    return found


def _bandwidth(result: Result) -> float | None:
    """GB/s, of the bytes that have to move."""
    return None if result.moved is None else result.moved / result.timing.microseconds * 1e-3


def copy_shares(run: Run) -> dict[str, dict[tuple[int, int, int], float]]:
    """Bandwidth of each pass as a share of the copy's."""
    found: dict[str, dict[tuple[int, int, int], float]] = {}
    if run.ceilings is None or not run.ceilings.copy_gbs:
        return found
    for case, result in with_timing(run):
        if case.kind == "pass" and result.timing.how == GRAPH:
            share = _bandwidth(result) / run.ceilings.copy_gbs
            found.setdefault(result.contender, {})[case.case.shape] = share
    return found


def verdicts(run: Run) -> list[Verdict]:
    """One verdict for each target, in the table's order."""
    measured, shares = durations(run), copy_shares(run)
    return [judge(target, measured, shares) for target in TARGETS]


def _result_json(case: CaseResults, result: Result, baseline: Timing | None, copy_gbs: float | None) -> dict[str, Any]:
    timing = result.timing
    record: dict[str, Any] = dict(
        contender=result.contender,
        family=result.family,
        config=result.config,
        note=result.note,
        failure=result.failure,
        check=None if result.check is None else asdict(result.check),
    )
    if timing is None:
        return record
    record |= dict(
        median_us=timing.microseconds,
        lower_quartile_us=timing.lower,
        upper_quartile_us=timing.upper,
        rounds=timing.rounds,
        calls=timing.calls,
        operand_sets=timing.sets,
        how=timing.how,
        eager_us=timing.eager,
    )
    gbs = _bandwidth(result)
    record |= dict(moved_bytes=result.moved, gbs=gbs, share_of_copy=gbs / copy_gbs if gbs and copy_gbs else None)
    if case.kind == "product":
        record["tflops"] = case.case.flops / timing.microseconds * 1e-6
        comparable = baseline is not None and baseline.how == timing.how
        record["ratio_to_cublas_bf16"] = baseline.microseconds / timing.microseconds if comparable else None
    return record


def _baseline(case: CaseResults) -> Timing | None:
    return next((result.timing for result in case.results if result.contender == BASELINE), None)


def _case_json(case: CaseResults, copy_gbs: float | None) -> dict[str, Any]:
    baseline = _baseline(case)
    return dict(
        kind=case.kind,
        rows=case.case.rows,
        out_features=case.case.out_features or None,
        in_features=case.case.in_features,
        modulation=case.case.modulation,
        layers=list(case.case.layers),
        results=[_result_json(case, result, baseline, copy_gbs) for result in case.results],
    )


def as_json(run: Run, gpu: dict[str, Any], versions: dict[str, Any]) -> dict[str, Any]:
    """The whole run as plain values. ``gpu`` and ``versions`` are :mod:`.provenance`'s."""
    copy_gbs = run.ceilings.copy_gbs if run.ceilings else None
    roofs = None
    if run.ceilings:
        tflops = {kind: dict(tflops=rate, contender=name) for kind, (rate, name) in sorted(run.ceilings.tflops.items())}
        roofs = dict(copy_gbs=copy_gbs, largest_product=tflops)
    return dict(
        version=FORMAT_VERSION,
        made_by=MADE_BY,
        gpu=gpu,
        versions=versions,
        ceilings=roofs,
        targets=[
            dict(
                text=verdict.target.text,
                least=verdict.target.least,
                state=verdict.state,
                ratio=verdict.ratio,
                shape=verdict.shape,
            )
            for verdict in verdicts(run)
        ],
        cases=[_case_json(case, copy_gbs) for case in (*run.products, *run.passes)],
        not_reached=run.not_reached,
        device_lost=run.lost,
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN: null in its place."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON to ``path``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _cells(record: dict[str, Any]) -> list[str] | None:
    """A row of the table; None for a contender that took no part."""
    if record["failure"]:
        failed = record["failure"].startswith(CHECK_FAILED)
        return [record["contender"], record["failure"]] if failed else None
    spread = f"{record['lower_quartile_us']:.1f}-{record['upper_quartile_us']:.1f}"
    if "tflops" in record:
        ratio = record["ratio_to_cublas_bf16"]
        rate, relation = f"{record['tflops']:.1f} TFLOP/s", "" if ratio is None else f"{ratio:.2f}x"
    else:
        share = record["share_of_copy"]
        rate, relation = "", "" if share is None else f"{share:.0%} of copy"
    bandwidth = f"{record['gbs']:.0f} GB/s"
    how = "" if record["how"] == "graph" else "events: launch overhead is in it"
    remark = "; ".join(part for part in (record["config"], record["note"], how) if part)
    eager = record.get("eager_us")
    eager = "" if eager is None else f"eager {eager:.1f} us"
    return [record["contender"], f"{record['median_us']:.1f} us", spread, eager, rate, bandwidth, relation, remark]


def _aligned(rows: Iterable[list[str]]) -> list[str]:
    """Columns aligned; a row of two cells, which holds a sentence, does not widen them."""
    rows = list(rows)
    full = [row for row in rows if len(row) > 2]
    widths = [max(len(row[i]) for row in rows if i == 0 or len(row) > 2) for i in range(len(full[0]) if full else 1)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        if len(row) > 2
        else f"  {row[0].ljust(widths[0])}  {row[1]}"
        for row in rows
    ]


def table(content: dict[str, Any]) -> str:
    """A run's JSON as text: GPU and ceilings, a block for each case, missing contenders, what was not reached."""
    gpu, versions, roofs = content["gpu"], content["versions"], content["ceilings"]
    lines = [
        f"{gpu.get('name')}, driver {gpu.get('driver')}, torch {versions.get('torch')}, CUDA {versions.get('cuda')}, "
        f"triton {versions.get('triton')}, ditq_kernels {versions.get('ditq_kernels')}, commit {versions.get('commit')}"
    ]
    if roofs:
        products = "".join(
            f", {kind} {roof['tflops']:.0f} TFLOP/s ({roof['contender']})"
            for kind, roof in roofs["largest_product"].items()
        )
        lines.append(f"ceilings: copy {roofs['copy_gbs']:.0f} GB/s{products}")
    missing: dict[str, dict[str, None]] = {}
    for case in content["cases"]:
        shape = f"M={case['rows']} " + (f"N={case['out_features']} " if case["out_features"] else "")
        layers = f"  ({', '.join(case['layers'])})" if case["layers"] else ""
        what = "" if case["kind"] == "product" else "passes over "
        lines += ["", f"{what}{shape}K={case['in_features']}{layers}"]
        rows = [_cells(record) for record in case["results"]]
        lines += _aligned(row for row in rows if row) if any(rows) else ["  nothing was measured"]
        for record in case["results"]:
            if record["failure"] and not record["failure"].startswith(CHECK_FAILED):
                missing.setdefault(record["contender"], {})[record["failure"]] = None
    if missing:
        lines += ["", "took no part:"]
        lines += [f"  {name}: {reason}" for name, texts in missing.items() for reason in texts]
    if content["not_reached"]:
        lines += ["", f"not reached in the time given: {', '.join(content['not_reached'])}"]
    if content["device_lost"]:
        lines += ["", f"the GPU failed for good {content['device_lost']}"]
    return "\n".join(lines)


def verdict_lines(run: Run) -> str:
    """The targets, a line each."""
    return "\n".join(["targets (the worst shape of each):", *(f"  {verdict}" for verdict in verdicts(run))])
