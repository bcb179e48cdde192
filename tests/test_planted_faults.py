"""Faults planted in the PTX of real kernels, each of another kind: the comparison that judges the kernel finds it, or
what executes it does.
"""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable

import pytest
import torch
from changed_kernels import (
    BF16,
    INPUTS,
    executing,
    gradient,
    in_a_compiling_process,
    product,
    smallest,
    text_of,
    verdict,
)

from ditq_kernels.inspect.cases import passes
from ditq_kernels.kernels.config import CONFIGS

I8 = torch.int8
FOUND = ("MISMATCH", "FAULT")
EVERYWHERE, FIRST = 0, 1  # how often re.subn replaces


@dataclasses.dataclass(frozen=True)
class Planted:
    """What replaces a pattern in the PTX of a kernel, or a function of the PTX; ``arch``: None for each."""

    what: str
    kernel: str
    pattern: str | Callable[[str], str]
    instead: str = ""
    times: int = FIRST
    arch: int | None = None

    def change(self, text: str) -> str:
        if callable(self.pattern):
            return self.pattern(text)
        return re.sub(self.pattern, self.instead, text, count=self.times, flags=re.M)


def kernels(arch):
    """By name; sides that no tile divides, but where a change needs even ones."""
    config = smallest("w4_g128", 1, "in_loop", arch)
    yield "in_loop", product("w4_g128", I8, config, (config.block_m, 64, INPUTS), arch)
    config = smallest("w8", 2, "in_loop", arch)
    yield "in_loop 16", product("w8", BF16, config, (config.block_m - 3, 56, 328), arch)
    config = smallest("w8", 1, "int8", arch)
    yield "dense", product("w8", I8, config, (config.block_m - 3, 56, 336), arch)
    yield "dense odd", product("w8", I8, config, (config.block_m - 3, 56, 328), arch)
    yield "gradient", gradient("w8", (61, 40, 200), arch)
    yield "small", product("w8", BF16, CONFIGS["small"][2], (2, 21, 328), arch)
    yield "quantize", functools.partial(passes.quantize, 200, BF16, False)
    if arch == 90:
        config = smallest("w8", 1, "int8", arch, descriptors=True)
        yield "descriptors", product("w8", I8, config, (config.block_m - 3, 56, 336), arch)


def the_other_half(text):
    """The first piece of a decoder takes the group's scale of the other rows."""
    first, second = list(dict.fromkeys(re.findall(r"shr\.u32 m, (%r\d+), 4;", text)))[:2]
    return re.sub(rf"shr\.u32 m, {first}, 4;", f"shr.u32 m, {second}, 4;", text, count=1)


def parameter(text, number):
    """The register that holds a parameter."""
    return re.search(rf"ld\.param\.\w+\s+(%r\w+), \[\w+_param_{number}\];", text).group(1)


def one_more(number):
    """A comparison with a parameter, wherever there is one, lets the first one beyond pass."""

    def change(text):
        register = parameter(text, number)
        return re.sub(rf"setp\.lt\.s32(\s+%p\d+, %r\d+, {register};)", r"setp.le.s32\1", text)

    return change


def longer_by_one(number):
    """A stride is one element more."""

    def change(text):
        loaded = rf"(ld\.param\.\w+\s+(%rd\d+), \[\w+_param_{number}\];)"
        return re.sub(loaded, r"\1 add.s64 \2, \2, 1;", text)

    return change


def a_step_less(text):
    """The innermost loop of matrix instructions ends when one step of 128 is left."""
    no_code = r"\s*(?:\.loc[^\n]*\s*|\$L__tmp\w+:\s*|//[^\n]*\s*)*"
    back = rf"setp\.lt\.s32\s+(%p\d+), (%r\d+), (%r\d+);(?={no_code}@\1 bra\s+(\$\w+);)"
    for found in re.finditer(back, text):
        label = text.find(f"\n{found.group(4)}:")
        if 0 <= label < found.start() and "mma" in text[label : found.start()]:
            predicate, at, bound = found.groups()[:3]
            shorter = f"{{ .reg .b32 less; add.s32 less, {bound}, -128; setp.lt.s32 {predicate}, {at}, less; }}"
            return text[: found.start()] + shorter + text[found.end() :]
    return text


