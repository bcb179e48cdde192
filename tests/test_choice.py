"""Which configuration a product runs on: the predicate, the heuristic, the tables of measured winners."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ditq_kernels.kernels import config, dispatch, estimates, tables
from ditq_kernels.kernels.config import Config, Problem
from ditq_kernels.kernels.device import standing_in
from ditq_kernels.kernels.operands import Operands
from ditq_kernels.layer import extension
from ditq_kernels.layer.formats import WEIGHT_FORMATS
from ditq_kernels.layer.packed_weight import PackedWeight
from ditq_kernels.layer.packing import LAYOUTS

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "nvidia-h200"
W8, W4 = WEIGHT_FORMATS["w8"], WEIGHT_FORMATS["w4_g128"]
H100 = dict(capability=90, multiprocessors=132)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No tables, and no extension, wherever the tests run."""
    monkeypatch.setenv(tables.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(extension, "why_unavailable", lambda: "it is not built")
    for cache in (tables.choose, tables._winners, dispatch._chosen):
        cache.cache_clear()
    yield
    for cache in (tables.choose, tables._winners, dispatch._chosen):
        cache.cache_clear()


def problem(rows, out_features, in_features, activation_bytes, fmt, **device):
    return Problem(config.row_class(rows), out_features, in_features, activation_bytes, fmt, **(device or H100))


@pytest.fixture
def runs_by(monkeypatch):
    """As users come to it: the configuration that a product runs by, which ends where its kernel would begin."""
    ran = []
    for route in ("in_loop_product", "expanded_product", "small_product", "_int8_product", "_extension_product"):
        monkeypatch.setattr(dispatch, route, lambda operands, config, *_, route=route: ran.append((route, config)))
    routes = dict(int8="_int8_product", cuda="_extension_product", expanded_cuda="expanded_product")

    def of(rows, out_features, in_features, activation_bytes, fmt, device=("gpu", 90, 132)):
        x = torch.empty(1, in_features, dtype=torch.int8 if activation_bytes == 1 else torch.bfloat16)
        columns = LAYOUTS[fmt.layout].columns(in_features)
        weight = PackedWeight(torch.empty(out_features, columns, dtype=torch.uint8), None, None, fmt, in_features)
        with standing_in(dispatch.Device(*device)):
            dispatch.product(Operands(x.expand(rows, in_features), None, weight, None, torch.bfloat16))
        route, chosen = ran.pop()
        assert route == routes.get(chosen.route, f"{chosen.route}_product")
        return chosen

    return of


@pytest.mark.parametrize("capability", [*config.SHARED_MEMORY, 75, 87, 103, 121])
def test_every_problem_has_a_configuration(capability):
    """Which keeps to what its route and the device can do, written down here once more."""
    for fmt, size, rows in itertools.product(WEIGHT_FORMATS.values(), (1, 2, 4), config.ROW_CLASSES):
        for (out_features, in_features), output in itertools.product(((1152, 1152), (40, 130), (18432, 3072)), (2, 4)):
            chosen = estimates.heuristic(Problem(rows, out_features, in_features, size, fmt, capability, 132, output))
            if chosen.route == "small":
                assert rows <= 16 and size > 1
                continue
            if chosen.block_m == 0:  # PyTorch multiplies
                assert chosen.route == "expanded" and size > 1
                continue
            assert chosen.block_m in (16, 32, 64, 128) and chosen.block_n in (16, 32, 64, 128, 256)
            assert chosen.route != "int8" or (size == 1 and fmt.bits == 8 and fmt.group is None)
            if chosen.descriptors:
                assert capability // 10 >= 9 and in_features * size % 16 == 0
            operands = (chosen.block_m + chosen.block_n) * chosen.block_k * size * chosen.num_stages
            assert chosen.route == "in_loop" or operands <= config.shared_memory(capability)


def test_the_choice_depends_on_a_class_of_m_only():
    x = torch.empty(1, 256, dtype=torch.int8)
    classes = [dispatch.problem_of(x.expand(rows, 256), 512, W8).rows for rows in range(1, 20000)]
    assert classes == sorted(classes) and set(classes) == set(config.ROW_CLASSES)
    # Within a class there is one problem, and so one configuration and one kernel.
    assert dispatch.problem_of(x.expand(300, 256), 512, W8) is dispatch.problem_of(x.expand(501, 256), 512, W8)


def test_few_rows_take_the_product_that_is_bound_by_reading_weights(runs_by):
    for rows, fmt in itertools.product((1, 2), WEIGHT_FORMATS.values()):
        assert runs_by(rows, 18432, 3072, 2, fmt).route == "small"
    for rows in (3, 4, 7, 8, 16):
        chosen = runs_by(rows, 6912, 1152, 2, W4)
        assert (chosen.route, chosen.block_m) == ("in_loop", 16)
    assert estimates.heuristic(problem(4, 6912, 1152, 4, W4)).route == "small"  # no matrix instructions are for fp32


def test_many_rows_expand_four_bit_weights_and_some_do_not(runs_by):
    for size, device in itertools.product((1, 2), (("gpu", 90, 132), ("gpu", 80, 108))):
        assert runs_by(8192, 3072, 3072, size, W4, device).route == "expanded"
    assert runs_by(128, 3072, 3072, 1, W4, ("gpu", 80, 108)).route == "in_loop"
    assert runs_by(4096, 3072, 3072, 1, W8).route == "int8"


def timed_on_an_h200(name):
    return json.loads((RESULTS / f"2026-11-27-{name}.json").read_text())


def times_the_best(chosen, timings):
    """How many times as long the choice takes as the fastest that was timed."""
    return timings[chosen] / min(timings.values())


def test_what_is_chosen_on_hopper_is_near_the_fastest_that_was_timed():
    ratios = {}
    for product, timings in timed_on_an_h200("sweep")["products"].items():
        family, shape = product.split(", ")
        (name, size), (rows, out_features, in_features) = family.split(" x "), map(int, shape.split("x"))
        size = int(size.removesuffix("-bit")) // 8
        # Several stretches of the scratch of then are one of today's; and the extension is another test's.
        one_stretch = out_features * in_features * size <= 16 << 20
        timings = {
            text: time
            for text, time in timings.items()
            if not text.startswith("expanded_cuda") and (one_stretch or not text.startswith("expanded"))
        }
        chosen = str(estimates.heuristic(problem(rows, out_features, in_features, size, WEIGHT_FORMATS[name])))
        if one_stretch or not chosen.startswith("expanded"):
            ratios[product] = times_the_best(chosen, timings)
    assert len(ratios) > 50
    assert sum(ratios.values()) / len(ratios) < 1.02 and max(ratios.values()) < 1.2, max(ratios, key=ratios.get)


def test_the_extensions_tile_is_near_the_fastest_that_was_timed():
    ratios = []
    for shape, timings in timed_on_an_h200("int8")["shapes"].items():
        named = {f"{t.rows}x{t.outputs} cluster {t.cluster} {t.schedule}": n for n, t in enumerate(extension.TILES)}
        timings = {named[name]: time for name, time in timings.items() if name in named}
        assert len(timings) == len(extension.TILES)
        ratios.append(times_the_best(extension.choose_tile(*map(int, shape.split("x")), 132), timings))
    assert sum(ratios) / len(ratios) < 1.02 and max(ratios) < 1.1


@pytest.mark.parametrize(("rows", "features"), [(512, (1152, 1152)), (512, (1152, 4608)), (512, (4608, 1152))])
def test_tiles_fill_the_chip(rows, features):
    """Not half of the multiprocessors idle in the last wave of tiles."""
    chosen = estimates.heuristic(problem(rows, *features, 1, W8))
    tiles = -(-rows // chosen.block_m) * -(-features[0] // chosen.block_n)
    waves = -(-tiles // H100["multiprocessors"])
    assert tiles / (waves * H100["multiprocessors"]) > 0.5


def test_descriptors_need_the_copy_engine_and_rows_of_whole_16_bytes():
    with_descriptors = Config("int8", 128, 128, 128, 8, 2, descriptors=True)
    assert config.is_valid(with_descriptors, problem(4096, 3072, 3072, 1, W8))
    assert not config.is_valid(with_descriptors, problem(4096, 3072, 3080, 1, W8))
    assert not config.is_valid(with_descriptors, problem(4096, 3072, 3072, 1, W8, capability=80, multiprocessors=108))


def test_wide_outputs_take_tiles_whose_shared_memory_holds_them(monkeypatch):
    """A persistent program stores one tile while it loads the next: 128 x 256 outputs of four bytes leave no room."""
    narrow = problem(4096, 3072, 12288, 1, W8)
    wide = dataclasses.replace(narrow, output_bytes=4)
    largest = Config("int8", 128, 256, 128, 8, 3, descriptors=True)
    assert estimates.heuristic(narrow) == largest and not config.is_valid(largest, wide)
    assert config.shared_bytes(largest, wide) >= 278_552  # what Triton asks for
    asked = []
    device = dispatch.Device("a GPU", 90, 132)
    with monkeypatch.context() as patched:
        patched.setattr(tables, "choose", lambda given, *_, **__: asked.append(given) or largest)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32):
            dispatch._chosen.__wrapped__(4096, 3072, 12288, 1, W8, device, dtype.itemsize, False)
    assert asked == [narrow, narrow, wide, wide]


@pytest.mark.parametrize(("shape", "adds"), [((4096, 3072, 3072), True), ((4096, 3072, 12288), False)])
def test_a_product_that_is_added_runs_by_what_is_fastest_with_the_pass(shape, adds):
    """The largest persistent tile needs a pass to add: where the sum is long, it is the fastest in spite of it."""
    plain = problem(*shape, 1, W8)
    added = dataclasses.replace(plain, adds=True)
    fastest, chosen = estimates.heuristic(plain), estimates.heuristic(added)
    assert not config.adds_residuals(fastest) and config.adds_residuals(chosen) == adds
    assert adds == (chosen != fastest)
    assert estimates.estimate(chosen, added) <= estimates.estimate(fastest, added)
    elsewhere = dataclasses.replace(added, capability=80, multiprocessors=108)
    assert config.adds_residuals(estimates.heuristic(elsewhere))


def test_the_choice_knows_what_is_added(monkeypatch):
    asked = []
    with monkeypatch.context() as patched, standing_in(dispatch.Device("gpu", 90, 132)):
        patched.setattr(tables, "choose", lambda given, *_: asked.append(given.adds) or Config("in_loop", 16, 64))
        for adds in (False, True):
            dispatch.chosen(torch.empty(8, 128, dtype=torch.int8), 256, W8, torch.bfloat16, adds=adds)
    assert asked == [False, True]


def test_capabilities_go_by_family():
    assert [config.shared_memory(capability) // 1024 for capability in (80, 86, 87, 89, 103, 121)] == [
        163, 99, 99, 99, 227, 99
    ]  # fmt: skip
    for known, related in ((100, 103), (120, 121)):
        for fmt, size, rows in itertools.product(WEIGHT_FORMATS.values(), (1, 2), (16, 4096)):
            of_known, of_related = (
                list(
                    config.candidates(problem(rows, 3072, 3072, size, fmt, capability=capability, multiprocessors=148))
                )
                for capability in (known, related)
            )
            assert of_known == of_related


def test_the_extension_is_chosen_where_it_was_timed(runs_by, monkeypatch):
    """On Hopper; and not where results are wider than it writes."""
    monkeypatch.setattr(extension, "why_unavailable", lambda: None)
    assert runs_by(512, 1152, 1152, 1, W8).route == "int8"  # of a tensor on no GPU
    monkeypatch.setattr(dispatch, "takes_extension", lambda *_: True)
    dispatch._chosen.cache_clear()
    for rows in (17, 512, 4096):
        assert runs_by(rows, 1152, 1152, 1, W8).route == "cuda"
    assert runs_by(4096, 1152, 1152, 1, W4).route == "expanded_cuda"
    assert runs_by(4, 1152, 1152, 2, W4).route == "cuda"
    assert runs_by(4096, 1152, 1152, 2, W4).route == "expanded"
    for capability in (80, 89, 120):
        assert runs_by(4, 1152, 1152, 2, W4, ("gpu", capability, 108)).route == "in_loop"
    assert estimates.heuristic(problem(512, 1152, 1152, 1, W8), extension=False).route == "int8"


class Placed(NamedTuple):
    """What is asked of a tensor."""

    is_cuda: bool
    address: int = 0
    dtype: torch.dtype = torch.int8

    def data_ptr(self):
        return self.address


def test_dtypes_that_the_extension_was_not_timed_with_do_not_take_it():
    for dtype, takes in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False), (torch.int32, False)):
        assert dispatch.takes_extension(Placed(True), dtype) is takes
        assert not dispatch.takes_extension(Placed(False), dtype)


