import math

import torch

_MASK = 0xFFFFFFFF


def randn(out, seed, step, stream, first):
    make = bits if out.dtype == torch.int32 else normal
    out.copy_(make(out.shape, seed, step, stream, first, out.device))


def normal(shape, seed, step, stream, first, device):
    """Float32 unit normals of `shape`; step is a number or a tensor (B,), one for each sample."""
    r = philox_bits(shape, seed, step, stream, first, device)
    return _elements([z for pair in (r[:2], r[2:]) for z in _box_muller(*pair)], shape)


def bits(shape, seed, step, stream, first, device):
    """The 32 bits of every element."""
    return _elements(philox_bits(shape, seed, step, stream, first, device), shape)


def _elements(words, shape):
    return torch.stack(words, -1).flatten(1)[:, : math.prod(shape[1:])].reshape(shape)


def philox_bits(shape, seed, step, stream, first, device):
    """Four int64 tensors (samples, blocks) of 32 random bits: word w of block i belongs to element 4 i + w."""
    block = torch.arange(-(-math.prod(shape[1:]) // 4), device=device)
    sample = torch.arange(first, first + shape[0], device=device)[:, None]
    step = step.reshape(-1, 1) if isinstance(step, torch.Tensor) else torch.tensor(step, device=device)
    counter = block & _MASK, sample, step, stream | (block >> 32 << 16)
    return philox(torch.broadcast_tensors(*counter), seed)


def philox(counter, seed):
    """Philox-4x32-10 of four int64 tensors that hold 32-bit words, under a 64-bit key."""
    x, y, z, w = counter
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        # The products wrap around in int64, and their 64 bits are the right ones.
        p, q = x * 0xD2511F53, z * 0xCD9E8D57
        x, y, z, w = q >> 32 & _MASK ^ y ^ k0, q & _MASK, p >> 32 & _MASK ^ w ^ k1, p & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return x, y, z, w


def _box_muller(r0, r1):
    """Two normals from two words; only r0's step to float32 rounds, the rest is exact to float32's last bit."""
    u = r0.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = (-2 * u.double().log()).sqrt()
    angle = r1.double() * (math.pi * 2.0**-31)
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()
