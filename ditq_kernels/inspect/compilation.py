"""Compile a kernel for any NVIDIA architecture, with no GPU present, and load it where there is one.

Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource


@dataclass(frozen=True)
class Variant:
    """One kernel in one compiled form.

    Attributes:
        types: Triton types of the arguments that are no plain integers, such as "*bf16"; None for absent ones.
        constants, options: compile-time constants and launch options.
        matrix: "int8" or "float" if the kernel has a matrix product of such operands.
        decodes: whether it decodes weights right before the product.
        issue_budget: the most issue slots per matrix clock that its loop may take, where one was set.
        in_flight: whether its loop must keep a matrix product in flight.
    """

    name: str
    kernel: triton.JITFunction
    types: dict[str, str | None]
    constants: dict[str, int | bool | str]
    options: dict[str, int | bool]
    matrix: str | None = None
    decodes: bool = False
    issue_budget: float | None = None
    in_flight: bool = False


def _source(variant: Variant) -> ASTSource:
    """The kernel with typed arguments: pointers and integers are multiples of 16 unless the kernel says otherwise."""
    signature: dict[str, str] = {}
    constants: dict[str, int | bool | str | None] = dict(variant.constants)
    attributes = {}
    for index, parameter in enumerate(variant.kernel.params):
        name = parameter.name
        kind = variant.types.get(name, "i32")
        if name in constants or kind is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif name == "stride_k":
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = kind
            aligned = kind == "i32" or kind.startswith("*")
            if aligned and not parameter.do_not_specialize and name != "groups":
                attributes[(index,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if variant.kernel.is_gluon() else ASTSource
    return kind(variant.kernel, signature, constants, attributes)


def compile_variant(variant: Variant, arch: int) -> CompiledKernel:
    """``variant`` compiled for ``arch`` (10 * major + minor); ``asm`` holds every stage, down to the machine code."""
    return triton.compile(_source(variant), target=GPUTarget("cuda", arch, 32), options=variant.options)


def load(compiled: CompiledKernel) -> tuple[int, int]:
    """(registers, words of thread-local memory) of a kernel that the driver of the current GPU has loaded.

    Raises:
        RuntimeError: if the driver refuses it.
    """
    import torch
    from triton.runtime import driver

    torch.cuda.synchronize()  # there is a context from here on
    _, _, registers, spills, _ = driver.active.utils.load_binary(
        compiled.name, compiled.asm["cubin"], compiled.metadata.shared, torch.cuda.current_device()
    )
    return registers, spills
