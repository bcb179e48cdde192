import pytest
import torch
from oracle import activations

from ditq_kernels.layer import reference

CPU = torch.device("cpu")


def test_codes_follow_the_definition_in_exact_arithmetic():
    x = activations(17, 200, torch.float32, CPU)
    codes, scales = reference.quantize_activation(x)
    for row in range(17):
        amax = x[row].abs().max()
        if amax == 0:
            assert not codes[row].any()
            continue
        # fp64 holds the fp32 quotient and the product of two fp32 numbers exactly, and rounds each to fp32 once.
        factor = (torch.tensor(127.0, dtype=torch.float64) / amax.double()).float()
        product = (x[row].double() * factor.double()).float()
        assert torch.equal(codes[row], torch.round(product).to(torch.int8))
        assert scales[row] == (amax.double() / 127).float()
        assert codes[row].abs().max() == 127


def test_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert reference.quantize_activation(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_static_reach_saturates():
    x = torch.tensor([[1.0, -300.0, 3.0e38, 127.0]])
    codes, scales = reference.quantize_activation(x, torch.tensor([127.0]))
    assert codes.tolist() == [[1, -127, 127, 127]] and scales.tolist() == [1.0]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("amax", [None, torch.tensor([4.0])])
def test_a_broken_row_is_marked_and_no_other(poison, amax):
    x = activations(5, 64, torch.float32, CPU)
    x[3, 7] = poison
    codes, scales = reference.quantize_activation(x, amax)
    assert torch.isnan(scales).tolist() == [False, False, False, True, False]
    assert not codes[3].any()


def test_rows_too_small_to_divide_by_are_finite():
    x = torch.full((2, 64), 1e-44)
    x[1] = 0
    codes, scales = reference.quantize_activation(x)
    assert not codes.any() and torch.isfinite(scales).all()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rows", [1, 17])
def test_the_product_is_exact_at_the_extremes(rows, fast, monkeypatch):
    monkeypatch.setattr(reference, "_int_mm_is_fast", lambda: fast)
    in_features = 4608
    qx = torch.full((rows, in_features), 127, dtype=torch.int8)
    w = torch.full((8, in_features), -128, dtype=torch.int8)
    w[::2] = 127
    exact = (qx.long() @ w.long().T).int()
    assert torch.equal(reference.int8_product(qx, w), exact)
    monkeypatch.setattr(reference, "_int_mm_is_exact", lambda: False)
    assert torch.equal(reference.int8_product(qx, w), exact)
