import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, (tl.load(x + i).to(tl.float32) * 1.1).to(tl.bfloat16))


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_bf16_rounds_to_nearest_and_keeps_nan():
    x = torch.randn(1024).bfloat16()
    x[0], x[1] = float("nan"), float("inf")
    y = torch.empty_like(x)
    scale_kernel[(1,)](x, y, N=1024)
    torch.testing.assert_close(y, (x.float() * 1.1).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_bf16_dot():
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, N=16)
    torch.testing.assert_close(c, a.float() @ b.float())
