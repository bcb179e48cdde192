"""Plans follow the recipes, say why, and can be edited, printed and stored."""

import re

import pytest
import torch
from small_models import tiny_dit, tiny_model
from torch import nn

from ditq_kernels.layer.formats import SCHEMES, Scheme
from ditq_kernels.layer.linear import QuantLinear
from ditq_kernels.model.conversion import quantize, quantized_layers
from ditq_kernels.model.plan_table import _span
from ditq_kernels.model.planning import Plan, plan
from ditq_kernels.model.recipes import RECIPES, recipe_for
from ditq_kernels.model.recipes.general import repeated_blocks

BLOCK_OF_DIT = {
    "norm1.emb.timestep_embedder.linear_1": None,
    "norm1.emb.timestep_embedder.linear_2": None,
    "norm1.linear": "w4a16_g32",
    "attn1.to_q": "w4a8_g32",
    "attn1.to_k": "w4a8_g32",
    "attn1.to_v": "w4a8_g32",
    "attn1.to_out.0": "w4a8_g32",
    "ff.net.0.proj": "w4a8_g32",
    "ff.net.2": "w4a8_g32",
}


def schemes_of(some_plan):
    return {entry.name: entry.scheme for entry in some_plan}


def test_dit_recipe():
    expected = {f"transformer_blocks.{i}.{name}": scheme for i in range(2) for name, scheme in BLOCK_OF_DIT.items()}
    expected |= {"proj_out_1": "w4a16_g32", "proj_out_2": None}
    chosen = plan(tiny_dit(), "w4a8_g32")
    assert schemes_of(chosen) == expected
    assert all(entry.reason and "no rule" not in entry.reason for entry in chosen)


def test_every_rule_of_every_recipe_is_anchored():
    for recipe in RECIPES.values():
        for rule in recipe:
            assert not re.fullmatch(rule.pattern, "x." + "transformer_blocks.0.attn1.to_q.lora_a")
    assert recipe_for(tiny_dit()).rule_for("other.proj_out_2").treatment == "keep"


def test_a_subclass_takes_the_recipe_of_its_base():
    model = tiny_dit()
    model.__class__ = type("MyDiT", (type(model),), {})
    assert recipe_for(model) is RECIPES["DiTTransformer2DModel"]


def test_a_semistatic_plan_finds_ranges_behind_activation_functions_at_run_time():
    model = tiny_dit()
    chosen, static = plan(model, "w4a8_g32_semistatic"), schemes_of(plan(model, "w4a8_g32_static"))
    behind = {f"transformer_blocks.{i}.ff.net.2" for i in range(2)}
    assert schemes_of(chosen) == {name: "w4a8_g32" if name in behind else scheme for name, scheme in static.items()}
    assert all("found at run time" in chosen[name].reason for name in behind) and chosen.scheme == "w4a8_g32_semistatic"
    assert Plan.from_json(chosen.to_json()) == chosen
    with pytest.raises(ValueError, match="w8a8_semistatic is a whole model's: give a layer w8a8_static or w8a8"):
        chosen.set("*.ff.net.2", "w8a8_semistatic")
    with pytest.raises(ValueError, match="a whole model's"):
        QuantLinear.from_linear(nn.Linear(32, 8), "w8a8_semistatic", input_amax=1.0)
    with pytest.raises(ValueError, match="w8a8_static needs calibration"):
        quantize(model, "w8a8_semistatic")


def test_general_recipe():
    expected = {"embedder": None, "head": None}
    for i in range(2):
        expected[f"blocks.{i}.modulation"] = "w8a16"
        expected |= {f"blocks.{i}.{name}": "w8a8_static" for name in ("to_q", "to_k", "to_v", "up", "down")}
    assert schemes_of(plan(tiny_model(), "w8a8_static")) == expected


def test_general_recipe_finds_only_repeated_blocks():
    class Layer(nn.Sequential):
        def __init__(self):
            super().__init__(nn.LayerNorm(8), nn.Linear(8, 8))

    mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert set(schemes_of(plan(mlp, "w8a8")).values()) == {None}
    stack = nn.Sequential(nn.Linear(8, 8), Layer(), Layer(), nn.Linear(8, 8))
    assert schemes_of(plan(stack, "w8a8")) == {"0": None, "1.1": "w8a8", "2.1": "w8a8", "3": None}


