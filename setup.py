"""Builds the two extensions below csrc/, where that is possible or asked for; all else about the package stands in
pyproject.toml.

``DITQ_BUILD_CUDA=1`` must build the one for GPUs, ``=0`` never does, and unset it is built where nvcc, a host compiler
and PyTorch are all found. ``DITQ_BUILD_CPU`` says the same of the one for CPUs, which takes a C++
compiler and PyTorch; unset, it may also fail. One file each serves every Python from 3.10 and every PyTorch from 2.10:
they are written to their stable interfaces.
"""

import concurrent.futures
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD_VARIABLE = "DITQ_BUILD_CUDA"
CPU_VARIABLE = "DITQ_BUILD_CPU"
JOBS_VARIABLE = "MAX_JOBS"  # as PyTorch's own extension builder calls it
OLDEST_NVCC = (12, 8)  # the first that knows every architecture below
OBJECTS = Path("build", "extension")  # kept from one installation to the next, so that only what changed is compiled
SMALL_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
GETTING_READY = "install torch and setuptools, then pip install --no-build-isolation"


@dataclass(frozen=True)
class CpuToolchain:
    """What the extension for CPUs is built with: paths to a C++ compiler and PyTorch's package; the machine's name."""

    compiler: str
    torch: Path
    machine: str


@dataclass(frozen=True)
class Toolchain:
    """What the extension for GPUs is built with: paths to nvcc and PyTorch's package."""

    nvcc: str
    torch: Path


