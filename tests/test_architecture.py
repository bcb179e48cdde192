"""ARCHITECTURE.md's arrows, read off the imports, file by file: a file imports only from what stands to its left, in
its own folder and across folders, at module level and inside functions.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "ditq_kernels"
# Every folder's files and folders, left to right; those of one group do not import each other. The files of layer/
# stand at the top level ("") each by itself, because kernels/ stands among them.
ORDER: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (
        ("files", "memory", "progress", "published", "revision", "shapes"),
        ("layer/__init__", "layer/errors", "layer/formats", "layer/error_budget"),
        ("layer/packing", "layer/packed_weight", "layer/gated_residual", "layer/grid", "layer/stored_part"),
        ("layer/cpu_extension",),
        ("layer/compensation",),
        ("layer/quantizer", "layer/reference", "layer/extension"),
        (
            "layer/cpu",
            "layer/operands",
            "layer/quantized_input",
            "layer/tape",
            "layer/replaced_weight",
            "layer/weight_view",
        ),
        ("kernels",),
        ("layer/backend",),
        ("layer/contracts",),
        ("layer/ops",),
        ("layer/linear",),
        ("layer/concatenation",),
        ("layer/shared_input",),
        ("model",),
        ("checkpoint",),
        ("__init__", "arguments"),
        ("inspect", "integrations", "environment"),
        ("analysis", "benchmark"),
        ("evaluation",),
        ("demo",),
        ("cli",),
        ("__main__",),
    ),
    "kernels": (
        ("decode", "epilogue", "hopper_costs", "interpreter", "operands", "silu", "tile_order"),
        ("config", "early_start", "launch"),
        ("device", "estimates"),
        ("tables", "overlapped_product"),
        ("activation", "dense_product", "heads", "in_loop_product", "small_product"),
        ("expansion",),
        ("gradient", "dispatch"),
        ("__init__", "cuda"),
    ),
    "model": (
        ("__init__", "wrappers", "rows", "substituted_class"),
        ("recipes", "budget", "plan_entry", "shared_projections"),
        ("fused_blocks",),
        ("hosts", "steps"),
        ("observation",),
        ("chosen_steps",),
        ("calibration", "plan_table"),
        ("planning", "smoothing", "fusion", "cuda_graphs"),
        ("conversion",),
        ("pipelines", "saturation"),
    ),
    "model/fused_blocks": (
        ("block",),
        ("joint_attention", "passes", "rms_norm", "timesteps"),
        ("basic", "flux", "qwen_image", "sd3", "wan"),
        ("__init__",),
    ),
    "model/recipes": (
        ("rule",),
        (
            *("auraflow", "chroma", "cogvideox", "cosmos", "dit", "flux", "flux2", "hunyuan_dit", "hunyuan_video"),
            *("ltx", "lumina2", "mochi", "pixart", "qwen_image", "sana", "sd3", "wan"),
            "general",
        ),
        ("encoder",),
        ("__init__",),
    ),
    "checkpoint": (("__init__", "adapters", "manifest"), ("store",)),
    "inspect": (
        ("__init__", "compilation", "executor", "packed_operands", "workers"),
        ("shipped", "machine_code", "cases", "counted"),
        ("inspection", "execution", "issued"),
        ("bounds",),
        ("counting", "step"),
        ("command",),
    ),
    "inspect/step": (
        ("__init__", "quantized", "absent_gpu", "work"),
        ("tensors",),
        ("launches",),
        ("operations",),
        ("compiled", "eager"),
        ("trace",),
        ("report",),
    ),
    "inspect/executor": (
        ("__init__", "syntax", "spelling", "faults"),
        ("counters",),
        ("parser", "operands", "clocks", "global_memory", "register_pool", "tensor_core"),
        ("floats", "bits", "memory_access", "copies", "threads", "shared_memory", "mbarriers"),
        ("integers", "conversions", "matrices"),
        ("wgmma",),
        ("opcodes",),
        ("program",),
        ("async_state", "cluster_barriers", "thread_barriers"),
        ("machine",),
        ("driver",),
        ("cuda",),
        ("cuda_int8",),
    ),
    "inspect/cases": (
        ("__init__", "case", "inputs"),
        ("products",),
        ("edges", "passes", "extension"),
        ("extension_int8",),
    ),
    "integrations": (
        ("__init__", "config", "peft", "pictures"),
        ("loading", "saving"),
        ("directories",),
        ("quantizer", "transformers"),
        ("patches", "source"),
        ("diffusers",),
        ("sampling",),
        ("samplers",),
        ("options", "quantizing"),
        ("command",),
    ),
    "analysis": (
        ("__init__", "statistics", "weights"),
        ("observe", "sensitivity"),
        ("analyze",),
        ("pictures",),
        ("report",),
        ("command",),
    ),
    "evaluation": (
        ("__init__", "layers", "metrics", "samples", "variants"),
        ("run",),
        ("report",),
        ("command",),
    ),
    "benchmark": (
        ("__init__", "cases", "checks", "libraries", "timing", "turns"),
        ("ceilings", "contenders"),
        ("elementwise", "peers", "pictures", "quantizing"),
        ("run", "provenance", "targets", "cpu_blocks", "steps"),
        ("report", "tune"),
        ("ahead",),
        ("command",),
        ("options",),
    ),
    "demo": (
        ("__init__", "bf16", "fashion_mnist", "classifier"),
        ("train_classifier", "train_dit", "run", "recognition", "experiments"),
        ("report", "train_lora"),
        ("command",),
    ),
    "demo/experiments": (
        ("__init__", "records", "simulated", "distribution"),
        ("lab", "tables"),
        ("calibration", "combinations", "layers", "peers", "plots", "positions", "remedies", "weights"),
        ("moment_steps", "moments", "page", "semistatic"),
        ("__main__",),
    ),
}
# Kernels and what the layer does in PyTorch judge each other in tests, so neither may lean on the other.
SEPARATE = {frozenset(("kernels", "layer/reference")), frozenset(("kernels", "layer/quantizer"))}
# Who may import these when it is itself imported; everybody else does so inside functions, on first use. A folder's
# command.py is what the command line imports: it counts as everybody else.
OURS_AT_MODULE_LEVEL = {"kernels": {"kernels", "inspect"}, "inspect": {"inspect"}}
OTHERS_AT_MODULE_LEVEL = {
    "triton": {"kernels", "inspect"},
    "diffusers": {"integrations", "demo"},
    "transformers": {"integrations"},
    "peft": set(),
    "matplotlib": set(),
    "huggingface_hub": set(),
}


class Import(NamedTuple):
    """What a file imports: ``target``, a module of this package by its parts, or another package's name alone."""

    target: tuple[str, ...]
    ours: bool
    at_module_level: bool
    name: str | None = None


