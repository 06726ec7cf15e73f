import copy
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    LAYOUTS,
    backends,
    check,
    check_error,
    devices,
    every_device,
    relative_error,
    tells,
    tolerance,
)

from imagegen import _library, ops
from imagegen.ops import eager
from imagegen.ops._activation import ACTIVATIONS
from imagegen.ops.eager.upsample_conv2d import moments as moments_of

pytestmark = pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
native = torch.ops.imagegen
DEVICES, EVERY_DEVICE = devices("upsample_conv2d"), every_device("upsample_conv2d")
NATIVE = pytest.mark.parametrize("backend, device", [p for p in DEVICES.args[1] if p.id != "triton"])

# (B, C, Cout, H, W): size 1, primes, powers of two and their neighbours, either side of few channels, panels and pairs;
# images of either algorithm's tiles.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 19, 35, 5, 7),
    (3, 3, 3, 8, 8),
    (1, 2, 90, 1, 13),
    (2, 33, 17, 31, 29),
    (1, 31, 4, 6, 140),
    (2, 65, 5, 3, 2),
    (1, 130, 64, 15, 17),
]


def make(shape, dtype=torch.float32, layout="contiguous", device="cpu"):
    b, cin, cout, h, w = shape
    x, weight = torch.randn(b, cin, h, w), torch.randn(cout, cin, 3, 3) / (3 * cin**0.5)
    x, weight, bias = (t.to(device, dtype) for t in (x, weight, torch.randn(cout)))
    return LAYOUTS[layout](x), weight, bias


def plain(activation="linear"):
    return lambda x, w, b: eager.upsample_conv2d(x, w, b, activation)


def ours(activation="linear", backend=None):
    return lambda x, w, b: ops.upsample_conv2d(x, w, b, activation=activation, backend=backend)


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, backend, device, capability):
    check(ours(backend=backend), plain(), *make(shape, dtype, device=device))


@EVERY_DEVICE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 35, 34, 5, 9), (2, 20, 3, 7, 6), (1, 18, 34, 25, 30)], ids=str)
def test_layouts(layout, shape, backend, device, capability):
    x, w, b = make(shape, layout=layout, device=device)
    y = check(ours(backend=backend), plain(), x, w, b)
    assert y.is_contiguous(memory_format=torch.channels_last if "channels_last" in layout else torch.contiguous_format)
    check(ours(backend=backend), plain(), x, LAYOUTS[layout](w), LAYOUTS[layout](b))


# From 1 MB on, planes of whole lines go past the caches: in half precision lines of two vectors, where runs of blocks
# begin and end with lines (64 pixels), and those that happen to (96).
@pytest.mark.parametrize("width", [32, 48, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_planes(dtype, width, capability):
    x, w, b = make((2, 9, 75, 44, width), dtype)
    y = check(ours(), plain(), x, w, b)
    assert y.numel() * y.element_size() >= 1 << 20
    assert torch.equal(y, ours()(LAYOUTS["channels_last"](x), w, b))


@NATIVE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_layouts(layout, backend, device):
    x, w, _ = make((2, 35, 34, 5, 9), device=device)
    grad = torch.randn(2, 34, 10, 18, device=device)
    for got, plain_got in (
        (
            native.upsample_conv2d_backward_input(LAYOUTS[layout](grad), w),
            native.upsample_conv2d_backward_input(grad, w),
        ),
        (
            native.upsample_conv2d_backward_weight(LAYOUTS[layout](grad), x),
            native.upsample_conv2d_backward_weight(grad, x),
        ),
    ):
        assert torch.equal(got, plain_got)


@EVERY_DEVICE
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 9, 3, 5, 6), (2, 9, 18, 5, 6), (1, 7, 18, 26, 31)], ids=str)
def test_activations(activation, shape, backend, device, capability):
    x, w, b = make(shape, device=device)
    check(ours(activation, backend), plain(activation), x, w, b)
    with torch.no_grad():  # where the activation is fused
        y = ops.upsample_conv2d(x, w, b, activation=activation, backend=backend)
    assert relative_error(y, plain(activation)(x.double(), w.double(), b.double())) <= tolerance(torch.float32)


