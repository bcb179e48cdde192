"""Every shipped form of every kernel, compiled for every architecture with no GPU, and its machine code read."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from ditq_kernels.inspect import inspection, machine_code, packed_operands, shipped
from ditq_kernels.kernels import config
from ditq_kernels.layer.formats import WEIGHT_FORMATS

# Configurations that no predicate would let through, each wrong in its own way.
BAD_CONFIGURATIONS = """
import dataclasses, json
from ditq_kernels.inspect import inspection, shipped

def with_blocks(variant, **blocks):
    return dataclasses.replace(variant, constants={**variant.constants, **blocks})

def find(arch, name):
    return next(variant for variant in shipped.variants(arch) if variant.name.startswith(name))

def findings():
    spilling = with_blocks(find(80, "w8_g128 x bf16 in_loop 64x64"), BLOCK_M=256, BLOCK_N=128)
    yield 80, dataclasses.replace(spilling, options=dict(num_warps=4, num_stages=1))
    large = find(90, "dense i8 int8 128x256x128 warps=8 stages=3 K")
    yield 90, dataclasses.replace(large, options=dict(num_warps=8, num_stages=6))
    narrow = find(90, "dense i8 int8 64x64x128 warps=4 stages=4 K")
    yield 90, with_blocks(narrow, BLOCK_M=32)
    slow = find(90, "w4_g128 x i8 in_loop 64x64")
    yield 90, dataclasses.replace(slow, issue_budget=shipped.ISSUE_BUDGETS["w4_g128"])
    yield 90, dataclasses.replace(find(90, "dense i8 int8 128x128x128 warps=8 stages=3 K"), decodes=True)
    yield 90, dataclasses.replace(find(90, "quantize per token"), issue_budget=0.7)
    yield 80, dataclasses.replace(find(80, "w8 expansion to fp32"), options=dict(num_warps=4))
    yield 90, with_blocks(find(90, "quantize per token"), BLOCK_K=1000)
    yield 90, dataclasses.replace(find(90, "dense i8 int8 128x128x128 warps=8 stages=3 K"), in_flight=True)
    yield 90, dataclasses.replace(find(90, "quantize per token"), in_flight=True)

print(json.dumps([inspection.inspect_variants([variant], arch)[0].failures for arch, variant in findings()]))
"""


def compiling_process(*arguments):
    """A process whose kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def found():
    """What `ditq inspect --quick` says: {arch: findings}."""
    result = compiling_process("-m", "ditq_kernels", "inspect", "--json", "--quick")
    assert result.returncode == 0, result.stdout + result.stderr
    findings = json.loads(result.stdout)
    return {arch: [finding for finding in findings if finding["arch"] == arch] for arch in inspection.ARCHITECTURES}


@pytest.mark.parametrize("arch", inspection.ARCHITECTURES)
def test_an_eighth_of_the_shipped_forms_passes(arch, found):
    """`ditq inspect` inspects all, in some minutes more."""
    every = list(shipped.variants(arch))
    variants = {variant.name: variant for variant in (every[place] for place in inspection.places(arch, quick=True))}
    relatives = sum(config.family(one) == config.family(arch) for one in inspection.ARCHITECTURES)
    assert [finding["name"] for finding in found[arch]] == list(variants) and len(variants) >= len(
        every
    ) // inspection.QUICK_EVERY // relatives
    for finding in found[arch]:
        variant = variants[finding["name"]]
        assert finding["failures"] == [], finding
        assert finding["spills"] == 0 and finding["shared"] <= config.SHARED_MEMORY[arch]
        names = " ".join(finding["matrix_instructions"])
        if variant.matrix:
            assert all(
                name.startswith(inspection.MATRIX_INSTRUCTIONS[config.family(arch)][variant.matrix])
                for name in names.split()
            )
        else:
            assert not names


def test_hopper_decodes_into_registers_and_hides_the_decoding(found):
    decoded = [f for f in found[90] if f["name"].startswith("w4") and " in_loop " in f["name"]]
    assert len(decoded) > 10 and {f["left_operand"] for f in decoded} == {"registers"}
    large = [f for f in decoded if "x i8 in_loop 128x128" in f["name"]]
    slots = {name: [f["issue_slots"] for f in large if f["name"].startswith(name)] for name in shipped.ISSUE_BUDGETS}
    assert all(slots.values())
    assert max(slots["w4_g128"]) <= 0.7


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
def test_dense_loops_leave_the_matrix_units_the_limit(arch, found):
    dense = [f for f in found[arch] if f["name"].startswith("dense")]
    assert dense and all(f["issue_slots"] < 1 for f in dense)


