"""setup.py: when the CUDA extension is built, and what of it. Nothing is compiled here."""

import importlib.util
import re
from pathlib import Path

import pytest
from setuptools import Distribution

from ditq_kernels.layer import cpu_extension, extension

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ditq_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolchain_folder(tmp_path, *missing):
    """Packages' folders with the header that setup.py looks for, but for those of ``missing``."""
    header = tmp_path / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    if "torch" not in missing:
        header.parent.mkdir(parents=True)
        header.touch()
    return lambda package: tmp_path / package if (tmp_path / package).exists() else None


def found(build, directory, environment=None, programs=("nvcc", "g++"), release=(13, 0)):
    """``find_toolchain`` on a machine that has just these programs and packages."""
    have = {name: f"/path/{name}" for name in programs}
    return build.find_toolchain(environment or {}, have.get, directory, lambda nvcc: release)


def test_the_toolchain_is_found(build, tmp_path):
    toolchain = found(build, toolchain_folder(tmp_path))
    assert (toolchain.nvcc, toolchain.torch) == ("/path/nvcc", tmp_path / "torch")
    home = {"CUDA_HOME": "/cuda"}
    programs = ("nvcc", "/cuda/bin/nvcc", "g++")
    assert found(build, toolchain_folder(tmp_path / "home"), home, programs).nvcc == "/path//cuda/bin/nvcc"


@pytest.mark.parametrize(
    ("missing", "arguments", "words"),
    [
        ((), dict(programs=("g++",)), "nvcc is neither on PATH nor below CUDA_HOME"),
        ((), dict(programs=("nvcc",)), "host compiler"),
        ((), dict(release=(12, 4)), "12.8 or later"),
        (("torch",), {}, "PyTorch's headers .* pip install --no-build-isolation"),
    ],
)
def test_what_is_missing_is_named(missing, arguments, words, build, tmp_path):
    reason = found(build, toolchain_folder(tmp_path, *missing), **arguments)
    assert isinstance(reason, str) and re.search(words, reason)


@pytest.mark.parametrize("variable", ["DITQ_BUILD_CUDA", "DITQ_BUILD_CPU"])
def test_when_one_is_built(build, variable, capsys):
    assert variable in (build.BUILD_VARIABLE, build.CPU_VARIABLE)
    toolchain = build.CpuToolchain("g++", Path("torch"), "x86_64")
    assert build.chosen_toolchain({}, variable, lambda _: toolchain) is toolchain
    assert build.chosen_toolchain({variable: "1"}, variable, lambda _: toolchain) is toolchain
    assert not capsys.readouterr().out
    assert build.chosen_toolchain({variable: "0"}, variable, lambda _: toolchain) is None
    assert build.chosen_toolchain({}, variable, lambda _: "no such thing") is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and f"{variable}=0" in said[0] and "no such thing" in said[1]
    with pytest.raises(SystemExit, match="no such thing"):
        build.chosen_toolchain({variable: "1"}, variable, lambda _: "no such thing")
    with pytest.raises(SystemExit, match="must be 1, 0 or unset"):
        build.chosen_toolchain({variable: "yes"}, variable, lambda _: toolchain)


def test_what_setuptools_is_told(build):
    gpu = build.gpu_library(build.Toolchain("nvcc", Path("torch")))
    cpu = build.cpu_library(build.CpuToolchain("g++", Path("torch"), "x86_64"), optional=True)
    assert build.arguments([]) == {}
    modules = build.arguments([gpu, cpu])["ext_modules"]
    assert [(one.name, one.optional) for one in modules] == [("ditq_kernels._C", False), ("ditq_kernels._cpu", True)]
    assert all(one.py_limited_api for one in modules)
    for library in (gpu, cpu):
        assert all((ROOT / "csrc" / unit.source).exists() for unit in library.units)
        assert len({unit.object for unit in library.units}) == len(library.units)


def test_the_toolchain_for_cpus(build, tmp_path):
    directory = toolchain_folder(tmp_path)
    toolchain = build.find_cpu_toolchain({}, {"g++": "/path/g++"}.get, directory)
    assert (toolchain.compiler, toolchain.torch) == ("/path/g++", tmp_path / "torch")
    assert build.find_cpu_toolchain({"CXX": "clang++"}, {"clang++": "/path/c"}.get, directory).compiler == "/path/c"
    assert "no C++ compiler" in build.find_cpu_toolchain({}, {}.get, directory)
    assert "PyTorch's headers" in build.find_cpu_toolchain({}, {"g++": "g++"}.get, lambda _: None)


def test_the_package_knows_the_levels(build):
    for source, known in (
        ("quantize_weight.cpp", cpu_extension.WEIGHT_LEVELS),
        ("int8_product.cpp", cpu_extension.PRODUCT_LEVELS),
    ):
        assert tuple(level.name for level in build.X86_LEVELS if source in level.sources) == known


def test_machines_that_are_no_x86_have_one_level(build):
    every = [level.name for level in build.X86_LEVELS]
    for machine, levels in (("x86_64", every), ("aarch64", ["baseline"])):
        library = build.cpu_library(build.CpuToolchain("g++", Path("torch"), machine), optional=True)
        # In this order, so that no CPU meets instructions for a greater one in what the linker shares.
        assert list(dict.fromkeys(unit.variant for unit in library.units if unit.variant)) == levels
        assert any("-DDITQ_X86" in unit.command for unit in library.units) == (machine == "x86_64")


@pytest.mark.parametrize("asked", [{}, {"DITQ_BUILD_CPU": "1"}])
def test_a_compiler_that_fails_stops_only_who_asked_for_it(build, asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    library = build.cpu_library(build.CpuToolchain("false", tmp_path, "x86_64"), build.is_optional(asked))
    command = build.arguments([library])["cmdclass"]["build_ext"](Distribution())
    extension = build.arguments([library])["ext_modules"][0]
    if asked:
        with pytest.raises(SystemExit, match="could not be built"):
            command.build_extension(extension)
    else:
        command.build_extension(extension)
        assert "installed without ditq_kernels._cpu" in capsys.readouterr().err


def test_only_what_changed_is_compiled(build, tmp_path):
    source, target, listing = (tmp_path / name for name in ("a b.cu", "a.o", "a.d"))
    command = ["nvcc", str(source)]
    source.touch()
    listing.write_text("a.o: " + str(source).replace(" ", "\\ ") + " \\\n  " + str(listing) + "\n")
    sources = build.read_dependencies(listing)
    assert sources == [source, listing]
    assert not build.is_current(target, command, sources)
    build.run(target, ["touch", str(target)])
    assert build.is_current(target, ["touch", str(target)], sources)
    assert not build.is_current(target, command, sources)
    source.unlink()
    assert not build.is_current(target, ["touch", str(target)], sources)
    with pytest.raises(SystemExit, match="DITQ_BUILD_CUDA=0 and DITQ_BUILD_CPU=0 install"):
        build.run(target, ["false"])


def test_what_python_offers_is_what_is_compiled(build):
    assert extension.SMALL_CAPABILITIES == build.SMALL_ARCHITECTURES