def test_blocks_within_blocks_are_no_blocks_of_their_own():
    def part():
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))

    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"parts": nn.ModuleList([part(), part()])}) for _ in range(3))
    assert list(repeated_blocks(model)) == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize(
    ("name", "treatment"),
    [
        ("norm1.linear", "weight_only"),
        ("norm1_context.linear", "weight_only"),
        ("adaLN_modulation.1", "weight_only"),
        ("norm.linear", "weight_only"),
        ("time_emb_proj", "weight_only"),
        ("norm1.emb.timestep_embedder.linear_1", "keep"),
        ("attn.norm_q", "scheme"),
        ("proj_out", "scheme"),
        ("linear", "scheme"),
    ],
)
def test_names_in_blocks_of_other_models(name, treatment):
    recipe = recipe_for(tiny_model())
    assert recipe.rule_for(f"blocks.1.{name}").treatment == treatment
    assert recipe.rule_for(f"blocks.2.{name}").treatment == recipe.rule_for(f"x.blocks.1.{name}").treatment == "keep"


class AttentionModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_cannot_be_replaced_are_kept_with_the_reason():
    model = AttentionModel().eval()
    model.layers[1].linear1 = Scaled(32, 64)
    nn.utils.parametrizations.weight_norm(model.layers[1].linear2)
    chosen = plan(model, "w8a8")
    assert schemes_of(chosen) == {
        "layers.0.self_attn.out_proj": None,
        "layers.0.linear1": "w8a8",
        "layers.0.linear2": "w8a8",
        "layers.1.self_attn.out_proj": None,
        "layers.1.linear1": None,
        "layers.1.linear2": None,
    }
    assert "nn.MultiheadAttention" in chosen["layers.0.self_attn.out_proj"].reason
    assert "a Scaled" in chosen["layers.1.linear1"].reason
    with pytest.raises(ValueError, match=r"layers\.1\.linear1 cannot be quantized: a Scaled"):
        chosen["layers.1.linear1"] = "w8a8"
    quantize(model, chosen, progress=False)
    assert list(quantized_layers(model)) == ["layers.0.linear1", "layers.0.linear2"]
    assert model(torch.randn(1, 3, 32)).isfinite().all()


def test_layers_narrower_than_a_group_are_kept():
    chosen = plan(tiny_model(), "w4a8_g64")
    assert [entry.name for entry in chosen.quantized()] == ["blocks.0.down", "blocks.1.down"]
    assert chosen["blocks.0.to_q"].reason == "K = 32 is smaller than a group of 64"
    with pytest.raises(ValueError, match=r"blocks\.0\.to_q cannot take w8a8_g64: K = 32"):
        chosen["blocks.0.to_q"] = "w8a8_g64"
    chosen["blocks.0.to_q"] = "w8a8_g32"


def test_plans_are_edited_by_name_and_by_pattern():
    chosen = plan(tiny_model(), "w8a8")
    chosen["head"] = "w4a16_g32"
    chosen["blocks.0.up"] = None
    assert chosen.set("blocks.1.to_?", Scheme.parse("w4a8"), "an experiment") == 3
    assert (chosen["head"].scheme, chosen["blocks.0.up"].scheme) == ("w4a16_g32", None)
    assert (chosen["blocks.1.to_k"].scheme, chosen["blocks.1.to_k"].reason) == ("w4a8", "an experiment")
    before = chosen.to_dict()
    with pytest.raises(KeyError, match=r"no layer 'blocks\.0\.to_w'; nearest: blocks\.0\.to_"):
        chosen["blocks.0.to_w"] = None
    with pytest.raises(ValueError, match=r"matches 'block\.\*\.up'; nearest: .*blocks\.\d\.up"):
        chosen.set("block.*.up", None)
    with pytest.raises(ValueError, match="unknown scheme 'w3a8'"):
        chosen.set("*", "w3a8")
    with pytest.raises(ValueError, match="embedder cannot take w4a8_g32"):
        chosen.set("*", "w4a8_g32")  # K = 4: the others must not have changed
    assert chosen.to_dict() == before