def test_operands_that_begin_anywhere_do_not_take_the_extensions_int8_product():
    for x, weight in ((0, 8), (8, 0), (4, 4)):
        assert not dispatch.takes_extension(Placed(True, x), torch.bfloat16, Placed(True, weight))
        few_rows = Placed(True, x, torch.bfloat16)
        assert dispatch.takes_extension(few_rows, torch.bfloat16, Placed(True, weight))
    assert dispatch.takes_extension(Placed(True, 32), torch.bfloat16, Placed(True, 16))


def test_elsewhere_the_extension_waits_for_a_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "why_unavailable", lambda: None)
    given = problem(4, 1152, 1152, 2, W4, capability=80, multiprocessors=108)
    (from_extension,) = [c for c in config.candidates(given) if c.route == "cuda"]
    assert estimates.heuristic(given).route == "in_loop"
    tables.write(tables.table_path(tmp_path, "gpu"), "gpu", [entry(given, from_extension)], [])
    assert tables.choose(given, "gpu") == from_extension
    tables.choose.cache_clear()
    assert tables.choose(given, "gpu", extension=False) == estimates.heuristic(given)
    tables.choose.cache_clear()
    monkeypatch.setattr(extension, "why_unavailable", lambda: "it is not built")
    assert tables.choose(given, "gpu") == estimates.heuristic(given)