COPY = r"(cp\.async\.c\w\.shared\.global \[[^\]]*\], \[[^\]]*\], )0x(\w+), %r\d+;"
PLANTED = (
    Planted("the other rows' group", "in_loop", the_other_half),
    Planted("the decoder's constant", "in_loop", r"0xFEFEFEFF, 0x80808080;", "0xFEFEFEFF, 0x81808080;"),
    Planted("a lost sign", "in_loop", r"xor\.b32 (%r\d+), codes, 0x80808080;", r"mov.b32 \1, codes;"),
    Planted("the other half of a byte", "in_loop", r"shr\.u32 codes, (%r\d+), 4;", r"mov.b32 codes, \1;"),
    Planted("matrices loaded in another order", "in_loop", r"(ldmatrix\S* )\{(%r\d+), (%r\d+),", r"\1{\3, \2,"),
    Planted(
        "an operand's registers exchanged",
        "in_loop",
        r"((?:wg)?mma\S* \{[^}]*\}, \{ ?)(%r\d+), ?(%r\d+),",
        r"\1\3, \2,",
    ),
    Planted("another swizzle of loads", "in_loop", r"(xor\.b32\s+%r\d+, %r\d+, )32;", r"\g<1>48;"),
    Planted("a scale of its neighbour", "in_loop", r"(ld\.global\.b32 \{ %r\d+ \}, \[ %rd\d+ \+ )0 \]", r"\g<1>4 ]", 4),
    Planted("a row beyond the last", "dense odd", one_more(6), times=EVERYWHERE),
    Planted("an output beyond the last", "dense odd", one_more(7), times=EVERYWHERE),
    Planted("an input beyond the last", "dense odd", one_more(8), times=EVERYWHERE),
    Planted("rows of x that lie further apart", "dense odd", longer_by_one(9)),
    Planted("rows of the weight that lie further apart", "dense odd", longer_by_one(10)),
    Planted("rows of y that lie further apart", "dense odd", longer_by_one(11)),
    Planted("the loop ends early", "dense", a_step_less),
    Planted("copies that do not stop at the edge", "dense", COPY, r"\g<1>0x\2, 0x\2;", EVERYWHERE),
    Planted("an output stored without its guard", "dense", r"@%p\d+ (st\.global)", r"\1", EVERYWHERE),
    Planted("an output stored where it should not be", "dense", r"@(%p\d+ st\.global)", r"@!\1"),
    Planted(
        "sums of another column",
        "dense",
        r"(st\.shared\S+ \[ %r\d+ \+ 0 \], \{ )(%rs\d+), (%rs\d+)",
        r"\1\3, \2",
        arch=80,
    ),
    Planted(
        "sums stored in another order",
        "in_loop",
        r"(stmatrix\S*\s+\[%r\d+\], \{)(%r\d+), (%r\d+)",
        r"\1\3, \2",
        arch=90,
    ),
    Planted(
        "16-bit pairs exchanged",
        "in_loop 16",
        r"(cvt\.rn\.bf16x2\.f32\s+%r\d+, )(%r\d+), (%r\d+);",
        r"\1\3, \2;",
        arch=90,
    ),
    Planted(
        "halves of two words exchanged", "in_loop 16", r"(prmt\.b32 %r\d+, f0, f1, )0x7632;", r"\g<1>0x3276;", arch=80
    ),
    Planted("matrices that are not turned", "gradient", r"(ldmatrix\S*)\.trans", r"\1", arch=80),
    Planted("a part of a sum left out", "small", r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )16,", r"\g<1>8,"),
    Planted("every program takes the first rows", "quantize", r"mov\.u32(\s+%r\d+), %ctaid\.x;", r"mov.b32\1, 0;"),
    Planted("rounding by another number", "quantize", "0f4B400000", "0f4B000000"),
    Planted(
        "a box at another place",
        "descriptors",
        r"(cp\.async\.bulk\S+ \[%r\d+\], \[%rd\d+, \{)(%r\d+), (%r\d+)",
        r"\1\3, \2",
        EVERYWHERE,
        90,
    ),
    Planted(
        "a part of a descriptor's product twice",
        "descriptors",
        r"(add\.s64\s+%rd\d+, %rd\d+, 46\d+)2;",
        r"\g<1>4;",
        arch=90,
    ),
    # The two highest bits: over 128 bytes, and over 64.
    Planted("another swizzle of a descriptor", "descriptors", r"4611686293305294848;", "9223372311732682752;", arch=90),
    Planted(
        "fewer bytes than are copied", "descriptors", r"(expect_tx\S+ _, \[%r\d+\], )16384;", r"\g<1>16128;", arch=90
    ),
    Planted("sums that are not kept", "dense", r"(wgmma\.mma_async[^;]*), (?:%p\d+|1);", r"\1, 0;", EVERYWHERE, 90),
)


def planted(arch):
    """[what, whether the text changed, verdict, what is said]; first each kernel as it is."""
    with executing(arch) as session:
        for name, compute in kernels(arch):
            text = text_of(session, compute)
            yield name, False, *verdict(session, compute, str)
            for fault in PLANTED:
                if fault.kernel == name and fault.arch in (None, arch):
                    yield fault.what, fault.change(text) != text, *verdict(session, compute, fault.change)


@pytest.mark.parametrize("arch", [80, 90])
def test_every_planted_fault_is_found(arch):
    found = {what: rest for what, *rest in in_a_compiling_process(__file__, str(arch))}
    expected = {fault.what for fault in PLANTED if fault.arch in (None, arch)}
    unchanged = set(found) - expected
    assert expected <= set(found)
    assert unchanged >= {fault.kernel for fault in PLANTED if fault.arch in (None, arch)}
    for what, (changed, said, _) in found.items():
        if what in unchanged:
            assert said == "ok" and not changed
        else:
            assert changed and said in FOUND, (what, found[what])


if __name__ == "__main__":
    print(json.dumps(list(planted(int(sys.argv[1])))))