def test_plans_survive_json():
    chosen = plan(tiny_dit(), "w4a8_g32")
    chosen["proj_out_1"] = None
    again = Plan.from_json(chosen.to_json())
    assert again == chosen and str(again) == str(chosen)
    with pytest.raises(ValueError, match="not a stored plan"):
        Plan.from_dict({"model": "x", "scheme": "w8a8"})
    with pytest.raises(ValueError, match="unknown scheme"):
        Plan.from_dict({"model": "x", "scheme": "w9a9", "entries": []})


def expand(name):
    """The names that one line of a table stands for."""
    span = re.search(r"\{([^}]*)\}", name)
    if not span:
        return [name]
    numbers = []
    for part in span[1].split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [full for n in numbers for full in expand(name[: span.start()] + str(n) + name[span.end() :])]


def test_the_table_stands_for_every_layer_once():
    model = nn.Module()
    model.a = nn.ModuleList(nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3)) for _ in range(6))
    chosen = plan(model, "w8a8")
    chosen.set("a.3.*", None)
    chosen.set("a.[01].1.0", "w4a8")
    lines = str(chosen).splitlines()[2:-1]
    treated = [(name, line.split()[4]) for line in lines for name in expand(line.split()[0])]
    assert sorted(treated) == sorted((entry.name, (entry.scheme or "16 bits").split()[0]) for entry in chosen)
    assert "a.{0-1}.1.0" in str(chosen) and len(lines) < len(chosen)
    assert len(chosen.table(every_layer=True).splitlines()) == len(chosen) + 3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_estimated_bits_are_the_stored_bits(scheme):
    layer = nn.Linear(200, 24)
    model = nn.Sequential(layer, nn.Linear(3, 3))
    chosen = plan(model, "w8a8")
    chosen["0"] = scheme
    quantized = QuantLinear.from_linear(layer, scheme, input_amax=1.0)
    activation_scale = 4 if SCHEMES[scheme].static else 0
    assert chosen["0"].stored_bits == 8 * (quantized.nbytes - activation_scale)
    assert f"{(chosen['0'].stored_bits + 16 * 9) / (200 * 24 + 9):.2f} bits per weight" in chosen.summary()


def test_the_summary_counts_all_parameters():
    shared = nn.Linear(40, 40, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 40, 4), shared, nn.LayerNorm(40), shared, nn.Linear(40, 7))
    chosen = plan(model, "w8a8")
    chosen["1"] = "w8a8"
    others = 3 * 40 * 16 + 40 + 2 * 40 + 7
    every = others + 1600 + 280
    assert sum(parameter.numel() for parameter in model.parameters()) == every
    assert f"1 of 2 linear layers quantized, {1600 / every:.1%} of the model's {every:,} parameters" in chosen.summary()
    assert f"280 weights of linear layers and {others:,} other parameters" in chosen.summary()
    assert Plan.from_json(chosen.to_json()).summary() == chosen.summary()
    old = {name: value for name, value in chosen.to_dict().items() if name != "other_parameters"}
    assert Plan.from_dict(old).other_parameters == 0
    quantize(model, chosen, progress=False)
    assert plan(model, "w8a8").other_parameters == others  # what is stored in low bits is neither


def test_plans_are_equal_if_all_they_say_is():
    chosen, other = (plan(tiny_dit(), "w4a8_g32") for _ in range(2))
    assert chosen == other and chosen != plan(tiny_dit(), "w8a8") and chosen != 5
    other.set("transformer_blocks.0.ff.net.2", None, "kept")
    assert chosen != other


@pytest.mark.parametrize(
    ("numbers", "said"),
    [([4], "4"), ([0, 1, 2, 3, 5], "{0-3,5}"), ([0, 1, 3, 4, 5, 9], "{0-1,3-5,9}"), ([2, 4], "{2,4}")],
)
def test_numbers_are_written_as_ranges(numbers, said):
    assert _span(numbers) == said
