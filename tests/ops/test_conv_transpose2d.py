import re

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

compiled = pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
native = torch.ops.imagegen
DEVICES, EVERY_DEVICE = devices("conv_transpose2d"), every_device("conv_transpose2d")
NATIVE = pytest.mark.parametrize("backend, device", [p for p in DEVICES.args[1] if p.id != "triton"])

# (B, C, Cout, H, W): size 1, primes, powers of two and their neighbours, either side of few channels, panels and pairs.
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
# Kernel, stride, padding, output padding.
K4, K3 = ((4, 4), (2, 2), (1, 1), (0, 0)), ((3, 3), (2, 2), (1, 1), (1, 1))
KERNELS = {
    "k4": K4,
    "k3": K3,
    "k4, odd": ((4, 4), (2, 2), (1, 1), (1, 1)),
    "k3, odd": ((3, 3), (2, 2), (1, 1), (0, 0)),
    "k4, odd rows": ((4, 4), (2, 2), (1, 1), (1, 0)),
}
OTHERS = {
    "generator's first": ((4, 4), (1, 1), (0, 0), (0, 0)),
    "stride 3": ((5, 5), (3, 3), (2, 2), (2, 2)),
    "no padding": ((2, 2), (2, 2), (0, 0), (0, 0)),
    "uneven": ((3, 4), (2, 1), (1, 0), (1, 0)),
    "rows of k4": ((4, 4), (2, 2), (1, 0), (0, 0)),
}
GEOMETRIES = KERNELS | OTHERS


def make(shape, geometry=K4, dtype=torch.float32, layout="contiguous", device="cpu"):
    """x, weight, bias, scale and shift."""
    b, cin, cout, h, w = shape
    x, weight = torch.randn(b, cin, h, w), torch.randn(cin, cout, *geometry[0]) / (2 * cin**0.5)
    channels = torch.randn(cout), torch.rand(cout) + 0.5, torch.randn(cout)
    x, *others = (t.to(device, dtype) for t in (x, weight, *channels))
    return LAYOUTS[layout](x), *others


def plain(geometry=K4, activation="linear"):
    return lambda x, w, b=None, scale=None, shift=None: eager.conv_transpose2d(
        x, w, b, *geometry[1:], scale, shift, activation
    )


def ours(geometry=K4, activation="linear", backend=None):
    _, stride, padding, output_padding = geometry
    return lambda x, w, b=None, scale=None, shift=None: ops.conv_transpose2d(
        x,
        w,
        b,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        scale=scale,
        shift=shift,
        activation=activation,
        backend=backend,
    )


@pytest.mark.parametrize("name", GEOMETRIES)
def test_eager_is_what_torch_computes(name):
    geometry = GEOMETRIES[name]
    x, w, b, scale, shift = make((2, 3, 5, 4, 6), geometry, torch.float64)
    expected = F.conv_transpose2d(x, w, b, *geometry[1:]) * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(plain(geometry, "relu")(x, w, b, scale, shift), expected.relu())


