"""The int8 product whose matrix instructions overlap: where it may run and what runs instead, its machine code, and
what it computes, executed from its PTX.
"""

import functools
import json
import sys

import pytest
import torch
from changed_kernels import executing, in_a_compiling_process, verdict

from ditq_kernels.inspect import inspection, shipped
from ditq_kernels.inspect.cases import products
from ditq_kernels.kernels import config, dispatch, estimates
from ditq_kernels.kernels.config import CONFIGS, OVERLAPPED_ROUTES, Problem
from ditq_kernels.layer import reference
from ditq_kernels.layer.formats import WEIGHT_FORMATS

W8, W4 = WEIGHT_FORMATS["w8"], WEIGHT_FORMATS["w4_g128"]
# A tile of one consumer, and one of two; the second is the smallest.
TILES = CONFIGS["overlapped"][0], CONFIGS["overlapped"][-1]


def routes(fmt, capability=90, activation_bytes=1, rows=4096, in_features=1152):
    problem = Problem(rows, 1152, in_features, activation_bytes, fmt, capability, 132)
    return {one.route for one in config.candidates(problem)} & set(OVERLAPPED_ROUTES)


def test_it_is_hoppers_and_of_int8_operands():
    assert routes(W8) == {"overlapped"} and routes(W4) == {"expanded_overlapped"}
    assert not routes(W8, activation_bytes=2) and not routes(WEIGHT_FORMATS["w8_g128"])
    assert not any(routes(W8, capability) for capability in (80, 89, 100, 103, 120))
    assert not routes(W8, in_features=1160) and not routes(W4, rows=16)


def test_it_is_chosen_where_it_was_measured_and_nowhere_else():
    """Until a table says so: every problem has a configuration that was timed."""
    for fmt in (W8, W4):
        for rows in config.ROW_CLASSES:
            for sides in ((1152, 1152), (4608, 1152), (3072, 15360)):
                problem = Problem(rows, *sides, 1, fmt, 90, 132)
                assert estimates.heuristic(problem, extension=False).route not in OVERLAPPED_ROUTES
    fewer = [tile for tile in CONFIGS["overlapped"] if tile.block_m * tile.block_n <= 128 * 128]
    problem = Problem(512, 1152, 1152, 1, W8, 90, 132)  # 36 tiles of 128 x 128, 20 of 128 x 256
    assert min(CONFIGS["overlapped"], key=lambda one: estimates.estimate(one, problem)) in fewer


def test_what_computes_where_descriptors_cannot_read():
    for route in OVERLAPPED_ROUTES:
        for tile in CONFIGS[route]:
            instead = config.by_pointers(tile)
            fmt, plain = (W4, "expanded") if route.startswith("expanded") else (W8, "int8")
            assert instead.route == plain and not instead.descriptors
            assert instead.block_m * instead.block_n <= tile.block_m * tile.block_n
            assert config.is_valid(instead, Problem(4096, 3072, 3072, 1, fmt, 90, 132))


def machine_code():
    """[what is wrong, bytes of shared memory, bytes that were expected] of every output of :data:`TILES`."""
    for output, adds in (("", ""), ("", " added"), (" to fp32", ""), (" to i32", "")):
        for tile in TILES:
            variant = next(one for one in shipped.variants(90) if one.name == f"{tile}{output}{adds}")
            (found,) = inspection.inspect_variants([variant], 90)
            problem = Problem(4096, 3072, 3072, 1, W8, 90, 132, 4 if output else 2)
            yield found.failures, found.code.shared, config.shared_bytes(tile, problem)


def executed():
    """[case, verdict, what is said] of both tiles: several turns of each consumer, a residual, unaligned operands."""
    with executing(90) as session:
        for tile in TILES:
            shape = products.ragged_shape(tile, 0)
            for name, compute in (
                ("product", functools.partial(products.product_a8, W8, shape, tile, torch.bfloat16, True)),
                ("added", functools.partial(products.added_a8, W8, shape, tile, torch.bfloat16)),
                ("unaligned", functools.partial(unaligned, tile)),
            ):
                yield name, *verdict(session, compute), [launch.kernel for launch in session.launches]


def unaligned(tile):
    weight, bias = products.stored(W8, 72, 256)
    shifted = torch.randint(-127, 128, (20, 273), dtype=torch.int8)[:, 1:257]
    operands = shifted, torch.ones(20), weight, bias.to(torch.bfloat16), torch.bfloat16
    return products.equal(dispatch.linear_a8(*operands, tile), reference.linear_a8(*operands), "bf16")


def test_its_products_stay_in_flight_and_its_shared_memory_is_what_was_expected():
    """`ditq inspect` holds every tile to it."""
    for failures, shared, expected in in_a_compiling_process(__file__, "machine_code"):
        assert failures == []
        assert expected - 512 <= shared <= expected <= config.shared_memory(90)


def test_what_it_computes_is_exact():
    """`ditq inspect --execute --match overlapped` runs every tile and output."""
    found = in_a_compiling_process(__file__, "executed")
    assert [(name, said) for name, said, *_ in found] == [("product", "ok"), ("added", "ok"), ("unaligned", "ok")] * 2
    launched = {name: kernels for name, _, _, kernels in found}
    assert launched["product"] == launched["added"] == ["overlapped_product_kernel"]
    assert launched["unaligned"] == ["dense_product_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [W8, W4], ids=lambda fmt: fmt.name)
def test_on_a_gpu_it_is_exact(fmt, device):
    """More tiles than multiprocessors, ragged; with a residual, and again in a CUDA graph."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it is Hopper's")
    route = "overlapped" if fmt is W8 else "expanded_overlapped"
    weight, bias = products.stored(fmt, 3080, 1168)
    weight = weight._replace(**{name: getattr(weight, name).to(device) for name in ("qweight", "scale")})
    weight = weight._replace(group_code=None if weight.group_code is None else weight.group_code.to(device))
    qx, sx = reference.quantize_activation(torch.randn(2050, 1168, device=device))
    operands = qx, sx, weight, bias.to(device, torch.bfloat16), torch.bfloat16
    expected = reference.linear_a8(*operands)
    for tile in CONFIGS[route]:
        assert torch.equal(dispatch.linear_a8(*operands, tile), expected), tile
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = dispatch.linear_a8(*operands, tile)
        for _ in range(3):
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, expected), tile


if __name__ == "__main__":
    print(json.dumps(list({"machine_code": machine_code, "executed": executed}[sys.argv[1]]())))
