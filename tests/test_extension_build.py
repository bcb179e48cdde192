"""setup.py: when the CUDA extension is built, and what of it. Nothing is compiled here."""

import importlib.util
import re
from pathlib import Path

import pytest

from ditq_kernels.layer import extension

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ditq_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolchain_folder(tmp_path, *missing):
    """Packages' folders with the headers that setup.py looks for, but for those of ``missing``."""
    headers = {
        "torch": "include/torch/csrc/stable/library.h",
        "cutlass_library": "source/include/cutlass/cutlass.h",
    }
    for package, header in headers.items():
        if package not in missing:
            (tmp_path / package / header).parent.mkdir(parents=True)
            (tmp_path / package / header).touch()
    return lambda package: tmp_path / package if (tmp_path / package).exists() else None


def found(build, directory, environment=None, programs=("nvcc", "g++"), release=(13, 0)):
    """``find_toolchain`` on a machine that has just these programs and packages."""
    have = {name: f"/path/{name}" for name in programs}
    return build.find_toolchain(environment or {}, have.get, directory, lambda nvcc: release)


def test_the_toolchain_is_found(build, tmp_path):
    toolchain = found(build, toolchain_folder(tmp_path))
    assert (toolchain.nvcc, toolchain.torch) == ("/path/nvcc", tmp_path / "torch")
    assert toolchain.cutlass == tmp_path / "cutlass_library" / "source"
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
        (("cutlass_library",), {}, "CUTLASS' headers .* nvidia-cutlass"),
    ],
)
def test_what_is_missing_is_named(missing, arguments, words, build, tmp_path):
    reason = found(build, toolchain_folder(tmp_path, *missing), **arguments)
    assert isinstance(reason, str) and re.search(words, reason)


def test_when_it_is_built(build, capsys):
    toolchain = build.Toolchain("nvcc", Path("torch"), Path("cutlass"))
    variable = build.BUILD_VARIABLE
    assert build.chosen_toolchain({}, lambda _: toolchain) is toolchain
    assert build.chosen_toolchain({variable: "1"}, lambda _: toolchain) is toolchain
    assert not capsys.readouterr().out
    assert build.chosen_toolchain({variable: "0"}, lambda _: toolchain) is None
    assert build.chosen_toolchain({}, lambda _: "no such thing") is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "DITQ_BUILD_CUDA=0" in said[0] and "no such thing" in said[1]
    with pytest.raises(SystemExit, match="no such thing"):
        build.chosen_toolchain({variable: "1"}, lambda _: "no such thing")
    with pytest.raises(SystemExit, match="must be 1, 0 or unset"):
        build.chosen_toolchain({variable: "yes"}, lambda _: toolchain)
    assert build.arguments(None) == {}
    assert build.arguments(toolchain)["ext_modules"][0].py_limited_api


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
    with pytest.raises(SystemExit, match="DITQ_BUILD_CUDA=0 installs"):
        build.run(target, ["false"])


def test_what_python_offers_is_what_is_compiled(build):
    assert extension.SMALL_CAPABILITIES == build.SMALL_ARCHITECTURES