def test_what_the_extension_lacks_is_no_candidate(monkeypatch):
    monkeypatch.setattr(extension, "why_unavailable", lambda: None)

    def routes(*arguments, **device):
        return {c.route for c in config.candidates(problem(*arguments, **device))}

    assert "cuda" in routes(16, 1152, 1152, 2, W4) and "cuda" not in routes(17, 1152, 1152, 2, W4)
    assert "cuda" not in routes(2048, 1152, 1152, 1, W4) and "expanded_cuda" in routes(2048, 1152, 1152, 1, W4)
    assert "expanded_cuda" not in routes(2048, 1152, 1152, 1, W8) | routes(2048, 1152, 1152, 2, W4)
    tiles = [c.instance for c in config.candidates(problem(2048, 1152, 1152, 1, W8)) if c.route == "cuda"]
    assert tiles == list(range(len(extension.TILES)))
    assert "cuda" not in routes(2048, 1152, 1152, 1, W8, capability=80, multiprocessors=108)


def entry(given, chosen):
    return tables.Entry(
        given.fmt.name, given.activation_bytes, given.rows, given.out_features, given.in_features, chosen, 10.0, 12.0
    )


def test_a_measured_winner_goes_before_the_heuristic(tmp_path):
    given, other = problem(2048, 1152, 1152, 1, W8), problem(2048, 4608, 1152, 1, W8)
    winner = next(c for c in config.candidates(given) if c != estimates.heuristic(given))
    path = tables.table_path(tmp_path, "NVIDIA H100 80GB HBM3")
    tables.write(path, "NVIDIA H100 80GB HBM3", [entry(given, winner)], [dict(date="today")])
    assert path.name == "nvidia-h100-80gb-hbm3.json" and list(tmp_path.iterdir()) == [path]
    assert tables.read(path) == ([dict(date="today")], [entry(given, winner)])
    assert tables.choose(given, "NVIDIA H100 80GB HBM3") == winner
    assert tables.choose(other, "NVIDIA H100 80GB HBM3") == estimates.heuristic(other)
    assert tables.choose(given, "NVIDIA A100-SXM4-80GB") == estimates.heuristic(given)


