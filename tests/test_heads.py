"""What attention is given in one pass, queries and keys normalised and rotated: the kernel against the fp64 oracle, the
op, and FLUX's attention that it stands in.
"""

import collections

import pytest
import torch
import torch.nn.functional as F
from oracle import activations, assert_within_budget, generator
from small_transformers import small_transformer

import ditq_kernels as ditq
from ditq_kernels import UnsupportedError, kernels
from ditq_kernels.layer import backend, error_budget, ops, reference
from ditq_kernels.model.fused_blocks import flux, joint_attention, sd3

CPU = torch.device("cpu")
EPS = 1e-6
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def streams(shape, dtype, device, normed=True):
    """(both streams as one [B, S, 3, H, D], norms of both, cos, sin), of (B, tokens before, tokens, heads, D)."""
    batch, first, tokens, heads, channels = shape
    wide = activations(batch * (first + tokens), 3 * heads * channels, dtype, device).unflatten(0, (batch, -1))
    norms = [torch.randn(channels, generator=generator(n)).to(device, dtype) if normed else None for n in range(4)]
    cos, sin = torch.randn(2, first + tokens, channels, generator=generator(5)).to(device)
    return wide, norms, cos, sin


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 16), (1, 0, 7, 24, 128), (2, 1, 3, 5, 2)], ids=str)
def test_queries_and_keys_are_normalised_and_rotated(shape, dtype, normed, turns, device):
    batch, first, tokens, heads, channels = shape
    wide, norms, *angles = streams(shape, dtype, device, normed)
    angles = angles if turns else (None, None)
    more = (wide[:, :first], norms[2:]) if first else ()
    query, key, value = wide.unflatten(-1, (3, heads, channels)).unbind(2)
    for module in (kernels, reference):
        found = module.attention_inputs(wide[:, first:], norms[:2], *angles, heads, EPS, *more)
        assert found.shape == (3 if first else 2, batch, first + tokens, heads, channels)
        for y, part, (behind, before) in ((found[0], query, norms[::2]), (found[1], key, norms[1::2])):
            for place, norm in ((slice(first), before), (slice(first, None), behind)):
                if y[:, place].numel():
                    here = (None if one is None else one[place] for one in angles)
                    oracle = error_budget.rotation_oracle(part[:, place], norm, *here, EPS)
                    assert_within_budget(y[:, place], *oracle)
        assert not first or torch.equal(found[2], value)


def test_the_reference_rounds_as_diffusers_does():
    from diffusers.models.embeddings import apply_rotary_emb

    for dtype in (torch.float32, torch.bfloat16):
        wide, norms, cos, sin = streams((2, 3, 5, 6, 16), dtype, CPU)
        query, key, _ = ops.attention_inputs(wide[:, 3:], norms[:2], cos, sin, 6, EPS, wide[:, :3], norms[2:])
        for found, place, (behind, before) in ((query, 0, norms[::2]), (key, 1, norms[1::2])):
            parts = wide.unflatten(-1, (3, 6, 16))[:, :, place].split([3, 5], 1)
            normed = [F.rms_norm(part, (16,), norm, EPS) for part, norm in zip(parts, (before, behind), strict=True)]
            expected = apply_rotary_emb(torch.cat(normed, 1), (cos, sin), sequence_dim=1)
            assert torch.equal(found, expected)


def test_values_of_one_stream_are_a_view():
    wide, norms, cos, sin = streams((2, 0, 5, 6, 16), torch.bfloat16, CPU)
    value = ops.attention_inputs(wide, norms[:2], cos, sin, 6, EPS)[2]
    assert value.data_ptr() == wide[..., 192:].data_ptr() and torch.equal(value.flatten(2), wide[..., 192:])


