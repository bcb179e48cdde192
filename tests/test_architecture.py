"""ARCHITECTURE.md's arrows, read off the imports: a module imports only from layers to its left, or within its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ditq_kernels"
# Left to right; modules of one layer may import each other.
LAYERS = (
    ("errors", "progress", "formats", "pictures", "error_budget"),
    ("packing",),
    ("quantizer", "reference", "kernels", "extension"),
    ("backend",),
    ("ops",),
    ("linear",),
    (
        *("recipes", "observation", "plan_table", "planning", "budget"),
        *("calibration", "smoothing", "conversion", "manifest", "checkpoint"),
    ),
    ("integrations", "benchmark", "analysis", "evaluation", "environment"),
    ("demo",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Siblings in a layer that must not meet: kernels and the reference judge each other.
SEPARATE = {frozenset(pair) for pair in (("kernels", "reference"), ("kernels", "quantizer"))}
LAZY_ONLY = {
    "triton": {"kernels"},
    "diffusers": {"integrations", "demo"},
    "matplotlib": set(),
    "huggingface_hub": set(),
}


def unit_of(path: Path) -> str:
    """The name in LAYERS that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path):
    """(imported unit or top-level package, whether at module level) of every import in ``path``."""
    tree = ast.parse(path.read_text())
    at_module_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], id(node) in at_module_level
        elif isinstance(node, ast.ImportFrom):
            top = id(node) in at_module_level
            if node.level == 0:
                yield node.module.split(".")[0], top
                continue
            base = path.parent
            for _ in range(node.level - 1):
                base = base.parent
            for alias in node.names:
                target = base / (node.module or "").replace(".", "/")
                found = (
                    target / alias.name
                    if not node.module and ((target / alias.name).is_dir() or (target / f"{alias.name}.py").exists())
                    else target
                )
                if found != PACKAGE:
                    yield found.relative_to(PACKAGE).parts[0], top


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    unit = unit_of(path)
    assert unit in RANK, f"{unit} has no place in LAYERS"
    for target, at_module_level in imports(path):
        if target in RANK:
            assert RANK[target] <= RANK[unit], f"{unit} imports {target}, which stands to its right"
            assert frozenset((unit, target)) not in SEPARATE, f"{unit} and {target} must not know each other"
            if target == "kernels" and unit != "kernels":
                assert not at_module_level, f"{unit} must reach kernels lazily"
        if target in LAZY_ONLY and at_module_level:
            assert unit in LAZY_ONLY[target], f"{unit} imports {target} at module level"


def test_the_test_sees_a_wrong_arrow(tmp_path, monkeypatch):
    package = tmp_path / "ditq_kernels"
    package.mkdir()
    (package / "formats.py").write_text("from .linear import QuantLinear\nimport triton\n")
    (package / "linear.py").write_text("")
    monkeypatch.setitem(globals(), "PACKAGE", package)
    assert list(imports(package / "formats.py")) == [("linear", True), ("triton", True)]
    with pytest.raises(AssertionError, match="stands to its right"):
        test_imports_follow_the_arrows(package / "formats.py")


def test_no_file_is_many_ideas():
    long = [str(path.relative_to(PACKAGE)) for path in FILES if len(path.read_text().splitlines()) > 400]
    assert not long