def parts_of(path: Path, package: Path) -> tuple[str, ...]:
    return path.relative_to(package).with_suffix("").parts


def _resolved(path: Path, package: Path) -> tuple[str, ...]:
    """The module at ``path``, which has no suffix yet; a folder is its ``__init__``."""
    return parts_of(path / "__init__" if path.is_dir() else path, package)


def imports(path: Path, package: Path) -> Iterator[Import]:
    """Every import in the file ``path``."""
    tree = ast.parse(path.read_text())
    at_module_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        top = id(node) in at_module_level
        if isinstance(node, ast.Import):
            for alias in node.names:
                root, *below = alias.name.split(".")
                if root == package.name:
                    yield Import(_resolved(package.joinpath(*below), package), True, top)
                else:
                    yield Import((root,), False, top)
        elif isinstance(node, ast.ImportFrom):
            root, *below = (node.module or "").split(".")
            if node.level == 0 and root != package.name:
                yield Import((root,), False, top)
                continue
            base = package if node.level == 0 else path.parents[node.level - 1]
            base = base.joinpath(*below) if node.level == 0 else base.joinpath(*filter(None, (root, *below)))
            for alias in node.names:
                inner = base / alias.name
                module = inner if inner.is_dir() or inner.with_suffix(".py").exists() else base
                yield Import(_resolved(module, package), True, top, alias.name)


def _unit(parts: tuple[str, ...], folder: str) -> str:
    """The name in ``ORDER[folder]`` of a module below that folder."""
    below = parts[len(folder.split("/")) if folder else 0 :]
    names = {name for group in ORDER[folder] for name in group}
    return "/".join(below[:2]) if "/".join(below[:2]) in names or below[0] == "layer" else below[0]


def _place(parts: tuple[str, ...], folder: str) -> int:
    unit = _unit(parts, folder)
    for place, group in enumerate(ORDER[folder]):
        if unit in group:
            return place
    raise AssertionError(f"{unit} has no place in the order of {folder or 'the package'}")


def _folder_of_both(one: tuple[str, ...], other: tuple[str, ...]) -> str:
    """The innermost folder with an order that holds both modules."""
    shared = []
    for a, b in zip(one[:-1], other[:-1], strict=False):
        if a != b or "/".join([*shared, a]) not in ORDER:
            break
        shared.append(a)
    return "/".join(shared)


