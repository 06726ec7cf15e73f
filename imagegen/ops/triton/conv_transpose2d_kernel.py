"""Transposed convolution of stride 2 and padding 1 in Triton, and the gradient of its input: one matrix product.

Output rows of one parity r see two rows of x (or one, for r = 0 of a 3x3 kernel): y[2i+r] = sum over t of
x[i+t+r-1] w[3-r-2t]. So the outputs of one parity of row and column, a phase, are an ordinary convolution of x, and
nothing is multiplied by the zeros between the pixels. The gradient of x is a convolution of stride 2 whose taps are the
whole kernel. Both are a sum over taps of shifted pixels times matrices, and one kernel computes them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._activation import LRELU_SLOPE
from .._layout import memory_format
from .._precision import allow_tf32
from ..eager.conv_transpose2d import output_shape
from .activation import activate


class Tile(NamedTuple):
    pixels: int  # of one program, in any order of batch, row and column
    channels: int  # of the output
    depth: int  # channels summed over at a time, of one tap
    warps: int
    stages: int


def conv_transpose2d(x, weight, bias, output_padding, scale, shift, activation, lots=None):
    """act((conv_transpose2d(x, weight) + bias) * scale + shift); weight (C, Cout, k, k), read in channels_last."""
    y = _empty(x, output_shape(x, weight, (2, 2), (1, 1), output_padding))
    return _multiply(x, weight, y, (bias, scale, shift), activation, gradient=False, lots=lots)


def conv_transpose2d_backward_input(grad, weight, shape):
    """The gradient of x, which has this shape."""
    y = _empty(grad, shape)
    return _multiply(grad, weight.transpose(0, 1), y, (None, None, None), "linear", gradient=True)


def conv_transpose2d_backward_weight(grad, x, kernel):
    """The gradient of weight, by torch's convolution: that of a strided one which takes grad to x.

    A matrix product over all pixels, which a kernel would have to cut into parts and add up again; cuDNN does.
    """
    shape = (x.size(1), grad.size(1), kernel, kernel)
    if 0 in x.shape or 0 in shape:
        return x.new_zeros(shape)
    return torch.nn.grad.conv2d_weight(grad, shape, x, stride=2, padding=1).contiguous()


def _empty(x, shape):
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _multiply(x, weight, y, per_channel, activation, gradient, lots=None):
    """weight: summed channels, channels of y, kernel."""
    if y.numel() == 0:
        return y
    B, N, H, W = y.shape
    phases = 1 if gradient else 4
    pixels = B * (H * W if gradient else triton.cdiv(H, 2) * triton.cdiv(W, 2))
    tile = _tile(x, pixels, N, phases)
    tiles = triton.cdiv(pixels, tile.pixels) if lots is None else lots.size(0) * lots.size(1) // phases
    with torch.cuda.device_of(x):
        conv_transpose2d_kernel[(tiles * phases * triton.cdiv(N, tile.channels),)](
            *(x, x.stride(), weight, weight.stride()),
            *(t if t is None else t.contiguous() for t in per_channel),
            *(y, y.stride(), lots),
            *(B, x.size(1), N, x.size(2), x.size(3), H, W),
            LRELU_SLOPE,
            GRADIENT=gradient,
            KERNEL=weight.size(2),
            ACT=activation,
            PRECISION=_precision(x),
            FAR=_far(pixels, x, weight, y),
            BM=tile.pixels,
            BN=tile.channels,
            BK=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y


def new_lots(x, channels):
    """Where conv_transpose2d leaves moments of y, of even size: (B, programs of an image, channels, 3), see _keep."""
    B, _, H, W = x.shape
    tile = _tile(x, B * H * W, channels, 4)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(B, triton.cdiv(H * W, tile.pixels) * 4, channels, 3, dtype=dtype, device=x.device)


# From the largest, which reads least, down: 2 taps C (pixels + channels) bytes a program through L2, for as many
# products as taps C pixels channels. Nothing spills on sm_80, sm_90 or sm_100, which test_conv_transpose2d_gpu.py sees.
# Predicted on an H200 (790 TFLOP/s, L2 at 6.5 TB/s) for 512 to 512 channels and x of 128 x 128, where tensor cores take
# 174 us and tensor descriptors would issue fewer instructions but read as much:
_HALF = (
    Tile(128, 256, 64, 8, 3),  # 248 us
    Tile(128, 128, 64, 8, 3),  # 330 us
    Tile(128, 64, 64, 4, 3),  # 496 us
    Tile(64, 64, 64, 4, 3),  # 661 us
    Tile(64, 32, 64, 4, 3),
    Tile(64, 16, 64, 4, 3),
)
# Of a contiguous image the pixels are read two bytes at a time, half an issue slot a product: about 2x the above.
_HALF_PLANES = (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 4, 2), Tile(64, 16, 32, 4, 2))
_FLOAT = (Tile(64, 64, 32, 8, 2), Tile(64, 32, 16, 4, 2), Tile(64, 16, 16, 4, 2))
_DOUBLE = (Tile(32, 32, 16, 4, 1), Tile(32, 16, 8, 4, 1))
_INTERPRETED = Tile(128, 64, 32, warps=1, stages=1)  # the interpreter takes as long for a small tile as for a large one


def tiles(element_size, channels_innermost):
    return {2: _HALF if channels_innermost else _HALF_PLANES, 4: _FLOAT, 8: _DOUBLE}[element_size]


def _tile(x, pixels, N, phases):
    """The largest tile, less than half empty, of which there is one for every multiprocessor; else the smallest."""
    if not x.is_cuda:
        return _INTERPRETED
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    fitting = [t for t in tiles(x.element_size(), x.stride(1) == 1) if t.channels < 2 * max(N, 16)]
    enough = (t for t in fitting if triton.cdiv(pixels, t.pixels) * phases * triton.cdiv(N, t.channels) >= processors)
    return next(enough, fitting[-1])


def _precision(x):
    """float32 in one product of tf32 where torch's convolutions may, else in three, which carry 22 of its 24 bits."""
    if x.dtype != torch.float32:
        return "ieee"
    return "tf32" if allow_tf32() else "tf32x3"


