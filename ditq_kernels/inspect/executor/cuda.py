"""The CUDA extension's product for few rows, executed: csrc's sources compiled to PTX by nvcc, and launched as csrc
launches them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ...layer.packed_weight import PackedWeight
from . import driver
from .faults import Fault
from .global_memory import Region
from .parser import entries

SOURCES = Path(__file__).parents[3] / "csrc"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")  # of setup.py, as far as they reach device code
# What nvcc calls an unnamed namespace: it holds a number made of the file's path and of the compilation.
_UNNAMED = re.compile(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}")
_THREADS = re.compile(r"\.maxntid\s+(\d+)")

MATRIX, SCALAR = "mma", "fma"  # csrc/small_product_mma.cu and csrc/small_product_fma.cu
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/float_type.h
_MANGLED = {torch.float32: "f", torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16"}
_ONE_GROUP = 31  # group_shift where an output has one scale, csrc/binding.cpp
# struct SmallProduct, csrc/small_product.h: six pointers, eight int, two int64, a bool.
_SMALL_PRODUCT = struct.Struct("<6Q8i2q?7x")


def why_unavailable() -> str | None:
    """None if csrc can be compiled here, else the reason in one clause."""
    if not (SOURCES / "small_product.h").exists():
        return "csrc/ is not beside the installed package"
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    return None


@functools.cache
def _key_of_everything() -> bytes:
    """Of the compiler and all sources that a kernel may include."""
    digest = hashlib.sha256(subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout)
    for path in sorted(filter(Path.is_file, SOURCES.glob("*"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


@functools.lru_cache(maxsize=32)
def kernels(source: str, arch: int | str) -> Mapping[str, str]:
    """Each kernel of a file below csrc, compiled for ``arch`` (10 * major + minor, or nvcc's name of it): its PTX by
    its mangled name, in which unnamed namespaces have one name everywhere.

    What nvcc writes is kept in the directory for temporary files: processes that work side by side compile it once.

    Raises:
        RuntimeError: with nvcc's words, if it refuses.
    """
    command = ["nvcc", *FLAGS, f"-arch=compute_{arch}", "-ptx", source]
    key = hashlib.sha256(_key_of_everything() + repr(command).encode()).hexdigest()
    kept = Path(tempfile.gettempdir(), f"ditq-ptx-{os.getuid()}")
    kept.mkdir(mode=0o700, exist_ok=True)
    if kept.stat().st_uid != os.getuid():
        raise RuntimeError(f"{kept} belongs to another user")
    target = kept / f"{key}.ptx"
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = target.with_suffix(".made")
            done = subprocess.run([*command, "-o", str(made)], cwd=SOURCES, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc: {done.stderr[-1000:]}")
            made.replace(target)
    return entries(_UNNAMED.sub("12_GLOBAL__N_1", target.read_text()))


def instance(name: str, source: str, arch: int, kind: torch.dtype, *numbers: int) -> str:
    """PTX of the instance ``name<kind, *numbers>`` of a kernel's template."""
    mangled = f"{len(name)}{name}I{_MANGLED[kind]}{''.join(f'Li{n}E' for n in numbers)}E"
    (text,) = [text for entry, text in kernels(source, arch).items() if mangled in entry]
    return text


def kernel_for(x: torch.Tensor, weight: PackedWeight) -> str:
    """The kernel that csrc/binding.cpp launches: ``suits_matrix_instructions`` of csrc/small_product.h. ``x``: [M, K]
    with neighbours in a row side by side.
    """
    in_features = x.shape[1]
    aligned = x.data_ptr() % 16 == 0 and weight.qweight.data_ptr() % 16 == 0
    whole = weight.qweight.shape[1] % 16 == 0 and in_features % 8 == 0 and _stride(x) % 8 == 0
    return MATRIX if x.dtype != torch.float32 and aligned and whole else SCALAR


def _stride(x):
    return x.shape[1] if len(x) == 1 else x.stride(0)


def _matrix_launch(rows, outputs, bits, silu):
    """(numbers of the instance, grid, threads): ``launch_for_rows`` and ``launch`` of csrc/small_product_mma.cu."""
    output_tiles = 1 if rows <= 4 and not silu else 2
    token_tiles = 1 if rows <= 8 else 2
    return (bits, output_tiles, token_tiles), (-(-outputs // (16 * output_tiles)), 1, 1), 256


def _scalar_launch(rows, outputs, bits, silu):
    """The same of ``launch`` in csrc/small_product_fma.cu."""
    return (bits,), (-(-outputs // 16), -(-rows // 4), 1), 128


def small_product(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, silu: bool = False, kernel: str | None = None
) -> torch.Tensor:
    """``ditq_cuda::small_product`` by the driver that is installed: [M, N] in ``x.dtype``.

    Args:
        x: [M, K], M from 1 to 16, bf16, fp16 or fp32; rows may lie apart. bias: [N] of these types, or None.
        kernel: MATRIX or SCALAR; None takes the one that the extension takes.

    Raises:
        Fault: for what a GPU would fault on. Unsupported: for an instruction that is not implemented.
    """
    session = driver.installed()
    qweight, scale, group_code, fmt, in_features = weight
    rows, outputs = len(x), weight.out_features
    kernel = kernel or kernel_for(x, weight)
    y = torch.full((rows, outputs), float("nan"), dtype=x.dtype)
    tensors = dict(x=x, qweight=qweight, scale=scale, group_code=group_code, bias=bias, y=y)
    regions = {key: Region(key, tensor) for key, tensor in tensors.items() if tensor is not None}
    fields = _SMALL_PRODUCT.pack(
        *(regions[key].first if key in regions else 0 for key in tensors),
        FLOAT_TYPES[x.dtype],
        0 if bias is None else FLOAT_TYPES[bias.dtype],
        fmt.bits,
        rows,
        outputs,
        in_features,
        fmt.group_count(in_features),
        fmt.group.bit_length() - 1 if fmt.group else _ONE_GROUP,
        _stride(x),
        qweight.shape[1],
        silu,
    )
    numbers, grid, threads = (_matrix_launch if kernel == MATRIX else _scalar_launch)(rows, outputs, fmt.bits, silu)
    name = f"small_product_{kernel}"
    text = instance(f"{name}_kernel", f"{name}.cu", session.arch, x.dtype, *numbers)
    if int(_THREADS.search(text).group(1)) < threads:
        raise Fault(f"{threads} threads are more than the kernel was compiled for")
    driver.run(session, text, grid, list(regions.values()), [np.frombuffer(fields, np.uint8)], threads=threads)
    return y
