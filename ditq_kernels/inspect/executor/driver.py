"""A driver for Triton that runs compiled kernels on this CPU: ``kernel[grid](...)`` on CPU tensors specialises,
compiles and launches as for a GPU of any architecture, and what is launched is the PTX.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver as active_driver

from . import tensor_core
from .copies import TensorMap
from .counters import Counters
from .faults import POISON, UNSIGNED, Fault, Unsupported
from .global_memory import GlobalMemory, Region
from .machine import Machine
from .parser import parse
from .program import Program, translate

_TARGET = re.compile(r"^\.(?:target|version).*$", re.M)
MOST_BLOCKS_ASIDE = 65535  # CUDA C++ Programming Guide, table of technical specifications
MULTIPROCESSORS = 3  # few, so that persistent programs loop
PLAIN = {"i1": np.int8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "fp32": np.float32}
PLAIN |= {f"u{bits}": kind for bits, kind in ((8, np.uint8), (16, np.uint16), (32, np.uint32), (64, np.uint64))}


@dataclass
class Launch:
    """One launch, for the record.

    Attributes:
        steps: PTX instructions issued, of all threads together.
        written: arguments that were written, and how many bytes of each were not.
        disagreements: lanes of one warp that lost a store to one shared address to another value.
        text: the PTX.
        unfenced_copies: matrix instructions' reads of what cp.async wrote, with no proxy fence between them.
        repeated: whether its results were taken from a launch of the same instructions on the same data.
        counters: of its memories, where the session counts.
        shared_bytes: of a block.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    seconds: float
    steps: int
    written: dict[str, int]
    disagreements: int
    text: str
    unfenced_copies: int = 0
    repeated: bool = False
    counters: Counters | None = None
    shared_bytes: int = 0


@dataclass
class Session:
    """Settings of a driver, and what was launched since :meth:`clear`.

    Attributes:
        arch: 10 * major + minor.
        shared_limit: bytes of shared memory of one block.
        wobble, truncates, lanes: see :class:`.machine.Machine`.
        change: of the PTX before it is executed; None leaves it.
        copies_need_fence: whether matrix instructions may read what cp.async wrote behind a fence.proxy.async only, as
            they must what st.shared wrote. PTX asks for the fence in either case: cp.async writes by the generic proxy,
            and wgmma reads by the async proxy. CUTLASS 4.2 has none in its own main loop of that kind
            (sm90_mma_multistage_gmma_ss_warpspecialized.hpp: cp.async, an mbarrier, wgmma); if False, neither need the
            kernels, and the reads without it are counted.
        memory: results of launches by their instructions and data, which need not be executed again; None keeps none.
        counts: whether launches are counted (:class:`.counters.Counters`).
        most_blocks: thread blocks of a launch that are executed, spread over its grid; None is all of them, and what
            fewer leave of the results means nothing.
    """

    arch: int
    shared_limit: int
    wobble: int = 0
    truncates: bool = True
    lanes: int = 4096
    change: Callable[[str], str] | None = None
    copies_need_fence: bool = True
    memory: dict | None = None
    counts: bool = False
    most_blocks: int | None = None
    launches: list[Launch] = field(default_factory=list)
    executed: collections.Counter[str] = field(default_factory=collections.Counter)

    def clear(self) -> None:
        self.launches, self.executed = [], collections.Counter()


@functools.lru_cache(maxsize=8)
def program_of(text: str) -> Program:
    """Of PTX."""
    return translate(parse(text))


def installed() -> Session:
    """Of the driver that :func:`install` made the active one."""
    return active_driver.active.session


def run(
    session: Session,
    text: str,
    grid: tuple[int, int, int],
    regions: list[Region],
    values: list,
    shared: int = 0,
    threads: int | None = None,
    cluster: int = 1,
) -> None:
    """Launches the one kernel of the PTX ``text``, or takes the results of an equal launch from the session's memory.

    Args:
        regions: the tensors that it may touch.
        values: of its parameters, each an array of one element, bytes of a structure, or a tensor map. Parameters
            behind the last value are pointers to scratch memory, of which there is none.
        shared: bytes of shared memory of a block, beyond the arrays that the kernel declares.
        threads: of a block, for a kernel that does not say it itself.
        cluster: thread blocks of a cluster, neighbours along x, likewise.
    """
    text = session.change(text) if session.change else text
    program = program_of(text)
    kernel = program.kernel
    values = values + [np.zeros(1, np.uint64)] * (len(kernel.parameters) - len(values))
    for parameter, value in zip(kernel.parameters, values, strict=True):
        if isinstance(value, np.ndarray) and value.nbytes != parameter.size:
            raise TypeError(f"{parameter} is given {value.nbytes} bytes")
    threads = kernel.threads or threads
    if kernel.cluster and cluster not in (1, kernel.cluster):
        raise Fault(f"clusters of {cluster} thread blocks of a kernel for clusters of {kernel.cluster}")
    cluster = kernel.cluster or cluster
    if max(grid[1:]) > MOST_BLOCKS_ASIDE:
        raise Fault(f"a grid of {grid} thread blocks: along y and z there are {MOST_BLOCKS_ASIDE} at most")
    launched = session, text, grid, threads, shared, regions, values, cluster
    key = _key(*launched) if session.memory is not None else None
    if key is not None and key in session.memory:
        launch, results = session.memory[key]
        for region in regions:
            if region.name in results:
                region.restore(results[region.name])
        session.launches.append(dataclasses.replace(launch, repeated=True, seconds=0.0, steps=0))
        return
    machine = Machine(
        program,
        {parameter.name: value for parameter, value in zip(kernel.parameters, values, strict=True)},
        grid,
        threads,
        shared,
        GlobalMemory(regions),
        session.wobble,
        tensor_core.unit_of(session.arch) if session.truncates else None,
        session.lanes,
        session.copies_need_fence,
        counters := Counters() if session.counts else None,
        cluster,
    )
    started = time.perf_counter()
    machine.launch(session.most_blocks)
    seconds = time.perf_counter() - started
    written = {region.name: region.unwritten() for region in regions if region.written is not None}
    launch = Launch(
        kernel.name,
        grid,
        threads,
        seconds,
        machine.steps,
        written,
        machine.disagreements,
        text,
        machine.unfenced_copies,
        counters=counters,
        shared_bytes=machine.shared_bytes,
    )
    session.launches.append(launch)
    session.executed.update(machine.executed)
    if key is not None:
        session.memory[key] = launch, {region.name: region.saved() for region in regions if region.written is not None}


