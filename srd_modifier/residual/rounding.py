"""Rounding of scaled residuals to whole numbers, and the reproducible noise it uses.

Subtractive dither (Roberts 1962; Schuchman 1964): with `u` uniform on [-1/2, 1/2), the error of
`round(x + u) - u` is uniform and independent of `x` as long as nothing is clipped. Stochastic rounding is
`floor(x + u + 1/2)`: right on average, with up to twice the error.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def round_(scaled: Tensor, rounding: str, noise: Tensor | None) -> Tensor:
    """Round `scaled` (float32, in steps) in place to whole numbers.

    Args:
        scaled: residual divided by its scale.
        rounding: `nearest`, `stochastic` or `dithered`.
        noise: uniform on [-1/2, 1/2), of `scaled`'s shape; not used by `nearest`.
    """
    if rounding == "nearest":
        return scaled.round_()
    assert noise is not None
    if rounding == "dithered":
        return scaled.add_(noise).round_()
    return scaled.add_(noise).add_(0.5).floor_()


def uniform_noise(shape: tuple[int, int], seed: int, key: str, device: torch.device | str = "cpu") -> Tensor:
    """Noise on [-1/2, 1/2), float32 in steps of 2**-24, the same on every machine and device.

    NumPy's Philox counter generator is drawn raw, which NumPy promises to keep stable (NEP 19), and keyed by
    the seed and the module's name, so that a module decodes alike whatever else is in the checkpoint.
    """
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Philox(key=np.array([seed, int.from_bytes(digest[:8], "little")], dtype=np.uint64))
    count = shape[0] * shape[1]
    words = generator.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]
    noise = (words >> 8).astype(np.float32)
    noise *= np.float32(2.0**-24)
    noise -= np.float32(0.5)
    return torch.from_numpy(noise).reshape(shape).to(device)
