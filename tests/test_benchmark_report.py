"""What the benchmark writes, and its commands, from numbers that nobody measured."""

import json
import math
import re
import sys

import pytest
import torch
from stopwatches import FakeStopwatch

from ditq_kernels import cli
from ditq_kernels.benchmark import checks, command, options, pictures, report
from ditq_kernels.benchmark.cases import Case, model_cases, target_cases
from ditq_kernels.benchmark.ceilings import Ceilings
from ditq_kernels.benchmark.contenders import BASELINE, TORCH, ours
from ditq_kernels.benchmark.run import CaseResults, Result, Run, pass_cases
from ditq_kernels.benchmark.targets import TARGETS
from ditq_kernels.benchmark.timing import Timing

CPU = torch.device("cpu")
SYNTHETIC_GPU = dict(name="SYNTHETIC, no GPU", driver="none")
SYNTHETIC_VERSIONS = dict(torch="synthetic", date="2000-01-01", commit="none")


def synthetic_run():
    """Speeds by a formula, for the form of the report only."""
    speeds = {
        BASELINE: 400,
        "w8a8 product": 700,
        "w8a8": 620,
        "w4a8_g128 product": 660,
        "w8a16_g128": 380,
        "w4a16_g128": 370,
        "scaled_mm fp8 rowwise": 690,
        "int_mm+scaling compiled": 450,
    }
    found = Run(Ceilings(3000.0, {"bf16": (500.0, BASELINE), "int8": (900.0, "w8a8 product")}))
    for case in model_cases():
        results = []
        for index, (name, speed) in enumerate(speeds.items()):
            if case.modulation and "a8" in name:
                continue
            weight = 0.5 if "w4" in name else 1 if "8" in name and name != BASELINE else 2
            moved = int(case.out_features * case.in_features * weight + 2 * case.rows * sum(case.shape[1:]))
            microseconds = 2 + case.flops / speed * 1e-6 + moved / 2500 * 1e-3 + 0.01 * index
            duration = Timing(microseconds, 0.98 * microseconds, 1.03 * microseconds, 15, 100, 10, "graph")
            outcome = checks.Check(True, 0.0017, "synthetic")
            results.append(Result(name, "ours", duration, outcome, "route 128x128", moved=moved))
        results.append(Result("broken", "ours", None, None, failure="check failed: error nan, allowed: 0.1"))
        results.append(Result("absent", "peers", failure="absent is not installed"))
        found.products.append(CaseResults("product", case, results))
    for case in pass_cases(target_cases()):
        moved = 3 * case.rows * case.in_features
        duration = Timing(1.0 + moved / 2800 * 1e-3, 1.0, 2.0, 15, 100, 10, "graph")
        found.passes.append(CaseResults("pass", case, [Result("quantize", "ours", duration, moved=moved)]))
    found.not_reached.append("M=1 N=2 K=3")
    return found


@pytest.fixture(scope="module")
def content():
    return report.as_json(synthetic_run(), SYNTHETIC_GPU, SYNTHETIC_VERSIONS)


def test_a_report_has_its_figures_and_their_origin(content, tmp_path):
    path = tmp_path / "deep" / "results.json"
    content = json.loads(json.dumps(content))
    content["cases"][0]["results"][-2]["check"] = {"passed": False, "error": math.nan, "budget": "x"}
    report.write(path, content)
    read = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    assert read["version"] == report.FORMAT_VERSION and read["made_by"] == "ditq bench"
    assert {"gpu", "versions", "ceilings", "targets", "cases", "not_reached", "device_lost"} <= set(read)
    assert len(read["targets"]) == len(TARGETS)
    case = next(case for case in read["cases"] if (case["rows"], case["out_features"]) == (4096, 3072))
    records = {record["contender"]: record for record in case["results"]}
    base, product = records[BASELINE], records["w8a8 product"]
    flops = 2 * case["rows"] * case["out_features"] * case["in_features"]
    assert product["tflops"] == pytest.approx(flops / product["median_us"] / 1e6)
    assert product["ratio_to_cublas_bf16"] == pytest.approx(base["median_us"] / product["median_us"])
    assert product["gbs"] == pytest.approx(product["moved_bytes"] / product["median_us"] / 1e3)
    assert product["lower_quartile_us"] < product["median_us"] < product["upper_quartile_us"]
    assert product["config"] == "route 128x128" and product["how"] == "graph" and product["check"]["passed"]
    assert "median_us" not in records["broken"] and records["broken"]["failure"].startswith("check failed")


def test_a_table_is_readable_and_says_what_is_missing(content):
    text = report.table(content)
    print(text)
    assert "SYNTHETIC, no GPU" in text and "ceilings: copy 3000 GB/s, bf16 500 TFLOP/s (cublas_bf16)" in text
    assert "M=4096 N=3072 K=3072  (FLUX.1 attention)" in text
    assert re.search(r"w8a8 product +\d+\.\d us +[\d.]+-[\d.]+ +[\d.]+ TFLOP/s +\d+ GB/s +[\d.]+x +route 128x128", text)
    assert re.search(r"broken +check failed: error nan", text)
    assert text.count("absent: absent is not installed") == 1
    assert "not reached in the time given: M=1 N=2 K=3" in text
    lines = report.verdict_lines(synthetic_run()).splitlines()
    assert len(lines) == 1 + len(TARGETS)


def test_pictures_are_drawn(content, tmp_path):
    drawn = pictures.draw(content, tmp_path)
    assert [path.name for path in drawn] == [pictures.SPEEDUP_FILE, pictures.ROOFLINE_FILE]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in drawn)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_without_something_to_draw_nothing_is_drawn(content, tmp_path):
    empty = {**content, "cases": [], "ceilings": None}
    assert pictures.draw(empty, tmp_path) == [] and not list(tmp_path.iterdir())


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Provenance of no GPU, so that the commands' later parts can run on the CPU with a made-up stopwatch."""
    monkeypatch.setattr(command, "gpu", lambda device: dict(SYNTHETIC_GPU))
    monkeypatch.setattr("ditq_kernels.benchmark.run.measure_ceilings", lambda *_: Ceilings(1000.0, {}))
    monkeypatch.setattr(command, "select", lambda *_: [Case(4, 32, 128), Case(600, 32, 128)])
    monkeypatch.setattr(command, "contenders_for", lambda schemes: ours(("w8a8",)) + TORCH[:1])


def test_bench_writes_a_report_and_does_without_matplotlib(pretended_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = command.bench(command.BenchSettings(tmp_path / "out"), CPU, FakeStopwatch())
    printed = capsys.readouterr().out
    assert len(found.products) == 2 and len(found.passes) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]
    assert "(no pictures:" in printed and "targets (the worst shape of each):" in printed
    assert "w8a8 product cuda: route 'cuda' takes CUDA tensors" in printed


def test_the_commands_say_that_on_a_cpu_no_kernel_for_gpus_is_measured(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(command, "bench_cpu", lambda out, quick: asked.append((out, quick)) or 0)
    assert cli.main(["bench", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    assert options.NOTHING_TO_MEASURE in capsys.readouterr().out and asked == [(tmp_path, True)]
    assert cli.main(["tune", "--device", "cpu"]) == 0
    assert options.NOTHING_TO_MEASURE in capsys.readouterr().out and len(asked) == 1


@pytest.mark.parametrize(
    "arguments", [("bench", "--seconds", "nan"), ("tune", "--seconds", "-1"), ("bench", "--rows", "0")]
)
def test_impossible_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2 and "is not a" in capsys.readouterr().err
