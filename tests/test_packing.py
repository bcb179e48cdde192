import pytest
import torch

from ditq_kernels.layer.packing import BLOCK, LAYOUTS, pack_groups, unpack_groups


def every_code(layout, columns):
    low, high = (0, 16) if layout.dtype == torch.uint8 else (-128, 128)
    codes = torch.arange(low, high, dtype=torch.int16).repeat(columns)[: 24 * columns]
    return codes.view(-1, columns).to(layout.dtype)


@pytest.mark.parametrize("columns", [1, 63, 64, 127, 128, 129, 200, 256, 1152])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_unpack_inverts_pack(layout, columns):
    codes = every_code(layout, columns)
    stored = layout.pack(codes)
    assert stored.dtype == layout.dtype and stored.shape == (len(codes), layout.columns(columns))
    assert torch.equal(layout.unpack(stored, columns), codes)


def test_planar_bytes_hold_the_codes_of_two_half_blocks():
    layout = LAYOUTS["int4_planar128"]
    codes = torch.randint(0, 16, (3, 2 * BLOCK), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stored = layout.pack(codes)
    for block in range(2):
        for byte in range(64):
            value = stored[:, 64 * block + byte]
            assert torch.equal(value & 15, codes[:, BLOCK * block + byte])
            assert torch.equal(value >> 4, codes[:, BLOCK * block + byte + 64])


def test_codes_past_the_end_are_zero():
    stored = LAYOUTS["int4_planar128"].pack(torch.full((1, 130), 15, dtype=torch.uint8))
    assert stored[0, 64:].tolist() == [15, 15] + [0] * 62


def test_every_group_byte_survives():
    stored = torch.arange(256, dtype=torch.uint8).view(8, 32)
    multiplier, zero_point = unpack_groups(stored)
    assert multiplier.min() == 1 and multiplier.max() == 16 and zero_point.max() == 15
    assert torch.equal(pack_groups(multiplier, zero_point), stored)


def test_codes_in_any_order_are_packed_row_by_row():
    codes = torch.randint(0, 16, (6, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layout = LAYOUTS["int4_planar128"]
    packed = layout.pack(codes.T.contiguous().T)
    assert packed.is_contiguous() and torch.equal(packed, layout.pack(codes))
