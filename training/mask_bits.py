"""Masks as bits, eight pixels a byte, in which they travel between the host and a device.

The first pixel of a byte is its highest bit, as in `numpy.packbits`, which does the host's part.
"""

import torch
import torch.nn.functional as F


def pack_masks(masks: torch.Tensor) -> torch.Tensor:
    """Booleans `(n, H, W)` to bytes `(n, b)`, the last one of each mask filled up with zeros."""
    pixels = masks.flatten(1)
    bits = F.pad(pixels, (0, -pixels.shape[1] % 8)).unflatten(1, (-1, 8))  # (n, b, 8)
    return (bits << _places(masks.device)).sum(dim=2, dtype=torch.uint8)


def unpack_mask(packed: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bytes `(b,)` of one mask to booleans of `size` `(H, W)`."""
    height, width = size
    bits = packed[:, None] >> _places(packed.device) & 1  # (b, 8)
    return bits.flatten()[: height * width].bool().unflatten(0, size)


def packed_bytes(size: tuple[int, int]) -> int:
    """How many bytes a mask of `size` `(H, W)` takes."""
    return -(-size[0] * size[1] // 8)


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
