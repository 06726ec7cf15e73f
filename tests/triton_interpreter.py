"""Repairs Triton's interpreter for bf16: upstream, casts truncate where they should round, and dot multiplies bits.

Arithmetic on bf16 values stays wrong, so kernels load, cast to float32, compute, and cast at the store.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair():
    """Install the repair for this process."""
    upstream_cast, upstream_dot, upstream_fp_to_fp = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_dot,
        InterpreterBuilder.create_fp_to_fp,
    )

    def cast(self, source, to):
        types = source.dtype.scalar, to.scalar
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(_to_float32(source.data), to.scalar)
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bfloat16(source.data), to.scalar)
        return upstream_cast(self, source, to)

    def fp_to_fp(self, source, to, rounding):
        if {source.dtype.scalar, to.scalar} == {tl.bfloat16, tl.float32}:
            return cast(self, source, to)
        return upstream_fp_to_fp(self, source, to, rounding)

    def dot(self, a, b, accumulator, *options):
        return upstream_dot(self, _widened(a), _widened(b), accumulator, *options)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_ext = InterpreterBuilder.create_fp_trunc = cast
    InterpreterBuilder.create_fp_to_fp = fp_to_fp
    InterpreterBuilder.create_dot = dot


def _to_float32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest even
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _widened(handle):
    return TensorHandle(_to_float32(handle.data), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle
