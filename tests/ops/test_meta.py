"""Every op on tensors without values: shapes, dtypes and memory formats are those of a real run."""

import pytest
import torch

from imagegen import ops

ROW = [0, 0.9, 1.1, -0.5, 0.3, 0.6, 0.1, 0.2, 0, 0, 0, -1, 0, 0]


def call(op, t):
    """The op on tensors that t makes of shapes."""
    x = t(2, 8, 12, 10).contiguous(memory_format=torch.channels_last)
    return {
        "attention": lambda: ops.attention(t(2, 4, 9, 40), t(2, 2, 77, 40), t(2, 2, 77, 40)),
        "bias_act": lambda: ops.bias_act(x, t(8), act="silu"),
        "conv_transpose2d": lambda: ops.conv_transpose2d(x, t(8, 6, 4, 4), t(6)),
        "conv2d": lambda: ops.conv2d(x, t(6, 8, 3, 3), t(6), residual=t(2, 6, 12, 10)),
        "group_norm": lambda: ops.group_norm(x, 4, t(8), t(8), scale=t(2, 8), activation="silu"),
        "group_norm_factors": lambda: torch.stack(ops.group_norm_factors(x, 4, t(8))),
        "randn": lambda: ops.randn((2, 8, 12), seed=1, device=x.device),
        "sampler_step": lambda: ops.sampler_step(x, t(2, 8, 12, 10), ROW, noise=t(2, 8, 12, 10))[0],
        "sampler_step_": lambda: ops.sampler_step_(t(1, 2, 8, 12, 10), x, ROW, noise=t(2, 8, 12, 10)),
        "upsample_conv2d": lambda: ops.upsample_conv2d(x, t(6, 8, 3, 3), t(6), activation="silu"),
    }[op]()


@pytest.mark.parametrize("op", ops.__all__)
def test_meta_tensors(op):
    real = call(op, torch.randn)
    meta = call(op, lambda *shape: torch.randn(*shape, device="meta"))
    assert meta.is_meta
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())