def test_the_op_passes_pytorchs_checks_and_compiles():
    wide, norms, cos, sin = streams((2, 3, 5, 6, 16), torch.float32, CPU)
    one, two = (wide[:, 3:], *norms[:2], cos[3:], sin[3:], 6, EPS), (wide[:, 3:], *norms[:2], cos, sin, 6, EPS)
    for arguments in (one, (*two, wide[:, :3], *norms[2:])):
        torch.library.opcheck(torch.ops.ditq.attention_inputs, arguments)
    compiled = torch.compile(ops.attention_inputs, fullgraph=True, backend="aot_eager")
    arguments = wide[:, 3:], norms[:2], cos, sin, 6, EPS, wide[:, :3], norms[2:]
    assert all(map(torch.equal, compiled(*arguments), ops.attention_inputs(*arguments)))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_parts_that_do_not_fit_are_named(implementation, device):
    if reason := backend.why_unavailable(implementation, device.type):
        pytest.skip(reason)
    wide, norms, cos, sin = streams((2, 3, 5, 6, 16), torch.float32, device)
    given = dict(x=wide[:, 3:], norms=norms[:2], cos=cos, sin=sin, heads=6, eps=EPS)
    given |= dict(before=wide[:, :3], before_norms=norms[2:])
    with ditq.use_backend(implementation):
        for changed, said in (
            (dict(x=wide[0]), r"x must be \[batch, tokens, 3 \* 6 heads \* an even number\], got \[8, 288\]"),
            (dict(heads=5), r"3 \* 5 heads"),
            (dict(before=wide[:1]), r"before must be torch\.float32 \[2, tokens, 288\]"),
            (dict(before=wide.half()), r"got torch\.float16"),
            (dict(cos=cos[1:]), r"cos must be torch\.float32 \[8, 16\], a row for each token, got .* \[7, 16\]"),
            (dict(sin=None), r"cos comes with sin"),
            (dict(sin=sin.double()), r"sin must be torch\.float32"),
            (dict(norms=[norms[0][:8], None]), r"query_norm must be torch\.float32 \[16\]"),
            (dict(before_norms=[None, norms[3].half()]), r"before_key_norm must be torch\.float32 \[16\]"),
            (dict(cos=cos.to("meta")), r"cos is on meta"),
        ):
            with pytest.raises(ValueError, match=said):
                ops.attention_inputs(**(given | changed))


def test_heads_that_the_kernel_does_not_take_are_refused(device):
    wide, norms, cos, sin = streams((1, 0, 3, 2, 6), torch.float32, device)
    with pytest.raises(UnsupportedError, match=r"heads of 2, 4, 8 \.\.\. 256 channels, got 6; use the reference"):
        kernels.attention_inputs(wide, norms[:2], cos, sin, 2, EPS)
    assert reference.attention_inputs(wide, norms[:2], cos, sin, 2, EPS).shape == (2, 1, 3, 2, 6)


@pytest.fixture
def model():
    """(FLUX, fused, what it is given, what it gave before)."""
    small, inputs = small_transformer("FLUX")
    quantized = ditq.quantize(small, "w8a8", progress=False)
    return quantized, inputs, output(quantized, inputs)


@torch.no_grad()
def output(model, inputs):
    with ditq.use_backend("reference"):
        return model(**inputs, return_dict=False)[0]


@pytest.fixture
def answers(monkeypatch):
    """How often attention made fewer passes, and how often it was left to the processor."""
    counted = collections.Counter()

    def counting(*args, **kwargs):
        found = joint_attention.joint_attention(*args, **kwargs)
        counted["left" if found is None else "fused"] += 1
        return found

    for blocks in (flux, sd3):
        monkeypatch.setattr(blocks, "joint_attention", counting)
    return counted


def test_attention_of_both_blocks_gives_the_same_bits(model, answers):
    """In fp32 by the reference, which rounds where diffusers does."""
    quantized, inputs, expected = model
    assert torch.equal(output(ditq.fuse(quantized), inputs), expected)
    assert answers == {"fused": 4}


def test_unfusing_leaves_nothing_in_attentions(model):
    quantized, inputs, _ = model
    output(ditq.fuse(quantized), inputs)
    assert any(joint_attention.CODE in vars(module) for module in quantized.modules())
    ditq.unfuse(quantized)
    assert not any("_ditq" in key for block in quantized.transformer_blocks for key in vars(block.attn))


def test_without_angles_nothing_is_turned(model, answers):
    block, width = model[0].transformer_blocks[0], model[0].inner_dim
    given = dict(hidden_states=torch.randn(2, 9, width), encoder_hidden_states=torch.randn(2, 5, width))
    given |= dict(temb=torch.randn(2, width))
    with torch.no_grad(), ditq.use_backend("reference"):
        expected = block(**given)
        ditq.fuse(model[0])
        assert all(map(torch.equal, block(**given), expected)) and answers == {"fused": 1}


@pytest.mark.parametrize("name", ["SD3", "SD3.5 medium"])
def test_attention_with_the_picture_in_front(name, answers):
    """Stable Diffusion 3.5's has norms, and 3's has none, which leaves it to the processor."""
    small, inputs = small_transformer(name)
    quantized = ditq.quantize(small, "w8a8", progress=False)
    expected = output(quantized, inputs)
    found = output(ditq.fuse(quantized), inputs)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    blocks = len(quantized.transformer_blocks)
    assert answers == ({"left": blocks} if name == "SD3" else {"fused": blocks})


