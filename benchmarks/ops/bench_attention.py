"""Attention as image models have it: UNets and transformers over pixels, text's 77 keys, a decoder's one wide head."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.suite import Provider
from imagegen import ops
from imagegen.ops import eager

SHAPES = (  # (B, H, Lq, Lk, D), and "mask" for a random boolean one (Lq, Lk)
    (1, 8, 4096, 4096, 40),
    (1, 8, 4096, 4096, 40, "mask"),
    (2, 8, 1024, 1024, 80),
    (2, 8, 1024, 1024, 80, "mask"),
    (1, 8, 4096, 77, 40),
    (2, 8, 1024, 77, 80),
    (1, 8, 256, 256, 160),
    (1, 1, 4096, 4096, 512),
    (1, 10, 4096, 4096, 64),
    (2, 24, 1024, 1024, 128),
    (1, 16, 1024, 1024, 72),
    (1, 16, 1024, 1024, 72, "mask"),
    (64, 4, 64, 64, 32),
)
CUDA_SHAPES = (
    (2, 10, 4096, 4096, 64),
    (2, 10, 4096, 4096, 64, "mask"),
    (1, 24, 4608, 4608, 128),
    (2, 8, 4096, 4096, 40),
    (2, 16, 4096, 4096, 72),
    (2, 8, 1024, 1024, 80),
    (2, 8, 256, 256, 160),
    (1, 1, 16384, 16384, 512),
    (2, 8, 4096, 77, 40),
    (2, 10, 4096, 77, 64),
    (64, 4, 64, 64, 32),
)
QUICK_SHAPES = ((1, 8, 1024, 1024, 40), (1, 8, 1024, 77, 40))
TINY_SHAPE = (1, 2, 16, 16, 16)
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("nchw",)  # every tensor (B, L, H, D) as a projection leaves it
DIRECTIONS = ("forward", "forward+backward")
GRADIENTS = ("q", "k", "v")
TOLERANCE = 1e-5
NOTE = (
    "FLOP: 4 B H Lq Lk D, the two products, whatever the mask; a backward counts twice a forward (it takes 2.5 times "
    "as much). q, k, v and the output are (B, L, H, D) in memory. `unmasked` is imagegen on the same tensors without "
    "their mask: beside it the mask's cost."
)


def label(shape):
    B, H, Lq, Lk, D, *mask = shape
    return f"({B}, {H}, {Lq}x{Lk}, {D})" + (" mask" if mask else "")


def make_inputs(shape):
    B, H, Lq, Lk, D, *mask = shape
    inputs = {name: torch.randn(B, L, H, D) for name, L in (("q", Lq), ("k", Lk), ("v", Lk))}
    return {**inputs, "mask": (torch.rand(Lq, Lk) < 0.8).float()} if mask else inputs


def _boolean(tensors):
    return {**tensors, "mask": tensors["mask"] > 0.5} if "mask" in tensors else tensors


def _over_heads(attention):
    """attention on (B, H, L, D) as a function of tensors (B, L, H, D)."""

    def run(q, k, v, mask=None):
        return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)

    return run


def plain(q, k, v, mask):
    return eager.attention(q, k, v, mask, False, q.size(-1) ** -0.5)


def _sdpa(backend):
    """torch's attention by one of its kernels: which of them it takes by itself is not always the best."""

    def attention(q, k, v, mask):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask)

    return Provider(_over_heads(attention), _boolean, devices=("cuda",))


def fused(q, k, v, mask):
    return ops.attention(q, k, v, mask=mask)


PROVIDERS = {
    "imagegen": Provider(_over_heads(fused), _boolean),
    "eager": Provider(_over_heads(plain), _boolean),
    "sdpa": Provider(_over_heads(F.scaled_dot_product_attention), _boolean),
    "unmasked": Provider(_over_heads(fused), without="mask"),
    "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
}


def reference(q, k, v, mask=None):
    """Head by head: all score matrices in double would take gigabytes."""
    mask = None if mask is None else mask > 0.5
    heads = [t.transpose(1, 2).split(1, 1) for t in (q, k, v)]
    return torch.cat([plain(*qkv, mask) for qkv in zip(*heads, strict=True)], 1).transpose(1, 2)


def flops(shape):
    B, H, Lq, Lk, D, *_ = shape
    return 4 * B * H * Lq * Lk * D


def flops_made(shape, provider):
    return flops(shape)


def bytes_moved(shape, itemsize, direction):
    """q, k, v and the mask read, the output written; backward: those and the gradient read, three gradients written."""
    B, H, Lq, Lk, D, *mask = shape
    q, kv, mask = B * H * Lq * D, 2 * B * H * Lk * D, Lq * Lk if mask else 0
    return itemsize * (2 * q + kv) + mask + (itemsize * (4 * q + 2 * kv) + mask if direction != "forward" else 0)