@DEVICES
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("activation", ["linear", "silu"])
def test_single_gradients(needed, activation, backend, device):
    tensors = [t.requires_grad_(n) for t, n in zip(make((1, 5, 6, 4, 3), device=device), needed, strict=True)]
    ours(activation, backend)(*tensors).sum().backward()
    twins = [t.detach().double().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
    plain(activation)(*twins).sum().backward()
    for t, twin in zip(tensors, twins, strict=True):
        assert (t.grad is None) == (twin.grad is None)
        assert t.grad is None or relative_error(t.grad, twin.grad) <= 1e-5


@DEVICES
def test_no_bias(backend, device):
    x, w, _ = make((2, 7, 6, 5, 5), device=device)
    check(
        lambda x, w: ops.upsample_conv2d(x, w, backend=backend),
        lambda x, w: eager.upsample_conv2d(x, w, None, "linear"),
        x,
        w,
    )


@DEVICES
@pytest.mark.parametrize("shape", [(0, 3, 5, 4, 4), (2, 0, 5, 4, 4), (2, 3, 0, 4, 4), (2, 3, 5, 0, 4)], ids=str)
def test_empty(shape, backend, device):
    b, cin, cout, h, w = shape
    x, weight, bias = (
        torch.randn(b, cin, h, w, device=device, requires_grad=True),
        torch.randn(cout, cin, 3, 3, device=device, requires_grad=True),
        torch.randn(cout, device=device),
    )
    y = ops.upsample_conv2d(x, weight, bias, backend=backend)
    assert y.shape == (b, cout, 2 * h, 2 * w)
    assert torch.equal(y, bias.reshape(-1, 1, 1).expand_as(y))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [16, 24])
def test_error_at_the_size_models_use(size, layout, dtype, backend, device):
    check(ours(backend=backend), plain(), *make((1, 192, 160, size, size), dtype, layout, device))


@pytest.mark.parametrize("backend, device", [p for p in DEVICES.args[1] if p.id != "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cout", [128, 48])
def test_shapes_that_fill_a_gpu(cout, dtype, backend, device):
    """What smaller shapes do not reach: wide tiles, warpgroups, in passes and at once, and their moments."""
    x, w, b = make((8, 40, cout, 72, 40), dtype, "channels_last", device)
    check(ours("silu", backend), plain("silu"), x, w, b)
    with torch.no_grad():  # where all is fused
        check(with_moments("silu", backend, 8), plain_with_moments("silu", 8), x, w, b, gradients=False)


def test_more_than_two_to_the_31_elements():
    # numpy's memory is neither touched nor poisoned before we write to it: 4 GB of addresses, a few kB of memory.
    big = torch.from_numpy(np.empty(2**31 + 64, np.float16))
    x = big.as_strided((2, 3, 4, 4), (2**31 + 16, 16, 4, 1))  # the second image begins beyond 2^31
    x.copy_(torch.randn(2, 3, 4, 4))
    w, b, grad = torch.randn(5, 3, 3, 3).half(), torch.randn(5).half(), torch.randn(2, 5, 8, 8).half()
    assert torch.equal(ops.upsample_conv2d(x, w, b), ops.upsample_conv2d(x.clone(), w, b))
    assert torch.equal(ops.upsample_conv2d(x, w[:3], b[:3]), ops.upsample_conv2d(x.clone(), w[:3], b[:3]))
    weight_grad = native.upsample_conv2d_backward_weight
    assert torch.equal(weight_grad(grad, x), weight_grad(grad, x.clone()))


@pytest.mark.parametrize("cout", [3, 20])
def test_bit_identical_for_any_number_of_threads(cout):
    x, w, b = make((2, 40, cout, 33, 31))
    grad = torch.randn(2, cout, 66, 62)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        y = native.upsample_conv2d(x, w, b, "silu")
        results.append(
            (y, native.upsample_conv2d_backward_input(grad, w), native.upsample_conv2d_backward_weight(grad, x))
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@DEVICES
@pytest.mark.parametrize("size", [(9, 7), (16, 16), (24, 24)], ids=str)
def test_image_of_a_batch_is_the_image_alone(size, backend, device):
    x, w, b = make((3, 20, 18, *size), device=device)  # among the sizes one where all tiles would suit larger ones
    y = ours(backend=backend)(x, w, b)
    for i in range(3):
        assert torch.equal(y[i : i + 1], ours(backend=backend)(x[i : i + 1], w, b))


def test_shift_equivariance():
    x, w, b = make((1, 8, 9, 12, 12))
    moved = torch.roll(x, (1, 2), (2, 3))
    y, y_moved = ops.upsample_conv2d(x, w, b), ops.upsample_conv2d(moved, w, b)
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    assert relative_error(torch.roll(y, (2, 4), (2, 3))[inner], y_moved[inner]) <= 1e-6


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 70, 70, 13, 13))),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, layout, dtype):
    hypothesis.assume(tells(dtype, shape))
    check(ours(), plain(), *make(shape, dtype, layout))