class OtherProcessor:
    """What a user might put in the processor's place."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, *args, **kwargs):
        return self.processor(*args, **kwargs)


def norm_of_another_dtype(attention):
    attention.norm_q.double()
    attention.norm_q.register_forward_hook(lambda module, args, result: result.float())


def another_epsilon(attention):
    attention.norm_k.eps = 1e-3


def norm_of_another_kind(attention):
    attention.norm_k = torch.nn.LayerNorm(attention.head_dim)


CHANGES = {
    "a hook on a norm": lambda one: one.norm_q.register_forward_hook(lambda module, args, result: 2 * result),
    "a norm of another dtype": norm_of_another_dtype,
    "another epsilon": another_epsilon,
    "a norm of another kind": norm_of_another_kind,
    "another processor": lambda one: one.set_processor(OtherProcessor(one.processor)),
    "a hook on a projection": lambda one: one.to_k.register_forward_hook(lambda module, args, result: 2 * result),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_built_otherwise_is_left_to_the_processor(change, model, answers):
    quantized, inputs, _ = model
    for block in (*quantized.transformer_blocks, *quantized.single_transformer_blocks):
        CHANGES[change](block.attn)
    expected = output(quantized, inputs)
    found = output(ditq.fuse(quantized), inputs)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)  # last bits, where a product is added in a pass
    assert answers == {"left": 4}


@pytest.mark.parametrize("name", ["dispatch_attention_fn", "apply_rotary_emb", "_get_qkv_projections", "RMSNorm"])
def test_functions_that_somebody_put_into_the_processors_file(name, model, monkeypatch):
    from diffusers.models.transformers import transformer_flux

    quantized, inputs, before = model
    ditq.fuse(quantized)
    place, name = (torch.nn.RMSNorm, "forward") if name == "RMSNorm" else (transformer_flux, name)
    original = getattr(place, name)

    def doubled(*args, **kwargs):
        found = original(*args, **kwargs)
        return 2 * found if isinstance(found, torch.Tensor) else (*found[:2], 2 * found[2], *found[3:])  # the values

    monkeypatch.setattr(place, name, doubled)
    found = output(quantized, inputs)
    assert not torch.allclose(found, before, atol=1e-2)
    assert torch.allclose(found, output(ditq.unfuse(quantized), inputs), rtol=0, atol=1e-5)


def test_a_processor_that_inherits_diffusers_own(model):
    """A class of a user's: what its layers are is its own affair, before fusing and after it."""
    quantized, inputs, expected = model
    original = type(quantized.transformer_blocks[0].attn.processor)
    output(ditq.fuse(quantized), inputs)
    quantized.set_attn_processor(type("Mine", (original,), {"__module__": __name__})())
    assert torch.allclose(output(quantized, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("empty", ["encoder_hidden_states", "hidden_states"])
def test_streams_without_tokens(empty, model):
    quantized, inputs, _ = model
    ids = {"encoder_hidden_states": "txt_ids", "hidden_states": "img_ids"}[empty]
    inputs = inputs | {empty: inputs[empty][:, :0], ids: inputs[ids][:0]}
    expected = output(quantized, inputs)
    assert torch.allclose(output(ditq.fuse(quantized), inputs), expected, rtol=0, atol=1e-5)


def test_a_text_for_several_pictures(model):
    """diffusers broadcasts nothing here but the modulation, which a block alone does."""
    quantized, *_ = model
    block, width = quantized.transformer_blocks[0], quantized.inner_dim
    given = dict(hidden_states=torch.randn(2, 9, width), encoder_hidden_states=torch.randn(1, 5, width))
    given |= dict(temb=torch.randn(2, width))
    with torch.no_grad(), ditq.use_backend("reference"):
        expected = failure(lambda: block(**given))
        ditq.fuse(quantized)
        assert failure(lambda: block(**given)) == expected


def failure(call):
    """What it raises, or the shapes of what it gives."""
    try:
        return [one.shape for one in call()]
    except RuntimeError as error:
        return str(error)


def test_angles_of_one_for_all_channels(model, answers):
    quantized, *_ = model
    block, width = ditq.fuse(quantized).transformer_blocks[0], quantized.inner_dim
    given = dict(hidden_states=torch.randn(1, 9, width), encoder_hidden_states=torch.randn(1, 5, width))
    given |= dict(temb=torch.randn(1, width), image_rotary_emb=tuple(torch.randn(2, 14, 1)))
    with torch.no_grad():
        block(**given)
    assert answers == {"left": 1}


def test_a_chosen_attention_backend_is_asked(model, answers):
    quantized, inputs, expected = model
    ditq.fuse(quantized)
    for name, block in quantized.named_modules():
        if name.endswith(".attn"):
            block.processor._attention_backend = "_native_math"
    assert torch.allclose(output(quantized, inputs), expected, atol=1e-4)
    assert answers == {"fused": 4}
    quantized.transformer_blocks[0].attn.processor._attention_backend = "no such backend"
    with pytest.raises(ValueError, match="no such backend"):
        output(quantized, inputs)
