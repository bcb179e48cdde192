"""The faults that `make mutants` plants still fit the source, and its table counts right. No mutant is tested here."""

import ast
from pathlib import Path

from mutants import planted, table
from mutants.mutant import changed_lines
from mutants.strata import STRATA
from mutants.trial import LEFT, NOTICED, TIMED_OUT

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "ditq_kernels"


def test_what_is_planted_fits_the_source():
    found = planted.mutants(PACKAGE)
    assert len({mutant.name for mutant, _ in found}) == len(found) > 50
    for mutant, tests in found:
        ast.parse(mutant.text)
        assert mutant.before != mutant.after and mutant.text != (PACKAGE / mutant.file).read_text()
        assert all((TESTS / f"test_{name}.py").exists() for name in tests)


def test_strata_name_what_there_is():
    for stratum in STRATA:
        assert all((PACKAGE / file).exists() for file in stratum.files)
        assert all((TESTS / f"test_{name}.py").exists() for name in stratum.tests)


def test_what_is_called_equivalent_is_of_the_source():
    for name, reason in table.EQUIVALENT.items():
        file, _, change = name.partition(": ")
        before = change.partition(" -> ")[0]
        lines = " ".join(line.strip() for line in (PACKAGE / file).read_text().splitlines())
        assert before in lines and len(reason) > 20, name


def test_changed_lines():
    assert changed_lines("a\nb\nc\n", "a\nx\nc\n") == (2, "b", "x")
    assert changed_lines("a\n  b(\n  c)\nd", "a\n  b(\n  e)\nd") == (3, "c)", "e)")


def test_shares_are_of_what_is_not_equivalent(monkeypatch):
    monkeypatch.setattr(table, "EQUIVALENT", {"same": "says the same in other words"})
    rows = [
        dict(stratum=stratum, name=name, verdict=verdict, file="f.py", line=1, before="b", after="a")
        for stratum, name, verdict in (
            ("one", "x", NOTICED),
            ("one", "same", LEFT),
            ("one", "y", LEFT),
            ("other", "z", TIMED_OUT),
        )
    ]
    lines = table.table(rows).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["one", "3", "1", "1", "1", "50.0%"],
        ["other", "1", "1", "0", "0", "100.0%"],
        ["all", "4", "2", "1", "1", "66.7%"],
    ]
    assert lines[4].startswith("equivalent f.py:1: b") and "in other words" in lines[5] and lines[6].startswith("LEFT")
