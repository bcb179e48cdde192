"""Whether assembly that decodes several elements at once may read one operand for all of them.

``inline_asm_elementwise`` hands each operand's elements over in registers of their own, whichever rows they belong to:
that is for the compiler's layouts to decide. Assembly that reads one of four group bytes is right only where the four
are one value, and then they are one value in LLVM's code too.
"""

from __future__ import annotations

import re

_CALL = re.compile(r'\basm (?:[a-z]+ )*"(?P<text>[^"]*)", "(?P<constraints>[^"]*)"\(')
_OPERAND = re.compile(r"\$\{?(\d+)")


def _arguments(code: str, start: int) -> list[str]:
    """A call's arguments, each with its type, whose list begins at ``start``."""
    depth, values, first, at = 1, [], start, start
    while depth:
        depth += (code[at] in "({") - (code[at] in ")}")
        if depth == 0 or (depth == 1 and code[at] == ","):
            values.append(code[first:at].strip())
            first = at + 1
        at += 1
    return [value for value in values if value]


def disagreeing_calls(llir: str) -> list[str]:
    """The calls of inline assembly in LLVM's code (a compiled kernel's ``asm["llir"]``) with an operand that the
    assembly does not read and whose value is not that of the last one before it that it reads; one clause each.
    """
    found = []
    for call in _CALL.finditer(llir):
        constraints = [part for part in call["constraints"].split(",") if not part.startswith("~")]
        outputs = sum(part.startswith("=") for part in constraints)
        named = {int(number) for number in _OPERAND.findall(call["text"])}
        stands_for = None  # of the operands that follow and are not read
        for number, value in enumerate(_arguments(llir, call.end()), outputs):
            if constraints[number].isdigit():
                continue  # tied to an output, and read as that
            if number in named:
                stands_for = number, value
            elif stands_for is not None and value != stands_for[1]:
                found.append(f"operand ${number} is {value}, but ${stands_for[0]}, {stands_for[1]}, is read for it")
                break
    return found
