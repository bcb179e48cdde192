"""Builds the CUDA extension below csrc/, where that is possible or asked for; all else about the package stands in
pyproject.toml.

``DITQ_BUILD_CUDA=1`` must build it, ``=0`` never does, and unset it is built where nvcc, a host compiler, PyTorch and
CUTLASS' headers are all found. One file serves every Python from 3.10 and every PyTorch from 2.10: it is written to
their stable interfaces.
"""

import concurrent.futures
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD_VARIABLE = "DITQ_BUILD_CUDA"
JOBS_VARIABLE = "MAX_JOBS"  # as PyTorch's own extension builder calls it
OLDEST_NVCC = (12, 8)  # the first that knows every architecture below
OBJECTS = Path("build", "extension")  # kept from one installation to the next, so that only what changed is compiled
SMALL_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
GETTING_READY = (
    "install torch, setuptools and nvidia-cutlass==4.2.0.0 (with --no-deps), then pip install --no-build-isolation"
)


@dataclass(frozen=True)
class Toolchain:
    """What the extension is built with: paths to nvcc, PyTorch's package and CUTLASS' sources."""

    nvcc: str
    torch: Path
    cutlass: Path


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
    torch, cutlass = directory("torch"), directory("cutlass_library")
    if torch is None or not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        return f"PyTorch's headers are not in the build's environment ({GETTING_READY})"
    if cutlass is None or not (cutlass / "source" / "include" / "cutlass" / "cutlass.h").exists():
        return f"CUTLASS' headers are not in the build's environment ({GETTING_READY})"
    return Toolchain(nvcc, torch, cutlass / "source")


def chosen_toolchain(environment: Mapping[str, str], find: Callable = find_toolchain) -> Toolchain | None:
    """The toolchain if the extension is to be built, else None, with one printed line that says why.

    Raises:
        SystemExit: if it is asked for and cannot be built, or ``DITQ_BUILD_CUDA`` has a value without a meaning.
    """
    asked = environment.get(BUILD_VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"{BUILD_VARIABLE} must be 1, 0 or unset, got {asked!r}")
    if asked == "0":
        print(f"ditq_kernels: the CUDA extension is not built: {BUILD_VARIABLE}=0")
        return None
    found = find(environment)
    if isinstance(found, Toolchain):
        return found
    if asked == "1":
        raise SystemExit(f"ditq_kernels: {BUILD_VARIABLE}=1, but the CUDA extension cannot be built: {found}")
    print(f"ditq_kernels: the CUDA extension is not built: {found}")
    return None


@dataclass(frozen=True)
class Unit:
    """A source below csrc/, which becomes one object file, and the options that it alone is compiled with."""

    source: str
    options: tuple[str, ...]


def _for_architectures(*architectures: str, ptx: str | None = None) -> tuple[str, ...]:
    flags = tuple(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures)
    return flags + ((f"-gencode=arch=compute_{ptx},code=compute_{ptx}",) if ptx else ())


def units(toolchain: Toolchain) -> tuple[Unit, ...]:
    """What is compiled, the longest first."""
    cutlass = (f"-I{toolchain.cutlass / 'include'}", f"-I{toolchain.cutlass / 'tools' / 'util' / 'include'}")
    # Products and sums are rounded one by one, as the other backends do it.
    int8 = (*_for_architectures("90a"), *cutlass, "--expt-relaxed-constexpr", "-fmad=false")
    # Later GPUs than the last of the list compile its intermediate code when they first load it.
    small = _for_architectures(*map(str, SMALL_ARCHITECTURES), ptx=str(SMALL_ARCHITECTURES[-1]))
    stable = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{toolchain.torch / 'include'}")
    return (
        Unit("int8_product_cooperative.cu", int8),
        Unit("int8_product_ping_pong.cu", int8),
        Unit("small_product_mma.cu", small),
        Unit("small_product_fma.cu", small),
        Unit("binding.cpp", stable),
    )


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
            f"{shlex.join(command)}\n{result.stdout}{result.stderr}\nditq_kernels: the CUDA extension could not be "
            f"built; {BUILD_VARIABLE}=0 installs the package without it"
        )
    os.utime(target, (started, started))  # a source that changed meanwhile is newer
    target.with_suffix(".command").write_text(shlex.join(command))
    print(f"ditq_kernels: {target.name} made in {time.time() - started:.0f} s", flush=True)


def compile_unit(toolchain: Toolchain, unit: Unit) -> Path:
    """The unit's object file, compiled if it is not current."""
    target = OBJECTS / Path(unit.source).with_suffix(".o")
    listing = target.with_suffix(".d")
    command = [toolchain.nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden", *unit.options]
    command += ["-MMD", "-MF", str(listing), "-c", f"csrc/{unit.source}", "-o", str(target)]
    if not (listing.exists() and is_current(target, command, read_dependencies(listing))):
        run(target, command)
    return target


def build_library(toolchain: Toolchain, jobs: int) -> Path:
    """The library, with at most ``jobs`` compilers at a time."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda unit: compile_unit(toolchain, unit), units(toolchain)))
    target = OBJECTS / "library.so"
    command = [toolchain.nvcc, "-shared", "-cudart=static", "--no-device-link", *map(str, objects), "-o", str(target)]
    command += [f"-L{toolchain.torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if not is_current(target, command, objects):
        run(target, command)
    return target


class BuildExtension(build_ext):
    """Compiles by nvcc, in parallel."""

    toolchain: Toolchain

    def build_extension(self, ext: Extension) -> None:
        library = build_library(self.toolchain, int(os.environ.get(JOBS_VARIABLE) or os.cpu_count() or 1))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


def arguments(toolchain: Toolchain | None) -> dict:
    """What setuptools is told about the extension; nothing without a toolchain: the package is pure Python then."""
    if toolchain is None:
        return {}
    sources = [f"csrc/{unit.source}" for unit in units(toolchain)]
    return dict(
        ext_modules=[Extension("ditq_kernels._C", sources, py_limited_api=True)],
        cmdclass={"build_ext": type("build_ext", (BuildExtension,), {"toolchain": toolchain})},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    setup(**arguments(chosen_toolchain(os.environ)))