def check(path: Path, package: Path = PACKAGE) -> None:
    """AssertionError if the file has no place, or imports what it must not."""
    parts = parts_of(path, package)
    for depth in range(len(parts)):
        folder = "/".join(parts[:depth])
        if folder != "layer":
            assert folder in ORDER, f"the folder {folder} has no order"
            _place(parts, folder)
    name, unit = "/".join(parts), _unit(parts, "")
    for found in imports(path, package):
        target = found.target
        if found.ours:
            if found.name == "__version__":
                continue  # the package's root imports most files, and this one value is there before it does
            other = _unit(target, "")
            folder = _folder_of_both(parts, target)
            if _unit(parts, folder) != _unit(target, folder):
                right = _place(target, folder) >= _place(parts, folder)
                assert not right, f"{name} imports {'/'.join(target)}, which does not stand to its left"
            assert frozenset((unit, other)) not in SEPARATE, f"{unit} and {other} must not know each other"
        top, allowed = (other, OURS_AT_MODULE_LEVEL) if found.ours else (target[0], OTHERS_AT_MODULE_LEVEL)
        if found.at_module_level and top in allowed and target[-1] != "command":
            assert unit in allowed[top] and parts[-1] != "command", f"{name} imports {top} at module level"


FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({"/".join(parts_of(path, PACKAGE)[:-1]) for path in FILES})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    check(path)


def test_every_name_of_the_order_is_there():
    for folder, groups in ORDER.items():
        for name in (name for group in groups for name in group):
            path = PACKAGE / folder / name
            assert path.is_dir() or path.with_suffix(".py").exists(), path


def copy_of_names(package: Path) -> Path:
    """The package's files, empty."""
    for path in FILES:
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    return package


def ends(folder: str) -> tuple[str, str]:
    """The first and the last name of a folder."""
    if folder == "layer":
        return "formats", "linear"
    groups = ORDER[folder]
    return next(name for name in groups[0] if name != "__init__" or len(groups[0]) == 1), groups[-1][-1]


WRONG = (
    "from .{name} import anything",
    "from . import {name}",
    "def later():\n    from .{name} import anything",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .{name} import anything",
    "from ditq_kernels.{folder}{name} import anything",
    "import ditq_kernels.{folder}{name}",
)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_arrow_is_seen_in_each_folder(folder, wrong, tmp_path):
    package = copy_of_names(tmp_path / "ditq_kernels")
    first, last = ends(folder)
    path = package / folder / f"{first}.py"
    check(path, package)
    path.write_text(wrong.format(name=last, folder=folder.replace("/", ".") + "." * bool(folder)))
    with pytest.raises(AssertionError, match="does not stand to its left"):
        check(path, package)


@pytest.mark.parametrize(
    "file, text, reason",
    [
        ("layer/formats.py", "from ..model import conversion", "does not stand to its left"),
        ("layer/reference.py", "from .quantizer import fit_grid", "does not stand to its left"),
        ("kernels/decode.py", "from ..layer.ops import grad_input", "does not stand to its left"),
        ("kernels/dispatch.py", "from ..layer import reference", "must not know each other"),
        ("kernels/dispatch.py", "from ..layer.quantizer import fit_grid", "must not know each other"),
        ("model/planning.py", "from .. import save", "does not stand to its left"),
        ("layer/backend.py", "from .. import kernels", "at module level"),
        ("layer/backend.py", "from ..kernels.config import candidates", "at module level"),
        ("cli.py", "from .inspect import inspection", "at module level"),
        ("inspect/command.py", "from . import inspection", "at module level"),
        ("demo/command.py", "import diffusers", "at module level"),
        ("layer/formats.py", "import triton", "at module level"),
        ("model/stray.py", "", "stray has no place in the order of model"),
        ("layer/stray.py", "", "layer/stray has no place in the order of the package"),
        ("stray.py", "", "stray has no place in the order of the package"),
        ("demo/stray/file.py", "", "stray has no place in the order of demo"),
    ],
)
def test_what_else_is_seen(file, text, reason, tmp_path):
    package = copy_of_names(tmp_path / "ditq_kernels")
    path = package / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(AssertionError, match=reason):
        check(path, package)


def test_no_file_is_many_ideas():
    long = [str(path.relative_to(PACKAGE)) for path in FILES if len(path.read_text().splitlines()) > 400]
    assert not long
