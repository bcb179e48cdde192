"""`ditq inspect --execute`: its choice of cases computes right, and what the user can mend is said."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import triton

from ditq_kernels import cli, revision
from ditq_kernels.inspect import execution
from ditq_kernels.inspect.cases import products
from ditq_kernels.kernels.config import CONFIGS, EXTENSION_ROUTES, OVERLAPPED_CAPABILITY, OVERLAPPED_ROUTES
from ditq_kernels.layer.formats import WEIGHT_FORMATS

ARCHITECTURES = execution.QUICK_ARCHITECTURES


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(what the command printed, what it recorded) of the quick choice."""
    out = tmp_path_factory.mktemp("quick") / "record.json"
    command = [sys.executable, "-m", "ditq_kernels", "inspect", "--execute", "--quick", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout, json.loads(out.read_text())


def test_the_quick_choice_computes_right(quick):
    printed, record = quick
    expected = {(arch, case.name) for arch in ARCHITECTURES for case in execution.cases(arch, quick=True)}
    assert {(outcome["arch"], outcome["name"]) for outcome in record["outcomes"]} == expected
    assert {outcome["verdict"] for outcome in record["outcomes"]} == {"ok"}
    assert len(record["outcomes"]) == len(expected) > 100
    assert f"{len(expected)} cases, 0 of them not ok" in printed
    assert sum(outcome["executed"] for outcome in record["outcomes"]) > 100  # not all the same as one before


def test_a_record_says_what_ran(quick):
    printed, record = quick
    assert record["triton"] == triton.__version__ and record["torch"] == torch.__version__
    assert (record["commit"] or "").rstrip("+") == (revision.commit() or "").rstrip("+")
    assert record["date"].startswith("20")
    assert printed.endswith("\n".join(record["summary"]) + "\n")
    known = {line.split()[0] for line in record["summary"]}
    assert {f"sm_{arch}" for arch in ARCHITECTURES} <= known


def _children(pid):
    """Processes that ``pid`` started, and those that they did."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, _, rest = entry.read_text().partition(" (")
            if int(rest.rpartition(") ")[2].split()[1]) == pid:
                found += [int(number), *_children(int(number))]
    return found


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are not found by /proc")
@pytest.mark.parametrize("options", [["--execute", "--match", "activation"], []])
def test_all_processes_end_with_the_command(options):
    command = [sys.executable, "-m", "ditq_kernels", "inspect", "--arch", "sm_80", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asked:
        for _ in range(2):  # a header, or a case, and then a kernel
            assert asked.stdout.readline()
        children = _children(asked.pid)
        assert len(children) >= 2
        asked.kill()
    end = time.monotonic() + 20
    while any(map(_is_alive, children)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(_is_alive, children))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_quick_choice_meets_every_route_and_format(arch):
    names = [case.name for case in execution.cases(arch, quick=True)]
    for fmt in WEIGHT_FORMATS if arch == products.QUICK_ARCHITECTURE else products.QUICK_FORMATS:
        for kind in ("i8", "16"):
            entering = "x i8" if kind == "i8" else "x (bf16|fp16)"
            assert any(_names(name, f"in_loop {fmt}", entering) for name in names), (fmt, kind)
        for family in ("small", "expanded"):
            assert any(_names(name, f"{family} {fmt}", "x (bf16|fp16)") for name in names), (family, fmt)
        for family in ("gradient", "expansion"):
            assert any(name.startswith(f"{family} {fmt} ") for name in names), (family, fmt)
    elsewhere = set(EXTENSION_ROUTES) | (set() if arch == OVERLAPPED_CAPABILITY else set(OVERLAPPED_ROUTES))
    assert {case.family for case in execution.cases(arch, quick=True)} >= set(CONFIGS) - elsewhere
    assert any(name.startswith("extension int8 ") for name in names) == (arch == 90 and not execution.left_out([arch]))
    assert any(name.startswith("int8 w8 x i8") for name in names)
    assert any(name.startswith("expanded w4") and "x i8" in name for name in names)
    tiled = [name for name in names if name.startswith("expanded") and "stages" in name]
    assert any("x bf16" in name or "x fp16" in name for name in tiled)
    for what in ("quantize", "gelu", "norm"):
        assert any(name.startswith(f"activation {what}") for name in names)
    assert any("descriptors" in name for name in names) == (arch == 90)


def _names(name, start, pattern):
    return re.match(rf"{re.escape(start)} {pattern} ", name) is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--match", "w8"], "--match, --out and --counters say what to execute: add --execute"),
        (["--out", "record.json"], "add --execute"),
        (["--counters"], "add --execute"),
        (["--execute", "--counters", "--quick"], "--match chooses what --counters counts"),
        (["--execute", "--counters", "--arch", "sm_86"], "sm_86 is not counted: another of its family stands for it"),
        (["--execute", "--counters", "--arch", "sm_100"], "sm_100 is not counted: the executor does not know tcgen05"),
        (["--execute", "--counters", "--match", "SDXL"], "no product and no layer holds 'SDXL' in its name"),
        (["--execute", "--counters", "--out", "no/such/folder/record.json"], "there is no folder"),
        (["--execute", "--driver"], "choose one of them"),
        (["--execute", "--arch", "sm_103"], "sm_103 cannot be executed: another of its family stands for it"),
        (["--execute", "--arch", "sm_90", "sm_121"], "sm_121 cannot be executed: another of its family"),
        (["--execute", "--match", "nothing of this name"], "no case's name holds 'nothing of this name'"),
        (["--execute", "--quick", "--out", "no/such/folder/record.json"], "there is no folder"),
    ],
)
def test_what_the_user_can_mend_is_said_before_anything_runs(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(execution, "execute", lambda *arguments: pytest.fail("something ran"))
    monkeypatch.chdir(os.path.dirname(__file__))
    assert cli.main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def outcomes(*verdicts):
    return [
        execution.Outcome(90, "in_loop", f"case {i}", verdict, "said", 1.0, 2, 1, 1000)
        for i, verdict in enumerate(verdicts)
    ]


def test_what_fails_is_printed_recorded_and_an_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(execution, "execute", lambda *arguments: iter(outcomes("ok", "FAULT", "MISMATCH")))
    out = tmp_path / "record.json"
    assert cli.main(["inspect", "--execute", "--arch", "sm_90", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "FAULT       case 1: said" in printed and "3 cases, 2 of them not ok" in printed
    assert "sm_90  in_loop     1 ok, 1 MISMATCH, 1 FAULT" in printed
    assert [outcome["verdict"] for outcome in json.loads(out.read_text())["outcomes"]] == ["ok", "FAULT", "MISMATCH"]
    assert cli.main(["inspect", "--execute", "--arch", "sm_90", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["outcomes"]) == 3


def test_every_verdict_has_its_name():
    from ditq_kernels.inspect.cases.case import Case, Mismatch
    from ditq_kernels.inspect.executor.faults import Fault, Unsupported

    def failing(error):
        def compute():
            raise error

        return Case("family", "name", compute)

    for error, name in (
        (Mismatch("wrong"), "MISMATCH"),
        (Fault("race"), "FAULT"),
        (Unsupported("tcgen05"), "UNSUPPORTED"),
        (KeyError("other"), "ERROR"),
    ):
        assert execution._verdict(failing(error))[0] == name