def test_every_valid_configuration_is_inspected():
    """What the choice may return, on any architecture, appears among the forms that `ditq inspect` compiles."""
    for arch in inspection.ARCHITECTURES:
        compiled = {variant.name.partition(" K=")[0] for variant in shipped.variants(arch)}
        for fmt, size, rows in itertools.product(WEIGHT_FORMATS.values(), (1, 2, 4), (1, 2, 4, 16, 4096)):
            kind = {**shipped.ACTIVATION_TYPES, 4: shipped.WIDEST_TYPE}[size]
            problem = config.Problem(rows, 3072, 3072, size, fmt, arch, 132)
            for candidate in config.candidates(problem):
                if candidate.route == "cuda":
                    continue  # test_extension_machine_code.py
                if candidate.route == "expanded":
                    assert f"{fmt.name} expansion to {kind}" in compiled
                if candidate.route in ("in_loop", "small"):
                    # Of fp32, and of short groups, the one that takes the most registers.
                    few = candidate.route == "small" and (size == 4 or fmt.group in (32, 64))
                    candidate = config.CONFIGS["small"][-1] if few else candidate
                    assert f"{fmt.name} x {kind} {candidate}" in compiled
                elif candidate.route in config.OVERLAPPED_ROUTES:
                    assert str(dataclasses.replace(candidate, route="overlapped")) in compiled
                elif candidate.block_m:  # int8 operands are multiplied alike, wherever they come from
                    shown = dataclasses.replace(candidate, route="int8") if size == 1 else candidate
                    assert f"dense {kind} {shown}" in compiled


def test_bad_configurations_fail():
    result = compiling_process("-c", BAD_CONFIGURATIONS)
    assert result.returncode == 0, result.stderr
    spills, shared, narrow, slow, stored, loopless, without_product, broken, *waiting = json.loads(result.stdout)
    assert any("spill instructions" in failure for failure in spills)
    assert any("shared memory, more than" in failure for failure in shared)
    assert any("IMMA" in failure and "not ['IGMMA']" in failure for failure in narrow)
    assert any("issue slots per matrix clock" in failure for failure in slow)
    assert stored == ["the decoded weight does not come from registers"]
    assert loopless == ["its main loop was not recognised"]
    assert without_product == ["2 spill instructions"]
    assert len(broken) == 1 and broken[0].startswith("did not compile: ") and "power of 2" in broken[0]
    in_flight = "a matrix product is to stay in flight: "
    assert waiting == [[in_flight + "1 waits in its loop do not"], [in_flight + "no loop was recognised"]]