def package_directory(name: str, find_spec: Callable = importlib.util.find_spec) -> Path | None:
    """Where a package is installed, without importing it."""
    spec = find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def nvcc_release(nvcc: str) -> tuple[int, int]:
    """(major, minor) of an nvcc; (0, 0) if it cannot be run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0, 0
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find_toolchain(
    environment: Mapping[str, str],
    which: Callable[[str], str | None] = shutil.which,
    directory: Callable[[str], Path | None] = package_directory,
    release: Callable[[str], tuple[int, int]] = nvcc_release,
) -> Toolchain | str:
    """The toolchain, or in one clause what is missing."""
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, and this is {sys.platform}"
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    nvcc = which(os.path.join(home, "bin", "nvcc")) if home else None
    nvcc = nvcc or which("nvcc")
    if nvcc is None:
        return "nvcc is neither on PATH nor below CUDA_HOME"
    if release(nvcc) < OLDEST_NVCC:
        return f"nvcc {'.'.join(map(str, OLDEST_NVCC))} or later is needed, and {nvcc} is older or cannot be run"
    if which("g++") is None:
        return "nvcc needs the host compiler g++"
    torch = directory("torch")
    if torch is None or not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        return f"PyTorch's headers are not in the build's environment ({GETTING_READY})"
    return Toolchain(nvcc, torch)


def find_cpu_toolchain(
    environment: Mapping[str, str],
    which: Callable[[str], str | None] = shutil.which,
    directory: Callable[[str], Path | None] = package_directory,
) -> CpuToolchain | str:
    """The toolchain, or in one clause what is missing."""
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, and this is {sys.platform}"
    compiler = which(environment.get("CXX") or "g++")
    if compiler is None:
        return "there is no C++ compiler: g++ is not on PATH, and CXX names no other"
    torch = directory("torch")
    if torch is None or not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        return f"PyTorch's headers are not in the build's environment ({GETTING_READY})"
    return CpuToolchain(compiler, torch, platform.machine())


def chosen_toolchain(
    environment: Mapping[str, str], variable: str, find: Callable[[Mapping[str, str]], object]
) -> Toolchain | CpuToolchain | None:
    """The toolchain if the extension is to be built, else None, with one printed line that says why.

    Raises:
        SystemExit: if it is asked for and cannot be built, or ``variable`` has a value without a meaning.
    """
    which = variable.removeprefix("DITQ_BUILD_")
    asked = environment.get(variable, "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"{variable} must be 1, 0 or unset, got {asked!r}")
    if asked == "0":
        print(f"ditq_kernels: the {which} extension is not built: {variable}=0")
        return None
    found = find(environment)
    if not isinstance(found, str):
        return found
    if asked == "1":
        raise SystemExit(f"ditq_kernels: {variable}=1, but the {which} extension cannot be built: {found}")
    print(f"ditq_kernels: the {which} extension is not built: {found}")
    return None


@dataclass(frozen=True)
class Unit:
    """A source below csrc/, which becomes one object file, and the command that it alone is compiled with."""

    source: str
    command: tuple[str, ...]
    variant: str = ""  # of several object files made from one source

    @property
    def object(self) -> Path:
        stem = Path(self.source).with_suffix("")
        return OBJECTS / f"{stem}{'-' if self.variant else ''}{self.variant}.o"


@dataclass(frozen=True)
class Library:
    """An extension: its module, what it is made of, and what links it."""

    module: str
    units: tuple[Unit, ...]
    link: tuple[str, ...]
    libraries: tuple[str, ...]
    optional: bool = False  # where it cannot be compiled, the package is installed without it


def _for_architectures(*architectures: str, ptx: str | None = None) -> tuple[str, ...]:
    flags = tuple(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures)
    return flags + ((f"-gencode=arch=compute_{ptx},code=compute_{ptx}",) if ptx else ())


STABLE = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)  # the oldest PyTorch that can load it


def _libraries(torch: Path) -> tuple[str, ...]:
    return f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"


def gpu_library(toolchain: Toolchain) -> Library:
    """What is compiled for GPUs, the longest first."""
    int8 = _for_architectures("90a")
    # Later GPUs than the last of the list compile its intermediate code when they first load it.
    small = _for_architectures(*map(str, SMALL_ARCHITECTURES), ptx=str(SMALL_ARCHITECTURES[-1]))
    stable = ("-DUSE_CUDA", *STABLE, f"-I{toolchain.torch / 'include'}")
    nvcc = (toolchain.nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden")
    options = {
        "small_product_fma.cu": small,
        "small_product_mma.cu": small,
        "int8_product.cu": int8,
        "binding.cpp": stable,
    }
    return Library(
        "_C",
        tuple(Unit(source, nvcc + own) for source, own in options.items()),
        (toolchain.nvcc, "-shared", "-cudart=static", "--no-device-link"),
        _libraries(toolchain.torch),
    )


@dataclass(frozen=True)
class Level:
    """Instructions that a CPU may have: a namespace, in which each of ``sources`` below csrc/cpu is compiled."""

    name: str
    sources: tuple[str, ...]
    options: tuple[str, ...]


_ROUNDING = ("quantize_weight.cpp", "compensate.cpp")
_PRODUCT = ("quantize_activation.cpp", "passes.cpp", "int8_product.cpp", "few_rows_product.cpp")
_AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512", "-DDITQ_LANES=16")
_VNNI = (*_AVX512, "-mavx512vnni")
# Which is used is decided at run time. From the least to the most: what two of them have in common, the linker takes
# from the first.
X86_LEVELS = (
    Level("baseline", _ROUNDING, ("-DDITQ_LANES=4",)),
    Level("avx2", _ROUNDING + _PRODUCT, ("-march=x86-64-v3", "-DDITQ_LANES=8", '-DDITQ_TILE="tile_avx2.h"')),
    Level("avx512", _ROUNDING, _AVX512),
    Level("avx512_vnni", _PRODUCT, (*_VNNI, '-DDITQ_TILE="tile_avx512_vnni.h"')),
    Level("amx", _PRODUCT, (*_VNNI, "-mamx-tile", "-mamx-int8", '-DDITQ_TILE="tile_amx.h"')),
)


def cpu_library(toolchain: CpuToolchain, optional: bool) -> Library:
    """What is compiled for CPUs."""
    is_x86 = toolchain.machine in ("x86_64", "AMD64")
    compiler = (
        toolchain.compiler,
        "-std=c++17",
        "-O3",
        "-DNDEBUG",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
    )
    compiler += ("-DDITQ_X86",) if is_x86 else ()
    units = [
        Unit("cpu/binding.cpp", (*compiler, *STABLE, f"-I{toolchain.torch / 'include'}")),
        Unit("cpu/levels.cpp", compiler),
    ]
    for level in X86_LEVELS if is_x86 else X86_LEVELS[:1]:
        options = (*compiler, *level.options, f"-DDITQ_LEVEL={level.name}")
        units += [Unit(f"cpu/{source}", options, level.name) for source in level.sources]
    link = (toolchain.compiler, "-shared")
    return Library("_cpu", tuple(units), link, _libraries(toolchain.torch), optional)


def is_current(target: Path, command: list[str], sources: list[Path]) -> bool:
    """Whether ``target`` was made by the same command and after the last change of any of ``sources``."""
    record = target.with_suffix(".command")
    if not target.exists() or not record.exists() or record.read_text() != shlex.join(command):
        return False
    made = target.stat().st_mtime
    return all(source.exists() and source.stat().st_mtime <= made for source in sources)


def read_dependencies(listing: Path) -> list[Path]:
    """The files named in a rule for make, as compilers write it."""
    _, _, names = listing.read_text().replace("\\\n", " ").partition(": ")
    return [Path(name) for name in shlex.split(names)]


def run(target: Path, command: list[str]) -> None:
    """Runs ``command``, which makes ``target``, and remembers it.

    Raises:
        SystemExit: with the compiler's words.
    """
    started = time.time()
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(
            f"{shlex.join(command)}\n{result.stdout}{result.stderr}\nditq_kernels: {target} could not be built; "
            f"{BUILD_VARIABLE}=0 and {CPU_VARIABLE}=0 install the package without extensions"
        )
    os.utime(target, (started, started))  # a source that changed meanwhile is newer
    target.with_suffix(".command").write_text(shlex.join(command))
    print(f"ditq_kernels: {target.name} made in {time.time() - started:.0f} s", flush=True)


def compile_unit(unit: Unit) -> Path:
    """The unit's object file, compiled if it is not current."""
    target = unit.object
    target.parent.mkdir(parents=True, exist_ok=True)
    listing = target.with_suffix(".d")
    command = [*unit.command, "-MMD", "-MF", str(listing), "-c", f"csrc/{unit.source}", "-o", str(target)]
    if not (listing.exists() and is_current(target, command, read_dependencies(listing))):
        run(target, command)
    return target