def test_a_winner_that_is_not_valid_here_is_passed_over(tmp_path):
    given = problem(2048, 1152, 1152, 1, W8)
    tables.write(tables.table_path(tmp_path, "gpu"), "gpu", [entry(given, Config("small", 1, 4))], [])
    assert tables.choose(given, "gpu") == estimates.heuristic(given)


@pytest.mark.parametrize("content", ["{", '{"version": 0}', "[]", '{"version": 2, "entries": [{}], "runs": []}'])
def test_a_broken_table_is_named(content, tmp_path):
    tables.table_path(tmp_path, "gpu").write_text(content)
    with pytest.raises(ValueError, match=r"gpu\.json is not a table .* write it anew with ditq tune"):
        tables.choose(problem(2048, 1152, 1152, 1, W8), "gpu")


def test_the_choice_is_printed_once_on_request(capsys, monkeypatch):
    given = problem(2048, 1152, 1152, 1, W8)
    tables.choose(given, "gpu")
    assert not capsys.readouterr().err
    monkeypatch.setenv(tables.PRINT_VARIABLE, "1")
    tables.choose.cache_clear()
    for _ in range(2):
        tables.choose(given, "gpu")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"M <= 2048, N = 1152, K = 1152: {estimates.heuristic(given)} (heuristic)" in printed


