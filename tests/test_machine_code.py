"""Every kernel compiled for every architecture, with no GPU, and its machine code read."""

import json
import os
import subprocess
import sys

import pytest

from ditq_kernels.kernels import config
from ditq_kernels.kernels.machine_code import ARCHITECTURES, FORMATS, variants

# sm_80 and its successors without asynchronous matrix units; Hopper's warpgroup instructions; datacenter Blackwell's.
INTEGER = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA", 120: "IMMA"}
FLOAT = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}

BAD_CONFIGURATION = """
import dataclasses
from ditq_kernels.kernels import machine_code
variant = next(v for v in machine_code.variants(80) if v.name.startswith("w8_g128 x bf16 M=4096"))
huge = dataclasses.replace(variant, constants={**variant.constants, "BLOCK_M": 256, "BLOCK_N": 128},
                           options=dict(num_warps=4, num_stages=1))
print(machine_code.compile_variant(huge, 80).spills)
"""


def compiling_process(*arguments):
    """A process whose kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills_or_misses_its_matrix_instruction(arch):
    lines = compiling_process("-m", "ditq_kernels.kernels.machine_code", "--json", "--arch", str(arch)).splitlines()
    codes = [json.loads(line) for line in lines]
    assert len(codes) == sum(1 for _ in variants(arch))
    assert {name for name in FORMATS for code in codes if code["name"].startswith(f"{name} ")} == set(FORMATS)
    for code in codes:
        assert code["spills"] == 0, code
        assert code["shared"] <= config.SHARED_MEMORY[arch], code
        wanted = None
        if "int8 M=4096" in code["name"]:
            wanted = INTEGER[arch]
        elif "bf16 M=4096" in code["name"] or "gradient" in code["name"]:
            wanted = FLOAT[arch]
        found = {instruction.split(".")[0] for instruction in code["matrix_instructions"]}
        assert found == ({wanted} if wanted else set()), code


def test_the_reading_sees_spills():
    assert int(compiling_process("-c", BAD_CONFIGURATION)) > 0


@pytest.mark.parametrize("capability", config.SHARED_MEMORY)
def test_every_chosen_tile_is_valid(capability):
    from ditq_kernels.formats import WEIGHT_FORMATS

    for fmt in WEIGHT_FORMATS.values():
        for limit, _ in config.TILES:
            for activation_bytes in (1, 2, 4):
                tile = config.choose_tile(limit, activation_bytes, fmt, capability)
                assert config.is_valid(tile, activation_bytes, fmt, capability)


def test_the_kernel_depends_on_a_class_of_m_only():
    classes = [config.tile_class(rows) for rows in range(1, 2000)]
    assert set(classes) == {limit for limit, _ in config.TILES}
    assert classes == sorted(classes, key=lambda limit: limit or float("inf"))
    assert {config.choose_small(rows).block_m for rows in range(1, config.SMALL_M + 1)} == set(config.SMALL_TILES)
