import torch
import triton
import triton.language as tl

BLOCK = 256  # counters a program, of four elements each


def randn(out, seed, step, stream, first):
    """Fill out with unit normals, or, where it is int32, with the bits they are made of."""
    samples = out.shape[0]
    size = out.numel() // samples if samples else 0
    if size == 0:
        return
    with torch.cuda.device_of(out):
        randn_kernel[(samples * triton.cdiv(size, 4 * BLOCK),)](
            out, size, seed, step, stream, first, BITS=out.dtype == torch.int32, BLOCK=BLOCK
        )


@triton.jit
def randn_kernel(
    out,  # (samples, size), contiguous
    size: tl.int64,
    seed: tl.int64,
    step: tl.int64,
    stream: tl.int64,
    first: tl.int64,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Element e of sample b is made of word e % 4 of the counter (e // 4, first + b, step, stream)."""
    programs = tl.cdiv(size, 4 * BLOCK)
    sample = tl.program_id(0).to(tl.int64) // programs
    block = tl.program_id(0) % programs
    if BITS:
        v = noise_bits(seed, first + sample, step, stream, block, BLOCK).to(tl.int32, bitcast=True)
    else:
        v = noise(seed, first + sample, step, stream, block, BLOCK)
    i = block.to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + sample * size + i, v.to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _words(seed, sample, step, stream, block, BLOCK: tl.constexpr):
    counter = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.uint32)
    return tl.philox(
        seed,
        counter.to(tl.uint32),
        zero + sample.to(tl.uint32),
        zero + step.to(tl.uint32),
        (counter >> 32 << 16).to(tl.uint32) | stream.to(tl.uint32),
    )


@triton.jit
def noise_bits(seed, sample, step, stream, block, BLOCK: tl.constexpr):
    """The words of BLOCK counters from BLOCK * block on, one after the other."""
    x, y, z, w = _words(seed, sample, step, stream, block, BLOCK)
    return tl.interleave(tl.interleave(x, z), tl.interleave(y, w))


@triton.jit
def noise(seed, sample, step, stream, block, BLOCK: tl.constexpr):
    """The normals of BLOCK counters from BLOCK * block on."""
    x, y, z, w = _words(seed, sample, step, stream, block, BLOCK)
    a, b = _box_muller(x, y)
    c, d = _box_muller(z, w)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _box_muller(r0, r1):
    """The arithmetic of csrc/common/philox.h: tl.log and tl.sin are too coarse near their zeros."""
    u = r0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    bits = u.to(tl.uint32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    e = ((bits >> 23).to(tl.int32) - 127).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = f * 8.700359959e-2 - 1.426747630e-1
    p = p * f + 1.491478701e-1
    p = p * f - 1.657758601e-1
    p = p * f + 1.996306229e-1
    p = p * f - 2.500133702e-1
    p = p * f + 3.333391077e-1
    radius = tl.sqrt_rn(-2.0 * (e * 0.693147181 + (f + f * f * (f * p - 0.5))))
    quarter = (r1 + 0x20000000) >> 30
    t = ((r1 << 2).to(tl.int32, bitcast=True) >> 2).to(tl.float32) * 1.4629180792671596e-9
    s = t * t
    sin = t + t * s * ((s * -1.951729790e-4 + 8.332178136e-3) * s - 1.666665494e-1)
    cos = ((s * 2.443844968e-5 - 1.388736750e-3) * s + 4.166664687e-2) * (s * s) + (1.0 - 0.5 * s)
    odd = quarter % 2 == 1
    z0 = tl.where(odd, sin, cos)
    z1 = tl.where(odd, cos, sin)
    return radius * tl.where((quarter == 1) | (quarter == 2), -z0, z0), radius * tl.where(quarter >= 2, -z1, z1)
