"""How the opcodes are spelled that are executed as PTX describes them, modifiers and types in their order. What is
spelled otherwise is refused: a modifier that nobody reads would be a wrong result.

PTX ISA 8.8, chapter 9.7.
"""

from __future__ import annotations

import re

_INT = r"[su](16|32|64)"
_WHOLE = r"[su](8|16|32|64)"
_BITS = r"b(16|32|64)"
_ANY = r"([bsu](16|32|64)|f32|f64)"
_SHARED = r"(\.shared(::cta)?)"
# Who may see an access when, and which cache keeps it: here all of global memory is seen by all at once.
_ORDER = r"(\.(weak|volatile|relaxed|acquire|release|cta|cluster|gpu|sys|nc|ca|cg|cs|lu|cv|wb|wt|L1::\w+|L2::\w+))*"
_PLACE = r"(\.(global|local)|\.shared(::(cta|cluster))?)?"
_DATA = rf"{_ORDER}(\.v[248])?\.([bsu](8|16|32|64)|b128|f16|f32|f64)"

SPELLINGS: dict[str, str] = {
    "mov": r"\.([bsu](16|32|64)|b128|f16|f32|f64|pred)",
    "cvta": r"(\.to)?\.(global|shared|local|param)\.u(32|64)",
    "cvt": rf"((\.sat)?\.{_WHOLE}\.{_WHOLE}|\.r[nzmp]i(\.sat)?\.{_WHOLE}\.(f16|f32|f64)|\.rn\.(f16|f32|f64)\.{_WHOLE}"
    r"|\.f32\.b?f16|\.f64\.f32|\.rn\.f32\.f64|\.rn\.b?f16(x2)?\.f32|\.sat\.f32\.f32)",
    "ld": rf"({_ORDER}{_PLACE}|\.param){_DATA}",
    "ldu": rf"\.global{_DATA}",
    "st": rf"{_ORDER}{_PLACE}{_DATA}",
    "neg": r"(\.(s16|s32|s64|f16|f64|b?f16x2|bf16)|(\.ftz)?\.f32)",
    "not": rf"\.({_BITS}|pred)",
    "rem": rf"\.{_INT}",
    "div": rf"(\.{_INT}|\.(full|approx)\.f32|\.rn(\.ftz)?\.f32)",
    "mul": r"(\.(lo|hi|wide)\.[su](16|32)|\.lo\.[su]64|(\.rn)?(\.ftz)?\.f32|(\.rn)?\.(f16|f64|bf16|b?f16x2|f32x2))",
    "mad": r"(\.(lo|wide)\.[su](16|32)|\.lo\.[su]64)",
    "fma": r"(\.rn(\.ftz)?\.f32|\.rm\.f32|\.rn\.(bf16|b?f16x2|f32x2))",
    "bfe": r"\.[su](32|64)",
    "bfi": r"\.b(32|64)",
    "shl": rf"\.{_BITS}",
    "shr": r"\.[bsu](16|32|64)",
    "prmt": r"\.b32",
    "lop3": r"\.b32",
    "setp": rf"\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)(\.(and|or|xor))?\.({_ANY}|f16)",
    "selp": rf"\.({_ANY}|f16)",
    "ex2": r"\.approx(\.ftz)?\.f32",
    "lg2": r"\.approx(\.ftz)?\.f32",
    "rsqrt": r"\.approx(\.ftz)?\.f32",
    "rcp": r"\.(approx|rn)(\.ftz)?\.f32",
    "sqrt": r"\.(approx|rn)(\.ftz)?\.f32",
    "mma": r"\.sync\.aligned\.m16n8k(16|32)\.row\.col((\.satfinite)?\.s32\.s8\.s8\.s32|\.f32\.(b?f16)\.(b?f16)\.f32)",
    "ldmatrix": rf"\.sync\.aligned\.m8n8\.x[124](\.trans)?{_SHARED}\.b16",
    "stmatrix": rf"\.sync\.aligned\.m8n8\.x[124](\.trans)?{_SHARED}\.b16",
    "wgmma": r"\.(fence|commit_group|wait_group|mma_async)\.sync\.aligned(\.m64n\d+k(16|32)"
    r"(\.s32\.s8\.s8|\.f32\.f16\.f16|\.f32\.bf16\.bf16))?",
    "cp": rf"\.async(\.(commit_group|wait_group|wait_all)|\.c[ag]{_SHARED}\.global(\.L2::\w+)?"
    r"|\.bulk\.tensor\.2d\.shared::(cta|cluster)\.global(\.tile)?\.mbarrier::complete_tx::bytes"
    r"(\.multicast::cluster)?(\.L2::cache_hint)?)",
    "mbarrier": rf"\.((init|inval|(try|test)_wait\.parity(\.acquire\.(cta|cluster))?){_SHARED}?"
    r"|arrive(\.expect_tx)?(\.release\.(cta|cluster))?(\.shared(::(cta|cluster))?)?)\.b64",
    "mapa": r"(\.shared::cluster)?\.u(32|64)",
    "createpolicy": r"\.fractional\.L2::evict_(last|normal|first|unchanged)\.b64",
    "brx": r"\.idx",
    "bar": r"(\.cta)?\.(sync|arrive|warp\.sync)",
    "barrier": r"((\.cta)?\.(sync|arrive)|\.cluster\.(arrive(\.release|\.relaxed)?|wait(\.acquire)?))(\.aligned)?",
    "fence": rf"\.(proxy\.async(\.global|{_SHARED})?|mbarrier_init\.release\.cluster"
    r"|(sc|acq_rel|acquire|release)\.(cta|cluster|gpu|sys))",
    "shfl": r"\.sync\.(bfly|idx|up|down)\.b32",
    "redux": r"\.sync\.((min|max|add)\.[su]32|(and|or)\.b32)",
    "elect": r"\.sync",
    "membar": r"\.(cta|gl|sys)",
    "griddepcontrol": r"\.(launch_dependents|wait)",
    "setmaxnreg": r"\.(inc|dec)\.sync\.aligned\.u32",
    "nanosleep": r"\.u32",
    "discard": r"\.global\.L2",
    "prefetch": r"((\.global)?\.L[12]|(\.(param|const))?\.tensormap)",
    "trap": "",
}
# With a narrow and a wide operand; packed; and integers, which wrap.
for _name in ("add", "sub"):
    SPELLINGS[_name] = (
        rf"(\.{_INT}|\.[su]16x2|(\.rn)?(\.ftz)?\.f32|(\.rn)?\.(f16|f64|bf16|b?f16x2|f32x2)|\.rn\.f32\.b?f16)"
    )
for _name in ("min", "max"):
    SPELLINGS[_name] = rf"(\.{_INT}|\.[su]16x2|(\.ftz)?(\.NaN)?\.f32|\.(f16|f64|bf16|b?f16x2))"
for _name in ("and", "or", "xor"):
    SPELLINGS[_name] = SPELLINGS["not"]
SPELLINGS["abs"] = SPELLINGS["neg"]
_COMPILED = {name: re.compile(name + rest) for name, rest in SPELLINGS.items()}


def is_known(opcode: str) -> bool:
    """Whether ``opcode``, modifiers included, is executed as PTX describes it."""
    pattern = _COMPILED.get(opcode.partition(".")[0])
    return pattern is not None and pattern.fullmatch(opcode) is not None
