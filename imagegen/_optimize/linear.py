"""Linear layers and 1x1 convolutions by the faster of torch's two libraries.

torch multiplies float32 matrices on CPU with MKL and convolves with oneDNN. On processors that are not Intel's MKL
leaves AVX-512 unused: 95 GFLOP/s a core on Zen 5, where oneDNN multiplies the same matrices at 215.
"""

import torch

from .. import _library
from ..ops._layout import memory_format
from .modules import Fusion, is_dense_on_cpu, transformed

LIBRARY = "oneDNN"


def _is_faster():
    mkl, onednn = torch.backends.mkl.is_available(), torch.backends.mkldnn.is_available()
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return mkl and onednn and wide and _library._C is not None and not _library._C.cpu_is_intel()


FASTER = _is_faster()

# Below so many multiplications oneDNN's setup costs as much as it saves.
_FEWEST = 1 << 22

# A weight's gradient begins with transposes, which oneDNN copies: of larger matrices more slowly than MKL multiplies.
_LARGEST_TRANSPOSED = 1 << 22


class Linear(torch.nn.Linear):
    """A linear layer by oneDNN."""

    @staticmethod
    def fusions(linear):
        if FASTER and _is_dense_float32(getattr(linear, "weight", None)):
            yield Fusion(linear, [], "Linear", LIBRARY)

    def forward(self, input):
        if _gains(input, self.weight, -1):
            return _linear(input, self.weight, self.bias)
        return super().forward(input)


class PointwiseConv2d(torch.nn.Conv2d):
    """A 1x1 convolution, which is a product of matrices, by oneDNN."""

    @staticmethod
    def fusions(conv):
        if FASTER and _is_dense_float32(getattr(conv, "weight", None)) and is_pointwise(conv):
            yield Fusion(conv, [], "Conv2d 1x1", LIBRARY)

    def forward(self, input):
        if _gains(input, self.weight, 1) and input.dim() == 4:
            return _pointwise(input, self.weight, self.bias)
        return super().forward(input)


def is_pointwise(conv):
    """Whether the convolution is a matrix product per pixel."""
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _gains(x, weight, axis):
    """Whether oneDNN takes x, whose channels lie along that axis, and is worth its setup; else torch does as always."""
    if not (_is_dense_float32(x) and _is_dense_float32(weight)) or x.dim() == 0 or x.size(axis) != weight.size(1):
        return False
    return x.numel() * weight.size(0) >= _FEWEST and not (torch.is_autocast_enabled("cpu") or transformed())


def _is_dense_float32(t):
    return is_dense_on_cpu(t) and t.dtype is torch.float32


def _run_linear(x, weight, bias):
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _run_pointwise(x, weight, bias):
    if memory_format(x) is torch.channels_last:
        return _run_linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    weight = weight.flatten(1)[:, :, None, None]  # which lies in x's format, not in channels_last
    return torch.ops.aten.mkldnn_convolution(x.contiguous(), weight, bias, [0, 0], [1, 1], [1, 1], 1)


def _fake_linear(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.size(0))


def _fake_pointwise(x, weight, bias):
    B, _, H, W = x.shape
    if memory_format(x) is torch.channels_last:
        return x.new_empty(B, H, W, weight.size(0)).permute(0, 3, 1, 2)
    return x.new_empty(B, weight.size(0), H, W)


def _setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward_linear(ctx, grad):
    x, weight = ctx.saved_tensors
    grads, xs = (t.reshape(-1, t.size(-1)) for t in (grad, x))
    return (
        _linear(grad, weight.t(), None) if ctx.needs_input_grad[0] else None,
        _product(grads.t(), xs.t()) if ctx.needs_input_grad[1] else None,
        grads.sum(0) if ctx.needs_input_grad[2] else None,
    )


def _backward_pointwise(ctx, grad):
    x, weight = ctx.saved_tensors
    return (
        _pointwise(grad, weight.transpose(0, 1), None) if ctx.needs_input_grad[0] else None,
        _backward_weight(grad, x) if ctx.needs_input_grad[1] else None,
        grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None,
    )


def _backward_weight(grad, x):
    if memory_format(x) is torch.channels_last:
        pixels = (t.permute(1, 0, 2, 3).flatten(1) for t in (grad, x))
        return _product(*pixels)[:, :, None, None]
    images = zip(grad.flatten(2), x.flatten(2), strict=True)
    return sum(_product(*pixels) for pixels in images)[:, :, None, None]


def _product(a, b):
    """a b^T of matrices whose rows lie in memory or across it."""
    if max(a.numel(), b.numel()) > _LARGEST_TRANSPOSED:
        return a @ b.t()
    return _linear(a, b, None)


for _name, _run, _fake, _backward in (
    ("linear", _run_linear, _fake_linear, _backward_linear),
    ("pointwise", _run_pointwise, _fake_pointwise, _backward_pointwise),
):
    _library.define(f"{_name}(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _run)
    _library.register(_name, fake=_fake, setup_context=_setup_context, backward=_backward)

_linear, _pointwise = _library.past_autograd("linear"), _library.past_autograd("pointwise")

LAYERS = (Linear, PointwiseConv2d)