def _far(pixels, *tensors):
    """Whether a number of pixels, or an offset within an image or the weight, could pass 2^31."""
    spans = [sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors]
    return max(pixels, *spans) >= 2**30


@triton.jit
def conv_transpose2d_kernel(
    x,
    x_strides,  # b, c, h, w
    weight,
    weight_strides,  # c, n, kh, kw
    bias,  # [N] or None, like scale and shift
    scale,
    shift,
    y,
    y_strides,  # b, n, h, w
    lots,  # [B, programs of an image, N, 3] or None: moments of what each program makes of y
    B,
    C,
    N,
    H,
    W,
    out_h,
    out_w,
    alpha,
    GRADIENT: tl.constexpr,
    KERNEL: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    FAR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = act((sum over taps of x(shifted) weight(tap) + bias) * scale + shift).

    One program per BM pixels and BN channels of one phase. Programs of the same pixels run side by side, so that x
    comes from memory once, and the weight, which all share, stays in L2.
    """
    UP: tl.constexpr = 1 if GRADIENT else 2  # pixels of y per step of i and j, and of x
    DOWN: tl.constexpr = 2 if GRADIENT else 1
    n_tiles = tl.cdiv(N, BN)
    n0 = tl.program_id(0) % n_tiles * BN
    n = n0 + _range(BN, FAR)
    phase = tl.program_id(0) // n_tiles % (UP * UP)
    r, s = phase // UP, phase % UP
    rows, columns = tl.cdiv(out_h, UP), tl.cdiv(out_w, UP)
    tile = (tl.program_id(0) // n_tiles // (UP * UP)).to(n.dtype)
    if lots is None:
        m = tile * BM + _range(BM, FAR)
        inside = m < B * rows * columns
    else:  # no tile has pixels of two images
        tiles = tl.cdiv(rows * columns, BM)
        of_image = tile % tiles * BM + _range(BM, FAR)
        m = tile // tiles * rows * columns + of_image
        inside = of_image < rows * columns
    b, i, j = m // columns // rows, m // columns % rows, m % columns
    far_b = b.to(tl.int64)

    if GRADIENT:
        taps: tl.constexpr = KERNEL * KERNEL
    else:
        # Two taps in each direction, but the even outputs of a 3x3 kernel have one, its second. These are bits to shift
        # and mask by: to divide by a number of taps would call a function and add a sixth to the loop.
        more_h, more_w = (r, s) if KERNEL == 3 else (1, 1)
        taps = 1 << (more_h + more_w)
    x += far_b * x_strides[0] + (DOWN * i * x_strides[2] + DOWN * j * x_strides[3])
    weight += n * weight_strides[1]
    T: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BM, BN], T)
    for step in range(0, taps * tl.cdiv(C, BK)):
        if GRADIENT:
            chunk, kh, kw = step // taps, step % taps // KERNEL, step % KERNEL
            dh, dw = kh - 1, kw - 1
        else:
            chunk = step >> (more_h + more_w)
            th, tw = (step >> more_w & more_h) + 1 - more_h, (step & more_w) + 1 - more_w
            dh, dw, kh, kw = th + r - 1, tw + s - 1, 3 - r - 2 * th, 3 - s - 2 * tw
        c = chunk * BK + _range(BK, FAR)
        row, column = DOWN * i + dh, DOWN * j + dw
        seen = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        a = tl.load(
            (x + (dh * x_strides[2] + dw * x_strides[3]))[:, None] + (c * x_strides[1])[None, :],
            mask=seen[:, None] & (c < C)[None, :],
            other=0,
        )
        w = tl.load(
            (weight + (kh * weight_strides[2] + kw * weight_strides[3]))[None, :] + (c * weight_strides[0])[:, None],
            mask=(c < C)[:, None] & (n < N)[None, :],
            other=0,
        )
        total = tl.dot(a, w, total, input_precision=PRECISION)

    row, column = UP * i + r, UP * j + s
    if lots is not None:
        lots += (tl.program_id(0) // n_tiles).to(tl.int64) * N * 3
    y += far_b * y_strides[0] + (row * y_strides[2] + column * y_strides[3])
    inside = inside & (row < out_h) & (column < out_w)
    _finish_parts(total, bias, scale, shift, y, y_strides[1], n0, N, inside, lots, alpha, ACT, BM, BN, FAR)


@triton.jit
def _finish_parts(
    total,
    bias,
    scale,
    shift,
    y,
    y_n,
    n0,
    N,
    inside,
    lots,
    alpha,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FAR: tl.constexpr,
):
    """_finish in so many parts that their biases, scales and shifts, or moments, fit beside the sums in registers."""
    if BN > 128 or (BM * BN > 64 * 64 and lots is not None):
        HALF: tl.constexpr = BN // 2
        left, right = total.reshape(BM, 2, HALF).permute(0, 2, 1).split()
        _finish_parts(left, bias, scale, shift, y, y_n, n0, N, inside, lots, alpha, ACT, BM, HALF, FAR)
        _finish_parts(right, bias, scale, shift, y, y_n, n0 + HALF, N, inside, lots, alpha, ACT, BM, HALF, FAR)
    else:
        _finish(total, bias, scale, shift, y, y_n, n0 + _range(BN, FAR), N, inside, lots, alpha, ACT)


@triton.jit
def _finish(total, bias, scale, shift, y, y_n, n, N, inside, lots, alpha, ACT: tl.constexpr):
    """Bias, scale, shift and activation of channels n, stored at the pixels y points to, and their moments."""
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0).to(total.dtype)[None, :]
    if scale is not None:
        total *= tl.load(scale + n, mask=n < N, other=0).to(total.dtype)[None, :]
    if shift is not None:
        total += tl.load(shift + n, mask=n < N, other=0).to(total.dtype)[None, :]
    z = activate(total, alpha, ACT).to(y.dtype.element_ty)
    if lots is not None:
        _keep(lots + 3 * n, z.to(total.dtype), n < N, inside)
    tl.store(y[:, None] + (n * y_n)[None, :], z, mask=inside[:, None] & (n < N)[None, :])


@triton.jit
def _keep(to, z, channel, pixel):
    """Count, mean and centred sum of squares of each channel, those of y as it is stored: nothing cancels."""
    count = tl.sum(pixel.to(z.dtype), 0)
    mean = tl.sum(tl.where(pixel[:, None], z, 0), 0) / count
    centred = tl.where(pixel[:, None], z - mean[None, :], 0)
    tl.store(to, count, mask=channel)
    tl.store(to + 1, mean, mask=channel)
    tl.store(to + 2, tl.sum(centred * centred, 0), mask=channel)


@triton.jit
def _range(N: tl.constexpr, FAR: tl.constexpr):
    i = tl.arange(0, N)
    return i.to(tl.int64) if FAR else i
