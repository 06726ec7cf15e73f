"""Unit normal noise that depends on the image, not on the batch it is drawn in."""

import numpy as np
import torch


class ImageNoise:
    """A stream of normal tensors of one shape (B, …); image i draws from a generator of its own, seeded by (seed, i).

    Image i of a batch is therefore image i of any batch, on any device. The numbers are torch's Mersenne Twister,
    drawn on the CPU, until `ops.randn` brings counter-based ones.
    """

    def __init__(self, seed, shape, device=None, first=0):
        if seed < 0:
            raise ValueError(f"sample: seed must not be negative, got {seed}")
        self.shape, self.device = tuple(shape), device
        self._generators = [torch.Generator().manual_seed(mixed_seed(seed, first + i)) for i in range(self.shape[0])]

    def draw(self):
        noise = torch.empty(self.shape)
        for image, generator in zip(noise, self._generators, strict=True):
            image.normal_(generator=generator)
        return noise.to(self.device)


def mixed_seed(*key):
    """One 64-bit seed from several non-negative integers; nearby keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