@NATIVE
def test_opcheck(backend, device):
    for x in (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        w, b, grad = torch.randn(6, 3, 3, 3), torch.randn(6), torch.randn(2, 6, 8, 10)
        x, w, b, grad = (t.to(device).requires_grad_() for t in (x, w, b, grad))
        for activation in ("linear", "silu"):
            torch.library.opcheck(native.upsample_conv2d, (x, w, b, activation))
        torch.library.opcheck(native.upsample_conv2d, (x, w, None, "linear"))
        torch.library.opcheck(native.upsample_conv2d_backward_input, (grad, w))
        torch.library.opcheck(native.upsample_conv2d_backward_weight, (grad, x))


@pytest.mark.parametrize("activation", ["linear", "silu"])
@pytest.mark.parametrize("shape", [(1, 2, 5, 1, 2), (2, 1, 2, 3, 1)], ids=str)
def test_gradcheck_and_gradgradcheck(activation, shape):
    tensors = [t.requires_grad_() for t in make(shape, torch.float64)]
    assert torch.autograd.gradcheck(ours(activation), tensors)
    assert torch.autograd.gradgradcheck(ours(activation), tensors)


# ---- moments of y, for the normalisation that follows


def with_moments(activation="linear", backend="cpu", groups=3):
    return lambda x, w, b: ops.upsample_conv2d(x, w, b, activation=activation, moments=groups, backend=backend)


def plain_with_moments(activation="linear", groups=3):
    def run(x, w, b):
        y = eager.upsample_conv2d(x, w, b, activation)
        of_groups = y.unflatten(1, (groups, -1))
        mean, square = of_groups.mean((2, 3, 4)), of_groups.square().mean((2, 3, 4))
        return y, torch.stack((mean, square - mean.square()), -1)

    return run


MOMENTS = [pytest.param("eager", "cpu", id="eager"), *backends("upsample_conv2d")]


@pytest.mark.parametrize(("backend", "device"), MOMENTS)
@pytest.mark.parametrize("activation", ["linear", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 5, 12, 5, 7), (1, 8, 36, 17, 9), (3, 2, 3, 1, 1)], ids=str)
def test_moments(shape, layout, activation, backend, device):
    tensors = [t.to(device) for t in make(shape, layout=layout)]
    check(with_moments(activation, backend), plain_with_moments(activation), *tensors)
    with torch.no_grad():  # where the activation is fused
        y, moments = with_moments(activation, backend)(*tensors)
        assert relative_error(y, ours(activation, backend)(*tensors)) <= 1e-6
    assert relative_error(moments, moments_of(y.double(), 3)) <= 1e-5


