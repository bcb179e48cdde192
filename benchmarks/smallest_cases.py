"""Every kernel once, on shapes just large enough to have more than one tile, each result compared with the reference.

    python benchmarks/smallest_cases.py            (under compute-sanitizer: see gpu.py)

Runs on a GPU; without one, in Triton's interpreter with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from ditq_kernels import kernels
from ditq_kernels.benchmark.cases import Case
from ditq_kernels.benchmark.checks import Check, check_product
from ditq_kernels.benchmark.contenders import DTYPE, Inputs
from ditq_kernels.benchmark.tune import Task, operands_of, oracle_of, problem_of, product_with
from ditq_kernels.kernels.config import EXTENSION_ROUTES, GRADIENT_TILE, arithmetic, candidates
from ditq_kernels.kernels.dispatch import chosen
from ditq_kernels.layer import reference
from ditq_kernels.layer.error_budget import capability_of, product_oracle, silu_operand
from ditq_kernels.layer.formats import WEIGHT_FORMATS

# No side is a multiple of any tile's but the first K.
FEW_ROWS, MANY_ROWS = (2, 72, 256), (137, 264, 272)
# One format for each way through the decoders.
FORMATS = ("w8", "w8_g128", "w4_g128", "w4_g32")


def _compare(call: Callable[[], torch.Tensor], checked: Callable[[torch.Tensor], Check]) -> None:
    found = checked(call())
    assert found.passed, str(found)


def products(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """One configuration of every route for every format, activation width and shape."""
    for shape in (FEW_ROWS, MANY_ROWS):
        inputs = Inputs(Case(*shape), device)
        for name, activation_bytes in itertools.product(FORMATS, (1, 2)):
            task = Task(inputs.case, WEIGHT_FORMATS[name], activation_bytes)
            operands, oracle = operands_of(task, inputs), oracle_of(task, inputs)
            seen = set()
            for config in candidates(problem_of(task, operands)):
                interpreted = config.route in EXTENSION_ROUTES and device.type != "cuda"  # it has no interpreter
                if (config.route, config.descriptors) in seen or interpreted:
                    continue
                seen.add((config.route, config.descriptors))

                call = functools.partial(product_with(task, config), *operands)
                exact, budget = oracle(config)
                checked = functools.partial(
                    check_product, picked=inputs.picked, exact=exact, budget=budget, allowed=None
                )
                yield f"{task}: {config}", functools.partial(_compare, call, checked)


def products_with_silu(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """SiLU on the input, loaded with it and in a pass before."""
    for shape in (FEW_ROWS, MANY_ROWS):
        inputs = Inputs(Case(*shape), device)
        for fmt in (WEIGHT_FORMATS[name] for name in FORMATS):
            layer = inputs.stored(fmt)
            does = arithmetic(chosen(inputs.x, len(layer.bias), fmt, DTYPE), DTYPE.itemsize)
            entering, x_error = silu_operand(inputs.x)
            w = layer.dequantized_weight()
            exact, budget = product_oracle(entering, w, layer.bias, DTYPE, does, capability_of(device), x_error)
            every_row = torch.arange(len(entering), device=device)
            call = functools.partial(kernels.linear_a16, inputs.x, layer.packed_weight, layer.bias, True)
            checked = functools.partial(check_product, picked=every_row, exact=exact, budget=budget, allowed=None)
            yield f"silu, {fmt.name}, {inputs.case}", functools.partial(_compare, call, checked)


def gradients(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    rows, out_features, _ = MANY_ROWS
    inputs = Inputs(Case(*MANY_ROWS), device)
    grad = torch.randn(rows, out_features, device=device, dtype=inputs.x.dtype)
    every_row = torch.arange(rows, device=device)
    for fmt in (WEIGHT_FORMATS[name] for name in FORMATS):
        layer = inputs.stored(fmt)
        w = layer.dequantized_weight()
        call = functools.partial(kernels.grad_input, grad, layer.packed_weight)
        does = arithmetic(GRADIENT_TILE, grad.element_size())
        exact, budget = product_oracle(grad, w.T, None, grad.dtype, does, capability_of(device))
        checked = functools.partial(check_product, picked=every_row, exact=exact, budget=budget, allowed=None)
        yield f"gradient {fmt.name}", functools.partial(_compare, call, checked)


def passes(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    x = torch.randn(6, 1160, device=device, dtype=torch.bfloat16)
    shift, scale = (torch.randn(2, 1160, device=device, dtype=x.dtype) for _ in range(2))
    amax = torch.tensor([3.0], device=device)
    calls = {
        "quantize": ("quantize_activation", (x, None)),
        "quantize static": ("quantize_activation", (x, amax)),
        "gelu+quantize": ("gelu_quantize", (x, None, "none")),
        "gelu+quantize tanh static": ("gelu_quantize", (x, amax, "tanh")),
        "norm+modulate+quantize": (
            "norm_modulate_quantize",
            (x.view(2, 3, -1), None, None, shift, scale, None, 1e-6),
        ),
        "norm+modulate": ("norm_modulate", (x.view(2, 3, -1), None, None, shift, scale, 1e-6)),
    }
    long = torch.randn(3, 20000, device=device, dtype=x.dtype)  # more than a block of columns: read twice
    calls["quantize in two passes"] = ("quantize_activation", (long, None))
    for name, (function, arguments) in calls.items():

        def run(function=function, arguments=arguments) -> None:
            actual, expected = (getattr(module, function)(*arguments) for module in (kernels, reference))
            pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
            for ours, theirs in pairs:
                # Codes may fall on the other side of a tie, where a value was computed in another order.
                limit = 1.0 if ours.dtype == torch.int8 else 0.02 * float(theirs.float().abs().max())
                assert float((ours.float() - theirs.float()).abs().max()) <= limit

        yield name, run


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = ran = 0
    for source in (passes, gradients, products_with_silu, products):
        for name, run in source(device):
            ran += 1
            try:
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Exception as error:
                failed += 1
                print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
    print(f"{ran} kernels run on {device}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
