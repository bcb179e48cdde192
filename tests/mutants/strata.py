"""The parts of the package that mutants are drawn from, and the tests that should notice them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stratum:
    """Attributes:
    files: below ditq_kernels/.
    tests: names of test files without ``test_``, those that take the least time first.
    """

    name: str
    files: tuple[str, ...]
    tests: tuple[str, ...]


def _below(folder: str, names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}.py" for name in names.split())


STRATA = (
    Stratum(
        "quantizer",
        _below("layer", "quantizer grid compensation formats"),
        ("formats", "packing", "compensation", "quantizer", "cpu_extension", "saturation", "linear"),
    ),
    Stratum(
        "packing",
        _below("layer", "packing packed_weight concatenation shared_input weight_view"),
        ("packing", "formats", "quantizer", "shared_input", "linear", "weight_view", "diffusers_patches"),
    ),
    Stratum(
        "reference",
        _below("layer", "reference operands"),
        ("reference", "linear", "ops"),
    ),
    Stratum(
        "ops",
        _below("layer", "ops contracts backend cpu_extension cpu"),
        ("linear", "cpu_extension", "seen_ops", "ops", "cpu_products"),
    ),
    Stratum(
        "linear",
        _below("layer", "linear replaced_weight") + _below("model", "conversion"),
        ("linear", "diffusers_patches", "conversion", "weight_view", "adapters", "nothing_in_silence"),
    ),
    Stratum(
        "calibration",
        _below("model", "calibration chosen_steps observation steps saturation"),
        ("chosen_steps", "calibration", "sampling", "saturation", "planning"),
    ),
    Stratum(
        "planning",
        _below(
            "model", "planning budget plan_entry plan_table smoothing recipes/rule recipes/general recipes/flux rows"
        ),
        ("planning", "budget", "smoothing", "rows", "folds", "recipes"),
    ),
    Stratum(
        "checkpoint",
        (*_below("checkpoint", "store manifest adapters"), "files.py"),
        ("files", "adapters", "checkpoint", "interruption", "nothing_in_silence", "pipelines"),
    ),
    Stratum(
        "metrics",
        _below("evaluation", "metrics samples report variants layers")
        + _below("analysis", "sensitivity statistics weights"),
        ("evaluation_metrics", "evaluation_samples", "analysis", "evaluation"),
    ),
    Stratum(
        "kernels",
        _below("kernels", "activation config decode dense_product dispatch expansion gradient in_loop_product")
        + _below("kernels", "small_product tables tile_order epilogue silu"),
        ("tune", "choice", "fused_activations", "kernels", "routes", "execution"),
    ),
)
