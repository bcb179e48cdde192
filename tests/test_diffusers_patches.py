"""What diffusers does with layers behind their backs: joins them, and loads others from their state."""

import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel, SD3ControlNetModel, SD3Transformer2DModel
from small_models import dit_inputs, tiny_dit

import ditq_kernels as ditq
from ditq_kernels import QuantLinear
from ditq_kernels.layer.concatenation import concatenated
from ditq_kernels.layer.formats import RECOMMENDED
from ditq_kernels.model.conversion import quantized_layers


def random(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def dit_output(model):
    x, time, labels = dit_inputs()
    with torch.no_grad():
        return model(x, timestep=time, class_labels=labels).sample


@pytest.mark.parametrize("scheme", RECOMMENDED)
def test_joined_layers_compute_the_same_bits(scheme):
    torch.manual_seed(0)
    plain = [torch.nn.Linear(160, out) for out in (16, 24, 40)]
    layers = [QuantLinear.from_linear(layer, scheme, input_amax=3.0) for layer in plain]
    joined = concatenated(layers)
    x = torch.randn(7, 160)
    assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], -1))
    assert joined.nbytes <= sum(layer.nbytes for layer in layers) and joined.out_features == 80


def test_layers_that_cannot_be_joined_say_why():
    def layer(scheme="w8a8_static", inputs=64, bias=True, amax=3.0):
        return QuantLinear.from_linear(torch.nn.Linear(inputs, 16, bias=bias), scheme, input_amax=amax)

    for other, said in (
        (layer("w8a8"), "schemes differ"),
        (layer(inputs=32), "inputs differ"),
        (layer(bias=False), "a bias and another has none"),
        (layer(amax=2.0), "different inputs"),
        (torch.nn.Linear(64, 16), "not all of them are quantized"),
    ):
        with pytest.raises(ValueError, match=said):
            concatenated([layer(), other])


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w4a16"])
def test_fused_projections_stay_packed_and_compute_the_same(scheme):
    model = ditq.quantize(tiny_dit(), scheme, progress=False)
    before = dit_output(model)
    for block in model.transformer_blocks:
        block.attn1.fuse_projections()
        assert isinstance(block.attn1.to_qkv, QuantLinear) and block.attn1.to_qkv.scheme == block.attn1.to_q.scheme
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    for block in model.transformer_blocks:
        block.attn1.set_processor(FusedAttnProcessor2_0())
        del block.attn1.to_q, block.attn1.to_k, block.attn1.to_v  # so that nothing else can be called
    assert torch.equal(dit_output(model), before)


def test_projections_of_several_schemes_are_joined_in_16_bits_with_a_warning():
    chosen = ditq.plan(tiny_dit(), "w8a8")
    chosen["transformer_blocks.0.attn1.to_k"] = "w8a16"
    model = ditq.quantize(tiny_dit(), chosen, progress=False)
    with pytest.warns(UserWarning, match=r"to_qkv joins to_q, to_k, to_v in 16 bits: their schemes differ"):
        model.transformer_blocks[0].attn1.fuse_projections()
    assert not isinstance(model.transformer_blocks[0].attn1.to_qkv, QuantLinear)


def flux():
    return random(
        FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
    )


def sd3():
    return random(
        SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            out_channels=4,
        )
    )


def test_fluxs_own_function_fuses_packed_projections():
    model = flux()
    chosen = ditq.plan(model, "w8a8")
    chosen.set("*transformer_blocks*attn*", "w8a8")
    ditq.quantize(model, chosen, progress=False)
    model.fuse_qkv_projections()
    attention = model.transformer_blocks[0].attn
    assert isinstance(attention.to_qkv, QuantLinear) and isinstance(attention.to_added_qkv, QuantLinear)


@pytest.mark.parametrize(
    ("make", "controlnet", "options"),
    [
        (
            flux,
            FluxControlNetModel,
            dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2),
        ),
        (sd3, SD3ControlNetModel, dict(num_layers=1)),
    ],
)
def test_a_controlnet_takes_the_decoded_weights(make, controlnet, options):
    model = make()
    chosen = ditq.plan(model, "w8a8")
    chosen.set("*transformer_blocks*attn*", "w8a8")
    ditq.quantize(model, chosen, progress=False)
    made = controlnet.from_transformer(model, **options)
    layers = {name: layer for name, layer in quantized_layers(model).items() if name in dict(made.named_modules())}
    assert len(layers) > 5
    for name, layer in layers.items():
        assert torch.equal(made.get_submodule(name).weight, layer.dequantized_weight()), name
        assert torch.equal(made.get_submodule(name).bias, layer.bias), name
    bare = controlnet.from_transformer(model, **options, load_weights_from_transformer=False)
    name, layer = next(iter(layers.items()))
    assert not torch.equal(bare.get_submodule(name).weight, layer.dequantized_weight())