def test_tables_are_plain_json(tmp_path):
    given = problem(1, 64, 128, 2, W4)
    path = tmp_path / "table.json"
    tables.write(path, "gpu", [entry(given, estimates.heuristic(given))], [dict(commit="abc")])
    content = json.loads(path.read_text())
    assert content["gpu"] == "gpu" and content["entries"][0]["config"]["route"] == "small"


def test_no_table_is_read_at_import():
    script = "from ditq_kernels.kernels import dispatch, tables\nassert tables._winners.cache_info().currsize == 0"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# Python functions that one call of a known shape enters, with a launch that does nothing: what eager steps are made of,
# and the same on every machine, however busy it is.
PYTHON_COST = """
import sys, torch
import ditq_kernels as ditq
from ditq_kernels import kernels
from ditq_kernels.layer import ops
from types import SimpleNamespace
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Functions of C, as these are, which take what they are given.
driver.set_active(SimpleNamespace(get_current_device=int, get_current_stream=int))
compiled = SimpleNamespace(run="".format, function=0, packed_metadata=())
JITFunction.run = lambda self, *arguments, **options: compiled
ops.backend_of = lambda device: kernels
layer = ditq.QuantLinear.from_linear(torch.nn.Linear(1152, 1152).to(torch.bfloat16), "w8a8")
codes = torch.ops.ditq.quantize_activation(torch.randn(300, 1152).to(torch.bfloat16), None)
parts = layer.qweight, layer.scale, layer.group_code, layer.bias
entered = []
for _ in range(3):
    entered.append(0)
    def count(frame, event, argument):
        entered[-1] += event == "call"
    sys.setprofile(count)
    torch.ops.ditq.linear_a8(*codes, *parts, "w8", torch.bfloat16)
    sys.setprofile(None)
print(entered[-1])
"""
MOST_FUNCTIONS = 40


def test_the_second_call_of_a_shape_costs_little_python():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", PYTHON_COST], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= MOST_FUNCTIONS


@pytest.mark.parametrize("activation_bytes", [1, 2])
def test_products_run_by_the_winner_of_their_class(activation_bytes, tmp_path, runs_by):
    """Any number of rows of a class takes what was measured for the class, of this weight and on this GPU."""
    given = problem(512, 256, 384, activation_bytes, W4)
    winner = next(c for c in config.candidates(given) if c.route == "in_loop" and c != estimates.heuristic(given))
    tables.write(tables.table_path(tmp_path, "gpu"), "gpu", [entry(given, winner)], [])
    assert {runs_by(rows, 256, 384, activation_bytes, W4) for rows in (257, 300, 511, 512)} == {winner}
    for rows in (256, 513):
        expected = estimates.heuristic(problem(rows, 256, 384, activation_bytes, W4))
        assert runs_by(rows, 256, 384, activation_bytes, W4) == expected != winner
    for other in (dict(out_features=512), dict(fmt=WEIGHT_FORMATS["w4_g64"]), dict(device=("another", 90, 132))):
        asked = dict(rows=512, out_features=256, in_features=384, activation_bytes=activation_bytes, fmt=W4) | other
        assert runs_by(**asked) != winner
