"""The targets' shapes in pytest-benchmark, for its comparisons between commits (`--benchmark-save`,
`--benchmark-compare`). Ratios between contenders come from `ditq bench`, which times them in turns.

    pytest benchmarks --benchmark-enable --benchmark-only
"""

from __future__ import annotations

import pytest
import torch

from ditq_kernels.benchmark.cases import Case, target_cases
from ditq_kernels.benchmark.contenders import TORCH, Contender, Inputs, Unavailable, check, ours
from ditq_kernels.benchmark.elementwise import PASSES, PassContender
from ditq_kernels.benchmark.peers import PEERS
from ditq_kernels.benchmark.run import OUTPUT_BYTES, pass_cases
from ditq_kernels.benchmark.timing import CudaStopwatch, Recording, record, rotation

ROUNDS = 15


def _time(benchmark, recording: Recording, device: torch.device, about: dict) -> None:
    """Time replays; a replay is several calls, and the figures of pytest-benchmark are of a whole replay."""

    def replay() -> None:
        recording.replay()
        torch.cuda.synchronize(device)

    benchmark.pedantic(replay, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info |= about | dict(calls=recording.calls, operand_sets=recording.sets, how=recording.how)
    if benchmark.enabled:
        benchmark.extra_info["median_us_per_call"] = 1e6 * benchmark.stats.stats.median / recording.calls


@pytest.mark.parametrize("contender", (*TORCH, *ours(), *PEERS), ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", target_cases(), ids=str)
def test_product(benchmark, stopwatch: CudaStopwatch, case: Case, contender: Contender) -> None:
    inputs = Inputs(case, stopwatch.device)
    try:
        prepared = contender.prepare(inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))
    found = check(prepared, inputs)
    assert found.passed, str(found)
    moved = prepared.set_bytes + OUTPUT_BYTES * case.rows * case.out_features
    recording = record(prepared.call, rotation(prepared.operands, moved, stopwatch.l2_bytes), stopwatch)
    about = dict(contender=contender.name, shape=str(case), config=prepared.config, note=prepared.note)
    _time(benchmark, recording, stopwatch.device, about)


@pytest.mark.parametrize("contender", PASSES, ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", pass_cases(target_cases()), ids=lambda case: f"M={case.rows} K={case.in_features}")
def test_pass(benchmark, stopwatch: CudaStopwatch, case: Case, contender: PassContender) -> None:
    ready = contender.prepare(case, stopwatch.device)
    found = ready.verify()
    assert found.passed, str(found)
    recording = record(ready.call, rotation(ready.operands, ready.moved, stopwatch.l2_bytes), stopwatch)
    _time(benchmark, recording, stopwatch.device, dict(contender=contender.name, moved_bytes=ready.moved))