def build_library(library: Library, jobs: int) -> Path:
    """The library, with at most ``jobs`` compilers at a time."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_unit, library.units))
    target = OBJECTS / f"{library.module}.so"
    command = [*library.link, *map(str, objects), "-o", str(target), *library.libraries]
    if not is_current(target, command, objects):
        run(target, command)
    return target


class BuildExtension(build_ext):
    """Compiles by the libraries' own commands, in parallel."""

    libraries_of: Mapping[str, Library]

    def build_extension(self, ext: Extension) -> None:
        library = self.libraries_of[ext.name]
        try:
            built = build_library(library, int(os.environ.get(JOBS_VARIABLE) or os.cpu_count() or 1))
        except SystemExit as failure:
            if not library.optional:
                raise
            print(f"{failure}\nditq_kernels: installed without {ext.name}", file=sys.stderr)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


def arguments(libraries: Sequence[Library]) -> dict:
    """What setuptools is told about the extensions; nothing if there are none: the package is pure Python then."""
    if not libraries:
        return {}
    by_name = {f"ditq_kernels.{library.module}": library for library in libraries}
    modules = [
        Extension(
            name, [f"csrc/{unit.source}" for unit in library.units], py_limited_api=True, optional=library.optional
        )
        for name, library in by_name.items()
    ]
    return dict(
        ext_modules=modules,
        cmdclass={"build_ext": type("build_ext", (BuildExtension,), {"libraries_of": by_name})},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


def chosen_libraries(environment: Mapping[str, str]) -> list[Library]:
    """The extensions that are to be built."""
    gpu = chosen_toolchain(environment, BUILD_VARIABLE, find_toolchain)
    cpu = chosen_toolchain(environment, CPU_VARIABLE, find_cpu_toolchain)
    found = [] if gpu is None else [gpu_library(gpu)]
    return found if cpu is None else [*found, cpu_library(cpu, is_optional(environment))]


def is_optional(environment: Mapping[str, str]) -> bool:
    """Whether a compiler that fails on the extension for CPUs stops nothing: it was not asked for."""
    return environment.get(CPU_VARIABLE) != "1"


if __name__ == "__main__":
    setup(**arguments(chosen_libraries(os.environ)))
