"""One change of the source."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: below ditq_kernels/.
        line: counted from 1.
        before, after: the lines that differ.
        text: the whole file, changed.
    """

    stratum: str
    file: str
    line: int
    before: str
    after: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}: {self.before} -> {self.after}"


def changed_lines(old: str, new: str) -> tuple[int, str, str]:
    """(the first line that differs, these lines as they were, as they are), each shortened to one line."""
    one, other = old.splitlines(), new.splitlines()
    codes = [
        code for code in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes() if code[0] != "equal"
    ]
    first, last = codes[0], codes[-1]

    def joined(lines: list[str]) -> str:
        return " ".join(line.strip() for line in lines)

    return first[1] + 1, joined(one[first[1] : last[2]]), joined(other[first[3] : last[4]])
