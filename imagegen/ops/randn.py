"""Normal noise that depends on the seed and the image, not on the batch, the device or the number of threads."""

import math

import torch

from .. import _library
from . import _backend, eager
from ._check import DTYPES


def randn(shape, *, seed, step=0, stream=0, first=0, device=None, dtype=torch.float32, backend=None):
    """Unit normal noise of a shape (B, …) that is counted, not drawn in order.

    Philox-4x32-10 under the key `seed` turns the counter (element // 4, first + i, step, stream) into 128 bits, of
    which element % 4 picks two words; Box–Muller makes them a normal:

        u = (r_0 + 1/2) / 2^32,  v = r_1 / 2^32,  z = sqrt(-2 ln u) cos(2 pi v), sqrt(-2 ln u) sin(2 pi v)

    Args:
        shape: (B, …); element counts within image i in the order of its axes.
        seed: an integer from 0 to 2^64 - 1.
        step: the sampler's step, from 0 to 2^32 - 1.
        stream: an independent sequence, from 0 to 2^16 - 1. `sampler_step` draws noise from stream 0 and the noise of
            `known` from stream 1.
        first: the index of the first image; image i of this batch is image first + i of any other.
        device, dtype: of the result; the normals are float32 and are rounded to dtype.
        backend: "eager", "cpu", "cuda", "triton" or None, which takes the first one ready on the device.

    Returns: a contiguous tensor. Every backend makes it of the same bits; normals differ by a few units in the
        last place.
    Raises: ValueError or TypeError that names the argument.
    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011; Box & Muller, 1958.
    """
    shape = tuple(shape)
    _check(shape, seed, step, stream, first, dtype)
    out = torch.empty(shape, device=device, dtype=dtype)
    run = _backend.choose("randn", _IMPLEMENTATIONS, backend, out)
    run(out, signed(seed), step, stream, first)
    return out


def _check(shape, seed, step, stream, first, dtype):
    if not shape:
        raise ValueError("randn: shape must have an axis of images, got ()")
    if dtype not in DTYPES:
        raise TypeError(f"randn: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    check_counter("randn", seed, step, first, shape[0])
    if not 0 <= stream < 2**16:
        raise ValueError(f"randn: stream must be from 0 to 2^16 - 1, got {stream}")
    if math.prod(shape[1:]) > 2**50:
        raise ValueError(f"randn: an image must have at most 2^50 elements, got {math.prod(shape[1:])}")


def check_counter(op, seed, step, first, samples):
    if not 0 <= seed < 2**64:
        raise ValueError(f"{op}: seed must be from 0 to 2^64 - 1, got {seed}")
    if not 0 <= step < 2**32:
        raise ValueError(f"{op}: step must be from 0 to 2^32 - 1, got {step}")
    if not 0 <= first <= 2**32 - samples:
        raise ValueError(f"{op}: first must be from 0 to 2^32 - {samples} for {samples} images, got {first}")


def signed(seed):
    """The operators take seeds as int64: the same 64 bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def _randn_triton(out, seed, step, stream, first):
    from .triton.randn_kernel import randn  # here, not above: importing Triton takes a second

    randn(out, seed, step, stream, first)


_library.define("randn_triton(Tensor(a!) out, int seed, int step, int stream, int first) -> ()", _randn_triton)
for twin in ("", "_triton"):
    _library.register(f"randn{twin}", fake=lambda out, seed, step, stream, first: None)

_IMPLEMENTATIONS = {
    "eager": eager.randn,
    "cpu": _library.op("randn"),
    "cuda": _library.op("randn"),
    "triton": _library.op("randn_triton"),
}