def _key(session, text, grid, threads, shared, regions, values, cluster=1):
    """Of the instructions, whatever architecture they are for, and all that they are given."""
    digest = hashlib.sha256(_TARGET.sub("", text).encode())
    settings = session.wobble, session.truncates, session.copies_need_fence, tensor_core.unit_of(session.arch)
    digest.update(repr((grid, threads, shared, cluster, settings)).encode())
    for region in regions:
        shape = tuple(region.tensor.shape), region.tensor.stride(), region.tensor.element_size()
        digest.update(repr((region.name, shape, region.first % 16)).encode())
        digest.update(region.saved())
    for value in values:
        if isinstance(value, np.ndarray):
            digest.update(_without_addresses(value, regions).tobytes())
        else:
            digest.update(repr((value.region.name, value.matrix.shape, value.box, value.swizzle)).encode())
    return digest.digest()


def _without_addresses(value, regions):
    """``value`` with the number of a region for its address, which differs from run to run."""
    if value.nbytes % 8:
        return value
    words = value.view(np.uint64).copy()
    for number, region in enumerate(regions):
        words[words == np.uint64(region.first)] = POISON + number
    return words


class Launcher:
    """What Triton calls with the grid and the arguments of a compiled kernel."""

    def __init__(self, session: Session, source, metadata) -> None:
        self.session, self.metadata = session, metadata
        self.signature = dict(source.signature)
        self.descriptors = getattr(metadata, "tensordesc_meta", None)

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        metadata = self.metadata
        regions, values = [], []
        described = iter(self.descriptors or [])
        for (name, kind), argument in zip(self.signature.items(), arguments, strict=True):
            if kind != "constexpr":
                values += self._parameter(name, kind, argument, regions, described)
        if metadata.num_ctas != 1:
            raise Unsupported("clusters of thread blocks")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise Unsupported("scratch in global memory")
        run(self.session, function.decode(), (x, y, z), regions, values, metadata.shared)

    def _parameter(self, name, kind, argument, regions, described):
        if isinstance(argument, torch.Tensor):
            regions.append(Region(name, argument))
            return [np.array([regions[-1].first], np.uint64)]
        if kind.startswith("tensordesc"):
            return self._descriptor(name, argument, regions, next(described))
        return [np.array([argument], PLAIN[kind])]

    def _descriptor(self, name, argument, regions, meta):
        """A tensor map, then what the driver passes beside it: shape and strides."""
        base = argument.base
        shape, strides = list(argument.shape), list(argument.strides)
        item = base.element_size()
        if base.data_ptr() % 16 or strides[0] * item % 16 or strides[1] != 1:
            raise ValueError(f"the tensor map of {name} is not aligned to 16 bytes")
        if any(extent > 256 for extent in meta["block_size"]) or meta["elem_size"] != item:
            raise ValueError(f"the tensor map of {name}: {meta}")
        region = Region(name, torch.as_strided(base, shape, strides))
        regions.append(region)
        elements = region.views[item][(region.first - region.start) // item :]
        matrix = np.lib.stride_tricks.as_strided(elements, shape, [strides[0] * item, item], writeable=False)
        tensor = TensorMap(region, matrix.view(UNSIGNED[item]), tuple(meta["block_size"]), meta["swizzle"])
        numbers = [np.array([extent], np.int32) for extent in shape] + [np.array([s], np.int64) for s in strides]
        return [tensor, *numbers]


class _Utilities:
    """The driver's own functions, as far as Triton asks."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def load_binary(self, name, binary, shared, device):
        return None, binary, 32, 0, 1024

    def get_device_properties(self, device):
        return dict(
            max_shared_mem=self.session.shared_limit,
            multiprocessor_count=MULTIPROCESSORS,
            warpSize=32,
            max_num_regs=65536,
        )


class PtxDriver:
    """A GPU of the session's architecture, as Triton's runtime sees it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.utils = _Utilities(session)
        self.launcher_cls = functools.partial(Launcher, session)

    def get_current_target(self):
        return GPUTarget("cuda", self.session.arch, 32)

    def get_current_device(self):
        return self.session.arch  # Triton keeps what it has compiled by device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind):
        return kind


def _keep_ptx(self, text, metadata, options, capability):
    """Instead of assembling it."""
    return text.encode()


def install(session: Session, cache: str) -> None:
    """From now on Triton compiles for ``session.arch`` in this process, and launches here.

    Args:
        cache: a directory for what is compiled, shared with nothing else: its "binaries" are PTX.

    Raises:
        RuntimeError: if kernels were defined for the interpreter.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    CUDABackend.make_cubin = _keep_ptx
    triton.knobs.cache.dir = cache
    active_driver.set_active(PtxDriver(session))
