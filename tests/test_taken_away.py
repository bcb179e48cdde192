"""Every barrier, wait, commit and fence of some kernels is taken away, each by itself: its absence is found, or it is
harmless for a reason that is known.
"""

import dataclasses
import functools
import json
import re
import sys

import pytest
import torch
from changed_kernels import (
    INPUTS,
    executing,
    gradient,
    in_a_compiling_process,
    product,
    smallest,
    text_of,
    verdict,
)

# What is taken away, and what is left in its place.
KINDS = {
    "barrier": (r"^\s*bar\.sync\s+\d+(, \d+)?;", ""),
    "barrier of all": (r"^\s*barrier\.sync\s+\d+;", ""),
    "registers": (r"setmaxnreg[^;]*;", ""),
    "copy wait": (r"cp\.async\.wait_group\s+\d+;", ""),
    "copy commit": (r"cp\.async\.commit_group;", ""),
    "proxy fence": (r"fence\.proxy\.async\.shared::cta;", ""),
    "matrix fence": (r"wgmma\.fence\.sync\.aligned;", ""),
    "matrix commit": (r"wgmma\.commit_group\.sync\.aligned;", ""),
    "matrix wait": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", ""),
    "mbarrier init": (r"@%p\d+ mbarrier\.init[^;]*;", ""),
    "mbarrier expect": (r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;", ""),
    "mbarrier wait": (r"mbarrier\.try_wait[^;]*;", "setp.eq.u32 complete, 0, 0;"),
    "mbarrier arrival": (r"@%p\d+ mbarrier\.arrive\.shared[^;]*;", ""),
    "mbarrier end": (r"@%p\d+ mbarrier\.inval[^;]*;", ""),
}

OVERLAPPED = "overlapped"
TOGETHER = "all that are harmless one by one"


def computations(arch):
    """By name."""
    config = smallest("w4_g128", 1, "in_loop", arch)
    yield "in_loop w4_g128 x i8", product("w4_g128", torch.int8, config, (config.block_m, 64, INPUTS), arch)
    config = smallest("w8", 1, "int8", arch)
    yield "dense", product("w8", torch.int8, config, (config.block_m, 64, INPUTS), arch)
    if arch == 90:
        config = smallest("w8", 2, "in_loop", arch)
        yield "in_loop w8 x bf16", product("w8", torch.bfloat16, config, (config.block_m, 64, INPUTS), arch)
        config = smallest("w8", 1, "int8", arch, descriptors=True)
        # Two programs share three tiles.
        yield "dense descriptors", product("w8", torch.int8, config, (config.block_m, 192, INPUTS), arch)
        # Two programs share six tiles: the first consumer has two turns, and every stage is filled several times.
        config = dataclasses.replace(smallest("w8", 1, "overlapped", arch, descriptors=True), num_stages=2)
        yield OVERLAPPED, product("w8", torch.int8, config, (2 * config.block_m, 3 * config.block_n, 256), arch)
        yield "gradient w8", gradient("w8", (64, 256, 128), arch)


def without(places, instead, text):
    """``text`` with something in place of what lies at ``places``."""
    for start, end in sorted(places, reverse=True):
        text = text[:start] + instead + text[end:]
    return text


def takings(arch):
    """[kernel, kind, number or TOGETHER, of how many, verdict, what is said]."""
    with executing(arch) as session:
        for name, compute in computations(arch):
            text = text_of(session, compute)
            for kind, (pattern, instead) in KINDS.items():
                places = [found.span() for found in re.finditer(pattern, text, re.M)]
                harmless = []
                for number, place in enumerate(places):
                    found = verdict(session, compute, functools.partial(without, [place], instead))
                    if found[0] == "ok":
                        harmless.append(place)
                    yield name, kind, number, len(places), *found
                if len(harmless) > 1:
                    found = verdict(session, compute, functools.partial(without, harmless, instead))
                    yield name, kind, TOGETHER, len(harmless), *found


# Reasons.
APART = "it stands between copies to different places, before which nobody has read: no accesses are ordered by it"
APART_OR_READ = APART + "; and before the output is stored where all have been waited for and met since"
ONE_TILE = APART + "; and at the beginning of a tile, of which a program computes one"
EVERY_STEP = (
    ONE_TILE + "; and before a stage is filled again, which all have done with before the barrier of the step, and "
    "before the output is stored to such a stage"
)
EACH_OTHER = "they stand in for each other: one of them has to be between the mbarriers' beginning and the first wait"
ENDS = "nothing uses the memory again"
NEXT_COMMIT = "the next commit closes its copies as well, soon enough for the wait"
NEXT_WAIT = "the next commit and wait hold for its products as well, and nothing touches these between"
FIRST_FENCE = "nothing is touched between the first fence and this one that the second product takes"
ONE_WARPGROUP = (
    "a consumer's warps are together where they wait for their products; and of the barriers before a scratch is used "
    "again, one has to be there"
)
NO_PARTITION = "warps without work only follow the others"
CODE_IS_UNKNOWN = "how many registers the code between needs is the assembler's to say; afterwards nobody needs them"
BEGUN = "an mbarrier is taken to be seen by copies as soon as the warps have met"
IN_LOOP_8, IN_LOOP_16 = "in_loop w4_g128 x i8", "in_loop w8 x bf16"

# [architecture, kernel, kind]: what may be taken away, one by one; whether all of it together is found missing; why.
HARMLESS = {
    (80, IN_LOOP_8, "barrier"): ((0, 1), False, APART),
    (80, IN_LOOP_8, "copy commit"): ((0, 1), False, NEXT_COMMIT),
    (80, "dense", "barrier"): ((2, 3, 4), False, ONE_TILE),
    (80, "dense", "copy commit"): ((0,), False, NEXT_COMMIT),
    (90, IN_LOOP_8, "barrier"): ((0, 1, 4), False, APART_OR_READ),
    (90, IN_LOOP_8, "copy commit"): ((0, 1), False, NEXT_COMMIT),
    (90, IN_LOOP_8, "matrix fence"): ((1,), False, FIRST_FENCE),
    (90, IN_LOOP_8, "matrix commit"): ((0,), False, NEXT_WAIT),
    (90, IN_LOOP_8, "matrix wait"): ((0,), False, NEXT_WAIT),
    (90, IN_LOOP_16, "barrier"): ((0, 1), False, APART),
    (90, IN_LOOP_16, "copy commit"): ((0, 1, 2), False, NEXT_COMMIT),
    (90, IN_LOOP_16, "matrix fence"): ((1,), False, FIRST_FENCE),
    (90, IN_LOOP_16, "matrix commit"): ((0,), False, NEXT_WAIT),
    (90, IN_LOOP_16, "matrix wait"): ((0,), False, NEXT_WAIT),
    (90, "dense", "barrier"): ((0, 2, 3, 4, 6), False, EVERY_STEP),
    (90, "dense", "copy commit"): ((0,), False, NEXT_COMMIT),
    (90, "dense descriptors", "barrier"): ((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12), True, EACH_OTHER),
    (90, "dense descriptors", "mbarrier end"): ((0, 1, 2, 3), False, ENDS),
    (90, OVERLAPPED, "barrier"): ((0, 1, 2, 6, 7, 8, 9, 10, 14, 15), True, ONE_WARPGROUP),
    (90, OVERLAPPED, "barrier of all"): ((11, 12), False, NO_PARTITION),
    (90, OVERLAPPED, "registers"): ((5, 8, 11), False, CODE_IS_UNKNOWN),
    (90, OVERLAPPED, "proxy fence"): ((0,), False, BEGUN),
    (90, "gradient w8", "copy commit"): ((0, 1, 3, 4), False, NEXT_COMMIT),
    (90, "gradient w8", "proxy fence"): ((1,), False, "nothing is stored between the first fence and this one"),
    (90, "gradient w8", "matrix fence"): ((1,), False, FIRST_FENCE),
    (90, "gradient w8", "matrix commit"): ((0,), False, NEXT_WAIT),
    (90, "gradient w8", "matrix wait"): ((0,), False, NEXT_WAIT),
}


@pytest.mark.parametrize("arch", [80, 90])
def test_what_is_taken_away_is_found_or_known_to_be_harmless(arch):
    found = in_a_compiling_process(__file__, str(arch))
    assert {kind for _, kind, *_ in found} == (set(KINDS) if arch == 90 else {"barrier", "copy wait", "copy commit"})
    unnoticed, together = {}, {}
    for name, kind, number, _, said, what in found:
        assert said in ("ok", "FAULT", "MISMATCH"), what
        if number == TOGETHER:
            together[name, kind] = said != "ok"
        elif said == "ok":
            unnoticed.setdefault((name, kind), []).append(number)
    known = {(name, kind): rest for (of, name, kind), rest in HARMLESS.items() if of == arch}
    assert unnoticed == {key: list(numbers) for key, (numbers, _, _) in known.items()}
    assert together == {key: is_found for key, (numbers, is_found, _) in known.items() if len(numbers) > 1}


if __name__ == "__main__":
    print(json.dumps([taking for taking in takings(int(sys.argv[1]))]))
