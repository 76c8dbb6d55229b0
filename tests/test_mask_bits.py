"""Masks as bits, against NumPy."""

import numpy as np
import pytest
import torch

from training.mask_bits import pack_masks, packed_bytes, unpack_mask


@pytest.mark.parametrize("size", [(1, 1), (2, 4), (3, 3), (5, 8), (31, 17)])
def test_bits_are_numpys(size):
    masks = np.random.default_rng(0).random((4, *size)) < 0.5
    expected = np.packbits(masks.reshape(4, -1), axis=1)
    packed = pack_masks(torch.from_numpy(masks))
    assert packed.dtype == torch.uint8 and np.array_equal(packed, expected)
    assert packed.shape == (4, packed_bytes(size))
    for mask, row in zip(masks, expected, strict=True):
        unpacked = unpack_mask(torch.from_numpy(row), size)
        assert unpacked.dtype == torch.bool and np.array_equal(unpacked, mask)