@pytest.mark.parametrize(("backend", "device"), MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_of_values_far_from_zero(dtype, backend, device):
    """Where the mean is a thousand deviations away they lose three digits of seven, the difference of squares all."""
    x, w, b = (t.to(device) for t in make((1, 6, 12, 9, 10), dtype))
    y, moments = with_moments(backend=backend)(x, w / 8, b + 1000)
    for found, exact in zip(moments.unbind(-1), moments_of(y.double(), 3).unbind(-1), strict=True):
        assert relative_error(found, exact) <= 1e-4


@pytest.mark.parametrize(("backend", "device"), backends("upsample_conv2d"))
def test_moments_of_nothing(backend, device):
    x, w, b = (t.to(device) for t in make((0, 3, 6, 4, 4)))
    assert with_moments(backend=backend)(x, w, b)[1].shape == (0, 3, 2)
    x, w, b = (t.to(device) for t in make((2, 3, 6, 0, 4)))
    assert torch.equal(with_moments(backend=backend)(x, w, b)[1], x.new_zeros(2, 3, 2))


@pytest.mark.parametrize("activation", ["linear", "silu"])
def test_gradients_through_moments(activation):
    tensors = [t.requires_grad_() for t in make((1, 2, 3, 2, 1), torch.float64)]
    torch.library.opcheck(operator := native.upsample_conv2d_moments, (*make((2, 3, 6, 4, 5)), activation, 3))
    torch.library.opcheck(operator, (*tensors, activation, 3))
    run = lambda *t: operator(*t, activation, 3)  # noqa: E731
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(lambda *t: run(*t)[1], tensors)


def test_moments_compile():
    torch._dynamo.reset()
    compiled = torch.compile(with_moments("silu", None), fullgraph=True, dynamic=True)
    for shape in ((2, 6, 9, 4, 5), (3, 6, 9, 6, 9)):
        check(compiled, plain_with_moments("silu"), *make(shape))


@pytest.mark.parametrize("groups", [0, 4])
def test_moments_error(groups):
    message = f"moments must be a number of groups that divides weight's 6 output channels, got {groups}"
    check_error(
        ValueError, f"upsample_conv2d: {message}", lambda: ops.upsample_conv2d(*make((1, 2, 6, 2, 2)), moments=groups)
    )


@pytest.mark.parametrize("activation", ["linear", "silu"])
def test_gradgradcheck_of_the_operator(activation):
    tensors = [t.requires_grad_() for t in make((1, 2, 3, 2, 1), torch.float64)]
    operator = lambda *t: native.upsample_conv2d(*t, activation)  # noqa: E731
    assert torch.autograd.gradcheck(operator, tensors)
    assert torch.autograd.gradgradcheck(operator, tensors)


@DEVICES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile(layout, backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(ours("silu", backend), fullgraph=True, dynamic=True)
    for shape in ((2, 6, 7, 4, 5), (3, 6, 7, 6, 9)):
        check(compiled, plain("silu"), *make(shape, layout=layout, device=device))


@DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend, device):
    x, w, b = (t.requires_grad_() for t in make((1, 40, 33, 5, 6), device=device))
    with torch.autocast(device, dtype):
        y = ours(backend=backend)(x, w, b)
    assert y.dtype == dtype
    halves = (t.detach().to(dtype) for t in (x, w, b))
    assert torch.equal(y, ours(backend=backend)(*halves))
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


def test_autocast_leaves_float64_to_torch_rules():
    x, w, b = make((1, 4, 5, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.upsample_conv2d(x, w.bfloat16(), b).dtype == torch.bfloat16


# ---- the cache of transformed weights


def assert_fresh(x, w, b):
    assert relative_error(ops.upsample_conv2d(x, w, b), plain()(x.double(), w.double(), b.double())) <= 1e-5


def _edit(w):
    w.data[0, 0, 0, 0] += 1


def _edit_numpy(w):
    w.detach().numpy()[-1, -1, -1, -1] += 1


def _swap_signs(w):
    w.data.neg_()


def _permute(w):
    w.data.copy_(w.data.flip(0))


def _optimizer_step(w):
    w.grad = torch.ones_like(w)
    torch.optim.SGD([w], lr=0.1).step()


def _inference_edit(w):
    with torch.inference_mode():
        w.mul_(2)


@pytest.mark.parametrize(
    "change",
    [_edit, _edit_numpy, _swap_signs, _permute, _optimizer_step, _inference_edit],
    ids=lambda f: f.__name__[1:],
)
def test_changed_weight_is_noticed(change):
    x, w, b = make((1, 20, 36, 5, 5))
    w.requires_grad_()
    assert_fresh(x, w, b)
    change(w)
    assert_fresh(x, w, b)
    grad = torch.randn(1, 36, 10, 10)
    assert (
        relative_error(
            *(native.upsample_conv2d_backward_input(g, v) for g, v in ((grad, w), (grad.double(), w.double())))
        )
        <= 1e-5
    )


def test_state_dict_and_deep_copy():
    from imagegen import nn

    x = torch.randn(1, 6, 4, 4)
    a, b = nn.UpsampleConv2d(6, 8), nn.UpsampleConv2d(6, 8)
    before = a(x), b(x)
    clone = copy.deepcopy(a)
    b.load_state_dict(a.state_dict())
    assert torch.equal(b(x), before[0]) and not torch.equal(before[0], before[1])
    with torch.no_grad():
        clone.weight.zero_()
    assert torch.equal(a(x), before[0])


def test_new_weight_at_an_old_address():
    x, w, b = make((1, 20, 36, 5, 5))
    storage = torch.empty_like(w)
    for _ in range(3):
        storage.copy_(torch.randn_like(w))
        assert_fresh(x, storage.view_as(w), b)


def test_weights_of_two_dtypes_share_no_entry():
    x, w, b = make((1, 40, 36, 5, 5))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        storage = w.view(torch.uint8).view(-1)[: w.numel() * dtype.itemsize].view(dtype).view(w.shape)
        storage.copy_(torch.randn(w.shape))
        y = ops.upsample_conv2d(x.to(dtype), storage, b.to(dtype))
        assert relative_error(y, plain()(x.to(dtype).double(), storage.double(), b.to(dtype).double())) <= 1e-2


def test_algorithms_and_directions_share_no_weight():
    # One square weight serves both directions and, with a small image, both algorithms.
    w = torch.randn(24, 24, 3, 3) / 15
    for size in (26, 4, 26, 4):
        x, grad = torch.randn(1, 24, size, size), torch.randn(1, 24, 2 * size, 2 * size)
        exact, exact_grad = _exact(x, w, grad)
        assert relative_error(ops.upsample_conv2d(x, w), exact) <= 1e-5
        assert relative_error(native.upsample_conv2d_backward_input(grad, w), exact_grad) <= 1e-5


def _exact(x, w, grad):
    x = x.double().requires_grad_()
    y = eager.upsample_conv2d(x, w.double(), None, "linear")
    return y.detach(), torch.autograd.grad(y, x, grad.double())[0]


def test_threads_share_the_cache():
    x, w, b = make((1, 24, 40, 6, 6))
    weights = [w * (i + 1) for i in range(3)]
    expected = [ops.upsample_conv2d(x, v, b) for v in weights]
    shared, failures = torch.empty_like(w), []

    def work(i):
        for _ in range(30):
            if not torch.equal(ops.upsample_conv2d(x, weights[i], b), expected[i]):
                failures.append(i)
            ops.upsample_conv2d(x, shared, b)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for i in range(30):
        shared.fill_(i)
    for t in threads:
        t.join()
    assert not failures


# ---- errors

X, W, B = torch.zeros(2, 3, 4, 5), torch.zeros(6, 3, 3, 3), torch.zeros(6)
ERRORS = {
    "x dtype": (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64", (X.long(), W, B)),
    "x rank": (ValueError, "x must have shape (B, C, H, W), got (3, 4, 5)", (X[0], W, B)),
    "weight dtype": (TypeError, "weight must have x's dtype torch.float32, got torch.float64", (X, W.double(), B)),
    "weight rank": (ValueError, "weight must have shape (Cout, C, 3, 3), got (6, 27)", (X, W.reshape(6, 27), B)),
    "weight channels": (
        ValueError,
        "weight must have shape (6, 3, 3, 3) to match x (2, 3, 4, 5), got (6, 4, 3, 3)",
        (X, torch.zeros(6, 4, 3, 3), B),
    ),
    "weight kernel": (
        ValueError,
        "weight must have shape (6, 3, 3, 3) to match x (2, 3, 4, 5), got (6, 3, 5, 5)",
        (X, torch.zeros(6, 3, 5, 5), B),
    ),
    "weight device": (ValueError, "weight must be on x's device cpu, got meta", (X, W.to("meta"), B)),
    "weight type": (TypeError, "weight must be a tensor, got int", (X, 1, B)),
    "bias dtype": (TypeError, "bias must have x's dtype torch.float32, got torch.float16", (X, W, B.half())),
    "bias shape": (ValueError, "bias must have shape (6,) to match weight (6, 3, 3, 3), got (5,)", (X, W, B[1:])),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, message, args = ERRORS[name]
    operator = None if name in ("weight device", "weight type") else lambda: native.upsample_conv2d(*args, "linear")
    check_error(error, f"upsample_conv2d: {message}", lambda: ops.upsample_conv2d(*args), operator)


def test_activation_error():
    message = "upsample_conv2d: activation must be one of linear, relu, lrelu, silu, gelu, tanh, sigmoid, got 'swish'"
    check_error(
        ValueError,
        message,
        lambda: ops.upsample_conv2d(X, W, B, activation="swish"),
        lambda: native.upsample_conv2d(X, W, B, "swish"),
    )


@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 5, 8, 10), (2, 6, 7, 10)], ids=str)
def test_gradient_operator_errors(shape):
    grad = torch.zeros(shape)
    with pytest.raises(RuntimeError, match="upsample_conv2d_backward_input: grad must have shape"):
        native.upsample_conv2d_backward_input(grad, W)
    if shape[1] == 6:
        with pytest.raises(RuntimeError, match="upsample_conv2d_backward_weight: grad must have shape"):
            native.upsample_conv2d_backward_weight(grad, X)


@pytest.mark.parametrize(("backend", "device"), backends("upsample_conv2d"))
def test_every_backend(backend, device):
    x, w, b = (t.to(device) for t in make((2, 19, 35, 5, 7)))
    check(ours(backend=backend), plain(), x, w, b)


def test_nan_and_infinity_stay_where_they_are():
    x, w, b = make((1, 4, 20, 9, 9))
    x[0, 1, 4, 4] = float("nan")
    y = ops.upsample_conv2d(x, w, b)
    reached = F.max_pool2d(F.interpolate(torch.isnan(x).any(1, keepdim=True).float(), scale_factor=2), 3, 1, 1) > 0
    assert torch.isnan(y).any(1, keepdim=True)[reached].all()
    far = F.max_pool2d(reached.float(), 5, 1, 2) == 0  # tiles of four output pixels share their sums
    assert y.isfinite()[far.expand_as(y)].all()
