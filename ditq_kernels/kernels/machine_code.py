"""Compile the kernels for any NVIDIA architecture, with no GPU present, and read the machine code.

    python -m ditq_kernels.kernels.machine_code --arch 90

Needs a process without ``TRITON_INTERPRET``; the disassembler comes with Triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..formats import WEIGHT_FORMATS
from . import activation, gradient, product
from .config import SHARED_MEMORY

ARCHITECTURES = (80, 89, 90, 100, 120)
# One format for each way through the decoders: whole-channel and grouped 8 bits, 4 bits with one group and with two
# groups to a half-block.
FORMATS = ("w8", "w8_g128", "w4_g128", "w4_g32")
EVEN_WIDTH, RAGGED_WIDTH = 1152, 1136
# (M, K): the smallest and largest small-M forms, and the largest tile with and without masks along K.
SIZES = ((1, EVEN_WIDTH), (16, RAGGED_WIDTH), (4096, EVEN_WIDTH), (4096, RAGGED_WIDTH))
# The tensor cores' integer (I), 16-bit (H) and 8-bit float (Q) instructions: mma.sync, wgmma (G) and tcgen05 (UTC).
_MATRIX_INSTRUCTION = re.compile(r"\b((?:UTC)?[HIQ]G?MMA[\w.]*)")
_POINTERS = {torch.int8: "*i8", torch.uint8: "*u8", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_UNALIGNED = ("M", "groups", "stride_k")  # integer arguments that need not be multiples of 16


@dataclass(frozen=True)
class Variant:
    """One kernel in one compiled form: dtypes of its pointers (None for absent ones), constants and launch options."""

    name: str
    kernel: triton.JITFunction
    pointers: dict[str, torch.dtype | None]
    constants: dict[str, int | bool]
    options: dict[str, int | bool]


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of a :class:`Variant` says.

    Attributes:
        registers: per thread.
        spills: instructions that read or write thread-local memory.
        shared: bytes of shared memory per thread block.
        matrix_instructions: mnemonics of the matrix instructions, in order of appearance.
    """

    name: str
    arch: int
    registers: int
    spills: int
    shared: int
    matrix_instructions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the shared memory is within the architecture's limit."""
        return self.shared <= SHARED_MEMORY[self.arch]


def variants(arch: int) -> Iterator[Variant]:
    """The compiled forms that a product on ``arch`` may take."""
    for static in (False, True):
        constants, options = activation.specialise(EVEN_WIDTH, static)
        pointers = dict(
            x=torch.bfloat16, amax=torch.float32 if static else None, codes=torch.int8, scales=torch.float32
        )
        yield Variant(
            f"quantize {'static' if static else 'per token'}",
            activation.quantize_activation_kernel,
            pointers,
            constants,
            options,
        )
    for name in FORMATS:
        fmt = WEIGHT_FORMATS[name]
        code = torch.uint8 if fmt.two_level else None
        weight = dict(qweight=torch.uint8 if fmt.bits == 4 else torch.int8, scale=torch.float32, group_code=code)
        for x_dtype in (torch.int8, torch.bfloat16):
            for rows, width in SIZES:
                kernel, constants, options = product.specialise(x_dtype, torch.bfloat16, fmt, rows, width, True, arch)
                sx = torch.float32 if x_dtype == torch.int8 else None
                pointers = dict(x=x_dtype, sx=sx, **weight, bias=torch.bfloat16, y=torch.bfloat16)
                label = f"{name} x {'int8' if sx else 'bf16'} M={rows} K={width}"
                yield Variant(label, kernel, pointers, constants, options)
        constants, options = gradient.specialise(fmt, EVEN_WIDTH)
        pointers = dict(grad=torch.bfloat16, **weight, grad_x=torch.bfloat16)
        yield Variant(f"{name} gradient", gradient.grad_input_kernel, pointers, constants, options)


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def compile_variant(variant: Variant, arch: int) -> MachineCode:
    """Compile ``variant`` for ``arch`` (10 * major + minor) and read its machine code."""
    signature: dict[str, str] = {}
    constants: dict[str, int | bool | None] = dict(variant.constants)
    aligned = {}
    for index, name in enumerate(variant.kernel.arg_names):
        if name in constants or variant.pointers.get(name, 0) is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = _POINTERS[variant.pointers[name]] if name in variant.pointers else "i32"
            if name == "stride_k":
                signature[name], constants[name] = "constexpr", 1
            elif name not in _UNALIGNED:
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [_tool("cuobjdump"), "-sass", "-res-usage", file.name]
        listing = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return MachineCode(
        name=variant.name,
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", listing).group(1)),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        shared=compiled.metadata.shared,
        matrix_instructions=tuple(dict.fromkeys(_MATRIX_INSTRUCTION.findall(listing))),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--json", action="store_true", help="one JSON object per compiled kernel")
    args = parser.parse_args()
    for arch in args.arch:
        for variant in variants(arch):
            code = compile_variant(variant, arch)
            if args.json:
                print(json.dumps(dataclasses.asdict(code)), flush=True)
            else:
                matrix = " ".join(code.matrix_instructions) or "-"
                print(
                    f"sm_{arch} {code.name:32} {code.registers:4} registers {code.spills:4} spills "
                    f"{code.shared:7} B shared  {matrix}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
