"""The CUDA extension's kernels for few rows, compiled by nvcc as setup.py compiles them, and their PTX executed on this
CPU by `ditq inspect --execute`'s executor: a choice of its cases, and faults that must be found.
"""

import importlib.util
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from ditq_kernels.inspect import execution
from ditq_kernels.inspect.cases import extension as cases
from ditq_kernels.inspect.executor import cuda, driver, floats
from ditq_kernels.inspect.executor.faults import Unsupported
from ditq_kernels.inspect.executor.parser import PtxError, entries, parse
from ditq_kernels.inspect.executor.program import translate

ROOT = Path(__file__).parent.parent
MATRIX_ARCH, SCALAR_ARCH = 80, 120  # one compilation of each kernel: by nvcc's older and its newer code generator
MATRIX_CASES = (
    "w4_g128 x bf16 (3, 72, 144), fp16 bias",
    "w4_g128 x bf16 (16, 40, 2240), silu, fp32 bias",
    "w8_g32 x fp16 (16, 40, 2240), silu, no bias",
    "w4_g128 x fp16 (4, 40, 656) whole numbers, bf16 bias",
    "w8_g32 x bf16 (4, 40, 656) whole numbers, no bias",
    "w4_g128 x bf16 identity, 16 rows",
    "w8_g32 x fp16 identity, 16 rows",
    "w4_g128 x bf16 broken row",
)
SCALAR_CASES = (
    "w4_g128 x fp32 (16, 40, 2240), silu, bf16 bias",
    "w8_g32 x fp32 (4, 40, 656) whole numbers, fp16 bias",
    "w8_g32 x bf16 anywhere",
)
pytestmark = pytest.mark.skipif(
    cuda.why_unavailable() is not None, reason=f"csrc cannot be compiled: {cuda.why_unavailable()}"
)


def case(name, arch):
    return next(case for case in cases.cases(arch) if case.name == f"extension {name}")


def run(name, arch, monkeypatch, change=None):
    """The outcome of a case, by a driver that is not Triton's active one."""
    session = driver.Session(arch, 0, change=change)
    monkeypatch.setattr(driver, "installed", lambda: session)
    return execution.run_case(case(name, arch), session)


@pytest.mark.parametrize(
    ("name", "arch"),
    [(name, MATRIX_ARCH) for name in MATRIX_CASES] + [(name, SCALAR_ARCH) for name in SCALAR_CASES],
)
def test_products(name, arch, monkeypatch):
    outcome = run(name, arch, monkeypatch)
    assert outcome.verdict == execution.OK, outcome.said
    assert outcome.executed == outcome.launches > 0


def changed(pattern, replacement):
    """A change of PTX that must find something to change."""

    def change(text):
        text, count = re.subn(pattern, replacement, text)
        assert count
        return text

    return change


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        (changed(r"bar\.sync\s+0;", ""), "FAULT", "shared memory race"),
        (changed(r"\b21520(U?);", r"21536\1;"), "MISMATCH", "sums: "),
        (changed(r"min\.s32(\s+%\w+, %\w+), %\w+;", r"mov.b32\1;"), "FAULT", "out of bounds"),
        (changed(r"mul\.f16x2 ", "mul.rz.sat.f16x2 "), "UNSUPPORTED", r"mul\.rz\.sat\.f16x2 "),
    ],
    ids=["no barrier", "another order", "no bound", "unknown"],
)
def test_what_is_wrong_is_found(change, verdict, words, monkeypatch):
    outcome = run("w4_g128 x fp16 (4, 40, 656) whole numbers, bf16 bias", MATRIX_ARCH, monkeypatch, change)
    assert outcome.verdict == verdict and re.search(words, outcome.said), outcome.said


def test_flags_are_those_of_the_build(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("ditq_setup", ROOT / "setup.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "run", lambda target, command: commands.append(command))
    toolchain = build.Toolchain("nvcc", Path("torch"))
    for unit in build.gpu_library(toolchain).units:
        if unit.source.startswith("small_product"):
            build.compile_unit(unit)
    assert len(commands) == 2
    of_the_host = re.compile(r"nvcc|-Xcompiler=.*|-gencode=.*|-MMD|-MF|-c|-o|.*\.(d|cu|o)")
    for command in commands:
        assert tuple(word for word in command if not of_the_host.fullmatch(word)) == cuda.FLAGS


MODULE = """
.version 8.0
.target sm_80
.shared .align 4 .b8 both[16];
.visible .entry first(.param .u64 first_p) { .shared .align 4 .b8 own[64]; ret; }
.entry second(.param .align 8 .b8 second_p[24]) .maxntid 32, 1, 1 { .reg .b32 %r<2>; mov.b32 %r1, both; ret; }
"""


def test_entries_of_a_module_are_taken_apart():
    apart = entries(MODULE)
    assert list(apart) == ["first", "second"]
    first, second = parse(apart["first"]), parse(apart["second"])
    assert (first.static_shared, second.static_shared) == (80, 16)
    assert second.parameters[0].size == 24
    with pytest.raises(PtxError, match="several entries"):
        parse(MODULE)


def test_an_unknown_instruction_is_named():
    text = entries(MODULE)["second"].replace("mov.b32 %r1, both", "vadd4.u32.u32.u32 %r1, %r1, %r1, %r1")
    with pytest.raises(Unsupported, match=r"vadd4\.u32\.u32\.u32 %r1"):
        translate(parse(text))


def test_fused_multiply_add_rounds_once():
    source = np.random.default_rng(0)
    a, b, c = (source.standard_normal(500).astype(np.float32) for _ in range(3))
    c[::2] *= np.float32(2.0**-20)
    down = floats.fused_multiply_add_down(a, b, c)
    for x, y, z, found in zip(a, b, c, down, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert Fraction(float(found)) <= exact < Fraction(float(np.nextafter(found, np.float32(np.inf))))
    a, b, c = (floats.from_bf16(floats.to_bf16(x)) for x in (a, b, c))
    narrow = floats.fused_multiply_add_narrow(a, b, c, "bf16x2")
    for x, y, z, found in zip(a, b, c, narrow, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        step = Fraction(2.0 ** (np.frexp(found)[1] - 8))  # between bf16 numbers of this size
        assert abs(Fraction(float(found)) - exact) <= step / 2


def test_quotients_of_large_divisors_are_zero():
    a = np.array([1, np.inf, 1, 6], np.float32)
    b = np.array([2.0**127, 2.0**127, np.inf, 3], np.float32)
    with np.errstate(invalid="ignore"):
        found = floats.approximate_quotient(a, b)
    np.testing.assert_array_equal(found, np.array([0, np.nan, 0, 2], np.float32))


def test_architectures_have_cases():
    for arch in (*execution.ARCHITECTURES, 103):
        assert bool(list(cases.cases(arch))) == (arch != 103)
    assert torch.float32 in cases.DTYPES and all(shape[0] <= 16 for shape in cases.SHAPES)
    assert {shape[0] for shape in cases.SHAPES} == set(range(1, 17))
