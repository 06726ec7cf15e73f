import functools

import torch

from ..samplers.noise import mixed_seed


class Batches(torch.utils.data.Sampler):
    """One process' share of the indices of steps start … stop-1.

    The steps run through one shuffled pass over the data after the other; a step's indices depend on (seed, step)
    alone, so that a resumed run sees what an uninterrupted one would have.
    """

    def __init__(self, n, batch_size, *, start, stop, seed, rank=0, world=1):
        self.n, self.batch_size, self.start, self.stop = n, batch_size, start, stop
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self):
        return max(0, self.stop - self.start)

    def __iter__(self):
        for step in range(self.start, self.stop):
            positions = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
            yield [_shuffled(self.n, self.seed, p // self.n)[p % self.n] for p in positions]


@functools.lru_cache(maxsize=2)  # a batch may straddle two passes
def _shuffled(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch))).tolist()