def test_eager_is_the_definition():
    """Every pixel of x adds the weight, times its value, to the output around it."""
    x, w, *_ = make((1, 2, 3, 3, 4), dtype=torch.float64)
    full = torch.zeros(1, 3, 2 * 3 + 2, 2 * 4 + 2, dtype=torch.float64)
    for i in range(3):
        for j in range(4):
            full[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += torch.einsum("bc,cokl->bokl", x[:, :, i, j], w)
    torch.testing.assert_close(plain()(x, w), full[:, :, 1:-1, 1:-1])


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", [K4, K3], ids=["k4", "k3"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, geometry, dtype, backend, device, capability):
    check(ours(geometry, backend=backend), plain(geometry), *make(shape, geometry, dtype, device=device))


@pytest.mark.parametrize("backend, device", [p for p in DEVICES.args[1] if p.id != "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", list(KERNELS))
def test_shapes_that_fill_a_gpu(name, layout, dtype, backend, device):
    """And sizes that models use: what smaller shapes do not reach."""
    geometry = KERNELS[name]
    tensors = make((4, 72, 136, 36, 40), geometry, dtype, layout, device)
    check(ours(geometry, "silu", backend), plain(geometry, "silu"), *tensors)
    with torch.no_grad():  # where all is fused
        check(ours(geometry, "silu", backend), plain(geometry, "silu"), *tensors, gradients=False)


@NATIVE
@pytest.mark.parametrize("cout", [3, 35])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry(name, cout, backend, device):
    geometry = GEOMETRIES[name]
    backend = backend if name in KERNELS else None  # no kernel takes the others
    for height, width in ((5, 7), (8, 6), (1, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = make((2, 19, cout, height, width), geometry, dtype, device=device)
            check(ours(geometry, backend=backend), plain(geometry), *tensors)
    # In float alone: torch leaves elements of the weight's gradient unwritten here in bfloat16.
    check(ours(geometry, backend=backend), plain(geometry), *make((2, 19, cout, 1, 1), geometry, device=device))


@EVERY_DEVICE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", [K4, K3], ids=["k4", "k3"])
@pytest.mark.parametrize("shape", [(2, 35, 34, 5, 9), (2, 20, 3, 7, 6)], ids=str)
def test_layouts(layout, shape, geometry, backend, device, capability):
    x, w, *channels = make(shape, geometry, layout=layout, device=device)
    run, lay = ours(geometry, backend=backend), LAYOUTS[layout]
    y = check(run, plain(geometry), x, w, *channels)
    assert y.is_contiguous(memory_format=torch.channels_last if "channels_last" in layout else torch.contiguous_format)
    check(run, plain(geometry), x, lay(w), *map(lay, channels))


@compiled
@NATIVE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [3, 4])
def test_gradient_layouts(kernel, layout, backend, device):
    x, w, grad = torch.randn(2, 35, 5, 9), torch.randn(35, 34, kernel, kernel), torch.randn(2, 34, 10, 18)
    x, w, grad = (t.to(device) for t in (x, w, grad))
    extra = [4 - kernel] * 2
    laid = LAYOUTS[layout](grad)
    backward_input, backward_weight = native.conv_transpose2d_backward_input, native.conv_transpose2d_backward_weight
    assert torch.equal(backward_input(laid, w, extra), backward_input(grad, w, extra))
    assert torch.equal(backward_weight(laid, x, kernel, extra), backward_weight(grad, x, kernel, extra))


@DEVICES
@pytest.mark.parametrize("cout", [2, 6])
@pytest.mark.parametrize("given", range(8))
def test_every_choice_of_bias_scale_and_shift(given, cout, backend, device):
    x, w, *channels = make((2, 7, cout, 5, 5), device=device)
    channels = [t if given >> i & 1 else None for i, t in enumerate(channels)]
    check(ours(activation="silu", backend=backend), plain(activation="silu"), x, w, *channels)
    check_inference("silu", backend, x, w, *channels)


def check_inference(activation, backend, *tensors):
    """The output where everything is fused, which a gradient takes apart."""
    with torch.no_grad():
        y = ours(activation=activation, backend=backend)(*tensors)
    exact = plain(activation=activation)(*(t if t is None else t.double() for t in tensors))
    assert relative_error(y, exact) <= tolerance(torch.float32)


@DEVICES
def test_scale_and_shift_in_float32_beside_half_precision(backend, device):
    x, w, b, _, _ = make((2, 32, 20, 5, 5), dtype=torch.bfloat16, device=device)
    scale, shift = torch.rand(20, device=device) + 0.5, torch.randn(20, device=device)
    for i, s in enumerate((scale, scale.bfloat16())):
        y = check(ours(backend=backend), plain(), x, w, b, s, shift)
        assert y.dtype == torch.bfloat16
        fused = ops.conv_transpose2d(x, w, b, scale=s, shift=shift, backend=backend)
        assert relative_error(fused, plain()(*(t.double() for t in (x, w, b, s, shift)))) <= 4e-3, i


def test_integers_and_pairs():
    x, w, *_ = make((1, 3, 4, 5, 5))
    y = ops.conv_transpose2d(x, w)
    assert torch.equal(y, ops.conv_transpose2d(x, w, stride=(2, 2), padding=[1, 1], output_padding=0))
    assert y.shape == (1, 4, 10, 10)


EMPTY = [(0, 3, 5, 4, 4), (2, 0, 5, 4, 4), (2, 3, 0, 4, 4), (2, 3, 5, 0, 4)]


@DEVICES
@pytest.mark.parametrize("name", ["k4", "k3", "stride 3"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, name, backend, device):
    kernel, *geometry = GEOMETRIES[name]
    b, cin, cout, h, w = shape
    x = torch.randn(b, cin, h, w, device=device, requires_grad=True)
    weight = torch.randn(cin, cout, *kernel, device=device, requires_grad=True)
    bias = torch.randn(cout, device=device)
    y = ours((kernel, *geometry), backend=backend if name in KERNELS else None)(x, weight, bias)
    sizes = [(n - 1) * s - 2 * p + k + e for n, k, s, p, e in zip((h, w), kernel, *geometry, strict=True)]
    assert y.shape == (b, cout, *sizes)
    assert torch.equal(y, bias.reshape(-1, 1, 1).expand_as(y))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@EVERY_DEVICE
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cout", [3, 18])
def test_activations(activation, cout, backend, device, capability):
    tensors = make((2, 9, cout, 5, 6), device=device)
    check(ours(activation=activation, backend=backend), plain(activation=activation), *tensors)
    check_inference(activation, backend, *tensors)


@pytest.mark.parametrize("needed", range(5), ids=["x", "weight", "bias", "scale", "shift"])
@pytest.mark.parametrize("activation", ["linear", "silu"])
@pytest.mark.parametrize("direct", [False, pytest.param(True, marks=compiled)], ids=["function", "operator"])
def test_single_gradients(needed, activation, direct):
    def operator(x, w, b, scale, shift):
        return native.conv_transpose2d(x, w, b, [0, 0], scale, shift, activation)

    tensors = [t.requires_grad_(i == needed) for i, t in enumerate(make((1, 5, 6, 4, 3)))]
    (operator if direct else ours(activation=activation))(*tensors).sum().backward()
    twins = [t.detach().double().requires_grad_(i == needed) for i, t in enumerate(tensors)]
    plain(activation=activation)(*twins).sum().backward()
    for t, twin in zip(tensors, twins, strict=True):
        assert (t.grad is None) == (twin.grad is None)
        assert t.grad is None or relative_error(t.grad, twin.grad) <= 1e-5


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", [K4, K3], ids=["k4", "k3"])
def test_error_at_the_size_models_use(geometry, dtype, backend, device):
    tensors = make((1, 192, 160, 16, 16), geometry, dtype, device=device)
    check(ours(geometry, backend=backend), plain(geometry), *tensors)


@compiled
def test_more_than_two_to_the_31_elements():
    # numpy's memory is neither touched nor poisoned before we write to it: 4 GB of addresses, a few kB of memory.
    big = torch.from_numpy(np.empty(2**31 + 64, np.float16))
    x = big.as_strided((2, 3, 4, 4), (2**31 + 16, 16, 4, 1))  # the second image begins beyond 2^31
    x.copy_(torch.randn(2, 3, 4, 4))
    w, grad = torch.randn(3, 5, 4, 4).half(), torch.randn(2, 5, 8, 8).half()
    assert torch.equal(ops.conv_transpose2d(x, w), ops.conv_transpose2d(x.clone(), w))
    assert torch.equal(ops.conv_transpose2d(x, w[:, :3]), ops.conv_transpose2d(x.clone(), w[:, :3]))
    weight_grad = native.conv_transpose2d_backward_weight
    assert torch.equal(weight_grad(grad, x, 4, [0, 0]), weight_grad(grad, x.clone(), 4, [0, 0]))


@compiled
@pytest.mark.parametrize("cout", [3, 20])
@pytest.mark.parametrize("kernel", [3, 4])
def test_bit_identical_for_any_number_of_threads(kernel, cout):
    x, w = torch.randn(2, 40, 33, 31), torch.randn(40, cout, kernel, kernel)
    grad, extra = torch.randn(2, cout, 66, 62), [4 - kernel] * 2
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(
            (
                native.conv_transpose2d(x, w, None, extra, None, None, "silu"),
                native.conv_transpose2d_backward_input(grad, w, extra),
                native.conv_transpose2d_backward_weight(grad, x, kernel, extra),
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("size", [(9, 7), (6, 3), (4, 2), (2, 2)], ids=str)
def test_image_of_a_batch_is_the_image_alone(size):
    x, w, *channels = make((40, 20, 18, *size))  # among the sizes those where 40 images would suit the other algorithm
    y = ours()(x, w, *channels)
    for i in range(3):
        alone = ours()(x[i : i + 1], w, *channels)
        assert relative_error(y[i : i + 1], alone) <= 1e-6
        assert _library.load_error is not None or torch.equal(y[i : i + 1], alone)


def test_shift_equivariance():
    x, w, *_ = make((1, 8, 9, 12, 12))
    y, y_moved = ours()(x, w), ours()(torch.roll(x, (1, 2), (2, 3)), w)
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    assert relative_error(torch.roll(y, (2, 4), (2, 3))[inner], y_moved[inner]) <= 1e-6


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 70, 70, 13, 13))),
    geometry=st.sampled_from(sorted(KERNELS)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, geometry, layout, dtype):
    hypothesis.assume(tells(dtype, shape))
    geometry = KERNELS[geometry]
    check(ours(geometry), plain(geometry), *make(shape, geometry, dtype, layout))


@compiled
@NATIVE
@pytest.mark.parametrize("kernel", [3, 4])
def test_opcheck(kernel, backend, device):
    w = torch.randn(3, 6, kernel, kernel, device=device).requires_grad_()
    b, scale, shift = torch.randn(3, 6, device=device).requires_grad_()
    for x in (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        x = x.to(device).requires_grad_()
        for extra in ([0, 0], [1, 0]):
            y = native.conv_transpose2d(x, w, b, extra, scale, shift, "silu")
            grad = torch.randn_like(y).requires_grad_()
            torch.library.opcheck(native.conv_transpose2d, (x, w, b, extra, scale, shift, "silu"))
            torch.library.opcheck(native.conv_transpose2d, (x, w, None, extra, None, None, "linear"))
            torch.library.opcheck(native.conv_transpose2d_backward_input, (grad, w, extra))
            torch.library.opcheck(native.conv_transpose2d_backward_weight, (grad, x, kernel, extra))


@pytest.mark.parametrize("activation", ["linear", "silu"])
@pytest.mark.parametrize("name", ["k4", "k3", "k3, odd", "generator's first"])
def test_gradcheck_and_gradgradcheck(name, activation):
    geometry = GEOMETRIES[name]
    for shape in ((1, 2, 3, 1, 2), (2, 1, 2, 2, 1)):
        tensors = [t.requires_grad_() for t in make(shape, geometry, torch.float64)]
        assert torch.autograd.gradcheck(ours(geometry, activation), tensors)
        assert torch.autograd.gradgradcheck(ours(geometry, activation), tensors, fast_mode=True)


@compiled
@pytest.mark.parametrize("activation", ["linear", "silu"])
@pytest.mark.parametrize("extra", [[0, 0], [1, 1]], ids=str)
def test_gradgradcheck_of_the_operator(extra, activation):
    tensors = [t.requires_grad_() for t in make((1, 2, 3, 2, 1), K3, torch.float64)]

    def operator(x, w, b, scale, shift):
        return native.conv_transpose2d(x, w, b, extra, scale, shift, activation)

    assert torch.autograd.gradcheck(operator, tensors)
    assert torch.autograd.gradgradcheck(operator, tensors, fast_mode=True)
    x, w, *_ = tensors
    assert torch.autograd.gradgradcheck(lambda x, w: operator(x, w, None, None, None), (x, w))


@compiled
def test_one_tensor_as_scale_and_shift():
    x, w, b, scale, _ = make((1, 3, 5, 4, 4), dtype=torch.float64)
    scale.requires_grad_()
    y = native.conv_transpose2d(x, w, b, [0, 0], scale, scale, "silu")
    expected = plain(activation="silu")(x, w, b, scale, scale)
    for create_graph in (False, True):
        got, wanted = (
            torch.autograd.grad(t.sum(), scale, retain_graph=True, create_graph=create_graph)[0] for t in (y, expected)
        )
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["k4", "k3"])
def test_compile(name, layout):
    geometry = GEOMETRIES[name]
    torch._dynamo.reset()
    graph = torch.compile(ours(geometry, "silu"), fullgraph=True, dynamic=True)
    for shape in ((2, 6, 7, 4, 5), (3, 6, 7, 6, 9)):
        check(graph, plain(geometry, "silu"), *make(shape, geometry, layout=layout))
    with torch.no_grad():
        tensors = make((2, 6, 7, 5, 4), geometry, layout=layout)
        torch.testing.assert_close(graph(*tensors), ours(geometry, "silu")(*tensors))


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, w, b, scale, shift = (t.requires_grad_() for t in make((1, 40, 33, 5, 6)))
    with torch.autocast("cpu", dtype):
        y = ours(backend="cpu")(x, w, b, scale, shift)
        with torch.no_grad():
            fused = ours(backend="cpu")(x, w, b, scale, shift)
    assert y.dtype == dtype
    halves = [t.detach().to(dtype) for t in (x, w, b)]
    assert torch.equal(fused, ours(backend="cpu")(*halves, scale.detach(), shift.detach()))
    assert relative_error(y, fused) <= torch.finfo(dtype).eps
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, w, b, scale, shift))


@compiled
def test_changed_weight_is_noticed():
    x, w, *_ = make((1, 20, 36, 5, 5))
    grad, doubled = torch.randn(1, 36, 10, 10), [0, 0]
    before = ours()(x, w), native.conv_transpose2d_backward_input(grad, w, doubled)
    w.mul_(2)
    after = ours()(x, w), native.conv_transpose2d_backward_input(grad, w, doubled)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(2 * a, b)


@compiled
def test_a_weight_of_one_address_in_two_ops_shares_no_entry():
    x = torch.randn(1, 24, 5, 5)
    storage = torch.randn(24 * 24 * 16)
    four, three = storage.view(24, 24, 4, 4), storage[: 24 * 24 * 9].view(24, 24, 3, 3)
    for _ in range(2):
        for w, geometry in ((four, K4), (three, K3)):
            assert relative_error(ours(geometry)(x, w), plain(geometry)(x.double(), w.double())) <= 1e-5
        y = ops.upsample_conv2d(x, three)
        assert relative_error(y, eager.upsample_conv2d(x.double(), three.double(), None, "linear")) <= 1e-5


@pytest.mark.parametrize(("backend", "device"), backends("conv_transpose2d"))
def test_every_backend(backend, device):
    check(ours(backend=backend), plain(), *(t.to(device) for t in make((2, 19, 35, 5, 7))))


def test_nan_stays_where_it_is():
    x, w, *_ = make((1, 4, 20, 17, 17))
    x[0, 1, 4, 4] = float("nan")
    y = ours()(x, w)
    reached = F.conv_transpose2d(torch.isnan(x).any(1, keepdim=True).float(), torch.ones(1, 1, 4, 4), None, 2, 1) > 0
    assert torch.isnan(y).any(1, keepdim=True)[reached].all()
    far = F.max_pool2d(reached.float(), 15, 1, 7) == 0  # tiles of eight by eight share their sums
    assert y.isfinite()[far.expand_as(y)].all()


# ---- errors

X, W, B = torch.zeros(2, 3, 4, 5), torch.zeros(3, 6, 4, 4), torch.zeros(6)
TENSOR_ERRORS = {
    "x dtype": (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64", (X.long(), W, B)),
    "x rank": (ValueError, "x must have shape (B, C, H, W), got (3, 4, 5)", (X[0], W, B)),
    "weight dtype": (TypeError, "weight must have x's dtype torch.float32, got torch.float64", (X, W.double(), B)),
    "weight rank": (ValueError, "weight must have shape (C, Cout, kH, kW), got (3, 96)", (X, W.reshape(3, 96), B)),
    "weight kernel": (
        ValueError,
        "weight must have shape (C, Cout, kH, kW), got (3, 6, 4, 0)",
        (X, torch.zeros(3, 6, 4, 0), B),
    ),
    "weight channels": (
        ValueError,
        "weight must have shape (3, 6, 4, 4) to match x (2, 3, 4, 5), got (4, 6, 4, 4)",
        (X, torch.zeros(4, 6, 4, 4), B),
    ),
    "weight device": (ValueError, "weight must be on x's device cpu, got meta", (X, W.to("meta"), B)),
    "weight type": (TypeError, "weight must be a tensor, got int", (X, 1, B)),
    "bias dtype": (TypeError, "bias must have x's dtype torch.float32, got torch.float16", (X, W, B.half())),
    "bias shape": (ValueError, "bias must have shape (6,) to match weight (3, 6, 4, 4), got (5,)", (X, W, B[1:])),
    "scale dtype": (
        TypeError,
        "scale must have x's dtype torch.float64 or torch.float32, got torch.float16",
        (X.double(), W.double(), None, B.half()),
    ),
    "scale shape": (
        ValueError,
        "scale must have shape (6,) to match weight (3, 6, 4, 4), got (2, 6)",
        (X, W, None, torch.zeros(2, 6)),
    ),
    "shift shape": (
        ValueError,
        "shift must have shape (6,) to match weight (3, 6, 4, 4), got (5,)",
        (X, W, None, None, B[1:]),
    ),
}


@pytest.mark.parametrize("name", TENSOR_ERRORS)
def test_tensor_errors(name):
    error, message, args = TENSOR_ERRORS[name]
    x, w, b, scale, shift = (*args, None, None)[:5] if len(args) < 5 else args
    operator = None
    if name not in ("weight device", "weight type"):
        operator = lambda: native.conv_transpose2d(x, w, b, [0, 0], scale, shift, "linear")  # noqa: E731
    check_error(error, f"conv_transpose2d: {message}", lambda: ours()(*args), operator)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "stride must be an integer or a pair of integers, got 2.0", {"stride": 2.0}),
        (TypeError, "padding must be an integer or a pair of integers, got (1, 1, 1)", {"padding": (1, 1, 1)}),
        (ValueError, "stride must be at least 1, got (0, 2)", {"stride": (0, 2)}),
        (ValueError, "padding must be at least 0, got -1", {"padding": -1}),
        (ValueError, "output_padding must be smaller than stride (2, 2), got (2, 2)", {"output_padding": 2}),
        (
            ValueError,
            "padding must leave something of x (2, 3, 4, 5) under weight (3, 6, 4, 4), got (6, 6)",
            {"padding": 6},
        ),
        (
            ValueError,
            "activation must be one of linear, relu, lrelu, silu, gelu, tanh, sigmoid, got 'swish'",
            {"activation": "swish"},
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_option_errors(error, message, options):
    check_error(error, f"conv_transpose2d: {message}", lambda: ops.conv_transpose2d(X, W, **options))


@compiled
def test_operator_errors():
    for weight, message in (
        (torch.zeros(3, 6, 5, 5), "the kernel must be 3x3 or 4x4, got 5"),
        (torch.zeros(3, 6, 4, 3), "the kernel must be 3x3 or 4x4, got weight (3, 6, 4, 3)"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"conv_transpose2d: {message}")):
            native.conv_transpose2d(X, weight, None, [0, 0], None, None, "linear")
    for extra, message in (
        ([0, 2], "output_padding must be smaller than stride (2, 2), got (0, 2)"),
        ([-1, 0], "output_padding must be at least 0, got (-1, 0)"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"conv_transpose2d: {message}")):
            native.conv_transpose2d(X, W, None, extra, None, None, "linear")


@compiled
@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 5, 8, 10), (2, 6, 7, 10)], ids=str)
def test_gradient_operator_errors(shape):
    grad = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=r"conv_transpose2d_backward_input: grad (must have|of) shape"):
        native.conv_transpose2d_backward_input(grad, W, [0, 0])
    if shape[1] == 6:
        with pytest.raises(RuntimeError, match="conv_transpose2d_backward_weight: grad must have shape"):
            native.conv_transpose2d_backward_weight(grad, X, 4, [0, 0])
