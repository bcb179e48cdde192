"""Shapes, inputs and assertions that all tests of products share."""

from __future__ import annotations

import os

import torch
from torch import nn

from ditq_kernels.layer import error_budget

# Shifts what every generator draws: the tests have to pass with any other inputs of the same kind.
TEST_SEED = int(os.environ.get("DITQ_TEST_SEED", "0"))
_SEEDS_OF_A_TEST = 1000

# (M, N, K): one token to many, on both sides of the small-M path and of every tile; N and K ragged, K not a multiple of
# 128, 64 or 32.
SHAPES = (
    (1, 64, 128),
    (2, 96, 200),
    (15, 32, 320),
    (16, 40, 256),
    (17, 80, 130),
    (63, 136, 384),
    (129, 72, 150),
    (257, 64, 256),
    (17, 24, 1088),
    (530, 136, 128),
)
# Where kernels are compiled, each shape asks for others in every format and type, and a GPU's time is short: one of few
# rows, a ragged one and one of many rows stand for all. `inspect --execute` computes with every compiled form.
ON_A_GPU = ((2, 96, 200), (17, 80, 130), (257, 64, 256))
COMPILED = os.environ.get("TRITON_INTERPRET") != "1"
if COMPILED:
    SHAPES = ON_A_GPU


def generator(seed: int = 0) -> torch.Generator:
    """Number ``seed`` of a test's own generators."""
    return torch.Generator().manual_seed(_SEEDS_OF_A_TEST * TEST_SEED + seed)


def activations(rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Signed [rows, columns] with outlier channels and, where there is room, a row of zeros; rows are strided, as
    slices of a wider tensor are.
    """
    x = torch.randn(rows, columns + 16, generator=generator(seed))
    x[:, ::37] *= 20
    if rows > 2:
        x[1] = 0
    return x.to(device=device, dtype=dtype)[:, :columns]


def linear(out_features: int, in_features: int, device: torch.device, seed: int = 0) -> nn.Linear:
    """A layer whose channels and groups differ in size and lean to one side, with one channel of zeros."""
    source = generator(seed)
    layer = nn.Linear(in_features, out_features)
    size = 4 * torch.rand(out_features, 1, generator=source) * (1 + torch.arange(in_features) // 32 % 3)
    weight = size * (torch.randn(out_features, in_features, generator=source) + 0.5)
    weight[out_features // 2] = 0
    layer.weight.data = weight / in_features**0.5
    layer.bias.data = torch.randn(out_features, generator=source)
    return layer.to(device)


def assert_within_budget(actual: torch.Tensor, exact: torch.Tensor, budget: torch.Tensor) -> None:
    """``actual`` is finite and nowhere further from ``exact`` than ``budget``, of :mod:`.layer.error_budget`."""
    assert actual.shape == exact.shape
    share = error_budget.worst_share(actual, exact, budget)
    assert share <= 1, f"the error is {share:.3g} times what is allowed"


def assert_product(
    actual: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    arithmetic: error_budget.Arithmetic = error_budget.PLAIN,
    silu: bool = False,
) -> None:
    """``actual`` [M, N] is ``x @ w.T + bias``, or with SiLU of ``x``, within the error budget of ``arithmetic``.

    Args:
        x: [M, K]; of int8 codes, codes times scales in fp64. w: fp32 [N, K], the dequantized weight.
        arithmetic: of what computed it; the reference's if not given.
    """
    x_error = None
    if silu:
        x, x_error = error_budget.silu_operand(x)
    capability = error_budget.capability_of(actual.device)
    assert_within_budget(
        actual, *error_budget.product_oracle(x, w, bias, actual.dtype, arithmetic, capability, x_error)
    )