def test_a_driver_that_disagrees_is_a_failure():
    code = machine_code.MachineCode("a kernel", 90, 64, 0, 10, 20, (), None, None, None)
    variant = next(variant for variant in shipped.variants(90) if variant.name.startswith("quantize"))
    assert inspection.failures(variant, dataclasses.replace(code, driver_registers=64, driver_spills=0)) == []
    found = inspection.failures(variant, dataclasses.replace(code, driver_registers=72, driver_spills=3))
    assert found == ["the driver gives it 72 registers, not 64", "the driver gives it 3 words of thread-local memory"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose driver can be asked")
def test_a_driver_is_asked_only_where_there_is_one(capsys):
    from ditq_kernels import cli

    assert cli.main(["inspect", "--driver"]) == 2
    assert "--driver needs a CUDA GPU" in capsys.readouterr().err


DYING = """
import json, os
from ditq_kernels.inspect import inspection, shipped

def inspect_places(where, arch, driver):
    if 3 in where:
        os._exit(1)
    every = list(shipped.variants(arch))
    return [inspection._not_compiled(every[place], arch, "not tried") for place in where]

inspection._inspect_places = inspect_places
inspection.variants = lambda arch: list(shipped.variants(arch))[:6]
if __name__ == "__main__":
    import multiprocessing
    multiprocessing.get_context = lambda kind, get=multiprocessing.get_context: get("fork")
    print(json.dumps([(finding.code.name, finding.failures) for finding in inspection.inspect([90], 2)]))
"""


def test_a_form_that_ends_its_compiler_is_found_and_the_others_go_on():
    result = compiling_process("-c", DYING)
    assert result.returncode == 0, result.stderr
    names, failures = zip(*json.loads(result.stdout), strict=True)
    assert list(names) == [variant.name for variant in shipped.variants(90)][:6]
    assert [failure for (failure,) in failures] == [
        "did not compile: the compiler's process ended" if index == 3 else "did not compile: not tried"
        for index in range(6)
    ]


def test_a_failure_is_an_exit_code_and_a_line(monkeypatch, capsys):
    from ditq_kernels import cli

    code = machine_code.MachineCode("a kernel", 90, 255, 3, 10, 20, (), None, None, None)
    monkeypatch.setattr(
        inspection, "inspect", lambda architectures, driver, quick: iter([inspection.Finding(code, ("3 spills",))])
    )
    assert cli.main(["inspect", "--arch", "sm_90"]) == 1
    printed = capsys.readouterr().out
    assert "FAILS: 3 spills" in printed and "1 of 1 kernels fail" in printed
    assert cli.main(["inspect", "--arch", "90", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["failures"] == ["3 spills"]


def test_an_unknown_architecture_is_refused(capsys):
    from ditq_kernels import cli

    with pytest.raises(SystemExit):
        cli.main(["inspect", "--arch", "sm_70"])
    assert "sm_80" in capsys.readouterr().err


# What the compiler made of one decoder call: four elements of one output, of two, and a load with a tied operand.
ASSEMBLY = '"and.b32 $0, $1, 15;\\0A    mul.lo.u32 $0, $0, $2;", "=&r,r,r,r,r,r"'
CALLS = f"""
  %7 = tail call <4 x i8> asm {ASSEMBLY}(<4 x i8> %1, i32 %2, i32 %2, i32 %2, i32 %2) #3, !dbg !81
  %8 = tail call <4 x i8> asm {ASSEMBLY}(<4 x i8> %1, i32 %2, i32 %2, i32 %3, i32 %3) #3, !dbg !81
  %9 = tail call i32 asm sideeffect "@$3 ld.shared.b32 $0, [ $1 ];", "=r,r,0,b"(ptr addrspace(3) %4, i32 %5, i1 %6)
"""


def test_assembly_that_reads_one_operand_for_others_is_found():
    assert packed_operands.disagreeing_calls(CALLS) == ["operand $4 is i32 %3, but $2, i32 %2, is read for it"]
    assert packed_operands.disagreeing_calls(CALLS.replace("%3, i32 %3", "%2, i32 %2")) == []
    pair = "{ ptr addrspace(3), i32 } { ptr addrspace(3) %4, i32 0 }"  # one operand
    assert (
        packed_operands.disagreeing_calls(f'tail call void asm sideeffect "@$0 arrive [$1];", "b,r"(i1 %6, {pair})')
        == []
    )


# The gradient with the decoder of int8 products, whose four bytes have to be of one output: on sm_80 they are of four.
MIXING = """
import json
import triton
import triton.language as tl
from ditq_kernels.inspect import inspection, shipped
from ditq_kernels.kernels import decode, gradient

@triton.jit
def as_int8(qweight, n, K, row_bytes, step, low, high, BITS: tl.constexpr, PART: tl.constexpr, EVEN_K: tl.constexpr,
            COMPILED: tl.constexpr, dtype: tl.constexpr):
    low, high = decode.load_halves(qweight, n, K, row_bytes, step, low, high, BITS, PART, EVEN_K, COMPILED)
    return low.to(dtype), high.to(dtype)

gradient.load_halves_as = as_int8
variant = next(variant for variant in shipped.variants(80) if variant.name == "w4_g128 gradient")
print(json.dumps(inspection.inspect_variants([variant], 80)[0].failures))
"""


def test_a_decoder_that_mixes_groups_fails(tmp_path):
    script = tmp_path / "mixing.py"  # the compiler reads sources from files
    script.write_text(MIXING)
    result = compiling_process(str(script))
    assert result.returncode == 0, result.stderr
    (failure,) = json.loads(result.stdout)
    assert failure.endswith("pieces of assembly decode bytes of several groups by one")


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/               @P0 BRA 0x50 ;
        /*0030*/                   STG.E [R4.64], R5 ;
        /*0040*/                   STL [R1], R5 ;
        /*0050*/                   IGMMA.64x128x32.S8.S8 R24, R88, gdesc[UR4], R24 ;
        /*0060*/              @!P1 BRA 0x10 ;
        /*0070*/                   EXIT ;
"""


def test_the_reading_of_a_listing():
    code = machine_code.instructions(LISTING)
    assert len(code) == 8 and code[2].predicated and code[2].branch_target == 0x50
    turn = machine_code.main_loop(code)
    assert [instruction.address for instruction in turn] == [0x10, 0x20, 0x50, 0x60]  # the skipped stretch is left out
    assert code[5].macs == 64 * 128 * 32 and code[5].left_operand == "registers"
    # Four instructions of 8 warps on 4 schedulers; two warpgroups' products at 4096 a clock.
    assert machine_code.issue_slots(turn, 8, 90) == round(4 * 8 / 4 / (2 * 64 * 128 * 32 / 4096), 3)
    assert machine_code.main_loop(code[:5]) is None
