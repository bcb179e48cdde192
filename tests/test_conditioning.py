"""DiT's embeddings of timestep and class, which are equal in all blocks, are computed once a call; and by each block
where anything speaks against it.
"""

import copy
import pickle

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding
from small_transformers import small_transformer

import ditq_kernels as ditq
from ditq_kernels.model.fused_blocks import conditioning

BLOCKS = 2
ASKED = BLOCKS + 1  # times a call: the first embedding again behind the blocks


def embeddings(model):
    return [block.norm1.emb for block in model.transformer_blocks]


@pytest.fixture
def model():
    """(DiT with equal embeddings, fused; what it is given)."""
    small, inputs = small_transformer("DiT")
    first, *others = embeddings(small)
    for other in others:
        other.load_state_dict(first.state_dict())
    return ditq.fuse(ditq.quantize(small, "w8a8", progress=False)), inputs


@pytest.fixture
def computed(monkeypatch):
    """How often timesteps were embedded since it was asked."""
    calls = []
    original = TimestepEmbedding.forward
    monkeypatch.setattr(
        TimestepEmbedding, "forward", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )

    def since():
        count = len(calls)
        calls.clear()
        return count

    return since


@torch.no_grad()
def output(model, inputs):
    return model(**inputs, return_dict=False)[0]


def by_each(model, inputs):
    """The output where no embedding is shared."""
    alone = copy.deepcopy(model)
    conditioning.part(alone)
    return output(alone, inputs)


def shared(model):
    return vars(embeddings(model)[0])[conditioning._SHARED][0]


def test_the_first_block_computes_for_all(model, computed):
    small, inputs = model
    expected = by_each(small, inputs)
    assert computed() == ASKED
    for _ in range(3):
        assert torch.equal(output(small, inputs), expected) and computed() == 1
    assert shared(small)._kept is None  # nothing is held between calls
    with torch.inference_mode():  # where nobody counts what was written
        assert torch.equal(output(small, inputs), expected) and computed() == 1
        inputs = {name: one.clone() if torch.is_tensor(one) else one for name, one in inputs.items()}
        assert torch.equal(output(small, inputs), expected) and computed() == 2


def test_embeddings_that_differ_are_computed_by_each(computed):
    small, inputs = small_transformer("DiT")  # drawn anew for each
    fused = ditq.fuse(ditq.quantize(small, "w8a8", progress=False))
    assert torch.equal(output(fused, inputs), by_each(fused, inputs))
    computed()
    output(fused, inputs)
    assert computed() == BLOCKS and shared(fused)._kept is None


def test_inputs_that_change_in_place(model):
    small, inputs = model
    before = output(small, inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inputs["timestep"] += 3
            inputs["class_labels"].copy_(inputs["class_labels"].flip(0))
            changed = output(small, inputs)
        assert torch.equal(changed, by_each(small, inputs)) and not torch.equal(changed, before)
        before = changed


@pytest.mark.parametrize("layer", ["timestep_embedder.linear_1", "timestep_embedder.linear_2"])
@pytest.mark.parametrize("place", range(BLOCKS))
def test_weights_that_change_are_noticed(place, layer, model, computed):
    small, inputs = model
    before = output(small, inputs)
    changed = embeddings(small)[place].get_submodule(layer)
    with torch.no_grad():
        changed.weight.mul_(2)
    assert torch.equal(output(small, inputs), by_each(small, inputs)) and not torch.equal(output(small, inputs), before)
    changed.weight = torch.nn.Parameter(changed.weight.detach() / 2)
    assert torch.equal(output(small, inputs), before)
    computed()
    output(small, inputs)
    assert computed() == 1


def test_models_that_move_are_compared_again(model, computed):
    small, inputs = model
    small.to(torch.bfloat16)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    expected = by_each(small, inputs)
    computed()
    assert torch.equal(output(small, inputs), expected) and computed() == 1


def test_hooks_and_adapters_do_their_part(model, computed):
    small, inputs = model
    before = output(small, inputs)
    second = embeddings(small)[1]
    handle = second.timestep_embedder.linear_2.register_forward_hook(lambda module, args, result: 2 * result)
    computed()
    hooked = output(small, inputs)
    assert computed() == ASKED and torch.equal(hooked, by_each(small, inputs)) and not torch.equal(hooked, before)
    handle.remove()
    whole = second.register_forward_hook(lambda module, args, result: 2 * result)
    assert not torch.equal(output(small, inputs), before)
    whole.remove()
    assert torch.equal(output(small, inputs), before)

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    plain = second.timestep_embedder.linear_2
    second.timestep_embedder.linear_2 = adapter = Adapter(plain.in_features, plain.out_features)
    adapter.load_state_dict(plain.state_dict())
    computed()
    assert torch.equal(output(small, inputs), by_each(small, inputs)) and not torch.equal(output(small, inputs), before)


def test_a_block_alone_computes_for_itself(model, computed):
    small, inputs = model
    output(small, inputs)
    given = dict(timestep=inputs["timestep"], class_labels=inputs["class_labels"], hidden_dtype=torch.float32)
    first, second = embeddings(small)
    computed()
    with torch.no_grad():
        expected = second(**given)
        assert computed() == 1
        assert torch.equal(first(**given), expected) and torch.equal(second(**given), expected) and computed() == 1
        assert torch.equal(second(**given), expected) and computed() == 1  # it has had the first one's
        assert torch.equal(first(**given), expected) and computed() == 0
        assert torch.equal(first(**given), expected) and computed() == 1
        first(**given)
        other = given | dict(timestep=given["timestep"] + 1)
        assert not torch.equal(second(**other), expected) and computed() == 2


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_share_among_themselves(make, model, computed):
    small, inputs = model
    expected = output(small, inputs)
    copied = make(small)
    assert shared(copied) is not shared(small) and shared(copied).members == embeddings(copied)
    computed()
    assert torch.equal(output(copied, inputs), expected) and computed() == 1
    with torch.no_grad():
        embeddings(copied)[1].timestep_embedder.linear_1.weight.zero_()
    assert not torch.equal(output(copied, inputs), expected)
    assert torch.equal(output(small, inputs), expected)


def test_unfusing_leaves_nothing(model, computed):
    small, inputs = model
    ditq.unfuse(small)
    assert not any(conditioning._SHARED in vars(one) for one in embeddings(small))
    output(small, inputs)
    assert computed() == ASKED


def test_gradients_and_training_are_each_blocks_own(model, computed):
    small, inputs = model
    small(**inputs)
    assert computed() == ASKED
    small.train()
    output(small, inputs)
    assert computed() == ASKED
