"""Small pictures for tests of the processor, and the side of the square that they are warped to."""

import cv2
import numpy as np

SIDE = 56


def picture(height=30, width=44, seed=0) -> np.ndarray:
    """Smooth colours with some noise, (height, width, 3)."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(smooth + random.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
